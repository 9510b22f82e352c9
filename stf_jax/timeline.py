"""Scores of windows -> labels over time: as a table, as a picture, and drawn into the video."""

import bisect
import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stf_jax import flow as optical_flow
from stf_jax.charts import picture
from stf_jax.prepare import Encoder, RecordSettings, write_aside
from stf_jax.watch import FrameSource, Scored

# Classes that the picture shows: the most probable ones at any time.
_ROWS = 8

# Videos are enlarged to this width at least before anything is written into them, px.
_LEAST_WIDTH = 320

# Time stamps of written videos are multiples of this, seconds.
_TICK = Fraction(1, 1000)

# The full colour of drawn flow, share of `records.flow_bound`: most motion is far below the bound.
_FULL_COLOUR = 0.25


@dataclasses.dataclass(frozen=True)
class Piece:
    """A time in which the same windows lie.

    Attributes:
      start: seconds.
      end: seconds.
      probabilities: float32 `k`, the mean of its windows'.
    """

    start: float
    end: float
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Segment:
    """A time with one label.

    Attributes:
      start: seconds.
      end: seconds.
      label: the class.
      probability: the mean over it.
    """

    start: float
    end: float
    label: str
    probability: float


def pieces(windows: Sequence[Scored]) -> tuple[Piece, ...]:
    """Divides the time at every start and end of a window.

    What several windows say of a time is averaged: this is all the smoothing there is. Windows that
    overlap by half give every moment the mean of two.

    Args:
      windows: ordered by their starts.
    """
    # To microseconds: a window ends where another begins, up to rounding.
    spans = [(round(w.start, 6), round(w.end, 6)) for w in windows]
    edges = sorted({edge for span in spans for edge in span})
    made, first = [], 0
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        within = []
        for number in range(first, len(spans)):
            if spans[number][0] > start:
                break
            if spans[number][1] >= end:
                within.append(windows[number].prediction.probabilities)
        if within:
            made.append(Piece(start, end, np.mean(within, axis=0)))
    return tuple(made)


def segments(
    made: Iterable[Piece], class_names: Sequence[str], threshold: float
) -> tuple[Segment, ...]:
    """Merges neighbouring pieces of one label.

    Args:
      made: by `pieces`.
      class_names: in the order of their probabilities.
      threshold: where no class has this probability there is no label.
    """
    found: list[Segment] = []
    for piece in made:
        best = int(piece.probabilities.argmax())
        probability = float(piece.probabilities[best])
        if probability < threshold:
            continue
        new = Segment(piece.start, piece.end, class_names[best], probability)
        if found and found[-1].end == new.start and found[-1].label == new.label:
            new = _joined(found.pop(), new)
        found.append(new)
    return tuple(found)


def _joined(one: Segment, two: Segment) -> Segment:
    total = two.end - one.start
    weighted = (one.end - one.start) * one.probability + (two.end - two.start) * two.probability
    return Segment(one.start, two.end, one.label, weighted / total)


def mean_probabilities(made: Sequence[Piece]) -> np.ndarray:
    """Mean over time of class probabilities, float32 `k`; of one window its own.

    Raises:
      ValueError: there is no piece.
    """
    if len(made) == 1:
        return made[0].probabilities
    weights = [piece.end - piece.start for piece in made]
    return np.average([piece.probabilities for piece in made], axis=0, weights=weights)


