"""Videos of any length, streams and cameras -> windows -> class probabilities, in one pass.

Frames are shrunk as they come, and only those of one window are kept. Of these only the frames that
its clip reads are encoded, and only the fields that it reads are computed.
"""

import csv
import dataclasses
import io
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from stf_jax import flow as optical_flow
from stf_jax.inputs import Batch
from stf_jax.layouts import videos_below
from stf_jax.pipeline import SamplingSettings, evaluation_reads
from stf_jax.predict import Prediction, Predictor
from stf_jax.prepare import Encoder, write_aside
from stf_jax.video import Limits, StreamReader, VideoFault, VideoReader

# A file of at most so many frames is one window, if no other was asked for: the longest of UCF101
# has 1,776, so a test video gets the score of its evaluation.
WHOLE_FRAMES = 2000

# Frames of a live source that may wait for the network: 2.6 s of 25 per second.
QUEUE_FRAMES = 64

STAGES = ("decode", "flow", "pack", "network")

# Times of frames are sums: what differs by less is the same moment, seconds.
_SAME_MOMENT = 1e-6

# How often a wait for the next frame looks whether it should end, seconds.
_LOOK = 0.1

# Streams that come at their own speed, whoever reads them.
_LIVE_PROTOCOLS = ("udp", "rtp", "srtp", "rtsp", "rtsps", "rtmp", "rtmps", "srt")
_URL = re.compile(r"([a-z][a-z0-9+.-]+):(?://|\d)")

Clock = Callable[[], float]


# --- what is watched ---------------------------------------------------------------------------


@runtime_checkable
class FrameSource(Protocol):
    """RGB frames, uint8 `h w 3`, of one shape.

    Attributes:
      seconds: time of the latest since the first; never decreases.
    """

    seconds: float

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the frames."""
        ...


class Paced:
    """Plays a source in real time, as a camera would deliver it.

    Args:
      source: of frames.
      clock: seconds.
      sleep: waits for so many seconds of the clock.
    """

    def __init__(
        self,
        source: FrameSource,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._source, self._clock, self._sleep = source, clock, sleep
        self.seconds = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields each frame when its time has come, or at once when that is over."""
        begun = None
        for frame in self._source:
            self.seconds = self._source.seconds
            if begun is None:
                begun = self._clock() - self.seconds
            early = begun + self.seconds - self._clock()
            if early > 0:
                self._sleep(early)
            yield frame


@dataclasses.dataclass(frozen=True)
class Input:
    """What is to be watched.

    Attributes:
      name: as messages and tables say it.
      source: its frames.
      live: it comes at its own speed: who is too slow loses frames.
      file: its path; None for streams and cameras.
    """

    name: str
    source: FrameSource
    live: bool
    file: Path | None


def open_input(name: str, *, max_pixels: int, live: bool, timeout: float) -> Input:
    """Says what an input is; nothing is read of it yet.

    Args:
      name: path of a video file, of a folder of pictures or of a camera's device, or the address of
        a stream: 'http://...', 'udp://...', 'pipe:0'. What exists is a path.
      max_pixels: of a frame. Neither time nor frames have a limit here.
      live: a file is played in real time, and frames of any stream may be lost.
      timeout: seconds that a stream may keep one waiting.

    Raises:
      OSError: no file is there, or no camera (says which there are).
    """
    limits = Limits(max_pixels=max_pixels, max_frames=2**62, max_seconds=float("inf"))
    path, address = Path(name), _URL.match(name)
    if address and not path.exists():
        stream = StreamReader(name, limits=limits, timeout=timeout)
        return Input(name, stream, live or address[1] in _LIVE_PROTOCOLS, None)
    if name.startswith("/dev/video"):
        _require_camera(path)
        camera = StreamReader(name, device="v4l2", limits=limits, timeout=timeout)
        return Input(name, camera, True, None)
    os.stat(path)  # names what is not there
    reader = VideoReader(path, limits, threads=os.cpu_count() or 1)
    return Input(name, Paced(reader) if live else reader, live, path)


def _require_camera(path: Path) -> None:
    try:
        if stat.S_ISCHR(os.stat(path).st_mode):
            return
        raise OSError(f"{path} is no camera's device")
    except FileNotFoundError:
        there = sorted(str(p) for p in Path("/dev").glob("video*"))
        raise FileNotFoundError(
            f"there is no camera {path}; this machine has: {', '.join(there) or 'none'}"
        ) from None


