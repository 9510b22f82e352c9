import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from stf_jax.datasets import ClipEntry, load_index
from stf_jax.evaluate import (
    Scores,
    evaluate,
    evaluate_subset,
    worth_showing,
    write_samples,
    write_scores,
)
from stf_jax.main import run_experiment
from stf_jax.model import fold_pyramid
from stf_jax.pipeline import batches, steps_per_epoch
from stf_jax.predict import Predictor
from stf_jax.prepare import encode_video
from stf_jax.records import prepare_records
from stf_jax.run import Run, Settings, usable_entries


@pytest.fixture
def parts(tiny_config):
    settings = Settings.of(tiny_config)
    index = load_index(settings.config.data)
    records = prepare_records(index, settings.records)
    return settings, index, records, settings.initial_params(settings.model(2))


def test_the_batch_size_does_not_change_a_score(parts):
    settings, index, records, params = parts
    results = []
    for size in (1, 3, 4):
        config = settings.config.as_configdict().copy_and_resolve_references()
        config.batch_size = size
        scores = evaluate_subset(Settings.of(config), params, index, records, "train")
        assert scores.entries == tuple(usable_entries(index, records, "train"))
        results.append(scores.probabilities)
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], atol=1e-6)
    # They are scores of these videos, not one score repeated.
    assert len(np.unique(results[0].round(5), axis=0)) == len(results[0])


def test_drawn_clips_are_averaged_and_every_draw_is_another(parts):
    settings, index, records, params = parts
    one, two, four = (
        evaluate_subset(settings, params, index, records, "test", repeats=n).probabilities
        for n in (1, 2, 4)
    )
    assert np.abs(one - two).max() > 0 and np.abs(two - four).max() > 0
    again = evaluate_subset(settings, params, index, records, "test", repeats=4).probabilities
    np.testing.assert_array_equal(four, again)
    # The mean of four draws is that of the first two and the last two, which are those of a stream
    # that starts later.
    entries = usable_entries(index, records, "test")
    model, folded = fold_pyramid(settings.model(2), params)
    draws = []
    per_epoch = steps_per_epoch(len(entries), settings.config.batch_size)
    for draw in range(4):
        stream = batches(
            records, entries, settings.sampling, batch_size=settings.config.batch_size,
            train=False, seed=settings.config.seed, draw=True,
            start_step=draw * per_epoch, stop_step=(draw + 1) * per_epoch,
        )  # fmt: skip
        scores = evaluate(
            model, folded, settings.inputs, settings.records, stream, entries, settings.mesh
        )
        draws.append(scores.probabilities)
    np.testing.assert_allclose(np.mean(draws, axis=0), four, atol=1e-6)
    np.testing.assert_allclose(np.mean(draws[:2], axis=0), two, atol=1e-6)
    config = settings.config.as_configdict().copy_and_resolve_references()
    config.eval.repeats = 0
    with pytest.raises(ValueError, match="eval.repeats must be at least 1, got 0"):
        Settings.of(config)


def test_every_video_counts_exactly_once(parts):
    settings, index, records, params = parts
    entries = usable_entries(index, records, "train")
    stream = list(batches(records, entries, settings.sampling, batch_size=4, train=False))
    model = settings.model(2)
    with pytest.raises(ValueError, match="left out"):
        evaluate(
            model, params, settings.inputs, settings.records, stream[:-1], entries, settings.mesh
        )
    with pytest.raises(ValueError, match="came twice"):
        evaluate(
            model,
            params,
            settings.inputs,
            settings.records,
            [*stream, stream[0]],
            entries,
            settings.mesh,
        )


def test_an_empty_subset_is_named(parts):
    settings, index, records, params = parts
    bare = dataclasses.replace(index, entries=index.subset("train"))
    with pytest.raises(ValueError, match="test subset of .* holds no usable video"):
        evaluate_subset(settings, params, bare, records, "test")


def test_prediction_of_a_file_gives_the_score_of_the_evaluation(parts):
    settings, index, records, params = parts
    scores = evaluate_subset(settings, params, index, records, "test")
    predictor = Predictor(settings, index.class_names, settings.model(2), params)
    for entry, row in zip(scores.entries, scores.probabilities, strict=True):
        np.testing.assert_allclose(predictor.predict(index.path(entry)), row, atol=1e-6)


