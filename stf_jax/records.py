"""Prepared record sets: the shards of a tfds data set over the encoded videos, and their upkeep.

A record set holds every usable video of a data set once, whatever its label or subset: which
video is trained on and which is tested is the index's business, so all protocols and splits share
one set. Two settings that store other bytes never share a folder. Which videos make a shard is
known beforehand, so a shard is also the unit that is finished, checked and repaired:

    manifest.csv                  what became of every video; it is there when the set is finished
    settings.json                 how the videos were stored
    shards/00003.json             a shard's digest and its videos' rows, under their own digest
    video_records/<version>/      the shards, in the format of tfds
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stf_jax import prepare, progress, startup
from stf_jax.index import VideoIndex, check_duplicates
from stf_jax.prepare import ManifestRow, RecordSettings

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    from stf_jax import shards as writing
else:
    tf = startup.Later("tensorflow", also="stf_jax.shards")
    tfds = startup.Later("tensorflow_datasets", also="stf_jax.shards")
    array_record_module = startup.Later("array_record.python.array_record_module")
    writing = startup.Later("stf_jax.shards")

_NAME = "video_records"
# A shard ends with the video that reaches either. As records, UCF101's take about 16 times the
# space of its files at 256x256: 250 MB.
_SHARD_VIDEOS, _SHARD_SOURCE_BYTES = 32, 16 << 20
# The file of each video id of one shard, in the order of its records.
Shard = Mapping[str, Path]


@dataclasses.dataclass(frozen=True)
class Records:
    """A prepared record set, open for reading.

    Args:
      folder: where it lies.
      settings: how it was stored.
      rows: the manifest, by video id, invalid videos included.
      digest: sha256 of the manifest: names the data a run was trained on.
    """

    folder: Path
    settings: RecordSettings
    rows: Mapping[str, ManifestRow]
    digest: str
    _builder: tfds.core.DatasetBuilder = dataclasses.field(repr=False)
    _source: Any = dataclasses.field(repr=False)

    def read(self, position: int) -> bytes:
        """The serialised example at a position (`ManifestRow.record`); safe from many threads."""
        return self._source.data_source[position]

    def parse(self, serialised: tf.Tensor) -> dict[str, tf.Tensor]:
        """A scalar string tensor -> `video_id` [], `frames` [t], `flow` [t-1], `times` [t]."""
        return self._builder.info.features.deserialize_example(serialised)


def prepare_records(
    index: VideoIndex, settings: RecordSettings, beam_options: Sequence[str] | None = None
) -> Records:
    """Returns the record set of an index; makes it, or what is missing of it, first.

    Safe to kill and to call again at any moment: finished videos are not done twice.

    Args:
      index: the videos.
      settings: how to store them.
      beam_options: Apache Beam's command line, such as ['--runner=FlinkRunner', ...], to make the
        set on its engine instead of this machine's processes; all its machines must see the videos
        and `settings.root` under the same paths.

    Raises:
      ValueError: no video is usable, or the same file stands in two subsets.
      RuntimeError: another process is preparing the same set, or a finished set is damaged.
      OSError: the folder cannot be written, or the disk would not hold the set.
    """
    folder = record_folder(index, settings)
    with prepare.locked(folder):
        if not (folder / "manifest.csv").exists():
            _build(index, settings, folder, beam_options)
    records = open_records(folder, settings)
    digests = {row.video_id: row.sha256 for row in records.rows.values() if row.usable}
    for note in check_duplicates(index, digests):
        progress.say(note)
    return records


def open_records(folder: Path, settings: RecordSettings) -> Records:
    """Opens a finished record set.

    Raises:
      FileNotFoundError: there is no finished set in `folder`.
      RuntimeError: a shard is missing or has another size than it should.
    """
    manifest = folder / "manifest.csv"
    if not manifest.exists():
        raise FileNotFoundError(
            f"{folder} holds no finished record set (no manifest.csv). Run the training command, "
            "which prepares it, or point --config.records.root at the folder that holds it."
        )
    for note in sorted((folder / "shards").glob("*.json")):
        if (shard := ShardNote.read(note)) is None or shard.fault(folder, whole=False):
            raise RuntimeError(
                f"{folder}: shard {note.stem} of the record set is damaged. Run "
                "`python experiments/prepare.py --config=<card> --verify`, which finds and mends "
                "what is."
            )
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    rows = prepare.read_manifest(manifest)
    builder = tfds.builder_from_directory(_data_folder(folder))
    return Records(folder, settings, rows, digest, builder, builder.as_data_source(writing.SPLIT))


def record_folder(index: VideoIndex, settings: RecordSettings) -> Path:
    """Where the set of an index and settings lies, finished or not."""
    return Path(settings.root) / f"{index.name}-{_key(index, settings)}"


def _key(index: VideoIndex, settings: RecordSettings) -> str:
    """Names the settings and the files (by size: reading them all would cost every start)."""
    files = [(entry.video_id, prepare.source_size(index.path(entry))) for entry in index.entries]
    text = json.dumps([settings.stamp(), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _data_folder(folder: Path) -> Path:
    return folder / _NAME / f"{prepare.FORMAT}.0.0"


# --- shards ----------------------------------------------------------------------------------


def plan_shards(videos: Mapping[str, Path]) -> list[dict[str, Path]]:
    """Cuts the videos, in their order, into shards of like size.

    Only the sizes of the files count, which are in the key of the set too: whoever makes the set,
    whenever and wherever, makes the same shards.
    """
    shards: list[dict[str, Path]] = [{}]
    filled = 0
    for video_id, path in videos.items():
        if len(shards[-1]) == _SHARD_VIDEOS or filled >= _SHARD_SOURCE_BYTES:
            shards.append({})
            filled = 0
        shards[-1][video_id] = path
        filled += max(0, prepare.source_size(path))
    return shards


def _number(shard: int) -> str:
    return f"{shard:05}"


def _template(folder: Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=_data_folder(folder),
        dataset_name=_NAME,
        split=writing.SPLIT,
        filetype_suffix="array_record",
    )


def _shard_path(folder: Path, number: int, count: int) -> Path:
    return Path(_template(folder).sharded_filepath(shard_index=number, num_shards=count))


@dataclasses.dataclass(frozen=True)
class ShardNote:
    """What is known of a finished shard; written after it, so its presence says that it is whole.

    Args:
      file: its name.
      bytes: its size.
      sha256: of its bytes.
      rows: of all its videos, in order, without positions.
    """

    file: str
    bytes: int
    sha256: str
    rows: tuple[ManifestRow, ...]

    @classmethod
    def of(cls, path: Path, rows: Sequence[ManifestRow]) -> ShardNote:
        """Describes a shard that has just been written."""
        digest, size = prepare.file_digest(path)
        return cls(path.name, size, digest, tuple(rows))

    @classmethod
    def read(cls, path: Path) -> ShardNote | None:
        """Reads a note; None if it is absent or damaged."""
        try:
            digest, _, body = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        if digest.decode(errors="replace") != hashlib.sha256(body).hexdigest():
            return None
        fields = json.loads(body)
        rows = tuple(ManifestRow(**row) for row in fields.pop("rows"))
        return cls(**fields, rows=rows)

    def write(self, path: Path) -> None:
        """Writes the note under its own digest."""
        body = json.dumps(dataclasses.asdict(self), indent=1).encode()
        prepare.write_aside(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    def fault(self, folder: Path, *, whole: bool) -> str:
        """What is wrong with the shard's file, or ''; reads all of it only if `whole`."""
        path = _data_folder(folder) / self.file
        if not path.exists():
            return f"{self.file} is missing"
        if (size := path.stat().st_size) != self.bytes:
            return f"{self.file} has {size} bytes, it was written with {self.bytes}"
        if whole and prepare.file_digest(path)[0] != self.sha256:
            return f"{self.file} is not what was written: its sha256 differs"
        return ""


