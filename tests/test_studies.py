"""Studies: which runs are made and which not, what their tables say, and the page of results."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import results_page, study_results, study_runs
from experiments.studies import STUDIES, Row, Study
from experiments.study_results import Tables, digest
from experiments.study_runs import Expected, make_runs, plan, sitting
from stf_jax.metrics import bootstrap, bootstrap_difference
from stf_jax.run import Settings, deciding

# ml_collections 1.1 loads cards in a way that Python 3.12 took away and 3.11 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROWS = (Row("a", "all"), Row("b", "half", {"model.streams": "rgb"}))
STUDY = Study("toy", "configs/demo.py", "Why?", ROWS, seeds=(0, 1), reference="a")
# What is run with seeds of its own is no less fresh.
ONE_SEED = dataclasses.replace(STUDY, seeds=(0,))

# Stands for `stf_jax.main`: leaves what a run leaves, or fails, or waits until it is stopped.
FAKE = """
import json, os, pathlib, shutil, signal, sys, time
(workdir,) = [pathlib.Path(a.partition("=")[2]) for a in sys.argv if a.startswith("--workdir=")]
place = workdir.parent
with open(place / "began.txt", "a") as file:
    file.write(f"{workdir.name} {sorted(os.sched_getaffinity(0))}\\n")
if (place / f"{workdir.name}.fail").exists():
    sys.exit("error: the disk is full")
workdir.mkdir(exist_ok=True)
shutil.copy(place / f"{workdir.name}.config", workdir / "config.json")
if (place / f"{workdir.name}.wait").exists() and not (workdir / "half").exists():
    def stop(number, frame):
        (workdir / "half").touch()
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (place / "waiting").touch()
    time.sleep(60)
(workdir / "report").mkdir()
(workdir / "report" / "index.html").touch()
(workdir / "results.json").write_text("{}")
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The four runs of the toy study, in the order in which they are made; the fake makes them."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(study_runs, "_TRAIN", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(study_runs, "_gpus", list)
    jobs = plan(ONE_SEED, tmp_path / "toy", rows=["a", "b"], seeds=[0, 1], changes={})
    (tmp_path / "toy").mkdir()
    for job in jobs:
        (tmp_path / "toy" / f"{job.workdir.name}.config").write_text(
            job.config.to_json_best_effort()
        )
    return jobs


def _began(jobs):
    lines = (jobs[0].workdir.parent / "began.txt").read_text().splitlines()
    return [line.partition(" ")[0] for line in lines]


def _make(jobs, **told):
    said, done = [], []
    options = {"at_once": 1, "budget": float("inf"), "expected": Expected([]), **told}
    outcome = make_runs(jobs, finished=done.append, say=said.append, **options)
    return outcome, [job.workdir.name for job in done], "\n".join(said)


def test_all_rows_come_before_a_second_seed_and_failures_stop_nothing(jobs):
    assert [job.name for job in jobs] == ["a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1"]
    (jobs[0].workdir.parent / "b-seed0.fail").touch()
    outcome, done, said = _make(jobs)
    assert _began(jobs) == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert done == ["a-seed0", "a-seed1", "b-seed1"]
    assert [job.workdir.name for job in outcome.failed] == ["b-seed0"]
    assert "FAILED, exit code 1" in said and "the disk is full" in said
    assert "the disk is full" in jobs[1].log.read_text()
    assert "a, seed 0: begins, 4 to make, time not known yet left" in said
    assert "b, seed 1: begins, 1 to make, about" in said
    assert [job.done() for job in jobs] == [True, False, True, True]


