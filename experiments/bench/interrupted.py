"""The proof that preparation survives `kill -9`: killed ten times at random, it ends the same.

    STF_DATA=... python experiments/bench/interrupted.py [--kills=10] [--seed=0]

Prepares `ucf101_8` (official lists) and `weizmann` (the person as group) twice through
experiments/prepare.py with the laptop settings (flow at 80 px, to be short): once undisturbed, and
once killed, with its worker processes, at random moments that are spread over the whole work, and
then finished. Compares the sha256 of every file of both sets and counts the videos that were done
twice.

Writes experiments/results/prepare_interrupted.csv:
  kills           that met the command at work
  kept            videos, in shards or staged, that were there at each kill
  lost            of these, how many were gone, or done again, at the next kill: 0
  files           compared; identical: whether every byte is the same
"""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_KILLS = flags.DEFINE_integer("kills", 10, "How often to kill.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_SETS = flags.DEFINE_list("sets", ["ucf101_8", "weizmann"], "Which of the data sets.")
_OUT = flags.DEFINE_string("out", "experiments/results/prepare_interrupted.csv", "The table.")


def command(name: str, root: Path) -> list[str]:
    """Prepares a data set into `root`."""
    data = Path(os.environ["STF_DATA"], name)
    card = {
        "ucf101_8": ["--config=configs/ucf101.py:laptop"],
        "weizmann": ["--config=configs/folder.py:laptop", "--config.data.group_regex=^([a-z]+)_"],
    }[name]
    common = [f"--config.data.root={data}", f"--config.records.root={root}"]
    common.append("--config.records.flow_size=80")
    return [sys.executable, "experiments/prepare.py", *card, *common]


def run(name: str, root: Path) -> float:
    """Lets it end; returns its seconds."""
    began = time.monotonic()
    subprocess.run(command(name, root), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def finished_videos(root: Path) -> dict[str, int]:
    """When the file that holds each finished video was written, ns, by staged file or video id."""
    done: dict[str, int] = {}
    for note in root.glob("*/shards/*.json"):
        _, _, body = note.read_bytes().partition(b"\n")
        for row in json.loads(body)["rows"]:
            hashed = hashlib.sha256(row["video_id"].encode()).hexdigest()[:32]
            done[hashed] = 0  # in a shard: it does not matter how old
    for staged in root.glob("*/staged/[!.]*.npz"):
        done.setdefault(staged.stem, staged.stat().st_mtime_ns)
    return done


def storm(
    name: str, root: Path, start: float, seconds: float, kills: int, seed: int
) -> list[dict[str, int]]:
    """Kills the command at random moments; returns what was finished after each kill."""
    chance = random.Random(f"{name} {seed}")
    snapshots: list[dict[str, int]] = []
    while len(snapshots) < kills:
        process = subprocess.Popen(
            command(name, root),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # On average less than a tenth of the work is done between two kills; some come before any.
        time.sleep(chance.uniform(start / 2, start + 1.5 * seconds / kills))
        alive = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if alive else None
        process.wait()
        if not alive:
            break
        snapshots.append(finished_videos(root))
        print(f"{name}: kill {len(snapshots)}, {len(snapshots[-1])} videos finished", flush=True)
    return snapshots


def redone(snapshots: Sequence[dict[str, int]]) -> int:
    """Videos that were finished at one kill and at the next were gone, or done again."""
    lost = 0
    for before, after in zip(snapshots, snapshots[1:], strict=False):
        lost += sum(after.get(k) not in (0, when) for k, when in before.items())
    return lost


def digests(root: Path) -> dict[str, str]:
    """The sha256 of every file below."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def prove(name: str, kills: int, seed: int) -> dict[str, Any]:
    """The row of a data set."""
    folder = Path(tempfile.mkdtemp(prefix="interrupted_"))
    try:
        seconds = run(name, folder / "quiet")
        start = run(name, folder / "quiet")  # finds nothing to do
        snapshots = storm(name, folder / "storm", start, seconds - start, kills, seed)
        run(name, folder / "storm")
        quiet, stormy = digests(folder / "quiet"), digests(folder / "storm")
        (manifest,) = (folder / "quiet").rglob("manifest.csv")
        with open(manifest, newline="", encoding="utf-8") as file:
            videos = len(list(csv.DictReader(file)))
    finally:
        shutil.rmtree(folder)
    return {
        "set": name,
        "videos": videos,
        "kills": len(snapshots),
        "kept": " ".join(str(len(snapshot)) for snapshot in snapshots),
        "lost": redone(snapshots),
        "files": len(quiet),
        "identical": quiet == stormy,
        "undisturbed_seconds": round(seconds, 1),
        "seed": seed,
    }


def main(argv: Sequence[str]) -> None:
    """Proves it for every set and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if "STF_DATA" not in os.environ:
        sys.exit("error: STF_DATA must name the folder that holds ucf101_8/ and weizmann/")
    from stf_jax.main import environment

    facts = environment()
    origin = {"commit": facts["commit"], "machine": facts["machine"]}
    rows = [prove(name, _KILLS.value, _SEED.value) | origin for name in _SETS.value]
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)
    if not all(row["identical"] and not row["lost"] and row["kills"] for row in rows):
        sys.exit("error: an interrupted preparation did not end as an undisturbed one")


if __name__ == "__main__":
    app.run(main)
