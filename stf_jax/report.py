"""From a run's files to one self-contained HTML page: `workdir/report/index.html`.

The page is a pure function of what lies in the workdir: no clock, no network, no scripts, so that
the same files give the same bytes and the page can be mailed, printed and read in ten years.
Python works out every number and coordinate; `templates/report.html.jinja` only places them.

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
import io
import json
import math
import os
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float32, UInt8

# The size of a plot in its own units; the page scales it to the width at hand.
PLOT_WIDTH, PLOT_HEIGHT = 520, 300
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 50.0, 508.0, 26.0, 260.0

FILMSTRIP_FRAMES = 8
MAX_CLIPS = 8
MAX_MISTAKES = 10
MAX_PAIRS = 8
# Above this many classes the confusion matrix has no room for figures in its cells.
DENSE_CLASSES = 20
# Pictures are shown at about this height; sending more pixels only makes the file heavier.
MAX_PICTURE_SIDE = 160
# A table of epochs or a plot with more points than this hides its dots until hovered.
MANY_POINTS = 60

_KINDS = ("train", "validation")
_RESULT_KEYS = (
    "top1", "top5", "mean_class_accuracy", "loss", "num_videos", "interval95", "protocol",
    "leaky", "overlap", "excluded", "faults", "notes", "class_names", "confusion", "seconds",
    "data", "stages", "environment", "config_file", "seed", "parameters", "chance",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EpochRow:
    """One row of `metrics.jsonl`: the means of one epoch over one subset.

    Attributes:
      stage: name of the training stage.
      kind: 'train' or 'validation'.
      epoch: epochs completed in this stage, from 1 (0: before its first step).
      step: updates made in this stage.
      loss: mean cross-entropy, nats.
      top1: share of clips classified rightly, 0 to 1.
      learning_rate: at the end of the epoch.
      num_videos: videos behind the means.
      seconds: time spent in the stage so far, over all restarts.
    """

    stage: str
    kind: str
    epoch: int
    step: int
    loss: float
    top1: float
    learning_rate: float
    num_videos: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class LinearScale:
    """The straight line that takes data from [low, high] to page units [start, stop].

    Example:
      >>> LinearScale(low=0.0, high=10.0, start=50.0, stop=250.0)(5.0)
      150.0
    """

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The page coordinate of `value`, rounded to a tenth of a unit."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)


@dataclasses.dataclass(frozen=True)
class Span:
    """A stage's place on the epoch axis that all stages share.

    Attributes:
      name: the stage.
      number: 1 for the first stage.
      first: epochs completed when the stage starts.
      last: epochs completed when it ends.
      learning_rate: as text; 'a to b' if it changed.
    """

    name: str
    number: int
    first: int
    last: int
    learning_rate: str


@dataclasses.dataclass(frozen=True)
class Point:
    """A dot of a curve: page coordinates and the text shown when it is hovered."""

    x: float
    y: float
    title: str


@dataclasses.dataclass(frozen=True)
class Line:
    """The curve of one subset within one stage; stages are not joined, the optimiser restarts."""

    kind: str
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The `points` attribute of an SVG polyline."""
        return " ".join(f"{point.x},{point.y}" for point in self.points)


@dataclasses.dataclass(frozen=True)
class Tick:
    """A mark on an axis: its page coordinate and its label."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Band:
    """The strip of a plot that belongs to one stage."""

    left: float
    right: float
    label: str


@dataclasses.dataclass(frozen=True)
class Plot:
    """One panel of curves in page coordinates, ready to be drawn.

    Attributes:
      name: what the y axis shows.
      lines: per stage and subset.
      x_ticks: epochs.
      y_ticks: in the panel's own unit.
      bands: the stages, left to right; a boundary is drawn where one begins.
      best: rings around the epochs whose weights were kept.
      reference: a dashed level with its label (chance), or None.
      many: too many points for dots.
      description: the panel in words, for those who cannot see it.
    """

    name: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bands: tuple[Band, ...]
    best: tuple[Point, ...]
    reference: Tick | None
    many: bool
    description: str


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
    """A moment of a clip: the frame and its flow as data URIs, and the frame's number from 1."""

    number: int
    frame: str
    flow: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """A test clip as the page shows it; `scored` is None if `scores.csv` does not know it."""

    video_id: str
    pictures: tuple[Picture, ...]
    num_frames: int
    scored: ScoredVideo | None


