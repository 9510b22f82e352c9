"""The epochs of one run or several as curves: read, scaled, and described in words.

Python works out every coordinate, so the curves are there without scripts; the page's script only
moves them when somebody zooms.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stf_jax.wording import decimal, duration, grouped, percent

# The size of a plot in its own units; the page scales it to the width at hand.
PLOT_WIDTH, PLOT_HEIGHT = 520, 300
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 50.0, 508.0, 26.0, 260.0

# A plot with more points than this in a curve hides its dots until hovered.
MANY_POINTS = 60

KINDS = ("train", "validation")


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
class History:
    """How a run was trained.

    Attributes:
      label: what the page calls the run; nothing where it is the only one.
      number: 1 for the first run of the page.
      rows: its epochs.
      spans: its stages with epochs.
      best: the epochs whose weights were kept, as (stage, epoch).
      chance: share of clips that guessing gets right.
    """

    label: str
    number: int
    rows: tuple[EpochRow, ...]
    spans: tuple[Span, ...]
    best: frozenset[tuple[str, int]]
    chance: float


@dataclasses.dataclass(frozen=True)
class Point:
    """A dot of a curve: page coordinates and the text shown when it is hovered."""

    x: float
    y: float
    title: str


@dataclasses.dataclass(frozen=True)
class Line:
    """The curve of one subset within one stage of a run.

    Stages are not joined: the optimiser starts anew. `best` are rings around kept weights.
    """

    run: int
    kind: str
    points: tuple[Point, ...]
    best: tuple[Point, ...]

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
      field: 'loss' or 'top1'.
      lines: per run, stage and subset.
      x_ticks: epochs.
      y_ticks: in the panel's own unit.
      x_range: epochs at the left and right border.
      y_range: values at the lower and upper border.
      bands: the stages, left to right, if all runs have the same; a boundary is drawn where one
        begins.
      reference: a dashed level with its label (chance), or None.
      many: too many points for dots.
      description: the panel in words, for those who cannot see it.
    """

    name: str
    field: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    bands: tuple[Band, ...]
    reference: Tick | None
    many: bool
    description: str


def read_epochs(path: Path) -> tuple[list[EpochRow], list[str]]:
    """The epochs in the order of the file, and what had to be said about the file.

    A run that was cut off and resumed writes some epochs twice (the later row is what happened
    to the weights that live on), and may leave half a line behind, alone or before a whole row.

    Args:
      path: of `metrics.jsonl`; a file that is not there has no epochs.
    """
    if not path.is_file():
        return [], []
    latest: dict[tuple[str, str, int], EpochRow] = {}
    broken: list[int] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or _of_another_kind(line):
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


def _of_another_kind(line: str) -> bool:
    """Whether a line holds a whole row that is none of an epoch, such as one of a step."""
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and "kind" in values and values["kind"] not in KINDS


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
    return row if row.kind in KINDS else None


def history(label: str, number: int, rows: Sequence[EpochRow], results: dict[str, Any]) -> History:
    """What the curves need of a run: `rows` of its epochs, and its `results.json`."""
    return History(
        label=label,
        number=number,
        rows=tuple(rows),
        spans=tuple(_stage_spans(rows, [stage["name"] for stage in results["stages"]])),
        best=frozenset((stage["name"], stage["best_epoch"]) for stage in results["stages"]),
        chance=results["chance"],
    )


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


def plots(histories: Sequence[History]) -> tuple[Plot, ...]:
    """The panels of loss and accuracy over all runs; none if no run has epochs."""
    finite = [r.loss for history in histories for r in history.rows if math.isfinite(r.loss)]
    if not finite:
        return ()
    (chance, *others) = {history.chance for history in histories}
    loss = _plot("Loss (nats)", "loss", nice_ticks(0.0, max(finite), 5), histories, None)
    top1_ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return loss, _plot("Top-1 accuracy", "top1", top1_ticks, histories, None if others else chance)


def _plot(
    name: str,
    field: str,
    levels: Sequence[float],
    histories: Sequence[History],
    chance: float | None,
) -> Plot:
    """One panel: `field` of every row over the epochs of all stages."""
    end = float(max(1, *(history.spans[-1].last for history in histories if history.spans)))
    across = LinearScale(0.0, end, PLOT_LEFT, PLOT_RIGHT)
    up = LinearScale(levels[0], levels[-1], PLOT_BOTTOM, PLOT_TOP)
    whole = [x for x in nice_ticks(0.0, end, 6) if x.is_integer()]
    lines = [line for history in histories for line in _lines(history, field, across, up)]
    stages = {tuple((s.name, s.first, s.last) for s in history.spans) for history in histories}
    return Plot(
        name=name,
        field=field,
        lines=tuple(lines),
        x_ticks=tuple(Tick(across(x), f"{x:g}") for x in whole if x <= end),
        y_ticks=tuple(Tick(up(y), _tick_label(y, field)) for y in levels),
        x_range=(0.0, end),
        y_range=(levels[0], levels[-1]),
        bands=tuple(_band(span, across) for span in histories[0].spans) if len(stages) == 1 else (),
        reference=None if chance is None else Tick(up(chance), f"chance {percent(chance)}"),
        many=max((len(line.points) for line in lines), default=0) > MANY_POINTS,
        description=_plot_in_words(name, field, histories),
    )


def _lines(history: History, field: str, across: LinearScale, up: LinearScale) -> list[Line]:
    """The curves of one run."""
    lines = []
    for span in history.spans:
        for kind in KINDS:
            own = [row for row in history.rows if (row.stage, row.kind) == (span.name, kind)]
            points = _points(own, field, history.label, span, across, up)
            if points:
                kept = [p for epoch, p in points.items() if (span.name, epoch) in history.best]
                rings = tuple(kept) if kind == "validation" else ()
                lines.append(Line(history.number, kind, tuple(points.values()), rings))
    return lines


def _points(
    rows: Sequence[EpochRow],
    field: str,
    label: str,
    span: Span,
    across: LinearScale,
    up: LinearScale,
) -> dict[int, Point]:
    """The dots of one curve by epoch; a value that is not finite has none."""
    points: dict[int, Point] = {}
    for row in sorted(rows, key=lambda row: row.epoch):
        value = getattr(row, field)
        if not math.isfinite(value):
            continue
        title = (
            f"{label + ', ' if label else ''}{row.stage}, epoch {row.epoch}, {row.kind}: "
            f"loss {decimal(row.loss)}, "
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


def _plot_in_words(name: str, field: str, histories: Sequence[History]) -> str:
    """What curves tell, for those who cannot see them: first and last value per stage."""
    text: Callable[[float], str] = percent if field == "top1" else decimal
    parts = []
    for run in histories:
        for span in run.spans:
            for kind in KINDS:
                own = [row for row in run.rows if (row.stage, row.kind) == (span.name, kind)]
                if own:
                    own.sort(key=lambda row: row.epoch)
                    first, last = (text(getattr(row, field)) for row in (own[0], own[-1]))
                    who = f"{run.label}, {kind}" if run.label else kind
                    parts.append(f"{who}, stage {span.name}: from {first} to {last}")
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
