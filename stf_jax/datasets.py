"""Folders of videos -> an index: which file is which class, group and subset, and by whose word.

Nothing here opens a video. What an index says does not depend on whether its files can be decoded:
a file that cannot is marked later and never changes which other files are trained or tested on.
"""

import dataclasses
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax import demo

SUBSETS = ("train", "validation", "test")

# Files that stand beside videos without being any; everything else in a class folder is taken for
# a video, whatever its name, and judged by its content.
_COMPANIONS = frozenset(
    ".txt .md .csv .tsv .json .jsonl .xml .yaml .yml .srt .vtt .html .log .py .npy .npz .pkl .h5"
    " .jpg .jpeg .png .gif .bmp .webp .pdf .zip .tar .gz .rar .7z .ini .db .part .tmp".split()
)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The `data` part of a configuration.

    Args:
      name: 'ucf101' (official layout and lists), 'folder' (one sub-folder per class) or 'demo'
        (generated at `root` if it is not there).
      root: the folder.
      split: official list, 1 to 3; 'ucf101' only.
      group_regex: 'folder' only. Searched in each file's name; its first parenthesis (or the whole
        match) names the source that the clip was cut from. '' means unknown.
      test_fraction: share of the clips to test on, in whole groups; 'folder' only.
      validation_fraction: share of the training clips that the stop rule watches, in whole groups.
      seed: of the hold-outs and of the demo videos.

    Raises:
      ValueError: an impossible value (names it).
    """

    name: str
    root: str
    split: int
    group_regex: str
    test_fraction: float
    validation_fraction: float
    seed: int

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.name not in ("ucf101", "folder", "demo"):
            raise ValueError(f"data.name: got {self.name!r}, one of 'ucf101', 'folder', 'demo'")
        if self.split not in (1, 2, 3):
            raise ValueError(f"data.split: got {self.split!r}, one of 1, 2, 3")
        for key in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be in [0, 1), got {getattr(self, key)}")
        try:
            re.compile(self.group_regex)
        except re.error as error:
            raise ValueError(f"data.group_regex {self.group_regex!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class ClipEntry:
    """One video.

    Args:
      video_id: its path below the root, with '/': unique and the same on every machine.
      label: position in `VideoIndex.class_names`.
      group: what it shares with videos cut from the same source.
      subset: 'train', 'validation' or 'test'.
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
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def load_index(settings: Any) -> VideoIndex:
    """Indexes the data set that the `data` part of a configuration names.

    Raises:
      ValueError, TypeError: an impossible or unknown setting, or files that contradict each other.
      FileNotFoundError: the folder or its lists are not there (says what was expected).
    """
    data = DataSettings(**settings)
    root = Path(data.root)
    if data.name == "ucf101":
        index = ucf101(root, split=data.split)
    elif data.name == "folder":
        index = folder(
            root,
            group_regex=data.group_regex,
            test_fraction=data.test_fraction,
            seed=data.seed,
        )
    else:
        index = demo_set(root, seed=data.seed)
    return hold_out_validation(index, fraction=data.validation_fraction, seed=data.seed)


# --- UCF101 ----------------------------------------------------------------------------------

_UCF101_NAME = re.compile(r"v_\w+_g(\d\d)_c\d\d\.avi")


