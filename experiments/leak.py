"""Measures how far each protocol lets a network meet its test videos in training.

    python experiments/leak.py

On the complete official lists of UCF101, whatever videos there are: writes
experiments/results/leak.csv. Shares are of the test clips: those with a clip of their source in
training, as drawn and as expected of a random split, and those that an earlier epoch has trained
on; `never_trained` are the test clips of the last epoch that none has.
"""

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app

from stf_jax.index import ClipEntry
from stf_jax.layouts import ucf101_lists
from stf_jax.protocols import Layout, Protocol, after_epochs, divide

TABLE = Path(__file__).resolve().parent / "results" / "leak.csv"
_COLUMNS = (
    "protocol", "detail", "train", "test", "share_source", "expected", "trained_on",
    "never_trained",
)  # fmt: skip


def ucf101_layout(split: int) -> Layout:
    """All of UCF101 as its official lists name it; no file is looked for."""
    lists = ucf101_lists()
    classes = [row.split()[1] for row in lists["classInd.txt"].decode().splitlines()]
    clips, official = [], {}
    for subset in ("train", "test"):
        for row in lists[f"{subset}list{split:02}.txt"].decode().splitlines():
            clip = row.split()[0]
            name, group = clip.split("/")[0], clip.rsplit("_", 2)[1]
            clips.append(ClipEntry(clip, classes.index(name), f"{name}/{group}", ""))
            official[clip] = subset
    return Layout(
        "ucf101",
        Path("UCF-101"),
        tuple(classes),
        tuple(clips),
        numbered=True,
        official=official,
        official_name=f"official split {split}",
    )


def rows() -> Iterator[dict[str, object]]:
    """One row of the table for each protocol and fold or number of epochs."""
    layout = ucf101_layout(1)
    for split in (1, 2, 3):
        yield _row("official", f"split {split}", ucf101_layout(split), split=split)
    for fold in (1, 5):
        yield _row("group_kfold", f"fold {fold} of 5", layout, fold=fold)
    for fold in (1, 25):
        yield _row("leave_one_group_out", f"fold {fold} of 25", layout, fold=fold)
    yield _row("hold_out", "25 % in whole groups", layout)
    yield _row("leave_one_out", "fold 1 of 13320", layout)
    for seed in (0, 1, 2):
        yield _row("random_fixed", f"seed {seed}", layout, seed=seed)
    for epochs in (1, 2, 3, 5, 10):
        yield _row("paper_resplit", f"after {epochs} epochs", layout, epochs=epochs)


def _row(
    name: str, detail: str, layout: Layout, *, split: int = 1, fold: int = 1, seed: int = 0,
    epochs: int = 0,
) -> dict[str, object]:  # fmt: skip
    index = divide(layout, Protocol(name, split, 5, fold, 0.25, 0.0, seed))
    if epochs:
        index = after_epochs(index, [epochs])
    tested, seen = len(index.subset("test")), index.seen or 0.0
    random = name in ("random_fixed", "paper_resplit")
    values = (
        name,
        detail,
        len(index.subset("train")),
        tested,
        f"{index.overlap:.4f}",
        f"{expected_share(layout, 0.3):.4f}" if random else "",
        f"{seen:.4f}",
        round((1 - seen) * tested),
    )
    return dict(zip(_COLUMNS, values, strict=True))


def expected_share(layout: Layout, held_out: float) -> float:
    """Expected share of the test clips with a clip of their group in training, random split.

    A test clip of a group of n has none if the n - 1 others are among the other test clips too.
    """
    total = len(layout.clips)
    tested = round(held_out * total)
    alone = 0.0
    for size in Counter(clip.group for clip in layout.clips).values():
        chance = math.prod((tested - k) / (total - k) for k in range(1, size))
        alone += size * chance
    return 1 - alone / total


def main(argv: Sequence[str]) -> None:
    """Measures and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    writer = csv.DictWriter(sys.stdout, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    with open(TABLE, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows():
            table.writerow(row)
            writer.writerow(row)


if __name__ == "__main__":
    app.run(main)
