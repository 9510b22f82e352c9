"""Video files -> upright 8-bit RGB frames with time stamps, or a fault that says what is wrong.

What a file is decided by its content, never by its name, and by decoding, never by its header:
headers promise frames that are not there, and the other way round. Needs PyAV and NumPy only.
"""

import dataclasses
import math
import os
import stat
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import av.error
import av.filter
import av.logging
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float64, UInt8

from stf_jax.index import PICTURES, natural

# What libav has to say about damaged files is told by `VideoFault` and `VideoInfo.notes`.
av.logging.set_level(None)

# A header's promise may be off by this much before a video counts as truncated. Of 388 real clips
# the worst ended one frame before its promise (UCF101 with a late first frame); rounded frame
# rates add an error that grows with the length.
_MARGIN_FRAMES = 3
_MARGIN_SHARE = 0.01

# Pixels this close to square are square: some UCF101 clips say 4096:4083, which would cost a
# resampling of every frame to make 320 columns 321.
_SQUARE_ENOUGH = 0.01

# Beyond this a sample aspect ratio is a damaged header, not a lens.
_WIDEST_PIXEL = 4

# Frames per second where neither header nor time stamps say.
_DEFAULT_RATE = 25.0

_SNIFFED_BYTES = 4096

# How the note on a source begins that did not come to its end.
_STOPPED = "reading stopped"

# The first box of MP4 and QuickTime files.
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")

# A time stamp that falls back further than this, in seconds, starts a new clock (concatenated or
# wrapped streams); less is disorder.
_NEW_CLOCK = 1.0


