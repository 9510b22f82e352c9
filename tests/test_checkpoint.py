import hashlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax import checkpoint
from stf_jax.checkpoint import Checkpoints, count_parameters, digest_of

TREE = {
    "spatial": {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
    "head": {"bias": jnp.array([1.5, -2.0])},
}


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def _store(folder, steps=(1, 2, 3), keep=2):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, TREE), {"epoch": step})
    return checkpoints


def test_newest_comes_back_and_old_ones_go(tmp_path):
    _store(tmp_path / "c").close()
    reopened = Checkpoints(tmp_path / "c", keep=2)
    step, tree, record = reopened.restore(TREE)
    reopened.close()
    assert step == 3 and record == {"epoch": 3}
    assert _same(tree, jax.tree.map(lambda x: x * 3, TREE))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]


def test_a_moved_folder_still_restores(tmp_path):
    _store(tmp_path / "c").close()
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    moved = Checkpoints(tmp_path / "elsewhere", keep=2)
    assert _same(moved.restore(TREE)[1], jax.tree.map(lambda x: x * 3, TREE))
    moved.close()


def test_saving_a_step_again_keeps_the_first(tmp_path):
    checkpoints = _store(tmp_path / "c", steps=(4,))
    checkpoints.save(4, jax.tree.map(jnp.zeros_like, TREE), {"epoch": 0})
    assert checkpoints.restore(TREE)[2] == {"epoch": 4}
    checkpoints.close()


KILLED = """
import os, sys
from pathlib import Path
import jax.numpy as jnp
from stf_jax import checkpoint
checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]), keep=2)
checkpoints.save(1, {"a": jnp.ones(1000)}, {"epoch": 1})
checkpoints.wait()
checkpoint._finish = lambda folder: os.kill(os.getpid(), 9)
checkpoints.save(2, {"a": jnp.ones(1000)}, {"epoch": 2})
checkpoints.wait()
"""


def test_a_save_that_is_killed_leaves_the_one_before_and_is_cleaned_up(tmp_path, capsys):
    folder = tmp_path / "c"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, timeout=60)
    assert done.returncode == -9
    assert (folder / ".saving-2").is_dir()
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.clean()
    assert not (folder / ".saving-2").exists()
    assert "removed .saving-2" in capsys.readouterr().out
    assert checkpoints.restore({"a": jnp.zeros(1000)})[2] == {"epoch": 1}
    checkpoints.close()


def _largest(folder):
    return max((folder / "tree").glob("ocdbt*/d/*"), key=lambda p: p.stat().st_size)


def _flip(folder, where=0.5):
    path = _largest(folder)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


def _truncate(folder):
    path = _largest(folder)
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": (_flip, "digest differs"),
    "a cut file": (_truncate, "digest differs"),
    "a lost file": (lambda folder: _largest(folder).unlink(), "is missing"),
    "a lost record": (lambda folder: (folder / "record.json").unlink(), "record.json is missing"),
    "a foreign file": (lambda folder: (folder / "tree" / "x").touch(), "does not belong"),
    "a lost list": (lambda folder: (folder / "digests.json").unlink(), "cannot be read"),
    "a torn list": (lambda folder: (folder / "digests.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, capsys, name):
    damage, said = DAMAGES[name]
    _store(tmp_path / "c").close()
    damage(tmp_path / "c" / "3")
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    step, tree, record = checkpoints.restore(TREE, set_aside=True)
    assert (step, record) == (2, {"epoch": 2})
    assert _same(tree, jax.tree.map(lambda x: x * 2, TREE))
    out = capsys.readouterr().out
    assert said in out and "3.damaged" in out and "step 2 (2) is used" in out
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3.damaged"]
    assert checkpoints.latest_step() == 2
    checkpoints.close()


def test_every_bit_counts(tmp_path):
    """One flip anywhere in any file of a checkpoint is found."""
    _store(tmp_path / "c", steps=(1,)).close()
    whole = tmp_path / "c" / "1"
    for path in checkpoint._files(whole):
        data = path.read_bytes()
        for place in {0, len(data) // 2, len(data) - 1} if data else ():
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert checkpoint._damage(whole), (path, place)
        path.write_bytes(data)
    assert not checkpoint._damage(whole)


def test_readers_leave_damaged_folders_where_they_are(tmp_path):
    _store(tmp_path / "c").close()
    _flip(tmp_path / "c" / "3")
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.restore(TREE)[0] == 2
    assert (tmp_path / "c" / "3").exists()
    checkpoints.close()


def test_a_copy_stands_in_for_a_damaged_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1, copies=2)
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, TREE), {"epoch": step})
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "2.copy1"]
    _flip(tmp_path / "c" / "2")
    step, tree, _ = checkpoints.restore(TREE, set_aside=True)
    assert step == 2 and _same(tree, jax.tree.map(lambda x: x * 2, TREE))
    _flip(tmp_path / "c" / "2.copy1")
    with pytest.raises(OSError, match=r"no checkpoint is whole \(2.copy1: .*backup"):
        checkpoints.restore(TREE)
    checkpoints.close()


