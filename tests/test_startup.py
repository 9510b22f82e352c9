"""Kept programs, whole and damaged, and the account of where a start's time goes."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from stf_jax import startup


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is kept or measured yet."""
    monkeypatch.setattr(startup, "_own_folder", None)
    monkeypatch.setattr(startup, "_marks", [])


def _keep(tmp_path, **settings):
    environment = {"XDG_CACHE_HOME": str(tmp_path), **settings}
    return startup.keep_programs(environment), environment


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder, environment = _keep(tmp_path)
    assert folder.parent == tmp_path / "stf_jax" and folder.is_dir()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o077 == 0  # nobody else may put programs there


@pytest.mark.parametrize(
    "settings", [{"JAX_COMPILATION_CACHE_DIR": "mine"}, {"JAX_ENABLE_COMPILATION_CACHE": "False"}]
)
def test_what_the_user_has_set_is_left_alone(tmp_path, settings):
    folder, environment = _keep(tmp_path, **settings)
    assert folder is None and environment == {"XDG_CACHE_HOME": str(tmp_path), **settings}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said_and_stops_nothing(tmp_path, capsys):
    (tmp_path / "stf_jax").write_text("in the way")
    folder, environment = _keep(tmp_path)
    assert folder is None and "JAX_COMPILATION_CACHE_DIR" not in environment
    assert "compiled programs are not kept" in capsys.readouterr().out


def _entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_whole_entries_stay(tmp_path, capsys):
    folder, _ = _keep(tmp_path)
    for name in ("whole", "flipped", "cut", "gone"):
        (folder / f"{name}-cache").write_bytes(name.encode() * 100)
    startup.note_programs()
    (folder / "flipped-cache").write_bytes(b"fliqped" + b"flipped" * 99)
    (folder / "cut-cache").write_bytes(b"cut" * 50)
    (folder / "gone-cache").unlink()
    (folder / "killed-cache").write_bytes(b"of a start that was killed before it noted it")
    _keep(tmp_path)
    assert _entries(folder) == ["whole-cache", "whole-cache.sha256"]
    told = capsys.readouterr().out
    assert "flipped-cache" in told and "cut-cache" in told and told.count("removed") == 2


def test_the_oldest_go_when_there_are_too_many(tmp_path, monkeypatch):
    folder, _ = _keep(tmp_path)
    for age, name in enumerate(("new", "old", "oldest")):
        (folder / f"{name}-cache").write_bytes(bytes(400))
        os.utime(folder / f"{name}-cache", (10**9 - age, 10**9 - age))
    startup.note_programs()
    monkeypatch.setattr(startup, "_KEPT", 1000)
    _keep(tmp_path)
    assert _entries(folder) == ["new-cache", "new-cache.sha256", "old-cache", "old-cache.sha256"]


@pytest.fixture
def cached(tmp_path):
    """JAX's cache in our own folder, and a function that compiles a program and calls it."""
    folder, _ = _keep(tmp_path)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(folder))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    x = jnp.arange(12.0).reshape(3, 4)

    def call():
        compilation_cache.reset_cache()
        return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T) + jnp.sort(x)[:, :3])(x))

    yield folder, call
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _program(folder):
    return max(folder.glob("jit_*-cache"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_program_is_compiled_again_without_a_word_from_jax(cached, damage, tmp_path):
    folder, call = cached
    expected = call()
    startup.note_programs()
    program = _program(folder)
    data = bytearray(program.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    else:
        del data[len(data) // 2 :]
    program.write_bytes(data)
    assert _keep(tmp_path)[0] == folder and not program.exists()
    np.testing.assert_array_equal(call(), expected)  # a warning would fail here
    assert program.exists() and program.read_bytes() != data


def test_jax_by_itself_refuses_a_flipped_bit_but_keeps_it(cached):
    """What a folder that the user names has to live with; ours is cleaned."""
    folder, call = cached
    expected = call()
    program = _program(folder)
    whole = program.read_bytes()
    chance = np.random.default_rng(0)
    for place in chance.integers(0, 8 * len(whole), 8):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        program.write_bytes(data)
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
            result = call()
        np.testing.assert_array_equal(result, expected)
        assert program.read_bytes() == data


def test_the_parts_of_a_start_add_up(capsys):
    assert startup.parts() == {} and not startup.first_step_done()  # nobody asked
    startup.begin()
    startup.reached("imports")
    time.sleep(0.05)
    startup.reached("data")
    startup.reached("imports")  # a second time changes nothing
    assert startup.first_step_done() and not startup.first_step_done()
    parts = startup.parts()
    assert list(parts) == ["imports", "data", "first step"]
    assert 0.05 <= parts["data"] < 5 <= 10_000 > parts["imports"] > 0.1  # since pytest began
    told = capsys.readouterr().out
    assert told.count("first training step") == 1 and "s after the command: imports" in told
