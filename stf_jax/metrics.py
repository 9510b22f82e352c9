"""Loss, sums that merge, and the figures of an evaluation with their uncertainty."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    scores: Sequence[Float[Array, "b k"] | Float[Array, "b s k"]],
    label: Int[Array, " b"],
    smoothing: float = 0.0,
) -> Float[Array, " b"]:
    """The loss of each clip, in nats (SPEC 8.1).

    Args:
      scores: logits. Those of every recurrent step count as the mean of their losses
        (`head.pool` = 'per_step_loss', SPEC 7.8); those of several networks add up.
      label: true classes.
      smoothing: share of each target that is spread over all classes alike.

    Returns:
      `b`, at least in float32.
    """

    def loss(logits: Array) -> Array:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        target = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
        target = optax.smooth_labels(target, smoothing) if smoothing else target
        if logits.ndim == 2:
            return optax.softmax_cross_entropy(logits, target)
        targets = jnp.broadcast_to(target[:, None], logits.shape)
        return optax.softmax_cross_entropy(logits, targets).mean(axis=1)

    return sum((loss(logits) for logits in scores[1:]), loss(scores[0]))


@flax.struct.dataclass
class Sums:
    """Sums over clips; add two to merge them, divide once at the end.

    Attributes:
      loss: sum of losses, nats.
      top1: clips whose best class is the true one.
      count: clips.
    """

    # Not annotated as arrays: libraries map such trees to trees of shapes, names or nothing.
    loss: Any
    top1: Any
    count: Any

    @classmethod
    def zero(cls) -> "Sums":
        """The sums over no clips."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    @classmethod
    def of(
        cls,
        loss: Float[Array, " b"],
        logits: Float[Array, "b k"],
        label: Array,
        mask: Bool[Array, " b"],
    ) -> "Sums":
        """The sums over the valid rows of a batch."""
        weight = mask.astype(jnp.float32)
        right = (logits.argmax(axis=1) == label).astype(jnp.float32)
        return cls((loss * weight).sum(), (right * weight).sum(), weight.sum())

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)

    def means(self) -> dict[str, float]:
        """Mean loss and top-1 accuracy.

        Raises:
          ValueError: no clip was counted.
        """
        count = float(self.count)
        if not count:
            raise ValueError("no clip was counted: the set is empty")
        return {"loss": float(self.loss) / count, "top1": float(self.top1) / count}


@dataclasses.dataclass(frozen=True)
class Figures:
    """What an evaluation reports; accuracies from 0 to 1.

    `mean_class_accuracy` is over the classes that occur; `interval95` is Wilson's for `top1`, as if
    all rows were independent; `confusion[i][j]` counts rows of class i taken for class j (the
    paper's Table 3). A row is a video, with the mean of its clips' probabilities, unless said
    otherwise.
    """

    top1: float
    top5: float
    mean_class_accuracy: float
    loss: float
    num_videos: int
    interval95: tuple[float, float]
    confusion: list[list[int]]


