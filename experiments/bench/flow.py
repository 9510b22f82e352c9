r"""Optical flow: accuracy and time of `stf_jax.tvl1` against OpenCV's, in turn in one run.

    python experiments/bench/flow.py

Writes `experiments/results/bench_flow.csv`: `case, ours, theirs, ratio, unit, spread` and where it
was measured. Ours is 'tvl1' with the settings of `configs/ucf101.py` unless the case says
otherwise; theirs is OpenCV's TV-L1 with its defaults ('tvl1_opencv') unless the case names another.
Ratios are theirs / ours: above 1, ours is the smaller.

End-point errors are against rendered motion at 224x224: textures are sums of waves, evaluated at
the very place that each pixel of the second frame came from, so the truth is exact. Errors of real
frames are |I1(x + flow) - I0(x)|, in grey levels, on pairs of UCF101 clips (groups 4 and later) at
224x224 from STF_DATA. Times are of two processes with one thread each, which share the pairs, so
that both cores work for whatever is timed; the rounds alternate.
"""

import csv
import functools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_OUT = flags.DEFINE_string("out", "experiments/results/bench_flow.csv", "The table.")

SIZE = 224
KINDS = ("translation", "rotation", "zoom", "occlusion")
MAGNITUDES = (1.0, 3.0, 6.0, 10.0, 15.0)  # mean, px
SEEDS = 3
REAL_PAIRS = 24
TIMED_PAIRS = 16  # whole calls of 8 for each process
ROUNDS = 3
PROCESSES = 2
OTHERS = ("tvl1_opencv", "farneback", "dis")

Coordinates = tuple[np.ndarray, np.ndarray]
Pairs = tuple[np.ndarray, np.ndarray]


