"""The one decision where the weights of a stage come from, and what became of every tensor."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax

from stf_jax import hosts
from stf_jax.checkpoint import misfit, unfitting
from stf_jax.model import Params
from stf_jax.optim import by_path, parameter_path
from stf_jax.vgg import find_vgg16, port_vgg16, read_vgg16

Leaf: TypeAlias = Any  # an array or its shape and dtype


@dataclasses.dataclass(frozen=True)
class TransferSettings:
    """How a stage starts from weights that were trained as another network's.

    All expressions are regular expressions for a whole path, such as 'head/.*'. What they do not
    name must fit exactly.

    Args:
      source: folder of the trained run; '' for none.
      rename: (expression, replacement) pairs; the first whose expression matches a path of the
        source turns it into a path of this network (`re.sub`).
      fresh: parameters that start anew if the classes are others than the source's, or if the
        source has none of that name and shape.
      unused: paths of the source, after renaming, that may be left out.

    Raises:
      ValueError: something that is no regular expression (names it).
    """

    source: str
    rename: tuple[tuple[str, str], ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks the expressions; lists, as stored runs have them, become tuples."""
        rename = tuple(tuple(pair) for pair in self.rename if not isinstance(pair, str))
        if len(rename) != len(self.rename) or any(len(pair) != 2 for pair in rename):
            raise ValueError(
                f"transfer.rename: got {self.rename}, allowed: pairs such as (('rgb/(.*)', '\\1'),)"
            )
        object.__setattr__(self, "rename", rename)
        for name in ("fresh", "unused"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"transfer.{name}: got {getattr(self, name)!r}, allowed: a list of expressions"
                )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for expression in (*self.fresh, *self.unused, *(pair[0] for pair in rename)):
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    f"transfer: {expression!r} is no regular expression ({error})"
                ) from None


# What a stage takes over from the stage before: everything, as it is.
HAND_OFF = TransferSettings(source="", rename=(), fresh=(), unused=())