class VideoFault(Exception):
    """A file that cannot be used as a video.

    Args:
      path: the file.
      reason: short and stable, for a manifest, e.g. 'empty file'.
      advice: what was expected and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, advice: str) -> None:
        super().__init__(f"{os.fspath(path)!r}: {reason}. {advice}")
        self.path, self.reason, self.advice = os.fspath(path), reason, advice

    def __reduce__(self) -> tuple[type["VideoFault"], tuple[str, str, str]]:
        """Pickles whole: faults travel from worker processes."""
        return VideoFault, (self.path, self.reason, self.advice)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one video may cost; a video beyond any of them is a fault, not a shorter video.

    Args:
      max_pixels: width x height of a frame, as stored and as delivered.
      max_frames: decoded frames.
      max_seconds: time between the first and the last frame.
    """

    max_pixels: int = 4096 * 2304
    max_frames: int = 20_000
    max_seconds: float = 1200.0


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What decoding a whole file has shown.

    Attributes:
      num_frames: decoded frames, the truth.
      header_frames: frames the header claims; None if it does not say.
      fps: mean frame rate of the header, else of the time stamps; None for one frame without rate.
      width: px of the delivered frames (upright, square pixels).
      height: px, likewise.
      codec: libav's name of the video codec, e.g. 'h264'.
      container: libav's names of the container format, e.g. 'mov,mp4,m4a,3gp,3g2,mj2'.
      rotation: clockwise turn that was applied, degrees: 0, 90, 180 or 270.
      truncated: the data is damaged, or ends before the time that its header promises.
      notes: what else was noticed or changed, for people.
    """

    num_frames: int
    header_frames: int | None
    fps: float | None
    width: int
    height: int
    codec: str
    container: str
    rotation: int
    truncated: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A whole decoded video.

    Attributes:
      frames: uint8 `t h w 3`, RGB.
      timestamps: float64 `t`, seconds since the first frame.
      info: what was decoded.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    timestamps: Float64[np.ndarray, " t"]
    info: VideoInfo


def read_video(
    path: str | os.PathLike[str], limits: Limits | None = None, *, threads: int = 1
) -> Video:
    """Decodes a whole file into memory (t x h x w x 3 bytes; iterate a `VideoReader` for less).

    Args:
      path: the file.
      limits: what it may cost; None for the defaults.
      threads: decoder threads; 1 is best where files are decoded in parallel.

    Raises:
      VideoFault: no usable video in the file (says why).
      OSError: the file cannot be read.
    """
    reader = VideoReader(path, limits, threads=threads)
    frames = np.stack(list(reader))
    return Video(frames, reader.timestamps, reader.info)


class VideoReader:
    """Iterates over the frames of a file: RGB, uint8 [h w 3], in display order, upright.

    Rotation and mirror flags and the sample aspect ratio are applied (the height stays, the width
    changes), interlaced frames are deinterlaced, alpha is dropped, and every depth and colour
    format becomes 8-bit RGB. All frames have the size of the first. Every iteration decodes
    the file anew and forgets the one before: `info` and `timestamps` are known at its end. Until
    then `seconds` is the time of the latest frame since the first; it never decreases, and where
    neighbours have each other's stamps (see `_timestamps`) it is a frame ahead.

    A folder of pictures (JPEG, PNG) is a video too, in the natural order of their names; its frame
    rate is not known, its time stamps are those of 25 frames per second.

    Args:
      path: the file, or the folder of pictures; any name, always taken as a path.
      limits: what it may cost; None for the defaults.
      threads: decoder threads; 1 is best where files are decoded in parallel.

    Raises:
      VideoFault: while iterating, where the file has no usable video (says why).
      OSError: while iterating, where the file cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], limits: Limits | None = None, *, threads: int = 1
    ) -> None:
        self.path = Path(path)
        self._limits = limits or Limits()
        self._threads = threads
        self._info: VideoInfo | None = None
        self._timestamps: np.ndarray | None = None
        self.seconds = 0.0

    @property
    def info(self) -> VideoInfo:
        """What was decoded; known after the last frame."""
        if self._info is None:
            raise RuntimeError(f"{self.path}: info is known only after iterating to the last frame")
        return self._info

    @property
    def timestamps(self) -> Float64[np.ndarray, " t"]:
        """Seconds since the first frame; known after the last frame."""
        if self._timestamps is None:
            raise RuntimeError(f"{self.path}: timestamps need iterating to the last frame")
        return self._timestamps

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decodes; see the class."""
        self._info = self._timestamps = None
        if self.path.is_dir():
            yield from self._pictures()
            return
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise VideoFault(self.path, "not a regular file", "Expected a video file; remove it.")
        with open(self.path, "rb") as file, _open(file, self.path) as container:
            stream = _video_stream(container, file, self.path)
            stream.codec_context.thread_count = self._threads
            self._check_pixels(stream.codec_context.width, stream.codec_context.height)
            progress = _Progress()
            canvas: _Canvas | None = None
            clock = _Clock(stream.time_base, _header_rate(stream))
            for frame in _progressive(_decode(container, stream, progress), progress):
                self._check_pixels(frame.width, frame.height)
                clock.read(progress.pts[-1])
                self.seconds = clock.latest
                if canvas is None:
                    canvas = _Canvas.of(frame, stream.sample_aspect_ratio)
                    self._check_pixels(canvas.width, canvas.height)
                self._check_length(progress, stream)
                yield canvas.draw(frame)
            if canvas is None:
                raise _moov_fault(file, self.path) or VideoFault(
                    self.path,
                    "no decodable frame",
                    f"Its {_name(stream)} stream was expected to hold at least one picture; "
                    "replace or remove the file.",
                )
            self._conclude(container, stream, progress, canvas)

    def _pictures(self) -> Iterator[np.ndarray]:
        """Decodes the pictures of a folder; one that cannot be is damage, as in a video."""
        files = picture_files(self.path)
        progress = _Progress()
        canvas: _Canvas | None = None
        first: int | None = None
        for number, file in enumerate(files):
            frame = self._picture(file, progress)
            if frame is None:
                continue
            progress.pts.append(number)
            if len(progress.pts) > self._limits.max_frames:
                raise self._too_many_frames()
            if number / _DEFAULT_RATE > self._limits.max_seconds:
                raise self._too_long()
            if canvas is None:
                canvas = _Canvas.of(frame, None)
            first = number if first is None else first
            self.seconds = (number - first) / _DEFAULT_RATE
            yield canvas.draw(frame)
        if canvas is None:
            raise VideoFault(
                self.path,
                "no decodable frame" if files else "no pictures",
                f"Expected a folder with the frames of a video ({', '.join(sorted(PICTURES))}), "
                f"got {len(files)} such files; replace or remove it.",
            )
        height, width = canvas.upright_size
        self._timestamps = np.array(progress.pts, np.float64) / _DEFAULT_RATE
        self._info = VideoInfo(
            num_frames=progress.num_frames,
            header_frames=len(files),
            fps=None,
            width=width,
            height=height,
            codec=files[0].suffix.lower().lstrip("."),
            container="folder",
            rotation=canvas.rotation,
            truncated=bool(progress.damage),
            notes=(*canvas.notes, *progress.damage_notes()),
        )

    def _picture(self, path: Path, progress: "_Progress") -> VideoFrame | None:
        try:
            with open(path, "rb") as file, av.open(_Nameless(file), "r") as container:
                stream = container.streams.video[0]
                self._check_pixels(stream.codec_context.width, stream.codec_context.height)
                frame = next(container.decode(stream))
        except (av.error.FFmpegError, IndexError, StopIteration):
            progress.hurt(f"undecodable picture: {path.name}")
            return None
        self._check_pixels(frame.width, frame.height)
        if frame.is_corrupt:
            progress.hurt("damaged frame")
        return frame

    def _check_pixels(self, width: int, height: int) -> None:
        _check_pixels(self.path, width, height, self._limits)

    def _check_length(self, progress: "_Progress", stream: VideoStream) -> None:
        if progress.num_frames > self._limits.max_frames:
            raise self._too_many_frames()
        if progress.seconds(stream) > self._limits.max_seconds:
            raise self._too_long()

    def _too_many_frames(self) -> VideoFault:
        return VideoFault(
            self.path,
            f"too many frames: more than {self._limits.max_frames}",
            "Cut the video into shorter ones or raise max_frames.",
        )

    def _too_long(self) -> VideoFault:
        return VideoFault(
            self.path,
            f"too long: more than {self._limits.max_seconds:g} s",
            "Cut the video into shorter ones or raise max_seconds.",
        )

    def _conclude(
        self,
        container: InputContainer,
        stream: VideoStream,
        progress: "_Progress",
        canvas: "_Canvas",
    ) -> None:
        rate = _header_rate(stream)
        timestamps, made_up = _timestamps(progress.pts, stream.time_base, rate)
        notes = [*canvas.notes, *progress.notes]
        if made_up:
            notes.append(f"{made_up} missing or backward time stamps made up")
        if rate is None and timestamps[-1] > 0:
            rate = (len(timestamps) - 1) / float(timestamps[-1])
        lacking = _lacking_frames(container, stream, progress, timestamps, rate)
        if lacking:
            notes.append(f"ends {lacking} frames before the time that its header promises")
        upright = canvas.upright_size
        self._timestamps = timestamps
        self._info = VideoInfo(
            num_frames=len(timestamps),
            header_frames=stream.frames or None,
            fps=rate,
            width=upright[1],
            height=upright[0],
            codec=_name(stream),
            container=container.format.name,
            rotation=canvas.rotation,
            truncated=bool(lacking or progress.damage),
            notes=tuple(notes + progress.damage_notes()),
        )


def _check_pixels(name: str | os.PathLike[str], width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise VideoFault(
            name,
            f"too many pixels: {width}x{height}",
            f"At most {limits.max_pixels} are allowed; scale the video down or raise max_pixels.",
        )


class StreamReader:
    """Iterates over the frames of a stream or of a camera, once, as `VideoReader` does of a file.

    Damaged frames are taken as they come. A stream may be endless: only its pixels are limited.

    Args:
      url: of a stream, such as 'http://127.0.0.1:8000/a.mp4' or 'udp://127.0.0.1:9000'; of a
        device the name that its driver knows, such as '/dev/video0'.
      device: libav's name of the driver, 'v4l2' for cameras; '' for streams.
      limits: what a frame may cost; None for the defaults.
      timeout: seconds that opening, and then every read, may take.

    Attributes:
      seconds: time of the latest frame since the first; never decreases.
      broken: why the stream ended before its sender said so; '' if it did not.

    Raises:
      VideoFault: while iterating, where there is no stream with pictures (says why).
    """

    def __init__(
        self, url: str, *, device: str = "", limits: Limits | None = None, timeout: float = 10.0
    ) -> None:
        self.url, self._device, self._timeout = url, device, timeout
        self._limits = limits or Limits()
        self.seconds = 0.0
        self.broken = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Opens and decodes; see the class."""
        with self._open() as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.codec_context is None:
                raise VideoFault(self.url, "no video stream", "Expected a stream with pictures.")
            progress = _Progress()
            canvas: _Canvas | None = None
            clock = _Clock(stream.time_base, _header_rate(stream))
            for frame in _progressive(_decode(container, stream, progress), progress):
                _check_pixels(self.url, frame.width, frame.height, self._limits)
                clock.read(progress.pts.pop())  # one is enough: the stream may be endless
                self.seconds = clock.latest
                canvas = canvas or _Canvas.of(frame, stream.sample_aspect_ratio)
                yield canvas.draw(frame)
            self.broken = next((kind for kind in progress.damage if _STOPPED in kind), "")
            if canvas is None:
                raise VideoFault(
                    self.url,
                    "no decodable frame",
                    f"{self.broken or 'It ended'} before the first picture; is its sender running?",
                )

    def _open(self) -> InputContainer:
        wait = (self._timeout, self._timeout)
        try:
            return av.open(self.url, "r", format=self._device or None, timeout=wait)
        except av.error.ExitError as error:
            raise VideoFault(
                self.url,
                f"nothing came within {self._timeout:g} s",
                "Is its sender running? A longer --timeout waits longer.",
            ) from error
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoFault(
                self.url,
                f"cannot be opened: {reason}",
                "Expected a camera that nothing else uses."
                if self._device
                else "Expected the address of a video stream, such as udp://127.0.0.1:9000.",
            ) from error


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names, numbers by their value."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if Path(entry.name).suffix.lower() in PICTURES and not entry.name.startswith(".")
    ]
    return [folder / name for name in sorted(names, key=natural)]