def test_a_video_of_one_frame_can_be_predicted(parts, make_video, tmp_path):
    settings, index, _, params = parts
    predictor = Predictor(settings, index.class_names, settings.model(2), params)
    path = make_video(tmp_path / "one.mp4", frames=1)
    assert len(encode_video(path, settings.records).flow) == 0
    assert predictor.predict(path).sum() == pytest.approx(1.0, abs=1e-5)


ENTRIES = (
    ClipEntry('a/"quoted", ü.avi', 0, "g1", "test"),
    ClipEntry("b/x.avi", 1, "g1", "test"),
    ClipEntry("b/y.avi", 1, "g2", "test"),
)
SCORES = Scores(ENTRIES, np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], np.float32))


def test_scores_are_a_real_csv(tmp_path):
    write_scores(tmp_path / "s.csv", SCORES, ("one, two", "b"))
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video_id"] for row in rows] == [entry.video_id for entry in ENTRIES]
    assert [row["prediction"] for row in rows] == ["one, two", "one, two", "b"]
    assert [row["correct"] for row in rows] == ["1", "0", "1"]
    assert float(rows[1]["b"]) == pytest.approx(0.3)


def test_figures_by_hand():
    figures = SCORES.figures()
    assert figures.top1 == pytest.approx(2 / 3) and figures.num_videos == 3
    assert figures.mean_class_accuracy == pytest.approx(0.75)
    assert figures.confusion == [[1, 0], [1, 1]]


def test_samples_hold_what_the_network_saw(parts, tmp_path):
    settings, index, records, params = parts
    scores = evaluate_subset(settings, params, index, records, "test")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.npz").touch()
    write_samples(tmp_path / "samples", settings, records, scores, count=2)
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["0.npz", "1.npz"]
    ids = set()
    for path in files:
        with np.load(path, allow_pickle=False) as sample:
            ids.add(str(sample["video_id"]))
            assert sample["frames"].shape == (8, 36, 36, 3) and sample["frames"].dtype == np.uint8
            assert sample["flow"].shape == (8, 36, 36, 2)
            assert np.abs(sample["flow"]).max() <= settings.records.flow_bound * 1.01
    assert len(ids) == 2 and ids <= {entry.video_id for entry in index.subset("test")}


def test_the_worst_mistakes_and_one_of_each_class_are_shown():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    called = np.array([0, 1, 1, 1, 0, 0, 2, 2])
    sure = np.array([0.9, 0.6, 0.7, 0.5, 0.8, 0.95, 0.4, 0.4])
    probabilities = np.repeat((1 - sure[:, None]) / 2, 3, axis=1)
    probabilities[np.arange(8), called] = sure
    # Mistakes: 5 (0.95), 4 (0.8), 2 (0.7), 1 (0.6); 2 and 1 are the commonest pair, 0 called 1.
    assert worth_showing(probabilities, labels, 8) == [5, 2, 4, 1, 0, 3]
    assert worth_showing(probabilities, labels, 4) == [5, 2, 0, 3]
    right = np.eye(3)[labels]
    assert worth_showing(right, labels, 8) == [0, 3, 5]


def test_a_whole_run_without_stored_flow(tiny_config, tmp_path):
    """Training, evaluation, samples and prediction compute TV-L1 from the frames they read."""
    tiny_config.records.update(flow_source="online", flow_algorithm="tvl1", flow_size=36)
    tiny_config.records.tvl1.update(coarsest=36, iterations=5)  # compiled in a moment
    for stage in tiny_config.stages.values():
        stage.max_epochs = 1
    workdir = tmp_path / "run"
    results = run_experiment(tiny_config, workdir, "test", {})
    stamp = Run(workdir).read_json("data.json")["records"]
    assert (stamp["flow_source"], stamp["flow_algorithm"]) == ("online", "tvl1")
    assert stamp["tvl1"]["iterations"] == 5
    with np.load(workdir / "samples" / "0.npz") as sample:
        assert 0.05 < np.hypot(*np.moveaxis(sample["flow"], -1, 0)).mean() < 3  # px, not grey
    predictor = Predictor.load(workdir)
    root = Path(tiny_config.data.root)
    with open(workdir / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == results["num_videos"]
    for row in rows[:2]:
        scores = predictor.predict(root / row["video_id"])
        written = [float(row[name]) for name in predictor.class_names]
        np.testing.assert_allclose(scores, written, atol=1e-5)
