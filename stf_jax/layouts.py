"""The layouts of data sets on disk: which file is which class and comes from which source.

Nothing here opens a video. What a layout says does not depend on whether its files can be decoded:
a file that cannot is marked later and never changes which other files are trained or tested on.
"""

import csv
import functools
import hashlib
import importlib.resources
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stf_jax.index import PICTURES, SUBSETS, ClipEntry, natural, some
from stf_jax.protocols import Layout

# Files that stand beside videos without being any; everything else in a class folder is taken for
# a video, whatever its name, and judged by its content.
_COMPANIONS = PICTURES | frozenset(
    ".txt .md .csv .tsv .json .jsonl .xml .xgtf .yaml .yml .srt .vtt .html .log .py .npy .npz .pkl"
    " .h5 .gif .bmp .webp .tif .tiff .pdf .zip .tar .gz .rar .7z .ini .db .part .tmp".split()
)

# --- UCF101 ----------------------------------------------------------------------------------

_UCF101_NAME = re.compile(r"v_(\w+)_g(\d\d)_c(\d\d)\.avi")
_UCF101_LISTS = "ucfTrainTestlist"
# The groups that each official split tests on.
_UCF101_TESTED = {1: range(1, 8), 2: range(8, 15), 3: range(15, 22)}
# Of the files in UCF101TrainTestSplits-RecognitionTask.zip.
UCF101_SHA256 = {
    "classInd.txt": "d7abbb76074d04e80c62ad8a61529bb8eec32ef978569601b2890edec3af0359",
    "trainlist01.txt": "f7a4d7abc05147b921c17fc227d731197c3583f29945d1f1d46bce830d1b9f12",
    "trainlist02.txt": "3ea7145317098bdb4a999f69fb3b53ca3d3831d692602fc5dc8cd5c5e3eb8ca9",
    "trainlist03.txt": "c75af0148b3b0e70d5d881ad71b0a5fbb685bf2d3278908278658435c3f1bf0f",
    "testlist01.txt": "81be4765084d72739dca4d11658f7ec369c441ad9e227f11d9468fe2a1c14890",
    "testlist02.txt": "c9eec18f3f312153cda441f93e30bc9cffef1941367ebc06996e40c9cd056c91",
    "testlist03.txt": "f9cc029b0598c63f5cc07d070ae1fa4666d1d3901cc79a93490ea0742ca097db",
}


@functools.cache
def ucf101_lists() -> Mapping[str, bytes]:
    """The official lists of UCF101, byte for byte, from a table of clips per class and group.

    Raises:
      RuntimeError: the table that comes with the package is damaged.
    """
    table = importlib.resources.files("stf_jax").joinpath("lists/ucf101.csv")
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    lists = {"classInd.txt": [f"{n} {row['class']}" for n, row in enumerate(rows, 1)]}
    for split, tested in _UCF101_TESTED.items():
        train, test = [], []
        for label, row in enumerate(rows, 1):
            for group, count in enumerate(map(int, row["clips_per_group"]), 1):
                for clip in range(1, count + 1):
                    name = f"{row['class']}/v_{row['name']}_g{group:02}_c{clip:02}.avi"
                    test.append(name) if group in tested else train.append(f"{name} {label}")
        lists |= {f"trainlist{split:02}.txt": train, f"testlist{split:02}.txt": test}
    encoded = {name: "".join(f"{row}\r\n" for row in rows).encode() for name, rows in lists.items()}
    for name, data in encoded.items():
        if hashlib.sha256(data).hexdigest() != UCF101_SHA256[name]:
            raise RuntimeError(f"{table} gives another {name} than the official one: install again")
    return encoded


