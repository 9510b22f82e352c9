import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import ucf101
from stf_jax import host, main
from stf_jax.explain import Explainer
from stf_jax.predict import Predictor
from stf_jax.run import Run, Settings, TrainedOn

ROOT = Path(__file__).parent.parent


def _main(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "stf_jax.main", *arguments],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing, such as --config=configs/demo.py"),
        (["--config=configs/demo.py", "--config.batch_sise=3"], "batch_size"),
        (["--config=configs/demo.py", "--config.model.lstm.hiden=3"], "hidden"),
        (["--config=configs/demo.py", "--config.tpn.window=4"], "did you mean model.tpn"),
        (["--config=configs/demo.py", "--config.batch_size=many"], "batch_size"),
        (["--config=configs/demmo.py"], "configs/demmo.py"),
        (["--config=configs/ucf101.py:lapptop"], "lapptop"),
        (["--config=configs/demo.py", "--wordkir=x"], "workdir"),
    ],
)
def test_a_typo_ends_in_one_line_that_names_it(arguments, said):
    done = _main(*arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.root": "nowhere"}, "nowhere is not there"),
        ({"data.split": 7}, "data.split: got 7"),
        (
            {"records.flow_algorithm": "brox"},
            "choose one of: tvl1, dis, dis_quick, tvl1_opencv, farneback",
        ),
        ({"model.mst.spatial": (2, 3, 5)}, "mst.spatial"),
        ({"stages.first.schedule": "sine"}, "sine"),
        ({"inputs.crop_size": 8}, "inputs.crop_size"),
        ({"inputs.crop_size": 96}, "records.size is only 80 px"),
        (
            {"sampling.num_frames": 20, "stages.first.divide_clips": 5},
            "20 frames do not divide",
        ),
        ({"sampling.num_frames": 20}, "divide_clips: got 6, allowed: 1, 5 .sampling.num_frames=20"),
    ],
)
def test_an_impossible_value_ends_before_any_work(changes, said, tmp_path):
    config = ucf101.get_config("laptop")
    config.update_from_flattened_dict(changes | {"allow_cpu": True})
    with pytest.raises((ValueError, OSError), match=said):
        main.run_experiment(config, tmp_path / "run", "configs/ucf101.py:laptop", {})


def test_a_failure_ends_in_one_message_and_exit_code(tmp_path):
    done = _main("--config=configs/folder.py:laptop", f"--workdir={tmp_path}/run",
                 "--config.data.root=nowhere", "--config.allow_cpu=true")  # fmt: skip
    assert done.returncode == 1
    assert "error: nowhere is not there" in done.stderr and "Traceback" not in done.stderr


def test_default_workdirs_tell_presets_apart():
    names = {
        str(main.default_workdir(card))
        for card in ("configs/ucf101.py", "configs/ucf101.py:laptop", "configs/ucf101.py:split=2")
    }
    assert names == {"runs/ucf101", "runs/ucf101-laptop", "runs/ucf101-split2"}


def test_a_gpu_that_jax_does_not_use_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_GPU", tmp_path)
    with pytest.raises(RuntimeError, match="EXTRAS=cuda12"):
        main._check_devices(allow_cpu=False)
    main._check_devices(allow_cpu=True)