def _videos(index: VideoIndex) -> dict[str, Path]:
    return {entry.video_id: index.path(entry) for entry in index.entries}


def _build(
    index: VideoIndex,
    settings: RecordSettings,
    folder: Path,
    beam_options: Sequence[str] | None = None,
) -> None:
    """Makes every shard that has no note yet, then the manifest."""
    stamp = json.dumps(settings.stamp(), indent=2) + "\n"
    prepare.write_aside(folder / "settings.json", stamp.encode())
    shards = plan_shards(_videos(index))
    notes = folder / "shards"
    notes.mkdir(exist_ok=True)
    for place in (folder, notes, folder / "staged"):
        prepare.sweep(place)
    if beam_options is None:
        _make_shards(shards, settings, folder)
    else:
        _make_shards_on_beam(shards, settings, folder, beam_options)
    made = [ShardNote.read(notes / f"{_number(k)}.json") for k in range(len(shards))]
    _finish(index, settings, folder, [note for note in made if note is not None])


def _make_shards(shards: Sequence[Shard], settings: RecordSettings, folder: Path) -> None:
    """Prepares the videos on this machine and packs each shard as soon as its last one is done."""
    data, staging = _data_folder(folder), folder / "staged"
    data.mkdir(parents=True, exist_ok=True)
    prepare.sweep(data)
    missing: dict[int, set[str]] = {}
    for k, shard in enumerate(shards):
        note = ShardNote.read(folder / "shards" / f"{_number(k)}.json")
        if note is None or note.fault(folder, whole=False):
            missing[k] = set(shard)
    home = {video_id: k for k in missing for video_id in shards[k]}
    features = writing.VideoRecords(shards, staging, settings, data_dir=folder).info.features
    to_do = {video_id: shards[k][video_id] for video_id, k in home.items()}
    with contextlib.closing(prepare.stage_videos(to_do, staging, settings)) as staged:
        for row in staged:
            k = home[row.video_id]
            missing[k].discard(row.video_id)
            if not missing[k]:
                _pack(shards[k], staging, features, folder, _shard_path(folder, k, len(shards)), k)


