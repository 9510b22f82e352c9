"""The demo, shrunk, as a person runs it: commands in subprocesses, killed and continued."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stf_jax import demo

ROOT = Path(__file__).parent.parent
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
    "--config.checkpoint_every_steps=2",
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


def _finish(command):
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _until(command, seen):
    """Starts a command, kills it with SIGKILL when `seen()` holds; returns how it ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not seen() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _steps(place, workdir, stage):
    folder = place / workdir / "stages" / stage / "last"
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]


@pytest.fixture(scope="module")
def killed(place):
    """The run, killed in the preparation and in both stages, and then finished."""
    command = _command(place, "killed")
    staged = lambda: len(list((place / "records").glob("*/staged/*.npz"))) > 5  # noqa: E731
    assert _until(command, staged) == -signal.SIGKILL
    first = lambda: any(s in (2, 4, 6) for s in _steps(place, "killed", "first"))  # noqa: E731
    assert _until(command, first) == -signal.SIGKILL
    second = lambda: bool(_steps(place, "killed", "second"))  # noqa: E731
    assert _until(command, second) == -signal.SIGKILL
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


def test_the_results_say_all_that_a_number_needs(place, killed):
    results = _results(place, "killed")
    assert results["num_videos"] == sum(map(sum, results["confusion"]))
    assert 0 <= results["interval95"][0] <= results["top1"] <= results["interval95"][1] <= 1
    assert results["protocol"].startswith("group-held-out") and not results["leaky"]
    assert {"prepare", "first", "second", "evaluate"} == results["seconds"].keys()
    assert results["config_file"] == "configs/demo.py" and results["seed"] == 0
    assert results["changes"]["sampling.num_frames"] == 8 and results["peak_memory_mb"] > 100
    assert {"commit", "jax", "machine", "devices"} <= results["environment"].keys()
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


def test_evaluation_repeats_the_results_to_the_last_digit(place, killed):
    results = _results(place, "killed")
    command = [sys.executable, "experiments/evaluate.py", f"--workdir={place}/killed"]
    first = _finish([*command, f"--scores={place}/again.csv"])
    assert first == _finish(command)
    figures = json.loads(first)
    for key in ("top1", "top5", "mean_class_accuracy", "loss", "confusion", "num_videos",
                "interval95", "protocol", "leaky"):  # fmt: skip
        assert figures[key] == results[key], key
    assert (place / "again.csv").read_bytes() == (place / "killed" / "scores.csv").read_bytes()


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
    assert wrong.returncode == 1 and "--views=2y3: expected CLIPS" in wrong.stdout + wrong.stderr


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


def test_the_report_stands_alone(place, killed):
    page = (place / "killed" / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for shown in ("confusion", "group-held-out", "empty file"):
        assert shown in page.lower() or shown in page


def test_a_run_that_was_moved_still_evaluates(place, killed):
    (place / "killed").rename(place / "moved")
    try:
        command = [sys.executable, "experiments/evaluate.py", f"--workdir={place}/moved"]
        assert json.loads(_finish(command))["top1"] == _results(place, "moved")["top1"]
    finally:
        (place / "moved").rename(place / "killed")


def test_a_signal_saves_and_says_how_to_go_on(place, killed):
    command = _command(place, "asked", "--config.stages.first.max_epochs=50")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not _steps(place, "asked", "first") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "the same command goes on from here" in errors and "Traceback" not in errors
