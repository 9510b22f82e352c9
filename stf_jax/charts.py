"""Pictures of an evaluation's figures (PNG): confusion, reliability, classes with intervals."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stf_jax.prepare import write_aside

# Up to so many classes a matrix has room for its counts.
_NUMBERED = 20
_DOTS = 150  # per inch
_BLUE, _GREY = "#1f5fa8", "#8a8a8a"


def write_charts(
    folder: Path, facts: Mapping[str, Any], class_names: Sequence[str], suffix: str = ""
) -> None:
    """Draws `confusion.png`, `reliability.png` and `per_class.png`.

    Args:
      folder: where to; must be there.
      facts: the figures of one level, as from `scores.all_figures`.
      class_names: the classes.
      suffix: put at the end of the files' names, before '.png'.
    """
    _confusion(folder / f"confusion{suffix}.png", facts, class_names)
    _reliability(folder / f"reliability{suffix}.png", facts)
    _classes(folder / f"per_class{suffix}.png", facts, class_names)


@contextmanager
def literal_texts() -> Iterator[None]:
    """While it lasts matplotlib draws names as they are: between two '$' it sees no formula."""
    import matplotlib  # costs a second: only who draws pays

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


@contextmanager
def picture(path: Path, width: float, height: float, dots: int = _DOTS) -> Iterator[Any]:
    """A matplotlib figure that is written as PNG at the end, whole or not at all.

    Args:
      path: of the file; its folder is there.
      width: inches.
      height: inches.
      dots: per inch.
    """
    from matplotlib.figure import Figure

    with literal_texts():
        figure = Figure(figsize=(width, height), dpi=dots, layout="constrained")
        yield figure
        data = io.BytesIO()
        # Without the library's version: the same figures make the same bytes.
        figure.savefig(data, format="png", metadata={"Software": None})
    write_aside(path, data.getvalue())


def _title(facts: Mapping[str, Any]) -> str:
    level = facts["level"]
    count = facts["num_videos"] if level == "video" else facts["num_clips"]
    return f"{level} level, {count} {level}s, top-1 {facts['top1']:.1%}"


def _confusion(path: Path, facts: Mapping[str, Any], names: Sequence[str]) -> None:
    counts = np.array(facts["confusion"])
    total = counts.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    number = len(names)
    # Large enough for the names at 6 pt where there are many.
    side = max(5.0, 2.5 + (0.5 if number <= _NUMBERED else 0.12) * number)
    with picture(path, side + 1.0, side) as figure:
        axes = figure.subplots()
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
        size = 9 if number <= _NUMBERED else 6
        axes.set_xticks(range(number), names, rotation=90, fontsize=size)
        axes.set_yticks(range(number), names, fontsize=size)
        axes.set(xlabel="taken for", ylabel="true class", title=f"Confusion: {_title(facts)}")
        if number > _NUMBERED:
            return
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, count, ha="center", va="center", color=colour, fontsize=size)


def _reliability(path: Path, facts: Mapping[str, Any]) -> None:
    bins = facts["calibration"]
    filled = [row for row in bins if row["count"]]
    with picture(path, 6.0, 5.5) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], "--", color=_GREY, label="calibrated")
        widths = [row["high"] - row["low"] for row in filled]
        axes.bar(
            [row["low"] for row in filled],
            [row["accuracy"] for row in filled],
            widths,
            align="edge",
            color=_BLUE,
            alpha=0.35,
            edgecolor=_BLUE,
            label="accuracy of the bin",
        )
        sure = [row["confidence"] for row in filled]
        axes.plot(
            sure,
            [row["accuracy"] for row in filled],
            "o-",
            color=_BLUE,
            label="at its mean confidence",
        )
        for row in filled:
            middle = (row["low"] + row["high"]) / 2
            axes.text(middle, 0.01, row["count"], ha="center", fontsize=7)
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            xlabel=f"highest probability (counts below, {len(bins)} bins)",
            ylabel="accuracy",
            title=f"Reliability: {_title(facts)}\n"
            f"expected calibration error {facts['calibration_error']:.3f}",
        )
        axes.legend(loc="upper left", fontsize=8)


def _classes(path: Path, facts: Mapping[str, Any], names: Sequence[str]) -> None:
    number = len(names)
    few = number <= _NUMBERED
    place = np.arange(number)
    recall = np.array([np.nan if value is None else value for value in facts["recall"]])
    precision = np.array([np.nan if value is None else value for value in facts["precision"]])
    bounds = [pair or (np.nan, np.nan) for pair in facts["recall_interval95"]]
    low, high = np.array(bounds, float).T
    with picture(path, 8.0, 1.6 + (0.45 if few else 0.15) * number) as figure:
        axes = figure.subplots()
        axes.barh(place, recall, color=_BLUE, alpha=0.5, label="recall")
        axes.hlines(place, low, high, color="black", lw=1, label="95 % interval of recall")
        axes.plot(precision, place, "D", ms=5 if few else 3, color="#c2571a", label="precision")
        size = 9 if few else 6
        told = [f"{name} ({count})" for name, count in zip(names, facts["counts"], strict=True)]
        axes.set_yticks(place, told, fontsize=size)
        axes.set(xlim=(0, 1.02), ylim=(number - 0.4, -0.6), title=f"Classes: {_title(facts)}")
        axes.set_xlabel("recall and precision (counts after the names)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
