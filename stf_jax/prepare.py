"""Video files -> encoded frames and optical flow, once, in parallel, safe against any interruption.

This is the slow part of the data's walk. Its worker processes import this module only: no
TensorFlow, and JAX only where flow is computed by it. Every video becomes one staged file, written
aside and renamed, so a run that is killed at any moment leaves only finished videos behind and the
next one does the rest. `stf_jax.records` packs the staged files into the shards of a tfds data set.
"""

import csv
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pebble import ProcessExpired, ProcessPool

from stf_jax import flow as optical_flow
from stf_jax import progress
from stf_jax.video import Limits, VideoFault, VideoInfo, VideoReader, picture_files

# Raised when the meaning of the stored bytes changes, so that old caches are never mixed in.
FORMAT = 2

_RESIZES = ("squash", "short_side")
_FLOW_SOURCES = ("stored", "online")
# The longest side that libjpeg takes, px.
_JPEG_LIMIT = 65500

# How the reasons begin that lie in the machine or the moment, not in the video: checking a set
# tries these again.
_UNREADABLE, _HUNG, _CRASHED = "cannot be read", "decoding did not end", "decoding crashed"

# Videos for each worker that are done first, to tell what the others will need.
_SAMPLE_PER_WORKER = 4
# Space that is left free beyond the estimate, which is a sample's, bytes and share.
_SPARE_BYTES, _SPARE_SHARE = 64 << 20, 0.05


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """How videos are stored. Everything but `root`, `timeout` and `workers` is part of the key.

    Args:
      root: folder that holds one sub-folder per data set and settings.
      size: side of the stored square frames and flow fields, px, or their shorter side.
      resize: 'squash' makes every frame square; 'short_side' keeps its aspect, and whoever reads
        it cuts a square from along its longer side (SPEC 3.2).
      flow_size: side, or shorter side, of the frames that flow is computed on, px; the field is
        then scaled to `size` together with its values (SPEC 2.9).
      flow_source: 'stored' computes flow now and keeps it; 'online' keeps frames only, and whoever
        reads them computes the fields that it needs (`stf_jax.inputs.compute_flow`).
      flow_algorithm: one of `stf_jax.flow.FLOW_ALGORITHMS` (SPEC 2.1).
      tvl1: how 'tvl1' computes it; no part of the key of other algorithms.
      flow_bound: truncation of flow in px per frame at the stored size (SPEC 2.8).
      jpeg_quality: 1 to 100, of frames and of flow (SPEC 2.11: at least 95 for flow).
      min_truncated_frames: a video that ends before its time is used only with this many frames.
      max_pixels: largest width x height that is decoded.
      max_frames: longest video that is decoded, frames.
      max_seconds: longest video that is decoded, seconds.
      timeout: seconds after which a worker that hangs on one video is replaced.
      workers: processes; 0 means one per CPU core.

    Raises:
      ValueError: a value that cannot work (names it).
    """

    root: str
    size: int
    resize: str
    flow_size: int
    flow_source: str
    flow_algorithm: str
    tvl1: optical_flow.TvL1Settings
    flow_bound: float
    jpeg_quality: int
    min_truncated_frames: int
    max_pixels: int
    max_frames: int
    max_seconds: float
    timeout: float
    workers: int

    def __post_init__(self) -> None:
        """Checks what would otherwise fail in the first worker."""
        optical_flow.check_algorithm(self.flow_algorithm)
        for name, known in (("resize", _RESIZES), ("flow_source", _FLOW_SOURCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"records.{name}: got {getattr(self, name)!r}, one of {known}")
        for name, low, high in (
            ("size", 16, 2048),
            ("flow_size", 32, 2048),
            ("flow_bound", 0.1, 1000),
            ("jpeg_quality", 1, 100),
            ("timeout", 1, 1e6),
            ("workers", 0, 4096),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"records.{name} must be in [{low}, {high}], got {value}")
        if self.flow_source == "online" and self.flow_size != self.size:
            raise ValueError(
                "records.flow_source='online' computes flow on the stored frames: flow_size must "
                f"be size, {self.size}, got {self.flow_size}"
            )

    @classmethod
    def of(cls, card: Any) -> "RecordSettings":
        """The settings of a configuration's `records`."""
        return cls(**{**card, "tvl1": optical_flow.TvL1Settings(**card["tvl1"])})

    def stamp(self) -> dict[str, object]:
        """The settings that change the stored bytes, for keys, manifests and checkpoints."""
        fields = dataclasses.asdict(self)
        for name in ("root", "timeout", "workers"):
            del fields[name]
        if self.flow_algorithm != "tvl1":
            del fields["tvl1"]
        return {"format": FORMAT, **fields}

    def num_fields(self, num_frames: int) -> int:
        """Flow fields that are stored of a video."""
        return num_frames - 1 if self.flow_source == "stored" else 0

    def limits(self) -> Limits:
        """What one video may cost."""
        return Limits(self.max_pixels, self.max_frames, self.max_seconds)


@dataclasses.dataclass(frozen=True)
class ManifestRow:
    """What became of one video file.

    `status` is 'ok', 'truncated' (ends before its time but is used) or 'invalid' (not used);
    `reason` says why it is not 'ok'. `record` is the position in the record set, -1 if invalid.
    """

    video_id: str
    status: str
    reason: str
    num_frames: int
    header_frames: int
    fps: float
    width: int
    height: int
    codec: str
    container: str
    rotation: int
    bytes: int
    sha256: str
    record: int = -1

    @property
    def usable(self) -> bool:
        """Whether training and evaluation may read it."""
        return self.status != "invalid"

    @property
    def worth_another_try(self) -> bool:
        """Whether it failed for a reason that need not be the file's own."""
        return self.reason.startswith((_UNREADABLE, _HUNG, _CRASHED))


@dataclasses.dataclass(frozen=True)
class EncodedVideo:
    """A decoded video as it is stored.

    Args:
      frames: JPEG of each RGB frame, uint8 [h w 3]; h and w are `size` if squashed, and the
        smaller of them is otherwise.
      flow: JPEG of each field between consecutive frames, grey uint8 [2h w]: u above v, quantised;
        one fewer than frames, or none with `flow_source='online'`.
      times: of each frame, microseconds since the first: the frame rate may vary.
      info: what the decoder found.
    """

    frames: tuple[bytes, ...]
    flow: tuple[bytes, ...]
    times: tuple[int, ...]
    info: VideoInfo


def encode_video(path: Path, settings: RecordSettings) -> EncodedVideo:
    """Decodes a file, computes its flow and encodes both.

    Prediction calls this too, so a file seen for the first time goes through the very bytes that
    training and evaluation read.

    Raises:
      VideoFault: the file is not a video that can be used.
    """
    reader = VideoReader(path, settings.limits())
    frames, fields = encode_frames(reader, settings, path)
    times = np.rint(1e6 * reader.timestamps).astype(np.int64)
    return EncodedVideo(frames, fields, tuple(times.tolist()), reader.info)


def encode_frames(
    source: Iterable[np.ndarray], settings: RecordSettings, name: str | os.PathLike[str]
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Encodes decoded frames and their flow as an `EncodedVideo` holds them.

    Args:
      source: RGB, uint8 `h w 3`, all of one shape.
      settings: how.
      name: where they are from, for the message.

    Returns:
      The frames and the fields.

    Raises:
      VideoFault: they cannot be stored, or `source` raises it.
    """
    encoder = Encoder(settings, name)
    frames: list[bytes] = []
    fields: list[bytes] = []
    greys: list[np.ndarray] = []  # whose fields are still to be computed
    for frame in source:
        picture, grey = encoder.shrink(frame)
        frames.append(encoder.frame(picture))
        if grey is None:
            continue
        greys.append(grey)
        if len(greys) > optical_flow.PAIRS_PER_CALL:
            fields += encoder.fields(greys[:-1], greys[1:])
            del greys[:-1]
    if len(greys) > 1:
        fields += encoder.fields(greys[:-1], greys[1:])
    return tuple(frames), tuple(fields)


class Encoder:
    """Turns the frames of one video into what is stored of it, piece by piece.

    Args:
      settings: how.
      name: of the video, for the message.
    """

    def __init__(self, settings: RecordSettings, name: str | os.PathLike[str]) -> None:
        self._settings, self._name = settings, name
        self._stored: tuple[int, int] | None = None
        self._motion = (0, 0)

    def shrink(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What all else is made of.

        Args:
          frame: RGB, uint8 `h w 3`; the first one speaks for all: a video has one shape.

        Returns:
          The frame at the stored size, uint8 `h w 3`; and grey at the size that flow is computed
          at, uint8 `h w`, or None where no flow is stored.

        Raises:
          VideoFault: frames of this shape cannot be stored.
        """
        if self._stored is None:
            self._stored = self._begin(frame)
        picture = _resize(frame, self._stored)
        if self._settings.flow_source == "online":
            return picture, None
        same = self._motion == self._stored
        return picture, optical_flow.to_grey(picture if same else _resize(frame, self._motion))

    def _begin(self, frame: np.ndarray) -> tuple[int, int]:
        settings = self._settings
        stored = _sides(frame, settings.size, settings.resize)
        self._motion = _sides(frame, settings.flow_size, settings.resize)
        if max(2 * stored[0], stored[1]) > _JPEG_LIMIT:
            reason = f"too long and narrow: {frame.shape[1]}x{frame.shape[0]} px"
            raise VideoFault(self._name, reason, "records.resize='squash' can store it.")
        return stored

    def frame(self, picture: np.ndarray) -> bytes:
        """A frame as it is stored, of its picture by `shrink`."""
        # Turned to OpenCV's order by OpenCV: it would copy a view of reversed channels pixelwise.
        return _jpeg(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), self._settings.jpeg_quality)

    def fields(
        self, previous: Sequence[np.ndarray], following: Sequence[np.ndarray]
    ) -> list[bytes]:
        """The fields of pairs of grey frames by `shrink` as they are stored, at least one."""
        bound, quality = self._settings.flow_bound, self._settings.jpeg_quality
        return [_jpeg(_u_above_v(f, bound), quality) for f in self.motion(previous, following)]

    def motion(
        self, previous: Sequence[np.ndarray], following: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Those fields at the stored size, float32 `h w 2`, px per frame."""
        assert self._stored is not None, "no frame has been shrunk"
        fields = flow_between(np.stack(previous), np.stack(following), self._settings)
        if fields.shape[1:3] == self._stored:
            return list(fields)
        return [optical_flow.resize_flow(field, self._stored) for field in fields]


def flow_between(
    previous: np.ndarray, following: np.ndarray, settings: RecordSettings
) -> np.ndarray:
    """Flow of pairs of grey frames by the algorithm of the settings.

    Args:
      previous: uint8 `n h w`, at least one.
      following: the frame after each.
      settings: name the algorithm.

    Returns:
      float32 `n h w 2`, px per frame; the same bits however pairs are divided into calls.
    """
    if settings.flow_algorithm == "tvl1":
        from stf_jax import tvl1  # brings JAX, which no other algorithm needs

        return tvl1.flow_on_cpu(previous, following, settings.tvl1)
    compute = optical_flow.make_flow(settings.flow_algorithm)
    return np.stack([compute(a, b) for a, b in zip(previous, following, strict=True)])


def _sides(frame: np.ndarray, side: int, resize: str) -> tuple[int, int]:
    """Height and width that a frame is brought to."""
    if resize == "squash":
        return side, side
    height, width = frame.shape[:2]
    shorter = min(height, width)
    return round(height * side / shorter), round(width * side / shorter)


def _resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings a frame to (height, width); area averaging when it shrinks, so nothing aliases."""
    height, width = size
    shrinks = frame.shape[0] >= height and frame.shape[1] >= width
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(frame, (width, height), interpolation=mode)


def _u_above_v(field: np.ndarray, bound: float) -> np.ndarray:
    """A field as the grey picture that is stored."""
    quantised = optical_flow.quantise(field, bound)
    return np.concatenate([quantised[..., 0], quantised[..., 1]])


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    written, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not written:
        raise RuntimeError(f"OpenCV could not encode an image of shape {image.shape} as JPEG")
    return encoded.tobytes()


def decodes(jpeg: bytes) -> bool:
    """Whether a stored frame or field is a picture."""
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED) is not None


def describe(
    video_id: str, path: Path, settings: RecordSettings
) -> tuple[ManifestRow, EncodedVideo | None]:
    """Encodes one video, or says in its manifest row why not.

    Returns:
      The row, and the encoded video unless the row is invalid.
    """
    try:
        digest, size = file_digest(path)
    except OSError as error:
        return invalid_row(video_id, f"{_UNREADABLE}: {error.strerror or error}"), None
    try:
        encoded = encode_video(path, settings)
    except VideoFault as fault:
        return invalid_row(video_id, fault.reason, size, digest), None
    info = encoded.info
    status, reason = "ok", ""
    if info.truncated:
        promised = f" of {info.header_frames}" if info.header_frames else ""
        reason = f"ends before its time: {info.num_frames}{promised} frames decoded"
        status = "truncated" if info.num_frames >= settings.min_truncated_frames else "invalid"
    row = ManifestRow(
        video_id=video_id,
        status=status,
        reason=reason,
        num_frames=info.num_frames,
        header_frames=info.header_frames or -1,
        fps=round(float(info.fps or 0.0), 6),
        width=info.width,
        height=info.height,
        codec=info.codec,
        container=info.container,
        rotation=info.rotation,
        bytes=size,
        sha256=digest,
    )
    return row, encoded if row.usable else None


def invalid_row(video_id: str, reason: str, size: int = 0, digest: str = "") -> ManifestRow:
    """The manifest row of a file that cannot be used."""
    return ManifestRow(video_id, "invalid", reason, 0, -1, 0.0, 0, 0, "", "", 0, size, digest)


def file_digest(path: Path) -> tuple[str, int]:
    """The sha256 of a file, hexadecimal, and its size in bytes."""
    if path.is_dir():  # of pictures
        parts = [file_digest(picture) for picture in picture_files(path)]
        together = "".join(digest for digest, _ in parts)
        return hashlib.sha256(together.encode()).hexdigest(), sum(size for _, size in parts)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, os.fstat(file.fileno()).st_size


def source_size(path: Path) -> int:
    """The size of a video file in bytes, without reading it; -1 if it is not there."""
    try:
        if path.is_dir():  # of pictures
            return sum(picture.stat().st_size for picture in picture_files(path))
        return path.stat().st_size
    except OSError:
        return -1  # Preparation will say why it cannot be read.


# --- staging ---------------------------------------------------------------------------------


def staged_path(folder: Path, video_id: str) -> Path:
    """Where the staged file of a video lies; hashed, so that any name is a valid file name."""
    return folder / (hashlib.sha256(video_id.encode()).hexdigest()[:32] + ".npz")


@dataclasses.dataclass(frozen=True)
class StagedVideo:
    """What a staged file holds: the manifest row and, if that is usable, an `EncodedVideo`'s data.

    See `EncodedVideo` for `frames`, `flow` and `times`; all are empty if the video is invalid.
    """

    row: ManifestRow
    frames: tuple[bytes, ...]
    flow: tuple[bytes, ...]
    times: tuple[int, ...]


def write_staged(path: Path, row: ManifestRow, encoded: EncodedVideo | None) -> None:
    """Writes a staged file aside and renames it: it is there whole or not at all."""
    arrays = {"row": np.frombuffer(json.dumps(dataclasses.asdict(row)).encode(), np.uint8)}
    if encoded is not None:
        arrays |= _packed("frames", encoded.frames) | _packed("flow", encoded.flow)
        arrays["times"] = np.array(encoded.times, np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_aside(path, buffer.getbuffer())


def read_staged(path: Path) -> StagedVideo:
    """Reads what `write_staged` wrote.

    Raises:
      ValueError: the file is damaged (each part carries a checksum).
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            row = ManifestRow(**json.loads(arrays["row"].tobytes()))
            if not row.usable:
                return StagedVideo(row, (), (), ())
            times = tuple(arrays["times"].tolist())
            return StagedVideo(row, _unpacked("frames", arrays), _unpacked("flow", arrays), times)
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _finished_row(path: Path) -> ManifestRow | None:
    """The row of a staged file, or None if it is absent or damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return ManifestRow(**json.loads(arrays["row"].tobytes()))
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError):
        return None


def _packed(name: str, items: Sequence[bytes]) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(item) for item in items], dtype=np.int64)
    return {name: np.frombuffer(b"".join(items), np.uint8), f"{name}_ends": ends}