# --- what the file is ------------------------------------------------------------------------


class _Nameless:
    """An open file without its name, from which libav would guess the format."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _open(file: BinaryIO, path: Path) -> InputContainer:
    """Opens a file by its content, or tells apart what people put in video folders by mistake.

    Text never reaches libav: it would draw it as pictures (ANSI art), or follow it if it is a
    playlist, to other files and over the network.
    """
    head = file.read(_SNIFFED_BYTES)
    if not head:
        raise VideoFault(
            path, "empty file", "Expected a video, got 0 bytes; copy or download it again."
        )
    kind = _other_content(head)
    if kind is None:
        file.seek(0)
        try:
            container = av.open(_Nameless(file), "r", metadata_errors="replace")
        except av.error.FFmpegError as error:
            if (fault := _moov_fault(file, path)) is not None:
                raise fault from error
            kind = "unrecognised content"
        else:
            if not container.format.name.endswith("_pipe"):
                return container
            kind = f"still picture ({container.format.name.removesuffix('_pipe')})"
            container.close()
    raise VideoFault(
        path,
        f"not a video: {kind}",
        f"Expected a video, got a file that starts with {head[:40]!r}; copy or download it again, "
        "or remove it.",
    )


def _other_content(head: bytes) -> str | None:
    """Names content that is no video by its first bytes; None for what libav may try."""
    known = {
        b"%PDF": "PDF document",
        b"PK\x03\x04": "ZIP archive",
        b"Rar!": "RAR archive",
        b"\x1f\x8b": "gzip archive",
        b"7z\xbc\xaf\x27\x1c": "7z archive",
    }
    for magic, kind in known.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"YUV4MPEG2"):  # the one video container that begins with plain text
        return None
    if not any(head):
        return "only zero bytes"
    if any(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in head):
        return None
    try:
        # The last few bytes may be half a character.
        text = head.decode("utf-8-sig" if len(head) < _SNIFFED_BYTES else "utf-8", "strict")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < _SNIFFED_BYTES:
            return None
        text = head[: error.start].decode("utf-8")
    start = text.lstrip("\ufeff \t\r\n").lower()
    return "HTML document" if start.startswith(("<!doctype html", "<html")) else "text"


def _moov_fault(file: BinaryIO, path: Path) -> VideoFault | None:
    """Why an unusable file is no whole MP4; None if it is one, or another kind of file.

    To be asked only where libav found nothing to decode: of a cut moov box it takes what it can.
    """
    file.seek(0)
    if file.read(8)[4:] not in _MP4_STARTS:
        return None
    end = _box_end(file, b"moov")
    if end is not None and end <= os.fstat(file.fileno()).st_size:
        return None
    return VideoFault(
        path,
        "MP4 without moov box" if end is None else "MP4 with a cut moov box",
        "The part that says where the frames are is missing or incomplete: the file was cut, or "
        "its recording was never finished; copy or record it again.",
    )


def _box_end(file: BinaryIO, name: bytes) -> int | None:
    """Where the top-level box `name` of an MP4 file should end; walks the boxes, reads none."""
    position, end = 0, os.fstat(file.fileno()).st_size
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size, kind = struct.unpack(">I4s", header[:8])
        if size == 1 and len(header) == 16:
            (size,) = struct.unpack(">Q", header[8:])
        if kind == name:
            return position + size
        if size < 8:  # 0: reaches to the end of the file; else damaged
            return None
        position += size
    return None


def _video_stream(container: InputContainer, file: BinaryIO, path: Path) -> VideoStream:
    """The stream to decode: libav's choice, cover pictures aside."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or all(s.codec_context is None for s in streams):
        if (fault := _moov_fault(file, path)) is not None:
            raise fault
    if not streams:
        only = " (audio only)" if container.streams.audio else ""
        raise VideoFault(
            path,
            f"no video stream{only}",
            f"Expected pictures, got a {container.format.long_name} file without; remove it.",
        )
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    assert isinstance(stream, VideoStream)
    if stream.codec_context is None:
        raise VideoFault(
            path,
            "no decoder for its video codec",
            "The codec is unknown to this build of libav; convert the file, e.g. to H.264.",
        )
    return stream


