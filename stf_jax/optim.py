"""Stages, their learning-rate schedules and stop rule, and the optimiser."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib


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
      rates: (expression, factor) pairs: a parameter's learning rate is multiplied by the factor of
        the first regular expression that matches its whole path (`spatial/block1_conv1/kernel`). A
        factor of 0 freezes it. Every parameter must be matched, and every expression match one.
      divide_clips: trains on clips of so many times fewer frames, so many times as many in a batch
        and of every video in an epoch: the same work on more different moments. 1 is whole clips;
        validation always sees those. See `Settings.in_stage`.

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
    rates: tuple[tuple[str, float], ...]
    divide_clips: int

    def __post_init__(self) -> None:
        """Checks the values; lists, as stored runs have them, become tuples."""
        object.__setattr__(self, "rates", _checked_rates(self.rates))
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
        if self.divide_clips < 1:
            raise ValueError(f"stage divide_clips must be at least 1, got {self.divide_clips}")


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


def _checked_rates(rates: Sequence) -> tuple[tuple[str, float], ...]:
    def fail(why: str) -> ValueError:
        return ValueError(
            f"stage rates: {why}; they are pairs of an expression and a factor, such as "
            "(('spatial/.*', 0.1), ('.*', 1.0)), a factor of 0 for what stays as it is"
        )

    pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in rates)
    if not pairs:
        raise fail("got none")
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise fail(f"got {pair}")
        number = isinstance(pair[1], (int, float)) and not isinstance(pair[1], bool)
        if not number or not 0 <= pair[1] < float("inf"):
            raise fail(f"{pair[0]!r} has the factor {pair[1]!r}")
        try:
            re.compile(pair[0])
        except re.error as error:
            raise fail(f"{pair[0]!r} is no regular expression ({error})") from None
    return pairs


def _matrices(params):
    """Which axes of a kernel are a matrix's: all but the last are inputs. None: no matrix."""

    def numbers(path, leaf) -> optax.contrib.MuonDimensionNumbers | None:
        if leaf.ndim < 2 or re.fullmatch(_NOT_ORTHOGONAL, parameter_path(path)):
            return None
        inputs = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=-1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def _muon() -> optax.GradientTransformation:
    muon = optax.contrib.muon(
        1.0, consistent_rms=0.2, muon_weight_dimension_numbers=_matrices, nesterov=True
    )
    return optax.chain(muon, optax.scale(-1.0))  # the others leave the sign to what follows


# The recurrent layer's input kernels have two thirds of all weights: making them orthogonal costs a
# CPU as much as a quarter of the rest of the step, and each of several devices would do it.
_NOT_ORTHOGONAL = "(.*/)?(head|recurrent)/.*"
_DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": functools.partial(optax.scale_by_adam, b1=0.9, b2=0.999, eps=1e-8),
    "sgdm": functools.partial(optax.trace, decay=0.9),
    "rmsprop": functools.partial(optax.scale_by_rms, decay=0.9),
    "muon": _muon,
}


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser (SPEC 8.2, 8.7); the learning rate comes from the stage, step by step.

    Args:
      name: 'adam', 'sgdm' (momentum 0.9), 'rmsprop', or 'muon': kernels follow their momentum made
        orthogonal, with entries as large as Adam's usually are, so that the rate means the same;
        recurrent layer, classifier, biases and gains follow Adam (Liu et al., Muon is Scalable for
        LLM Training, 2025).
      weight_decay: decoupled, on kernels only; 0 is none.
      clip: largest global norm of the gradient of what is trained; 0 is none.
      accumulate: equal parts that a batch is worked through in, one after the other: one update
        with the gradient of the whole batch, in the memory of one part.
      ema: decay of the moving average of the parameters that validation, the best weights and the
        next stage then use; 0 is none. Early on it is (1 + step) / (10 + step) if that is less.

    Raises:
      ValueError: an unknown name, an impossible value.
    """

    name: str
    weight_decay: float
    clip: float
    accumulate: int
    ema: float

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.name not in _DIRECTIONS:
            names = ", ".join(map(repr, _DIRECTIONS))
            raise ValueError(f"optimizer.name: got {self.name!r}, one of {names}")
        if self.accumulate < 1:
            raise ValueError(f"optimizer.accumulate must be at least 1, got {self.accumulate}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"optimizer.ema must be in [0, 1), got {self.ema}")


@functools.cache
def make_optimizer(
    settings: OptimizerSettings, rates: tuple[tuple[str, float], ...]
) -> optax.GradientTransformation:
    """An optax transformation for a learning rate of 1: the step multiplies its updates by it.

    Keeping the rate outside lets stages share one compiled training step.

    Args:
      settings: see there.
      rates: see `StageSettings`; clipping and the optimiser come first, the factors last.

    Raises:
      ValueError: at `init`, an expression that matches no parameter, or a parameter that none
        matches (names them).
    """
    parts = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    parts.append(_DIRECTIONS[settings.name]())
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=_kernels))
    train = optax.chain(*parts, optax.scale(-1.0))
    factors = functools.partial(rate_factors, rates=rates)

    def labels(params):
        return jax.tree.map(lambda factor: "train" if factor else "frozen", factors(params))

    def scaled(updates, params):
        return jax.tree.map(lambda update, factor: factor * update, updates, factors(params))

    # What is frozen has no state, no share in the norm that is clipped, and no decay.
    parted = optax.multi_transform({"train": train, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(parted, optax.stateless(scaled))


def averaged(average, params, step, decay: float):
    """The moving average of the parameters after one more step.

    Args:
      average: so far, a tree as `params`.
      params: after the step.
      step: how many were done before it, int32.
      decay: see `OptimizerSettings.ema`.
    """
    early = (1.0 + step) / (10.0 + step)
    return optax.incremental_update(params, average, 1.0 - jnp.minimum(decay, early))


def parameter_path(path: Sequence) -> str:
    """A jax key path as 'spatial/block1_conv1/kernel'."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their paths: the same names whatever kinds of containers hold them."""
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _kernels(params):
    """Decay pulls weights to zero, never biases or the gains of normalisation."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def rate_factors(params, rates: Sequence[tuple[str, float]]):
    """The factor of every parameter's learning rate, a tree of floats.

    Raises:
      ValueError: as `make_optimizer`.
    """
    unused = dict(rates)
    uncovered: list[str] = []

    def factor(path, leaf) -> float:
        name = parameter_path(path)
        for expression, value in rates:
            if re.fullmatch(expression, name):
                unused.pop(expression, None)
                return float(value)
        uncovered.append(name)
        return 0.0

    factors = jax.tree_util.tree_map_with_path(factor, params)
    if uncovered:
        raise ValueError(
            f"stage rates: no expression matches {len(uncovered)} parameters, such as "
            f"'{uncovered[0]}'. Add a last pair ('.*', 1.0) for all the others."
        )
    if unused:
        raise ValueError(
            f"stage rates: {sorted(unused)} match no parameter, or only some that an earlier "
            f"expression matches. Paths look like '{_some_path(params)}'."
        )
    return factors


def _some_path(params) -> str:
    return parameter_path(jax.tree_util.tree_flatten_with_path(params)[0][0][0])
