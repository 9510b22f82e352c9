"""The proof that devices and processes do not matter: the same command, the same loss curve.

    python experiments/bench/devices.py

Trains the demo, shrunk, three times through `python -m stf_jax.main`, with the same settings:
  one        on one device
  eight      on eight simulated devices of one process, each with one clip of every batch
  processes  in two processes that meet through jax.distributed, each reading half of every batch

Writes experiments/results/devices.csv, one row per epoch and kind of clips:
  step            of the whole run, over both stages
  one, eight, processes  mean loss of the epoch, as in metrics.jsonl
  difference      largest of the others from `one`, as a share of it
  largest         of these, in the whole table; seconds_*: of each command, with compilation
and devices.png, the curves over each other and their differences. Fails if a loss differs by more
than --tolerance: sums of floats are taken in another order, and nothing else may differ.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "Largest difference, as a share of the loss.")
_OUT = flags.DEFINE_string("out", "experiments/results/devices.csv", "The table; plot beside it.")

CASES = ("one", "eight", "processes")
SETTINGS = {
    "batch_size": 8,
    "data.name": "folder",
    "data.protocol": "hold_out",
    "data.group_regex": r"_(g\d+)_",
    "data.validation_fraction": 0.3,
    "sampling.num_frames": 8,
    "model.width": 4,
    "model.mst.width": 32,
    "model.conv3d.width": 32,
    "model.fusion.width": 32,
    "model.tpn.window": 4,
    "model.tpn.stride": 4,
    "model.lstm.hidden": 16,
    # Adam divides by gradients that are nearly zero: it turns a last bit into another path.
    "optimizer.name": "sgdm",
    "optimizer.weight_decay": 5e-4,
    "stages.first.learning_rate": 3e-3,
    "stages.first.max_epochs": 12,
    "stages.second.learning_rate": 3e-4,
    "stages.second.max_epochs": 3,
}


def make_videos(folder: Path) -> None:
    """The demo's videos, of six groups instead of twenty and one clip of each."""
    from stf_jax import demo

    with mock.patch.multiple(demo, GROUPS=6, CLIPS_PER_GROUP=1):
        demo.generate(folder, seed=0)
    (folder / demo._MARKER).unlink()  # from here on they are a folder like any other


def train(case: str, place: Path) -> float:
    """Runs the command of a case to its end; returns its seconds."""
    command = [sys.executable, "-m", "stf_jax.main", "--config=configs/demo.py"]
    command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    command += [f"--config.data.root={place}/videos", f"--config.records.root={place}/records"]
    command += [f"--workdir={place}/{case}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    commands = [command]
    if case == "eight":
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    if case == "processes":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command += [f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2"]
        commands = [[*command, f"--process={process}"] for process in range(2)]
    began = time.monotonic()
    started = [
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        for words in commands
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(f"error: the command of case '{case}' ended with {codes}")
    return time.monotonic() - began


def curves(place: Path) -> list[dict[str, Any]]:
    """The rows of the table."""
    logs = {}
    for case in CASES:
        lines = (place / case / "metrics.jsonl").read_text().splitlines()
        logs[case] = [row for row in map(json.loads, lines) if row["kind"] != "step"]
    rows, before, stage, last = [], 0, "", 0
    for same in zip(*logs.values(), strict=True):
        first = same[0]
        assert all(row["step"] == first["step"] and row["kind"] == first["kind"] for row in same)
        if stage and first["stage"] != stage:
            before += last  # steps are counted anew in every stage
        stage, last = first["stage"], first["step"]
        losses = {case: row["loss"] for case, row in zip(CASES, same, strict=True)}
        rows.append(
            {
                "stage": stage,
                "kind": first["kind"],
                "epoch": first["epoch"],
                "step": before + first["step"],
                **losses,
                "difference": max(abs(loss / losses["one"] - 1) for loss in losses.values()),
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], tolerance: float, path: Path) -> None:
    """Draws the curves over each other, and their differences below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle("The shrunk demo: one command on 1 device, 8 devices and in 2 processes")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 2))
    names = {"one": "1 device", "eight": "8 simulated devices", "processes": "2 processes"}
    # Each is drawn narrower than the one below it, so that all show where they are the same.
    looks = {"one": ("#b8cfe6", 9), "eight": ("#e08a2e", 4.5), "processes": ("#222222", 1.2)}
    for (top, bottom), kind in zip(axes.T, ("train", "validation"), strict=True):
        shown = [row for row in rows if row["kind"] == kind]
        steps = [row["step"] for row in shown]
        for case, (colour, width) in looks.items():
            losses = [row[case] for row in shown]
            top.plot(steps, losses, color=colour, linewidth=width, label=names[case])
        for case in CASES[1:]:
            # A floor, for a logarithm has no place for losses that are the same.
            apart = [max(abs(row[case] / row["one"] - 1), 1e-9) for row in shown]
            look = {"color": looks[case][0], "marker": "o", "markersize": 3}
            bottom.plot(steps, apart, label=names[case], **look)
        top.set_title(f"{kind} clips", fontsize=10)
        bottom.axhline(tolerance, color="#b02020", linewidth=1, label="allowed")
        bottom.set(yscale="log", xlabel="training step")
        top.grid(alpha=0.3)
        bottom.grid(alpha=0.3)
    axes[0, 0].set_ylabel("mean loss of the epoch")
    axes[1, 0].set_ylabel("difference from 1 device,\nas a share of the loss")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str]) -> None:
    """Trains in all ways, compares and writes the results."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    from stf_jax.main import environment

    facts = environment()
    place = Path(tempfile.mkdtemp(prefix="devices_"))
    try:
        make_videos(place / "videos")
        seconds = {f"seconds_{case}": round(train(case, place), 1) for case in CASES}
        rows = curves(place)
    finally:
        shutil.rmtree(place)
    largest = max(row["difference"] for row in rows)
    origin = {"largest": largest, **seconds, "commit": facts["commit"], "machine": facts["machine"]}
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin])
        writer.writeheader()
        writer.writerows(row | origin for row in rows)
    plot(rows, _TOLERANCE.value, path.with_suffix(".png"))
    print(f"{len(rows)} losses up to step {rows[-1]['step']}; largest difference {largest:.2e}")
    print(seconds)
    if not largest <= _TOLERANCE.value:  # nan is no agreement either
        sys.exit(f"error: losses differ by {largest:.2e}, allowed are {_TOLERANCE.value:.0e}")


if __name__ == "__main__":
    app.run(main)