def test_runs_at_once_have_cores_of_their_own(jobs, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {cores[0], cores[0] + 1})
        shares = study_runs.shares(2)
        monkeypatch.undo()
    else:
        shares = study_runs.shares(2)
        outcome, done, _ = _make(jobs, at_once=2)
        assert sorted(done) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"] and not outcome.failed
    assert not set(shares[0]["cores"]) & set(shares[1]["cores"])
    with pytest.raises(ValueError, match="--jobs=999: there are .* cores"):
        study_runs.shares(999)
    monkeypatch.setattr(study_runs, "_gpus", lambda: ["4", "7"])
    given = [share["environment"] for share in study_runs.shares(2)]
    assert given == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    with pytest.raises(ValueError, match="--jobs=3: there are 2 GPUs"):
        study_runs.shares(3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_and_everything_goes_on_later(jobs, number):
    place = jobs[0].workdir.parent
    (place / "b-seed0.wait").touch()

    def strike():
        while not (place / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    striker = threading.Thread(target=strike)
    striker.start()
    outcome, done, said = _make(jobs)
    striker.join()
    assert outcome.stopped == number and not outcome.failed and done == ["a-seed0"]
    assert [job.workdir.name for job in outcome.left] == ["b-seed0", "a-seed1", "b-seed1"]
    assert "which save and end" in said and (place / "b-seed0" / "half").exists()
    left = [job for job in jobs if not job.done()]
    assert _make(left)[1] == ["b-seed0", "a-seed1", "b-seed1"]
    assert all(job.done() for job in jobs)


def test_no_run_is_begun_that_would_not_end_in_time(jobs):
    # Rows take as long as they have taken: 'b' longer than there is.
    expected = Expected([("a", 5.0), ("b", 1000.0)])
    outcome, done, _ = _make(jobs, budget=60.0, expected=expected)
    assert done == ["a-seed0"] and not outcome.failed and not outcome.stopped
    assert [job.workdir.name for job in outcome.left] == ["b-seed0", "a-seed1", "b-seed1"]
    assert Expected([("a", 2.0), ("a", 4.0)]).of("b") == 3.0 and Expected([]).of("a") is None
    assert study_runs.seconds_of("2h") == 7200 and study_runs.seconds_of("") == float("inf")
    with pytest.raises(ValueError, match="budget: got 'soon'"):
        study_runs.seconds_of("soon")


def test_a_folder_with_other_settings_is_refused_by_the_key(jobs):
    _make(jobs[:1])
    (other,) = plan(STUDY, jobs[0].workdir.parent, rows=["a"], seeds=[0],
                    changes={"batch_size": "2", "data.root": "elsewhere"})  # fmt: skip
    with pytest.raises(ValueError, match=r"(?s)a, seed 0: .*batch_size: 4 there, 2 now.*--out"):
        other.done()
    assert other.told == {"seed": "0", "batch_size": "2"}  # where things lie is not told


def test_settings_that_are_impossible_end_before_any_run(tmp_path):
    for rows, changes, said in (
        (["a", "c"], {}, "has no row 'c', but a, b"),
        (["a"], {"batch_sise": "3"}, "row 'a', configs/demo.py: .*batch_sise"),
        (["b"], {"model.width": "0"}, "row 'b', .*width"),
        (["b"], {"model.streams": "late"}, "row 'b' of study 'toy' sets it to rgb"),
    ):
        with pytest.raises(ValueError, match=said):
            plan(STUDY, tmp_path, rows=rows, seeds=[0], changes=changes)
    for broken in (
        {"rows": (Row("A", ""),)},
        {"rows": (Row("a", ""), Row("a", ""))},
        {"reference": "c"},
        {"seeds": (1, 1)},
    ):
        with pytest.raises(ValueError, match="study 'toy'"):
            dataclasses.replace(STUDY, **broken)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES.keys())
def test_every_row_of_every_study_is_a_network_that_can_be_built(study, tmp_path):
    jobs = plan(study, tmp_path, rows=[r.name for r in study.rows], seeds=[0], changes={})
    assert len({digest(deciding(job.config)) for job in jobs}) == len(study.rows)
    classes = {name for cue in study.cues.values() for name in cue}
    if classes:
        from stf_jax.demo import CLASS_NAMES

        assert classes == set(CLASS_NAMES)


# --- tables ----------------------------------------------------------------------------------

# What each of four videos was taken for; all are 'x', two each from sources s and t.
TAKEN = {
    ("a", 0): "xxxx", ("a", 1): "xxxy", ("b", 0): "xyxy", ("b", 1): "xyyy",
}  # fmt: skip


def _run(row, seed, taken, **changes):
    top1 = taken.count("x") / len(taken)
    line = {
        **dict.fromkeys(study_results.RUN_COLUMNS),
        "study": "toy", "row": row, "seed": seed, "overrides": "{}", "card": STUDY.card,
        "settings": f"{row}{seed}", "data": "ucf101", "subset": "test",
        "protocol": "official split 1", "leaky": False, "overlap": 0.0, "top1": top1,
        "low95": 0.1, "high95": 0.9, "mean_class": top1, "videos": len(taken), "chance": 0.5,
        "train_top1": 1.0, "parameters": 10, "gmac": 0.5, "train_seconds": 90.0,
        "run_seconds": 100.0, "commit": "abc", "machine": "two cores", **changes,
    }  # fmt: skip
    videos = [
        {"row": row, "seed": seed, "video_id": f"v{i}", "source": "sstt"[i], "label": "x",
         "predicted": called}
        for i, called in enumerate(taken)
    ]  # fmt: skip
    return line, videos


def _tables(**changes):
    tables = Tables({}, {})
    for (row, seed), taken in TAKEN.items():
        tables = tables.merged(*_run(row, seed, taken, **changes))
    return tables


def test_the_summary_by_hand():
    first, second = study_results.summarise(STUDY, _tables())
    assert (first["row"], second["row"]) == ("a", "b")
    assert first["mean"] == pytest.approx((1 + 0.75) / 2)
    assert first["sd"] == pytest.approx(0.25 / 2**0.5)
    assert (first["min"], first["max"], first["seeds"]) == (0.75, 1.0, "0 1")
    assert (first["videos"], first["sources"]) == (4, 2)
    assert first["minutes"] == 1.5 and first["difference"] is None
    assert second["mean"] == pytest.approx((0.5 + 0.25) / 2)
    assert second["difference"] == pytest.approx(-0.5)
    assert second["compared"] == "seeds 0 1, the same videos"
    # Two sources: a draw has s twice, each once, or t twice; right are 4 and 3 of 4 for 'a' (both
    # seeds together), 2 and 1 for 'b'. So the differences are -0.5 whatever is drawn.
    assert (first["low95"], first["high95"]) == (0.75, 1.0)
    assert (second["low95"], second["high95"]) == (0.25, 0.5)
    assert (second["difference_low95"], second["difference_high95"]) == (-0.5, -0.5)


def test_only_seeds_that_both_have_are_compared():
    tables = _tables()
    keys = [key for key in tables.runs if key != ("a", "1")]
    some = Tables({k: tables.runs[k] for k in keys}, {k: tables.videos[k] for k in keys})
    second = study_results.summarise(STUDY, some)[1]
    assert second["difference"] == 0.5 - 1.0 and second["compared"].startswith("seeds 0,")
    # All of 'a' are right, whatever is drawn: two of two sources.
    first = study_results.summarise(STUDY, some)[0]
    assert (first["low95"], first["high95"]) == pytest.approx((0.342, 1.0), abs=5e-4)
    pooled = dataclasses.replace(STUDY, pooled="each left out once", reference="")
    *_, last = study_results.summarise(pooled, some)
    assert last["row"] == "all" and last["mean"] == pytest.approx((4 + 2 + 1) / 12)
    cued = dataclasses.replace(STUDY, cues={"colour": ("x",), "none": ("z",)})
    line = study_results.summarise(cued, some)[1]
    assert line["cue_colour"] == pytest.approx(3 / 8) and line["cue_none"] is None


def _dots(study):
    """Accuracies that are drawn as dots, by the name of the line that they stand on."""
    lines = study_results.summarise(study, _tables())
    figure = Figure()
    axes = figure.subplots()
    study_results._draw_dots(axes, study, _tables(), lines)
    drawn = [line for line in axes.lines if line.get_marker() == "o"]
    assert [set(line.get_ydata()) for line in drawn] == [{place} for place in range(len(lines))]
    return {line["row"]: sorted(dots.get_xdata()) for line, dots in zip(lines, drawn, strict=True)}


def test_dots_stand_on_their_own_line_and_on_that_of_all_rows_together():
    found = _dots(STUDY)
    a, b = found["a"], found["b"]
    assert len(a) == len(b) == 2 and a != b
    pooled = dataclasses.replace(STUDY, pooled="each left out once", reference="")
    assert _dots(pooled) == {"a": a, "b": b, "all": sorted(a + b)}
    rows = (dataclasses.replace(STUDY.rows[0], name="all"), STUDY.rows[1])
    with pytest.raises(ValueError, match="'all' is the line of all rows together"):
        dataclasses.replace(STUDY, rows=rows, pooled="each left out once", reference="")


def test_differences_are_paired_over_the_same_draws():
    rng = np.random.default_rng(3)
    sources = rng.integers(0, 9, 60)
    first, second = rng.integers(0, 2, (2, 60)).astype(float)
    got = bootstrap_difference((first, second), (sources, sources), seed=4)
    zeros = np.zeros(60, int)
    np.testing.assert_allclose(got, bootstrap(first - second, zeros, sources, 1, seed=4).top1)
    # On other sources they vary apart, which is wider than where they are the same.
    same = bootstrap_difference((first, first), (sources, sources), seed=4)
    apart = bootstrap_difference((first, first), (sources, sources + 9), seed=4)
    assert same == (0.0, 0.0) and apart[0] < -0.05 and apart[1] > 0.05
    assert bootstrap_difference((first, first), (zeros, zeros), seed=4) is None


def test_tables_of_other_sittings_are_kept_and_stale_runs_are_left_out(tmp_path):
    _tables().write(tmp_path, "study_toy")
    there = Tables.read(tmp_path, "study_toy")
    assert there == _tables()
    wanted = {key: run["settings"] for key, run in there.runs.items()} | {("b", "1"): "changed"}
    merged = there.marked(wanted)
    assert [key for key, run in merged.runs.items() if run["stale"]] == [("b", "1")]
    line = study_results.summarise(STUDY, merged.fresh())[1]
    assert line["seeds"] == "0" and line["mean"] == 0.5
    # What is stale stays in the files until its run is made again.
    merged.write(tmp_path, "study_toy")
    assert Tables.read(tmp_path, "study_toy").runs["b", "1"]["stale"] == "yes"
    again = merged.merged(*_run("b", 1, "xxxx", settings="changed")).marked(wanted)
    assert not again.runs["b", "1"]["stale"] and len(again.runs) == 4
    with pytest.raises(ValueError, match="generated and real videos never share a table"):
        there.merged(*_run("b", 2, "xxxx", data="demo"))
    with pytest.raises(ValueError, match="other videos, though the settings are the same"):
        there.merged(*_run("b", 2, "xxxx", chance=0.01))
    videos = (tmp_path / "study_toy_videos.csv").read_text().splitlines()
    (tmp_path / "study_toy_videos.csv").write_text("\n".join(videos[:-1]))
    with pytest.raises(ValueError, match="has 3 videos of row 'b' with seed 1, .* says 4"):
        Tables.read(tmp_path, "study_toy")


def test_a_sitting_makes_what_is_missing_and_takes_the_rest_from_the_tables(
    jobs, tmp_path, monkeypatch, capsys
):
    """Its own folders, a run of another machine, a stale one, and one that fails."""
    monkeypatch.setitem(STUDIES, "toy", ONE_SEED)
    monkeypatch.setattr(
        study_results, "collect",
        lambda folder, study, row, seed, told: _run(
            row.name, seed, TAKEN[row.name, seed], settings=digest(deciding(jobs_by[folder]))
        ),
    )  # fmt: skip
    jobs_by = {job.workdir: job.config for job in jobs}
    elsewhere = _run("a", 1, "xxyy", settings=digest(deciding(jobs[2].config)), machine="other")
    stale = _run("b", 0, "yyyy", settings="of long ago")
    tables = Tables({}, {}).merged(*elsewhere).merged(*stale)
    results = tmp_path / "results"
    results.mkdir()

    def sit(tables, **told):
        options = {"at_once": 1, "budget": float("inf"), "dry_run": False, **told}
        return sitting(jobs, tables, results, changes={}, label="study_toy", **options)

    assert sit(tables, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "1 of 4 runs are done" in said and "--config.model.streams=rgb" in said
    assert not (results / "study_toy.csv").exists()
    (jobs[0].workdir.parent / "b-seed1.fail").touch()
    assert sit(tables) == 1
    assert _began(jobs) == ["a-seed0", "b-seed0", "b-seed1"]
    there = Tables.read(results, "study_toy")
    assert there.runs["a", "1"]["machine"] == "other" and ("b", "1") not in there.runs
    assert there.runs["b", "0"]["top1"] == "0.5" and not there.runs["b", "0"]["stale"]
    page = (results / "README.md").read_text()
    assert "### toy" in page and "Left out" not in page
    (jobs[0].workdir.parent / "b-seed1.fail").unlink()
    assert sit(there) == 0
    assert _began(jobs)[3:] == ["b-seed1"]
    assert len(Tables.read(results, "study_toy").fresh().runs) == 4


def test_what_is_collected_is_what_the_run_says(tiny_config, tmp_path):
    from stf_jax.cost import layer_costs

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(tiny_config.to_json_best_effort())
    results = {
        "subset": "validation", "protocol": "held out", "leaky": False, "overlap": 0.0,
        "top1": 0.5, "interval95": [0.2, 0.8], "mean_class_accuracy": 0.25, "num_videos": 2,
        "class_names": ["left", "right"], "chance": 0.5, "parameters": 7, "config_file": "card",
        "streams": {"without_flow": {"top1": 0.1}, "without_rgb": {"top1": 0.2}},
        "seconds": {"prepare": 99.0, "first": 5.0, "evaluate": 1.0},
        "stages": [{"seconds": 3.0}, {"seconds": 2.0}], "data": {"name": "folder"},
        "environment": {"commit": "abc", "machine": "two cores"}, "resampled": "groups",
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    log = [("train", 0.3), ("validation", 0.4), ("train", 0.9), ("validation", 0.5)]
    (folder / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"kind": kind, "top1": top1}) for kind, top1 in log)
    )
    (folder / "videos.csv").write_text(
        "video_id,class,group,subset,sha256\nu,left,g1,test,0\nv,right,g2,test,1\n"
    )
    (folder / "scores.csv").write_text(
        "video_id,label,prediction,correct,left,right\nu,left,left,1,1,0\nv,right,left,0,1,0\n"
    )
    line, videos = study_results.collect(folder, STUDY, ROWS[0], 3, {"seed": "3"})
    assert tuple(line) == study_results.RUN_COLUMNS
    assert (line["rgb_only"], line["flow_only"], line["train_top1"]) == (0.1, 0.2, 0.9)
    assert (line["train_seconds"], line["run_seconds"]) == (5.0, 6.0)
    macs = sum(layer.macs for layer in layer_costs(Settings.of(tiny_config), 2))
    assert line["gmac"] == macs / 1e9 > 0
    assert line["settings"] == digest(deciding(tiny_config))
    assert [tuple(video.values()) for video in videos] == [
        ("a", 3, "u", "g1", "left", "left"), ("a", 3, "v", "g2", "right", "left")
    ]  # fmt: skip


