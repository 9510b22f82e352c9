"""Exported programs against JAX: time per call, and how far their probabilities lie apart.

    python experiments/bench/export.py [--scales=demo,laptop] [--clips=1,4] [--rounds=9]

Each program is read back from its file in a process of its own, as another program would, and timed
in turn with the function that scores predictions here, likewise in a process of its own: both with
every core, from uint8 arrays in memory to probabilities. Random weights and noise, which take the
same time as others. Needs `make install EXTRAS=export`.

Writes experiments/results/export.csv; a case that is there already is replaced, others stay.
  case                scale, format, clips per call
  program_s           median seconds of the exported program; program_spread_s: half the range
  jax_s               the same of JAX
  ratio               program / JAX: below 1 is faster
  largest_difference  of any probability of the timed clips from JAX's
  load_s              seconds to read the file and run it for the first time
  file_mb             its size
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

# Cards are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.table import processor, write_rows  # noqa: E402
from stf_jax import host  # noqa: E402

_SCALES = flags.DEFINE_list("scales", ["demo", "laptop"], "Which of demo, laptop, paper.")
_FORMATS = flags.DEFINE_list("formats", ["stablehlo", "savedmodel", "onnx"], "Which of these.")
_CLIPS = flags.DEFINE_list("clips", ["1", "4"], "Clips per call.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Times that each case is timed.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results/export.csv", "The table.")


SCALES = ("demo", "laptop", "paper")


def trained_of(scale: str) -> Any:
    """A network of a card, with the weights that training would begin with."""
    from configs import demo, ucf101
    from stf_jax.predict import Trained
    from stf_jax.run import Settings

    if scale not in SCALES:
        raise app.UsageError(f"unknown scale {scale!r}; choose of {', '.join(SCALES)}")
    preset = "laptop" if scale == "laptop" else ""
    settings = Settings.of(demo.get_config() if scale == "demo" else ucf101.get_config(preset))
    names = tuple(f"class {i}" for i in range(8 if scale == "demo" else 101))
    params = settings.initial_params(settings.model(len(names)))
    return Trained(settings, names, params, {"protocol": "none", "leaky": False})


def write_all(scale: str, folder: Path, formats: Sequence[str]) -> list[tuple[int, ...]]:
    """Exports a scale; returns the shapes of one clip's frames and flow."""
    from stf_jax.export import FORMATS, input_specs, shared_config
    from stf_jax.predict import Predictor

    trained = trained_of(scale)
    facts = {
        "config": json.dumps(shared_config(trained)),
        "data": json.dumps({"class_names": trained.class_names, **trained.data}),
        "signature": "{}",
        "card": "",
    }
    # JAX's process gets its weights from the safetensors.
    for name in dict.fromkeys(["safetensors", *formats]):
        FORMATS[name].write(trained, facts, folder / FORMATS[name].file)
    return [spec.shape for spec in input_specs(Predictor.of(trained), 1).values()]


def _serve(pipe: Connection, path: str, name: str, arrays: list[tuple[np.ndarray, ...]]) -> None:
    """A process of one program: answers a number of a batch by seconds and probabilities."""
    host.use_huge_pages()
    from stf_jax.export import FORMATS

    began = time.perf_counter()
    run = FORMATS[name].open(Path(path))
    run(*arrays[0])
    pipe.send(time.perf_counter() - began)
    while (number := pipe.recv()) is not None:
        began = time.perf_counter()
        scores = run(*arrays[number])
        pipe.send((time.perf_counter() - began, scores))


def size_mb(path: Path) -> float:
    """Of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def time_format(
    scale: str, name: str, folder: Path, arrays: list[tuple[np.ndarray, ...]], rounds: int
) -> list[dict[str, Any]]:
    """Times one program in turn with JAX, for each batch."""
    from stf_jax.export import FORMATS

    context = multiprocessing.get_context("spawn")
    pipes, processes, load = {}, [], {}
    for side, form in (("program", name), ("jax", "safetensors")):
        pipes[side], other = context.Pipe()
        path = str(folder / FORMATS[form].file)
        processes.append(
            context.Process(target=_serve, args=(other, path, form, arrays), daemon=True)
        )
        processes[-1].start()
        load[side] = pipes[side].recv()
    rows = []
    for batch, clip in enumerate(arrays):
        seconds: dict[str, list[float]] = {"program": [], "jax": []}
        scores = {}
        for number in range(rounds + 1):
            for side in ("program", "jax") if number % 2 else ("jax", "program"):
                time.sleep(0.05)  # threads that wait for more work give up meanwhile
                pipes[side].send(batch)
                took, scores[side] = pipes[side].recv()
                if number:  # the first compiles for this number of clips
                    seconds[side].append(took)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        spreads = {side: (max(v) - min(v)) / 2 for side, v in seconds.items()}
        rows.append(
            {
                "case": f"{scale}: {name}, clips: {len(clip[0])}",
                "program_s": round(medians["program"], 4),
                "jax_s": round(medians["jax"], 4),
                "ratio": round(medians["program"] / medians["jax"], 3),
                "largest_difference": f"{np.abs(scores['program'] - scores['jax']).max():.1e}",
                "load_s": round(load["program"], 1),
                "file_mb": round(size_mb(folder / FORMATS[name].file), 1),
                "program_spread_s": round(spreads["program"], 4),
                "jax_spread_s": round(spreads["jax"], 4),
                "rounds": rounds,
            }
        )
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()
    return rows


def _origin(name: str) -> dict[str, str]:
    import importlib.metadata

    from stf_jax.export import FORMATS
    from stf_jax.main import environment

    facts, runtime = environment(), FORMATS[name].runtime
    return {
        "commit": facts["commit"],
        "jax": facts["jax"],
        "runtime": f"{runtime} {importlib.metadata.version(runtime)}",
        "machine": f"{facts['machine']}, {processor()}",
    }


def main(argv: Sequence[str]) -> None:
    """Exports, times every case and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    from stf_jax.export import check_formats

    chance = np.random.default_rng(0)
    try:
        check_formats(_FORMATS.value)
        for scale in _SCALES.value:
            with tempfile.TemporaryDirectory() as place:
                shapes = write_all(scale, Path(place), _FORMATS.value)
                arrays = [
                    tuple(
                        chance.integers(0, 256, (int(count), *shape[1:]), np.uint8)
                        for shape in shapes
                    )
                    for count in _CLIPS.value
                ]
                for name in _FORMATS.value:
                    rows = time_format(scale, name, Path(place), arrays, _ROUNDS.value)
                    for row in rows:
                        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                    write_rows(Path(_OUT.value), [row | _origin(name) for row in rows])
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
