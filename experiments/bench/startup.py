"""How long it is from the command to the first training step, and where the time goes.

    python experiments/bench/startup.py [--runs=5] [--data=data/demo] [--records=records]

Starts the demo on its prepared records (a first start, which is not counted, prepares them), each
time in a new folder, and stops it with SIGTERM once the first step is done: cold, with no program
kept from an earlier start, and warm, with those of the start before. Cold and warm take turns. The
files that are read (Python's and the records) are in the system's memory both times.

Writes experiments/results/startup.csv, a row for 'cold' and one for 'warm':
  seconds, spread   median of the starts by a stop-watch outside, and half of max - min
  parts             medians of what the program says of it: 'process' is Python and the flags,
                    'imports', 'tracing' the step for the compiler, 'data' opening the records
                    (with TensorFlow's import), 'weights' the random ones, 'clips' the first
                    batches, 'compiler' what was still to wait for it, 'first step'
"""

import os
import re
import shutil
import signal
import statistics
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

_RUNS = flags.DEFINE_integer("runs", 5, "Starts of each kind.")
_DATA = flags.DEFINE_string("data", "data/demo", "The demo's videos; made if absent.")
_RECORDS = flags.DEFINE_string("records", "records", "Its records; made if absent.")
_OUT = flags.DEFINE_string("out", "experiments/results/startup.csv", "The table.")

_TOLD = re.compile(r"first training step [\d.]+ s after the command: (.*)")


def start(folder: Path, programs: Path) -> tuple[float, dict[str, float]]:
    """One start.

    Args:
      folder: of its run; removed afterwards.
      programs: where compiled programs are kept.

    Returns:
      Seconds until it says that the first step is done, and what it says of the parts.
    """
    words = [
        sys.executable, "-m", "stf_jax.main", "--config=configs/demo.py", f"--workdir={folder}",
        f"--config.data.root={Path(_DATA.value).absolute()}",
        f"--config.records.root={Path(_RECORDS.value).absolute()}",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(programs), "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if told := _TOLD.match(line):
            seconds = time.monotonic() - began
            process.send_signal(signal.SIGTERM)
            process.communicate()
            shutil.rmtree(folder)
            pairs = (part.rsplit(" ", 1) for part in told[1].split(", "))
            return seconds, {name: float(value) for name, value in pairs}
    sys.exit("error: it ended without a training step:\n" + "".join(lines))


def measure(runs: int) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Cold and warm starts in turn."""
    scratch = Path(tempfile.mkdtemp(prefix="startup_"))
    found: dict[str, list[tuple[float, dict[str, float]]]] = {"cold": [], "warm": []}
    try:
        start(scratch / "run", scratch / "first")
        for number in range(runs):
            for case, starts in found.items():
                starts.append(start(scratch / "run", scratch / str(number)))
                print(f"{case}: {starts[-1][0]:.2f} s", starts[-1][1], flush=True)
    finally:
        shutil.rmtree(scratch)
    return found


def main(argv: Sequence[str]) -> None:
    """Measures and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    from experiments.bench.table import processor, write_rows
    from stf_jax.main import environment

    facts = environment()
    rows: list[dict[str, Any]] = []
    for case, starts in measure(_RUNS.value).items():
        seconds = [each for each, _ in starts]
        row = {
            "case": case,
            "runs": len(starts),
            "seconds": round(statistics.median(seconds), 2),
            "spread": round((max(seconds) - min(seconds)) / 2, 2),
        }
        for part in starts[0][1]:
            row[part] = round(statistics.median(parts[part] for _, parts in starts), 2)
        row |= {"commit": facts["commit"], "jax": facts["jax"]}
        rows.append(row | {"machine": f"{facts['machine']}, {processor()}"})
        print(row)
    write_rows(Path(_OUT.value), rows)


if __name__ == "__main__":
    app.run(main)
