"""Scores the test videos of a finished run again.

    python experiments/evaluate.py --workdir=runs/demo [--subset=test] [--scores=scores.csv]

Prints the figures as JSON; they are those of the run's results.json, to the last digit.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from stf_jax import host

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SUBSET = flags.DEFINE_enum("subset", "test", ["train", "validation", "test"], "What to score.")
_SCORES = flags.DEFINE_string("scores", None, "Where to write the per-video scores (CSV).")


def main(argv: Sequence[str]) -> None:
    """Scores and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    from stf_jax.datasets import load_index
    from stf_jax.evaluate import score_run, write_scores
    from stf_jax.records import prepare_records
    from stf_jax.run import Run

    run = Run(Path(_WORKDIR.value))
    try:
        settings = run.settings()
        index = load_index(settings.config.data)
        records = prepare_records(index, settings.records)
        scores = score_run(run, settings, index, records, _SUBSET.value)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if _SCORES.value:
        write_scores(Path(_SCORES.value), scores, index.class_names)
    facts = {
        "subset": _SUBSET.value,
        "protocol": index.protocol,
        "leaky": index.leaky,
        **dataclasses.asdict(scores.figures()),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
