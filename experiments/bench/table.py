"""The tables that the benchmarks write, and the processor that they name."""

import csv
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Puts rows into a table, in the place of older ones of their cases.

    Args:
      path: the CSV file; made if absent.
      rows: each with its 'case'.
      columns: these first, then what else the rows have; an absent value is empty.
    """
    cases = {row["case"] for row in rows}
    old: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            old = [row for row in csv.DictReader(file) if row["case"] not in cases]
    names = dict.fromkeys([*columns, *(name for row in [*rows, *old] for name in row)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])


def processor() -> str:
    """The name of the processor, such as 'AMD EPYC'."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
