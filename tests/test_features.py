"""The baselines without a network: histograms by hand, and choices that groups alone decide."""

import csv
import dataclasses
from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold

from experiments import features
from experiments.bench.table import write_rows
from experiments.features import (
    BASELINES,
    CLASSIFIERS,
    COLOUR,
    FLOW,
    METADATA,
    SPEEDS,
    choose,
    scores_file,
)
from stf_jax.prepare import ManifestRow
from stf_jax.run import Settings
from stf_jax.scores import read_scores

SEED = 0


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """A forest of few trees behaves like a large one, and is planted sooner."""
    monkeypatch.setattr(features, "TREES", 5)


def test_a_flow_histogram_by_hand():
    """Of four places one moves right by 3, one down by 1, one up and left by 0.25 each."""
    fields = np.zeros((1, 2, 2, 2))
    fields[0, 0, 0] = 3, 0
    fields[0, 0, 1] = 0, 1
    fields[0, 1, 0] = -0.25, -0.25
    got = dict(zip(FLOW, features.flow_histogram(fields), strict=True))
    diagonal = 0.125**0.5
    whole = 4 + diagonal
    expected = {
        "towards_0_degrees": 3 / whole,
        "towards_90_degrees": 1 / whole,  # down: angles are those of a picture
        "towards_225_degrees": diagonal / whole,
        "slower_than_0.125": 0.25,
        "slower_than_0.5": 0.25,  # the diagonal's 0.35
        "slower_than_2.0": 0.25,  # 1 and more
        "slower_than_4.0": 0.25,
    }
    assert got == pytest.approx({name: expected.get(name, 0.0) for name in FLOW})


def test_what_stands_still_has_no_direction():
    got = features.flow_histogram(np.zeros((2, 3, 3, 2)))
    assert got.tolist() == [0] * 8 + [1] + [0] * len(SPEEDS)
    fast = features.flow_histogram(np.full((1, 1, 1, 2), 5.0))
    assert fast.tolist() == [0, 1, *[0] * 6, *[0] * 6, 1]


def test_mean_colour_and_metadata_by_hand():
    frames = np.zeros((2, 1, 2, 3), np.uint8)
    frames[0, 0, 0] = 255, 0, 51
    assert features.mean_colour(frames) == pytest.approx([0.25, 0, 0.05])
    row = ManifestRow("v", "ok", "", 75, 80, 25.0, 320, 240, "mpeg4", "avi", 0, 1, "")
    assert features.metadata(row).tolist() == [75, 25, 3]
    assert (len(METADATA), len(COLOUR), len(FLOW)) == (3, 3, 15)


def _videos(chance, lengths, per_class=40, groups=20):
    """Metadata of made-up videos of three classes, as long as `lengths(label)` says."""
    labels = np.repeat(np.arange(3), per_class)
    frames = np.array([lengths(label) for label in labels])
    rates = np.full(len(labels), 25.0)
    table = np.stack([frames, rates, frames / rates], axis=1)
    return table, labels, [f"{label}/{i % groups}" for i, label in enumerate(labels)]


def test_metadata_tells_classes_apart_that_differ_in_length():
    """The middle one and the other two are ranges that no line cuts out."""
    chance = np.random.default_rng(SEED)

    def lengths(label):
        centre = 150 if label == 0 else 150 + (-1) ** chance.integers(2) * 40 * label
        return centre + chance.integers(-9, 10)

    table, labels, groups = _videos(chance, lengths)
    chosen = choose(table, labels, groups, BASELINES["metadata"].classifiers, seed=SEED)
    assert chosen.accuracy > 0.95 > 0.75 > chosen.others["logistic"]
    assert chosen.classifier in ("nearest", "tree", "forest")
    new, truth, _ = _videos(chance, lengths)
    found = chosen.probabilities(new, 3)
    assert (found.argmax(axis=1) == truth).mean() > 0.95
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_metadata_that_says_nothing_is_at_chance():
    chance = np.random.default_rng(SEED)

    def lengths(label):
        return chance.integers(50, 300)

    table, labels, groups = _videos(chance, lengths)
    chosen = choose(table, labels, groups, ("logistic", "tree"), seed=SEED)
    new, truth, _ = _videos(chance, lengths, per_class=400)
    assert (chosen.probabilities(new, 3).argmax(axis=1) == truth).mean() == pytest.approx(
        1 / 3, abs=0.05
    )