def write_timeline(path: Path, found: Mapping[str, Sequence[Segment]]) -> None:
    """Writes a CSV row per segment: input, start and end in seconds, label, probability.

    Args:
      path: the file.
      found: segments of each input.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["input", "start_s", "end_s", "label", "probability"])
    for name, ones in found.items():
        for one in ones:
            times = f"{one.start:.3f}", f"{one.end:.3f}"
            writer.writerow([name, *times, one.label, f"{one.probability:.6f}"])
    write_aside(path, text.getvalue().encode())


def clock_time(seconds: float) -> str:
    """A time for people.

    Example:
      >>> clock_time(75.04), clock_time(3600.0)
      ('1:15.0', '1:00:00.0')
    """
    minutes, tenths = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"


# --- the picture -------------------------------------------------------------------------------


def draw_timeline(
    path: Path,
    name: str,
    made: Sequence[Piece],
    found: Sequence[Segment],
    class_names: Sequence[str],
    truth: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Draws the labels over time, and below them the probabilities of the likeliest classes.

    Args:
      path: PNG file.
      name: of the input, for the title.
      made: by `pieces`, at least one.
      found: by `segments`.
      class_names: in the order of their probabilities.
      truth: what is known of it, class with start and end, seconds: framed among the
        probabilities.
    """
    from matplotlib.patches import Rectangle

    peaks = np.max([piece.probabilities for piece in made], axis=0)
    shown = np.argsort(-peaks, kind="stable")[:_ROWS].tolist()
    shown += [class_names.index(label) for label in {s.label: 0 for s in found}]
    shown = list(dict.fromkeys(shown))
    heights = 1, max(2, len(shown)) * 0.6
    with picture(path, 10.0, 1.6 + 0.32 * len(shown), dots=120) as figure:
        labels, scores = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        _draw_labels(labels, found, {class_names[k]: f"C{n % 10}" for n, k in enumerate(shown)})
        labels.set_title(name, fontsize=10, loc="left")
        for piece in made:
            edges = ([piece.start, piece.end], np.arange(len(shown) + 1) - 0.5)
            cells = piece.probabilities[shown, None]
            mesh = scores.pcolormesh(*edges, cells, vmin=0, vmax=1, cmap="Blues")
        for label, start, end in truth:
            if class_names.index(label) in shown:
                row = shown.index(class_names.index(label)) - 0.5
                scores.add_patch(Rectangle((start, row), end - start, 1, fill=False, lw=1.5))
        scores.set_yticks(range(len(shown)), [class_names[k] for k in shown], fontsize=8)
        # In the colours of the labels above, not all of which have room for their names.
        for number, text in enumerate(scores.get_yticklabels()):
            text.set(color=f"C{number % 10}", weight="bold")
        scores.invert_yaxis()
        scores.set_xlim(made[0].start, made[-1].end)
        scores.set_xlabel("seconds")
        figure.colorbar(mesh, ax=scores, label="probability", pad=0.01)


def _draw_labels(axes: Any, found: Sequence[Segment], colours: Mapping[str, str]) -> None:
    end = found[-1].end if found else 1.0
    for one in found:
        span = one.end - one.start
        axes.barh(0, span, left=one.start, height=0.8, color=colours[one.label], alpha=0.75)
        if span > (0.02 + 0.008 * len(one.label)) * end:
            middle = one.start + span / 2
            axes.text(middle, 0, one.label, ha="center", va="center", fontsize=8, clip_on=True)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.set_ylabel("label", fontsize=8)
    axes.tick_params(labelbottom=False)


# --- the annotated video -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Caption:
    """What is written into a frame.

    Attributes:
      label: the class; '' for none yet.
      probability: of it.
      sure: whether it is at the threshold at least; drawn grey otherwise.
    """

    label: str
    probability: float
    sure: bool


class Captions:
    """What to write at which time, of a timeline that is known."""

    def __init__(self, made: Sequence[Piece], class_names: Sequence[str], threshold: float) -> None:
        self._starts = [piece.start for piece in made]
        self._all = [caption_of(piece.probabilities, class_names, threshold) for piece in made]

    def at(self, seconds: float) -> Caption:
        """The caption of a time: of its piece, or of the one before."""
        place = bisect.bisect_right(self._starts, seconds + 1e-6) - 1
        return self._all[place] if place >= 0 else Caption("", 0.0, False)


def caption_of(probabilities: np.ndarray, class_names: Sequence[str], threshold: float) -> Caption:
    """The most probable class."""
    best = int(probabilities.argmax())
    probability = float(probabilities[best])
    return Caption(class_names[best], probability, probability >= threshold)


class FlowInset:
    """Flow from the frame before, in colours, as the network's videos have it.

    Args:
      settings: name algorithm, size and bound.
    """

    def __init__(self, settings: RecordSettings) -> None:
        self._settings = dataclasses.replace(settings, flow_source="stored")
        self._encoder = Encoder(self._settings, "frames")
        self._before: np.ndarray | None = None

    def after(self, frame: np.ndarray) -> np.ndarray:
        """The picture, RGB, at the stored size; of the first frame no motion, which is white."""
        _, grey = self._encoder.shrink(frame)
        assert grey is not None, "stored flow has grey frames"
        before, self._before = grey if self._before is None else self._before, grey
        field = self._encoder.motion([before], [grey])[0]
        return optical_flow.flow_to_colour(field, self._settings.flow_bound * _FULL_COLOUR)