def ucf101(root: Path, *, split: int) -> VideoIndex:
    """Indexes UCF101, or any part of it, by its official lists.

    Args:
      root: holds `UCF-101/<class>/v_<class>_gNN_cNN.avi` and `ucfTrainTestlist/`.
      split: 1 to 3.

    Returns:
      The listed clips that are there, of the classes that have any; labels keep the official order.

    Raises:
      FileNotFoundError: videos or lists are not where they are expected.
      ValueError: a list contradicts itself or another (names file and row).
    """
    _require_folder(root, "the folder that holds UCF-101/ and ucfTrainTestlist/")
    videos, lists = root / "UCF-101", root / "ucfTrainTestlist"
    _require_folder(videos, "the folder of UCF101's class folders (unpacked UCF101.rar)")
    _require_folder(lists, "the official lists (unpacked UCF101TrainTestSplits-Recog...zip)")
    classes = _ucf101_classes(lists / "classInd.txt")
    listed = {
        subset: _ucf101_list(lists / f"{subset}list{split:02}.txt", classes)
        for subset in ("train", "test")
    }
    _check_ucf101_lists(listed, lists, split)
    there = {file for file, _ in _walk(videos)}
    clips = [(subset, clip) for subset, clips in listed.items() for clip in clips]
    found = [(subset, clip) for subset, clip in clips if clip in there]
    if not found:
        raise FileNotFoundError(
            f"{videos} holds none of the {len(clips)} clips of {lists}/*list{split:02}.txt; "
            f"expected files such as {clips[0][1]}, got {_some(sorted(there))}"
        )
    present = {clip.split("/")[0] for _, clip in found}
    names = tuple(name for name in classes if name in present)
    entries = [
        ClipEntry(f"UCF-101/{clip}", names.index(clip.split("/")[0]), _ucf101_group(clip), subset)
        for subset, clip in found
    ]
    lacking = sum(clip.split("/")[0] in present for _, clip in clips) - len(found)
    notes = []
    if len(found) < len(clips):
        notes.append(
            f"partial copy: {len(names)} of {len(classes)} classes ({', '.join(names)}) and "
            f"{len(found)} of {len(clips)} listed clips; {len(clips) - len(found)} of the list are "
            f"missing, {lacking} of them of these classes"
        )
    extra = sorted(there - {clip for _, clip in clips})
    if extra:
        notes.append(f"{len(extra)} files are on no list and not used: {_some(extra)}")
    protocol = f"official split {split}" + (", clips present" if notes else "")
    index = _index("ucf101", root, names, entries, protocol, notes=notes)
    return dataclasses.replace(index, missing=len(clips) - len(found))


def _ucf101_classes(path: Path) -> tuple[str, ...]:
    names: list[str] = []
    for row, line in _rows(path):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1) or not name or name in names:
            raise ValueError(
                f"{path}, row {row}: expected '{len(names) + 1} <new class name>', got {line!r}"
            )
        names.append(name)
    return tuple(names)


def _ucf101_list(path: Path, classes: Sequence[str]) -> list[str]:
    clips: dict[str, None] = {}
    for row, line in _rows(path):
        clip, _, label = line.partition(" ")
        class_name, _, file = clip.partition("/")
        if class_name not in classes or not _UCF101_NAME.fullmatch(file):
            raise ValueError(
                f"{path}, row {row}: expected '<class of classInd.txt>/v_<class>_gNN_cNN.avi', "
                f"got {line!r}"
            )
        if label and label != str(classes.index(class_name) + 1):
            raise ValueError(
                f"{path}, row {row}: {class_name} is class {classes.index(class_name) + 1} of "
                f"classInd.txt, got {label!r}"
            )
        if clip in clips:
            raise ValueError(f"{path}, row {row}: {clip} is listed twice")
        clips[clip] = None
    return list(clips)


def _check_ucf101_lists(listed: Mapping[str, Sequence[str]], lists: Path, split: int) -> None:
    groups = {subset: {_ucf101_group(c) for c in clips} for subset, clips in listed.items()}
    shared = sorted(groups["train"] & groups["test"])
    if shared:
        raise ValueError(
            f"{lists}: train and test list of split {split} share the groups {_some(shared)}; the "
            "official lists share none: unpack them again"
        )


def _ucf101_group(clip: str) -> str:
    # Group 8 of one class and group 8 of another come from different videos.
    class_name, _, file = clip.partition("/")
    match = _UCF101_NAME.fullmatch(file)
    assert match is not None  # _ucf101_list has checked
    return f"{class_name}/g{match[1]}"


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a list of UCF101 (ucfTrainTestlist/)")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield number, line.strip()


# --- a folder per class ----------------------------------------------------------------------


