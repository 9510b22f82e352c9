"""Loss, sums that merge, and the figures of an evaluation with their uncertainty."""

import dataclasses
import math
from collections.abc import Sequence
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
    """What an evaluation reports; accuracies from 0 to 1, at video level (one clip per video).

    `mean_class_accuracy` is over the classes that occur; `interval95` is Wilson's for `top1`;
    `confusion[i][j]` counts videos of class i taken for class j (the paper's Table 3).
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