def ucf101(root: Path, *, split: int) -> Layout:
    """Finds UCF101, or any part of it, and splits it by its official lists.

    Its clips may lie in class folders under `UCF-101/` or under the root, as UCF101.rar holds
    them, or all in one folder, as UCF101_videos.zip does. A folder `ucfTrainTestlist/` under the
    root is read instead of the lists that come with the package; what differs is said.

    Args:
      root: where to look.
      split: 1 to 3.

    Returns:
      The listed clips that are there, of the classes that have any; labels keep the official order.

    Raises:
      FileNotFoundError: there are no videos, or a list is missing.
      ValueError: a list contradicts itself or another (names file and row), or a clip lies in two
        places or in the folder of another class.
    """
    require_folder(root, "the folder of UCF101's class folders (unpacked UCF101.rar)")
    if split not in _UCF101_TESTED:
        raise ValueError(f"data.split: got {split!r}, one of 1, 2, 3")
    names = ("classInd.txt", f"trainlist{split:02}.txt", f"testlist{split:02}.txt")
    texts, where, differing = _ucf101_texts(root, names)
    classes = _ucf101_classes(where / names[0], texts[names[0]])
    train, test = (_ucf101_list(where / name, texts[name], classes) for name in names[1:])
    _check_ucf101_lists(train, test, where, split)
    found, extra = _ucf101_files(root, {_ucf101_key(c): c for c in (*train, *test)}, classes)
    listed = len(train) + len(test)
    if not found:
        raise FileNotFoundError(
            f"{root} holds none of the {listed} clips of UCF101; expected files such as "
            f"UCF-101/{train[0]}, got {some(extra)}. Set --config.data.root."
        )
    present, tested = {clip.split("/")[0] for clip in found}, set(test)
    class_names = tuple(name for name in classes if name in present)
    notes = []
    if differing:
        notes.append(f"{root / _UCF101_LISTS}: {', '.join(differing)} differ from the official")
    if len(found) < listed:
        lacking = sum(c.split("/")[0] in present for c in (*train, *test)) - len(found)
        shown = some(class_names, 10)
        notes.append(
            f"partial copy: {len(class_names)} of {len(classes)} classes ({shown}) and "
            f"{len(found)} of {listed} listed clips; {listed - len(found)} of the list are "
            f"missing, {lacking} of them of these classes"
        )
    if extra:
        notes.append(f"{len(extra)} files are on no list and not used: {some(extra)}")
    told = f"split {split} of other lists" if differing else f"official split {split}"
    return Layout(
        name="ucf101",
        root=root,
        class_names=class_names,
        clips=tuple(
            ClipEntry(path, class_names.index(clip.split("/")[0]), _ucf101_group(clip), "")
            for clip, path in found.items()
        ),
        numbered=True,
        official={path: "test" if clip in tested else "train" for clip, path in found.items()},
        official_name=told + (", clips present" if len(found) < listed else ""),
        notes=tuple(notes),
        missing=listed - len(found),
    )


def _ucf101_texts(root: Path, names: Sequence[str]) -> tuple[dict[str, list[str]], Path, list[str]]:
    """The rows of the lists, where they come from, and which are not the official ones."""
    official = ucf101_lists()
    folder = root / _UCF101_LISTS
    if not folder.is_dir():
        where = Path("stf_jax", "lists")
        return {name: official[name].decode().splitlines() for name in names}, where, []
    texts = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; complete the lists, or remove {folder} to use the "
                "official ones that come with this program"
            )
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / name} is no text: {error}") from None
    # Line ends and a blank last line do not count.
    differing = [
        name
        for name, rows in texts.items()
        if [row.strip() for row in rows if row.strip()] != official[name].decode().splitlines()
    ]
    return texts, folder, differing