def folder(root: Path, *, group_regex: str, test_fraction: float, seed: int) -> VideoIndex:
    """Indexes a tree with one folder per class and videos of any format at any depth below it.

    Args:
      root: holds the class folders.
      group_regex: see `DataSettings`; '' means that groups are not known.
      test_fraction: share of the clips to test on, in whole groups.
      seed: of the hold-out.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: fewer than two classes with files, or a name without a group.
    """
    _require_folder(root, "a folder with one sub-folder of videos per class")
    by_class, empty, companions = _class_files(root)
    names = tuple(sorted(by_class))
    if len(names) < 2:
        raise ValueError(
            f"{root}: expected at least two class folders with videos, got {_some(names)}"
        )
    entries = [
        ClipEntry(video_id, label, _group_of(video_id, group_regex), "train")
        for label, name in enumerate(names)
        for video_id in by_class[name]
    ]
    tested = _held_out_groups(entries, test_fraction, random.Random(f"test {seed}"))
    entries = [dataclasses.replace(e, subset="test") if e.group in tested else e for e in entries]
    notes = [f"class folder {name}/ holds no video and is left out" for name in empty]
    if companions:
        notes.append(
            f"{len(companions)} files are no videos by their names and not used: "
            f"{_some(companions)}"
        )
    share = f"{len([e for e in entries if e.subset == 'test']) / len(entries):.0%} of the clips"
    if group_regex:
        protocol = f"group-held-out: {share} in {len(tested)} groups unseen in training"
        return _index("folder", root, names, entries, protocol, notes=notes)
    protocol = f"random hold-out of {share}, groups unknown"
    notes.append(
        "no data.group_regex: clips cut from one video may stand on both sides of the hold-out, "
        "which flatters every accuracy"
    )
    return _index("folder", root, names, entries, protocol, notes=notes, groups_known=False)


