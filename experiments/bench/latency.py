"""How long a short video takes from its file to its classes, and which stage takes it.

    python experiments/bench/latency.py [--rounds=30] [--clip=FILE]

A clip of 5 seconds, 320x240 at 25 frames per second, with the network of `configs/ucf101.py:laptop`
and random weights, which take the time of trained ones; after start-up, every core used. The clip
is generated (MPEG-4 in AVI, as UCF101's are); a clip of UCF101 is timed too where STF_DATA names a
folder with one of 125 frames (groups 4 and later), or `--clip`.

Ours is `stf_jax.watch`, as experiments/predict.py runs it. Theirs is `Predictor.predict`, which
stores the whole video as preparation does: every frame encoded, every field computed. The two are
timed in turn and must give the same scores to the last bit.

Writes experiments/results/bench_latency.csv; a case that is there already is replaced, others stay.
  case             clip, and the stage: decode (and shrink), flow, pack (the round trip through
                   the records' bytes), network; 'all' is from the name of the file to the scores
  median_s         seconds; spread_s: half the range
  p50_ms, p95_ms   milliseconds
  theirs_s         median seconds of the other; theirs_spread_s: half the range
  ratio            ours / theirs: below 1 is faster
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

# Cards are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.table import processor, write_rows  # noqa: E402
from stf_jax import host  # noqa: E402

_CLIP = flags.DEFINE_string("clip", "", "A video to time beside the generated one.")
_ROUNDS = flags.DEFINE_integer("rounds", 30, "Times that each is timed.", lower_bound=2)
_OUT = flags.DEFINE_string("out", "experiments/results/bench_latency.csv", "The table.")

CLASSES = 101
FRAMES, RATE, WIDTH, HEIGHT = 125, 25, 320, 240


def generate(path: Path) -> None:
    """Writes a clip: a textured square that circles over a textured ground, with noise."""
    import av
    import numpy as np

    draw = np.random.default_rng(0)
    cells = draw.integers(30, 200, (HEIGHT // 4, WIDTH // 4, 3)).astype(np.uint8)
    ground = cells.repeat(4, 0).repeat(4, 1)
    square = draw.integers(60, 255, (20, 20, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 400_000
        for number in range(FRAMES):
            turn = 2 * np.pi * number / RATE
            left = round(WIDTH / 2 - 40 + 60 * np.cos(turn))
            top = round(HEIGHT / 2 - 40 + 60 * np.sin(turn))
            picture = ground.astype(np.int16) + draw.integers(-6, 7, ground.shape)
            picture[top : top + 80, left : left + 80] = square
            frame = np.clip(picture, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def clip_of_ucf101() -> Path | None:
    """The first clip of 125 frames in STF_DATA, none of the groups 1 to 3; None if not set."""
    import av

    if "STF_DATA" not in os.environ:
        return None
    for path in sorted(Path(os.environ["STF_DATA"]).rglob("v_*_g*_c*.avi")):
        if int(path.stem.rsplit("_g", 1)[1][:2]) > 3:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                if stream.frames == FRAMES and stream.average_rate == RATE:
                    return path
    return None


def time_clip(watcher: Any, name: str, path: Path, rounds: int) -> list[dict[str, Any]]:
    """Times both ways in turn; a row for the whole and one for each stage."""
    import numpy as np

    from stf_jax.watch import STAGES, open_input

    predictor, limit = watcher.predictor, watcher.predictor.settings.records.max_pixels
    ours: list[float] = []
    theirs: list[float] = []
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def timed(run: Any, times: list[float]) -> Any:
        began = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - began)
        return result

    def watch() -> Any:
        source = open_input(str(path), max_pixels=limit, live=False, timeout=1.0)
        (scored,) = watcher.watch(source)
        return scored

    for number in range(rounds + 1):
        scored = timed(watch, ours)
        prediction = timed(lambda: predictor.predict(path), theirs)
        if not np.array_equal(scored.prediction.probabilities, prediction.probabilities):
            sys.exit("error: the two ways do not give the same scores")
        if number == 0:  # what the first video still had to compile
            ours.clear()
            theirs.clear()
            continue
        for stage, seconds in scored.latency.items():
            stages[stage].append(seconds)
    total = _figures(ours) | {
        "theirs_s": round(statistics.median(theirs), 4),
        "theirs_spread_s": round((max(theirs) - min(theirs)) / 2, 4),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
    }
    rows = [{"case": f"{name}: all", **total}]
    rows += [{"case": f"{name}: {stage}", **_figures(stages[stage])} for stage in STAGES]
    return [row | {"rounds": rounds} for row in rows]


def _figures(seconds: Sequence[float]) -> dict[str, Any]:
    import numpy as np

    p50, p95 = np.percentile(seconds, (50, 95))
    return {
        "median_s": round(statistics.median(seconds), 4),
        "spread_s": round((max(seconds) - min(seconds)) / 2, 4),
        "p50_ms": round(1e3 * float(p50), 1),
        "p95_ms": round(1e3 * float(p95), 1),
    }


def make_watcher() -> Any:
    """The laptop network with random weights, ready for files of any length."""
    from configs import ucf101
    from stf_jax.model import fold_pyramid
    from stf_jax.predict import Predictor
    from stf_jax.run import Settings
    from stf_jax.watch import Watcher, WindowSettings

    settings = Settings.of(ucf101.get_config("laptop"))
    model = settings.model(CLASSES)
    names = tuple(f"class {k}" for k in range(CLASSES))
    predictor = Predictor(settings, names, *fold_pyramid(model, settings.initial_params(model)))
    return Watcher(predictor, WindowSettings.parse("", "", settings.sampling))


def main(argv: Sequence[str]) -> None:
    """Times the clips and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    from stf_jax.main import environment

    began = time.perf_counter()
    watcher = make_watcher()
    watcher.start_up()
    print(f"start-up {time.perf_counter() - began:.1f} s", flush=True)
    facts = environment()
    origin = {
        "commit": facts["commit"],
        "jax": facts["jax"],
        "machine": f"{facts['machine']}, {processor()}",
    }
    with tempfile.TemporaryDirectory() as folder:
        clips = {"generated": Path(folder) / "clip.avi"}
        generate(clips["generated"])
        if _CLIP.value:
            clips[Path(_CLIP.value).name] = Path(_CLIP.value)
        elif found := clip_of_ucf101():
            clips["UCF101"] = found
        for name, path in clips.items():
            rows = time_clip(watcher, name, path, _ROUNDS.value)
            for row in rows:
                print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            columns = ("case", "median_s", "spread_s", "p50_ms", "p95_ms")
            write_rows(Path(_OUT.value), [row | origin for row in rows], columns)


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
