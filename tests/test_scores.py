"""Score files, their figures and their fusion; numbers worked by hand."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stf_jax.charts import write_charts
from stf_jax.index import ClipEntry
from stf_jax.scores import (
    Scores,
    Views,
    all_figures,
    fuse,
    levels,
    read_scores,
    write_folder,
    write_scores,
)

ROOT = Path(__file__).parent.parent
NAMES = ("one, two", "b", "nobody's $x_$")
ENTRIES = (
    ClipEntry('a/"quoted", ü.avi', 0, "g1", "test"),
    ClipEntry("b/x.avi", 1, "g1", "test"),
    ClipEntry("b/y.avi", 1, "g2", "test"),
)
# Two clips a video, each twice mirrored; the rows in no order.
VIEWS = Views(
    video=np.array([2, 0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 2]),
    clip=np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1]),
    crop=np.zeros(12, int),
    mirrored=np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], bool),
    probabilities=np.array(
        [
            [0.2, 0.7, 0.1], [0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.7, 0.3, 0.0], [0.6, 0.4, 0.0],
            [0.1, 0.8, 0.1], [0.7, 0.1, 0.2], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0],
            [0.4, 0.5, 0.1], [0.1, 0.9, 0.0],
        ],
        np.float32,
    ),
)  # fmt: skip
SCORES = Scores.of_views(ENTRIES, VIEWS)
# By hand: the means of each clip, video 0 to 2, clip 0 and then clip 1.
CLIPS = [
    [0.8, 0.1, 0.1], [0.8, 0.2, 0.0], [0.3, 0.6, 0.1],
    [0.3, 0.7, 0.0], [0.4, 0.6, 0.0], [0.1, 0.85, 0.05],
]  # fmt: skip
VIDEOS = [[0.55, 0.4, 0.05], [0.6, 0.4, 0.0], [0.2, 0.725, 0.075]]


def test_views_are_averaged_into_clips_and_videos():
    np.testing.assert_allclose(SCORES.probabilities, VIDEOS, atol=1e-6)
    videos, clips = SCORES.clips()
    assert videos.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(clips, CLIPS, atol=1e-6)


def test_the_figures_say_their_level():
    facts = all_figures(SCORES, bins=5, seed=0, groups_known=True)
    assert facts["level"] == "video" and facts["num_videos"] == 3
    assert facts["top1"] == pytest.approx(2 / 3)
    assert facts["mean_class_accuracy"] == pytest.approx(0.75)
    assert facts["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert facts["precision"] == [0.5, 1.0, None] and facts["recall"] == [1.0, 0.5, None]
    assert facts["counts"] == [1, 2, 0] and facts["predicted"] == [2, 1, 0]
    assert facts["recall_interval95"][2] is None
    low, high = facts["recall_interval95"][1]  # Wilson, 1 of 2
    assert low == pytest.approx(1 - high) and low == pytest.approx(0.0945, abs=1e-4)
    clip = facts["clip_level"]
    assert clip["level"] == "clip" and clip["num_clips"] == 6 and "num_videos" not in clip
    # Of class 0 one of two clips, of class 1 three of four.
    assert clip["confusion"] == [[1, 1, 0], [1, 3, 0], [0, 0, 0]]
    assert clip["top1"] == pytest.approx(4 / 6)
    assert clip["recall"] == [0.5, 0.75, None]
    assert facts["resampled"] == "groups"
    assert all_figures(SCORES, bins=5, seed=0, groups_known=False)["resampled"] == "videos"
    # One clip per video: the clips are the videos.
    one = dataclasses.replace(SCORES, views=None)
    assert all_figures(one, bins=5, seed=0, groups_known=True)["clip_level"] is None
    with pytest.raises(ValueError, match="no video"):
        all_figures(Scores((), np.zeros((0, 3))), bins=5, seed=0, groups_known=True)


def test_scores_are_a_real_csv_that_reads_back(tmp_path):
    write_scores(tmp_path / "s.csv", SCORES, NAMES)
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video_id"] for row in rows] == [entry.video_id for entry in ENTRIES]
    assert [row["prediction"] for row in rows] == ["one, two", "one, two", "b"]
    assert [row["correct"] for row in rows] == ["1", "0", "1"]
    assert float(rows[1]["b"]) == pytest.approx(0.4)
    read = read_scores(tmp_path / "s.csv")
    assert read.class_names == NAMES
    assert [(e.video_id, e.label) for e in read.scores.entries] == [
        (e.video_id, e.label) for e in ENTRIES
    ]
    np.testing.assert_allclose(read.scores.probabilities, VIDEOS, atol=1e-6)


def test_names_are_drawn_as_they_are(tmp_path, drawn_texts):
    """The third has what would be a formula, and the first what was once escaped for it."""
    names = (r"\$one", "_b^2", "nobody's $x_$")
    facts = all_figures(SCORES, bins=5, seed=0, groups_known=True)
    write_charts(tmp_path, facts, names)
    for told in (*names, f"{names[2]} (0)"):
        assert (told, False) in drawn_texts
    assert not [told for told, formula in drawn_texts if formula]


def test_a_folder_holds_tables_and_pictures_of_each_level(tmp_path):
    streams = {"rgb": dataclasses.replace(SCORES, probabilities=SCORES.probabilities[:, ::-1])}
    scores = dataclasses.replace(SCORES, streams=streams)
    facts = all_figures(scores, bins=5, seed=0, groups_known=True)
    write_folder(tmp_path / "out", facts, scores, NAMES)
    for level, suffix in levels(facts):
        write_charts(tmp_path / "out", level, NAMES, suffix)
    pictures = {f"{n}{s}.png" for n in ("confusion", "per_class", "reliability")
                for s in ("", "_clips")}  # fmt: skip
    tables = {"scores", "scores_rgb", "clips", "per_class", "per_class_clips", "confusion",
              "confusion_clips"}  # fmt: skip
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == pictures | {f"{name}.csv" for name in tables} | {"figures.json"}
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == json.loads(
        json.dumps(facts)
    )

    def rows(name):
        with open(tmp_path / "out" / f"{name}.csv", newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    views = rows("clips")
    assert views[0][:7] == "video_id clip crop mirrored label prediction correct".split()
    assert views[1][:7] == [ENTRIES[0].video_id, "0", "0", "0", "one, two", "one, two", "1"]
    assert len(views) == 1 + 12 and float(views[2][7]) == pytest.approx(0.7)
    assert rows("confusion_clips") == [
        ["class", *NAMES],
        ["one, two", "1", "1", "0"],
        ["b", "1", "3", "0"],
        [NAMES[2], "0", "0", "0"],
    ]
    assert rows("per_class")[2][:5] == ["b", "2", "1", "1.000000", "0.500000"]
    assert rows("per_class")[3] == [NAMES[2], "0", "0", "", "", "", ""]
    # The same figures draw the same bytes.
    before = (tmp_path / "out" / "confusion.png").read_bytes()
    write_charts(tmp_path / "out", facts, NAMES)
    assert (tmp_path / "out" / "confusion.png").read_bytes() == before


def _file(path, rows, names=NAMES):
    """A file of scores from (video, label, probabilities)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "label", "prediction", "correct", *names])
        for video, label, probabilities in rows:
            best = int(np.argmax(probabilities))
            writer.writerow([video, label, names[best], int(names[best] == label), *probabilities])
    return path