def write_report(workdir: Path) -> Path:
    """Writes the report of the run in `workdir` and returns the path of the page.

    The page replaces an older one in one step, so that a reader never meets half a page.

    Args:
      workdir: a run's folder, with `results.json` and what else the run left.

    Returns:
      `workdir/report/index.html`.

    Raises:
      FileNotFoundError: there is no `results.json`; names the command that writes it.
      ValueError: a file is there and does not hold what it should; names file and key.
    Source: paper, Figs. 9 to 11 (curves) and Table 3 (confusion matrix).
    """
    page = _render(_page_contents(workdir))
    path = workdir / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f"index.html.{os.getpid()}")
    # A file name that is not valid text on its disk reaches us as lone surrogates.
    aside.write_bytes(page.encode("utf-8", errors="backslashreplace"))
    os.replace(aside, path)
    return path


def _page_contents(workdir: Path) -> dict[str, Any]:
    """Everything that the template names, worked out from the files of `workdir`."""
    results = _read_results(workdir)
    names: list[str] = results["class_names"]
    rows, notes = _read_metrics(workdir)
    spans = _stage_spans(rows, [stage["name"] for stage in results["stages"]])
    videos = _read_scores(workdir, names)
    samples, sample_notes = _read_samples(workdir)
    scale = _flow_scale(samples)
    return {
        "results": results,
        "rows": rows,
        "spans": spans,
        "plots": _plots(rows, spans, results),
        "classes": _class_rows(results["confusion"], names),
        "pairs": _confused_pairs(results["confusion"], names),
        "dense": len(names) > DENSE_CLASSES,
        "videos": videos,
        "mistakes": _confident_mistakes(videos or []),
        "clips": _clips(samples, videos or [], scale),
        "num_samples": len(samples),
        "flow_scale": scale,
        "flow_key": _flow_key(scale) if samples else None,
        "config": _read_config(workdir),
        "notes": [*results["notes"], *notes, *sample_notes],
        "commands": _commands(workdir, results["config_file"]),
        "shares": _shares(results["seconds"]),
    }


def _render(contents: dict[str, Any]) -> str:
    """The page as text; every value is escaped, since names come from other people's files."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration, grouped=grouped, decimal=decimal)
    # The plot's frame: the template draws the axes where the curves were scaled to.
    environment.globals["frame"] = {
        "width": PLOT_WIDTH, "height": PLOT_HEIGHT, "left": PLOT_LEFT,
        "right": PLOT_RIGHT, "top": PLOT_TOP, "bottom": PLOT_BOTTOM,
    }  # fmt: skip
    return environment.get_template("report.html.jinja").render(contents)


# --- Reading -------------------------------------------------------------------------------------


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
        raise ValueError(f"{path} is not valid JSON ({error}); remove it. {advice}") from error
    missing = [key for key in _RESULT_KEYS if key not in results]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; remove it. {advice}")
    size = len(results["class_names"])
    lengths = [len(row) for row in results["confusion"]]
    if lengths != [size] * size:
        raise ValueError(
            f"{path}: 'confusion' should be {size} x {size}, one row and column per name in "
            f"'class_names', and has {len(lengths)} rows of length {sorted(set(lengths))}"
        )
    return results


def _read_metrics(workdir: Path) -> tuple[list[EpochRow], list[str]]:
    """The epochs in the order of the file, and what had to be said about the file.

    A run that was cut off and resumed writes some epochs twice (the later row is what happened
    to the weights that live on), and may leave half a line behind, alone or before a whole row.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return [], []
    latest: dict[tuple[str, str, int], EpochRow] = {}
    broken: list[int] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        start = max(line.rfind("{"), 0)  # rows hold no object within, so the last one starts here
        row = _epoch_row(line[start:])
        if row is None or start:
            broken.append(number)
        if row is not None:
            latest[row.stage, row.kind, row.epoch] = row
    notes = [
        f"metrics.jsonl, line {number}: an incomplete row (the run was cut off while writing it) "
        "is left out of the curves."
        for number in broken
    ]
    unusual = sum(not math.isfinite(row.loss) for row in latest.values())
    if unusual:
        notes.append(
            f"metrics.jsonl: {unusual} epochs have a loss that is not a finite number; "
            "the curves have gaps there."
        )
    return list(latest.values()), notes


