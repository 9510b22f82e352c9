"""From the files of one run or several to one self-contained HTML page.

The page is a pure function of what lies in the workdirs: no clock, no network, no scripts but its
own, so that the same files give the same bytes and the page can be mailed, printed and read in ten
years. Python works out every number and coordinate; `templates/report.html.jinja` places them,
and all of it can be read without scripts. `templates/report.js` adds what moves: zoom, sorting,
clips that play.

    results.json   the evaluation, the stages, the data facts   (needed)
    metrics.jsonl  one row per stage, epoch and subset          (curves)
    scores.csv     class probabilities of every test video      (clips, mistakes)
    samples/*.npz  frames and flow of a few test clips          (clips)
    config.json    the resolved configuration                   (configuration)

What is missing is said on the page; only `results.json` is required.
"""

import base64
import csv
import dataclasses
import hashlib
import io
import json
import os
import shlex
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
from jaxtyping import Float32, UInt8

from stf_jax import curves
from stf_jax.wording import decimal, duration, grouped, percent, scored_videos

# As many as there are colours that can be told apart; more columns would not fit a page either.
MAX_RUNS = 8
# Moments of a clip that are printed, and that are shown without scripts.
FILMSTRIP_FRAMES = 8
# A clip that plays has no more pictures than this: they are most of the page's bytes.
MAX_FRAMES = 40
MAX_CLIPS = 12
MAX_MISTAKES = 10
MAX_PAIRS = 8
# Above this many classes the confusion matrix has no room for figures in its cells.
DENSE_CLASSES = 20
# Pictures are shown at about this height; sending more pixels only makes the file heavier.
MAX_PICTURE_SIDE = 160

_RESULT_KEYS = (
    "top1", "top5", "mean_class_accuracy", "loss", "num_videos", "interval95", "protocol",
    "leaky", "overlap", "excluded", "faults", "notes", "class_names", "confusion", "seconds",
    "data", "stages", "environment", "config_file", "seed", "parameters", "chance",
)  # fmt: skip


