"""What a checkpoint is for, and what a run may be scored on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from as_if_trained import as_if_trained

from stf_jax import main, train
from stf_jax.datasets import load_index
from stf_jax.evaluate import evaluate_subset, score_again
from stf_jax.optim import by_path
from stf_jax.predict import Predictor
from stf_jax.records import prepare_records
from stf_jax.run import (
    Run,
    Settings,
    TrainedOn,
    allowed_mismatches,
    check_stamp,
    epoch_index,
    source_weights,
    stamp_of,
    with_source,
    write_videos,
)
from stf_jax.train import abstract_state, train_stage


def _experiment(config, workdir: Path) -> Run:
    config.stages.first.max_epochs = config.stages.second.max_epochs = 1
    main.run_experiment(config, workdir, "configs/folder.py", {})
    return Run(workdir)


def _check_which_weights(run: Run, own) -> None:
    """Any stage and checkpoint of a run can be scored, each with its own weights."""

    def top(**told):
        facts, scores = score_again(run, subset="test", changes={}, allow=(), **told)
        assert {**told}.items() <= facts.items()
        return scores.probabilities

    settings = run.settings()
    first, last = run.best("first"), run.last("first")
    index = load_index(settings.config.data)
    records = prepare_records(index, settings.records)
    step, params, _ = first.restore(settings.abstract_params(2))
    by_hand = evaluate_subset(settings, params, index, records, "test").probabilities
    np.testing.assert_array_equal(top(stage="first"), by_hand)
    np.testing.assert_array_equal(top(stage="first", checkpoint=str(step)), by_hand)
    number, state, _ = last.restore(abstract_state(settings, 2, "first"))
    by_hand = evaluate_subset(settings, state.params, index, records, "test").probabilities
    np.testing.assert_array_equal(top(stage="first", checkpoint="last"), by_hand)
    older = [stored for stored in last.steps() if stored not in (step, number)]
    found = top(stage="first", checkpoint=str(older[0]))
    assert np.abs(found - by_hand).max() > 0
    for told, said in (
        ({"stage": "third"}, "stage: got 'third', one of first, second"),
        ({"checkpoint": "latest"}, "checkpoint: got 'latest', 'best', 'last' or"),
        ({"stage": "first", "checkpoint": "999"}, f"'first' holds no step 999, but .*{step}"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            top(**told)
    assert own["stage"] == "second" and own["checkpoint"] == "best"


def test_a_run_is_scored_on_new_videos_only(tiny_config, tmp_path):
    """One honest run, and everything that somebody may want to score with it."""
    tiny_config.data.update(protocol="leave_one_group_out", fold=1, validation_fraction=0.0)
    tiny_config.checkpoint_every_steps = 1  # so that an older step is there to score
    run = _experiment(tiny_config, tmp_path / "run")
    results = run.read_json("results.json")
    assert not results["leaky"] and results["overlap"] == 0.0 and results["seen"] is None

    own, _ = score_again(run, subset="test", changes={}, allow=())
    for key in ("top1", "loss", "confusion", "protocol", "leaky", "overlap", "seen"):
        assert own[key] == results[key], key

    _check_which_weights(run, own)

    # Its own training videos, another fold of its protocol, and another protocol.
    for subset, changes in (
        ("train", {}),
        ("test", {"fold": 2}),
        ("test", {"protocol": "random_fixed"}),
    ):
        with pytest.raises(ValueError, match=r"was trained on \d+ of the \d+ .*--allow=trained"):
            score_again(run, subset=subset, changes=changes, allow=())
    known, _ = score_again(run, subset="test", changes={"fold": 2}, allow=("trained",))
    assert known["leaky"] and known["overlap"] == known["seen"] == 1.0

    # The same videos elsewhere, under their names and under others.
    moved = tmp_path / "moved"
    shutil.copytree(tiny_config.data.root, moved)
    again, _ = score_again(run, subset="test", changes={"root": str(moved)}, allow=())
    assert again["top1"] == results["top1"] and again["confusion"] == results["confusion"]
    for path in sorted(moved.glob("*/*_g1_*")):
        path.rename(path.with_name(path.name.replace("_g1_", "_g0_new")))
    with pytest.raises(ValueError, match="was trained on 4 of the"):
        score_again(run, subset="test", changes={"root": str(moved)}, allow=())

    # New videos of the classes that it knows, and of one that it does not.
    fresh = tmp_path / "fresh"
    for name in ("left", "right", "up"):
        (fresh / name).mkdir(parents=True)
        for group in (7, 8):
            source = Path(tiny_config.data.root, "left", f"left_g{group - 6}_c0.mp4")
            # The same pictures, other bytes: only a copy would be found out.
            target = fresh / name / f"{name}_g{group}_c0.mp4"
            target.write_bytes(source.read_bytes() + name.encode())
    with pytest.raises(ValueError, match="1 classes that the run does not know: up.*allow=classes"):
        score_again(run, subset="test", changes={"root": str(fresh)}, allow=())
    new, scores = score_again(run, subset="test", changes={"root": str(fresh)}, allow=("classes",))
    assert {e.video_id.split("/")[0] for e in scores.entries} == {"left", "right"}
    assert (new["leaky"], new["overlap"], new["seen"]) == (False, 0.0, 0.0)

    # A file that joins the test makes it another test.
    data = Path(tiny_config.data.root)
    joined = data / "left" / "left_g0_c9.mp4"
    shutil.copy(data / "left" / "left_g0_c0.mp4", joined)
    try:
        with pytest.raises(ValueError, match=r"(?s)split .*videos 16 there, 17 now.*--allow=split"):
            score_again(run, subset="test", changes={}, allow=())
    finally:
        joined.unlink()

    # Weights of another flow: the file beside them was changed.
    config = run.read_json("config.json")
    config["records"]["flow_bound"] = 5.0
    run.write_json("config.json", config)
    with pytest.raises(ValueError, match="(?s)flow .*: flow_bound 4.0 there, 5.0 now"):
        Predictor.load(run.workdir)
    config["allow_mismatch"] = "flow"
    run.write_json("config.json", config)
    assert Predictor.load(run.workdir).warning == ""


@pytest.mark.slow  # quick parts: test_protocols.py, test_report.py, test_studies.py
def test_settings_are_chosen_without_a_look_at_the_test(tiny_config, tmp_path, capsys):
    """A run of one stage only, scored on what it held out of training."""
    tiny_config.stage_order = ("first",)
    tiny_config.eval.subset = "validation"
    run = _experiment(tiny_config, tmp_path / "run")
    index = load_index(tiny_config.data)
    held = {entry.video_id for entry in index.subset("validation")}
    scored = (run.workdir / "scores.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in scored} == held and held
    results = run.read_json("results.json")
    assert results["subset"] == "validation" and not results["leaky"]
    told = "held-out training groups, not a test (they also chose the epoch), of group-held-out"
    assert results["protocol"].startswith(told)
    assert [stage["name"] for stage in results["stages"]] == ["first"]
    said = capsys.readouterr().out
    assert "validation: top-1" in said and "test: top-1" not in said
    page = (run.workdir / "report" / "index.html").read_text(encoding="utf-8")
    assert "Not a test" in page and "Top-1 accuracy on held-out training videos" in page
    refused = subprocess.run(
        [sys.executable, "experiments/record.py", f"--workdir={run.workdir}", "--name=never"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 1 and "scored on its validation videos" in refused.stderr
    again, _ = score_again(run, subset="validation", changes={}, allow=())
    assert (again["top1"], again["protocol"]) == (results["top1"], results["protocol"])
    test, scores = score_again(run, subset="test", changes={}, allow=())
    assert test["protocol"].startswith("group-held-out") and test["views"]["subset"] == "test"
    assert {e.video_id for e in scores.entries} == {e.video_id for e in index.subset("test")}
    tiny_config.data.protocol = "paper_resplit"
    with pytest.raises(ValueError, match="eval.subset='validation' means nothing with"):
        Settings.of(tiny_config)


def test_the_papers_protocol_is_labelled_wherever_a_number_appears(tiny_config, tmp_path, capsys):
    tiny_config.data.protocol = "paper_resplit"
    run = _experiment(tiny_config, tmp_path / "run")
    results = run.read_json("results.json")
    assert results["leaky"] and results["overlap"] > 0.5 and 0 < results["seen"] <= 1
    told = capsys.readouterr().out
    share, seen = f"{results['overlap']:.1%}", f"{results['seen']:.1%}"
    assert f"LEAKY PROTOCOL ({share} share a source with training, {seen} trained on" in told
    page = (run.workdir / "report" / "index.html").read_text(encoding="utf-8")
    assert "leaky protocol" in page and "had been trained on in earlier epochs" in page
    assert "leaky protocol" in Predictor.load(run.workdir).warning
    # The result is that of the last epoch's held-out part.
    index = load_index(tiny_config.data)
    records = prepare_records(index, Settings.of(tiny_config).records)
    last = epoch_index(index, records, 1, 0).subset("test")
    again, scores = score_again(run, subset="test", changes={}, allow=())
    assert {e.video_id for e in scores.entries} == {e.video_id for e in last}
    for key in ("top1", "loss", "leaky", "overlap", "seen"):
        assert again[key] == results[key], key
    log = (run.workdir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["top1"] == pytest.approx(results["top1"])
    with pytest.raises(ValueError, match="was trained on"):
        score_again(run, subset="test", changes={"protocol": "hold_out"}, allow=())


def test_a_stage_goes_on_only_with_what_it_began_with(tiny_config, tmp_path):
    """The videos have changed between two starts; the configuration has not."""
    root = tmp_path / "videos"
    shutil.copytree(tiny_config.data.root, root)
    tiny_config.data.root = str(root)
    tiny_config.stages.first.max_epochs = 1
    settings, run = Settings.of(tiny_config), Run(tmp_path / "run")
    index = load_index(tiny_config.data)
    train_stage(run, settings, "first", index, prepare_records(index, settings.records))
    for path in root.glob("*/*_g3_*"):
        path.unlink()
    index = load_index(tiny_config.data)
    records = prepare_records(index, settings.records)
    run.stage_file("first", "done.json").unlink()
    for stage in ("first", "second"):  # its own last checkpoint, and the hand-off
        with pytest.raises(ValueError, match="(?s)first/.*split"):
            train_stage(run, settings, stage, index, records)
    tiny_config.allow_mismatch = "split"
    train_stage(run, Settings.of(tiny_config), "second", index, records)


def test_every_kind_of_mismatch_names_its_override(tiny_config):
    settings = Settings.of(tiny_config)
    stamp = stamp_of(load_index(tiny_config.data), settings)
    check_stamp(stamp, stamp, Path("here"), ())
    others = {
        "classes": {**stamp, "classes": ["right", "left"]},
        "split": {**stamp, "split": {**stamp["split"], "protocol": "random_fixed"}},
        "flow": {**stamp, "flow": {**stamp["flow"], "flow_algorithm": "tvl1"}},
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"--config.allow_mismatch={name} ") as error:
            check_stamp(other, stamp, Path("here"), ())
        assert f"{name} (" in str(error.value) and "there" in str(error.value)
        check_stamp(other, stamp, Path("here"), (name,))
    with pytest.raises(ValueError, match="allow_mismatch=classes,split,flow "):
        check_stamp({}, stamp, Path("here"), ())
    assert allowed_mismatches("") == () and allowed_mismatches("flow,split") == ("flow", "split")
    with pytest.raises(ValueError, match="allow_mismatch: got 'splits'"):
        allowed_mismatches("splits")


@pytest.fixture
def two_lists(tiny_config, tmp_path):
    """Settings, index and records of two classes, and of the same with another name for one."""
    found = []
    for name in ("right", "east"):
        config = tiny_config.copy_and_resolve_references()
        if name == "east":
            root = tmp_path / "other"
            shutil.copytree(tiny_config.data.root, root)
            (root / "right").rename(root / name)
            for path in root.glob("*/*"):  # new videos, by their bytes and names
                path.write_bytes(path.read_bytes() + b" ")
                path.rename(path.with_name(path.name.replace("_g", "_n_g1")))
            config.data.update(root=str(root), group_regex=r"_(g\d+)_")
            config.transfer.source = str(tmp_path / "source")
            config.seed = 5
        settings = Settings.of(config)
        index = load_index(settings.config.data)
        found.append((settings, index, prepare_records(index, settings.records)))
    return found


def test_another_class_list_starts_from_a_trained_run_by_one_setting(two_lists, tmp_path):
    (settings, index, records), (tuned, other, other_records) = two_lists
    source = as_if_trained(settings, index, records, tmp_path / "source")
    run = Run(tmp_path / "tuned")
    run.workdir.mkdir()
    honest = with_source(run, tuned, other, other_records)
    assert not honest.leaky and honest.notes == other.notes
    stamp = stamp_of(other, tuned)
    state, _ = train._start(run, tuned, "first", stamp, run.last("first"))
    weights = settings.initial_params(settings.model(2))
    fresh = tuned.initial_params(tuned.model(2))
    for path, leaf in by_path(state.params).items():
        mine = by_path(fresh if path.startswith("head/") else weights)[path]
        np.testing.assert_array_equal(leaf, mine, err_msg=path)
    fates = json.loads(run.stage_file("first", "weights.json").read_text())
    assert fates["head/project/bias"]["fate"] == "initialised at random (for other classes)"
    assert fates["fusion/conv/bias"]["fate"] == f"copied from {source.workdir}, stage 'second'"

    # The source may go; what it knew stays.
    shutil.rmtree(source.workdir)
    run.write_json("data.json", {"name": other.name, "stamp": stamp})
    write_videos(run, other, other_records)
    assert len(TrainedOn.of(run).known(index.subset("train"), index, records)) == len(
        index.subset("train")
    )


def test_a_source_that_knows_the_test_videos_is_refused_or_labelled(two_lists, tmp_path):
    (settings, index, records), _ = two_lists
    config = settings.config.as_configdict().copy_and_resolve_references()
    other_split = {**config.data.to_dict(), "seed": 3}
    seen = load_index(other_split)
    assert {e.video_id for e in seen.subset("test")} != {e.video_id for e in index.subset("test")}
    as_if_trained(settings, seen, records, tmp_path / "source")
    config.transfer.source = str(tmp_path / "source")
    run = Run(tmp_path / "tuned")
    run.workdir.mkdir()
    with pytest.raises(ValueError, match=r"was trained on \d+ of the .*allow_mismatch=trained"):
        with_source(run, Settings.of(config), index, records)
    config.allow_mismatch = "trained"
    labelled = with_source(run, Settings.of(config), index, records)
    assert labelled.leaky and labelled.overlap > 0
    assert "the weights to start from have seen" in labelled.notes[-1]


def test_a_source_that_is_no_finished_run_or_has_other_flow_is_refused(two_lists, tmp_path):
    (settings, index, records), (tuned, other, _) = two_lists
    with pytest.raises(FileNotFoundError, match="source.*is missing"):
        source_weights(tuned, stamp_of(other, tuned))
    source = as_if_trained(settings, index, records, tmp_path / "source")
    stamp = stamp_of(other, tuned)
    stamp["flow"]["flow_algorithm"] = "farneback"
    with pytest.raises(ValueError, match="flow_algorithm 'dis' there, 'farneback' now"):
        source_weights(tuned, stamp)
    source.stage_file("second", "done.json").unlink()
    with pytest.raises(FileNotFoundError, match="done.json is missing"):
        source_weights(tuned, stamp_of(other, tuned))


def test_a_third_stage_goes_on_from_the_second(two_lists, tmp_path):
    (settings, index, records), _ = two_lists
    run = as_if_trained(settings, index, records, tmp_path / "run")
    config = settings.config.as_configdict().copy_and_resolve_references()
    with config.unlocked():
        config.stages.third = {
            **config.stages.second.to_dict(),
            "rates": (("head/.*", 1.0), (".*", 0.0)),
        }
    config.stage_order = ("first", "second", "third")
    longer = Settings.of(config)
    stamp = stamp_of(index, longer)
    state, _ = train._start(run, longer, "third", stamp, run.last("third"))
    fates = json.loads(run.stage_file("third", "weights.json").read_text())
    assert {row["fate"] for row in fates.values()} == {"copied from stage 'second'"}
    weights = by_path(settings.initial_params(settings.model(2)))
    for path, leaf in by_path(state.params).items():
        np.testing.assert_array_equal(leaf, weights[path], err_msg=path)
    # Only the head has moments: the rest is frozen.
    moments = [path for path in by_path(state.opt_state) if path.endswith("kernel")]
    assert moments and all("head/" in path for path in moments)
