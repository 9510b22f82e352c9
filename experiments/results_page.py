"""The page of results: experiments/results/README.md, from the files beside it.

Every number on it is read from a file there; what a file is and which command makes it is read from
the script that names it.
"""

import ast
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.studies import STUDIES, Study
from experiments.study_results import Tables

_EXPERIMENTS = Path(__file__).resolve().parent
RESULTS = _EXPERIMENTS / "results"
_FEW_SOURCES = 10
_STUDY_PARTS = ("_videos.csv", "_summary.csv", ".png", ".csv")  # ".csv" fits all: comes last


def build(folder: Path = RESULTS) -> str:
    """The page as Markdown.

    Raises:
      ValueError: a study's table has no summary beside it (says what makes it).
    """
    files = {path.name for path in folder.iterdir() if path.suffix in (".csv", ".json", ".png")}
    parts = [
        "# Results",
        "Made by `python experiments/report.py --results` from the files in this folder; no number "
        "is typed. Accuracies on generated and on real videos stand in different tables.",
    ]
    studies = _study_labels(files)
    for heading, made in (("real", False), ("generated", True)):
        labels = [name for name in studies if _is_generated(folder / f"{name}.csv") == made]
        if labels:
            parts.append(f"## Studies on {heading} videos")
            parts += [_study(folder, label) for label in labels]
    of_studies = {label + end for label in studies for end in _STUDY_PARTS}
    rest = sorted(files - of_studies)
    parts.append(_runs(folder, [name for name in rest if name.endswith(".json")]))
    parts.append(_others([name for name in rest if not name.endswith(".json")]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _study_labels(files: set[str]) -> list[str]:
    """The studies that have results, in the order of their definition, selections last."""
    known = [f"study_{name}{end}" for end in ("", "_selection") for name in STUDIES]
    return [label for label in known if f"{label}.csv" in files]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise ValueError(
            f"{path} is missing: python experiments/ablate.py --study=NAME --summarise makes it "
            "(with --select, if it is a selection)"
        )
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _is_generated(path: Path) -> bool:
    return any(run["data"] == "demo" for run in _read(path))


# --- studies ---------------------------------------------------------------------------------


def _study(folder: Path, label: str) -> str:
    """The section of one study."""
    name = label.removeprefix("study_").removesuffix("_selection")
    study, selection = STUDIES[name], label.endswith("_selection")
    tables = Tables.read(folder, label)
    runs, fresh = list(tables.runs.values()), list(tables.fresh().runs.values())
    told = " (selection on held-out training groups, no test)" if selection else ""
    parts = [f"### {name}{told}", study.question]
    if fresh:
        summary = _read(folder / f"{label}_summary.csv")
        parts += [_summary_table(study, summary), *_few_seeds(study, summary)]
        parts.append(f"![{name}]({label}.png)")
        parts.append(_circumstances(study, fresh, summary) + _either_stream(tables.fresh()))
    if len(fresh) < len(runs):
        stale = [f"`{run['row']}` {study.repeat} {run['seed']}" for run in runs if run["stale"]]
        parts.append(
            f"Left out, made with other settings than the study has now: {', '.join(stale)}."
        )
    flag = " --select" * selection
    summarised = f", [{label}_summary.csv]({label}_summary.csv)" if fresh else ""
    parts.append(
        f"Files: [{label}.csv]({label}.csv) (runs), [{label}_videos.csv]({label}_videos.csv) "
        f"(videos){summarised}. Made by `python experiments/ablate.py --study={name}{flag}`"
        + _told_changes(study, fresh)
        + "; one row with one seed by `--rows=ROW --seeds=SEED`."
    )
    return "\n\n".join(parts)


def as_flags(changes: Mapping[str, str]) -> str:
    """Settings as a command line has them."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def _told_changes(study: Study, runs: Sequence[Mapping[str, str]]) -> str:
    """What the command line changed in every run, beyond the study."""
    own = {row.name: study.changes(row, 0) for row in study.rows}
    found = {
        as_flags({key: value})
        for run in runs
        for key, value in json.loads(run["overrides"]).items()
        if key not in own[run["row"]] and key != "eval.subset"
    }
    return f" with `{' '.join(sorted(found))}`" if found else ""


def _summary_table(study: Study, lines: Sequence[Mapping[str, str]]) -> str:
    shown: list[tuple[str, Any]] = [
        ("row", lambda r: f"`{r['row']}`: {r['what']}"),
        (f"top-1, mean of {study.repeat}s", lambda r: f"**{_percent(r['mean'])}**"),
        ("95 % interval over videos", lambda r: _range(r["low95"], r["high95"])),
        (f"{study.repeat}s", lambda r: str(len(r["seeds"].split()))),
        (f"sd; min to max over {study.repeat}s", _spread),
    ]
    if study.reference:
        shown.append((f"points against `{study.reference}` (95 %)", _difference))
    shown += [
        ("mean class", lambda r: _percent(r["mean_class"])),
        ("colour alone", lambda r: _percent(r["rgb_only"])),
        ("flow alone", lambda r: _percent(r["flow_only"])),
        ("train", lambda r: _percent(r["train_top1"])),
        ("GMAC per clip", lambda r: f"{float(r['gmac']):.3f}"),
        ("minutes of training", lambda r: f"{float(r['minutes']):.1f}"),
    ]
    for cue in study.cues:
        shown.append((f"{cue} classes", lambda r, key=f"cue_{cue}": _percent(r[key])))
    # A column that no row has anything to say in is left out.
    table = [[make(line) for _, make in shown] for line in lines]
    kept = [i for i in range(len(shown)) if any(row[i] != "" for row in table)]
    head = [shown[i][0] for i in kept]
    rows = [head, ["---"] * len(head), *([row[i] for i in kept] for row in table)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f} %" if share else ""


def _range(low: str, high: str) -> str:
    return f"{100 * float(low):.1f} to {100 * float(high):.1f}" if low else ""


def _spread(line: Mapping[str, str]) -> str:
    if not line["sd"]:
        return ""
    return f"{100 * float(line['sd']):.1f}; {_range(line['min'], line['max'])}"


def _difference(line: Mapping[str, str]) -> str:
    if not line["difference"]:
        return ""
    told = f"{100 * float(line['difference']):+.1f}"
    if line["difference_low95"]:
        low, high = (100 * float(line[f"difference_{end}95"]) for end in ("low", "high"))
        told += f" ({low:+.1f} to {high:+.1f})"
    return told + (", other videos" if line["compared"].endswith("other videos") else "")


def _few_seeds(study: Study, lines: Sequence[Mapping[str, str]]) -> list[str]:
    """Says which rows lack seeds, or are not there at all."""
    wanted = len(study.seeds)
    few = {r["row"]: len(r["seeds"].split()) for r in lines if len(r["seeds"].split()) < wanted}
    absent = [row.name for row in study.rows if row.name not in {line["row"] for line in lines}]
    told = []
    if few:
        rows = ", ".join(f"`{name}` {count}" for name, count in few.items())
        told.append(f"Fewer than {wanted} {study.repeat}s: {rows}.")
    if absent:
        told.append(f"Not run yet: {', '.join(f'`{name}`' for name in absent)}.")
    return told


def _circumstances(
    study: Study, runs: Sequence[Mapping[str, str]], summary: Sequence[Mapping[str, str]]
) -> str:
    """Protocols, leaks, commits and machines of the runs."""
    lines = []
    for protocol in dict.fromkeys(run["protocol"] for run in runs):
        own = [run for run in runs if run["protocol"] == protocol]
        leak = ""
        if any(run["leaky"] == "True" for run in own):
            known = [float(run["overlap"]) for run in own if run["overlap"]]
            share = f"{100 * max(known):.1f} %" if known else "an unknown share"
            leak = f" **Leaky**: {share} of the videos share their source with training."
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(run["row"] for run in own))
        rows = "all rows" if len(own) == len(runs) else names
        videos = " or ".join(sorted({run["videos"] for run in own}, key=int))
        what = {"test": "test videos", "validation": "held-out training videos, no test"}
        lines.append(
            f"- Protocol of {rows}: {protocol}; {videos} {what[own[0]['subset']]} each.{leak}"
        )
    chance = sorted({f"{100 * float(run['chance']):.1f} %" for run in runs})
    told = {
        key: "; ".join(sorted({run[key] for run in runs})) for key in ("card", "commit", "machine")
    }
    which = ", ".join(sorted({run["seed"] for run in runs}, key=int))
    apart = " (minutes do not compare across these)" * (len({run["machine"] for run in runs}) > 1)
    hours = sum(float(run["run_seconds"]) for run in runs) / 3600
    lines.append(
        f"- `{told['card']}`, {study.repeat}s {which}; chance {', '.join(chance)}; "
        f"commit {told['commit']}; {told['machine']}{apart}; "
        f"{len(runs)} runs of {hours:.1f} h together."
    )
    fewest = min(int(line["sources"]) for line in summary)
    lines.append(
        f"- Intervals come from drawing the sources of the videos ({fewest} or more of them) anew, "
        f"with the {study.repeat}s that there are; that of a difference is over the same draws for "
        "both."
        + (" So few sources make intervals too narrow." if fewest < _FEW_SOURCES else "")
        + " Where all answers are right, or all are wrong, every draw is alike: there it is "
        "Wilson's, as if each source were one video."
        * any(float(line["mean"]) in (0, 1) for line in summary)
    )
    return "\n".join(lines)


def _either_stream(tables: Tables) -> str:
    """How far fusing could go, if it always followed the stream that is right.

    Args:
      tables: runs that are not stale; nothing is said unless rows of single streams share seeds and
        videos.
    """
    right: dict[str, dict[tuple[str, str], bool]] = {"rgb": {}, "flow": {}}
    for (row, seed), videos in tables.videos.items():
        if row in right:
            right[row] |= {(seed, v["video_id"]): v["label"] == v["predicted"] for v in videos}
    shared = right["rgb"].keys() & right["flow"].keys()
    if not shared:
        return ""
    rgb, flow = ([right[name][key] for key in shared] for name in ("rgb", "flow"))
    either = sum(map(max, rgb, flow))
    gain = 100 * (either - max(sum(rgb), sum(flow))) / len(shared)
    return (
        f"\n- Of {len(shared)} answers, `flow` has {sum(flow)} right, `rgb` {sum(rgb)}, at least "
        f"one of the two {either}: always following the stream that is right would be worth "
        f"{gain:+.1f} points over the better one."
    )


# --- other files -----------------------------------------------------------------------------


def _runs(folder: Path, names: Sequence[str]) -> str:
    """Records of single runs (`record.py`)."""
    records = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}
    real = {name: record for name, record in records.items() if record["data"]["name"] != "demo"}
    generated = {name: record for name, record in records.items() if name not in real}
    tables = [
        _runs_table(kind, own) for kind, own in (("real", real), ("generated", generated)) if own
    ]
    return "\n\n".join(tables)


def _runs_table(kind: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    head = (
        "| record | top-1 (95 % interval) | videos | protocol | made by | commit, seed, machine |"
    )
    lines = [f"## Single runs on {kind} videos", "", head, "|---|---|---|---|---|---|"]
    for name, record in records.items():
        low, high = record["interval95"]
        e = record["environment"]
        flags = f"--config={record['config_file']} {as_flags(record['changes'])}".rstrip()
        command = f"python -m stf_jax.main {flags}"
        leak = "**leaky**: " if record["leaky"] else ""
        lines.append(
            f"| [{name}]({name}) | **{100 * record['top1']:.1f} %** ({100 * low:.1f} to "
            f"{100 * high:.1f}) | {record['num_videos']} of {record['data']['name']} "
            f"| {leak}{record['protocol']} | `{command}`, `experiments/record.py` "
            f"| {e['commit']}, seed {record['seed']}, {e['machine']} |"
        )
    return "\n".join(lines)


def _others(names: Sequence[str]) -> str:
    """Tables and pictures of other scripts: what they are, by their scripts' own words."""
    if not names:
        return ""
    scripts = {path: path.read_text(encoding="utf-8") for path in _EXPERIMENTS.rglob("*.py")}
    lines = ["## Other files", "", "| file | what it is | made by |", "|---|---|---|"]
    for name in names:
        stem = re.escape(Path(name).stem)
        named = re.compile(rf"results/{stem}\.csv|[\"'/]{stem}\.csv[\"']")
        makers = [path for path, text in sorted(scripts.items()) if named.search(text)]
        words = [_words(scripts[path], path) for path in makers]
        words = words or [("**not known**: no script in experiments names it", "?")]
        lines.append(
            f"| [{name}]({name}) | {'; '.join(what for what, _ in words)} "
            f"| {', '.join(f'`{command}`' for _, command in words)} |"
        )
    return "\n".join(lines)


def _words(text: str, path: Path) -> tuple[str, str]:
    """A script's first sentence and its first command, from its docstring."""
    told = ast.get_docstring(ast.parse(text)) or ""
    what = told.partition("\n\n")[0].replace("\n", " ").rstrip(".")
    place = path.relative_to(_EXPERIMENTS.parent).as_posix()
    command = re.search(rf"^\s*(python {re.escape(place)}.*)$", told, flags=re.MULTILINE)
    return what, command[1].strip() if command else f"python {place}"


def write(folder: Path = RESULTS) -> Path:
    """Writes the page beside the files that it is made of, and returns its path."""
    path = folder / "README.md"
    path.write_text(build(folder), encoding="utf-8")
    return path
