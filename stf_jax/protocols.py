"""Protocols: which videos are for training, which for the stop rule, which for the test.

Honest ones keep every source video on one side. The leaky ones are the paper's and the literature's
(SPEC section 10); what they leak is measured on the very videos, stored and said with every number.
"""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax.index import ClipEntry, VideoIndex, class_notes, natural, overlap

# The share of the clips that the paper's protocol holds out.
_PAPER_SHARE = 0.3
FOLDED = ("group_kfold", "leave_one_group_out", "leave_one_out")
PROTOCOLS = ("official", "hold_out", *FOLDED, "random_fixed", "paper_resplit")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The videos that a reader of some layout has found, before any protocol.

    Args:
      name: of the data set.
      root: the folder that video ids are relative to.
      class_names: in the order of their labels.
      clips: the videos; their subset is ''.
      groups_known: whether `ClipEntry.group` names sources; else every clip has its own.
      numbered: groups are '<class>/<number>', and a fold takes a number of every class at once.
      official: the published subset of each video id; None if there is none.
      official_name: how the official protocol is called in tables.
      notes: what a reader of the results should know about the data.
      missing: listed videos that are not there.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    clips: tuple[ClipEntry, ...]
    groups_known: bool = True
    numbered: bool = False
    official: Mapping[str, str] | None = None
    official_name: str = ""
    notes: tuple[str, ...] = ()
    missing: int = 0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which protocol, and what it depends on.

    Args:
      name: 'official' (the published lists), 'hold_out' (`test_fraction` of the clips, in whole
        groups), 'group_kfold' (fold `fold` of `folds`, in whole groups), 'leave_one_group_out'
        (group number `fold`), 'leave_one_out' (clip number `fold`), 'random_fixed' (one random 7:3
        split of the clips; leaky) or 'paper_resplit' (a new one every epoch; leaky, SPEC 10.1).
      split: official list, where there are several.
      folds: number of folds of 'group_kfold'.
      fold: which fold is tested, from 1.
      test_fraction: share of the clips to test on; 'hold_out' only.
      validation_fraction: share of the training clips that the stop rule watches.
      seed: of everything random.

    Raises:
      ValueError: an impossible value or combination (names it).
    """

    name: str
    split: int
    folds: int
    fold: int
    test_fraction: float
    validation_fraction: float
    seed: int

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.name not in PROTOCOLS:
            raise ValueError(f"data.protocol: got {self.name!r}, one of {PROTOCOLS}")
        for key in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be in [0, 1), got {getattr(self, key)}")
        if self.fold < 1 or (self.name == "group_kfold" and self.fold > self.folds):
            raise ValueError(f"data.fold counts from 1 to data.folds={self.folds}, got {self.fold}")
        if self.folds < 2:
            raise ValueError(f"data.folds must be at least 2, got {self.folds}")
        if self.fold != 1 and self.name not in FOLDED:
            raise ValueError(
                f"data.fold={self.fold} means nothing with data.protocol={self.name!r}: it is for "
                f"{', '.join(FOLDED)}"
            )
        if self.split != 1 and self.name != "official":
            raise ValueError(
                f"data.split={self.split} means nothing with data.protocol={self.name!r}: it is "
                "for 'official'"
            )

    def settings(self) -> dict[str, Any]:
        """The values that this protocol reads, for a checkpoint's stamp."""
        read = {
            "official": ("split",),
            "hold_out": ("test_fraction",),
            "group_kfold": ("folds", "fold"),
            "leave_one_group_out": ("fold",),
            "leave_one_out": ("fold",),
        }.get(self.name, ())
        kept = ("seed",) if self.name == "paper_resplit" else (*read, "validation_fraction", "seed")
        return {"protocol": self.name, **{key: getattr(self, key) for key in (*read, *kept)}}


def divide(layout: Layout, protocol: Protocol) -> VideoIndex:
    """Says what each video of a layout is for.

    Returns:
      The index, with its leak measured.

    Raises:
      ValueError: the layout has not what the protocol needs (says what), or nothing is left to
        train or to test on.
    """
    makers: dict[str, Callable[[Layout, Protocol], tuple[set[str], str]]] = {
        "official": _official,
        "hold_out": _hold_out,
        "group_kfold": _group_kfold,
        "leave_one_group_out": _leave_one_group_out,
        "leave_one_out": _leave_one_out,
        "random_fixed": _random_fixed,
        "paper_resplit": _paper_resplit,
    }
    tested, told = makers[protocol.name](layout, protocol)
    named = layout.official if protocol.name == "official" and layout.official else {}
    entries = [
        dataclasses.replace(
            clip, subset=named.get(clip.video_id, "test" if clip.video_id in tested else "train")
        )
        for clip in sorted(layout.clips, key=lambda clip: clip.video_id)
    ]
    if len(tested) in (0, len(entries)):
        raise ValueError(
            f"{layout.root}: data.protocol={protocol.name!r} ({told}) tests on {len(tested)} of "
            f"{len(entries)} videos; both training and test need some: choose another protocol"
        )
    index = _measured(layout, protocol, entries, told)
    if protocol.name == "paper_resplit" or index.subset("validation"):
        return index
    return hold_out_validation(
        index,
        fraction=protocol.validation_fraction,
        seed=protocol.seed,
        in_groups=protocol.name != "random_fixed",
    )


