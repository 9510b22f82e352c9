"""Stages, their learning-rate schedules and stop rule, and the optimiser."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import optax


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """One training stage (SPEC 8.3 to 8.5).

    Args:
      learning_rate: peak rate.
      schedule: 'constant', 'piecewise' (times each of `factors` from the epoch in `boundaries`
        on) or 'cosine' (down to zero over `max_epochs`).
      boundaries: epochs, may be fractions; 'piecewise' only.
      factors: one per boundary.
      warmup_epochs: linear rise from zero at the start; any schedule.
      max_epochs: end at the latest.
      patience: end when validation accuracy has not risen by more than `min_delta` for this many
        epochs (the paper's "reaches a fixed classification accuracy rate").
      min_delta: accuracy, from 0 to 1.

    Raises:
      ValueError: an impossible value (names it).
    """

    learning_rate: float
    schedule: str
    boundaries: Sequence[float]
    factors: Sequence[float]
    warmup_epochs: float
    max_epochs: int
    patience: int
    min_delta: float

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.schedule not in ("constant", "piecewise", "cosine"):
            raise ValueError(
                f"stage schedule: got {self.schedule!r}, one of 'constant', 'piecewise', 'cosine'"
            )
        if len(self.boundaries) != len(self.factors):
            raise ValueError(
                f"stage boundaries and factors go together: got {len(self.boundaries)} boundaries "
                f"and {len(self.factors)} factors"
            )
        if self.boundaries and self.schedule != "piecewise":
            raise ValueError(f"stage boundaries need schedule 'piecewise', got {self.schedule!r}")
        if self.max_epochs < 1 or self.patience < 1:
            raise ValueError(
                f"stage max_epochs and patience must be at least 1, got {self.max_epochs} and "
                f"{self.patience}"
            )


def learning_rate_fn(stage: StageSettings, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of a stage as a function of its step."""
    warmup = round(stage.warmup_epochs * steps_per_epoch)
    if stage.schedule == "cosine":
        steps = max(1, stage.max_epochs * steps_per_epoch - warmup)
        main = optax.cosine_decay_schedule(stage.learning_rate, steps)
    elif stage.schedule == "piecewise":
        changes = {
            round(boundary * steps_per_epoch) - warmup: factor
            for boundary, factor in zip(stage.boundaries, stage.factors, strict=True)
        }
        main = optax.piecewise_constant_schedule(stage.learning_rate, changes)
    else:
        main = optax.constant_schedule(stage.learning_rate)
    if not warmup:
        return main
    rise = optax.linear_schedule(0.0, stage.learning_rate, warmup)
    return optax.join_schedules([rise, main], [warmup])


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser (SPEC 8.2, 8.7); the learning rate comes from the stage, step by step.

    Args:
      name: 'adam', 'sgdm' (momentum 0.9) or 'rmsprop'.
      weight_decay: decoupled, on kernels only; 0 is none.
      clip: largest global norm of the gradient; 0 is none.
      freeze: regular expressions; parameters whose path (`spatial/block1_conv1/kernel`) one of
        them matches in full stay as they are.

    Raises:
      ValueError: an unknown name.
    """

    name: str
    weight_decay: float
    clip: float
    freeze: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks the name and makes the settings hashable."""
        if self.name not in ("adam", "sgdm", "rmsprop"):
            raise ValueError(f"optimizer.name: got {self.name!r}, one of 'adam', 'sgdm', 'rmsprop'")
        object.__setattr__(self, "freeze", tuple(self.freeze))


@functools.cache
def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """An optax transformation for a learning rate of 1: the step multiplies its updates by it.

    Keeping the rate outside lets all stages share one compiled training step.

    Raises:
      ValueError: at `init`, a `freeze` expression that matches no parameter.
    """
    scale = {
        "adam": optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        "sgdm": optax.trace(decay=0.9),
        "rmsprop": optax.scale_by_rms(decay=0.9),
    }[settings.name]
    parts = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    parts.append(scale)
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=_kernels))
    train = optax.chain(*parts, optax.scale(-1.0))
    if not settings.freeze:
        return train
    return optax.multi_transform(
        {"train": train, "frozen": optax.set_to_zero()},
        functools.partial(_labels, freeze=settings.freeze),
    )


def parameter_path(path: Sequence) -> str:
    """A jax key path as 'spatial/block1_conv1/kernel'."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _kernels(params):
    """Decay pulls weights to zero, never biases or the gains of normalisation."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _labels(params, *, freeze: Sequence[str]):
    unused = set(freeze)

    def label(path, _) -> str:
        hits = [r for r in freeze if re.fullmatch(r, parameter_path(path))]
        unused.difference_update(hits)
        return "frozen" if hits else "train"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if unused:
        raise ValueError(
            f"optimizer.freeze: {sorted(unused)} match no parameter. Paths look like "
            f"'{parameter_path(jax.tree_util.tree_flatten_with_path(params)[0][0][0])}'."
        )
    return labels