# Shown where an evaluation gives them.
_MORE_KEYS = (
    "seen", "calibration", "calibration_error", "clip_level", "mean_class_interval95",
    "recall_interval95", "streams",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the confusion matrix.

    Attributes:
      count: videos of the row's class that were called the column's class.
      share: of the row's class, 0 to 1.
      alpha: strength of the cell's colour.
      right: on the diagonal.
      title: the cell in words.
    """

    count: int
    share: float
    alpha: float
    right: bool
    title: str


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """What the evaluation says about one class.

    Attributes:
      name: the class.
      videos: test videos of the class.
      precision: right among those called so; None if none was.
      recall: right among those that are; None if there are none.
      taken_for: the commonest mistake as (class, count), or None.
      cells: the class's row of the confusion matrix.
    """

    name: str
    videos: int
    precision: float | None
    recall: float | None
    taken_for: tuple[str, int] | None
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class ScoredVideo:
    """One row of `scores.csv`: a test video, its class, and the probability of every class."""

    video_id: str
    label: int
    prediction: int
    probabilities: tuple[float, ...]

    @property
    def right(self) -> bool:
        """Whether the prediction is the true class."""
        return self.label == self.prediction

    def best(self, count: int) -> list[int]:
        """The `count` likeliest classes, likeliest first; ties in class order.

        Example:
          >>> ScoredVideo("v", 0, 1, (0.2, 0.5, 0.3)).best(2)
          [1, 2]
        """
        order = sorted(range(len(self.probabilities)), key=lambda k: -self.probabilities[k])
        return order[:count]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One file of `samples/`: the frames that the network saw, and the motion between them.

    Attributes:
      video_id: as in `scores.csv`.
      frames: uint8 `t h w 3`.
      flow: float32 `t h w 2`, u right and v down, px per frame.
    """

    video_id: str
    frames: UInt8[np.ndarray, "t h w 3"]
    flow: Float32[np.ndarray, "t h w 2"]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A moment of a clip.

    Attributes:
      number: of the frame, from 1.
      frame: as a data URI.
      flow: as a data URI.
      in_strip: whether it is one of the few that are printed.
    """

    number: int
    frame: str
    flow: str
    in_strip: bool


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a run says of a clip; `scored` is None if its `scores.csv` does not know the clip."""

    run: int
    label: str
    scored: ScoredVideo | None


@dataclasses.dataclass(frozen=True)
class Clip:
    """A test clip as the page shows it.

    Attributes:
      anchor: its name within the page.
      video_id: as in `scores.csv`.
      truth: its class, or None if no run knows it.
      source: the run whose frames are shown.
      pictures: its moments.
      num_frames: frames that the network saw.
      guesses: what each run says of it.
    """

    anchor: str
    video_id: str
    truth: str | None
    source: str
    pictures: tuple[Picture, ...]
    num_frames: int
    guesses: tuple[Guess, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a run say.

    Attributes:
      number: 1 for the first run of the page.
      label: what the page calls it.
      workdir: its folder.
      results: `results.json`.
      names: its classes.
      history: its epochs.
      notes: what had to be said about its files and of the run itself.
      videos: rows of `scores.csv`; None if there is no such file.
      samples: its clips.
      config: the configuration by dotted key; None if there is no such file.
    """

    number: int
    label: str
    workdir: Path
    results: dict[str, Any]
    history: curves.History
    notes: tuple[str, ...]
    videos: tuple[ScoredVideo, ...] | None
    samples: tuple[Sample, ...]
    config: dict[str, str] | None

    @property
    def names(self) -> list[str]:
        """The classes."""
        return self.results["class_names"]

    @property
    def total_seconds(self) -> float:
        """Time of all phases."""
        return sum(self.results["seconds"].values())

    def class_name(self, scored: ScoredVideo | None, *, truth: bool) -> str | None:
        """The true class of a video, or the one that it was called; None of an unknown video."""
        if scored is None:
            return None
        return self.names[scored.label if truth else scored.prediction]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of a table with a column per run; a value is None where a run has none."""

    key: str
    values: tuple[str | None, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs disagree."""
        return len(set(self.values)) > 1


@dataclasses.dataclass(frozen=True)
class ClassLine:
    """A line of the table of classes: a class in every run, None in one that does not have it."""

    name: str
    rows: tuple[ClassRow | None, ...]

    @property
    def videos(self) -> list[int]:
        """Test videos of the class; several figures where the runs do not agree."""
        return sorted({row.videos for row in self.rows if row is not None})

    @property
    def difference(self) -> float | None:
        """Recall in the last run less that in the first; None if either has none."""
        first, last = self.rows[0], self.rows[-1]
        if first is None or last is None or first.recall is None or last.recall is None:
            return None
        return last.recall - first.recall


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What runs say of the test videos that all of them scored.

    Attributes:
      shared: how many those are.
      others: further videos, which some of the runs scored.
      all_right: every run is right.
      none_right: no run is.
      alone: per run, where it alone is right.
    """

    shared: int
    others: int
    all_right: int
    none_right: int
    alone: tuple[int, ...]


def write_report(workdir: Path, *others: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, or of several side by side, and returns the path of the page.

    The page replaces an older one in one step, so that a reader never meets half a page.

    Args:
      workdir: a run's folder, with `results.json` and what else the run left.
      *others: further runs to set beside it.
      out: where the page goes; without it `workdir/report/index.html`, for one run only.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError: there is no `results.json`; names the command that writes it.
      ValueError: a file is there and does not hold what it should (names file and key); a run is
        given twice; too many runs; several runs and no `out`.
    Source: paper, Figs. 9 to 11 (curves) and Table 3 (confusion matrix).
    """
    workdirs = [workdir, *others]
    if len({path.resolve() for path in workdirs}) < len(workdirs):
        raise ValueError("a run is given twice; each --workdir should be another run")
    if len(workdirs) > MAX_RUNS:
        raise ValueError(f"{len(workdirs)} runs; a page has room for {MAX_RUNS} side by side")
    if out is None:
        if others:
            raise ValueError("where should the page of several runs go? Add --out=compare.html")
        out = workdir / "report" / "index.html"
    page = _render(_page_contents(workdirs, out if others else None))
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.{os.getpid()}")
    # A file name that is not valid text on its disk reaches us as lone surrogates.
    aside.write_bytes(page.encode("utf-8", errors="backslashreplace"))
    os.replace(aside, out)
    return out


def _page_contents(workdirs: Sequence[Path], out: Path | None) -> dict[str, Any]:
    """Everything that the template names, worked out from the files of `workdirs`."""
    several = len(workdirs) > 1
    labels = _labels(workdirs)
    runs = [
        _read_run(path, number, labels[number - 1], several)
        for number, path in enumerate(workdirs, start=1)
    ]
    scale = _flow_scale([sample for run in runs for sample in run.samples])
    clips = _clips(runs, scale)
    return {
        "runs": runs,
        "several": several,
        "leaky": any(run.results["leaky"] for run in runs),
        "plots": curves.plots([run.history for run in runs]),
        "classes": {r.number: _class_rows(r.results["confusion"], r.names) for r in runs},
        "class_lines": _class_lines(runs),
        "pairs": {r.number: _confused_pairs(r.results["confusion"], r.names) for r in runs},
        "mistakes": {run.number: _confident_mistakes(run.videos or ()) for run in runs},
        "clips": clips,
        "clip_of": {clip.video_id: clip for clip in clips},
        "clips_of_pairs": _clips_of_pairs(runs, clips),
        "num_samples": len({(s.video_id) for run in runs for s in run.samples}),
        "flow_scale": scale,
        "flow_key": flow_key(scale) if clips else None,
        "agreement": _agreement(runs),
        "config": _settings([run.config for run in runs]),
        "environment": _settings([run.results["environment"] for run in runs]),
        "phases": list(dict.fromkeys(name for run in runs for name in run.results["seconds"])),
        "subsets": list(dict.fromkeys(n for r in runs for n in r.results["data"]["counts"])),
        "commands": _commands(runs, out),
        "shares": _shares(runs[0].results["seconds"]),
        "dense_classes": DENSE_CLASSES,
    }


def _labels(workdirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all runs apart.

    Example:
      >>> _labels([Path("runs/a"), Path("runs/b")]), _labels([Path("x/run"), Path("y/run")])
      (['a', 'b'], ['x/run', 'y/run'])
    """
    parts = [path.resolve().parts for path in workdirs]
    for length in range(1, max(len(path) for path in parts) + 1):
        labels = ["/".join(path[-length:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("the paths are distinct")


def _render(contents: dict[str, Any]) -> str:
    """The page as text; every value is escaped, since names come from other people's files."""
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration, grouped=grouped, decimal=decimal)
    environment.filters.update(scored=scored_videos)
    # The plot's frame: the template draws the axes where the curves were scaled to.
    environment.globals["frame"] = {
        "width": curves.PLOT_WIDTH, "height": curves.PLOT_HEIGHT, "left": curves.PLOT_LEFT,
        "right": curves.PLOT_RIGHT, "top": curves.PLOT_TOP, "bottom": curves.PLOT_BOTTOM,
    }  # fmt: skip
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = (folder / "report.js").read_text(encoding="utf-8")
    # The browser runs this very script and no other, whatever else may find its way into the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        contents,
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        script_digest=digest,
    )


# --- Reading -------------------------------------------------------------------------------------


def _read_run(workdir: Path, number: int, label: str, several: bool) -> Run:
    results = _read_results(workdir)
    rows, notes = curves.read_epochs(workdir / "metrics.jsonl")
    samples, sample_notes = _read_samples(workdir)
    videos = _read_scores(workdir, results["class_names"])
    return Run(
        number=number,
        label=label,
        workdir=workdir,
        results=results,
        history=curves.history(label if several else "", number, rows, results),
        notes=(*results["notes"], *notes, *sample_notes),
        videos=None if videos is None else tuple(videos),
        samples=tuple(samples),
        config=_read_config(workdir),
    )


def _read_results(workdir: Path) -> dict[str, Any]:
    path = workdir / "results.json"
    where = shlex.quote(str(workdir))
    advice = (
        "The report is made from it. This finishes a run, and writes it:\n"
        f"    python -m stf_jax.main --config=... --workdir={where}"
    )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {advice}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): move it away. {advice}") from error
    missing = [key for key in _RESULT_KEYS if key not in results]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it was written by another version of stf_jax, "
            "whose experiments/report.py reads it. To have one of this version, move it away (the "
            f"file, not the run). {advice}"
        )
    size = len(results["class_names"])
    lengths = [len(row) for row in results["confusion"]]
    if lengths != [size] * size:
        raise ValueError(
            f"{path}: 'confusion' should be {size} x {size}, one row and column per name in "
            f"'class_names', and has {len(lengths)} rows of length {sorted(set(lengths))}"
        )
    # Before it could be another, the subset was not written down.
    return dict.fromkeys(_MORE_KEYS) | {"subset": "test"} | results


def _read_scores(workdir: Path, names: Sequence[str]) -> list[ScoredVideo] | None:
    """The rows of `scores.csv`, or None if the file is not there."""
    path = workdir / "scores.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = list(csv.reader(file))
    expected = ["video_id", "label", "prediction", "correct", *names]
    if not table or table[0] != expected:
        raise ValueError(
            f"{path}: the header should be video_id, label, prediction, correct and the "
            f"{len(names)} class names of results.json, and starts with "
            f"{table[0][:6] if table else 'nothing'}; both files come from one evaluation"
        )
    return [_scored_video(path, line, row, names) for line, row in enumerate(table[1:], start=2)]


def _scored_video(path: Path, line: int, row: list[str], names: Sequence[str]) -> ScoredVideo:
    try:
        video_id, label, prediction, _, *probabilities = row
        if len(probabilities) != len(names):
            raise ValueError(f"{len(probabilities)} probabilities for {len(names)} classes")
        return ScoredVideo(
            video_id=video_id,
            label=names.index(label),
            prediction=names.index(prediction),
            probabilities=tuple(float(text) for text in probabilities),
        )
    except ValueError as error:
        raise ValueError(f"{path}, row {line}: {error}") from error


def _read_config(workdir: Path) -> dict[str, str] | None:
    """The configuration as JSON values by dotted key, or None if `config.json` is not there."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    try:
        return dict(_flatten(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested dict under the dotted names that the command line uses for them."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _read_samples(workdir: Path) -> tuple[list[Sample], list[str]]:
    """The clips kept for show, in order of their file names, and a note per unreadable file."""
    samples: list[Sample] = []
    notes: list[str] = []
    for path in sorted((workdir / "samples").glob("*.npz")):
        try:
            # Opened here: np.load leaves a damaged file open when it raises.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                samples.append(Sample(str(arrays["video_id"]), arrays["frames"], arrays["flow"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            notes.append(f"samples/{path.name} cannot be read and is not shown: {error}")
    return samples, notes


# --- Classes -------------------------------------------------------------------------------------


def _class_rows(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[ClassRow]:
    columns = [sum(column) for column in zip(*confusion, strict=True)]
    return [_class_row(i, row, columns[i], names) for i, row in enumerate(confusion)]


def _class_row(index: int, row: Sequence[int], called: int, names: Sequence[str]) -> ClassRow:
    total, right = sum(row), row[index]
    wrong = [(count, -k) for k, count in enumerate(row) if k != index and count]
    worst = max(wrong, default=None)
    return ClassRow(
        name=names[index],
        videos=total,
        precision=right / called if called else None,
        recall=right / total if total else None,
        taken_for=None if worst is None else (names[-worst[1]], worst[0]),
        cells=tuple(_cell(index, k, count, total, names) for k, count in enumerate(row)),
    )


def _cell(truth: int, called: int, count: int, total: int, names: Sequence[str]) -> Cell:
    share = count / total if total else 0.0
    verb = "rightly called" if truth == called else "called"
    return Cell(
        count=count,
        share=share,
        # A lone mistake among many still has to be seen, so colour starts above nothing.
        alpha=round(0.12 + 0.88 * share, 2) if count else 0.0,
        right=truth == called,
        title=f"{names[truth]}, {verb} {names[called]}: {count} of {total} ({percent(share)})",
    )


def _confused_pairs(
    confusion: Sequence[Sequence[int]], names: Sequence[str]
) -> list[tuple[str, str, int, int]]:
    """The commonest mistakes as (truth, called, count, videos of the true class)."""
    pairs = [
        (names[i], names[k], count, sum(row))
        for i, row in enumerate(confusion)
        for k, count in enumerate(row)
        if i != k and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[2] / pair[3]))[:MAX_PAIRS]


def _confident_mistakes(videos: Sequence[ScoredVideo]) -> list[ScoredVideo]:
    """The wrong videos in whose wrong class the network believed most."""
    wrong = [video for video in videos if not video.right]
    return sorted(wrong, key=lambda video: -video.probabilities[video.prediction])[:MAX_MISTAKES]


# --- Side by side --------------------------------------------------------------------------------


def _settings(tables: Sequence[Mapping[str, Any] | None]) -> list[Setting]:
    """One line per key that any run has, in the order of the first run that has it."""
    known = [table or {} for table in tables]
    keys = dict.fromkeys(key for table in known for key in table)
    return [
        Setting(key, tuple(str(table[key]) if key in table else None for table in known))
        for key in keys
    ]


def _class_lines(runs: Sequence[Run]) -> list[ClassLine]:
    """One line per class that any run knows."""
    tables = [
        {row.name: row for row in _class_rows(run.results["confusion"], run.names)} for run in runs
    ]
    names = dict.fromkeys(name for run in runs for name in run.names)
    return [
        ClassLine(name, tuple(table[name] if name in table else None for table in tables))
        for name in names
    ]


def _agreement(runs: Sequence[Run]) -> Agreement | None:
    """Where runs are right together and alone; None for one run, or if scores are missing."""
    if len(runs) < 2 or any(run.videos is None for run in runs):
        return None
    # A video is the same one only if it is of the same class.
    right = [{(v.video_id, run.names[v.label]): v.right for v in run.videos or ()} for run in runs]
    shared = set.intersection(*(set(table) for table in right))
    verdicts = [tuple(table[key] for table in right) for key in shared]
    return Agreement(
        shared=len(shared),
        others=len(set.union(*(set(table) for table in right))) - len(shared),
        all_right=sum(all(v) for v in verdicts),
        none_right=sum(not any(v) for v in verdicts),
        alone=tuple(sum(v[i] and sum(v) == 1 for v in verdicts) for i in range(len(runs))),
    )


# --- Clips ---------------------------------------------------------------------------------------


def _clips(runs: Sequence[Run], scale: float) -> tuple[Clip, ...]:
    """The runs' clips, each once, with the frames of the first run that kept it."""
    scored = {run.number: {video.video_id: video for video in run.videos or ()} for run in runs}
    kept: dict[str, tuple[Run, Sample]] = {}
    for place in range(max((len(run.samples) for run in runs), default=0)):
        for run in runs:
            if place < len(run.samples):
                kept.setdefault(run.samples[place].video_id, (run, run.samples[place]))
    clips = []
    for number, (video_id, (source, sample)) in enumerate(list(kept.items())[:MAX_CLIPS], start=1):
        guesses = tuple(
            Guess(run.number, run.label, scored[run.number].get(video_id)) for run in runs
        )
        truths = (
            run.class_name(guess.scored, truth=True)
            for run, guess in zip(runs, guesses, strict=True)
        )
        clips.append(
            Clip(
                anchor=f"clip-{number}",
                video_id=video_id,
                truth=next((truth for truth in truths if truth is not None), None),
                source=source.label,
                pictures=_pictures(sample, scale),
                num_frames=len(sample.frames),
                guesses=guesses,
            )
        )
    return tuple(clips)


def _clips_of_pairs(
    runs: Sequence[Run], clips: Iterable[Clip]
) -> dict[tuple[int, str | None, str | None], Clip]:
    """A clip of each kind of mistake, by run, true class and what it was called."""
    found: dict[tuple[int, str | None, str | None], Clip] = {}
    for clip in clips:
        for run, guess in zip(runs, clip.guesses, strict=True):
            called = run.class_name(guess.scored, truth=False)
            found.setdefault((run.number, run.class_name(guess.scored, truth=True), called), clip)
    return found


def _pictures(sample: Sample, scale: float) -> tuple[Picture, ...]:
    """Evenly spaced moments of a clip, first and last included; some of them are its filmstrip."""
    from stf_jax.flow import flow_to_colour

    last = len(sample.frames) - 1

    def evenly(count: int) -> np.ndarray:
        return np.unique(np.linspace(0, last, count).round().astype(int))

    strip = evenly(FILMSTRIP_FRAMES)
    moments = np.union1d(strip, evenly(min(MAX_FRAMES, last + 1)))
    return tuple(
        Picture(
            number=int(i) + 1,
            frame=picture_uri(sample.frames[i]),
            flow=picture_uri(flow_to_colour(sample.flow[i], scale)),
            in_strip=bool(i in strip),
        )
        for i in moments
    )


def _flow_scale(samples: Sequence[Sample]) -> float:
    """The speed drawn in full colour, px per frame: one for all clips, so that they compare.

    The 99th percentile, as a single wild vector would leave everything else pale.
    """
    if not samples:
        return 1.0
    speeds = [np.percentile(np.hypot(s.flow[..., 0], s.flow[..., 1]), 99) for s in samples]
    return max(round(float(max(speeds)), 1), 0.5)


def flow_key(scale: float, size: int = 96) -> str:
    """A picture of the colour code: the motion at each place points away from the centre."""
    from stf_jax.flow import flow_to_colour

    axis = np.linspace(-scale, scale, size, dtype=np.float32)
    return picture_uri(flow_to_colour(np.stack(np.meshgrid(axis, axis), axis=-1), scale))


def picture_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """The picture as a data URI (JPEG with full colour resolution), no larger than it is shown."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- Words and numbers ---------------------------------------------------------------------------


def _commands(runs: Sequence[Run], out: Path | None) -> list[tuple[str, str]]:
    """What was typed, or can be, as (purpose, command)."""
    where = [f"--workdir={shlex.quote(str(run.workdir))}" for run in runs]
    commands = []
    for run, place in zip(runs, where, strict=True):
        of = f" ({run.label})" if out else ""
        config = shlex.quote(run.results["config_file"])
        train = f"python -m stf_jax.main --config={config} {place}"
        commands += [
            (f"Train, or go on{of}", train),
            (f"Evaluate again{of}", f"python experiments/evaluate.py {place}"),
        ]
    target = [f"--out={shlex.quote(str(out))}"] if out else []
    again = " ".join(["python experiments/report.py", *where, *target])
    return [*commands, ("Make this page again", again)]


def _shares(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """The phases as (name, seconds, share of all)."""
    total = sum(seconds.values()) or 1.0
    return [(name, value, value / total) for name, value in seconds.items()]
