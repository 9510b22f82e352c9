"""The demo, shrunk, as a person runs it: commands in subprocesses, killed and continued."""

import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from stf_jax import demo
from stf_jax.run import Run
from stf_jax.train import abstract_state
from stf_jax.video import read_video

ROOT = Path(__file__).parent.parent
SEED = 5  # of when the run is killed
# Every part is there, only smaller: see `demo` for what the real one is.
SMALL = (
    "--config.data.validation_fraction=0.3",
    "--config.records.size=36",
    "--config.records.flow_size=48",
    "--config.sampling.num_frames=8",
    "--config.model.width=4",
    "--config.model.mst.width=32",
    "--config.model.conv3d.width=32",
    "--config.model.fusion.width=32",
    "--config.model.tpn.window=4",
    "--config.model.tpn.stride=4",
    "--config.model.lstm.hidden=8",
    "--config.stages.first.max_epochs=2",
    "--config.stages.second.max_epochs=1",
    "--config.checkpoint_every_steps=4",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the demo videos of six groups instead of twenty, one clip each."""
    place = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "GROUPS", 6)
        patch.setattr(demo, "CLIPS_PER_GROUP", 1)
        demo.generate(place / "videos", seed=0)
    (place / "videos" / demo._MARKER).unlink()
    bad = place / "videos" / "bobs_by_day"
    (bad / "no video_g02_c09.avi").write_text("just text")
    (bad / "empty_g02_c09.mp4").touch()
    whole = (bad / "bobs_by_day_g03_c01.avi").read_bytes()
    (bad / "cut ä_g03_c09.avi").write_bytes(whole[: len(whole) * 6 // 10])
    return place


def _command(place, workdir, *more):
    return [
        sys.executable, "-m", "stf_jax.main", "--config=configs/demo.py",
        "--config.data.name=folder", "--config.data.protocol=hold_out",
        r"--config.data.group_regex=_(g\d+)_",
        f"--config.data.root={place}/videos", f"--config.records.root={place}/records",
        f"--workdir={place}/{workdir}", *SMALL, *more,
    ]  # fmt: skip


def _finish(command, seconds=240):
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _until(command, seen, *, signum=signal.SIGKILL, wait=0.0):
    """Starts a command and sends it a signal once `seen()` holds; returns its code and errors."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not seen() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(wait)
    assert process.poll() is None, "it ended before the signal"
    if signum == signal.SIGKILL:
        os.killpg(process.pid, signum)  # its workers too
    else:
        process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def _steps(place, workdir, stage):
    folder = place / workdir / "stages" / stage / "last"
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]


