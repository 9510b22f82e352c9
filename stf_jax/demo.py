"""The demo set: real encoded videos whose classes cannot be told apart by any single cue.

Four pairs of classes. Within a pair everything is the same but one thing: the looks (appearance),
where to (direction), how fast (speed), or what comes first (order over the whole video). Take the
part of a network away that sees it, and that pair falls to chance.

    bobs_by_day / bobs_by_night              appearance: one frame is enough, flow shows nothing
    glides_left / glides_right               direction: neighbouring frames or flow
    circles_slowly / circles_fast            speed: the size of the flow
    hops_then_sways / sways_then_hops        order: the same movements, from rest to rest, in turn

A group is a landscape and the hue of its actor. Every group plays every class, with a ball and
with a star, and both file formats and (but for the first pair) day and night stand in every class
equally often, so none of them tells anything about the class.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.stream import VideoStream

from stf_jax import progress

CLASS_NAMES = (
    "bobs_by_day",
    "bobs_by_night",
    "circles_fast",
    "circles_slowly",
    "glides_left",
    "glides_right",
    "hops_then_sways",
    "sways_then_hops",
)
GROUPS = 16
TEST_GROUPS = 4  # the first ones
CLIPS_PER_GROUP = 2
SIDE = 96  # px
RATE = 25  # frames per second

# Raised when the same seed gives other videos.
_FORMAT = 2
_MARKER = "demo.json"

# Frames are drawn this much larger and then averaged, which smooths every edge.
_OVERSAMPLED = 2

_HOP_FRAMES, _SWAY_FRAMES = 14, 20
# The pair that differs in order: frames of hopping, of swaying, and of the rests before, between
# and after them. Were a movement longer when it comes first, or did a flow stack (4 fields) show
# the end of one and the start of the other, the pair could be told apart without its order.
_HOPS, _SWAYS, _REST = 2 * _HOP_FRAMES, (_SWAY_FRAMES, 3 * _SWAY_FRAMES // 2), 4

Path2D = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class DemoClip:
    """One video of the set; groups and clips count from 1."""

    class_name: str
    group: int
    number: int

    @property
    def suffix(self) -> str:
        """Half of the videos are H.264 in MP4, half MPEG-4 in AVI."""
        return ".mp4" if (self.group + self.number) % 2 else ".avi"

    @property
    def video_id(self) -> str:
        """Its path below the root."""
        name = f"{self.class_name}_g{self.group:02}_c{self.number:02}{self.suffix}"
        return f"{self.class_name}/{name}"

    @property
    def actor(self) -> str:
        """'ball' or 'star'."""
        return ("ball", "star")[self.number % 2]

    @property
    def night(self) -> bool:
        """Whether the landscape is dark: what the first pair of classes differs in."""
        if self.class_name.startswith("bobs_"):
            return self.class_name.endswith("_night")
        return (self.group // 2 + self.number) % 2 == 0


def clips() -> list[DemoClip]:
    """All videos of the set, by class, group and number."""
    return [
        DemoClip(name, group, number)
        for name in CLASS_NAMES
        for group in range(1, GROUPS + 1)
        for number in range(1, CLIPS_PER_GROUP + 1)
    ]


def generate(root: Path, *, seed: int) -> None:
    """Makes sure that `root` holds the demo videos of a seed.

    They are written aside and renamed: `root` holds all of them or none. The same seed gives the
    same pictures everywhere, and the same bytes where libav is the same.

    Raises:
      ValueError: `root` holds something else, or the videos of another seed.
    """
    stamp = {"format": _FORMAT, "seed": seed}
    if root.exists():
        _check_ours(root, stamp)
        if all((root / clip.video_id).is_file() for clip in clips()):
            return
    aside = root.with_name(f".{root.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    for name in CLASS_NAMES:
        (aside / name).mkdir(parents=True)
    everything = clips()
    landscapes = {group: _landscape(group, seed) for group in range(1, GROUPS + 1)}
    with progress.bar(total=len(everything), description="demo videos", unit="video") as bar:
        for clip in everything:
            encode(aside / clip.video_id, _render(clip, landscapes[clip.group], seed))
            bar.update()
    (aside / _MARKER).write_text(json.dumps(stamp) + "\n")
    if root.exists():
        shutil.rmtree(root)
    aside.rename(root)


def _check_ours(root: Path, stamp: dict[str, int]) -> None:
    marker = root / _MARKER
    if not marker.is_file():
        if root.is_dir() and not any(root.iterdir()):
            return
        raise ValueError(
            f"{root} exists and is no demo set (it has no {_MARKER}): the demo videos are "
            "generated there; choose another --config.data.root"
        )
    there = json.loads(marker.read_text())
    if there != stamp:
        raise ValueError(
            f"{root} holds the demo videos of {there}, expected {stamp}: choose another "
            "--config.data.root, or remove it"
        )


# --- motion ----------------------------------------------------------------------------------


def _motion(class_name: str, num_frames: int, chance: np.random.Generator) -> Path2D:
    """Where the actor's centre is at each frame, px."""
    x0, y0 = chance.uniform(-5, 5, 2) + (SIDE / 2, SIDE * 0.56)
    phase = chance.uniform(0, 2 * np.pi)
    if class_name.startswith("bobs_"):
        period = chance.uniform(28, 40)
        return lambda t: (x0 + 0 * t, y0 + 4 * np.sin(2 * np.pi * t / period + phase))
    if class_name.startswith("glides_"):
        speed = chance.uniform(1.6, 2.2) * (1 if class_name.endswith("right") else -1)
        start, width = chance.uniform(0, SIDE), SIDE + 24
        return lambda t: ((start + speed * t) % width - 12, y0 + 2 * np.sin(t / 6 + phase))
    if class_name.startswith("circles_"):
        period = chance.uniform(19, 24) if class_name.endswith("fast") else chance.uniform(40, 48)
        turn, radius = chance.choice((-1, 1)), chance.uniform(18, 22)
        angle = lambda t: turn * 2 * np.pi * t / period + phase  # noqa: E731
        return lambda t: (x0 + radius * np.cos(angle(t)), y0 - 4 + radius * np.sin(angle(t)))
    return _two_movements(class_name.startswith("hops"), num_frames, x0, y0 + 8)