def _name(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


# --- decoding --------------------------------------------------------------------------------


@dataclasses.dataclass
class _Progress:
    """What decoding has met so far.

    Attributes:
      pts: presentation time of each delivered frame, in the stream's time base.
      notes: what was changed.
      damage: how often each kind of damage was met.
      end: where the data of any stream ends, seconds.
    """

    pts: list[int | None] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    damage: dict[str, int] = dataclasses.field(default_factory=dict)
    end: Fraction = Fraction(0)

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    def hurt(self, kind: str) -> None:
        self.damage[kind] = self.damage.get(kind, 0) + 1

    def damage_notes(self) -> list[str]:
        return [f"{kind} ({count}x)" for kind, count in self.damage.items()]

    def seconds(self, stream: VideoStream) -> float:
        """Time from the first frame to the latest."""
        first, last = self.pts[0], self.pts[-1]
        if first is None or last is None or stream.time_base is None:
            return 0.0
        return float((last - first) * stream.time_base)


def _packets(container: InputContainer, progress: _Progress) -> Iterator[av.Packet]:
    packets = container.demux()
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.ExitError:  # only streams have a time-out
            progress.hurt(f"{_STOPPED}: nothing came any more")
            return
        except av.error.FFmpegError as error:
            progress.hurt(f"{_STOPPED}: {error.strerror}")
            return
        # An empty packet would tell the decoder that the stream ends; AVI files use them where
        # the previous picture stays.
        if packet.size:
            yield packet


def _decode(
    container: InputContainer, stream: VideoStream, progress: _Progress
) -> Iterator[VideoFrame]:
    """Decodes what can be decoded and counts the rest as damage."""
    for packet in _packets(container, progress):
        if packet.pts is not None and packet.time_base is not None:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            progress.end = max(progress.end, end)
        if packet.stream.index == stream.index:
            if packet.is_corrupt:
                progress.hurt("incomplete packet")
            yield from _decode_packet(stream, packet, progress)
    yield from _decode_packet(stream, None, progress)


def _decode_packet(
    stream: VideoStream, packet: av.Packet | None, progress: _Progress
) -> Iterator[VideoFrame]:
    try:
        frames = stream.codec_context.decode(packet)
    except av.error.EOFError:
        return
    except av.error.FFmpegError as error:
        progress.hurt(f"undecodable packet: {error.strerror}")
        return
    for frame in frames:
        if frame.is_corrupt:
            progress.hurt("damaged frame")
        yield frame


def _progressive(frames: Iterable[VideoFrame], progress: _Progress) -> Iterator[VideoFrame]:
    """Deinterlaces, one frame for one frame, from the first interlaced frame on.

    Frames leave the filter later than they enter it, so time stamps wait in a queue.
    """
    deinterlacer: _Deinterlacer | None = None
    for frame in frames:
        if deinterlacer is None and frame.interlaced_frame:
            deinterlacer = _Deinterlacer(frame)
            progress.notes.append("deinterlaced")
        if deinterlacer is None:
            progress.pts.append(frame.pts)
            yield frame
            continue
        if not deinterlacer.fits(frame):
            yield from deinterlacer.drain(progress)
            deinterlacer = _Deinterlacer(frame)
        yield from deinterlacer.feed(frame, progress)
    if deinterlacer is not None:
        yield from deinterlacer.drain(progress)


class _Deinterlacer:
    """libav's bwdif, which leaves frames alone that are not marked as interlaced."""

    def __init__(self, like: VideoFrame) -> None:
        self._shape = (like.width, like.height, like.format.name)
        self._waiting: deque[int | None] = deque()
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(
            width=like.width,
            height=like.height,
            format=like.format,
            time_base=Fraction(1, 1000),
        )
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
        sink = self._graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        self._graph.configure()

    def fits(self, frame: VideoFrame) -> bool:
        return self._shape == (frame.width, frame.height, frame.format.name)

    def feed(self, frame: VideoFrame, progress: _Progress) -> Iterator[VideoFrame]:
        self._waiting.append(frame.pts)
        self._graph.vpush(frame)
        yield from self._pull(progress)

    def drain(self, progress: _Progress) -> Iterator[VideoFrame]:
        self._graph.vpush(None)
        yield from self._pull(progress)

    def _pull(self, progress: _Progress) -> Iterator[VideoFrame]:
        while True:
            try:
                frame = self._graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            progress.pts.append(self._waiting.popleft())
            yield frame


# --- pictures --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Canvas:
    """How decoded frames become upright RGB.

    Attributes:
      width: px after squaring the pixels, before turning.
      height: px, likewise.
      mirrored: left and right change places, before turning.
      rotation: clockwise turn, degrees.
      notes: what this changes, for people.
    """

    width: int
    height: int
    mirrored: bool
    rotation: int
    notes: tuple[str, ...]
    _reformatter: VideoReformatter = dataclasses.field(default_factory=VideoReformatter)

    @classmethod
    def of(cls, frame: VideoFrame, aspect: Fraction | None) -> "_Canvas":
        notes = []
        width = frame.width
        ratio = aspect or Fraction(1)
        if not 1 / _WIDEST_PIXEL <= ratio <= _WIDEST_PIXEL:
            notes.append(f"sample aspect ratio {ratio} not believed")
        elif abs(ratio - 1) > _SQUARE_ENOUGH:
            width = max(1, round(width * ratio))
            notes.append(f"sample aspect ratio {ratio} applied")
        mirrored, rotation = _orientation(frame)
        if mirrored:
            notes.append("mirrored as its header says")
        if rotation % 90:
            notes.append(f"rotation by {rotation} degrees not applied: not a multiple of 90")
            rotation = 0
        return cls(width, frame.height, mirrored, rotation, tuple(notes))

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width after turning."""
        across = self.rotation in (90, 270)
        return (self.width, self.height) if across else (self.height, self.width)

    def draw(self, frame: VideoFrame) -> np.ndarray:
        rgb = self._reformatter.reformat(
            frame, self.width, self.height, "rgb24", interpolation="BICUBIC", threads=1
        ).to_ndarray()
        if self.mirrored:
            rgb = rgb[:, ::-1]
        return np.ascontiguousarray(np.rot90(rgb, -self.rotation // 90))


def _orientation(frame: VideoFrame) -> tuple[bool, int]:
    """Reads the display matrix: whether to mirror left and right, and then the clockwise turn."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    # Row vectors: (x, y) goes to (a x + c y, b x + d y), y down.
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))  # type: ignore[call-overload]
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(math.degrees(math.atan2(b, a))) % 360