def summarise(probabilities: np.ndarray, labels: np.ndarray) -> Figures:
    """Reduces scores to figures.

    Args:
      probabilities: float `n k`, one row per video.
      labels: int `n`.

    Returns:
      See `Figures`.

    Raises:
      ValueError: no videos.
    """
    if not len(labels):
        raise ValueError("there is no video to evaluate: the subset is empty")
    num_classes = probabilities.shape[1]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    true_score = probabilities[np.arange(len(labels)), labels]
    # Rank counts strictly better classes, so a tie is not held against the true class.
    rank = (probabilities > true_score[:, None]).sum(axis=1)
    per_class = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    right = int(confusion.trace())
    return Figures(
        top1=right / len(labels),
        top5=float((rank < 5).mean()),
        mean_class_accuracy=float(per_class[confusion.sum(axis=1) > 0].mean()),
        loss=float(-np.log(np.maximum(true_score, 1e-30)).mean()),
        num_videos=len(labels),
        interval95=wilson(right, len(labels)),
        confusion=confusion.tolist(),
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    Example:
      >>> [round(bound, 3) for bound in wilson(469, 480)]  # SPEC 10.9
      [0.959, 0.987]
    """
    z = 1.959963984540054
    centre = (successes + z * z / 2) / (trials + z * z)
    spread = successes * (trials - successes) / trials + z * z / 4
    half = z * math.sqrt(spread) / (trials + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """What an evaluation says of each class, in the order of the classes.

    Attributes:
      counts: rows of the class.
      predicted: rows taken for it.
      precision: share of those taken for it that are of it; None if none was taken for it.
      recall: share of its rows that were taken for it; None if it has none.
    """

    counts: list[int]
    predicted: list[int]
    precision: list[float | None]
    recall: list[float | None]


def per_class(confusion: Sequence[Sequence[int]]) -> ClassFigures:
    """Reads the figures of each class from a confusion matrix, rows the true classes."""
    matrix = np.asarray(confusion)
    counts, predicted = matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()
    right = matrix.diagonal().tolist()

    def shares(totals: list[int]) -> list[float | None]:
        return [r / total if total else None for r, total in zip(right, totals, strict=True)]

    return ClassFigures(counts, predicted, shares(predicted), shares(counts))


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Rows whose highest probability lies in (low, high]; means are None where there are none.

    Attributes:
      low: lower bound.
      high: upper bound.
      count: rows.
      confidence: mean of their highest probabilities.
      accuracy: share of them that are right.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def calibration(
    probabilities: np.ndarray, labels: np.ndarray, bins: int
) -> tuple[float, list[CalibrationBin]]:
    """The expected calibration error and the curve behind it.

    The mean of |accuracy - confidence| over bins of equal width, weighted by their rows.

    Args:
      probabilities: float `n k`, n at least 1.
      labels: int `n`.
      bins: how many.

    Source: Guo et al., On calibration of modern neural networks (ICML 2017), section 2.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.arange(bins + 1) / bins
    # Upper bounds belong to their bins.
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    curve, error = [], 0.0
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        sure, accurate = None, None
        if count:
            sure, accurate = float(confidence[inside].mean()), float(right[inside].mean())
            error += count / len(labels) * abs(accurate - sure)
        low, high = float(edges[number]), float(edges[number + 1])
        curve.append(CalibrationBin(low, high, count, sure, accurate))
    return error, curve


@dataclasses.dataclass(frozen=True)
class Resampled:
    """95 % intervals from resampling; None where fewer than two sources leave nothing to draw.

    Attributes:
      top1: of the accuracy.
      mean_class_accuracy: of its mean over the classes.
      recall: of each class.
    """

    top1: tuple[float, float] | None
    mean_class_accuracy: tuple[float, float] | None
    recall: list[tuple[float, float] | None]


def bootstrap(
    right: np.ndarray,
    labels: np.ndarray,
    sources: np.ndarray,
    num_classes: int,
    *,
    seed: int,
    draws: int = 2000,
) -> Resampled:
    """Draws whole sources anew, with replacement, and takes the middle 95 % of the figures.

    Rows of one source, the clips of a video or videos cut from one film, are alike: they come and
    go together. A class that a draw has lost does not count in that draw's mean.

    Args:
      right: bool `n`, whether each row was classified rightly.
      labels: int `n`, its class.
      sources: int `n`, its source, from 0 without gaps.
      num_classes: classes.
      seed: of the draws.
      draws: how many.

    Returns:
      See `Resampled`.
    """
    count = int(sources.max()) + 1
    rows, hits = np.zeros((count, num_classes)), np.zeros((count, num_classes))
    np.add.at(rows, (sources, labels), 1)
    np.add.at(hits, (sources, labels), right)
    recall, top1 = np.empty((draws, num_classes)), np.empty(draws)
    for part, times in _draws(count, draws, seed):
        total, good = times @ rows, times @ hits
        recall[part] = np.where(total > 0, good / np.maximum(total, 1), np.nan)
        top1[part] = good.sum(axis=1) / total.sum(axis=1)
    known = (rows > 0).sum(axis=0)
    several = count > 1
    return Resampled(
        top1=_middle(top1) if several else None,
        mean_class_accuracy=_middle(np.nanmean(recall, axis=1)) if several else None,
        recall=[_middle(recall[:, k]) if known[k] > 1 else None for k in range(num_classes)],
    )


def _draws(count: int, draws: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """How often each source was drawn, a part of the draws at a time: many make a large table."""
    chance = np.random.default_rng(seed)
    for start in range(0, draws, 100):
        part = slice(start, min(start + 100, draws))
        yield part, chance.multinomial(count, np.full(count, 1 / count), part.stop - start)


def bootstrap_difference(
    right: tuple[np.ndarray, np.ndarray],
    sources: tuple[np.ndarray, np.ndarray],
    *,
    seed: int,
    draws: int = 2000,
) -> tuple[float, float] | None:
    """The 95 % interval of the difference of two accuracies, by drawing whole sources anew.

    Both are taken over the same draws. On the same videos that pairs them: what makes a video hard
    for both does not count. On different videos their sources vary independently.

    Args:
      right: of the first and the second, float or bool `n` each, how far each row is right.
      sources: int `n` each, its source, numbered from 0 over both together without gaps.
      seed: of the draws.
      draws: how many.

    Returns:
      Bounds of the first minus the second; None if there are fewer than two sources.
    """
    count = int(max(part.max() for part in sources)) + 1
    if count < 2:
        return None
    rows = [np.bincount(part, minlength=count) for part in sources]
    hits = [np.bincount(s, r, minlength=count) for r, s in zip(right, sources, strict=True)]
    difference = np.empty(draws)
    for part, times in _draws(count, draws, seed):
        # A draw may have none of the videos of one side; it says nothing of the difference.
        with np.errstate(invalid="ignore"):
            first, second = ((times @ h) / (times @ n) for h, n in zip(hits, rows, strict=True))
        difference[part] = first - second
    return _middle(difference)


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(drawn, (2.5, 97.5)).tolist()
    return low, high
