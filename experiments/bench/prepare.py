"""How fast videos become records, by stage and in all, against the way peers do it.

    STF_DATA=... python experiments/bench/prepare.py [--clips=32] [--rounds=3]

On real clips (`$STF_DATA/ucf101_8`, spread over its classes), stored at 256x256. The stages run on
one core, ours and theirs in turn, clip by clip; the whole runs on every core: ours by
`stf_jax.records.prepare_records` with worker start-up, packing and digests, theirs as frame
extraction scripts do it, one process per core, OpenCV for decoding and the same flow, and a JPEG
file for each frame, each u and each v.

Writes experiments/results/bench_data.csv; a case that is there already is replaced, others stay.
  ours, theirs    median frames (or pairs) per second, or as `unit` says; *_spread: half the range
  ratio           ours / theirs: of rates, above 1 is faster
"""

import functools
import io
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.table import processor, write_rows  # noqa: E402

_CLIPS = flags.DEFINE_integer("clips", 32, "Videos to prepare.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that the whole is timed.")
_ALGORITHMS = flags.DEFINE_list("algorithms", ["dis", "dis_quick"], "Flow, for the whole.")
_OUT = flags.DEFINE_string("out", "experiments/results/bench_data.csv", "The table.")

SIDE = 256
FRAMES = 40  # of a clip, for the stages
QUALITY = 95
BOUND = 20.0
COLUMNS = (
    "case",
    "ours",
    "theirs",
    "ratio",
    "unit",
    "ours_spread",
    "theirs_spread",
    "rounds",
    "commit",
    "machine",
)