def test_records_tell_how_many_cores_a_run_had(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for usable, told in (({0, 1, 2, 3}, "4 CPU cores"), ({2}, "1 of 4 CPU cores")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, usable=usable: usable)
        assert host.machine().endswith(f", {told}")
        assert host.usable_cores() == sorted(usable)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert host.usable_cores() == [0, 1, 2, 3] and host.machine().endswith(", 4 CPU cores")


@pytest.mark.parametrize(
    ("cores", "batch_size", "parts", "wanted"),
    [
        (1, 4, 1, 1),
        (2, 4, 1, 2),
        (2, 5, 1, 1),  # 5 clips cannot be shared evenly
        (6, 8, 1, 4),
        (16, 4, 1, 4),  # no device without a clip
        (4, 8, 4, 2),  # each of the 4 parts has 2 clips
    ],
)
def test_a_cpu_is_as_many_devices_as_share_a_batch_evenly(
    cores, batch_size, parts, wanted, monkeypatch
):
    monkeypatch.setattr(host, "usable_cores", lambda: list(range(cores)))
    flag = f"--xla_force_host_platform_device_count={wanted}"
    for before, after in (
        ({}, {"XLA_FLAGS": flag} if wanted > 1 else {}),
        (
            {"XLA_FLAGS": "--xla_other=1"},
            {"XLA_FLAGS": f"--xla_other=1 {flag}" if wanted > 1 else "--xla_other=1"},
        ),
    ):
        host.divide_cores(batch_size, parts, before)
        assert before == after
    told = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    host.divide_cores(batch_size, parts, told)
    assert told == {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def test_a_workdir_belongs_to_one_configuration(tmp_path, tiny_config):
    run = Run(tmp_path / "run")
    run.claim(tiny_config)
    run.claim(tiny_config)
    # Where things are and how fast they go may change.
    tiny_config.records.root, tiny_config.records.workers = "elsewhere", 7
    run.claim(tiny_config)
    tiny_config.model.c3d.dense += 1  # not this network
    run.claim(tiny_config)
    tiny_config.stages.first.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"stages.first.learning_rate: 0.001 there, 0.5 now"):
        run.claim(tiny_config)
    assert Settings.of(tiny_config).records.root == "elsewhere"
    assert run.settings().config.stages.first.learning_rate == 0.001


def test_a_folder_without_a_run_is_named(tmp_path):
    for script, *more in (("evaluate",), ("report",), ("export", f"--out={tmp_path}/out")):
        done = subprocess.run(
            [sys.executable, f"experiments/{script}.py", f"--workdir={tmp_path}", *more],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert str(tmp_path) in done.stderr


@pytest.fixture
def older_run(tmp_path, tiny_config):
    """The folder of a run as a version left it that did not have all of today's keys."""
    run = Run(tmp_path / "run")
    run.claim(tiny_config)
    config = run.read_json("config.json")
    del config["eval"]["min_per_class"], config["model"]["remat"], config["model_devices"]
    config["eval"]["samples"] = 3
    run.write_json("config.json", config)
    run.write_json("results.json", {"environment": {"commit": "a1b2c3d-dirty"}})
    return run


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("evaluate", ()),
        pytest.param("predict", ("x.mp4",), marks=pytest.mark.slow),
        pytest.param("explain", ("x.mp4",), marks=pytest.mark.slow),
        pytest.param("export", ("--out={}/exported",), marks=pytest.mark.slow),
    ],
)
def test_a_run_of_another_version_is_told_by_its_keys(older_run, script, more):
    before = {path: path.read_bytes() for path in older_run.workdir.rglob("*") if path.is_file()}
    folder = older_run.workdir
    done = subprocess.run(
        [sys.executable, f"experiments/{script}.py", f"--workdir={folder}",
         *(word.format(folder.parent) for word in more)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for said in (
        f"{folder}/config.json", "missing: eval.min_per_class", "missing: model.remat.spatial",
        "missing: model_devices", "unknown: eval.samples", "git checkout a1b2c3d)",
        "Nothing of the run is lost",
    ):  # fmt: skip
        assert said in done.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_run_is_neither_loaded_nor_continued(older_run, tiny_config):
    for load in (Predictor.load, Explainer.load):
        with pytest.raises(ValueError, match="(?s)missing: eval.min_per_class.*checkout a1b2c3d"):
            load(older_run.workdir)
    with pytest.raises(
        ValueError, match="(?s)config.json has not the keys .*missing: eval.min_per_"
    ):
        older_run.claim(tiny_config)
    older_run.write_json("data.json", {"class_names": []})
    with pytest.raises(ValueError, match=r"data.json lacks name, stamp: .*another version"):
        TrainedOn.of(older_run)
    (older_run.workdir / "data.json").write_text('{"class_names": [')
    with pytest.raises(ValueError, match=r"data.json is not valid JSON"):
        older_run.read_json("data.json")


def test_a_read_only_workdir_fails_at_once(tmp_path):
    if os.geteuid() == 0:
        blocked = tmp_path / "file"  # root may write anywhere, but not below a file
        blocked.write_text("")
    else:
        blocked = tmp_path / "closed"
        blocked.mkdir(mode=0o500)
    done = _main("--config=configs/demo.py", f"--workdir={blocked}/run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(blocked) in done.stderr


def test_the_environment_names_commit_and_versions():
    facts = main.environment()
    assert {"commit", "python", "jax", "flax", "av", "devices", "machine"} <= facts.keys()
    assert json.dumps(facts)
