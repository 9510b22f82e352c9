"""What can be said of a video without a network, and classifiers that read it.

Features are numbers of a whole video, from its prepared record; what suits them best is chosen by
cross-validation over groups, and the videos of the test have no part in it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
import sklearn
import tensorflow as tf
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from experiments.bench.table import processor
from stf_jax import host
from stf_jax.evaluate import run_figures
from stf_jax.index import ClipEntry, VideoIndex
from stf_jax.inputs import flow_to_pixels
from stf_jax.prepare import ManifestRow
from stf_jax.progress import bar, say
from stf_jax.records import Records
from stf_jax.run import Settings, usable_entries
from stf_jax.scores import Scores, write_scores

METADATA = ("frames", "frames_per_second", "seconds")
COLOUR = ("red", "green", "blue")
DIRECTIONS = 8  # the first is to the right, the others follow clockwise, each centred on its own
SPEEDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # px per frame, between the bins
FLOW = (
    *(f"towards_{360 * k // DIRECTIONS}_degrees" for k in range(DIRECTIONS)),
    *(f"slower_than_{edge}" for edge in SPEEDS),
    f"from_{SPEEDS[-1]}",
)


def metadata(row: ManifestRow) -> np.ndarray:
    """Length and frame rate of a video, as decoding found them: float64 `3`, `METADATA`."""
    return np.array([row.num_frames, row.fps, row.num_frames / row.fps])


def mean_colour(frames: np.ndarray) -> np.ndarray:
    """The mean over time and place of each channel, 0 to 1.

    Args:
      frames: uint8 `t h w 3`, red, green, blue.

    Returns:
      float64 `3`, `COLOUR`.
    """
    return frames.mean(axis=(0, 1, 2), dtype=np.float64) / 255


def flow_histogram(fields: np.ndarray) -> np.ndarray:
    """In which directions things move, and how fast: the mean over all fields and places.

    Args:
      fields: float `t h w 2`, u to the right and v down, px per frame.

    Returns:
      float64, `FLOW`: the share of each direction in the sum of all speeds (nothing for a video
      that stands still), then the share of places of each range of speeds.
    """
    u, v = fields[..., 0], fields[..., 1]
    speed = np.hypot(u, v).ravel()
    turns = np.arctan2(v, u).ravel() / (2 * np.pi)
    direction = np.rint(turns * DIRECTIONS).astype(int) % DIRECTIONS
    weight = np.bincount(direction, weights=speed, minlength=DIRECTIONS)
    place = np.searchsorted(SPEEDS, speed, side="right")
    shares = np.bincount(place, minlength=len(SPEEDS) + 1) / speed.size
    return np.concatenate([weight / max(weight.sum(), 1e-12), shares])


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What is read of a video, and by which kinds of classifiers.

    Args:
      features: of 'metadata', 'colour' and 'flow'.
      classifiers: those of `CLASSIFIERS` that are tried.
    """

    features: tuple[str, ...]
    classifiers: tuple[str, ...]


_LINEAR = ("logistic",)
# What is not said to be linear may be anything: a class may be a range of lengths, which no line
# cuts out, and a weak reader of the metadata would make a network look good.
_ANY = ("logistic", "nearest", "tree", "forest")
BASELINES: Mapping[str, Baseline] = {
    "metadata": Baseline(("metadata",), _ANY),
    "linear": Baseline(("colour", "flow"), _LINEAR),
    "linear, colour alone": Baseline(("colour",), _LINEAR),
    "linear, flow alone": Baseline(("flow",), _LINEAR),
    "all features": Baseline(("metadata", "colour", "flow"), _ANY),
}