def _measured(
    layout: Layout, protocol: Protocol, entries: Sequence[ClipEntry], told: str
) -> VideoIndex:
    """Puts an index together, measures its overlap and says what its classes lack."""
    shared = overlap(entries) if layout.groups_known else None
    notes = list(layout.notes)
    leaky = bool(shared)
    if shared is None and protocol.name == "official":
        notes.append(
            "which videos share a source is not known; that the published split keeps them apart "
            "was not checked"
        )
    elif shared is None:
        leaky = True
        notes.append(
            "groups are not known: clips cut from one video may stand on both sides, which "
            "flatters every accuracy"
        )
    return VideoIndex(
        name=layout.name,
        root=layout.root,
        class_names=layout.class_names,
        entries=tuple(entries),
        protocol=told,
        # A protocol that trains on its test videos leaks whatever their groups are.
        leaky=leaky or protocol.name == "paper_resplit",
        overlap=shared,
        notes=(*notes, *class_notes(layout.class_names, entries)),
        missing=layout.missing,
        settings=protocol.settings(),
        resplit_seed=protocol.seed if protocol.name == "paper_resplit" else None,
    )


# --- honest protocols ------------------------------------------------------------------------


def _official(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    if layout.official is None:
        raise ValueError(
            f"data.protocol='official': {layout.name} comes without lists of what to train and to "
            f"test on; choose one of {[name for name in PROTOCOLS if name != 'official']}"
        )
    return {k for k, subset in layout.official.items() if subset == "test"}, layout.official_name


def _hold_out(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    chance = random.Random(f"test {protocol.seed}")
    groups = held_out_groups(layout.clips, protocol.test_fraction, chance)
    tested = {clip.video_id for clip in layout.clips if clip.group in groups}
    share = f"{len(tested) / len(layout.clips):.0%} of the clips"
    if layout.groups_known:
        return tested, f"group-held-out: {share} in {len(groups)} groups unseen in training"
    return tested, f"random hold-out of {share}, groups unknown"


def _group_kfold(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    units = _units(layout, protocol)
    if protocol.folds > len(units):
        raise ValueError(
            f"data.folds={protocol.folds} is more than the {len(units)} groups of {layout.root}"
        )
    # Dealt out in turn, so every fold has a share of every class.
    chosen = set(units[protocol.fold - 1 :: protocol.folds])
    tested = {clip.video_id for clip in layout.clips if _unit(layout, clip) in chosen}
    return tested, f"{protocol.folds}-fold by groups, fold {protocol.fold}"


def _leave_one_group_out(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    units = _units(layout, protocol)
    unit = _numbered(units, protocol, "groups", layout)
    tested = {clip.video_id for clip in layout.clips if _unit(layout, clip) == unit}
    return tested, f"leave-one-group-out, fold {protocol.fold} of {len(units)} (group {unit})"


def _leave_one_out(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    ids = sorted(clip.video_id for clip in layout.clips)
    chosen = _numbered(ids, protocol, "videos", layout)
    return {chosen}, f"leave-one-out, fold {protocol.fold} of {len(ids)} ({chosen})"


def _numbered(names: Sequence[str], protocol: Protocol, what: str, layout: Layout) -> str:
    if protocol.fold > len(names):
        raise ValueError(
            f"data.fold={protocol.fold}: {layout.root} has only {len(names)} {what} to leave out"
        )
    return names[protocol.fold - 1]


def _units(layout: Layout, protocol: Protocol) -> list[str]:
    """What a fold is made of: groups, in natural order."""
    if not layout.groups_known:
        raise ValueError(
            f"data.protocol={protocol.name!r} needs to know which clips of {layout.name} share a "
            "source: set data.group_regex, or give data.list with a column 'group'"
        )
    return sorted({_unit(layout, clip) for clip in layout.clips}, key=natural)


def _unit(layout: Layout, clip: ClipEntry) -> str:
    return clip.group.rpartition("/")[2] if layout.numbered else clip.group


# --- leaky protocols -------------------------------------------------------------------------


def _random_fixed(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    return _random_part(layout.clips, f"random_fixed {protocol.seed}"), "random 7:3 split, fixed"


def _paper_resplit(layout: Layout, protocol: Protocol) -> tuple[set[str], str]:
    told = "the paper's: a new random 7:3 split every epoch, tested on the last one"
    return _random_part(layout.clips, _epoch_seed(protocol.seed, 0, 0)), told


def _random_part(clips: Iterable[ClipEntry], seed: str) -> set[str]:
    """The ids of 30 % of the clips, the same whatever order they come in."""
    ids = sorted(clip.video_id for clip in clips)
    return set(random.Random(seed).sample(ids, round(_PAPER_SHARE * len(ids))))


def _epoch_seed(seed: int, stage: int, epoch: int) -> str:
    return f"paper_resplit {seed} {stage} {epoch}"


def resplit(index: VideoIndex, stage: int, epoch: int) -> VideoIndex:
    """The split of one epoch of 'paper_resplit': a function of (seed, stage, epoch).

    Args:
      index: of that protocol; only its usable entries, so that every epoch has as many.
      stage: position of the stage, from 0.
      epoch: of the stage, from 0.

    Returns:
      The index with other subsets, its overlap measured anew if groups are known.

    Source: paper, section 4.2; SPEC 10.1.
    """
    assert index.resplit_seed is not None
    tested = _random_part(index.entries, _epoch_seed(index.resplit_seed, stage, epoch))
    entries = tuple(
        dataclasses.replace(e, subset="test" if e.video_id in tested else "train")
        for e in index.entries
    )
    shared = None if index.overlap is None else overlap(entries)
    return dataclasses.replace(index, entries=entries, overlap=shared)


def scored_on(index: VideoIndex, subset: str) -> VideoIndex:
    """The index as the figures of one of its subsets must describe it.

    Args:
      index: the videos.
      subset: 'test' changes nothing. 'validation', to choose settings by: the protocol then says
        that it is no test, and the leak is that of these videos.

    Raises:
      ValueError: the protocol holds no validation videos that a figure could be about.

    Example:
      >>> entries = (ClipEntry("a", 0, "a", "train"), ClipEntry("b", 0, "b", "validation"))
      >>> index = VideoIndex("x", Path(), ("y",), entries, "official split 1", False, 0.0, (), 0)
      >>> scored_on(index, "validation").protocol
      'held-out training groups, not a test (they also chose the epoch), of official split 1'
    """
    if subset == "test":
        return index
    if index.resplit_seed is not None:
        raise ValueError(
            f"eval.subset={subset!r} means nothing with data.protocol='paper_resplit': every epoch "
            "tests on what others train on, and nothing is held out; use 'test'"
        )
    shared = None if index.overlap is None else overlap(index.entries, subset)
    kind = "groups" if shared == 0 else "videos"
    return dataclasses.replace(
        index,
        protocol=f"held-out training {kind}, not a test (they also chose the epoch), of "
        f"{index.protocol}",
        leaky=shared != 0,
        overlap=shared,
        scored=subset,
    )


def after_epochs(index: VideoIndex, epochs: Sequence[int]) -> VideoIndex:
    """The split of the last of all epochs, with what had been trained on before it.

    Args:
      index: of 'paper_resplit', its usable entries.
      epochs: how many each stage has had.

    Returns:
      The index of the last epoch; `seen` is the share of its test videos that an earlier epoch
      has trained on (SPEC 10.2): all but those that every epoch has held out.
    """
    assert index.resplit_seed is not None
    which = [(stage, n) for stage, count in enumerate(epochs) for n in range(count)]
    last = resplit(index, *which[-1])
    tested = {entry.video_id for entry in last.subset("test")}
    unseen = set(tested)
    for stage, epoch in which[:-1]:
        unseen &= _random_part(index.entries, _epoch_seed(index.resplit_seed, stage, epoch))
    return dataclasses.replace(last, seen=1 - len(unseen) / max(1, len(tested)))


# --- whole groups ----------------------------------------------------------------------------


def hold_out_validation(
    index: VideoIndex, *, fraction: float, seed: int, in_groups: bool = True
) -> VideoIndex:
    """Sets training clips aside for the stop rule, in whole groups; the test is not touched."""
    entries = [entry for entry in index.entries if entry.subset == "train"]
    chance = random.Random(f"validation {seed}")
    if in_groups:
        groups = held_out_groups(entries, fraction, chance)
        held = {entry.video_id for entry in entries if entry.group in groups}
    else:
        ids = sorted(entry.video_id for entry in entries)
        held = set(chance.sample(ids, round(fraction * len(ids))))
    moved = [
        dataclasses.replace(entry, subset="validation") if entry.video_id in held else entry
        for entry in index.entries
    ]
    return dataclasses.replace(index, entries=tuple(moved))


def held_out_groups(
    entries: Sequence[ClipEntry], fraction: float, chance: random.Random
) -> frozenset[str]:
    """Draws whole groups until every class has given up about `fraction` of its clips.

    A group is taken if that brings the classes nearer to their shares, and never if it is the last
    that one of its classes has. A class with two groups or more gives up at least one.
    """
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    for entry in entries:
        sizes[entry.group][entry.label] += 1
    left = Counter(label for labels in sizes.values() for label in labels)
    target = {k: fraction * n for k, n in Counter(entry.label for entry in entries).items()}
    taken: Counter[int] = Counter()
    order = sorted(sizes)
    chance.shuffle(order)
    held = set()
    for at_least_one in (False, True):
        for group in order if fraction else ():
            labels = sizes[group]
            if group in held or any(left[label] == 1 for label in labels):
                continue
            before = sum(abs(target[k] - taken[k]) for k in labels)
            after = sum(abs(target[k] - taken[k] - n) for k, n in labels.items())
            if after < before or (at_least_one and any(not taken[k] for k in labels)):
                held.add(group)
                taken.update(labels)
                left.subtract(labels.keys())
    return frozenset(held)
