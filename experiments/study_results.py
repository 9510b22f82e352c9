"""What the runs of a study have shown: its tables, its summary and its figure.

Beside each other in experiments/results:
    study_NAME.csv          a line for every run
    study_NAME_videos.csv   a line for every run and video: what it was taken for
    study_NAME_summary.csv  a line for every row, worked out from the two
    study_NAME.png          the figure

Runs that other sittings or machines have added stay. A run whose settings are not those of the
study as it is defined now is marked as stale: it stays in the first two and is left out of what is
worked out from them.
"""

import csv
import dataclasses
import hashlib
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies import Row, Study
from stf_jax.metrics import bootstrap, bootstrap_difference, wilson
from stf_jax.prepare import write_aside

RUN_COLUMNS = (
    "study", "row", "seed", "stale", "overrides", "card", "settings", "data", "subset", "protocol",
    "leaky", "overlap", "top1", "low95", "high95", "mean_class", "rgb_only", "flow_only", "videos",
    "chance", "train_top1", "parameters", "gmac", "train_seconds", "run_seconds", "commit",
    "machine",
)  # fmt: skip
VIDEO_COLUMNS = ("row", "seed", "video_id", "source", "label", "predicted")
SUMMARY_COLUMNS = (
    "row", "what", "seeds", "mean", "sd", "min", "max", "low95", "high95", "difference",
    "difference_low95", "difference_high95", "compared", "mean_class", "rgb_only", "flow_only",
    "train_top1", "videos", "sources", "gmac", "parameters", "minutes",
)  # fmt: skip
_DRAW_SEED = 0  # of the resampling behind the intervals

Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Tables:
    """The runs of a study.

    Args:
      runs: a line for each by row and seed, `RUN_COLUMNS`, all texts as in the file.
      videos: the lines of its videos, `VIDEO_COLUMNS`.
    """

    runs: Mapping[Key, dict[str, str]]
    videos: Mapping[Key, list[dict[str, str]]]

    @classmethod
    def read(cls, folder: Path, label: str) -> "Tables":
        """Reads the tables of a study; none is no run.

        Raises:
          ValueError: they are damaged (names the file).
        """
        runs = {(row["row"], row["seed"]): row for row in _read(folder / f"{label}.csv")}
        videos: dict[Key, list[dict[str, str]]] = {key: [] for key in runs}
        for row in _read(folder / f"{label}_videos.csv"):
            if (row["row"], row["seed"]) not in videos:
                raise ValueError(
                    f"{folder / label}_videos.csv speaks of row {row['row']!r} with seed "
                    f"{row['seed']}, of which {label}.csv knows nothing: the two belong together"
                )
            videos[row["row"], row["seed"]].append(row)
        for key, run in runs.items():
            if len(videos[key]) != int(run["videos"]):
                raise ValueError(
                    f"{folder / label}_videos.csv has {len(videos[key])} videos of row {key[0]!r} "
                    f"with seed {key[1]}, and {label}.csv says {run['videos']}"
                )
        return cls(runs, videos)

    def merged(self, run: Mapping[str, Any], videos: Sequence[Mapping[str, Any]]) -> "Tables":
        """These runs and one more, which takes the place of one of the same row and seed.

        Raises:
          ValueError: it is about generated videos and the others about real ones, or the reverse.
        """
        key = str(run["row"]), str(run["seed"])
        for other in self.runs.values():
            if (other["data"] == "demo") != (run["data"] == "demo"):
                raise ValueError(
                    f"study {run['study']!r}: the results so far are about {other['data']!r} and "
                    f"the new ones about {run['data']!r}: generated and real videos never share a "
                    "table; choose another --results"
                )
            if other["chance"] != _text(run["chance"]):
                raise ValueError(
                    f"study {run['study']!r}: the results so far are about 1 / {other['chance']} "
                    f"classes and the new ones about 1 / {_text(run['chance'])}: other videos, "
                    "though the settings are the same; choose another --results"
                )
        text = {name: _text(run[name]) for name in RUN_COLUMNS}
        lines = [{name: _text(video[name]) for name in VIDEO_COLUMNS} for video in videos]
        return Tables({**self.runs, key: text}, {**self.videos, key: lines})

    def marked(self, wanted: Mapping[Key, str]) -> "Tables":
        """The same runs, those marked as stale whose settings are not what is wanted now.

        Args:
          wanted: digest of the settings of every run of the study, by row and seed.
        """
        runs = {
            key: {**run, "stale": "" if wanted.get(key) == run["settings"] else "yes"}
            for key, run in self.runs.items()
        }
        return Tables(runs, self.videos)

    def fresh(self) -> "Tables":
        """Without the runs that are stale."""
        keys = [key for key, run in self.runs.items() if not run["stale"]]
        return Tables({k: self.runs[k] for k in keys}, {k: self.videos[k] for k in keys})

    def write(self, folder: Path, label: str) -> None:
        """Writes both tables, sorted, each whole or not at all."""
        keys = sorted(self.runs, key=lambda key: (key[0], int(key[1])))
        _write(
            folder / f"{label}_videos.csv", VIDEO_COLUMNS, (v for k in keys for v in self.videos[k])
        )
        _write(folder / f"{label}.csv", RUN_COLUMNS, (self.runs[key] for key in keys))


