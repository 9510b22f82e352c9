"""Scores videos with a run: its own again, or others; one clip of each, or many views.

    python experiments/evaluate.py --workdir=runs/demo [--subset=test] [--out=scores]
    python experiments/evaluate.py --workdir=runs/ucf101 --views=10x3xflip --out=scores
    python experiments/evaluate.py --workdir=runs/ucf101 --min_per_class=1000
    python experiments/evaluate.py --workdir=runs/ucf101 --root=/other/videos --protocol=official
    python experiments/evaluate.py --workdir=runs/ucf101 --stage=first --checkpoint=last

Prints the figures as JSON; without changes they are those of the run's results.json, to the last
digit. Each says its level: 'video' averages the probabilities of a video's clips, 'clip' counts
every clip. --root, --list, --protocol, --split and --fold replace settings of the run's `data`
part. Videos that the run was trained on are refused, and so are other classes than the run's.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from stf_jax import host, startup

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SUBSET = flags.DEFINE_enum(
    "subset", None, ["train", "validation", "test"], "What to score; by default as `eval` says."
)
_STAGE = flags.DEFINE_string("stage", "", "Weights of this stage; the last one's by default.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "Which of its weights: 'best', 'last', or the number of a stored step."
)
_VIEWS = flags.DEFINE_string(
    "views",
    None,
    "CLIPS[xCROPS][xflip]: clips per video, evenly spread; crops per clip (1, 3 along the longer "
    "side, 5 corners and centre); and their mirror images. Instead of the run's `eval`.",
)
_REPEATS = flags.DEFINE_integer(
    "repeats", None, "So many clips per video instead, drawn as in training."
)
_MIN_PER_CLASS = flags.DEFINE_integer(
    "min_per_class", None, "Or drawn until each class is classified so often: Table 3 has 1000."
)
_SEED = flags.DEFINE_integer("seed", None, "Of what is drawn; the run's by default.")
_STREAMS = flags.DEFINE_bool(
    "streams", None, "Also score a network of both streams without the map of each."
)
_SCORES = flags.DEFINE_string("scores", None, "Where to write the per-video scores (CSV).")
_OUT = flags.DEFINE_string("out", None, "Folder for scores and figures as CSV, JSON and pictures.")
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


def _views() -> dict[str, Any]:
    """What the flags change of the run's `eval`, and the seed."""
    from stf_jax.views import parse_views

    changes: dict[str, Any] = {}
    if (_VIEWS.value, _REPEATS.value, _MIN_PER_CLASS.value) != (None, None, None):
        # Which clips is said here, so nothing of what the run says of it stays.
        changes = {"num_clips": 1, "repeats": 1, "min_per_class": 0}
    if _VIEWS.value is not None:
        changes |= parse_views(_VIEWS.value)
    told = {
        "repeats": _REPEATS.value,
        "min_per_class": _MIN_PER_CLASS.value,
        "each_stream": _STREAMS.value,
        "seed": _SEED.value,
    }
    return changes | {key: value for key, value in told.items() if value is not None}


def main(argv: Sequence[str]) -> None:
    """Scores and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    unknown = set(_ALLOW.value) - {"classes", "split", "flow", "trained"}
    if unknown:
        raise app.UsageError(f"--allow: {', '.join(unknown)} is none of classes,split,flow,trained")
    from stf_jax.charts import write_charts
    from stf_jax.evaluate import score_again
    from stf_jax.run import Run
    from stf_jax.scores import levels, write_folder, write_scores

    changes = {key: flag.value for key, flag in _CHANGES.items() if flag.value is not None}
    try:
        run = Run(Path(_WORKDIR.value))
        settings = run.settings()
        config = settings.config
        # As in training: on other devices last digits are others.
        host.divide_cores(config.batch_size, config.optimizer.accumulate)
        facts, scores = score_again(
            run,
            subset=_SUBSET.value or settings.eval.subset,
            changes=changes,
            allow=_ALLOW.value,
            views=_views(),
            stage=_STAGE.value,
            checkpoint=_CHECKPOINT.value,
        )
        if _SCORES.value:
            write_scores(Path(_SCORES.value), scores, facts["class_names"])
        if _OUT.value:
            write_folder(Path(_OUT.value), facts, scores, facts["class_names"])
            for level, suffix in levels(facts):
                write_charts(Path(_OUT.value), level, facts["class_names"], suffix)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    host.use_huge_pages()
    startup.keep_programs()
    app.run(main)
