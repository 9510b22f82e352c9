"""A training step whose batch is divided among the cores, against one that XLA divides itself.

    python experiments/bench/cores.py [--rounds=9]

The same step of the same card, in turn: on one device, whose operations XLA divides among threads,
and on as many simulated devices as a batch can be divided among, at most one for each core, each of
which works through its own clips on one core.

Writes experiments/results/bench_cores.csv, one row for each card.
  case        the card and what is timed
  one_s       median seconds on one device; one_spread_s: half the range
  divided_s   the same on several
  ratio       divided / one: below 1, dividing is faster
  *_peak_mb   resident memory at its highest while timed, less that after the imports
  devices     how many
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

# Cards are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.in_turn import our_side, settings_of, time_in_turn  # noqa: E402
from experiments.bench.table import processor, write_rows  # noqa: E402
from stf_jax import host  # noqa: E402

_ROUNDS = flags.DEFINE_integer("rounds", 9, "Times that each case is timed.")
_OUT = flags.DEFINE_string("out", "experiments/results/bench_cores.csv", "The table.")


def time_card(card: str, rounds: int) -> dict[str, Any]:
    """Times a step of a card both ways."""
    config = settings_of(card, "step").config
    share = config.batch_size, config.optimizer.accumulate
    one, divided = {"XLA_FLAGS": ""}, {"XLA_FLAGS": ""}
    host.divide_cores(*share, divided)
    sides = {"one": our_side(card, "step", one), "divided": our_side(card, "step", divided)}
    found = time_in_turn(sides, rounds)
    row: dict[str, Any] = {"case": f"{card}: step of {config.batch_size} clips"}
    for name, timed in found.items():
        row |= {
            f"{name}_s": round(timed.median, 4),
            f"{name}_spread_s": round(timed.spread, 4),
            f"{name}_peak_mb": round(timed.peak_mb),
        }
    ratio = found["divided"].median / found["one"].median
    return {**row, "ratio": round(ratio, 3), "devices": host.devices_for(*share), "rounds": rounds}


def main(argv: Sequence[str]) -> None:
    """Times every card and writes the table."""
    from stf_jax.main import environment

    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    facts = environment()
    origin = {
        "commit": facts["commit"],
        "jax": facts["jax"],
        "machine": f"{facts['machine']}, {processor()}",
    }
    for card in ("demo", "laptop"):
        row = time_card(card, _ROUNDS.value)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write_rows(Path(_OUT.value), [row | origin])


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