def _class_files(root: Path) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Video ids by class folder, class folders without any, and the files that are no videos."""
    by_class: dict[str, list[str]] = {
        path.name: []
        for path in sorted(root.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    companions = []
    for file, _ in _walk(root):
        class_name, _, rest = file.partition("/")
        if rest and Path(file).suffix.lower() not in _COMPANIONS:
            by_class[class_name].append(file)
        else:
            companions.append(file)
    empty = [name for name, files in by_class.items() if not files]
    return {name: sorted(files) for name, files in by_class.items() if files}, empty, companions


def _group_of(video_id: str, group_regex: str) -> str:
    if not group_regex:
        return video_id
    name = video_id.rpartition("/")[2]
    match = re.search(group_regex, name)
    if match is None:
        raise ValueError(
            f"data.group_regex {group_regex!r} finds no group in the name {name!r} ({video_id}); "
            "every name must have one"
        )
    return (match[1] if match.re.groups else match[0]) or ""


def _walk(root: Path) -> Iterator[tuple[str, os.DirEntry]]:
    """Every visible file below `root` as ('a/b.avi', entry), links followed, sorted by folder.

    Raises:
      ValueError: a link that leads out of `root`, or a name that is not text.
    """
    real_root = root.resolve()
    seen = {real_root}
    waiting = [(root, "")]
    while waiting:
        place, prefix = waiting.pop()
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{place}: the name {entry.name!r} is not UTF-8; rename the file"
                ) from None
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                if not target.is_relative_to(real_root):
                    raise ValueError(
                        f"{entry.path} is a link out of {root}, to {target}: links must stay "
                        "inside; copy what it links to, or remove it"
                    )
            if entry.is_dir():
                real = Path(entry.path).resolve()
                if real not in seen:  # a loop, or a second way to the same folder
                    seen.add(real)
                    waiting.append((Path(entry.path), f"{name}/"))
            else:
                yield name, entry


# --- the generated demo set ------------------------------------------------------------------


def demo_set(root: Path, *, seed: int) -> VideoIndex:
    """Indexes the demo videos; generates them first if they are not there.

    Raises:
      ValueError: `root` holds something else.
    """
    demo.generate(root, seed=seed)
    entries = [
        ClipEntry(
            clip.video_id,
            demo.CLASS_NAMES.index(clip.class_name),
            f"g{clip.group:02}",
            "test" if clip.group <= demo.TEST_GROUPS else "train",
        )
        for clip in demo.clips()
    ]
    protocol = f"group-held-out: groups 1 to {demo.TEST_GROUPS} unseen in training"
    notes = [f"generated videos (seed {seed}): figures say nothing about real ones"]
    return _index("demo", root, demo.CLASS_NAMES, entries, protocol, notes=notes)


# --- what all share --------------------------------------------------------------------------


def _index(
    name: str,
    root: Path,
    class_names: Sequence[str],
    entries: Iterable[ClipEntry],
    protocol: str,
    *,
    notes: Iterable[str],
    groups_known: bool = True,
) -> VideoIndex:
    """Puts an index together, measures its overlap and says what its classes lack."""
    ordered = tuple(sorted(entries, key=lambda entry: entry.video_id))
    overlap = _overlap(ordered) if groups_known else None
    return VideoIndex(
        name=name,
        root=root,
        class_names=tuple(class_names),
        entries=ordered,
        protocol=protocol,
        leaky=overlap is None or overlap > 0,
        overlap=overlap,
        notes=(*notes, *_class_notes(class_names, ordered)),
        missing=0,
    )


def _overlap(entries: Sequence[ClipEntry]) -> float:
    """Share of the test clips whose group also stands in training or validation."""
    trained = {entry.group for entry in entries if entry.subset != "test"}
    tested = [entry for entry in entries if entry.subset == "test"]
    return sum(entry.group in trained for entry in tested) / max(1, len(tested))


def _class_notes(class_names: Sequence[str], entries: Sequence[ClipEntry]) -> Iterator[str]:
    counts = Counter((entry.label, entry.subset) for entry in entries)
    for label, name in enumerate(class_names):
        trained, tested = counts[label, "train"], counts[label, "test"]
        if not trained:
            yield f"class {name} has no training video"
        if not tested:
            yield f"class {name} has no test video: mean class accuracy is over the others"
        if trained + tested == 1:
            yield f"class {name} has one video only"


def hold_out_validation(index: VideoIndex, *, fraction: float, seed: int) -> VideoIndex:
    """Sets whole training groups aside for the stop rule; the test set is not touched."""
    entries = [entry for entry in index.entries if entry.subset == "train"]
    held = _held_out_groups(entries, fraction, random.Random(f"validation {seed}"))
    moved = [
        dataclasses.replace(entry, subset="validation")
        if entry.subset == "train" and entry.group in held
        else entry
        for entry in index.entries
    ]
    return dataclasses.replace(index, entries=tuple(moved))


def _held_out_groups(
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


def check_duplicates(index: VideoIndex, digests: Mapping[str, str]) -> list[str]:
    """Looks for files with the same bytes.

    Args:
      index: the videos.
      digests: digest of each usable file, by video id.

    Returns:
      A note for each set of identical files that does no harm to the test.

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
        names = _some([entry.video_id for entry in copies])
        subsets = {entry.subset for entry in copies}
        if "test" in subsets and len(subsets) > 1:
            raise ValueError(
                f"{index.root}: the same video stands in training and in test: {names}. A test on "
                "it would prove nothing; remove all but one."
            )
        labels = {index.class_names[entry.label] for entry in copies}
        other = f", as {' and '.join(sorted(labels))}" if len(labels) > 1 else ""
        notes.append(f"the same video under {len(copies)} names{other}: {names}")
    return notes


def _require_folder(path: Path, what: str) -> None:
    if path.is_dir():
        return
    near = path.parent
    got = _some(sorted(p.name for p in near.iterdir())) if near.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"{path} is not there; expected {what}. {near} holds: {got}. Set --config.data.root."
    )


def _some(names: Sequence[str], count: int = 5) -> str:
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown or "nothing"