def chosen_clips(count: int) -> list[Path]:
    """Clips from all over the data set."""
    root = Path(os.environ["STF_DATA"], "ucf101_8", "UCF-101")
    clips = sorted(root.glob("*/*.avi"))
    return clips[:: max(1, len(clips) // count)][:count]


def settings_of(root: Path, algorithm: str) -> Any:
    """How the clips are stored."""
    from configs import ucf101
    from stf_jax.flow import TvL1Settings
    from stf_jax.prepare import RecordSettings

    tvl1 = TvL1Settings(**ucf101.get_config().records.tvl1)
    return RecordSettings(
        root=str(root), size=SIDE, resize="squash", flow_size=SIDE, flow_source="stored",
        flow_algorithm=algorithm, tvl1=tvl1,
        flow_bound=BOUND, jpeg_quality=QUALITY, min_truncated_frames=24, max_pixels=10**7,
        max_frames=20_000, max_seconds=1200.0, timeout=600.0, workers=0,
    )  # fmt: skip


# --- stages ----------------------------------------------------------------------------------


def _decoded(path: Path) -> list[np.ndarray]:
    from stf_jax.video import VideoReader

    frames: list[np.ndarray] = []
    for frame in VideoReader(path):
        frames.append(frame)
        if len(frames) == FRAMES:
            break
    return frames


def _decoded_by_opencv(path: Path) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames: list[np.ndarray] = []
    while len(frames) < FRAMES:
        found, frame = capture.read()
        if not found:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    return frames


def _pillow_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def clip_rates(clip: Path) -> dict[str, tuple[float, float]]:
    """Frames per second and core of each stage, ours and theirs, on one clip."""
    from stf_jax import flow as optical_flow
    from stf_jax import prepare

    frames = _decoded(clip)
    small = [prepare._resize(frame, (SIDE, SIDE)) for frame in frames]
    greys = [optical_flow.to_grey(frame) for frame in small]
    pairs = list(zip(greys, greys[1:], strict=False))
    dis, tvl1 = optical_flow.make_flow("dis"), optical_flow.make_flow("tvl1_opencv")
    fields = [dis(*pair) for pair in pairs]
    pictures = [Image.fromarray(frame) for frame in frames]
    stacked = [prepare._u_above_v(field, BOUND) for field in fields]

    def both(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
        return _rate(ours), _rate(theirs)

    quick = optical_flow.make_flow("dis_quick")
    return {
        "decode (theirs: OpenCV)": both(lambda: _decoded(clip), lambda: _decoded_by_opencv(clip)),
        "resize (theirs: Pillow)": both(
            lambda: [prepare._resize(frame, (SIDE, SIDE)) for frame in frames],
            lambda: [p.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for p in pictures],
        ),
        "flow, dis (theirs: OpenCV's TV-L1)": both(
            lambda: [dis(*pair) for pair in pairs], lambda: [tvl1(*pair) for pair in pairs[:1]]
        ),
        "flow, dis_quick (theirs: dis)": both(
            lambda: [quick(*pair) for pair in pairs], lambda: [dis(*pair) for pair in pairs]
        ),
        "encode frames (theirs: Pillow)": both(
            lambda: [prepare._jpeg(cv2.cvtColor(f, cv2.COLOR_RGB2BGR), QUALITY) for f in small],
            lambda: [_pillow_jpeg(frame) for frame in small],
        ),
        "quantise flow and stack it": (
            _rate(lambda: [prepare._u_above_v(field, BOUND) for field in fields]),
            math.nan,
        ),
        "encode flow (theirs: Pillow)": both(
            lambda: [prepare._jpeg(picture, QUALITY) for picture in stacked],
            lambda: [_pillow_jpeg(picture) for picture in stacked],
        ),
    }


def warped_error(previous: np.ndarray, following: np.ndarray, field: np.ndarray) -> float:
    """Mean difference in grey levels between a frame and the next one, warped back by the flow."""
    rows, columns = np.mgrid[: previous.shape[0], : previous.shape[1]].astype(np.float32)
    back = cv2.remap(
        following,
        columns + field[..., 0],
        rows + field[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return float(np.abs(back.astype(np.float32) - previous).mean())


def error_row(clips: Sequence[Path]) -> dict[str, Any]:
    """The error after warping of 'dis_quick' against that of 'dis'."""
    from stf_jax import flow as optical_flow
    from stf_jax import prepare

    errors: dict[str, list[float]] = {"dis_quick": [], "dis": []}
    for clip in clips:
        greys = [
            optical_flow.to_grey(prepare._resize(frame, (SIDE, SIDE))) for frame in _decoded(clip)
        ]
        for name, found in errors.items():
            compute = optical_flow.make_flow(name)
            pairs = list(zip(greys[::4], greys[1::4], strict=False))
            found.append(statistics.mean(warped_error(a, b, compute(a, b)) for a, b in pairs))
    case = "error after warping, dis_quick (theirs: dis)"
    return _row(case, "grey levels", errors["dis_quick"], errors["dis"], digits=3)


def _rate(work: Callable[[], Sequence[Any]]) -> float:
    began = time.perf_counter()
    return len(work()) / (time.perf_counter() - began)


def stage_rates(clips: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of the stages."""
    cv2.setNumThreads(1)
    rates = [clip_rates(clip) for clip in clips]
    return [
        _row(f"stage, one core: {case}", "frames/s", *zip(*(r[case] for r in rates), strict=True))
        for case in rates[0]
    ]


# --- the whole -------------------------------------------------------------------------------


def _index(clips: Sequence[Path]) -> Any:
    from stf_jax.datasets import ClipEntry, VideoIndex

    root = clips[0].parents[1]
    entries = [
        ClipEntry(clip.relative_to(root).as_posix(), 0, clip.name, "train") for clip in clips
    ]
    return VideoIndex(
        name="bench", root=root, class_names=("any",), entries=tuple(entries), protocol="none",
        leaky=False, overlap=0.0, notes=(), missing=0,
    )  # fmt: skip


def ours(clips: Sequence[Path], folder: Path, algorithm: str) -> float:
    """Frames per second of the whole."""
    from stf_jax.records import prepare_records

    began = time.perf_counter()
    records = prepare_records(_index(clips), settings_of(folder, algorithm))
    took = time.perf_counter() - began
    return sum(row.num_frames for row in records.rows.values()) / took


def _extract(clip: Path, folder: Path, algorithm: str) -> int:
    """What a frame extraction script does to one video; returns its frames."""
    from stf_jax import flow as optical_flow

    cv2.setNumThreads(1)
    out = folder / clip.stem
    out.mkdir()
    compute = optical_flow.make_flow(algorithm)
    quality = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    previous, count = None, 0
    while True:
        found, frame = capture.read()
        if not found:
            return count
        count += 1
        frame = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(out / f"img_{count:05}.jpg"), frame, quality)
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        if previous is not None:
            flow = compute(previous, grey)
            levels = np.rint((np.clip(flow, -BOUND, BOUND) + BOUND) * (255 / (2 * BOUND)))
            for k, name in enumerate("xy"):
                path = str(out / f"flow_{name}_{count:05}.jpg")
                cv2.imwrite(path, levels[..., k].astype(np.uint8), quality)
        previous = grey


def theirs(clips: Sequence[Path], folder: Path, algorithm: str) -> float:
    """The same of a frame extraction script."""
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        counts = pool.map(
            functools.partial(_extract, folder=folder, algorithm=algorithm), clips, chunksize=1
        )
    return sum(counts) / (time.perf_counter() - began)


def whole_rates(clips: Sequence[Path], rounds: int, algorithm: str) -> dict[str, Any]:
    """Frames per second of everything, with all cores, in turn."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, work in (("ours", ours), ("theirs", theirs)):
            folder = Path(tempfile.mkdtemp(prefix="bench_prepare_"))
            try:
                rates[name].append(work(clips, folder, algorithm))
            finally:
                shutil.rmtree(folder)
            print(algorithm, name, round(rates[name][-1], 1), "frames/s", flush=True)
    case = (
        f"prepare {SIDE}x{SIDE}, {algorithm}, {os.cpu_count()} cores (theirs: script, JPEG files)"
    )
    return _row(case, "frames/s", rates["ours"], rates["theirs"])


def _row(
    case: str, unit: str, ours: Sequence[float], theirs: Sequence[float], *, digits: int = 1
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "unit": unit, "rounds": len(ours)}
    for name, rates in (("ours", ours), ("theirs", theirs)):
        if not math.isnan(rates[0]):
            row[name] = round(statistics.median(rates), digits)
            row[f"{name}_spread"] = round((max(rates) - min(rates)) / 2, digits)
    if "theirs" in row:
        row["ratio"] = round(row["ours"] / row["theirs"], 3)
    return row


def _origin() -> dict[str, str]:
    from stf_jax.main import environment

    facts = environment()
    return {"commit": facts["commit"], "machine": f"{facts['machine']}, {processor()}"}


def main(argv: Sequence[str]) -> None:
    """Times everything and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if "STF_DATA" not in os.environ:
        sys.exit("error: STF_DATA must name the folder that holds ucf101_8/")
    origin = _origin()
    clips = chosen_clips(_CLIPS.value)
    rows = [*stage_rates(clips[::3]), error_row(clips)]
    rows += [whole_rates(clips, _ROUNDS.value, name) for name in _ALGORITHMS.value]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write_rows(Path(_OUT.value), [row | origin for row in rows], COLUMNS)


if __name__ == "__main__":
    app.run(main)
