"""Scores of videos: their figures, their files, and what becomes of several fused."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from stf_jax import prepare
from stf_jax.index import ClipEntry, some
from stf_jax.metrics import (
    Figures,
    bootstrap,
    calibration,
    per_class,
    summarise,
    wilson,
)

# What single streams are called, and what to know of their scores.
STREAMS = {
    "rgb": "the network of the spatial stream, one of the two that are fused",
    "flow": "the network of the temporal stream, one of the two that are fused",
    "without_flow": "ablation: the network of both streams, fused without the map of flow",
    "without_rgb": "ablation: the network of both streams, fused without the map of colour",
}

_COLUMNS = ("video_id", "label", "prediction", "correct")
_VIEW_COLUMNS = ("video_id", "clip", "crop", "mirrored", *_COLUMNS[1:])


@dataclasses.dataclass(frozen=True)
class Views:
    """Scores of views, r rows.

    Args:
      video: position of each one's video.
      clip: number of its clip among those of the video.
      crop: number of its window among those of the clip.
      mirrored: whether it was mirrored.
      probabilities: float32 `r k`.
    """

    video: Int[np.ndarray, " r"]
    clip: Int[np.ndarray, " r"]
    crop: Int[np.ndarray, " r"]
    mirrored: Bool[np.ndarray, " r"]
    probabilities: Float[np.ndarray, "r k"]

    def means(self, keys: Int[np.ndarray, " r"]) -> Float[np.ndarray, "n k"]:
        """The mean of the views of each key, 0 to n - 1, whatever the order of the rows."""
        count = np.bincount(keys)
        total = np.zeros((len(count), self.probabilities.shape[1]))
        np.add.at(total, keys, self.probabilities)
        return (total / count[:, None]).astype(self.probabilities.dtype)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of videos, in the order of `entries`.

    Args:
      entries: the videos.
      probabilities: float32 `n k`, at video level: the mean of a video's views.
      views: the views behind them; None if only the means are known.
      streams: scores of single streams (`STREAMS`).
    """

    entries: tuple[ClipEntry, ...]
    probabilities: np.ndarray
    views: Views | None = None
    streams: Mapping[str, "Scores"] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_views(cls, entries: Sequence[ClipEntry], views: Views) -> "Scores":
        """Averages the views of each video; every video must have some."""
        return cls(tuple(entries), views.means(views.video), views)

    @property
    def labels(self) -> np.ndarray:
        """The true class of each video, int `n`."""
        return np.array([entry.label for entry in self.entries])

    def figures(self) -> Figures:
        """Accuracies, confusion matrix and interval, at video level."""
        return summarise(self.probabilities, self.labels)

    def clips(self) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, "c k"]]:
        """At clip level: position of each clip's video, and the mean of the clip's views."""
        assert self.views is not None
        videos, clips = self.views.video.astype(np.int64), self.views.clip.astype(np.int64)
        found, keys = np.unique(clips * len(self.entries) + videos, return_inverse=True)
        return found % len(self.entries), self.views.means(keys)


def all_figures(scores: Scores, *, bins: int, seed: int, groups_known: bool) -> dict[str, Any]:
    """Everything that scores say, as it stands in `results.json` and `figures.json`.

    At video level Wilson's intervals are given for top-1 and each class; that of the mean class
    accuracy comes from resampling videos, or the groups that they were cut from, which are alike.
    At clip level all come from resampling, because the clips of a video are.

    Args:
      scores: of the videos.
      bins: of the calibration error.
      seed: of the resampling.
      groups_known: whether the entries' groups are sources, or nothing.

    Returns:
      The figures of `Figures` and `ClassFigures`, intervals and calibration, at video level; the
      same at clip level under 'clip_level', None where every video has one clip, and top-1 and the
      like of single streams under 'streams'.
    """
    figures = scores.figures()
    names = [e.group if groups_known else e.video_id for e in scores.entries]
    sources = np.unique(names, return_inverse=True)[1]
    drawn = _resampled(scores.probabilities, scores.labels, sources, seed)
    recall = np.array(figures.confusion)
    counts = recall.sum(axis=1).tolist()
    return {
        **dataclasses.asdict(figures),
        "level": "video",
        **_details(figures, scores.probabilities, scores.labels, bins),
        "recall_interval95": [
            wilson(int(right), count) if count else None
            for right, count in zip(recall.diagonal(), counts, strict=True)
        ],
        "mean_class_interval95": drawn.mean_class_accuracy,
        "resampled": "groups" if groups_known else "videos",
        "clip_level": _clip_level(scores, sources, bins, seed),
        "streams": {name: _stream(name, part) for name, part in scores.streams.items()},
    }


