"""Scores videos with a finished run: its own again, or others.

    python experiments/evaluate.py --workdir=runs/demo [--subset=test] [--scores=scores.csv]
    python experiments/evaluate.py --workdir=runs/ucf101 --root=/other/videos --protocol=official

Prints the figures as JSON; without changes they are those of the run's results.json, to the last
digit. --root, --list, --protocol, --split and --fold replace settings of the run's `data` part.
Videos that the run was trained on are refused, and so are other classes than the run's.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from stf_jax import host, startup

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SUBSET = flags.DEFINE_enum("subset", "test", ["train", "validation", "test"], "What to score.")
_SCORES = flags.DEFINE_string("scores", None, "Where to write the per-video scores (CSV).")
_ALLOW = flags.DEFINE_list(
    "allow",
    [],
    "What may differ from the run's training: 'classes' (videos of classes that the run does not "
    "know are left out), 'split', 'flow'; 'trained' scores videos that it was trained on.",
)
_CHANGES = {
    "root": flags.DEFINE_string("root", None, "Other folder of videos."),
    "list": flags.DEFINE_string("list", None, "Other CSV list of videos."),
    "protocol": flags.DEFINE_string("protocol", None, "Other protocol."),
    "split": flags.DEFINE_integer("split", None, "Other official split."),
    "fold": flags.DEFINE_integer("fold", None, "Other fold."),
}


def main(argv: Sequence[str]) -> None:
    """Scores and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    unknown = set(_ALLOW.value) - {"classes", "split", "flow", "trained"}
    if unknown:
        raise app.UsageError(f"--allow: {', '.join(unknown)} is none of classes,split,flow,trained")
    from stf_jax.evaluate import score_again, write_scores
    from stf_jax.run import Run

    changes = {key: flag.value for key, flag in _CHANGES.items() if flag.value is not None}
    try:
        facts, scores = score_again(
            Run(Path(_WORKDIR.value)), subset=_SUBSET.value, changes=changes, allow=_ALLOW.value
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if _SCORES.value:
        write_scores(Path(_SCORES.value), scores, facts["class_names"])
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    host.use_huge_pages()
    startup.keep_programs()
    app.run(main)
