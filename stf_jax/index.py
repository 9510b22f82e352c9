"""The index of a data set: which video is which class, group and subset, and by whose word."""

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SUBSETS = ("train", "validation", "test")
# A folder of such files is a video.
PICTURES = frozenset((".jpg", ".jpeg", ".png"))


@dataclasses.dataclass(frozen=True)
class ClipEntry:
    """One video.

    Args:
      video_id: its path below the root, with '/': unique and the same on every machine. A folder
        of pictures is a video too.
      label: position in `VideoIndex.class_names`.
      group: what it shares with videos cut from the same source.
      subset: 'train', 'validation' or 'test'; '' until a protocol has decided.
    """

    video_id: str
    label: int
    group: str
    subset: str


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """The videos of a data set and who says which are for what.

    Args:
      name: of the data set, e.g. 'ucf101'.
      root: the folder that video ids are relative to.
      class_names: in the order of their labels.
      entries: sorted by video id.
      protocol: how train and test were told apart, for every table that shows an accuracy.
      leaky: whether a test video may share its source with a training video.
      overlap: share of test videos that do, 0 to 1; None if it is not known.
      notes: what a reader of the results should know about the data.
      missing: listed videos that are not there.
      settings: what the split is a function of, for the checkpoint's stamp.
      resplit_seed: not None if every epoch draws a new split (`protocols.resplit`), from this.
      seen: share of test videos that earlier epochs have trained on; None if no epoch can have.
      scored: the subset that protocol, leak and overlap are about, and a run's figures with them:
        'test', or 'validation' (`protocols.scored_on`).
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    entries: tuple[ClipEntry, ...]
    protocol: str
    leaky: bool
    overlap: float | None
    notes: tuple[str, ...]
    missing: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resplit_seed: int | None = None
    seen: float | None = None
    scored: str = "test"

    def path(self, entry: ClipEntry) -> Path:
        """The file of an entry."""
        return self.root / entry.video_id

    def subset(self, name: str) -> tuple[ClipEntry, ...]:
        """The entries of a subset.

        Raises:
          ValueError: there is no such subset.
        """
        if name not in SUBSETS:
            raise ValueError(f"subset: got {name!r}, one of {SUBSETS}")
        return tuple(entry for entry in self.entries if entry.subset == name)

    def summary(self) -> str:
        """What was found, for people."""
        counts = Counter(entry.subset for entry in self.entries)
        groups = len({entry.group for entry in self.entries})
        told = ", ".join(f"{counts[name]} {name}" for name in SUBSETS)
        lines = [
            f"{self.name} in {self.root}: {len(self.entries)} videos of {len(self.class_names)} "
            f"classes in {groups} groups ({told}); {self.protocol}",
            *([f"  {self.leak()}"] if self.leaky else []),
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def leak(self) -> str:
        """How far the test videos are known from training, for people; '' if they are not."""
        if not self.leaky:
            return ""
        if self.overlap is None:
            told = "which videos share a source is not known"
        else:
            told = (
                f"{self.overlap:.1%} of the {self.scored} videos share their source with training "
                "videos"
            )
        if self.seen is not None:
            told += f", {self.seen:.1%} of them were trained on in earlier epochs"
        return f"LEAKY: {told}"

    def stamp(self) -> dict[str, Any]:
        """Names the split and its videos, short enough for every checkpoint."""
        listed = [(e.video_id, e.label, e.subset) for e in self.entries]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return {"name": self.name, **self.settings, "videos": len(listed), "digest": digest[:16]}


def overlap(entries: Sequence[ClipEntry], subset: str = "test") -> float:
    """Share of the test clips whose group also stands in training or validation.

    Of 'validation' clips, those whose group also stands in training.
    """
    known = ("train", "validation") if subset == "test" else ("train",)
    trained = {entry.group for entry in entries if entry.subset in known}
    tested = [entry for entry in entries if entry.subset == subset]
    return sum(entry.group in trained for entry in tested) / max(1, len(tested))


def class_notes(class_names: Sequence[str], entries: Sequence[ClipEntry]) -> Iterator[str]:
    """What the classes lack, for people."""
    counts = Counter((entry.label, entry.subset) for entry in entries)
    untested = []
    for label, name in enumerate(class_names):
        trained = counts[label, "train"] + counts[label, "validation"]
        tested = counts[label, "test"]
        if not trained:
            yield f"class {name} has no training video"
        if not tested:
            untested.append(name)
        if trained + tested == 1:
            yield f"class {name} has one video only"
    if len(untested) == 1:
        yield f"class {untested[0]} has no test video: mean class accuracy is over the others"
    elif untested:
        yield (
            f"{len(untested)} classes have no test video: mean class accuracy is over the others: "
            f"{some(untested)}"
        )


def check_duplicates(index: VideoIndex, digests: Mapping[str, str]) -> list[str]:
    """Looks for files with the same bytes.

    Args:
      index: the videos.
      digests: digest of each usable file, by video id.

    Returns:
      A note for each set of identical files that does no harm to the test, or no more than the
      protocol does: one that draws a new split every epoch trains on every test video.

    Raises:
      ValueError: a test file is also a training or validation file (names both).
    """
    same: dict[str, list[ClipEntry]] = defaultdict(list)
    for entry in index.entries:
        if entry.video_id in digests:
            same[digests[entry.video_id]].append(entry)
    notes = []
    for copies in same.values():
        if len(copies) == 1:
            continue
        names = some([entry.video_id for entry in copies])
        subsets = {entry.subset for entry in copies}
        if "test" in subsets and len(subsets) > 1 and index.resplit_seed is None:
            raise ValueError(
                f"{index.root}: the same video stands in training and in test: {names}. A test on "
                "it would prove nothing; remove all but one."
            )
        labels = {index.class_names[entry.label] for entry in copies}
        other = f", as {' and '.join(sorted(labels))}" if len(labels) > 1 else ""
        notes.append(f"the same video under {len(copies)} names{other}: {names}")
    return notes


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few of many names, for people."""
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown or "nothing"


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts numbers in names by their value.

    Example:
      >>> sorted(["g10", "g9"], key=natural)
      ['g9', 'g10']
    """
    parts = re.findall(r"\d+|\D+", name)
    return tuple((int(p), "") if p.isdecimal() and p.isascii() else (-1, p) for p in parts)