def texture(seed: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A random sum of waves 4 to 80 px long, as a function of x and y: grey levels, float64."""
    draw = np.random.default_rng(seed)
    count, shortest, longest = 120, 4.0, 80.0
    lengths = np.exp(draw.uniform(np.log(shortest), np.log(longest), count))
    angles, phases = draw.uniform(0, 2 * np.pi, (2, count))
    heights = np.sqrt(lengths)
    heights *= 45 / np.sqrt((heights**2).sum() / 2)
    waves = list(zip(heights, 2 * np.pi / lengths, angles, phases, strict=True))

    def grey(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        value = np.full(x.shape, 128.0)
        for height, number, angle, phase in waves:
            value += height * np.cos(number * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        return value

    return grey


def render(
    kind: str, px: float, size: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two frames of a moving texture and the true flow.

    Args:
      kind: one of `KINDS`. 'occlusion' is a disc that moves over its ground, each by half of `px`
        and away from the other.
      px: length of the motion; of rotation and zoom the mean over a square image, nearly.
      size: (height, width).
      seed: of texture and direction.

    Returns:
      The frames, uint8 `h w`, and float32 `h w 2`.
    """
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    centre = ((width - 1) / 2, (height - 1) / 2)
    angle = np.random.default_rng(seed + 1000).uniform(0, 2 * np.pi)
    step = px * np.array([np.cos(angle), np.sin(angle)])
    mean_radius = 0.3826 * min(size)  # of a square of that side
    matrix, ground = np.eye(2), np.zeros(2)
    if kind == "rotation":
        turn = 2 * np.arcsin(px / mean_radius / 2)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    elif kind == "zoom":
        matrix = (1 + px / mean_radius) * np.eye(2)
    else:
        ground = step if kind == "translation" else -step / 2

    def moved(matrix: np.ndarray, shift: np.ndarray) -> tuple[Coordinates, Coordinates]:
        """Where each pixel goes to, and where each pixel of the second frame came from."""
        there, back = [], np.linalg.inv(matrix)
        for k in (0, 1):
            there.append(matrix[k, 0] * (x - centre[0]) + matrix[k, 1] * (y - centre[1]))
            there[k] += centre[k] + shift[k]
        dx, dy = x - centre[0] - shift[0], y - centre[1] - shift[1]
        origin = [back[k, 0] * dx + back[k, 1] * dy + centre[k] for k in (0, 1)]
        return (there[0], there[1]), (origin[0], origin[1])

    grey = texture(seed)
    goes, came = moved(matrix, ground)
    first, second = grey(x, y), grey(*came)
    flow = np.stack([goes[0] - x, goes[1] - y], axis=-1)
    if kind == "occlusion":
        cover, radius = texture(seed + 500), 0.25 * min(size)
        goes, came = moved(np.eye(2), step / 2)
        covered = np.hypot(x - centre[0], y - centre[1]) < radius
        first = np.where(covered, cover(x, y), first)
        second = np.where(
            np.hypot(came[0] - centre[0], came[1] - centre[1]) < radius, cover(*came), second
        )
        flow[covered] = np.stack([goes[0] - x, goes[1] - y], axis=-1)[covered]
    frames = [np.clip(np.rint(frame), 0, 255).astype(np.uint8) for frame in (first, second)]
    return frames[0], frames[1], flow.astype(np.float32)


def real_pairs(count: int) -> Pairs:
    """Neighbouring frames of as many clips of UCF101 as grey squares: two uint8 `n h w`."""
    from stf_jax import flow
    from stf_jax.video import read_video

    if "STF_DATA" not in os.environ:
        raise app.UsageError("STF_DATA must name a folder with clips of UCF101 (v_*_g04_c01.avi)")
    clips = sorted(Path(os.environ["STF_DATA"]).rglob("v_*_g*_c*.avi"))
    clips = [clip for clip in clips if int(clip.stem.rsplit("_g", 1)[1][:2]) > 3]
    draw = random.Random(0)
    pairs = []
    for clip in draw.sample(clips, count):
        frames = read_video(clip).frames
        k = draw.randrange(len(frames) - 1)
        squashed = [
            cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            for frame in frames[k : k + 2]
        ]
        pairs.append([flow.to_grey(frame) for frame in squashed])
    first, second = zip(*pairs, strict=True)
    return np.stack(first), np.stack(second)


def compute(algorithm: str, changes: dict[str, Any], first: Any, second: Any) -> np.ndarray:
    """Flow of pairs of frames, float32 `n h w 2`."""
    from configs import ucf101
    from stf_jax import flow

    if algorithm == "tvl1":
        from stf_jax import tvl1

        settings = flow.TvL1Settings(**{**ucf101.get_config().records.tvl1, **changes})
        return tvl1.flow_on_cpu(first, second, settings)
    one = flow.make_flow(algorithm)
    return np.stack([one(a, b) for a, b in zip(first, second, strict=True)])


def shared(
    pool: Executor, algorithm: str, pairs: Pairs, changes: dict[str, Any] | None = None
) -> np.ndarray:
    """`compute` by all processes, each with its share of the pairs."""
    shares = [np.array_split(frames, PROCESSES) for frames in pairs]
    names, settings = [algorithm] * PROCESSES, [changes or {}] * PROCESSES
    return np.concatenate(list(pool.map(compute, names, settings, *shares)))


def endpoint_error(field: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance between two fields, px."""
    return float(np.hypot(*np.moveaxis(field - truth, -1, 0)).mean())


def brightness_errors(fields: np.ndarray, pairs: Pairs) -> list[float]:
    """Mean |I1(x + flow) - I0(x)| of each pair, grey levels; cubic interpolation."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    errors = []
    for field, first, second in zip(fields, *pairs, strict=True):
        warped = cv2.remap(
            second.astype(np.float32), x + field[..., 0], y + field[..., 1], cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip
        errors.append(float(np.abs(warped - first).mean()))
    return errors


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(case: str, ours: Sequence[float], theirs: Sequence[float], unit: str) -> dict[str, Any]:
    """A line of the table: medians, their ratio, and smallest to largest of each side."""
    middle = statistics.median(ours), statistics.median(theirs)
    return {
        "case": case,
        "ours": f"{middle[0]:.4g}",
        "theirs": f"{middle[1]:.4g}",
        "ratio": f"{middle[1] / middle[0]:.3g}",
        "unit": unit,
        "spread": f"{min(ours):.3g}-{max(ours):.3g} / {min(theirs):.3g}-{max(theirs):.3g}",
    }


def accuracy(pool: Executor, real: Pairs) -> list[dict[str, Any]]:
    """Errors on rendered and on real pairs, and how they depend on the settings."""
    cases = [(kind, px) for kind in KINDS for px in MAGNITUDES]
    seeds = range(SEEDS * len(cases))
    scenes = [render(*cases[k // SEEDS], (SIZE, SIZE), seed=k) for k in seeds]
    first, second, truth = (np.stack(arrays) for arrays in zip(*scenes, strict=True))

    def errors(algorithm: str, **changes: Any) -> tuple[np.ndarray, list[float]]:
        fields = shared(pool, algorithm, (first, second), changes)
        ends = [endpoint_error(f, t) for f, t in zip(fields, truth, strict=True)]
        grey = brightness_errors(shared(pool, algorithm, real, changes), real)
        return np.array(ends).reshape(-1, SEEDS), grey

    ours, our_grey = errors("tvl1")
    rows = []
    for name in OTHERS:
        theirs, their_grey = errors(name)
        against = "" if name == "tvl1_opencv" else f", against {name}"
        if name == "tvl1_opencv":
            tvl1_opencv = theirs, their_grey
            for (kind, px), a, b in zip(cases, ours.tolist(), theirs.tolist(), strict=True):
                rows.append(row(f"end-point error, {kind} {px:g} px", a, b, "px"))
        mean = ours.mean(axis=0).tolist(), theirs.mean(axis=0).tolist()
        rows.append(row(f"end-point error, mean of all motions{against}", *mean, "px"))
        means = [float(np.mean(our_grey))], [float(np.mean(their_grey))]
        case = f"brightness error, mean of {REAL_PAIRS} real pairs{against}"
        rows.append(row(case, *means, "grey level"))
    for change in (
        {"iterations": 5}, {"iterations": 10}, {"iterations": 40}, {"warps": 2}, {"warps": 5},
        {"median": 3}, {"attachment": 0.05}, {"attachment": 0.2},
    ):  # fmt: skip
        name = ", ".join(f"{key}={value}" for key, value in change.items())
        ends, grey = errors("tvl1", **change)
        mean = ends.mean(axis=0).tolist(), tvl1_opencv[0].mean(axis=0).tolist()
        rows.append(row(f"end-point error, mean of all motions, ours with {name}", *mean, "px"))
        means = [float(np.mean(grey))], [float(np.mean(tvl1_opencv[1]))]
        rows.append(row(f"brightness error, ours with {name}", *means, "grey level"))
    return rows


def times(pool: Executor, real: Pairs) -> list[dict[str, Any]]:
    """Milliseconds per pair of every algorithm, in turn."""
    pairs = real[0][:TIMED_PAIRS], real[1][:TIMED_PAIRS]
    works: dict[str, Callable[[], Any]] = {
        name: functools.partial(shared, pool, name, pairs) for name in ("tvl1", *OTHERS)
    }
    both = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
    cv2.setNumThreads(PROCESSES)
    works["tvl1_opencv in one process, 2 threads"] = lambda: [
        both.calc(a, b, None) for a, b in zip(*pairs, strict=True)
    ]
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            took = 1000 * seconds(work) / TIMED_PAIRS
            if turn:  # the first compiles, and warms the others up too
                spent[name].append(took)
    ours = spent.pop("tvl1")
    return [row(f"time per pair, against {k}", ours, v, "ms") for k, v in spent.items()]


def main(argv: Sequence[str]) -> None:
    """Measures everything and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    real = real_pairs(REAL_PAIRS)
    # Read by JAX in the processes below: one thread each, and no GPU.
    os.environ.update(NPROC="1", JAX_PLATFORMS="cpu")
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        rows = times(pool, real) + accuracy(pool, real)
    from stf_jax.main import environment

    facts = environment()
    facts = {key: facts[key] for key in ("commit", "jax", "machine")}
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(measured | facts for measured in rows)
    for measured in rows:
        print(*measured.values(), sep=" | ")


if __name__ == "__main__":
    app.run(main)