def test_a_group_never_stands_on_both_sides(monkeypatch):
    """Every group has a number of its own and a class: only a leak would score high."""
    chance = np.random.default_rng(SEED)
    groups = [f"g{i // 4}" for i in range(120)]
    table = np.array([[float(i // 4 * 37 % 101)] for i in range(120)])
    labels = np.array([chance.integers(3) for _ in range(30)]).repeat(4)
    folds = []
    real = GroupKFold.split

    def watched(self, features, labels=None, groups=None):
        for fitted, held in real(self, features, labels, groups):
            folds.append(({groups[i] for i in fitted}, {groups[i] for i in held}))
            yield fitted, held

    monkeypatch.setattr(GroupKFold, "split", watched)
    chosen = choose(table, labels, groups, ("nearest",), seed=SEED)
    assert chosen.folds == 5 and len(folds) >= 5
    assert not any(fitted & held for fitted, held in folds)
    assert Counter(group for _, held in folds[:5] for group in held).most_common(1)[0][1] == 1
    assert chosen.accuracy < 0.6  # the videos of a group are neighbours: with a leak it is 1


def test_few_groups_and_classes_that_are_not_there():
    table, labels = np.arange(8.0)[:, None], np.array([0, 2] * 4)
    chosen = choose(table, labels, list("aabbccdd"), tuple(CLASSIFIERS), seed=SEED)
    assert chosen.folds == 4
    assert chosen.probabilities(table, 4)[:, [1, 3]].tolist() == [[0, 0]] * 8
    with pytest.raises(ValueError, match="all 8 training videos are of one group"):
        choose(table, labels, ["a"] * 8, ("logistic",), seed=SEED)


def test_real_records_become_a_table_and_scores(tiny_config, tiny_records, tmp_path, capsys):
    """Two classes that move left and right: the directions of flow tell them apart, not lengths."""
    index, records = tiny_records
    entry = index.subset("test")[0]
    frames, fields = features.decoded(records, entry.video_id)
    row = records.rows[entry.video_id]
    assert frames.shape == (row.num_frames, 36, 36, 3) and frames.dtype == np.uint8
    assert fields.shape == (row.num_frames - 1, 36, 36, 2)
    wanted = -1 if index.class_names[entry.label] == "left" else 1
    assert np.sign(fields[..., 0].mean()) == wanted and np.abs(fields).max() <= 4
    lost = next(e for e in index.subset("train"))
    rows = {**records.rows}
    rows[lost.video_id] = dataclasses.replace(rows[lost.video_id], status="invalid", reason="torn")
    records = dataclasses.replace(records, rows=rows)
    table = features.measure(Settings.of(tiny_config), index, records, tmp_path)
    assert f"train: {lost.video_id}: EXCLUDED: torn" in capsys.readouterr().out
    write_rows(tmp_path / "baselines.csv", table)
    with open(tmp_path / "baselines.csv", newline="", encoding="utf-8") as file:
        told = {row["baseline"]: row for row in csv.DictReader(file)}
    assert list(told) == list(BASELINES)
    assert float(told["linear, flow alone"]["top1"]) == 1.0
    assert {row["excluded"] for row in told.values()} == {"1"}
    for name, row in told.items():
        scores = read_scores(scores_file(tmp_path, index, name)).scores
        assert len(scores.entries) == int(row["num_videos"]) == len(index.subset("test"))
        assert scores.figures().top1 == float(row["top1"])
        assert float(row["low95"]) <= float(row["top1"]) <= float(row["high95"])
