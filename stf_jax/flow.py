"""Frames -> optical flow; flow -> bytes and back; flow -> colours.

A field is float32 `h w 2`: u (right) and v (down), in pixels per frame, of the motion that takes
the first frame to the second.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

# 'tvl1' is `stf_jax.tvl1`; the others are OpenCV's, and so is what `make_flow` makes.
OPENCV_ALGORITHMS = ("dis", "dis_quick", "tvl1_opencv", "farneback")
FLOW_ALGORITHMS = ("tvl1", *OPENCV_ALGORITHMS)

# What no motion is stored as; the same for every bound (SPEC 2.8).
ZERO_FLOW = 128

# Pairs whose flow is computed in one call, by algorithms that gain from it.
PAIRS_PER_CALL = 8

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TvL1Settings:
    """How `stf_jax.tvl1` computes flow; part of the stamp of records that hold its fields.

    Args:
      attachment: weight of a grey level's difference against a px of the field's variation: more
        follows the images, and their noise, more closely.
      step: length of the primal steps, px; the dual ones are 1 / (8 step).
      warps: linearisations at every size of the pyramid.
      iterations: primal-dual iterations on each.
      median: side of the median filter before each, px, odd; 1 for none.
      coarsest: the pyramid halves the images as long as their shorter side keeps this many px.

    Raises:
      ValueError: a value that cannot work (names it).
    """

    attachment: float
    step: float
    warps: int
    iterations: int
    median: int
    coarsest: int

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, low, high in (
            ("attachment", 1e-4, 100),
            ("step", 1e-3, 100),
            ("warps", 1, 100),
            ("iterations", 1, 10_000),
            ("median", 1, 7),
            ("coarsest", 4, 2048),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"records.tvl1.{name} must be in [{low}, {high}], got {value}")
        if self.median % 2 == 0:
            raise ValueError(f"records.tvl1.median must be odd, got {self.median}")


def check_algorithm(algorithm: str) -> None:
    """Checks the name of an algorithm.

    Raises:
      ValueError: it is none of `FLOW_ALGORITHMS` (lists them).
    """
    if algorithm not in FLOW_ALGORITHMS:
        known = ", ".join(FLOW_ALGORITHMS)
        raise ValueError(f"unknown flow algorithm {algorithm!r}; choose one of: {known}")


def make_flow(algorithm: str) -> FlowFunction:
    """Returns the function by which OpenCV computes flow from two grey frames.

    Flow of one algorithm is no stand-in for another's: a network trained on one fails on the
    other.

    Args:
      algorithm: 'dis' (Dense Inverse Search, medium preset: fast), 'dis_quick' (the same with fewer
        patches and refinements: two thirds of the time), 'tvl1_opencv' (TV-L1 with OpenCV's
        defaults: by far the slowest) or 'farneback'.

    Returns:
      A function of (previous, following), both uint8 `h w`, to float32 `h w 2`: u right, v down,
      px per frame. It keeps nothing between calls and gives the same bits on any number of
      threads.

    Raises:
      ValueError: OpenCV has no such algorithm (lists its own).
    Source: SPEC 2.1.
    """
    makers: dict[str, Callable[[], FlowFunction]] = {
        "dis": _dis,
        "dis_quick": _dis_quick,
        "tvl1_opencv": _tvl1,
        "farneback": _farneback,
    }
    if algorithm not in makers:
        known = ", ".join(OPENCV_ALGORITHMS)
        raise ValueError(f"OpenCV's flow has no algorithm {algorithm!r}; choose one of: {known}")
    compute = makers[algorithm]()

    def flow(previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        threads = cv2.getNumThreads()
        if threads != 1:
            cv2.setNumThreads(1)
        try:
            return compute(previous, following)
        finally:
            if threads != 1:
                cv2.setNumThreads(threads)

    return flow


def use_one_thread() -> None:
    """Sets OpenCV to one thread for the whole process, for who computes flow in several threads.

    The functions of `make_flow` set it for themselves and back again, which would not do: the one
    that ends first would set it back for the others.
    """
    cv2.setNumThreads(1)


def _dis() -> FlowFunction:
    def compute(previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        dis = cv2.DISOpticalFlow_create(  # type: ignore[attr-defined]
            cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
        )
        return dis.calc(previous, following, None)

    return compute


def _dis_quick() -> FlowFunction:
    def compute(previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        dis = cv2.DISOpticalFlow_create(  # type: ignore[attr-defined]
            cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
        )
        # Patches every 4 px instead of 3, and 3 refinements instead of 5: the error after warping
        # is that of the preset (experiments/bench/prepare.py measures both).
        dis.setPatchStride(4)
        dis.setVariationalRefinementIterations(3)
        return dis.calc(previous, following, None)

    return compute


def _tvl1() -> FlowFunction:
    def compute(previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        tvl1 = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
        return tvl1.calc(previous, following, None)

    return compute


def _farneback() -> FlowFunction:
    def compute(previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        return cv2.calcOpticalFlowFarneback(
            previous,
            following,
            None,
            pyr_scale=0.5,
            levels=5,
            winsize=15,
            iterations=3,
            poly_n=5,
            poly_sigma=1.1,
            flags=0,
        )

    return compute


def to_grey(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """Brightness of an RGB frame: 0.299 R + 0.587 G + 0.114 B."""
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def resize_flow(
    flow: Float32[np.ndarray, "h w 2"], size: tuple[int, int]
) -> Float32[np.ndarray, "h2 w2 2"]:
    """Resizes a field and scales its values with it: u by the ratio of widths, v of heights.

    Args:
      flow: px per frame at its own size.
      size: (height, width) of the result.

    Returns:
      px per frame at the new size.
    Source: SPEC 2.9.
    """
    height, width = size
    shrinks = height <= flow.shape[0] and width <= flow.shape[1]
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(flow, (width, height), interpolation=mode)
    scale = np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
    return resized * scale


def quantise(flow: Float32[np.ndarray, "*s"], bound: float) -> UInt8[np.ndarray, "*s"]:
    """Stores flow in bytes: clip to +-bound, then round(255 (v + bound) / (2 bound)).

    Halves round up, so 0 is `ZERO_FLOW` whatever the bound.

    Args:
      flow: px per frame.
      bound: largest displacement that is kept, px per frame.
    Source: SPEC 2.8.

    Example:
      >>> quantise(np.array([-25, -20, 0, 20], np.float32), 20.0)
      array([  0,   0, 128, 255], dtype=uint8)
    """
    # Written so that 0 comes out as 127.5 exactly; (v + bound) / (2 bound) does not for any bound.
    scaled = np.clip(flow, -bound, bound) * np.float32(127.5 / bound) + np.float32(127.5)
    return np.floor(scaled + np.float32(0.5)).astype(np.uint8)


def dequantise(quantised: UInt8[np.ndarray, "*s"], bound: float) -> Float32[np.ndarray, "*s"]:
    """Inverts `quantise` to within half a step, bound / 255.

    The 256 levels lie symmetrically around zero, which falls between 127 and 128: no motion, stored
    as 128, comes back as +bound / 255 (0.08 px for a bound of 20). Who needs zero to be zero
    subtracts `ZERO_FLOW` from the bytes instead (SPEC 2.10).

    Args:
      quantised: what `quantise` returned.
      bound: the bound it was given.

    Returns:
      px per frame.
    """
    return (quantised.astype(np.float32) - np.float32(127.5)) * np.float32(bound / 127.5)


@lru_cache(maxsize=1)
def colour_wheel() -> np.ndarray:
    """The 55 hues of the wheel, float64 [55 3] in [0, 1]: six arcs between full colours."""
    red, yellow, green, cyan, blue, magenta = np.array(
        [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]], np.float64
    )
    arcs = (
        (red, yellow, 15),
        (yellow, green, 6),
        (green, cyan, 4),
        (cyan, blue, 11),
        (blue, magenta, 13),
        (magenta, red, 6),
    )
    return np.concatenate(
        [start + (stop - start) * np.arange(n)[:, None] / n for start, stop, n in arcs]
    )


def flow_to_colour(
    flow: Float32[np.ndarray, "h w 2"], max_magnitude: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws a field in the Middlebury colours: hue is direction, saturation is speed.

    Right is red, down yellow, left light blue, up violet; no motion is white. Faster than
    `max_magnitude` is drawn darker.

    Args:
      flow: px per frame.
      max_magnitude: speed of the full colour, px per frame; None for the fastest in the field.

    Returns:
      RGB.
    Source: Baker et al., A Database and Evaluation Methodology for Optical Flow, IJCV 2011.
    """
    wheel = colour_wheel()
    u, v = flow[..., 0].astype(np.float64), flow[..., 1].astype(np.float64)
    speed = np.hypot(u, v)
    speed = speed / max(float(speed.max()) if max_magnitude is None else max_magnitude, 1e-9)
    # The wheel starts at the right and goes round by way of down, left and up.
    place = np.mod(np.arctan2(v, u) / (2 * np.pi), 1.0) * (len(wheel) - 1)
    below = np.floor(place).astype(int)
    share = (place - below)[..., None]
    hue = (1 - share) * wheel[below] + share * wheel[(below + 1) % len(wheel)]
    speed = speed[..., None]
    colour = np.where(speed <= 1, 1 - speed * (1 - hue), 0.75 * hue)
    return np.rint(255 * colour).astype(np.uint8)