def _num_frames(class_name: str, chance: np.random.Generator) -> int:
    """Length of a clip; of the pair that differs in order, by what both of it consist of."""
    if "_then_" in class_name:
        return 3 * _REST + _HOPS + int(chance.choice(_SWAYS))
    return int(chance.integers(52, 73))


def _two_movements(hops_first: bool, num_frames: int, x0: float, y0: float) -> Path2D:
    """Hopping and swaying, at rest in the middle before, between and after them."""
    sways = num_frames - 3 * _REST - _HOPS
    lengths = (_HOPS, sways) if hops_first else (sways, _HOPS)
    begins = {True: _REST, False: 2 * _REST + lengths[0]}  # of what comes first, and of the other

    def path(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hopped = np.clip(t - begins[hops_first], 0, _HOPS)
        swayed = np.clip(t - begins[not hops_first], 0, sways)
        x = 20 * np.sin(2 * np.pi * swayed / _SWAY_FRAMES)
        y = 22 * np.abs(np.sin(np.pi * hopped / _HOP_FRAMES))
        return x0 + x, y0 - y

    return path


# --- pictures --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Landscape:
    """A group: its picture, larger than a frame, and the hue of its actor."""

    picture: np.ndarray
    actor_hue: float


_MARGIN = 6  # px that the camera may drift
_MOONLIGHT = np.array([0.25, 0.3, 0.45])  # of red, green and blue


def _landscape(group: int, seed: int) -> _Landscape:
    """Sky, sun, two rows of hills and flowers, in the colours of one time of day."""
    chance = np.random.default_rng((seed, 0, group))
    side = (SIDE + 2 * _MARGIN) * _OVERSAMPLED
    # Golden steps around the colour circle keep the groups apart.
    hue = (group * 0.618034 + chance.uniform(0, 0.1)) % 1.0
    down = np.linspace(0, 1, side)[:, None, None]
    top, bottom = _colour(hue, 0.55, 0.75), _colour(hue + 0.08, 0.25, 0.98)
    picture = np.broadcast_to((1 - down) * np.array(top) + down * np.array(bottom), (side, side, 3))
    picture = np.ascontiguousarray(picture.astype(np.uint8))
    sun = (int(chance.uniform(0.15, 0.85) * side), int(chance.uniform(0.1, 0.3) * side))
    cv2.circle(picture, sun, int(side * 0.07), _colour(hue + 0.1, 0.12, 1.0), -1, cv2.LINE_AA)
    across = np.arange(side)
    for row, (level, light) in enumerate(((0.62, 0.62), (0.78, 0.42))):
        waves = np.zeros(side)
        for k in (1, 2, 3):
            turns = across / side * 2 * np.pi * k + chance.uniform(0, 6)
            waves += chance.uniform(0.02, 0.05) * np.sin(turns)
        ridge = np.stack([across, (level + waves) * side], 1).astype(np.int32)
        hill = np.concatenate([ridge, [[side, side], [0, side]]]).astype(np.int32)
        cv2.fillPoly(picture, [hill], _colour(hue + 0.45 + 0.05 * row, 0.45, light), cv2.LINE_AA)
    for _ in range(60):  # something for the flow to hold on to
        x, y = chance.uniform(0, 1), chance.uniform(0, 1) ** 0.5
        light = chance.uniform(0.35, 1.0)
        colour = _colour(hue + chance.uniform(0.3, 0.7), 0.35, light)
        centre = (int(x * side), int(y * side))
        cv2.circle(picture, centre, int(chance.integers(2, 5)), colour, -1, cv2.LINE_AA)
    return _Landscape(picture, hue + 0.5 + chance.uniform(-0.12, 0.12))


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """RGB bytes of a colour given by hue, saturation and value, all from 0 to 1."""
    hsv = np.array([[[hue % 1.0 * 360, saturation, value]]], np.float32)
    red, green, blue = (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255).round().astype(int)
    return int(red), int(green), int(blue)


def _render(clip: DemoClip, landscape: _Landscape, seed: int) -> Iterator[np.ndarray]:
    """Yields the frames of a clip: uint8 [96 96 3], RGB."""
    label = CLASS_NAMES.index(clip.class_name)
    chance = np.random.default_rng((seed, 1, label, clip.group, clip.number))
    num_frames = _num_frames(clip.class_name, chance)
    size = chance.uniform(14, 17)
    picture = landscape.picture
    if clip.night:
        picture = (picture * _MOONLIGHT).astype(np.uint8)
    t = np.arange(num_frames, dtype=np.float64)
    x, y = _motion(clip.class_name, num_frames, chance)(t)
    drift, phase = chance.uniform(0.5, 2, 2), chance.uniform(0, 6, 2)
    for frame in range(num_frames):
        # The camera drifts a little, as if held by hand: still backgrounds would be too easy.
        shift = _MARGIN + drift * np.sin(frame / 12 + phase)
        matrix = np.array([[1, 0, -shift[0]], [0, 1, -shift[1]]]) * _OVERSAMPLED
        matrix[:, :2] /= _OVERSAMPLED
        canvas = cv2.warpAffine(picture, matrix, (SIDE * _OVERSAMPLED,) * 2, flags=cv2.INTER_LINEAR)
        _draw_actor(canvas, clip.actor, (x[frame], y[frame]), size, landscape.actor_hue)
        yield cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def _draw_actor(
    canvas: np.ndarray, shape: str, centre: tuple[float, float], size: float, hue: float
) -> None:
    """Draws a ball or a five-pointed star with two eyes."""
    body, edge = _colour(hue, 0.45, 1.0), _colour(hue, 0.7, 0.22)
    bits = 4  # OpenCV's way to place things between pixels
    unit = _OVERSAMPLED * 2**bits
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.5, 1.2)
    for scale, colour in ((1.0, edge), (0.85, body)):
        if shape == "ball":
            at = tuple(int(round(c * unit)) for c in centre)
            cv2.circle(canvas, at, round(size * scale * unit), colour, -1, cv2.LINE_AA, bits)
        else:
            points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] * size * scale
            corners = np.rint((points + centre) * unit).astype(np.int32)
            cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA, bits)
    for side in (-1, 1):
        eye = (centre[0] + side * size * 0.22, centre[1] - size * 0.1)
        place = tuple(int(round(c * unit)) for c in eye)
        cv2.circle(canvas, place, round(size * 0.13 * unit), edge, -1, cv2.LINE_AA, bits)


def encode(path: Path, frames: Iterable[np.ndarray]) -> None:
    """Encodes frames as H.264 (.mp4) or MPEG-4 part 2 (.avi); one thread, so bytes repeat.

    Args:
      path: where to.
      frames: RGB, uint8 `SIDE SIDE 3`.
    """
    codec, options = {
        # Without look-ahead: with it, x264 does not repeat its bytes even on one thread.
        ".mp4": ("libx264", {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}),
        ".avi": ("mpeg4", {"qmin": "3", "qmax": "3"}),
    }[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        assert isinstance(stream, VideoStream)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