def _pack(
    shard: Shard,
    staging: Path,
    features: tfds.features.FeaturesDict,
    folder: Path,
    path: Path,
    number: int,
) -> None:
    """Writes a shard aside, renames it, notes it down, drops its staged files: in this order."""
    rows = []

    def examples() -> Iterator[tuple[str, bytes]]:
        for video_id in shard:
            video = prepare.read_staged(prepare.staged_path(staging, video_id))
            rows.append(video.row)
            if video.row.usable:
                yield video_id, features.serialize_example(writing.example(video))

    aside = path.with_name(f".{path.name}.part")
    writing.ShardWriter(tfds.core.FileFormat.ARRAY_RECORD).write(aside, examples())
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    ShardNote.of(path, rows).write(folder / "shards" / f"{_number(number)}.json")
    for video_id in shard:
        prepare.staged_path(staging, video_id).unlink(missing_ok=True)


def _make_shards_on_beam(
    shards: Sequence[Shard], settings: RecordSettings, folder: Path, options: Sequence[str]
) -> None:
    """Has Apache Beam make all shards; videos that were finished before are not done again."""
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    beam_options = PipelineOptions(list(options))
    runner = beam_options.view_as(StandardOptions).runner or "DirectRunner"
    shutil.rmtree(folder / _NAME, ignore_errors=True)  # tfds would take an old one for the new
    staging = folder / "staged"
    builder = writing.VideoRecords(shards, staging, settings, data_dir=folder)
    tfds.disable_progress_bar()
    progress.say(f"{runner} makes {len(shards)} shards")
    with contextlib.redirect_stdout(io.StringIO()):  # tfds talks of downloads; there are none
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                beam_runner=runner, beam_options=beam_options
            )
        )
    for own in _data_folder(folder).glob("*.shard_infos.json"):
        own.unlink()  # what tfds tells itself between two steps
    for k, shard in enumerate(shards):
        paths = [prepare.staged_path(staging / _number(k), video_id) for video_id in shard]
        note = ShardNote.of(
            _shard_path(folder, k, len(shards)), [prepare.read_staged(p).row for p in paths]
        )
        note.write(folder / "shards" / f"{_number(k)}.json")