@pytest.fixture
def two(tmp_path):
    """Two files of the same videos, in other orders of videos and of classes."""
    a = [("v1", "b", [0.6, 0.4, 0.0]), ("v2", "one, two", [0.2, 0.3, 0.5])]
    b = [("v2", "one, two", [0.1, 0.1, 0.8]), ("v1", "b", [0.0, 1.0, 0.0])]
    other = (NAMES[2], "b", "one, two")
    return _file(tmp_path / "a.csv", a), _file(tmp_path / "b.csv", b, other)


def test_fusion_is_the_weighted_mean(two):
    fused = fuse([read_scores(path) for path in two], [1.0, 3.0])
    assert [entry.video_id for entry in fused.entries] == ["v1", "v2"]
    by_hand = [[0.6 / 4, 0.4 / 4 + 3 / 4, 0.0], [0.2 / 4 + 2.4 / 4, 0.3 / 4 + 0.3 / 4, 0.8 / 4]]
    np.testing.assert_allclose(fused.probabilities, by_hand)
    assert fused.figures().top1 == 1.0
    alone = fuse([read_scores(path) for path in two], [2.0, 0.0])
    np.testing.assert_allclose(alone.probabilities, read_scores(two[0]).scores.probabilities)


def test_files_that_are_not_about_the_same_are_refused(two, tmp_path):
    first = read_scores(two[0])
    for rows, names, said in (
        ([("v1", "b", [1, 0, 0])], NAMES, r"different videos: 0 only .*, 1 only .*\(v2\)"),
        ([(v, "b", [1, 0, 0]) for v in ("v1", "v2", "v3")], NAMES, r"videos: 1 only .*\(v3\)"),
        ([("v1", "b", [1, 0])], NAMES[:2], "different classes: .*nobody's"),
        ([("v1", "b", [1, 0, 0]), ("v2", "b", [1, 0, 0])], NAMES,
         "v2 is 'b' in .*other.csv and 'one, two' in .*a.csv: the labels must agree"),
    ):  # fmt: skip
        other = read_scores(_file(tmp_path / "other.csv", rows, names))
        with pytest.raises(ValueError, match=said):
            fuse([first, other], [1.0, 1.0])
    for weights, said in (
        ([1.0], "got 1, expected 2"),
        ([0.0, 0.0], "nor all be 0"),
        ([2.0, -1.0], "must not be negative"),
        ([float("nan"), 1.0], "must not be negative"),
    ):
        with pytest.raises(ValueError, match=said):
            fuse([first, first], weights)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its first row should begin with video_id,label,prediction,correct"),
        ("video_id,clip,crop,mirrored,label\n", "and is video_id,clip,crop,mirrored,label"),
        ("video_id,label,prediction,correct,b\n", "holds no video"),
        ("video_id,label,prediction,correct,b\nv,c,b,0,1.0\n", "row 2: 'c' is none of"),
        ("video_id,label,prediction,correct,b\nv,b,b,1\n", "row 2: 0 probabilities for 1"),
        ("video_id,label,prediction,correct,b\nv,b,b,1,x\n", "row 2: .*'x'"),
        ("video_id,label,prediction,correct,b\nv,b,b,1,nan\n", "row 2: nan is no probability"),
        ("video_id,label,prediction,correct,b\nv,b,b,1,1\nv,b,b,1,1\n", "row 3: .*v stands"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named(text, said, tmp_path):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=f"s.csv.*{said}"):
        read_scores(tmp_path / "s.csv")


def test_a_picture_is_no_score_file(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    with pytest.raises(ValueError, match="s.csv is no file of video scores: .*utf-8"):
        read_scores(tmp_path / "s.csv")


def test_the_script_fuses_files(two, tmp_path):
    done = subprocess.run(
        [sys.executable, "experiments/fuse.py", *map(str, two), "--weights=1,3",
         f"--out={tmp_path}/fused", r"--group_regex=v(\d)"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["top1"] == 1.0 and facts["weights"] == [1.0, 3.0]
    assert facts["resampled"] == "groups" and "flatter" in facts["note"]
    fused = read_scores(tmp_path / "fused" / "scores.csv")
    assert fused.scores.probabilities[0, 1] == pytest.approx(0.85)
    assert (tmp_path / "fused" / "confusion.png").stat().st_size > 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="s.csv is not there: expected a scores.csv"):
        read_scores(tmp_path / "s.csv")