def digest(settings: Mapping[str, Any]) -> str:
    """A short name of all settings that decide what comes out."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: not as many values as there are columns")
    return rows


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, text.getvalue().encode())


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


# --- from a run's folder ---------------------------------------------------------------------


def collect(workdir: Path, study: Study, row: Row, seed: int, overrides: Mapping[str, Any]) -> Any:
    """Reads what a finished run has shown.

    Args:
      workdir: its folder.
      study: it is part of.
      row: of the study.
      seed: of the run.
      overrides: what it changes of the card, for the record.

    Returns:
      A line of `RUN_COLUMNS` and the lines of its videos.

    Raises:
      FileNotFoundError: the run is not finished.
    """
    from stf_jax.cost import layer_costs, total
    from stf_jax.run import Run, deciding

    run = Run(workdir)
    results, settings = run.read_json("results.json"), run.settings()
    low, high = results["interval95"]
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    layers = layer_costs(settings, len(results["class_names"]))
    seconds = results["seconds"]
    line = {
        "study": study.name,
        "row": row.name,
        "seed": seed,
        "stale": "",
        "overrides": json.dumps(overrides, sort_keys=True),
        "card": results["config_file"],
        "settings": digest(deciding(run.read_json("config.json"))),
        "data": results["data"]["name"],
        **{key: results[key] for key in ("subset", "protocol", "leaky", "overlap", "top1")},
        "low95": low,
        "high95": high,
        "mean_class": results["mean_class_accuracy"],
        **_single_streams(results["streams"]),
        "videos": results["num_videos"],
        "chance": results["chance"],
        "train_top1": [entry["top1"] for entry in log if entry["kind"] == "train"][-1],
        "parameters": results["parameters"],
        "gmac": total("", layers).macs / 1e9,
        "train_seconds": sum(stage["seconds"] for stage in results["stages"]),
        # Whoever comes first prepares the videos for all.
        "run_seconds": sum(s for name, s in seconds.items() if name != "prepare"),
        "commit": results["environment"]["commit"],
        "machine": results["environment"]["machine"],
    }
    return line, _videos(workdir, row, seed, results["resampled"] == "groups")


def _single_streams(streams: Mapping[str, Any]) -> dict[str, float | None]:
    """Top-1 of colour alone and flow alone: networks of their own, or the whole without one map."""
    found = {}
    for name, other in (("rgb", "flow"), ("flow", "rgb")):
        parts = [streams[key]["top1"] for key in (name, f"without_{other}") if key in streams]
        found[f"{name}_only"] = parts[0] if parts else None
    return found


def _videos(workdir: Path, row: Row, seed: int, groups_known: bool) -> list[dict[str, Any]]:
    groups = {video["video_id"]: video["group"] for video in _read(workdir / "videos.csv")}
    return [
        {
            "row": row.name,
            "seed": seed,
            "video_id": video["video_id"],
            "source": groups[video["video_id"]] if groups_known else video["video_id"],
            "label": video["label"],
            "predicted": video["prediction"],
        }
        for video in _read(workdir / "scores.csv")
    ]


# --- summary ---------------------------------------------------------------------------------


def summarise(study: Study, tables: Tables) -> list[dict[str, Any]]:
    """A line for every row that has runs, in the order of the study, `SUMMARY_COLUMNS` and cues.

    'mean' is the mean over the seeds of the top-1 accuracy; 'sd' (of a sample), 'min' and 'max' are
    over seeds; the 95 % interval is over videos, from drawing their sources anew, with the seeds
    that there are; or Wilson's over sources, if all answers are right or all are wrong.
    'difference' is that of the means over the seeds that row and reference share ('compared'), its
    interval over the same draws of sources.

    Args:
      study: the study.
      tables: its runs that are not stale.
    """
    lines = []
    for row in study.rows:
        keys = sorted((k for k in tables.runs if k[0] == row.name), key=lambda k: int(k[1]))
        if keys:
            line = _line(study, tables, keys, row.what)
            lines.append({"row": row.name, **line, **_compared(study, tables, row.name, keys)})
    if study.pooled and tables.runs:
        lines.append(_pooled(study, tables))
    return lines


def _line(study: Study, tables: Tables, keys: Sequence[Key], what: str) -> dict[str, Any]:
    runs = [tables.runs[key] for key in keys]
    videos = [video for key in keys for video in tables.videos[key]]
    top1 = [float(run["top1"]) for run in runs]
    low, high = _interval(videos)
    return {
        "what": what,
        "seeds": " ".join(seed for _, seed in keys),
        "mean": statistics.fmean(top1),
        "sd": statistics.stdev(top1) if len(top1) > 1 else None,
        "min": min(top1),
        "max": max(top1),
        "low95": low,
        "high95": high,
        **{
            name: _mean([run[name] for run in runs])
            for name in ("mean_class", "rgb_only", "flow_only", "train_top1", "gmac")
        },
        "videos": len({video["video_id"] for video in videos}),
        "sources": len({video["source"] for video in videos}),
        "parameters": runs[0]["parameters"],
        "minutes": _mean([run["train_seconds"] for run in runs], 1 / 60),
        **{f"cue_{cue}": _recall(videos, classes) for cue, classes in study.cues.items()},
    }


def _mean(texts: Sequence[str], factor: float = 1.0) -> float | None:
    values = [float(text) * factor for text in texts if text]
    return statistics.fmean(values) if values else None


def _right(videos: Sequence[Mapping[str, str]]) -> np.ndarray:
    return np.array([float(video["label"] == video["predicted"]) for video in videos])


def _interval(videos: Sequence[Mapping[str, str]]) -> tuple[float | None, float | None]:
    names, sources = np.unique([video["source"] for video in videos], return_inverse=True)
    right = _right(videos)
    # All classes as one: only the accuracy over all videos is wanted.
    drawn = bootstrap(right, np.zeros(len(videos), int), sources, 1, seed=_DRAW_SEED).top1
    if drawn and right.min() == right.max():
        # Every draw is alike. So little is known of new sources that each counts as one trial.
        return wilson(len(names) * int(right[0]), len(names))
    return drawn or (None, None)


def _recall(videos: Sequence[Mapping[str, str]], classes: Sequence[str]) -> float | None:
    """Mean over classes of the share of their videos that were taken for them."""
    parts = [_right([v for v in videos if v["label"] == name]) for name in classes]
    return float(np.mean([part.mean() for part in parts])) if all(map(len, parts)) else None


def _compared(
    study: Study, tables: Tables, name: str, keys: Sequence[Key]
) -> dict[str, float | str | None]:
    """The difference from the reference, over the seeds that both have."""
    seeds = [seed for _, seed in keys if (study.reference, seed) in tables.runs]
    if name == study.reference or not seeds:
        return dict.fromkeys(
            ("difference", "difference_low95", "difference_high95", "compared"), None
        )
    both = [
        [video for seed in seeds for video in tables.videos[row, seed]]
        for row in (name, study.reference)
    ]
    names = [[video["source"] for video in videos] for videos in both]
    numbers = np.unique(names[0] + names[1], return_inverse=True)[1]
    sources = numbers[: len(names[0])], numbers[len(names[0]) :]
    right = _right(both[0]), _right(both[1])
    low, high = bootstrap_difference(right, sources, seed=_DRAW_SEED) or (None, None)
    mean = [
        statistics.fmean(float(tables.runs[row, seed]["top1"]) for seed in seeds)
        for row in (name, study.reference)
    ]
    same = {v["video_id"] for v in both[0]} == {v["video_id"] for v in both[1]}
    return {
        "difference": mean[0] - mean[1],
        "difference_low95": low,
        "difference_high95": high,
        "compared": f"seeds {' '.join(seeds)}, {'the same' if same else 'other'} videos",
    }


def _pooled(study: Study, tables: Tables) -> dict[str, Any]:
    """All rows as one: the accuracy is over all their videos, the spread over the rows."""
    keys = sorted(tables.runs)
    line = _line(study, tables, keys, f"{study.pooled}: {len(keys)} of {len(study.rows)} rows")
    videos = [video for key in keys for video in tables.videos[key]]
    line |= {"mean": float(_right(videos).mean()), "seeds": " ".join(sorted({s for _, s in keys}))}
    nothing = ("difference", "difference_low95", "difference_high95", "compared")
    return {"row": "all", **line, **dict.fromkeys(nothing)}


def write_summary(folder: Path, label: str, study: Study, lines: Sequence[dict[str, Any]]) -> None:
    """Writes study_NAME_summary.csv."""
    columns = [*SUMMARY_COLUMNS, *(f"cue_{cue}" for cue in study.cues)]
    rows = [{name: _text(line[name]) for name in columns} for line in lines]
    _write(folder / f"{label}_summary.csv", columns, rows)


# --- figure ----------------------------------------------------------------------------------


def draw(path: Path, study: Study, tables: Tables, lines: Sequence[dict[str, Any]]) -> None:
    """Draws a summary: a dot for every seed, means with their intervals, reference and chance.

    Args:
      path: of the picture (PNG).
      study: the study.
      tables: its runs that are not stale; some.
      lines: its summary.
    """
    from stf_jax.charts import picture

    runs = list(tables.runs.values())
    widths = [6.0, 1.1 * len(study.cues)] if study.cues else [1.0]
    words = {"test": "test videos", "validation": "held-out training videos (not a test)"}
    subset = words[runs[0]["subset"]]
    made = "generated videos" if runs[0]["data"] == "demo" else runs[0]["data"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, 11.0, 1.9 + 0.42 * len(lines), dots=110) as figure:
        axes: Any = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        _draw_dots(axes[0], study, tables, lines)
        if study.cues:
            _draw_cues(axes[1], study, lines, float(runs[0]["chance"]))
        figure.suptitle(
            f"{study.name}: top-1 accuracy on {subset}, {made}\n"
            f"dots: {study.repeat}s; diamonds and bars: mean and 95 % interval over videos",
            fontsize=11,
        )


def _draw_dots(ax: Any, study: Study, tables: Tables, lines: Sequence[dict[str, Any]]) -> None:
    most = max(len(line["seeds"].split()) for line in lines)
    for place, line in enumerate(lines):
        pooled = bool(study.pooled) and line["row"] == "all"
        keys = [key for key in tables.runs if pooled or key[0] == line["row"]]
        leaky = any(tables.runs[key]["leaky"] == "True" for key in keys)
        colour = "#c0392b" if leaky else "#2c5f8a"
        dots = [100 * float(tables.runs[key]["top1"]) for key in keys]
        ax.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.45, ms=6, mec="none")
        if line["low95"] is not None:
            ends = 100 * line["low95"], 100 * line["high95"]
            ax.plot(ends, [place] * 2, color=colour, lw=1.6)
        fewer = len(line["seeds"].split()) < most
        face = "white" if fewer else colour
        ax.plot(100 * line["mean"], place, "D", color=colour, mfc=face, ms=7)
        told = f"{100 * line['mean']:.1f} %"
        if line["difference"] is not None:
            told += f"  ({100 * line['difference']:+.1f})"
        ax.text(1.01, place, told, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
        if line["row"] == study.reference:
            ax.axvline(100 * line["mean"], color="#2c5f8a", ls="--", lw=1, zorder=0)
    chance = statistics.fmean(float(run["chance"]) for run in tables.runs.values())
    ax.axvline(100 * chance, color="grey", ls=":", lw=1.2, zorder=0)
    ax.text(100 * chance + 0.7, -0.75, "chance", color="grey", fontsize=8)
    labels = []
    for line in lines:
        count = len(line["seeds"].split())
        few = f" [{count} of {most} {study.repeat}s]" if count < most else ""
        leaky = any(r["leaky"] == "True" for k, r in tables.runs.items() if k[0] == line["row"])
        labels.append(line["what"] + few + (" LEAKY" if leaky else ""))
    ax.set(yticks=range(len(lines)), yticklabels=labels, xlim=(0, 102))
    ax.set(ylim=(len(lines) - 0.4, -1.1), xlabel="top-1, %")
    against = f"mean (points against '{study.reference}')" if study.reference else "mean"
    ax.set_title(against, loc="right", fontsize=9)
    ax.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _draw_cues(ax: Any, study: Study, lines: Sequence[dict[str, Any]], chance: float) -> None:
    """Rows by cues: mean accuracy of the classes that need each."""
    table = np.array(
        [
            [
                np.nan if line[f"cue_{cue}"] is None else 100 * line[f"cue_{cue}"]
                for cue in study.cues
            ]
            for line in lines
        ]
    )
    ax.imshow(table, cmap="viridis", vmin=100 * chance, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        told = "n/a" if np.isnan(value) else f"{value:.0f}"
        dark = value < 60
        ax.text(column, row, told, ha="center", va="center", fontsize=10,
                color="white" if dark else "black")  # fmt: skip
    ax.set(xticks=range(len(study.cues)), yticks=[], ylim=(len(lines) - 0.4, -1.1))
    ax.set_xticklabels(list(study.cues), fontsize=8)
    ax.set_title("accuracy of the classes that need it, %", fontsize=9)
    for side in ax.spines.values():
        side.set_visible(False)