# --- the page --------------------------------------------------------------------------------


def test_every_file_of_results_is_on_the_page_with_what_makes_it():
    page = results_page.build()
    for path in results_page.RESULTS.iterdir():
        if path.suffix in (".csv", ".json", ".png"):
            assert f"({path.name})" in page, path.name
    assert "not known" not in page
    assert "`python experiments/leak.py`" in page and "100.0 %" in page


def test_the_page_tells_a_study_without_mixing_what_does_not_belong_together(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "toy", STUDY)
    tables = _tables(overrides=json.dumps({"seed": "0", "batch_size": "2"}))
    stale = {key: run["settings"] for key, run in tables.runs.items() if key != ("b", "1")}
    study_runs.summarise(STUDY, tables.marked(stale), tmp_path, "study_toy")
    page = (tmp_path / "README.md").read_text()
    for said in (
        "## Studies on real videos", "### toy", "Why?", "| `a`: all | **87.5 %** | 75.0 to 100.0 |",
        "-50.0 (-50.0 to -50.0)", "Fewer than 2 seeds: `b` 1.", "![toy](study_toy.png)",
        "made with other settings than the study has now: `b` seed 1", "official split 1",
        "`python experiments/ablate.py --study=toy` with `--config.batch_size=2`",
        "chance 50.0 %; commit abc; two cores; 3 runs", "2 or more of them",
        "So few sources make intervals too narrow.",
    ):  # fmt: skip
        assert said in page, said
    assert "do not compare" not in page
    other = {**tables.runs, ("a", "1"): {**tables.runs["a", "1"], "machine": "one core"}}
    study_runs.summarise(STUDY, Tables(other, tables.videos), tmp_path, "study_toy")
    mixed = (tmp_path / "README.md").read_text()
    assert "one core; two cores (minutes do not compare across these); 4 runs" in mixed
    assert "selection" not in page and (tmp_path / "study_toy.png").stat().st_size > 10_000
    held = _tables(subset="validation", protocol="held-out training groups, not a test")
    study_runs.summarise(STUDY, held, tmp_path, "study_toy_selection")
    page = (tmp_path / "README.md").read_text()
    assert "### toy (selection on held-out training groups, no test)" in page
    assert "held-out training videos, no test each" in page and "--study=toy --select" in page
    # Where no run is of the study as it is now, nothing is told of the others but which they are.
    changed = tables.marked(dict.fromkeys(tables.runs, "changed"))
    study_runs.summarise(STUDY, changed, tmp_path, "study_toy")
    page = (tmp_path / "README.md").read_text()
    assert "`a` seed 0, `a` seed 1, `b` seed 0, `b` seed 1" in page and "(study_toy.csv)" in page
    for name in ("study_toy_summary.csv", "study_toy.png"):
        assert not (tmp_path / name).exists() and f"({name})" not in page