TREES = 200  # of a forest
CLASSIFIERS: Mapping[str, tuple[Callable[[int], Any], str, tuple[Any, ...]]] = {
    "logistic": (
        lambda seed: LogisticRegression(max_iter=10_000),
        "C",
        (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0),
    ),
    "nearest": (lambda seed: KNeighborsClassifier(), "n_neighbors", (25, 15, 9, 5, 3, 1)),
    "tree": (
        lambda seed: DecisionTreeClassifier(random_state=seed),
        "max_leaf_nodes",
        (4, 8, 16, 32, 64),
    ),
    "forest": (
        lambda seed: RandomForestClassifier(n_estimators=TREES, random_state=seed),
        "min_samples_leaf",
        (8, 4, 2, 1),
    ),
}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The classifier that held-out training groups speak for, fitted to all training videos.

    Args:
      model: the classifier.
      classifier: its name.
      setting: its setting, such as 'C=0.1'.
      accuracy: of held-out training groups, mean over the folds; it is the best of many, so it
        flatters.
      others: the same for the best of every kind that was tried.
      folds: how many there were.
    """

    model: Any
    classifier: str
    setting: str
    accuracy: float
    others: Mapping[str, float]
    folds: int

    def probabilities(self, features: np.ndarray, num_classes: int) -> np.ndarray:
        """Class probabilities, float64 `n k`; a class without training videos has none."""
        found = np.zeros((len(features), num_classes))
        found[:, self.model.classes_] = self.model.predict_proba(features)
        return found


def choose(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    classifiers: Sequence[str],
    *,
    seed: int,
    folds: int = 5,
) -> Chosen:
    """Chooses a classifier and its setting by cross-validation over groups, and fits it to all.

    Args:
      features: float `n d`; they are scaled to mean 0 and deviation 1 of what is fitted to.
      labels: int `n`.
      groups: of each video; one group never stands on both sides of a fold.
      classifiers: those that are tried.
      seed: of the folds, and of classifiers that draw.
      folds: how many, or fewer if there are fewer groups.

    Raises:
      ValueError: there are fewer than two groups.
    """
    folds = min(folds, len(set(groups)))
    if folds < 2:
        raise ValueError(
            f"all {len(labels)} training videos are of one group: choosing a classifier needs two"
        )
    split = GroupKFold(folds, shuffle=True, random_state=seed)
    # A fold of large groups may leave few videos to look for neighbours among.
    fewest = min(len(fitted) for fitted, _ in split.split(features, groups=groups))
    grid = []
    for name in classifiers:
        make, key, values = CLASSIFIERS[name]
        possible = [v for v in values if key != "n_neighbors" or v <= fewest]
        grid.append({"classify": [make(seed)], f"classify__{key}": possible})
    steps = Pipeline([("scale", StandardScaler()), ("classify", LogisticRegression())])
    search = GridSearchCV(steps, grid, scoring="accuracy", cv=split).fit(
        features, labels, groups=groups
    )
    tried: dict[str, float] = {}
    for params, mean in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        name = _name(params["classify"], classifiers)
        tried[name] = max(tried.get(name, 0.0), float(mean))
    best = _name(search.best_params_["classify"], classifiers)
    key = CLASSIFIERS[best][1]
    setting = f"{key}={search.best_params_[f'classify__{key}']}"
    return Chosen(search.best_estimator_, best, setting, float(search.best_score_), tried, folds)


def _name(classifier: Any, names: Sequence[str]) -> str:
    (name,) = [n for n in names if isinstance(classifier, type(CLASSIFIERS[n][0](0)))]
    return name


# --- videos of a data set ---------------------------------------------------------------------


Features = dict[str, dict[str, np.ndarray]]


def read_features(entries: Sequence[ClipEntry], records: Records) -> Features:
    """The features of videos: by kind, then by video id."""
    found: Features = {"metadata": {}, "colour": {}, "flow": {}}
    for entry in bar(entries, total=len(entries), description="features", unit="video"):
        frames, fields = decoded(records, entry.video_id)
        found["metadata"][entry.video_id] = metadata(records.rows[entry.video_id])
        found["colour"][entry.video_id] = mean_colour(frames)
        found["flow"][entry.video_id] = flow_histogram(fields)
    return found


def decoded(records: Records, video_id: str) -> tuple[np.ndarray, np.ndarray]:
    """All frames of a video, uint8 `t h w 3`, and its flow, float32 `t h w 2`, px per frame."""
    example = records.parse(tf.constant(records.read(records.rows[video_id].record)))

    def pictures(name: str, how: int) -> np.ndarray:
        data = [np.frombuffer(jpeg, np.uint8) for jpeg in example[name].numpy()]
        return np.stack([np.asarray(cv2.imdecode(jpeg, how)) for jpeg in data])

    frames = pictures("frames", cv2.IMREAD_COLOR_RGB)
    u, v = np.split(pictures("flow", cv2.IMREAD_GRAYSCALE), 2, axis=1)
    fields = flow_to_pixels(jnp.stack([u, v], axis=-1), records.settings.flow_bound)
    return frames, np.asarray(fields)


def measure(
    settings: Settings, index: VideoIndex, records: Records, out: Path
) -> list[dict[str, Any]]:
    """Chooses, scores and stores every baseline; returns the rows of the table."""
    train = [e for name in ("train", "validation") for e in usable_entries(index, records, name)]
    test = usable_entries(index, records, "test")
    began = time.monotonic()
    features = read_features([*train, *test], records)
    common = {
        "data": index.name,
        "protocol": index.protocol,
        "leaky": index.leaky,
        "num_videos": len(test),
        "trained_on": len(train),
        "excluded": _say_unusable(index, records),
        "read_seconds": round(time.monotonic() - began, 1),
        **_origin(),
    }
    rows = []
    for name in BASELINES:
        row = _row(name, features, train, test, settings, index, out)
        say(
            f"{name}: {row['top1']:.1%} (95 % interval {row['low95']:.1%} to {row['high95']:.1%}) "
            f"by {row['classifier']}, {row['setting']}; held-out training groups: {row['tried']}"
        )
        rows.append({"case": f"{index.name}, {index.protocol}: {name}", **row, **common})
    return rows


def scores_file(out: Path, index: VideoIndex, name: str) -> Path:
    """Where the scores of a baseline go."""
    return out / "baselines" / index.name / f"{name.replace(', ', '_').replace(' ', '_')}.csv"


def _row(
    name: str,
    features: Features,
    train: Sequence[ClipEntry],
    test: Sequence[ClipEntry],
    settings: Settings,
    index: VideoIndex,
    out: Path,
) -> dict[str, Any]:
    """Chooses, scores and stores one baseline; what there is to say of it."""
    baseline = BASELINES[name]

    def table(entries: Sequence[ClipEntry]) -> np.ndarray:
        kinds = [features[kind] for kind in baseline.features]
        return np.array([np.concatenate([kind[e.video_id] for kind in kinds]) for e in entries])

    began = time.monotonic()
    labels, groups = np.array([e.label for e in train]), [e.group for e in train]
    seed = settings.config.seed
    chosen = choose(table(train), labels, groups, baseline.classifiers, seed=seed)
    seconds = time.monotonic() - began
    found = chosen.probabilities(table(test), len(index.class_names))
    scores = Scores(tuple(test), found)
    file = scores_file(out, index, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_scores(file, scores, index.class_names)
    figures = run_figures(settings, index, scores)
    low, high = figures["interval95"]
    mean_low, mean_high = figures["mean_class_interval95"] or (None, None)

    def told(value: float | None) -> float | str:
        return "" if value is None else round(value, 4)

    return {
        "baseline": name,
        "features": table(test).shape[1],
        "classifier": chosen.classifier,
        "setting": chosen.setting,
        "cv_accuracy": round(chosen.accuracy, 4),
        "cv_folds": chosen.folds,
        "tried": "; ".join(f"{kind} {value:.4f}" for kind, value in chosen.others.items()),
        "top1": told(figures["top1"]),
        "low95": told(low),
        "high95": told(high),
        "mean_class": told(figures["mean_class_accuracy"]),
        "mean_class_low95": told(mean_low),
        "mean_class_high95": told(mean_high),
        "chance": 1 / len(index.class_names),
        "seconds": round(seconds, 1),
    }


def _say_unusable(index: VideoIndex, records: Records) -> int:
    """Names the videos that cannot be read; returns how many."""
    rows = [(entry, records.rows[entry.video_id]) for entry in index.entries]
    for entry, row in rows:
        if row.status != "ok":
            used = "used although it" if row.usable else "EXCLUDED:"
            say(f"  {entry.subset}: {entry.video_id}: {used} {row.reason}")
    return sum(not row.usable for _, row in rows)


def _origin() -> dict[str, str]:
    return {
        "commit": host.commit(),
        "machine": f"{host.machine()}, {processor()}",
        "scikit_learn": sklearn.__version__,
    }