def _details(
    figures: Figures, probabilities: np.ndarray, labels: np.ndarray, bins: int
) -> dict[str, Any]:
    error, curve = calibration(probabilities, labels, bins)
    return {
        **dataclasses.asdict(per_class(figures.confusion)),
        "calibration_error": error,
        "calibration": [dataclasses.asdict(bin_) for bin_ in curve],
    }


def _resampled(
    probabilities: np.ndarray, labels: np.ndarray, sources: np.ndarray, seed: int
) -> Any:
    right = probabilities.argmax(axis=1) == labels
    return bootstrap(right, labels, sources, probabilities.shape[1], seed=seed)


def _clip_level(scores: Scores, sources: np.ndarray, bins: int, seed: int) -> dict[str, Any] | None:
    if scores.views is None:
        return None
    videos, probabilities = scores.clips()
    if len(videos) == len(scores.entries):
        return None
    labels = scores.labels[videos]
    figures = summarise(probabilities, labels)
    drawn = _resampled(probabilities, labels, sources[videos], seed)
    told = dataclasses.asdict(figures)
    return {
        "num_clips": told.pop("num_videos"),
        **told,
        "level": "clip",
        **_details(figures, probabilities, labels, bins),
        "interval95": drawn.top1,
        "recall_interval95": drawn.recall,
        "mean_class_interval95": drawn.mean_class_accuracy,
    }


def _stream(name: str, scores: Scores) -> dict[str, Any]:
    told = dataclasses.asdict(scores.figures())
    kept = ("top1", "top5", "mean_class_accuracy", "loss", "interval95")
    return {"what": STREAMS[name], **{key: told[key] for key in kept}}


# --- files -----------------------------------------------------------------------------------


def write_scores(path: Path, scores: Scores, class_names: Sequence[str]) -> None:
    """Writes one CSV row per video: id, label, prediction, correct, and every probability."""
    rows = (
        [entry.video_id, *_scored(entry, row, class_names)]
        for entry, row in zip(scores.entries, scores.probabilities, strict=True)
    )
    _write_table(path, [*_COLUMNS, *class_names], rows)


def write_views(path: Path, scores: Scores, class_names: Sequence[str]) -> None:
    """Writes one CSV row per view: video, clip, crop, mirrored, and the rest as `write_scores`."""
    views = scores.views
    assert views is not None
    order = np.lexsort((views.mirrored, views.crop, views.clip, views.video))
    rows = (
        [
            scores.entries[views.video[i]].video_id,
            views.clip[i],
            views.crop[i],
            int(views.mirrored[i]),
            *_scored(scores.entries[views.video[i]], views.probabilities[i], class_names),
        ]
        for i in order
    )
    _write_table(path, [*_VIEW_COLUMNS, *class_names], rows)


def _scored(entry: ClipEntry, row: np.ndarray, class_names: Sequence[str]) -> list[Any]:
    best = int(row.argmax())
    names = class_names[entry.label], class_names[best]
    return [*names, int(best == entry.label), *(f"{p:.6f}" for p in row)]


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    prepare.write_aside(path, text.getvalue().encode())


def write_folder(
    folder: Path, facts: Mapping[str, Any], scores: Scores, class_names: Sequence[str]
) -> None:
    """Writes scores and figures for people and for other programs.

    `scores.csv` (videos), `scores_<stream>.csv`, `clips.csv` (views), `figures.json`,
    `per_class.csv` and `confusion.csv`; the last two at video level, and with `_clips` in their
    names at clip level, where that is another one.

    Args:
      folder: made if absent; files of these names are replaced.
      facts: as from `all_figures`, and whatever else belongs to them.
      scores: what they are about.
      class_names: the classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(folder / "scores.csv", scores, class_names)
    for name, part in scores.streams.items():
        write_scores(folder / f"scores_{name}.csv", part, class_names)
    if scores.views is not None:
        write_views(folder / "clips.csv", scores, class_names)
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    prepare.write_aside(folder / "figures.json", text.encode())
    for level, suffix in levels(facts):
        columns = ["class", "count", "predicted", "precision", "recall", "low95", "high95"]
        kept = ("counts", "predicted", "precision", "recall")
        rows = zip(class_names, *(level[key] for key in kept), strict=True)
        bounds = [pair or (None, None) for pair in level["recall_interval95"]]
        table = [[*row, *pair] for row, pair in zip(rows, bounds, strict=True)]
        _write_table(folder / f"per_class{suffix}.csv", columns, map(_rounded, table))
        named = [[name, *row] for name, row in zip(class_names, level["confusion"], strict=True)]
        _write_table(folder / f"confusion{suffix}.csv", ["class", *class_names], named)


def levels(facts: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """The levels that figures speak of, each with the end of its files' names."""
    return [(facts, "")] + ([(facts["clip_level"], "_clips")] if facts["clip_level"] else [])


