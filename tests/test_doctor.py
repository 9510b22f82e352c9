import builtins
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

import stf_jax
from stf_jax import demo, doctor, flow, host, train

ROOT = Path(__file__).parent.parent


def _faults(findings):
    return [finding for finding in findings if finding.level != "ok"]


def _distribution(folder, name, version):
    """What pip leaves of an installed distribution, in a folder of its own."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


@contextmanager
def _without_root():
    """As a user for whom permissions count."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.slow
def test_here_all_is_well(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stf_jax.doctor", f"--workdir={tmp_path}", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    findings = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {f["level"] for f in findings} <= {"ok", "warn"}
    assert {f["check"] for f in findings} == {
        "python", "libraries", "rivals", "devices", "folders", "space", "decoder", "flow",
        "training step", "compiled",
    }  # fmt: skip


def test_each_part_of_this_installation_is_fine(tmp_path):
    """All but the training step, whose check is tried below; in this process."""
    for check in (
        doctor.check_python,
        doctor.check_libraries,
        doctor.check_rivals,
        doctor.check_devices,
        doctor.check_decoder,
        doctor.check_flow,
        doctor.check_compilation_cache,
    ):
        findings = list(check())
        assert findings and not _faults(findings)
    folders = list(doctor.check_folders({"--workdir": tmp_path / "to" / "come"}))
    assert [f.check for f in folders] == ["folders", "space"] and folders[0].level == "ok"
    assert str(tmp_path) in folders[0].told and not list(tmp_path.iterdir())


def test_a_finding_is_a_line_and_its_fix_another(capsys, monkeypatch):
    told = [doctor.Finding("flow", "ok", "fine"), doctor.Finding("flow", "FAIL", "bad", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda workdir, records: iter(told))
    assert doctor.main([]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["ok", "flow", "fine"], ["FAIL", "flow", "bad"], ["fix:", "mend", "it"]]
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["fix"] == "mend it"
    del told[1]
    assert doctor.main([]) == 0


def test_another_python_is_named(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    (fault,) = _faults(doctor.check_python())
    assert fault.level == "FAIL" and "3.10.14" in fault.told and ">=3.11" in fault.told
    assert "make install PYTHON=" in fault.fix


def test_a_library_of_another_version_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(_distribution(tmp_path, "einops", "0.7.9"))
    (fault,) = _faults(doctor.check_libraries())
    assert fault.level == "FAIL" and "einops 0.7.9, wanted" in fault.told
    assert "'einops<0.9,>=0.8'" in fault.fix and fault.fix.startswith(sys.executable)
    assert "--constraint" in fault.fix and str(ROOT / "constraints.txt") in fault.fix


def test_a_missing_library_is_named(monkeypatch):
    real = importlib.metadata.version

    def find(name):
        if name == "dm-pix":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", find)
    (fault,) = _faults(doctor.check_libraries())
    assert "dm-pix is missing" in fault.told and "dm-pix<" in fault.fix


@pytest.mark.parametrize(
    ("rival", "ours"),
    [("tensorflow", "tensorflow-cpu"), ("opencv-python", "opencv-contrib-python-headless")],
)
def test_libraries_in_the_same_folder_as_ours_are_named(rival, ours, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(_distribution(tmp_path, rival, "9.9"))
    (fault,) = _faults(doctor.check_rivals())
    assert fault.level == "FAIL" and fault.told.startswith(f"{rival} 9.9 ") and ours in fault.told
    assert f"uninstall --yes {rival} && " in fault.fix and f"'{ours}" in fault.fix


@pytest.mark.parametrize(("forced", "fix"), [("cpu", "unset JAX_PLATFORMS"), ("", "EXTRAS=cuda12")])
def test_a_gpu_that_jax_does_not_use_is_named(forced, fix, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_GPU", tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", forced)
    (fault,) = _faults(doctor.check_devices())
    assert fault.level == "FAIL" and "NVIDIA GPU" in fault.told and fix in fault.fix


@pytest.mark.parametrize("mode", [0o555, 0o444])  # with the second, nor may be known what is in it
def test_a_folder_that_may_only_be_read_is_named(mode):
    with tempfile.TemporaryDirectory() as place:
        closed = Path(place) / "closed"
        Path(place).chmod(0o755)
        closed.mkdir(mode=mode)
        with _without_root():
            (fault,) = doctor.check_folders({"--records": closed / "records"})
    assert fault.level == "FAIL" and "Permission denied" in fault.told
    assert f"(in {closed})" in fault.told
    assert str(closed) in fault.fix and ("chown" in fault.fix or "chmod" in fault.fix)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    (fault,) = doctor.check_folders({"--workdir": tmp_path / "runs" / "demo"})
    assert fault.level == "FAIL" and "another --workdir" in fault.fix


@pytest.mark.parametrize(("free", "level"), [(0.5, "FAIL"), (5, "warn"), (50, "ok")])
def test_a_full_disk_is_named(free, level, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 0, int(free * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    writable, space = doctor.check_folders({"--workdir": tmp_path})
    assert writable.level == "ok" and space.level == level
    assert f"{free:.1f} GiB free" in space.told and bool(space.fix) == (level != "ok")


def test_a_decoder_that_loses_frames_is_named(monkeypatch):
    real = demo.encode
    monkeypatch.setattr(demo, "encode", lambda path, frames: real(path, frames[:-1]))
    faults = _faults(doctor.check_decoder())
    assert len(faults) == 2 and "11 of 12 frames" in faults[0].told
    assert "--force-reinstall" in faults[0].fix and "'av" in faults[0].fix


def test_flow_that_points_elsewhere_is_named(monkeypatch):
    real = flow.make_flow

    def turned(algorithm):
        compute = real(algorithm)
        turn = -1 if algorithm == "farneback" else 1
        return lambda previous, following: turn * compute(previous, following)

    monkeypatch.setattr(flow, "make_flow", turned)
    (fault,) = _faults(doctor.check_flow())
    assert "farneback 3.0" in fault.told and "opencv-contrib-python-headless" in fault.fix


@pytest.mark.parametrize("losses", [[1.0] * 6, [1.0, 0.9, 0.8, 0.7, 0.6, np.nan]])
def test_training_that_does_not_work_is_named(losses, monkeypatch):
    told = iter(losses)

    def step(state, *_, **__):
        return state, type("Record", (), {"loss": next(told)})

    monkeypatch.setattr(train, "train_step", step)
    (fault,) = doctor.check_training_step()
    assert fault.level == "FAIL" and "expected it finite and falling" in fault.told
    assert "'jax" in fault.fix


def test_a_folder_of_compiled_programs_that_is_of_no_use_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    old = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache" / "folder"))
    try:
        (fault,) = doctor.check_compilation_cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", old)
    assert fault.level == "warn" and "another JAX_COMPILATION_CACHE_DIR" in fault.fix


@pytest.mark.parametrize(
    ("library", "checks", "wanted"),
    [
        ("av", ["decoder"], "'av>=15,<20'"),
        ("packaging", ["python", "libraries"], "'packaging>=24'"),
    ],
)
def test_what_cannot_be_imported_is_a_finding_like_any_other(
    library, checks, wanted, tmp_path, monkeypatch
):
    real = builtins.__import__

    def refuse(name, *arguments, **more):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real(name, *arguments, **more)

    # As in a process that has not imported them yet.
    for name in ("video", "demo"):
        monkeypatch.delitem(sys.modules, f"stf_jax.{name}", raising=False)
        monkeypatch.delattr(stf_jax, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(doctor, "check_training_step", lambda: iter(()))
    faults = [f for f in _faults(doctor.examine(tmp_path, tmp_path)) if f.level == "FAIL"]
    assert [fault.check for fault in faults] == checks
    for fault in faults:
        assert fault.told == f"ModuleNotFoundError: No module named {library!r}"
        assert fault.fix.endswith(f"--force-reinstall {wanted}")