def test_runs_that_differ_in_their_fold_are_not_called_seeds(tmp_path, monkeypatch, drawn_texts):
    study = dataclasses.replace(STUDY, name="toy", seed_keys=("data.fold",), seeds=(0, 1, 2))
    monkeypatch.setitem(STUDIES, "toy", study)
    assert study.changes(study.rows[1], 2)["data.fold"] == 2
    tables = _tables()
    tables.runs.pop(("b", "1")), tables.videos.pop(("b", "1"))
    study_runs.summarise(study, tables, tmp_path, "study_toy")
    page = (tmp_path / "README.md").read_text()
    for said in ("top-1, mean of folds", "| folds |", "Fewer than 3 folds: `a` 2, `b` 1.",
                 "folds 0, 1; chance", "with the folds that there are"):  # fmt: skip
        assert said in page, said
    assert "seed" not in page.partition("; one row with one seed by")[0]
    (folds,) = [text for text, _ in drawn_texts if "dots:" in text]
    assert "dots: folds" in folds
    assert any(text.endswith("[1 of 2 folds]") for text, _ in drawn_texts)


def test_the_page_tells_how_far_choosing_between_the_streams_could_go(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, rows=(Row("rgb", ""), Row("flow", "")), reference="")
    monkeypatch.setitem(STUDIES, "toy", study)
    tables = Tables({}, {})
    for row, seed, taken in (("rgb", 0, "xyyx"), ("flow", 0, "xxyx"), ("rgb", 1, "xxxx")):
        tables = tables.merged(*_run(row, seed, taken))
    study_runs.summarise(study, tables, tmp_path, "study_toy")
    said = "Of 4 answers, `flow` has 3 right, `rgb` 2, at least one of the two 3: "
    page = (tmp_path / "README.md").read_text()
    assert said in page and "would be worth +0.0 points" in page  # seed 1 has no flow
    assert "every draw is alike" not in page
    tables = tables.merged(*_run("flow", 1, "xyyy"))
    study_runs.summarise(study, tables, tmp_path, "study_toy")
    page = (tmp_path / "README.md").read_text()
    assert "Of 8 answers, `flow` has 4 right, `rgb` 6, at least one of the two 7: " in page
    assert "would be worth +12.5 points over the better one." in page
    stale = tables.marked({k: r["settings"] for k, r in tables.runs.items() if k[0] == "rgb"})
    study_runs.summarise(study, stale, tmp_path, "study_toy")
    assert "at least one of the two" not in (tmp_path / "README.md").read_text()
    study_runs.summarise(
        study, Tables({}, {}).merged(*_run("rgb", 0, "xxxx")), tmp_path, "study_toy"
    )
    assert "every draw is alike" in (tmp_path / "README.md").read_text()