def _finish(
    index: VideoIndex, settings: RecordSettings, folder: Path, notes: Sequence[ShardNote]
) -> None:
    """Writes what tfds needs to read the shards, and last of all the manifest."""
    rows = [row for note in notes for row in note.rows]
    usable = [row for row in rows if row.usable]
    if not usable:
        reasons = "; ".join(f"{row.video_id}: {row.reason}" for row in rows[:5])
        raise ValueError(f"None of the {len(rows)} files under {index.root} is usable ({reasons}).")
    split = tfds.core.SplitInfo(
        name=writing.SPLIT,
        shard_lengths=[sum(row.usable for row in note.rows) for note in notes],
        num_bytes=sum(note.bytes for note in notes),
        filename_template=_template(folder),
    )
    builder = writing.VideoRecords([], folder, settings, data_dir=folder.parent / "never written")
    builder.info.set_splits(tfds.core.SplitDict([split]))
    builder.info.write_to_directory(_data_folder(folder))
    prepare.write_aside(folder / "manifest.csv", _manifest(notes))
    shutil.rmtree(folder / "staged", ignore_errors=True)
    shutil.rmtree(folder / "downloads", ignore_errors=True)  # tfds makes it, nothing uses it


def _manifest(notes: Sequence[ShardNote]) -> bytes:
    """The manifest of the noted shards: their rows, with the position of each usable one."""
    rows = []
    position = 0
    for row in (row for note in notes for row in note.rows):
        rows.append(dataclasses.replace(row, record=position if row.usable else -1))
        position += row.usable
    return prepare.manifest_text(rows)


# --- checking and mending --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verification:
    """What checking a set has shown.

    Attributes:
      damage: what was wrong, one line each; all of it has been mended.
      retried: videos that a time-out, a crash or an unreadable file had marked, and that were tried
        again.
      records: the set as it is now.
    """

    damage: tuple[str, ...]
    retried: tuple[str, ...]
    records: Records


def verify_records(index: VideoIndex, settings: RecordSettings) -> Verification:
    """Checks a finished set against its digests, its manifest and its sources, and mends it.

    Every shard is compared with the digest it was written under, every record of it decoded, and
    every source file compared with its size and digest in the manifest. Shards in which anything
    is amiss are made again from their videos; others are not touched.

    Raises:
      FileNotFoundError: there is no finished set to check.
      ValueError, RuntimeError, OSError: as `prepare_records`, while mending.
    """
    folder = record_folder(index, settings)
    if not (folder / "manifest.csv").exists():
        raise FileNotFoundError(
            f"{folder} holds no finished record set of these videos and settings: leave out "
            "--verify to prepare it. A source file that has another size than before makes it "
            "another set."
        )
    with prepare.locked(folder):
        damage, retried = _check(index, settings, folder)
        numbers = sorted(damage.keys() | retried.keys())
        if numbers:
            (folder / "manifest.csv").unlink()  # unfinished until mended, should this be killed
        for number in numbers:
            note = folder / "shards" / f"{_number(number)}.json"
            note.unlink(missing_ok=True)
        if numbers:
            _build(index, settings, folder)
    lines = [line for number in sorted(damage) for line in damage[number]]
    again = [line for number in sorted(retried) for line in retried[number]]
    return Verification(tuple(lines), tuple(again), open_records(folder, settings))