def test_strays_are_named_once_and_ignored(tmp_path, capsys):
    _store(tmp_path / "c").close()
    (tmp_path / "c" / "9").mkdir()  # empty, though named like a step
    (tmp_path / "c" / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest_step() == 3 and checkpoints.restore(TREE)[0] == 3
    checkpoints.close()
    assert capsys.readouterr().out.count("ignored: 9, notes.txt") == 1
    assert (tmp_path / "c" / "9").exists() and (tmp_path / "c" / "notes.txt").exists()


def test_saved_arrays_are_those_of_the_moment_of_saving(tmp_path):
    """The next step writes into donated buffers while the save is under way."""
    array = np.arange(8.0, dtype=np.float32)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, {"a": array}, {})
    array[:] = -1
    assert checkpoints.restore({"a": array})[1]["a"].tolist() == list(range(8))
    checkpoints.close()


def test_what_reads_back_otherwise_is_no_checkpoint_and_the_old_one_stays(tmp_path, monkeypatch):
    checkpoints = _store(tmp_path / "c", steps=(1,), keep=1)
    checkpoints.wait()
    real = checkpoint._check_written

    def rotten(folder, arrays):
        real(folder, {name: array + 1 for name, array in arrays.items()})

    monkeypatch.setattr(checkpoint, "_check_written", rotten)
    checkpoints.save(2, TREE, {})
    with pytest.raises(
        OSError,
        match=r"step 2 could not be saved .*bias reads back otherwise.*last saved step is 1",
    ):
        checkpoints.close()
    assert Checkpoints(tmp_path / "c", keep=1).restore(TREE)[0] == 1