@pytest.fixture(scope="module")
def killed(place):
    """The run, stopped in the preparation, twice in the first stage, in the second; finished."""
    command = _command(place, "killed")
    staged = lambda: len(list((place / "records").glob("*/staged/*.npz"))) > 5  # noqa: E731
    assert _until(command, staged)[0] == -signal.SIGKILL
    some = lambda: bool(_steps(place, "killed", "first"))  # noqa: E731
    code, errors = _until(command, some, signum=signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "the same command goes on from here" in errors and "Traceback" not in errors
    # At any step of either stage, and at any moment of it.
    chance = random.Random(SEED)
    stage, step = chance.choice([("first", 6), ("first", 8), ("second", 4)])
    there = lambda: any(s >= step for s in _steps(place, "killed", stage))  # noqa: E731
    assert _until(command, there, wait=chance.uniform(0, 0.3))[0] == -signal.SIGKILL
    return _finish(command)


def _results(place, workdir):
    return json.loads((place / workdir / "results.json").read_text())


def test_a_run_killed_three_times_ends_as_one_that_was_not(place, killed):
    assert "continuing after step" in killed
    _finish(_command(place, "whole"))
    one, other = _results(place, "killed"), _results(place, "whole")
    for key in ("top1", "top5", "mean_class_accuracy", "loss", "confusion", "num_videos",
                "interval95", "protocol", "excluded", "faults"):  # fmt: skip
        assert one[key] == other[key], key
    for stage, twin in zip(one["stages"], other["stages"], strict=True):
        for measured in ("seconds", "peak_memory_mb"):
            assert stage.pop(measured) > 0 and twin.pop(measured) > 0
        for timed in (stage, twin):
            assert 0 <= timed.pop("waiting_seconds")
        assert stage == twin
    scores = [(place / w / "scores.csv").read_bytes() for w in ("killed", "whole")]
    assert scores[0] == scores[1]
    for stage in ("first", "second"):
        (step, state, _), twin = (_final(place / w, stage) for w in ("killed", "whole"))
        assert step == twin[0] > 0
        jax.tree.map(np.testing.assert_array_equal, state, twin[1])


def _final(workdir, stage):
    """Step, training state and record that a stage ended with."""
    run = Run(workdir)
    last = run.last(stage)
    try:
        return last.restore(abstract_state(run.settings(), 8, stage))
    finally:
        last.close()


def test_the_results_say_all_that_a_number_needs(place, killed):
    results = _results(place, "killed")
    assert results["num_videos"] == sum(map(sum, results["confusion"]))
    assert 0 <= results["interval95"][0] <= results["top1"] <= results["interval95"][1] <= 1
    assert results["protocol"].startswith("group-held-out") and not results["leaky"]
    assert {"prepare", "first", "second", "evaluate"} == results["seconds"].keys()
    assert results["config_file"] == "configs/demo.py" and results["seed"] == 0
    assert results["changes"]["sampling.num_frames"] == 8 and results["peak_memory_mb"] > 100
    assert {"commit", "jax", "machine", "devices"} <= results["environment"].keys()
    # The last start was killed in one stage and went on from there: it did a first step.
    parts = ["process", "imports", "tracing", "data", "weights", "clips", "compiler", "first step"]
    assert list(results["start_up"]) == parts and sum(results["start_up"].values()) > 1
    assert re.search(r"^first training step [\d.]+ s after the command: process ", killed, re.M)
    assert results["stages"][1]["learning_rate"] < results["stages"][0]["learning_rate"]


def test_bad_files_are_told_and_counted(place, killed):
    results = _results(place, "killed")
    told = {row["video_id"]: row["reason"] for row in results["excluded"]}
    assert told["bobs_by_day/no video_g02_c09.avi"] == "not a video: text"
    assert told["bobs_by_day/empty_g02_c09.mp4"] == "empty file"
    cut = {r["video_id"]: r["reason"] for r in (*results["excluded"], *results["faults"])}
    assert "before its time" in cut["bobs_by_day/cut ä_g03_c09.avi"]
    for video_id in cut:
        assert video_id in killed
    used = sum(results["data"]["counts"].values())
    assert used + len(results["excluded"]) == 8 * 6 + 3
    assert results["num_videos"] == results["data"]["counts"]["test"]


def test_calling_again_says_that_all_is_done(place, killed):
    before = (place / "killed" / "results.json").read_bytes()
    assert "all is done already" in _finish(_command(place, "killed"))
    assert (place / "killed" / "results.json").read_bytes() == before


def test_evaluation_repeats_the_results_to_the_last_digit_also_where_a_run_was_moved(place, killed):
    results = _results(place, "killed")
    command = [sys.executable, "experiments/evaluate.py"]
    first = _finish(
        [*command, f"--workdir={place}/killed", f"--scores={place}/again.csv", f"--out={place}/out"]
    )
    (place / "killed").rename(place / "moved")
    try:
        assert _finish([*command, f"--workdir={place}/moved"]) == first
    finally:
        (place / "moved").rename(place / "killed")
    figures = json.loads(first)
    for key in ("top1", "top5", "mean_class_accuracy", "loss", "confusion", "num_videos",
                "interval95", "protocol", "leaky"):  # fmt: skip
        assert figures[key] == results[key], key
    for again in ("again.csv", "out/scores.csv"):
        assert (place / again).read_bytes() == (place / "killed" / "scores.csv").read_bytes()
    assert json.loads((place / "out" / "figures.json").read_text()) == figures
    assert (place / "out" / "confusion.png").stat().st_size > 1000


@pytest.mark.slow  # its parts: tests/test_evaluate.py, tests/test_views.py, tests/test_run.py
def test_many_views_are_scored_and_drawn(place, killed):
    out = place / "views"
    command = [
        sys.executable, "experiments/evaluate.py", f"--workdir={place}/killed",
        "--views=2x3xflip", "--stage=first", "--checkpoint=last", "--streams", f"--out={out}",
    ]  # fmt: skip
    figures = json.loads(_finish(command))
    assert (figures["stage"], figures["checkpoint"]) == ("first", "last")
    views = {"num_clips": 2, "num_crops": 3, "flip": True, "repeats": 1, "min_per_class": 0}
    assert views.items() <= figures["views"].items()
    videos = figures["num_videos"]
    assert figures["clip_level"]["num_clips"] == 2 * videos
    assert set(figures["streams"]) == {"without_flow", "without_rgb"}
    assert json.loads((out / "figures.json").read_text()) == figures
    with open(out / "clips.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * videos
    of_first = [row for row in rows if row["video_id"] == rows[0]["video_id"]]
    with open(out / "scores.csv", newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    for name in figures["class_names"]:
        mean = sum(float(row[name]) for row in of_first) / 12
        assert float(first[name]) == pytest.approx(mean, abs=2e-6)
    assert (out / "reliability_clips.png").stat().st_size > 1000
    wrong = subprocess.run(
        [*command, "--views=2y3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert "error: views: got '2y3', expected CLIPS" in wrong.stderr


def test_prediction_agrees_with_the_scores_and_names_bad_files(place, killed):
    with open(place / "killed" / "scores.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    good, bad = place / "videos" / row["video_id"], place / "videos/bobs_by_day/empty_g02_c09.mp4"
    done = subprocess.run(
        [sys.executable, "experiments/predict.py", f"--workdir={place}/killed", "--top=8",
         str(bad), str(good)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1  # one file could not be used
    assert "empty file" in done.stderr and str(bad) in done.stderr
    lines = re.findall(r"^ +([\d.]+)%  (\w+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 8 and sum(float(p) for p, _ in lines) == pytest.approx(100, abs=0.1)
    assert lines[0][1] == row["prediction"]
    for percent, name in lines:
        assert float(percent) == pytest.approx(100 * float(row[name]), abs=0.01)


def test_prediction_over_time_for_machines(place, killed, tmp_path):
    with open(place / "killed" / "scores.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    good = place / "videos" / row["video_id"]
    out, table = tmp_path / "out.mp4", tmp_path / "latency.csv"
    done = subprocess.run(
        [sys.executable, "experiments/predict.py", f"--workdir={place}/killed", "--json",
         "--window=10f", "--threshold=0", f"--timeline={tmp_path}/times", f"--annotate={out}",
         f"--latency={table}", str(good)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *windows, video = [json.loads(line) for line in done.stdout.splitlines()]
    frames = len(read_video(good).frames)
    assert [line["kind"] for line in windows] == ["window"] * (1 + -(-(frames - 10) // 5))
    assert (video["kind"], video["frames"], video["dropped"]) == ("video", frames, 0)
    for line in (*windows, video):
        assert line["input"] == str(good)
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["probability"] == max(line["probabilities"].values())
    assert windows[0]["latency_ms"].keys() == {"decode", "flow", "pack", "network"}
    with open(tmp_path / "times" / "timeline.csv", newline="", encoding="utf-8") as file:
        segments = list(csv.DictReader(file))
    assert [s["label"] for s in segments] == [s["label"] for s in video["segments"]]
    # Without a threshold every moment has a label.
    assert float(segments[0]["start_s"]) == 0
    assert float(segments[-1]["end_s"]) == pytest.approx(frames / 25, abs=0.01)
    assert (tmp_path / "times" / f"{good.stem}.png").stat().st_size > 5000
    assert len(read_video(out).frames) == frames
    with open(table, newline="", encoding="utf-8") as file:
        stages = {line["stage"]: line for line in csv.DictReader(file)}
    assert stages.keys() == {"decode", "flow", "pack", "network", "all", "lag"}
    assert int(stages["all"]["windows"]) == len(windows)


@pytest.mark.slow  # its parts: tests/test_watch.py; here the whole program gets the signal
def test_ctrl_c_ends_a_live_input_with_what_was_found(place, killed, make_video):
    path = make_video(place / "minute.mp4", frames=1500)
    process = subprocess.Popen(
        [sys.executable, "experiments/predict.py", f"--workdir={place}/killed", "--live",
         "--window=1s", "--threshold=0", str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]  # its name and two windows
    assert lines[1].startswith("  0:00.0 to 0:01.0  ") and lines[2].startswith("  0:00.5 to 0:01.5")
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "interrupted after" in errors and "latency per window" in errors
    assert "over time, " in rest and "60.0" not in rest


def test_the_report_stands_alone(place, killed):
    page = (place / "killed" / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for shown in ("confusion", "group-held-out", "empty file"):
        assert shown in page.lower() or shown in page


@pytest.mark.slow
def test_a_storm_of_faults_changes_nothing(tmp_path):
    """The shrunk demo through every kind of fault once; see experiments/bench/chaos.py."""
    told = _finish(
        [sys.executable, "experiments/bench/chaos.py", "--faults=22", "--seed=1",
         f"--out={tmp_path}/chaos.csv"],
        seconds=1200,
    )  # fmt: skip
    assert re.search(r"^\d+ faults survived in \d+ s: \d+ digests are the same$", told, re.M)
    with open(tmp_path / "chaos.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["identical"] == "True" for row in rows)
    (whole,) = [row for row in rows if row["kind"] == "all"]
    assert int(whole["struck"]) >= 20


def _together(place, workdir, *more):
    """Two processes that train one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2"
    return [
        subprocess.Popen(
            _command(place, workdir, *meeting, f"--process={process}", *more),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip


def _ends(processes):
    try:
        texts = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    ends = [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
    assert not any("stack trace" in errors for _, _, errors in ends), ends
    return ends


def _meet_at(place, workdir, step, processes):
    deadline = time.monotonic() + 300
    while not any(s >= step for s in _steps(place, workdir, "first")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_stopped_in_turn_end_as_two_that_were_not(place):
    for victim, step in ((1, 2), (0, 6)):
        processes = _together(place, "stopped")
        _meet_at(place, "stopped", step, processes)
        processes[victim].kill()
        code, _, errors = _ends(processes)[1 - victim]
        assert code not in (0, -signal.SIGKILL)
        assert "of this run has ended" in errors and "Traceback" not in errors, errors
    processes = _together(place, "stopped")
    _meet_at(place, "stopped", 10, processes)
    processes[1].send_signal(signal.SIGTERM)
    for code, _, errors in _ends(processes):
        assert code == 128 + signal.SIGTERM and "the same command goes on" in errors, errors
    first, second = _ends(_together(place, "stopped"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "continuing after step" in first[1]
    assert not re.sub(r"\[Gloo\].*\n", "", second[1])  # process 0 speaks for both
    assert [code for code, *_ in _ends(_together(place, "together"))] == [0, 0]
    for stage in ("first", "second"):
        for kind in ("last", "best"):
            one, other = (_arrays(place / w / "stages" / stage / kind)
                          for w in ("stopped", "together"))  # fmt: skip
            assert one == other and len(one) > 90
    scores = [(place / w / "scores.csv").read_bytes() for w in ("stopped", "together")]
    assert scores[0] == scores[1]
    _finish(_command(place, "alone"))
    # Not to the last bit: two processes add up a gradient in another order than one.
    losses = [_results(place, w)["loss"] for w in ("alone", "together")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "all is done already" in _finish(_command(place, "together"))


def _arrays(folder):
    """The bytes of every array of the newest checkpoint."""
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore((folder / str(step) / "tree").absolute())
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_both_and_names_the_clips_of_both(place):
    processes = _together(place, "wild", "--config.stages.first.learning_rate=1e30")
    for code, _, errors in _ends(processes):
        assert code == 1
        told = re.search(r"the loss is (nan|inf) at step \d+, on (.*?)\. The last finite", errors)
        assert told and len(told[2].split(", ")) == 4, errors