def expand(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Puts the videos below a folder in its place.

    Yields:
      The name of an input and '', or that of a folder and why it holds none.
    """
    for name in names:
        if not Path(name).is_dir():
            yield name, ""
            continue
        try:
            videos = videos_below(Path(name))
        except (ValueError, OSError) as error:
            yield name, str(error)
            continue
        if not videos:
            yield name, f"{name} holds no video, nor does any folder below it"
        yield from ((str(video), "") for video in videos)


# --- frames ------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Taken:
    """A frame of a source, shrunk.

    Attributes:
      number: in the source, from 0; frames that were dropped count.
      seconds: since the first frame.
      arrived: when it was there, by `time.perf_counter`.
      cost: seconds that decoding and shrinking took.
      picture: at the stored size, uint8 `h w 3`.
      grey: at the size of flow, uint8 `h w`; None if flow is computed from the stored frames.
      frame: as it came, if it is to be kept.
      stored: as it is stored, once a clip has read it.
      field: to the next frame, as it is stored, once a clip has read it.
    """

    number: int
    seconds: float
    arrived: float
    cost: float
    picture: np.ndarray
    grey: np.ndarray | None
    frame: np.ndarray | None
    stored: bytes | None = None
    field: bytes | None = None


def take(source: FrameSource, encoder: Encoder, *, keep: bool, timer: Clock) -> Iterator[Taken]:
    """Shrinks the frames of a source as they come.

    Args:
      source: of frames.
      encoder: shrinks them.
      keep: the frames themselves too.
      timer: of their cost.
    """
    frames = iter(source)
    for number in range(2**62):
        begun = timer()
        frame = next(frames, None)
        if frame is None:
            return
        small = encoder.shrink(frame)
        cost = timer() - begun
        kept = frame if keep else None
        yield Taken(number, source.seconds, time.perf_counter(), cost, *small, kept)


class Newest:
    """The frames of a live source, for someone who may be too slow for all of them.

    A thread of its own takes them as they come. When `capacity` of them wait, the oldest is dropped
    for the next.

    Args:
      frames: of the source.
      capacity: frames that may wait.
      stop: set to end at once.

    Attributes:
      dropped: frames so far.
    """

    def __init__(self, frames: Iterable[Taken], capacity: int, stop: threading.Event) -> None:
        self._frames, self._capacity, self._stop = frames, capacity, stop
        self._waiting: deque[Taken] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._fault: BaseException | None = None
        self.dropped = 0

    def __iter__(self) -> Iterator[Taken]:
        """Yields the frames that were not dropped; raises what the source raises."""
        # A daemon: a source may keep it waiting for as long as its time-out.
        threading.Thread(target=self._fill, name="frames", daemon=True).start()
        try:
            while (frame := self._next()) is not None:
                yield frame
        finally:
            with self._changed:
                self._ended = True
        if self._fault is not None:
            raise self._fault

    def _next(self) -> Taken | None:
        with self._changed:
            while not self._waiting and not self._ended and not self._stop.is_set():
                self._changed.wait(_LOOK)
            return None if self._stop.is_set() or not self._waiting else self._waiting.popleft()

    def _fill(self) -> None:
        fault: BaseException | None = None
        try:
            for frame in self._frames:
                with self._changed:
                    if self._ended or self._stop.is_set():
                        return
                    if len(self._waiting) == self._capacity:
                        self._waiting.popleft()
                        self.dropped += 1
                    self._waiting.append(frame)
                    self._changed.notify()
        except BaseException as error:  # it is the reader's to deal with
            fault = error
        finally:
            with self._changed:
                self._ended, self._fault = True, fault
                self._changed.notify()


# --- windows -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """Which frames of a video are scored together.

    Window k holds those from k `hop` to k `hop` + `length`; the last one, as long, ends with the
    video. So every frame is in one at least. A shorter video is one window.

    Args:
      length: of a window.
      hop: from the start of one to the start of the next.
      unit: of both, 'frames' or 'seconds'.
      whole: a file of at most so many frames is one window all the same.

    Raises:
      ValueError: frames would be left out, or a window hold none.
    """

    length: float
    hop: float
    unit: str
    whole: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        least = 1 if self.unit == "frames" else 1e-3
        if not least <= self.hop <= self.length:
            raise ValueError(
                f"windows of {self.length:g} {self.unit} every {self.hop:g}: expected a hop of at "
                f"least {least:g} and at most a window, so that no frame is left out"
            )

    @classmethod
    def parse(cls, window: str, hop: str, sampling: SamplingSettings) -> "WindowSettings":
        """Reads them from a command line.

        Args:
          window: such as '5s' or '120f'; '' makes short files one window, and windows of others as
            many frames as a training clip of the middle stride spans.
          hop: likewise, in the same unit; '' is half of a window.
          sampling: of the run.

        Raises:
          ValueError: it cannot be read.
        """
        if window:
            length, unit = _span(window, "window")
        else:
            length, unit = float(sampling.num_frames * sum(sampling.frame_stride) // 2), "frames"
        if not hop:
            half = length / 2 if unit == "seconds" else max(1.0, length // 2)
            return cls(length, half, unit, 0 if window else WHOLE_FRAMES)
        step, hop_unit = _span(hop, "hop")
        if hop_unit != unit:
            raise ValueError(f"--hop={hop} is in {hop_unit}, but windows are in {unit}")
        return cls(length, step, unit, 0 if window else WHOLE_FRAMES)


def _span(text: str, flag: str) -> tuple[float, str]:
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)s?|(\d+)f)", text)
    if match is None:
        raise ValueError(f"--{flag}={text}: expected seconds such as 5s, or frames such as 120f")
    return (float(match[1]), "seconds") if match[1] else (float(match[2]), "frames")


class Windows:
    """Collects frames and gives them back in windows as soon as these are complete."""

    def __init__(self, settings: WindowSettings) -> None:
        self._settings = settings
        self._frames: deque[Taken] = deque()
        self._next = 0
        self._slides = settings.whole == 0

    def add(self, frame: Taken) -> Iterator[tuple[Taken, ...]]:
        """Takes the next frame; yields the windows that end before it."""
        if self._slides:
            yield from self._slide(frame)
            return
        self._frames.append(frame)
        if len(self._frames) > self._settings.whole:
            self._slides = True
            waiting, self._frames = self._frames, deque()
            for earlier in waiting:
                yield from self._slide(earlier)

    def finish(self) -> Iterator[tuple[Taken, ...]]:
        """Yields the window that ends with the video; nothing if there was no frame."""
        frames = list(self._frames)
        if self._slides and frames:
            first = self._place(frames[-1]) - self._settings.length + _SAME_MOMENT
            frames = [frame for frame in frames if self._place(frame) > first]
        if frames:
            yield tuple(frames)

    def _place(self, frame: Taken) -> float:
        return float(frame.number) if self._settings.unit == "frames" else frame.seconds

    def _slide(self, frame: Taken) -> Iterator[tuple[Taken, ...]]:
        length, hop = self._settings.length, self._settings.hop
        place = self._place(frame) + _SAME_MOMENT
        while self._frames and place >= self._next * hop + length:
            start = self._next * hop - _SAME_MOMENT
            window = tuple(f for f in self._frames if self._place(f) >= start)
            if window:  # times may have a gap of more than a window
                yield window
            self._next += 1
            self._forget(place)
        if not self._frames:
            self._next = max(self._next, int((place - length) // hop) + 1)
        self._forget(place)
        self._frames.append(frame)

    def _forget(self, place: float) -> None:
        """Drops what neither the next window needs nor one that would end here."""
        start = self._next * self._settings.hop - _SAME_MOMENT
        # The last window reaches back by its length from the last frame, this one or a later one.
        start = min(start, place - self._settings.length)
        while self._frames and self._place(self._frames[0]) < start:
            self._frames.popleft()


def field_sources(numbers: Sequence[int]) -> list[int]:
    """Which field stands for the one behind each frame of a window but the last.

    Where frames were dropped the motion across the gap is that of several frames; there, as at the
    ends of a video, the nearest field is read again: the one before, or the one behind.

    Example:
      >>> field_sources([0, 1, 2, 7, 8])
      [0, 1, 1, 3]
    """
    pairs = np.arange(len(numbers) - 1)
    whole = np.flatnonzero(np.diff(numbers) == 1)
    if not len(whole):
        return pairs.tolist()
    before = whole[np.maximum(np.searchsorted(whole, pairs, side="right") - 1, 0)]
    behind = whole[np.minimum(np.searchsorted(whole, pairs), len(whole) - 1)]
    return np.where(abs(before - pairs) <= abs(behind - pairs), before, behind).tolist()


# --- scores ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a network makes of a window.

    Attributes:
      start: time of its first frame, seconds since the first of the source.
      end: when its last frame ends.
      frames: how many it has.
      prediction: the classes.
      latency: seconds that each of `STAGES` took; decode is that of the frames that are new in this
        window (of a live source without waiting for them).
      lag: seconds from the arrival of its last frame to its scores.
    """

    start: float
    end: float
    frames: int
    prediction: Prediction
    latency: Mapping[str, float]
    lag: float


class Watcher:
    """Scores the windows of videos, streams and cameras.

    Args:
      predictor: the network.
      windows: how videos are divided.
      threads: that compute flow; 0 for one per CPU core.
    """

    def __init__(self, predictor: Predictor, windows: WindowSettings, *, threads: int = 0) -> None:
        optical_flow.use_one_thread()
        self.predictor, self.windows = predictor, windows
        self._threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="flow")

    def start_up(self) -> float:
        """Compiles everything; returns the seconds that it took.

        The first video would wait for it otherwise.
        """
        begun = time.perf_counter()
        watching = self.watch(Input("start-up", _Black(), False, None))
        for _ in watching:
            pass
        return time.perf_counter() - begun

    def watch(
        self,
        source: Input,
        *,
        stop: threading.Event | None = None,
        keep: Callable[[np.ndarray, float], None] | None = None,
        queue: int = QUEUE_FRAMES,
    ) -> "Watching":
        """Scores a source; see `Watching`.

        Args:
          source: of frames.
          stop: set to end with what came until then.
          keep: called with every frame that is not dropped, and its time, once the windows are
            scored that end before it.
          queue: frames of a live source that may wait.
        """
        return Watching(self, source, stop or threading.Event(), keep, queue)

    def score(self, window: Sequence[Taken], encoder: Encoder) -> tuple[Prediction, list[float]]:
        """Class probabilities of the frames of a window, as of a video that holds no others.

        Returns:
          The prediction and the seconds that flow, packing and the network took.
        """
        clip, times = self.clip(window, encoder)
        begun = time.perf_counter()
        probabilities = self.predictor.score_clip(clip)
        times.append(time.perf_counter() - begun)
        return Prediction(self.predictor.class_names, probabilities), times

    def clip(self, window: Sequence[Taken], encoder: Encoder) -> tuple[Batch, list[float]]:
        """What the network sees of a window, as a batch of one.

        Returns:
          The clip and the seconds that flow and packing took.
        """
        settings = self.predictor.settings
        reads = evaluation_reads(len(window), settings.sampling, settings.records)
        frames, needed = reads
        times = [time.perf_counter()]
        places = field_sources([frame.number for frame in window])
        self._compute_fields(window, sorted({places[k] for k in needed}), encoder)
        times.append(time.perf_counter())
        stored = [b""] * len(window)
        for k in frames:
            window[k].stored = window[k].stored or encoder.frame(window[k].picture)
            stored[k] = window[k].stored or b""
        fields = [b""] * settings.records.num_fields(len(window))
        for k in needed:
            fields[k] = window[places[k]].field or b""
        clip = self.predictor.pack(tuple(stored), tuple(fields))
        times.append(time.perf_counter())
        return clip, np.diff(times).tolist()

    def _compute_fields(
        self, window: Sequence[Taken], needed: Sequence[int], encoder: Encoder
    ) -> None:
        todo = [k for k in needed if window[k].field is None]
        size = min(optical_flow.PAIRS_PER_CALL, -(-len(todo) // self._threads) or 1)

        def compute(first: int) -> None:
            part = todo[first : first + size]
            fields = encoder.fields(
                [_grey(window[k]) for k in part], [_grey(window[k + 1]) for k in part]
            )
            for k, field in zip(part, fields, strict=True):
                window[k].field = field

        for _ in self._pool.map(compute, range(0, len(todo), size)):
            pass


class Watching:
    """The scores of a source, window by window, as they become known.

    Raises:
      VideoFault: at the end, where the source is none, or failed after what was scored.
      OSError: at the end, where it cannot be read any further.

    Attributes:
      frames: taken so far.
      dropped: frames lost so far because the network was too slow.
      seconds: time of the latest frame.
    """

    def __init__(
        self,
        watcher: Watcher,
        source: Input,
        stop: threading.Event,
        keep: Callable[[np.ndarray, float], None] | None,
        queue: int,
    ) -> None:
        self._watcher, self._source, self._stop = watcher, source, stop
        self._keep, self._queue = keep, queue
        self._newest: Newest | None = None
        self._encoder = Encoder(watcher.predictor.settings.records, source.name)
        self._cost = 0.0
        self.frames, self.seconds = 0, 0.0

    @property
    def dropped(self) -> int:
        """Frames lost so far."""
        return self._newest.dropped if self._newest else 0

    def __iter__(self) -> Iterator[Scored]:
        """Reads and scores; see the class."""
        settings = self._watcher.windows
        if self._source.file is None or self._source.live:
            settings = dataclasses.replace(settings, whole=0)  # nobody waits for their end
        windows = Windows(settings)
        fault: Exception | None = None
        try:
            for frame in self._taken():
                for window in windows.add(frame):
                    yield self._scored(window)
                self._count(frame)
                if self._stop.is_set():
                    break
        except (VideoFault, OSError) as error:
            fault = error  # what came before is good
        for window in windows.finish():
            yield self._scored(window)
        if fault is not None:
            raise fault

    def _count(self, frame: Taken) -> None:
        self.frames, self.seconds = self.frames + 1, frame.seconds
        self._cost += frame.cost
        if self._keep and frame.frame is not None:
            self._keep(frame.frame, frame.seconds)
            frame.frame = None

    def _taken(self) -> Iterable[Taken]:
        # A live source's wait for the next frame is no cost: only the thread's own time is.
        timer = time.thread_time if self._source.live else time.perf_counter
        frames = take(self._source.source, self._encoder, keep=self._keep is not None, timer=timer)
        if not self._source.live:
            return frames
        self._newest = Newest(frames, self._queue, self._stop)
        return self._newest

    def _scored(self, window: tuple[Taken, ...]) -> Scored:
        prediction, times = self._watcher.score(window, self._encoder)
        latency = dict(zip(STAGES, (self._cost, *times), strict=True))
        self._cost = 0.0
        lag = time.perf_counter() - window[-1].arrived
        return Scored(*span(window), len(window), prediction, latency, lag)


def span(window: Sequence[Taken]) -> tuple[float, float]:
    """When the first frame of a window begins and its last one ends, seconds."""
    first, last = window[0], window[-1]
    gaps = last.number - first.number
    period = (last.seconds - first.seconds) / gaps if gaps else 0.04
    return first.seconds, last.seconds + period


class _Black:
    """A second of nothing."""

    seconds = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(25):
            self.seconds = number / 25
            yield np.zeros((240, 320, 3), np.uint8)


def _grey(frame: Taken) -> np.ndarray:
    assert frame.grey is not None, "flow of frames that were not kept for it"
    return frame.grey


def latency_table(windows: Iterable[Scored]) -> list[dict[str, str | int | float]]:
    """Where the time goes: a row for each of `STAGES`, for their sum and for the lag.

    Returns:
      Rows of 'stage', 'windows', 'p50_ms', 'p95_ms' and 'share', of the sum's total.
    """
    rows = [(*(w.latency[s] for s in STAGES), sum(w.latency.values()), w.lag) for w in windows]
    if not rows:
        return []
    times = np.array(rows)
    p50, p95 = np.percentile(1e3 * times, (50, 95), axis=0)
    totals = times.sum(axis=0)
    return [
        {
            "stage": stage,
            "windows": len(rows),
            "p50_ms": round(float(p50[k]), 2),
            "p95_ms": round(float(p95[k]), 2),
            "share": round(float(totals[k] / totals[len(STAGES)]), 4),
        }
        for k, stage in enumerate((*STAGES, "all", "lag"))
    ]


def write_latency(path: Path, rows: Sequence[Mapping[str, str | int | float]]) -> None:
    """Writes `latency_table` as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["stage", "windows", "p50_ms", "p95_ms", "share"])
    writer.writeheader()
    writer.writerows(rows)
    write_aside(path, text.getvalue().encode())
