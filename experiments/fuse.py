"""Fuses score files of the same videos: the weighted mean of their probabilities.

    python experiments/fuse.py rgb/scores.csv flow/scores.csv --weights=1,1.5 --out=fused

The files are the scores.csv of runs or of experiments/evaluate.py; videos, classes and labels must
be the same. Prints the figures as JSON, at video level. Weights that were chosen by looking at the
accuracy on these videos flatter it: choose them on the validation subset.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

_WEIGHTS = flags.DEFINE_list("weights", None, "One per file; equal by default.")
_OUT = flags.DEFINE_string("out", None, "Folder for scores and figures as CSV, JSON and pictures.")
_GROUP_REGEX = flags.DEFINE_string(
    "group_regex",
    "",
    "As data.group_regex: names the source of each video, for the interval of the mean class "
    "accuracy. Without it videos count as independent.",
)
_BINS = flags.DEFINE_integer("bins", 15, "Bins of the calibration error.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the resampling behind intervals.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    """Fuses and prints."""
    from stf_jax.charts import write_charts
    from stf_jax.layouts import group_of
    from stf_jax.scores import all_figures, fuse, read_scores, write_folder

    if len(argv) < 3:
        raise app.UsageError("name two or more score files")
    try:
        re.compile(_GROUP_REGEX.value)
        weights = [float(text) for text in _WEIGHTS.value or ["1"] * len(argv[1:])]
        files = [read_scores(Path(name)) for name in argv[1:]]
        scores = fuse(files, weights)
        entries = tuple(
            dataclasses.replace(entry, group=group_of(entry.video_id, _GROUP_REGEX.value))
            for entry in scores.entries
        )
        scores = dataclasses.replace(scores, entries=entries)
        names = files[0].class_names
        facts = {
            "files": [str(file.path) for file in files],
            "weights": weights,
            "note": "weights that were chosen on these videos flatter the figures",
            "class_names": list(names),
            **all_figures(
                scores,
                bins=_BINS.value,
                seed=_SEED.value,
                groups_known=bool(_GROUP_REGEX.value),
            ),
        }
        if _OUT.value:
            write_folder(Path(_OUT.value), facts, scores, names)
            write_charts(Path(_OUT.value), facts, names)
    except re.error as error:
        sys.exit(f"error: --group_regex={_GROUP_REGEX.value}: {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    app.run(main)
