"""Scores videos with a finished run: its own again, or others.

    python experiments/evaluate.py --workdir=runs/demo [--subset=test] [--scores=scores.csv]
    python experiments/evaluate.py --workdir=runs/ucf101 --root=/other/videos --protocol=official

Prints the figures as JSON; without changes they are those of the run's results.json, to the last
digit. --root, --list, --protocol, --split and --fold replace settings of the run's `data` part.
Videos that the run was trained on are refused, and so are other classes than the run's.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from stf_jax import host

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
    try:
        facts = _evaluate()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts, indent=2))


def _evaluate() -> dict[str, Any]:
    from stf_jax.datasets import load_index
    from stf_jax.evaluate import score_run, write_scores
    from stf_jax.records import prepare_records
    from stf_jax.run import Run, TrainedOn, of_known_classes, scored_index, stamp_of

    run = Run(Path(_WORKDIR.value))
    settings = run.settings()
    stored = run.read_json("data.json")["stamp"]
    changes = {key: flag.value for key, flag in _CHANGES.items() if flag.value is not None}
    index = load_index({**settings.config.data, **changes})
    stamp = stamp_of(index, settings)
    # Another folder may be the same videos in another place: then nothing has changed.
    elsewhere = bool(changes) and stamp["split"] != stored["split"]
    if elsewhere:
        index = of_known_classes(index, stored["classes"], leave_out="classes" in _ALLOW.value)
        stamp = {**stored, "flow": stamp["flow"]}
    records = prepare_records(index, settings.records)
    if not elsewhere:
        index = scored_index(run, settings, index, records)
    scored = index.subset(_SUBSET.value)
    trained = TrainedOn.of(run)
    known = trained.known(scored, index, records)
    own = not elsewhere and _SUBSET.value != "train"
    if known and not own and "trained" not in _ALLOW.value:
        raise ValueError(
            f"{run.workdir} was trained on {len(known)} of the {len(scored)} videos to score, such "
            f"as {known[0].video_id}: their score would say nothing about new videos. Say "
            "--allow=trained to have it all the same."
        )
    scores = score_run(
        run, settings, index, records, _SUBSET.value, stamp=stamp, allow=_ALLOW.value
    )
    if _SCORES.value:
        write_scores(Path(_SCORES.value), scores, index.class_names)
    overlap = index.overlap if own else trained.related(scored, index)
    return {
        "subset": _SUBSET.value,
        "protocol": index.protocol,
        "leaky": index.leaky if own else bool(known) or overlap != 0.0,
        "overlap": overlap,
        "seen": len(known) / max(1, len(scored)),
        **dataclasses.asdict(scores.figures()),
    }


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