class AnnotatedVideo:
    """Writes frames with captions as H.264 in MP4: one frame for each, at its own time.

    Args:
      path: the file; it appears when all is written.

    Raises:
      ValueError: the name says that another format is expected.
      OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"annotated videos are written as .mp4, got {path}")
        self.path = path
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._aside.touch()  # libav would say only at the first frame that it cannot
        self._container = av.open(str(self._aside), "w", format="mp4")
        self._stream: av.VideoStream | None = None
        self._band = _Band()
        self._tick = -1

    def __enter__(self) -> "AnnotatedVideo":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the file, or removes it after an error or if nothing was written."""
        try:
            if self._stream is not None and kind is None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if self._stream is not None and kind is None:
                os.replace(self._aside, self.path)
        finally:
            self._aside.unlink(missing_ok=True)

    def write(
        self, frame: np.ndarray, seconds: float, caption: Caption, inset: np.ndarray | None = None
    ) -> None:
        """Appends a frame.

        Args:
          frame: RGB, uint8 `h w 3`.
          seconds: since the first.
          caption: what to write below.
          inset: a small picture for its upper right corner, RGB.
        """
        drawn = _enlarged(frame)
        if inset is not None:
            _put_inset(drawn, inset)
        drawn = np.concatenate([drawn, self._band.draw(drawn.shape[1], drawn.shape[0], caption)])
        if self._stream is None:
            self._stream = self._begin(*drawn.shape[:2])
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format="rgb24")
        self._tick = max(self._tick + 1, round(seconds / _TICK))
        picture.pts, picture.time_base = self._tick, _TICK
        self._container.mux(self._stream.encode(picture))

    def _begin(self, height: int, width: int) -> av.VideoStream:
        stream = self._container.add_stream("libx264", options={"crf": "20", "preset": "veryfast"})
        assert isinstance(stream, av.VideoStream), "libx264 makes videos"
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = _TICK
        return stream


def _enlarged(frame: np.ndarray) -> np.ndarray:
    """A copy, larger if it is small, with even sides as H.264 wants them."""
    height, width = frame.shape[:2]
    times = math.ceil(_LEAST_WIDTH / width)
    size = tuple(max(2, side * times // 2 * 2) for side in (width, height))
    if size == (width, height):
        return frame.copy()
    return cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)


def _put_inset(drawn: np.ndarray, inset: np.ndarray) -> None:
    """Draws a picture into the upper right corner, a quarter as wide as the frame at most."""
    height, width = drawn.shape[:2]
    scale = min(width / 4 / inset.shape[1], height / 2 / inset.shape[0])
    size = tuple(max(1, round(side * scale)) for side in (inset.shape[1], inset.shape[0]))
    small = cv2.resize(inset, size, interpolation=cv2.INTER_AREA)
    small = cv2.copyMakeBorder(small, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(40, 40, 40))
    small = small[:height, :width]
    drawn[: small.shape[0], width - small.shape[1] :] = small


class _Band:
    """The band below a frame: label, probability, and a bar as long as it."""

    def __init__(self) -> None:
        self._drawn: tuple[tuple[int, int, Caption], np.ndarray] | None = None

    def draw(self, width: int, height: int, caption: Caption) -> np.ndarray:
        """RGB, uint8 `h w 3`, even sides; the same as before is not drawn again."""
        key = width, height, caption
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = key, _band(width, max(24, height // 10 // 2 * 2), caption)
        return self._drawn[1]


def _band(width: int, height: int, caption: Caption) -> np.ndarray:
    picture = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(picture)
    colour = (60, 125, 200) if caption.sure else (80, 80, 80)
    draw.rectangle((0, 0, round(width * caption.probability), height), fill=colour)
    font = ImageFont.load_default(round(0.6 * height))
    percent = f"{caption.probability:.0%}" if caption.label else ""
    room = width - height // 2 - draw.textlength(percent, font) - height // 2
    label = caption.label
    while label and draw.textlength(label, font) > room:
        label = label[:-2] + "…" if len(label) > 2 else ""
    white = (255, 255, 255)
    draw.text((height // 4, height // 2), label, font=font, fill=white, anchor="lm")
    draw.text((width - height // 4, height // 2), percent, font=font, fill=white, anchor="rm")
    return np.asarray(picture)


def annotate(
    out: Path,
    source: FrameSource,
    captions: Captions,
    inset: FlowInset,
) -> int:
    """Writes a whole video with its timeline; returns how many frames.

    Args:
      out: the file.
      source: of its frames.
      captions: its timeline.
      inset: draws the flow.

    Raises:
      VideoFault, OSError: a frame cannot be read, or the file not written.
    """
    count = 0
    with AnnotatedVideo(out) as video:
        for frame in source:
            caption = captions.at(source.seconds)
            video.write(frame, source.seconds, caption, inset.after(frame))
            count += 1
    return count
