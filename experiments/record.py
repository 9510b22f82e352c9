"""Keeps the figures of a finished run in the repository and brings the result tables up to date.

    python experiments/record.py --workdir=runs/demo --name=demo

Writes experiments/results/<name>.json, then fills the tables between `<!-- results: ... -->` marks
in README.md and BUILD_NOTES.md from all files there: accuracies from the records, speed and memory
from the tables of experiments/bench, summaries of studies; and the page of all results beside the
files. Generated and real videos never share one. Without arguments
only the tables are filled.
"""

import csv
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from experiments import results_page  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run; none: only the tables.")
_NAME = flags.DEFINE_string("name", None, "Name of the record.")

_RESULTS = _ROOT / "experiments" / "results"
# Of results.json.
_KEYS = (
    "top1", "top5", "mean_class_accuracy", "interval95", "num_videos", "chance", "protocol",
    "leaky", "overlap", "excluded", "faults", "notes", "class_names", "confusion", "parameters",
    "seconds", "peak_memory_mb", "stages", "config_file", "changes", "seed", "environment",
)  # fmt: skip


def record(workdir: Path, name: str) -> Path:
    """Writes the record of a run.

    Raises:
      FileNotFoundError: the run is not finished.
      ValueError: its figures are not those of a test.
    """
    from stf_jax.run import deciding

    source = workdir / "results.json"
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing: finish the run first")
    results = json.loads(source.read_text(encoding="utf-8"))
    # Runs of before there was a choice were scored on their test videos.
    if "subset" in results and results["subset"] != "test":
        raise ValueError(
            f"{workdir} was scored on its {results['subset']} videos ({results['protocol']}), by "
            "which settings are chosen: such figures do not go into the table of results. Train "
            "the chosen settings with --config.eval.subset=test in another folder."
        )
    kept = {key: results[key] for key in _KEYS}
    if results["seen"] is not None:
        kept["seen"] = results["seen"]
    # Where things lay on a machine is nobody else's business.
    kept["changes"] = deciding(kept["changes"])
    kept["data"] = {key: results["data"][key] for key in ("name", "counts")}
    log = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("stage", "kind", "epoch", "loss", "top1")
    kept["curves"] = [{key: row[key] for key in names} for row in map(json.loads, log)]
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"{name}.json"
    path.write_text(_compact(kept) + "\n", encoding="utf-8")
    return path


def _compact(kept: dict[str, Any]) -> str:
    """JSON with one line per key: short, and a change shows as a change of few lines."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in kept.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def table(records: dict[str, dict[str, Any]], *, generated: bool) -> str:
    """The Markdown table of the records on generated or on real videos."""
    head = (
        "| run | top-1 (95 % interval) | top-5 | mean class | test videos | protocol | time | "
        "memory | commit, seed, machine |"
    )
    lines = [head, "|" + "---|" * head.count(" | ") + "---|"]
    for name, r in sorted(records.items()):
        if (r["data"]["name"] == "demo") != generated:
            continue
        low, high = r["interval95"]
        e = r["environment"]
        minutes = sum(r["seconds"].values()) / 60
        # The seed has a column.
        changes = {key: value for key, value in r["changes"].items() if key != "seed"}
        made = f"{r['config_file']} {results_page.as_flags(changes)}".rstrip()
        leak = ""
        if r["leaky"]:
            share = "unknown" if r["overlap"] is None else f"{r['overlap']:.1%}"
            leak = f"**leaky** (source shared with training: {share}): "
        lines.append(
            f"| [{name}](experiments/results/{name}.json) `{made}` "
            f"| **{r['top1']:.1%}** ({low:.1%} to {high:.1%}; chance {r['chance']:.1%}) "
            f"| {r['top5']:.1%} | {r['mean_class_accuracy']:.1%} "
            f"| {r['num_videos']}, {len(r['excluded'])} excluded | {leak}{r['protocol']} "
            f"| {minutes:.1f} min | {r['peak_memory_mb'] / 1024:.1f} GiB "
            f"| {e['commit']}, seed {r['seed']}, {e['machine']} |"
        )
    return "\n".join(lines)


def csv_table(name: str) -> str:
    """The Markdown table of a script's CSV; columns that never change go into a line below."""
    with open(_RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first, *_ = rows[0]
    varying = [key for key in rows[0] if key == first or len({row[key] for row in rows}) > 1]
    fixed = ", ".join(f"{key} {rows[0][key]}" for key in rows[0] if key not in varying)
    lines = [varying, ["---"] * len(varying), *([row[key] for key in varying] for row in rows)]
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    source = f"[{name}.csv](experiments/results/{name}.csv)"
    return f"{shown}\n\n{source}: {fixed}." if fixed else f"{shown}\n\n{source}"


def update(text: str, records: dict[str, dict[str, Any]]) -> str:
    """Replaces what stands between the marks of a Markdown text."""
    makers: dict[str, Callable[[], str]] = {
        "generated": functools.partial(table, records, generated=True),
        "real": functools.partial(table, records, generated=False),
    }
    for path in _RESULTS.glob("*.csv"):
        makers[path.stem] = functools.partial(csv_table, path.stem)
    for kind, make in makers.items():
        mark = f"<!-- results: {kind} -->", f"<!-- end of results: {kind} -->"
        if mark[0] not in text:
            continue
        pattern = re.escape(mark[0]) + ".*?" + re.escape(mark[1])
        filled = f"{mark[0]}\n{make()}\n{mark[1]}"
        text = re.sub(pattern, filled.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def main(argv: Sequence[str]) -> None:
    """Records and fills."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if bool(_WORKDIR.value) != bool(_NAME.value):
        raise app.UsageError("--workdir and --name go together")
    try:
        if _WORKDIR.value and _NAME.value:
            print(record(Path(_WORKDIR.value), _NAME.value))
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"error: {error}")
    records = {path.stem: json.loads(path.read_text()) for path in _RESULTS.glob("*.json")}
    for page in (_ROOT / "README.md", _ROOT / "BUILD_NOTES.md"):
        page.write_text(update(page.read_text(encoding="utf-8"), records), encoding="utf-8")
    results_page.write(_RESULTS)


if __name__ == "__main__":
    app.run(main)