@dataclasses.dataclass(frozen=True)
class Weights:
    """Trained weights that a stage may start from.

    Args:
      label: whose they are, for people.
      arrays: by path.
      other_classes: whether they tell other classes apart.
    """

    label: str
    arrays: Mapping[str, Leaf]
    other_classes: bool


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of a tensor: its shape, and where it came from or that it was left out."""

    shape: tuple[int, ...]
    fate: str


def starting_params(
    initialise: Callable[[], Params],
    *,
    expected: Params,
    source: Weights | None,
    rules: TransferSettings,
    vgg: str,
    temporal_init: str,
    conv1_init: str,
) -> tuple[Params, dict[str, Fate]]:
    """Decides where the weights of a stage's first step come from.

    Args:
      initialise: makes the randomly initialised parameters.
      expected: their shapes.
      source: trained weights, if there are any: the stage before (`HAND_OFF`), or another run.
      rules: what of them may differ.
      vgg: else, the ImageNet weights: 'keras', a file, or 'none' for training from scratch.
      temporal_init: how the 3-D layers start (`model.temporal.init`).
      conv1_init: how the first flow convolution starts (`model.temporal.conv1_init`).

    Returns:
      The parameters, and the fate of every tensor by its path: nothing is dropped in silence.

    Raises:
      ValueError: the tensors are not those of this network (lists them).
    """
    if source is not None:
        origins, fates = plan_transfer(by_path(expected), source, rules)
        # Large networks are not made twice: only if some of it stays.
        params = initialise() if None in origins.values() else expected

        def value(path: Any, leaf: Leaf) -> Leaf:
            origin = origins[parameter_path(path)]
            return leaf if origin is None else source.arrays[origin]

        return jax.tree_util.tree_map_with_path(value, params), fates
    params = initialise()
    shapes = {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}
    weights = find_vgg16(vgg)
    if weights is None:
        return params, {path: Fate(shapes[path], _FRESH) for path in shapes}
    params, told = port_vgg16(
        params, read_vgg16(weights), temporal_init=temporal_init, conv1_init=conv1_init
    )
    return params, {path: Fate(shapes[path], fate) for path, fate in told.items()}


_FRESH = "initialised at random"


def plan_transfer(
    wanted: Mapping[str, Leaf], source: Weights, rules: TransferSettings
) -> tuple[dict[str, str | None], dict[str, Fate]]:
    """Decides which tensor each parameter takes; reads shapes and dtypes only.

    Args:
      wanted: the network's parameters by path.
      source: what there is.
      rules: what may differ.

    Returns:
      For every parameter the path of its tensor in the source, or None for a fresh one; and the
      fate of every parameter, and of every tensor that is left out (as '<label>: <path>').

    Raises:
      ValueError: anything that the rules do not name (lists it).
    """
    renamed = _renamed(source, rules.rename)
    origins: dict[str, str | None] = {}
    fates: dict[str, Fate] = {}
    faults: list[str] = []
    for path, leaf in wanted.items():
        origin = renamed.pop(path, None)
        fault = misfit(path, None if origin is None else source.arrays[origin], leaf)
        may_be_fresh = _named(path, rules.fresh)
        if may_be_fresh and (fault or source.other_classes):
            why = "for other classes" if source.other_classes else fault.partition(":")[0]
            origins[path] = None
            fates[path] = Fate(tuple(leaf.shape), f"{_FRESH} ({why})")
            if origin is not None:
                _leave_out(fates, source, origin)
        elif fault:
            faults.append(fault)
        else:
            origins[path] = origin
            kind = "copied" if origin == path else f"renamed from {origin}, copied"
            fates[path] = Fate(tuple(leaf.shape), f"{kind} from {source.label}")
    for path, origin in renamed.items():
        if _named(path, rules.unused):
            _leave_out(fates, source, origin)
        else:
            faults.append(misfit(path, source.arrays[origin], None))
    if faults:
        raise unfitting(
            source.label,
            faults,
            "Use the `model` part that it was trained with (config.json there), or name what may "
            "differ by regular expressions in --config.transfer.rename, --config.transfer.fresh "
            "(starts anew) or --config.transfer.unused (is left out).",
        )
    return origins, fates


def _named(path: str, expressions: Sequence[str]) -> bool:
    return any(re.fullmatch(expression, path) for expression in expressions)


def _leave_out(fates: dict[str, Fate], source: Weights, path: str) -> None:
    fates[f"{source.label}: {path}"] = Fate(tuple(source.arrays[path].shape), "unused")


def _renamed(source: Weights, rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    """New path -> path in the source."""
    unused = {expression for expression, _ in rules}
    renamed: dict[str, str] = {}
    for path in source.arrays:
        new = path
        for expression, replacement in rules:
            if re.fullmatch(expression, path):
                unused.discard(expression)
                new = re.sub(expression, replacement, path)
                break
        if new in renamed:
            raise ValueError(
                f"transfer.rename: both {renamed[new]} and {path} of {source.label} become {new}"
            )
        renamed[new] = path
    if unused:
        raise ValueError(
            f"transfer.rename: {sorted(unused)} match no tensor of {source.label}. Paths look like "
            f"'{next(iter(source.arrays))}'."
        )
    return renamed


def count_fates(fates: Mapping[str, Fate]) -> str:
    """How many tensors share each fate, for people."""
    kinds: dict[str, int] = {}
    for fate in fates.values():
        kind = re.split(r" from | \(", fate.fate)[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} tensors {kind}" for kind, count in sorted(kinds.items()))


def write_fates(path: Path, fates: Mapping[str, Fate]) -> None:
    """Writes one line per tensor: path, shape, fate (JSON, readable)."""
    if not hosts.leads():
        return
    rows = {name: {"shape": list(fate.shape), "fate": fate.fate} for name, fate in fates.items()}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