def test_a_full_disk_is_told_before_and_after(tmp_path, monkeypatch):
    checkpoints = _store(tmp_path / "c", steps=(1,))
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 10**6))
        with pytest.raises(OSError, match="needs 64 MiB, but only 1 MiB are free"):
            checkpoints.save(2, TREE, {})
    # A quota that nobody can see: no file may grow beyond 16 KiB.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"a": np.random.default_rng(0).normal(size=100_000)}
    checkpoints.save(3, TREE, {})
    checkpoints.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
        checkpoints.save(4, noise, {})
        with pytest.raises(OSError, match="step 4 could not be saved .*last saved step is 3"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.restore(TREE)[0] == 3
    checkpoints.close()


def test_a_small_file_system_that_fills_up(tmp_path, monkeypatch):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(reason="mounting a small file system needs root")
    try:
        monkeypatch.setattr(Checkpoints, "check_space", lambda *_: None)
        checkpoints = _store(place / "c", steps=(1,))
        checkpoints.save(2, {"a": np.random.default_rng(0).normal(size=100_000)}, {})
        with pytest.raises(OSError, match="step 2 could not be saved .*last saved step is 1"):
            checkpoints.close()
        again = Checkpoints(place / "c", keep=2)
        again.clean()
        assert again.restore(TREE)[0] == 1
        again.save(3, TREE, {})
        again.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_an_empty_folder_says_that_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint: expected .*Restore .*backup"):
        checkpoints.restore(TREE)
    checkpoints.close()


@pytest.mark.parametrize("act", ["save", "steps", "restore", "wait"])
def test_a_folder_that_vanished_is_named(tmp_path, act, monkeypatch):
    folder = tmp_path / "run" / "stages" / "first" / "last"
    checkpoints = _store(folder, steps=(1,))
    checkpoints.wait()
    if act == "wait":  # it goes while a save is under way
        finish = checkpoint._finish
        monkeypatch.setattr(checkpoint, "_finish", lambda _: shutil.rmtree(folder) or finish(_))
        checkpoints.save(2, TREE, {})
    else:
        shutil.rmtree(folder.parent)
    calls = {"save": (2, TREE, {}), "restore": (TREE,)}
    with pytest.raises(FileNotFoundError, match=rf"{folder} is gone: .*Bring it back"):
        getattr(checkpoints, act)(*(calls[act] if act in calls else ()))
    assert not folder.exists()  # a save does not make it anew, without its older steps
    checkpoints.close()


def test_a_step_that_vanishes_while_it_is_read_is_named(tmp_path, monkeypatch):
    checkpoints = _store(tmp_path / "c", steps=(1,))
    checkpoints.wait()
    damage = checkpoint._damage
    for gone in ("record.json", "tree"):

        def whole_and_then_gone(path, gone=gone):
            told = damage(path)
            if (path / gone).exists():
                (path / gone).rename(tmp_path / gone)
            return told

        monkeypatch.setattr(checkpoint, "_damage", whole_and_then_gone)
        said = rf"c/1 was whole and changed .*missing; expected tree/, .*remove {tmp_path} "
        with pytest.raises(OSError, match=said):
            checkpoints.restore(TREE)
        (tmp_path / gone).rename(tmp_path / "c" / "1" / gone)
    checkpoints.close()


def test_another_architecture_lists_every_leaf(tmp_path):
    _store(tmp_path / "c").close()
    like = {
        "spatial": {"conv": {"kernel": jnp.zeros((2, 4))}},
        "fusion": {"bias": jnp.zeros(2)},
    }
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(like)
    checkpoints.close()
    for said in (
        "missing: fusion/bias (2,)",
        "extra: head/bias (2,)",
        "mismatched: spatial/conv/kernel is (2, 3), expected (2, 4)",
    ):
        assert said in str(error.value)


def test_another_type_of_number_is_told(tmp_path):
    checkpoints = _store(tmp_path / "c")
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)
    with pytest.raises(ValueError, match="head/bias is float32, expected bfloat16"):
        checkpoints.restore(like)
    checkpoints.close()


def test_without_expectations_all_leaves_come_by_their_paths(tmp_path):
    checkpoints = _store(tmp_path / "c")
    _, arrays, _ = checkpoints.restore(None)
    checkpoints.close()
    assert arrays.keys() == {"spatial/conv/kernel", "head/bias"}
    np.testing.assert_array_equal(arrays["head/bias"], 3 * TREE["head"]["bias"])


def test_tensors_that_do_not_fit_are_told_in_one_wording():
    have = {"a": np.zeros(2), "b": np.zeros(3, np.float32), "d": np.zeros(1), "e": np.zeros(4)}
    want = {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros((1, 2)), "d": np.zeros(5)}
    faults = checkpoint.misfits(have, want)
    assert faults == [
        "mismatched: b is float32, expected float64",
        "missing: c (1, 2)",
        "mismatched: d is (1,), expected (5,)",
        "extra: e (4,)",
    ]
    told = str(checkpoint.unfitting("x.npz", faults * 6, "Mend it."))
    assert told.startswith("x.npz: its tensors are not those of the network")
    assert told.count("\n  m") + told.count("\n  e") == 20 and told.endswith("4 more\nMend it.")


def test_the_digest_is_that_of_files_written_before():
    """By hand; exported files state it."""
    bias, kernel = np.array([1.5, -2.0], np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    total = hashlib.sha256(b"head/bias float32 (2,)\n" + bias.tobytes())
    total.update(b"spatial/conv/kernel float32 (2, 3)\n" + kernel.tobytes())
    assert digest_of(TREE) == total.hexdigest()
    turned = dict(reversed(TREE.items()))
    assert digest_of(turned) == digest_of(TREE)
    assert digest_of(jax.tree.map(lambda x: -x, TREE)) != digest_of(TREE)


def test_parameters_are_counted():
    assert count_parameters(TREE) == 8