def _ucf101_classes(path: Path, rows: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for row, line in _numbered(rows):
        number, _, name = line.partition(" ")
        if number != str(len(names) + 1) or not name or name in names:
            raise ValueError(
                f"{path}, row {row}: expected '{len(names) + 1} <new class name>', got {line!r}"
            )
        names.append(name)
    return tuple(names)


def _ucf101_list(path: Path, rows: Sequence[str], classes: Sequence[str]) -> list[str]:
    clips: dict[str, None] = {}
    for row, line in _numbered(rows):
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
    if not clips:
        raise ValueError(f"{path} names no clip")
    return list(clips)


def _numbered(rows: Sequence[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(rows, 1):
        if line.strip():
            yield number, line.strip()


def _check_ucf101_lists(train: Sequence[str], test: Sequence[str], where: Path, split: int) -> None:
    groups = [{_ucf101_group(clip) for clip in clips} for clips in (train, test)]
    shared = sorted(groups[0] & groups[1])
    if shared:
        raise ValueError(
            f"{where}: train and test list of split {split} share the groups {some(shared)}; the "
            f"official lists share none: remove {where} to use those that come with this program"
        )


def _ucf101_files(
    root: Path, listed: Mapping[str, str], classes: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The path of every listed clip that is there, in the order of the lists; and other videos."""
    found: dict[str, str] = {}
    extra = []
    for path, _ in walk(root):
        folder, _, file = path.rpartition("/")
        class_name = folder.rpartition("/")[2]
        clip = listed.get(_ucf101_key(file))
        if clip is None:
            if Path(file).suffix.lower() not in _COMPANIONS:
                extra.append(path)
        elif class_name in classes and class_name != clip.split("/")[0]:
            raise ValueError(f"{root / path} lies in the folder of another class; move it")
        else:
            _add_once(found, clip, path, root)
    return {clip: found[clip] for clip in listed.values() if clip in found}, sorted(extra)


def _add_once(found: dict[str, str], clip: str, path: str, root: Path) -> None:
    if clip in found:
        raise ValueError(
            f"{root} holds the clip {Path(clip).name} twice: {found[clip]} and {path}; remove one"
        )
    found[clip] = path


def _ucf101_key(clip: str) -> str:
    # The lists write v_HandStandPushups_..., UCF101_videos.zip v_HandstandPushups_...
    return clip.rpartition("/")[2].lower()


def _ucf101_group(clip: str) -> str:
    # Group 8 of one class and group 8 of another come from different videos.
    class_name, _, file = clip.partition("/")
    match = _UCF101_NAME.fullmatch(file)
    assert match is not None  # _ucf101_list has checked
    return f"{class_name}/g{match[2]}"


# --- UCF11 -----------------------------------------------------------------------------------

# Folder of each class, the word in its files' names, and its clips.
UCF11_CLASSES = {
    "basketball": ("shooting", 141),
    "biking": ("biking", 145),
    "diving": ("diving", 156),
    "golf_swing": ("golf", 142),
    "horse_riding": ("riding", 198),
    "soccer_juggling": ("juggle", 156),
    "swing": ("swing", 137),
    "tennis_swing": ("tennis", 167),
    "trampoline_jumping": ("jumping", 119),
    "volleyball_spiking": ("spiking", 116),
    "walking": ("walk_dog", 123),
}
_UCF11_NAME = re.compile(r"(v_([a-z_]+)_(\d\d)_\d\d)\.(?:mpg|mpeg|avi)", re.IGNORECASE)


def ucf11(root: Path) -> Layout:
    """Finds UCF11 (UCF YouTube Action), or any part of it, by the names of its clips.

    They lie in `<class>/v_<word>_NN/v_<word>_NN_CC.mpg` (UCF11_updated_mpg.rar; .avi in
    YouTube_DataSet_Annotated.zip, under action_youtube_naudio/), beside folders 'Annotation', or
    all in one folder with their annotations. NN is the group.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a clip lies in two places or in the folder of another class.
    """
    require_folder(root, "the folder that UCF11_updated_mpg.rar was unpacked into")
    folders = {word: name for name, (word, _) in UCF11_CLASSES.items()}
    found: dict[str, str] = {}
    extra = []
    for path, _ in walk(root):
        match = _UCF11_NAME.fullmatch(path.rpartition("/")[2])
        if match and match[2].lower() in folders:
            above = [part for part in path.split("/")[:-1] if part in UCF11_CLASSES]
            if above and above[-1] != folders[match[2].lower()]:
                raise ValueError(f"{root / path} lies in the folder of another class; move it")
            _add_once(found, match[1].lower(), path, root)
        elif Path(path).suffix.lower() not in _COMPANIONS:
            extra.append(path)
    if not found:
        raise FileNotFoundError(
            f"{root} holds no clip of UCF11; expected files such as "
            f"basketball/v_shooting_01/v_shooting_01_01.mpg, got {some(sorted(extra))}. "
            "Set --config.data.root."
        )
    parsed = {clip: clip[2:].rsplit("_", 2)[:2] for clip in found}
    words = {word for word, _ in parsed.values()}
    class_names = tuple(name for name, (word, _) in UCF11_CLASSES.items() if word in words)
    clips = []
    for clip, path in found.items():
        name, group = folders[parsed[clip][0]], parsed[clip][1]
        clips.append(ClipEntry(path, class_names.index(name), f"{name}/g{group}", ""))
    counts = Counter(folders[word] for word, _ in parsed.values())
    notes = _counted(counts, {name: count for name, (_, count) in UCF11_CLASSES.items()})
    if extra:
        notes.append(f"{len(extra)} files are no clips of UCF11, not used: {some(sorted(extra))}")
    missing = max(0, sum(count for _, count in UCF11_CLASSES.values()) - len(clips))
    return Layout(
        "ucf11", root, class_names, tuple(clips), numbered=True, notes=tuple(notes), missing=missing
    )


def _counted(got: Counter[str], expected: Mapping[str, int]) -> list[str]:
    """What a copy lacks of its classes, or has too much."""
    odd = [f"{k} {got[k]} of {n}" for k, n in expected.items() if got[k] != n]
    total = sum(expected.values())
    return [f"{sum(got.values())} of {total} clips: {some(odd, 13)}"] if odd else []


# --- UCF Sports ------------------------------------------------------------------------------

# The class of each folder and how many clips it has, in the order of the published split.
UCF_SPORTS_FOLDERS = {
    "Diving-Side": ("Diving", 14),
    "Golf-Swing-Back": ("Golf-Swing", 5),
    "Golf-Swing-Front": ("Golf-Swing", 8),
    "Golf-Swing-Side": ("Golf-Swing", 5),
    "Kicking-Front": ("Kicking", 10),
    "Kicking-Side": ("Kicking", 10),
    "Lifting": ("Lifting", 6),
    "Riding-Horse": ("Riding-Horse", 12),
    "Run-Side": ("Run", 13),
    "SkateBoarding-Front": ("SkateBoarding", 12),
    "Swing-Bench": ("Swing-Bench", 20),
    "Swing-SideAngle": ("Swing-Side", 13),
    "Walk-Front": ("Walk", 22),
}


def ucf_sports(root: Path, *, group_regex: str) -> Layout:
    """Finds UCF Sports, or any part of it, and splits it as is usual (SPEC 10.6).

    ucf_sports_actions.zip holds `ucf_sports_actions/ucf action/<folder>/<NNN>/` with a video or
    pictures of its frames (there or in 'jpeg'), and annotations in 'gt'. A clip is its video if
    there is one, else the folder of its pictures. Copies with videos right in the 13 folders, or
    without the outer ones, are read too. The first third of each class is the test.

    Args:
      root: where to look.
      group_regex: see `folder`; '' means that groups are not known, and no list of them exists.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a clip's folder holds several videos, or a name has no group.
    """
    require_folder(root, "the folder that ucf_sports_actions.zip was unpacked into")
    by_folder = _sports_clips(root)
    if not any(by_folder.values()):
        raise FileNotFoundError(
            f"{root} holds no clip of UCF Sports; expected folders such as "
            f"'ucf_sports_actions/ucf action/Diving-Side/001'. Set --config.data.root."
        )
    names = tuple(dict.fromkeys(n for f, (n, _) in UCF_SPORTS_FOLDERS.items() if by_folder[f]))
    totals: Counter[str] = Counter()
    for name, count in UCF_SPORTS_FOLDERS.values():
        totals[name] += count
    before: Counter[str] = Counter()
    clips, official = [], {}
    for folder_name, (name, count) in UCF_SPORTS_FOLDERS.items():
        for number, video_id in by_folder[folder_name]:
            clips.append(
                ClipEntry(video_id, names.index(name), group_of(video_id, group_regex), "")
            )
            tested = before[name] + number <= totals[name] // 3
            official[video_id] = "test" if tested else "train"
        before[name] += count
    notes = _counted(
        Counter({name: len(found) for name, found in by_folder.items()}),
        {name: count for name, (_, count) in UCF_SPORTS_FOLDERS.items()},
    )
    return Layout(
        name="ucf_sports",
        root=root,
        class_names=names,
        clips=tuple(clips),
        groups_known=bool(group_regex),
        official=official,
        official_name="first third of each class (103/47)" + (", clips present" if notes else ""),
        notes=tuple(notes),
        missing=max(0, 150 - len(clips)),
    )


def _sports_clips(root: Path) -> dict[str, list[tuple[int, str]]]:
    """Number and video id of every clip, by folder."""
    inside: dict[str, dict[str, list[str]]] = {
        name: defaultdict(list) for name in UCF_SPORTS_FOLDERS
    }
    for path, _ in walk(root):
        parts = path.split("/")
        depth = next((i for i, part in enumerate(parts) if part in inside), None)
        if depth is not None and len(parts) > depth + 1:
            inside[parts[depth]]["/".join(parts[: depth + 2])].append(path)
    found: dict[str, list[tuple[int, str]]] = {}
    for name, places in inside.items():
        clips = [
            (place, clip)
            for place in sorted(places, key=natural)
            if (clip := _sports_clip(place, places[place], root))
        ]
        # A copy may lack some; the published split goes by the numbers of the complete set.
        digits = [re.match(r"\d+", place.rpartition("/")[2]) for place, _ in clips]
        numbers = [int(match[0]) if match else 0 for match in digits]
        if len(set(numbers)) < len(numbers) or not all(0 < n <= 99 for n in numbers):
            numbers = list(range(1, len(clips) + 1))
        found[name] = [(n, clip) for n, (_, clip) in zip(numbers, clips, strict=True)]
    return found


def _sports_clip(place: str, files: Sequence[str], root: Path) -> str:
    """The video of a clip, or the folder of its pictures; '' if there is neither."""
    videos = [file for file in files if Path(file).suffix.lower() not in _COMPANIONS]
    if files == [place]:
        return place if videos else ""
    videos = [file for file in videos if "/gt/" not in file]
    if len(videos) > 1:
        raise ValueError(f"{root / place} holds {len(videos)} videos, expected one: {some(videos)}")
    if videos:
        return videos[0]
    pictures = {f.rpartition("/")[0] for f in files if Path(f).suffix.lower() in PICTURES}
    return next((p for p in (place, f"{place}/jpeg") if p in pictures), "")


# --- a folder per class ----------------------------------------------------------------------


def folder(root: Path, *, group_regex: str) -> Layout:
    """Reads a tree with one folder per class and videos of any format at any depth below it.

    A folder below a class folder that holds pictures and no video is a video too.

    Args:
      root: holds the class folders.
      group_regex: searched in each clip's name; its first parenthesis (or the whole match) names
        the source that the clip was cut from. '' means that groups are not known.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: fewer than two classes with files, or a name without a group.
    """
    require_folder(root, "a folder with one sub-folder of videos per class")
    by_class, empty, companions = _class_files(root)
    names = tuple(sorted(by_class))
    if len(names) < 2:
        raise ValueError(
            f"{root}: expected at least two class folders with videos, got {some(names)}"
        )
    notes = [f"class folder {name}/ holds no video and is left out" for name in empty]
    if companions:
        notes.append(
            f"{len(companions)} files are no videos by their names and not used: {some(companions)}"
        )
    clips = [
        ClipEntry(video_id, label, group_of(video_id, group_regex), "")
        for label, name in enumerate(names)
        for video_id in by_class[name]
    ]
    return Layout(
        "folder", root, names, tuple(clips), groups_known=bool(group_regex), notes=tuple(notes)
    )


def _class_files(root: Path) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Video ids by class folder, class folders without any, and the files that are no videos."""
    by_class: dict[str, list[str]] = {
        path.name: []
        for path in sorted(root.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    pictures: dict[str, list[str]] = defaultdict(list)
    with_video, companions = set(), []
    for file, _ in walk(root):
        place, _, name = file.rpartition("/")
        suffix = Path(name).suffix.lower()
        if place and suffix not in _COMPANIONS:
            by_class[file.partition("/")[0]].append(file)
            with_video.add(place)
        elif "/" in place and suffix in PICTURES:
            pictures[place].append(file)
        else:
            companions.append(file)
    for place, files in pictures.items():
        if place in with_video:
            companions += files
        else:
            by_class[place.partition("/")[0]].append(place)
    empty = [name for name, files in by_class.items() if not files]
    found = {name: sorted(files) for name, files in by_class.items() if files}
    return found, empty, sorted(companions)


def group_of(video_id: str, group_regex: str) -> str:
    """What `data.group_regex` finds in a video's name; with '' every video is its own source.

    Raises:
      ValueError: it finds nothing.
    """
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


# --- a list ----------------------------------------------------------------------------------


def listed(root: Path, table: Path, *, group_regex: str) -> Layout:
    """Reads a CSV list with the columns path, label and, if wanted, group and subset.

    Args:
      root: what the paths are relative to.
      table: the list. Labels are names, or numbers from 0 without a gap.
      group_regex: as in `folder`, if there is no column 'group'.

    Raises:
      FileNotFoundError: there is no such list or root.
      ValueError: a row that cannot be (names file and row).
    """
    require_folder(root, "the folder that the paths of data.list start from")
    if not table.is_file():
        raise FileNotFoundError(f"data.list: {table} is not there; expected a CSV list of videos")
    rows = _csv_rows(table)
    names = _class_names(table, rows)
    real_root, seen = root.resolve(), dict[str, int]()
    clips, official = [], {}
    for number, row in rows:
        where = f"{table}, row {number}"
        video_id = _listed_path(root, real_root, row["path"], where)
        if video_id in seen:
            raise ValueError(f"{where}: {video_id} stands in row {seen[video_id]} already")
        seen[video_id] = number
        if row.get("group") == "":
            raise ValueError(f"{where}: the group is empty; name one, or drop the column")
        group = row["group"] if "group" in row else group_of(video_id, group_regex)
        clips.append(ClipEntry(video_id, names.index(row["label"]), group, ""))
        if "subset" in row:
            if row["subset"] not in SUBSETS:
                raise ValueError(f"{where}: subset {row['subset']!r} is none of {SUBSETS}")
            official[video_id] = row["subset"]
    return Layout(
        name="folder",
        root=root,
        class_names=names,
        clips=tuple(clips),
        groups_known=bool(group_regex) or "group" in rows[0][1],
        official=official or None,
        official_name=f"the subsets of {table.name}",
    )


def _csv_rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows with the number of the line that each ends on."""
    rows = []
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if not {"path", "label"} <= set(header) <= {"path", "label", "group", "subset"}:
                raise ValueError(
                    f"{table}, row 1: expected the columns path, label and, if wanted, group and "
                    f"subset, got {','.join(header)!r}"
                )
            for values in reader:
                if values and len(values) != len(header):
                    raise ValueError(
                        f"{table}, row {reader.line_num}: expected {len(header)} values, got "
                        f"{len(values)}: {values}"
                    )
                if values:
                    rows.append((reader.line_num, dict(zip(header, values, strict=True))))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}, row {len(rows) + 2}: not UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise ValueError(f"{table}, row {reader.line_num}: bad CSV: {error}") from None
    if not rows:
        raise ValueError(f"{table} lists no video")
    return rows


def _class_names(table: Path, rows: Sequence[tuple[int, dict[str, str]]]) -> tuple[str, ...]:
    first: dict[str, int] = {}
    for number, row in rows:
        if not row["label"].strip():
            raise ValueError(f"{table}, row {number}: the label is empty")
        first.setdefault(row["label"], number)
    if len(first) < 2:
        raise ValueError(f"{table}: expected at least two classes, got {some(list(first))}")
    numbers = [label for label in first if re.fullmatch(r"\d+", label, re.ASCII)]
    if not numbers:
        return tuple(sorted(first))
    words = [label for label in first if label not in numbers]
    if words:
        raise ValueError(
            f"{table}, row {first[words[0]]}: the label {words[0]!r} is a name, but row "
            f"{first[numbers[0]]} has the number {numbers[0]}; use one kind"
        )
    ordered = sorted(numbers, key=int)
    for expected, label in enumerate(ordered):
        if label != str(expected):
            raise ValueError(
                f"{table}, row {first[label]}: label {label}, but no video has label {expected}: "
                f"numbers must go from 0 to {len(ordered) - 1} for {len(ordered)} classes"
            )
    return tuple(ordered)


def _listed_path(root: Path, real_root: Path, path: str, where: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{where}: {path!r} is no path below {root}")
    if not (root / path).exists():
        raise ValueError(f"{where}: {root / path} is not there")
    if not (root / path).resolve().is_relative_to(real_root):
        raise ValueError(f"{where}: {path} leads out of {root}; copy what it links to")
    return Path(path).as_posix()


# --- what all share --------------------------------------------------------------------------


def walk(root: Path) -> Iterator[tuple[str, os.DirEntry]]:
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


def videos_below(root: Path) -> list[Path]:
    """Every video below a folder, in the natural order of their paths.

    Files are taken for videos whatever their name, but for those that stand beside videos without
    being any; a folder of pictures without a video is one, `root` itself perhaps.

    Raises:
      ValueError: a link that leads out of `root`, or a name that is not text.
    """
    files, pictures = [], set()
    for file, _ in walk(root):
        suffix = Path(file).suffix.lower()
        if suffix not in _COMPANIONS:
            files.append(file)
        elif suffix in PICTURES:
            pictures.add(file.rpartition("/")[0])
    pictures -= {file.rpartition("/")[0] for file in files}
    return [root / file for file in sorted([*files, *pictures], key=natural)]


def require_folder(path: Path, what: str) -> None:
    """Checks that a folder is there.

    Raises:
      FileNotFoundError: it is not (says what was expected and what is there).
    """
    if path.is_dir():
        return
    near = path.parent
    got = some(sorted(p.name for p in near.iterdir())) if near.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"{path} is not there; expected {what}. {near} holds: {got}. Set --config.data.root."
    )