def _rounded(row: Sequence[Any]) -> list[Any]:
    return [f"{value:.6f}" if isinstance(value, float) else value for value in row]


@dataclasses.dataclass(frozen=True)
class ScoreFile:
    """A file of `write_scores`, read.

    Args:
      path: the file.
      class_names: its classes, in the order of its columns.
      scores: of its videos; their groups and subsets are not known.
    """

    path: Path
    class_names: tuple[str, ...]
    scores: Scores


def read_scores(path: Path) -> ScoreFile:
    """Reads a file of scores.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not such a file, or a row of it is not whole (says which).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: expected a scores.csv of a run")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no file of video scores: {error}") from None
    if not table or tuple(table[0][:4]) != _COLUMNS or len(table[0]) < 5:
        told = ",".join(table[0][:5]) if table else "nothing"
        raise ValueError(
            f"{path} is no file of video scores: its first row should begin with "
            f"{','.join(_COLUMNS)} and go on with the classes, and is {told}"
        )
    names = tuple(table[0][4:])
    entries, rows = {}, []
    for line, row in enumerate(table[1:], start=2):
        try:
            video_id, label, _, _, *digits = row
            if video_id in entries:
                raise ValueError(f"video {video_id} stands there twice")
            if label not in names:
                raise ValueError(f"{label!r} is none of the classes {some(names)}")
            if len(digits) != len(names):
                raise ValueError(f"{len(digits)} probabilities for {len(names)} classes")
            entries[video_id] = ClipEntry(video_id, names.index(label), "", "")
            rows.append([_probability(text) for text in digits])
        except ValueError as error:
            raise ValueError(f"{path}, row {line}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no video")
    return ScoreFile(path, names, Scores(tuple(entries.values()), np.array(rows)))


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is no probability")
    return value


def fuse(files: Sequence[ScoreFile], weights: Sequence[float]) -> Scores:
    """The weighted mean of the probabilities of several files, in the order of the first.

    Args:
      files: scores of the same videos for the same classes, in any order.
      weights: one per file, not negative; they are divided by their sum.

    Raises:
      ValueError: weights that do not fit, or files that are not about the same (says in what).
    """
    if len(weights) != len(files):
        raise ValueError(f"weights: got {len(weights)}, expected {len(files)}, one for each file")
    if not all(0 <= weight < np.inf for weight in weights) or not sum(weights):
        told = ", ".join(map(str, weights))
        raise ValueError(f"weights must not be negative, nor all be 0, got {told}")
    first, *others = files
    total = weights[0] * first.scores.probabilities
    for file, weight in zip(others, weights[1:], strict=True):
        total = total + weight * _aligned(file, first)
    return Scores(first.scores.entries, total / sum(weights))


def _aligned(file: ScoreFile, first: ScoreFile) -> np.ndarray:
    """The probabilities of a file in the order of the first one's videos and classes."""
    videos = {entry.video_id: i for i, entry in enumerate(file.scores.entries)}
    wanted = [entry.video_id for entry in first.scores.entries]
    for what, here, there in (
        ("classes", file.class_names, first.class_names),
        ("videos", videos, wanted),
    ):
        lacks, adds = sorted({*there} - {*here}), sorted({*here} - {*there})
        if lacks or adds:
            raise ValueError(
                f"{file.path} and {first.path} have different {what}: {len(adds)} only in the "
                f"former ({some(adds)}), {len(lacks)} only in the latter ({some(lacks)})"
            )
    rows = [videos[video_id] for video_id in wanted]
    for row, entry in zip(rows, first.scores.entries, strict=True):
        labels = file.class_names[file.scores.entries[row].label], first.class_names[entry.label]
        if labels[0] != labels[1]:
            raise ValueError(
                f"{entry.video_id} is {labels[0]!r} in {file.path} and {labels[1]!r} in "
                f"{first.path}: the labels must agree"
            )
    columns = [file.class_names.index(name) for name in first.class_names]
    return file.scores.probabilities[np.ix_(rows, columns)]
