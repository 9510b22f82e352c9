"""How the shards of a record set are written: as those of a tfds data set."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from stf_jax import prepare
from stf_jax.prepare import RecordSettings, StagedVideo

# TensorFlow only reads and writes files here; left alone it would take the whole memory of every
# GPU.
tf.config.set_visible_devices([], "GPU")

SPLIT = "videos"
# Each record by itself, for random access; JPEG is compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"

# The file of each video id of one shard, in the order of its records.
Shard = Mapping[str, Path]


def number(shard: int) -> str:
    """How a shard's number is written in names."""
    return f"{shard:05}"


class VideoRecords(tfds.core.ShardBasedBuilder):
    """One example per usable video: `video_id`, `frames` [t], `flow` [t-1] (JPEG), `times` [t].

    `times` are microseconds since the first frame. A shard is made by one call that needs nothing
    but the files of its videos, so Apache Beam can spread the calls over machines.
    """

    VERSION = tfds.core.Version(f"{prepare.FORMAT}.0.0")

    def __init__(self, shards: Sequence[Shard], staging: Path, settings: RecordSettings, **kwargs):
        """Takes the shards and where each keeps its finished videos; `kwargs` go to tfds."""
        self._shards, self._staging, self._settings = shards, staging, settings
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        strings = tfds.features.Tensor(shape=(None,), dtype=tf.string)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Encoded frames and quantised optical flow of every usable video.",
            features=tfds.features.FeaturesDict(
                {
                    "video_id": tfds.features.Text(),
                    "frames": strings,
                    "flow": strings,
                    "times": tfds.features.Tensor(shape=(None,), dtype=tf.int64),
                }
            ),
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager  # The files are on disk.
        one_each = dataclasses.replace(self._settings, workers=1)
        calls = [
            functools.partial(_shard_examples, shard, self._staging / number(k), one_each)
            for k, shard in enumerate(self._shards)
        ]
        return {SPLIT: calls}

    def _example_writer(self):
        return ShardWriter(self.info.file_format)


def _shard_examples(
    shard: Shard, staging: Path, settings: RecordSettings
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The examples of a shard: prepares its videos, wherever this runs, and reads them."""
    prepare.sweep(staging)
    for _ in prepare.stage_videos(shard, staging, settings, announce=False):
        pass
    for video_id in shard:
        staged = prepare.read_staged(prepare.staged_path(staging, video_id))
        if staged.row.usable:
            yield video_id, example(staged)


def example(staged: StagedVideo) -> dict[str, Any]:
    """What is stored of a video."""
    return {
        "video_id": staged.row.video_id,
        "frames": list(staged.frames),
        "flow": list(staged.flow),
        "times": np.array(staged.times, np.int64),
    }


class ShardWriter(tfds.core.ExampleWriter):
    """Writes the same examples as the same bytes: protobuf leaves the order of a map open."""

    def write(self, path: os.PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        """Writes serialised examples, whose keys are not stored."""
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
        for _, serialised in examples:
            example = tf.train.Example.FromString(serialised)
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()
