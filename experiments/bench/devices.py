"""The proof that devices and processes do not matter: the same command, the same loss curve.

    python experiments/bench/devices.py

Trains the demo, shrunk, four times through `python -m stf_jax.main`, with the same settings:
  one        on one device
  parts      on one device, each batch in two parts: the control. Its gradients are the same sums in
             another order, so it shows how far a last bit of difference grows by itself
  eight      on eight simulated devices of one process, each with one clip of every batch
  processes  in two processes that meet through jax.distributed, each reading half of every batch

Writes experiments/results/devices.csv, one row per epoch and kind of clips:
  step            of the whole run, over both stages
  one, parts, eight, processes  mean loss of the epoch, as in metrics.jsonl
  *_difference    from `one`, as a share of it
  largest_*       of these, in the whole table; seconds_*: of each command, with compilation
and devices.png, the curves over each other and their differences. Fails if in the first epoch a
loss differs by more than --tolerance, or later by more than ten times what the control differs by.
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

_TOLERANCE = flags.DEFINE_float("tolerance", 1e-5, "Largest share in the first epoch.")
_OUT = flags.DEFINE_string("out", "experiments/results/devices.csv", "The table; plot beside it.")

CASES = ("one", "parts", "eight", "processes")
# How far a case may go from `one`, in units of what the control does.
_ALLOWED = 10
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
    if case == "parts":
        command.append("--config.optimizer.accumulate=2")
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
        logs[case] = list(map(json.loads, lines))
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
                **{f"{c}_difference": abs(losses[c] / losses["one"] - 1) for c in CASES[1:]},
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the curves over each other, and their differences below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle("The shrunk demo: one command on 1 device, 8 devices and in 2 processes")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 2))
    names = {
        "one": "1 device",
        "parts": "1 device, batch in 2 parts",
        "eight": "8 simulated devices",
        "processes": "2 processes",
    }
    # Each is drawn narrower than the one below it, so that all show where they are the same.
    looks = {
        "one": ("#b8cfe6", 11),
        "parts": ("#7fb069", 7),
        "eight": ("#e08a2e", 4),
        "processes": ("#222222", 1.2),
    }
    for (top, bottom), kind in zip(axes.T, ("train", "validation"), strict=True):
        shown = [row for row in rows if row["kind"] == kind]
        steps = [row["step"] for row in shown]
        for case, (colour, width) in looks.items():
            losses = [row[case] for row in shown]
            top.plot(steps, losses, color=colour, linewidth=width, label=names[case])
        for case in CASES[1:]:
            # A floor, for a logarithm has no place for losses that are the same.
            apart = [max(row[f"{case}_difference"], 1e-9) for row in shown]
            look = {"color": looks[case][0], "marker": "o", "markersize": 3}
            bottom.plot(steps, apart, label=names[case], **look)
        top.set_title(f"{kind} clips", fontsize=10)
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
    largest = {c: max(row[f"{c}_difference"] for row in rows) for c in CASES[1:]}
    first = max(row[f"{c}_difference"] for row in rows[:1] for c in CASES[1:])
    told = {f"largest_{case}": value for case, value in largest.items()}
    origin = {**told, **seconds, "commit": facts["commit"], "machine": facts["machine"]}
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin])
        writer.writeheader()
        writer.writerows(row | origin for row in rows)
    plot(rows, path.with_suffix(".png"))
    print(f"{len(rows)} losses up to step {rows[-1]['step']}; first epoch: {first:.2e} apart")
    print(f"largest differences: {largest}; {seconds}")
    allowed = max(_ALLOWED * largest["parts"], _TOLERANCE.value)
    # nan is no agreement either
    if not first <= _TOLERANCE.value or not max(largest.values()) <= allowed:
        sys.exit(
            f"error: losses differ by {first:.2e} in the first epoch (allowed: "
            f"{_TOLERANCE.value:.0e}) and by {max(largest.values()):.2e} later ({allowed:.2e})"
        )


if __name__ == "__main__":
    app.run(main)