def _unpacked(name: str, arrays: Mapping[str, np.ndarray]) -> tuple[bytes, ...]:
    data, ends = arrays[name].tobytes(), arrays[f"{name}_ends"].tolist()
    return tuple(data[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=False))


def write_aside(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` to a neighbour of `path`, flushes it to disk and renames it into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Removes what a killed run was writing into `folder`; only for who holds its lock."""
    for left_over in folder.glob(".*.part"):
        left_over.unlink(missing_ok=True)  # a worker of that run may be about to rename it


def stage_videos(
    videos: Mapping[str, Path], folder: Path, settings: RecordSettings, *, announce: bool = True
) -> Generator[ManifestRow, None, None]:
    """Stages every video that is not staged yet, in parallel, with a time-out each.

    A sample comes first: what it takes tells what all will take, and the work ends there if the
    disk would not hold it.

    Args:
      videos: file of each video id.
      folder: where staged files go; made if absent.
      settings: how to encode.
      announce: say what it will take, show a bar and check the free space.

    Yields:
      The row of each video as soon as it is staged; first those that an earlier run has staged.

    Raises:
      OSError: the staging folder cannot be written (full disk, quota, read-only), or the disk will
        not hold the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = []
    for video_id, path in videos.items():
        staged = staged_path(folder, video_id)
        row = _finished_row(staged)
        if row is None:
            waiting.append(_Job(video_id, path, staged))
        else:
            yield row
    workers = settings.workers or os.cpu_count() or 1
    parts = _sample_first(waiting, _SAMPLE_PER_WORKER * workers) if announce else [waiting]
    with progress.bar(
        total=len(videos),
        initial=len(videos) - len(waiting),
        description="videos -> frames and flow",
        unit="video",
        disable=not announce or not waiting,
    ) as bar:
        began, frames = time.monotonic(), 0
        while parts:
            seconds = []
            for row, took in _in_parallel(parts[0], settings):
                seconds.append(took)
                frames += row.num_frames
                bar.set_postfix_str(f"{frames / (time.monotonic() - began):.0f} frames/s", False)
                bar.update()
                yield row
            done, *parts = parts
            if parts:
                estimate = Estimate.of(done, parts[0], sum(seconds) / workers, folder)
                progress.say(str(estimate))
                estimate.check(folder)


@dataclasses.dataclass(frozen=True)
class _Job:
    video_id: str
    path: Path
    staged: Path


def _sample_first(jobs: list[_Job], count: int) -> list[list[_Job]]:
    """Splits jobs into a sample from all over and the rest; does not split a few."""
    if len(jobs) <= 2 * count:
        return [jobs]
    chosen = {round(k * (len(jobs) - 1) / (count - 1)) for k in range(count)}
    rest = [job for k, job in enumerate(jobs) if k not in chosen]
    return [[jobs[k] for k in sorted(chosen)], rest]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the videos that are not prepared yet will take, by the bytes of a sample that is.

    Attributes:
      videos: how many.
      frames: decoded frames.
      decoded_bytes: of these frames as they come out of the decoder.
      disk_bytes: of what will be stored.
      seconds: that it takes.
      free_bytes: on the disk that holds the folder.
    """

    videos: int
    frames: int
    decoded_bytes: int
    disk_bytes: int
    seconds: float
    free_bytes: int

    @classmethod
    def of(
        cls, done: Sequence[_Job], rest: Sequence[_Job], seconds: float, folder: Path
    ) -> "Estimate":
        """Extrapolates from staged videos, which took `seconds`, to the rest by source bytes."""
        share = _source_bytes(rest) / max(1, _source_bytes(done))
        rows = [row for row in (_finished_row(job.staged) for job in done) if row is not None]
        decoded = sum(3 * row.width * row.height * row.num_frames for row in rows)
        return cls(
            videos=len(rest),
            frames=round(share * sum(row.num_frames for row in rows)),
            decoded_bytes=round(share * decoded),
            disk_bytes=round(share * sum(job.staged.stat().st_size for job in done)),
            seconds=share * seconds,
            free_bytes=shutil.disk_usage(folder).free,
        )

    def __str__(self) -> str:
        minutes = self.seconds / 60
        time_left = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
        return (
            f"to do: {self.videos} videos, about {self.frames} frames "
            f"({_gigabytes(self.decoded_bytes)} decoded), {_gigabytes(self.disk_bytes)} on disk "
            f"({_gigabytes(self.free_bytes)} free), {time_left}"
        )

    def check(self, folder: Path) -> None:
        """Stops before work that the disk would not hold.

        Raises:
          OSError: the free space is too small (says how much is needed).
        """
        needed = round(self.disk_bytes * (1 + _SPARE_SHARE)) + _SPARE_BYTES
        if needed > self.free_bytes:
            raise OSError(
                f"{folder.resolve()}: the disk has {_gigabytes(self.free_bytes)} free and the "
                f"{self.videos} videos still to be prepared need about {_gigabytes(needed)}. Free "
                "some space or set --config.records.root to another disk; what is done already "
                "stays."
            )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _source_bytes(jobs: Sequence[_Job]) -> int:
    return sum(max(0, source_size(job.path)) for job in jobs)


def _in_parallel(
    jobs: Sequence[_Job], settings: RecordSettings
) -> Iterator[tuple[ManifestRow, float]]:
    """Yields each video's row and the seconds that it took a worker."""
    if not jobs:
        return
    workers = min(settings.workers or os.cpu_count() or 1, len(jobs))
    # 'spawn': a forked child would inherit the threads and locks of JAX and TensorFlow.
    pool = ProcessPool(
        workers, context=get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
    )
    try:
        futures: dict[Any, _Job] = {
            pool.schedule(_stage_one, args=(job, settings), timeout=settings.timeout): job
            for job in jobs
        }
        pending: set[Any] = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield _outcome(future.result, futures[future], settings)
        pool.close()
    except BrokenProcessPool as error:
        pool.stop()
        raise RuntimeError(
            "The worker processes that decode videos could not start. A script that prepares "
            "videos must do so under `if __name__ == '__main__':`, for every worker imports it."
        ) from error
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()


def _outcome(
    result: Callable[[], tuple[ManifestRow, float]], job: _Job, settings: RecordSettings
) -> tuple[ManifestRow, float]:
    """A worker's result; a worker that hung or crashed has marked its video by doing so."""
    try:
        return result()
    except TimeoutError:
        row = invalid_row(job.video_id, f"{_HUNG} within {settings.timeout:g} s")
        took = settings.timeout
    except ProcessExpired as crash:
        row = invalid_row(job.video_id, f"{_CRASHED} its process (exit code {crash.exitcode})")
        took = 0.0
    write_staged(job.staged, row, None)
    return row, took


def _begin_worker(parent: int) -> None:
    # One process per core is the parallelism; threads inside would only fight over the cores.
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # JAX, where flow needs it, reads these when it is imported.
    os.environ["NPROC"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"


def _end_with(parent: int) -> None:
    """Ends this worker soon after its parent was killed, rather than at the end of its video."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _stage_one(job: _Job, settings: RecordSettings) -> tuple[ManifestRow, float]:
    began = time.monotonic()
    row, encoded = describe(job.video_id, job.path, settings)
    write_staged(job.staged, row, encoded)
    return row, time.monotonic() - began


# --- manifest --------------------------------------------------------------------------------


def manifest_text(rows: Sequence[ManifestRow]) -> bytes:
    """The rows as CSV, UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(ManifestRow)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue().encode()


def read_manifest(path: Path) -> dict[str, ManifestRow]:
    """Reads a file of `manifest_text` back, by video id."""
    kinds = {field.name: field.type for field in dataclasses.fields(ManifestRow)}
    rows = {}
    with open(path, newline="", encoding="utf-8") as file:
        for values in csv.DictReader(file):
            typed = {name: kinds[name](value) for name, value in values.items()}  # type: ignore[operator]
            rows[values["video_id"]] = ManifestRow(**typed)
    return rows


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the only right to write into `folder`.

    The operating system drops the lock when its holder ends, however it ends, so there are no
    stale locks to clean up.

    Raises:
      RuntimeError: another process holds it (names its pid and host).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            raise RuntimeError(
                f"{folder} is in use by {file.read().strip() or 'another process'}. "
                "Wait until it ends, or stop it, and run the same command again."
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