def _epoch_row(line: str) -> EpochRow | None:
    """The row in a line of `metrics.jsonl`, or None if the line does not hold a whole one."""
    try:
        values = json.loads(line)
        row = EpochRow(
            stage=str(values["stage"]),
            kind=str(values["kind"]),
            epoch=int(values["epoch"]),
            step=int(values["step"]),
            loss=float(values["loss"]),
            top1=float(values["top1"]),
            learning_rate=float(values["learning_rate"]),
            num_videos=int(values["num_videos"]),
            seconds=float(values["seconds"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
    return row if row.kind in _KINDS else None


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


def _read_config(workdir: Path) -> list[tuple[str, str]] | None:
    """The configuration as (dotted key, JSON value), or None if `config.json` is not there."""
    path = workdir / "config.json"
    if not path.is_file():
        return None
    try:
        return list(_flatten(json.loads(path.read_text(encoding="utf-8"))))
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


# --- Curves --------------------------------------------------------------------------------------


def _stage_spans(rows: Sequence[EpochRow], stage_names: Sequence[str]) -> list[Span]:
    """Where each stage with epochs lies on the axis: a stage starts where the one before ended."""
    order = dict.fromkeys([*stage_names, *(row.stage for row in rows)])
    spans: list[Span] = []
    for name in order:
        own = [row for row in rows if row.stage == name]
        if not own:
            continue
        first = spans[-1].last if spans else 0
        rates = [row.learning_rate for row in sorted(own, key=lambda row: row.epoch)]
        start, stop = f"{rates[0]:.3g}", f"{rates[-1]:.3g}"
        spans.append(
            Span(
                name=name,
                number=len(spans) + 1,
                first=first,
                last=first + max(row.epoch for row in own),
                learning_rate=start if start == stop else f"{start} to {stop}",
            )
        )
    return spans


def _plots(
    rows: Sequence[EpochRow], spans: Sequence[Span], results: dict[str, Any]
) -> tuple[Plot, ...]:
    """The panels of loss and accuracy; none for a run without epochs."""
    finite = [row.loss for row in rows if math.isfinite(row.loss)]
    if not finite:
        return ()
    best = {(stage["name"], stage["best_epoch"]) for stage in results["stages"]}
    loss_ticks = nice_ticks(0.0, max(finite), 5)
    loss = _plot("Loss (nats)", "loss", loss_ticks, rows, spans, best, None)
    top1_ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    top1 = _plot("Top-1 accuracy", "top1", top1_ticks, rows, spans, best, results["chance"])
    return loss, top1


def _plot(
    name: str,
    field: str,
    levels: Sequence[float],
    rows: Sequence[EpochRow],
    spans: Sequence[Span],
    best: set[tuple[str, int]],
    chance: float | None,
) -> Plot:
    """One panel: `field` of every row over the epochs of all stages."""
    end = float(max(spans[-1].last, 1))
    across = LinearScale(0.0, end, PLOT_LEFT, PLOT_RIGHT)
    up = LinearScale(levels[0], levels[-1], PLOT_BOTTOM, PLOT_TOP)
    text = percent if field == "top1" else decimal
    whole = [x for x in nice_ticks(0.0, end, 6) if x.is_integer()]
    lines: list[Line] = []
    rings: list[Point] = []
    for span in spans:
        for kind in _KINDS:
            own = [row for row in rows if (row.stage, row.kind) == (span.name, kind)]
            points = _points(own, field, span, across, up)
            if points:
                lines.append(Line(kind, tuple(points.values())))
            if kind == "validation":
                rings += [p for epoch, p in points.items() if (span.name, epoch) in best]
    return Plot(
        name=name,
        lines=tuple(lines),
        x_ticks=tuple(Tick(across(x), f"{x:g}") for x in whole if x <= end),
        y_ticks=tuple(Tick(up(y), _tick_label(y, field)) for y in levels),
        bands=tuple(_band(span, across) for span in spans),
        best=tuple(rings),
        reference=None if chance is None else Tick(up(chance), f"chance {percent(chance)}"),
        many=max((len(line.points) for line in lines), default=0) > MANY_POINTS,
        description=_plot_in_words(name, field, rows, spans, text),
    )


def _points(
    rows: Sequence[EpochRow], field: str, span: Span, across: LinearScale, up: LinearScale
) -> dict[int, Point]:
    """The dots of one curve by epoch; a value that is not finite has none."""
    points: dict[int, Point] = {}
    for row in sorted(rows, key=lambda row: row.epoch):
        value = getattr(row, field)
        if not math.isfinite(value):
            continue
        title = (
            f"{row.stage}, epoch {row.epoch}, {row.kind}: loss {decimal(row.loss)}, "
            f"top-1 {percent(row.top1)} of {grouped(row.num_videos)} videos, "
            f"learning rate {row.learning_rate:.3g}, {duration(row.seconds)} into the stage"
        )
        points[row.epoch] = Point(across(float(span.first + row.epoch)), up(value), title)
    return points


def _band(span: Span, across: LinearScale) -> Band:
    """A stage's strip, labelled with the longest label that fits into it."""
    left, right = across(float(span.first)), across(float(span.last))
    fitting = (
        label
        for label in (f"{span.number} · {span.name}", f"{span.number}")
        if len(label) * 9 + 10 <= right - left
    )
    return Band(left, right, next(fitting, ""))


def _tick_label(value: float, field: str) -> str:
    return percent(value, 0) if field == "top1" else f"{value:g}"


def _plot_in_words(
    name: str, field: str, rows: Sequence[EpochRow], spans: Sequence[Span], text: Any
) -> str:
    """What a curve tells, for those who cannot see it: first and last value per stage."""
    parts = []
    for span in spans:
        for kind in _KINDS:
            own = sorted(
                (row for row in rows if (row.stage, row.kind) == (span.name, kind)),
                key=lambda row: row.epoch,
            )
            if own:
                first, last = (text(getattr(row, field)) for row in (own[0], own[-1]))
                parts.append(f"{kind}, stage {span.name}: from {first} to {last}")
    return f"{name} per epoch. {'; '.join(parts)}."


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that span [low, high].

    The last one is at or above `high`, so that the largest value stays inside the plot.

    Example:
      >>> nice_ticks(0.0, 2.1, 5)
      [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    raw = max(high - low, 1e-6) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


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


# --- Clips ---------------------------------------------------------------------------------------


def _clips(
    samples: Sequence[Sample], videos: Sequence[ScoredVideo], scale: float
) -> tuple[Clip, ...]:
    scored = {video.video_id: video for video in videos}
    return tuple(
        Clip(
            video_id=sample.video_id,
            pictures=_filmstrip(sample, scale),
            num_frames=len(sample.frames),
            scored=scored.get(sample.video_id),
        )
        for sample in samples[:MAX_CLIPS]
    )


def _filmstrip(sample: Sample, scale: float) -> tuple[Picture, ...]:
    """Evenly spaced moments of a clip, first and last included."""
    from stf_jax.flow import flow_to_colour

    last = len(sample.frames) - 1
    moments = np.unique(np.linspace(0, last, FILMSTRIP_FRAMES).round().astype(int))
    return tuple(
        Picture(
            number=int(i) + 1,
            frame=_picture_uri(sample.frames[i]),
            flow=_picture_uri(flow_to_colour(sample.flow[i], scale)),
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


def _flow_key(scale: float, size: int = 96) -> str:
    """A picture of the colour code: the motion at each place points away from the centre."""
    from stf_jax.flow import flow_to_colour

    axis = np.linspace(-scale, scale, size, dtype=np.float32)
    return _picture_uri(flow_to_colour(np.stack(np.meshgrid(axis, axis), axis=-1), scale))


def _picture_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """The picture as a data URI (JPEG with full colour resolution), no larger than it is shown."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- Words and numbers ---------------------------------------------------------------------------


def _commands(workdir: Path, config_file: str) -> list[tuple[str, str]]:
    """What was typed, or can be, as (purpose, command)."""
    where = f"--workdir={shlex.quote(str(workdir))}"
    return [
        ("Train, or go on", f"python -m stf_jax.main --config={shlex.quote(config_file)} {where}"),
        ("Evaluate again", f"python experiments/evaluate.py {where}"),
        ("Make this page again", f"python experiments/report.py {where}"),
    ]


def _shares(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """The phases as (name, seconds, share of all)."""
    total = sum(seconds.values()) or 1.0
    return [(name, value, value / total) for name, value in seconds.items()]


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage with a non-breaking space; 'n/a' if there is no such number.

    Example:
      >>> percent(469 / 480).replace(chr(160), " ")
      '97.7 %'
    """
    if share is None or not math.isfinite(share):
        return "n/a"
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def decimal(value: float | None) -> str:
    """A loss with three decimals, or three significant digits below 0.001.

    Example:
      >>> decimal(0.69314), decimal(0.0000421), decimal(float("nan"))
      ('0.693', '4.21e-05', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"


def grouped(count: int) -> str:
    """A count with thousands separated.

    Example:
      >>> grouped(216005251)
      '216,005,251'
    """
    return f"{count:,}"


def duration(seconds: float) -> str:
    """A time span in the two units that a person would use.

    Example:
      >>> [duration(s).replace(chr(160), " ") for s in (4.2, 75.0, 3 * 3600 + 120.0)]
      ['4.2 s', '1 min 15 s', '3 h 2 min']
    """
    space = "\N{NO-BREAK SPACE}"
    if seconds < 59.95:
        parts = f"{seconds:.1f} s"
    elif seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        parts = f"{minutes} min {rest} s"
    else:
        hours, minutes = divmod(round(seconds / 60), 60)
        parts = f"{hours} h {minutes} min"
    return parts.replace(" ", space)
