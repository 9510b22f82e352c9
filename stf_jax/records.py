"""Prepared record sets: a tfds builder over the encoded videos, its manifest and its key.

A record set holds every usable video of a data set once, whatever its label or subset: which
video is trained on and which is tested is the index's business, so all protocols and splits share
one set. Two settings that store other bytes never share a folder.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from stf_jax import prepare, progress
from stf_jax.index import VideoIndex, check_duplicates
from stf_jax.prepare import ManifestRow, RecordSettings
from stf_jax.video import picture_files

# TensorFlow only reads files here; left alone it would take the whole memory of every GPU.
tf.config.set_visible_devices([], "GPU")

_SPLIT = "videos"


class VideoRecords(tfds.core.GeneratorBasedBuilder):
    """One example per usable video: `video_id`, `frames` [t] and `flow` [t-1] as JPEG strings."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, staged: Mapping[str, Path], **kwargs):
        """Takes the staged file of every usable video id; `kwargs` go to tfds."""
        self._staged = staged
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        strings = tfds.features.Tensor(shape=(None,), dtype=tf.string)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Encoded frames and quantised optical flow of every usable video.",
            features=tfds.features.FeaturesDict(
                {"video_id": tfds.features.Text(), "frames": strings, "flow": strings}
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # The files are on disk.
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self):
        for video_id, path in self._staged.items():
            _, frames, flow = prepare.read_staged(path)
            yield video_id, {"video_id": video_id, "frames": list(frames), "flow": list(flow)}


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
        """A scalar string tensor -> `video_id` [], `frames` [t], `flow` [t-1] string tensors."""
        return self._builder.info.features.deserialize_example(serialised)


def prepare_records(index: VideoIndex, settings: RecordSettings) -> Records:
    """Returns the record set of an index; makes it, or what is missing of it, first.

    Safe to kill and to call again at any moment: finished videos are not done twice.

    Raises:
      ValueError: no video is usable, or the same file stands in two subsets.
      RuntimeError: another process is preparing the same set.
      OSError: the folder cannot be written.
    """
    folder = Path(settings.root) / f"{index.name}-{_key(index, settings)}"
    with prepare.locked(folder):
        if not (folder / "manifest.csv").exists():
            _build(index, settings, folder)
    records = open_records(folder, settings)
    digests = {row.video_id: row.sha256 for row in records.rows.values() if row.usable}
    for note in check_duplicates(index, digests):
        progress.say(note)
    return records


def open_records(folder: Path, settings: RecordSettings) -> Records:
    """Opens a finished record set.

    Raises:
      FileNotFoundError: there is no finished set in `folder`.
    """
    manifest = folder / "manifest.csv"
    if not manifest.exists():
        raise FileNotFoundError(
            f"{folder} holds no finished record set (no manifest.csv). Run the training command, "
            "which prepares it, or point --config.records.root at the folder that holds it."
        )
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    rows = prepare.read_manifest(manifest)
    builder = tfds.builder_from_directory(_data_folder(folder))
    return Records(folder, settings, rows, digest, builder, builder.as_data_source(_SPLIT))


def _key(index: VideoIndex, settings: RecordSettings) -> str:
    """Names the settings and the files (by size: reading them all would cost every start)."""
    files = [(entry.video_id, _size(index.path(entry))) for entry in index.entries]
    text = json.dumps([settings.stamp(), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _size(path: Path) -> int:
    try:
        if path.is_dir():  # of pictures
            return sum(picture.stat().st_size for picture in picture_files(path))
        return path.stat().st_size
    except OSError:
        return -1  # Preparation will say why it cannot be read.


def _data_folder(folder: Path) -> Path:
    return folder / "video_records" / str(VideoRecords.VERSION)


def _build(index: VideoIndex, settings: RecordSettings, folder: Path) -> None:
    (folder / "settings.json").write_text(json.dumps(settings.stamp(), indent=2) + "\n")
    staging = folder / "staged"
    videos = {entry.video_id: index.path(entry) for entry in index.entries}
    rows = prepare.stage_videos(videos, staging, settings)
    usable = {k: prepare.staged_path(staging, k) for k, row in rows.items() if row.usable}
    if not usable:
        reasons = "; ".join(f"{row.video_id}: {row.reason}" for row in list(rows.values())[:5])
        raise ValueError(f"None of the {len(rows)} files under {index.root} is usable ({reasons}).")
    # A kill inside tfds leaves a folder of its own naming; packing is quick, so it starts afresh.
    shutil.rmtree(folder / "video_records", ignore_errors=True)
    progress.say(f"packing {len(usable)} videos into {folder}")
    tfds.disable_progress_bar()
    builder = VideoRecords(staged=usable, data_dir=folder)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds talks of downloads; there are none
        builder.download_and_prepare()
    positions = dict(_positions(builder))
    rows = {k: dataclasses.replace(row, record=positions.get(k, -1)) for k, row in rows.items()}
    # The manifest is written last: its presence means that the set is finished.
    prepare.write_manifest(folder / "manifest.csv", list(rows.values()))
    shutil.rmtree(staging)
    shutil.rmtree(folder / "downloads", ignore_errors=True)  # tfds makes it, nothing uses it


def _positions(builder: tfds.core.DatasetBuilder) -> Iterator[tuple[str, int]]:
    for position, example in enumerate(builder.as_data_source(_SPLIT)):
        yield example["video_id"].decode(), position