def _check(
    index: VideoIndex, settings: RecordSettings, folder: Path
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """What is wrong, and what is worth another try, by shard; -1 is what belongs to no shard."""
    shards = plan_shards(_videos(index))
    damage: dict[int, list[str]] = {}
    retried: dict[int, list[str]] = {}
    notes = []
    features = writing.VideoRecords([], folder, settings, data_dir=folder).info.features
    with (
        progress.bar(total=len(shards), description="checking records", unit="shard") as bar,
        ThreadPoolExecutor(settings.workers or os.cpu_count()) as threads,
    ):
        for k, shard in enumerate(shards):
            note = ShardNote.read(folder / "shards" / f"{_number(k)}.json")
            if note is None or [row.video_id for row in note.rows] != list(shard):
                damage[k] = [f"shards/{_number(k)}.json is missing or damaged"]
            else:
                notes.append(note)
                if found := _check_shard(note, shard, folder, settings, features, threads.map):
                    damage[k] = found
                if again := [row for row in note.rows if row.worth_another_try]:
                    retried[k] = [f"{row.video_id}: {row.reason}" for row in again]
            bar.update()
    whole = len(notes) == len(shards)
    if whole and (folder / "manifest.csv").read_bytes() != _manifest(notes):
        damage[-1] = ["manifest.csv is not what was written"]
    for name in ("features.json", "dataset_info.json"):
        if not (_data_folder(folder) / name).exists():
            damage.setdefault(-1, []).append(f"{name} is missing")
    return damage, retried


def _check_shard(
    note: ShardNote,
    shard: Shard,
    folder: Path,
    settings: RecordSettings,
    features: tfds.features.FeaturesDict,
    spread: Callable[..., Iterable[str]],
) -> list[str]:
    """What is wrong with a shard, its records and the sources of its videos."""
    found = list(filter(None, spread(_check_source, note.rows, shard.values())))
    if fault := note.fault(folder, whole=True):
        return [*found, fault]
    reader = array_record_module.ArrayRecordReader(os.fspath(_data_folder(folder) / note.file))
    usable = [row for row in note.rows if row.usable]
    examples = [
        features.deserialize_example(tf.constant(serialised)) for serialised in reader.read_all()
    ]
    reader.close()
    if len(examples) != len(usable):
        return [*found, f"{note.file} holds {len(examples)} records, not {len(usable)}"]
    check = functools.partial(_check_record, settings=settings)
    return [*found, *filter(None, spread(check, usable, examples))]


def _check_source(row: ManifestRow, path: Path) -> str:
    try:
        digest, size = prepare.file_digest(path)
    except OSError as error:
        # Of a video that could not be read before this is no news.
        return "" if not row.sha256 else f"{row.video_id}: its file is gone ({error.strerror})"
    if row.sha256 and (digest, size) != (row.sha256, row.bytes):
        return f"{row.video_id}: its file is not the one that was prepared: its sha256 differs"
    return ""


def _check_record(
    row: ManifestRow, example: Mapping[str, tf.Tensor], settings: RecordSettings
) -> str:
    """Decodes all of a record and holds it against its row."""
    frames, flow = example["frames"].numpy(), example["flow"].numpy()
    counts = (len(frames), len(flow), len(example["times"]))
    if example["video_id"].numpy().decode() != row.video_id:
        return f"{row.video_id}: the record in its place is another video's"
    if counts != (row.num_frames, settings.num_fields(row.num_frames), row.num_frames):
        return f"{row.video_id}: frames, fields and times number {counts}, not {row.num_frames}"
    for data in frames:
        if not prepare.decodes(data):
            return f"{row.video_id}: a frame cannot be decoded"
    for data in flow:
        if not prepare.decodes(data):
            return f"{row.video_id}: a flow field cannot be decoded"
    return ""