# --- time ------------------------------------------------------------------------------------


def _header_rate(stream: VideoStream) -> float | None:
    """Frames per second, where the header says something that can be true."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and 0 < rate <= 1000:
            return float(rate)
    return None


def _timestamps(
    pts: list[int | None], time_base: Fraction | None, rate: float | None
) -> tuple[np.ndarray, int]:
    """Seconds since the first frame, never decreasing, and how many had to be made up.

    Frames come in display order, whatever their stamps say: in AVI files with B-frames (an eighth
    of UCF101's) neighbours have each other's, so sorting puts them right.
    """
    clock = _Clock(time_base, rate)
    ordered = np.sort(np.array([clock.read(value) for value in pts], np.float64))
    return ordered - ordered[0], clock.made_up


class _Clock:
    """Reads the time stamps of frames as they come; what lacks or falls back is made up.

    Attributes:
      latest: the latest time so far, seconds since the first frame.
      made_up: how many stamps were.
    """

    def __init__(self, time_base: Fraction | None, rate: float | None) -> None:
        self._time_base = time_base
        self._period = 1 / (rate or _DEFAULT_RATE)
        self._shift: float | None = None
        self.latest = -self._period
        self.made_up = 0

    def read(self, value: int | None) -> float:
        """Seconds since the first frame."""
        if value is None or self._time_base is None:
            time = self.latest + self._period
            self.made_up += 1
        else:
            raw = float(value * self._time_base)
            if self._shift is None:
                self._shift = self.latest + self._period - raw
            if raw + self._shift < self.latest - _NEW_CLOCK:
                self._shift = self.latest + self._period - raw
                self.made_up += 1
            time = raw + self._shift
        self.latest = max(self.latest, time)
        return time


def _lacking_frames(
    container: InputContainer,
    stream: VideoStream,
    progress: _Progress,
    timestamps: np.ndarray,
    rate: float | None,
) -> int:
    """How many frames the video ends before its promise; 0 within the margin.

    Time counts, not the number of frames: where frames were dropped in recording, or hidden by an
    edit list, the header claims more frames than there are though nothing was cut.
    """
    rate = rate or _DEFAULT_RATE
    end = float(timestamps[-1]) + 1 / rate
    promised = _promised_seconds(stream, rate)
    if promised is None:
        # The container's own duration is that of its longest stream.
        end = max(end, float(progress.end))
        promised = container.duration / av.time_base if container.duration else 0.0
    lacking = round((promised - end) * rate)
    return lacking if lacking > _MARGIN_FRAMES + _MARGIN_SHARE * promised * rate else 0


def _promised_seconds(stream: VideoStream, rate: float) -> float | None:
    """How long the video stream is by its own header."""
    promises = []
    if stream.duration and stream.time_base:
        promises.append(float(stream.duration * stream.time_base))
    if stream.frames and "avi" in stream.container.format.name.split(","):
        # libav works out the duration of an AVI file from the bytes that are there.
        promises.append(stream.frames / rate)
    tag = stream.metadata.get("DURATION", "").split(":")  # Matroska: hh:mm:ss.fraction
    if len(tag) == 3:
        promises.append(float(tag[0]) * 3600 + float(tag[1]) * 60 + float(tag[2]))
    return max(promises, default=None)
