"""Runs a study: every row with every seed, whatever of it is not done yet; then its results.

    python experiments/ablate.py --list
    python experiments/ablate.py --study=parts --config.data.root=/data/ucf101 --dry_run
    python experiments/ablate.py --study=parts --config.data.root=/data/ucf101 [--budget=2h]
    python experiments/ablate.py --study=demo_parts --rows=both,rgb --seeds=0,1
    python experiments/ablate.py --study=parts --summarise

Studies stand in experiments/studies.py. Every run has a folder, OUT/STUDY/ROW-seedS, and what it
says in OUT/STUDY/ROW-seedS.log. Stopped at any moment, the same command goes on. Runs whose results
are in the tables already, from another sitting or machine, are not made again, unless the settings
of the study have changed since. `--config.KEY=VALUE` changes a setting of all runs. `--select`
scores them on held-out training groups instead of the test, to choose settings by; its tables are
apart and say so.

Writes to experiments/results: study_NAME.csv and study_NAME_videos.csv after every run, at the end
study_NAME_summary.csv, study_NAME.png (see experiments/study_results.py) and the page of all
results. `--summarise` makes these anew from the first two, without any run folder.

Exit code: 0 all is well; 1 a run failed, or the settings are impossible (the message says why);
128 + N stopped by signal N. Runs that did not fit into `--budget` are no failure.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.studies import STUDIES  # noqa: E402
from experiments.study_results import Tables  # noqa: E402
from experiments.study_runs import (  # noqa: E402
    label_of,
    plan,
    seconds_of,
    sitting,
    summarise,
    wanted_settings,
)

_STUDY = flags.DEFINE_enum("study", None, list(STUDIES), "Which study.")
_ROWS = flags.DEFINE_list("rows", None, "Only these rows.")
_SEEDS = flags.DEFINE_list("seeds", None, "These seeds (folds, where runs differ in them) instead.")
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Runs at once: each on a GPU of its own, or on its part of the cores.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "runs/studies", "Folder of the run folders.")
_RESULTS = flags.DEFINE_string("results", "experiments/results", "Folder of the tables.")
_BUDGET = flags.DEFINE_string(
    "budget", "", "Begin no run that is not expected to end in this time, such as 2h or 90m."
)
_SELECT = flags.DEFINE_bool(
    "select", False, "Score on held-out training groups, to choose settings by."
)
_LIST = flags.DEFINE_bool("list", False, "Print the studies and their rows.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be run, and what is done.")
_SUMMARISE = flags.DEFINE_bool("summarise", False, "Only summary and figure, from the tables.")

_changes: dict[str, str] = {}


def _list() -> None:
    for study in STUDIES.values():
        seeds = ", ".join(map(str, study.seeds))
        print(f"{study.name} ({study.card}; {study.repeat}s {seeds})\n  {study.question}")
        for row in study.rows:
            told = " ".join(f"{key}={value}" for key, value in row.changes.items())
            print(f"    {row.name:<18}{row.what}{f'   [{told}]' if told else ''}")


def main(argv: Sequence[str]) -> None:
    """Runs, or says what would be run."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if _LIST.value:
        _list()
        return
    if _STUDY.value is None:
        raise app.UsageError(f"--study=... is missing, one of {', '.join(STUDIES)}")
    study, label = STUDIES[_STUDY.value], label_of(STUDIES[_STUDY.value], _SELECT.value)
    if "eval.subset" in _changes:
        raise app.UsageError("--config.eval.subset: say --select, which keeps the tables apart")
    # The networks are only traced here: the devices are for the runs.
    jax.config.update("jax_platforms", "cpu")
    if _SELECT.value:
        _changes["eval.subset"] = "validation"
    results = Path(_RESULTS.value)
    out = Path(_OUT.value).resolve() / label.removeprefix("study_")
    try:
        seeds_of = [int(seed) for seed in _SEEDS.value or study.seeds]
        rows = _ROWS.value or [row.name for row in study.rows]
        if _SUMMARISE.value:
            tables = Tables.read(results, label)
            marked = tables.marked(wanted_settings(study, tables, _changes))
            summarise(study, marked, results, label)
            return
        jobs = plan(study, out, rows=rows, seeds=seeds_of, changes=_changes)
        code = sitting(
            jobs,
            Tables.read(results, label),
            results,
            changes=_changes,
            label=label,
            at_once=_JOBS.value,
            budget=seconds_of(_BUDGET.value),
            dry_run=_DRY_RUN.value,
        )
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("STF_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    sys.exit(code)


def _parse(argv: Sequence[str]) -> list[str]:
    """Takes the changes of the card out of the arguments, and lets absl read the others."""
    rest = [argv[0]]
    for argument in argv[1:]:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument, flags=re.DOTALL)
        if match:
            _changes[match[1]] = match[2]
        elif argument.startswith("--config"):
            sys.exit(
                f"error: {argument}: the card is the study's; its settings are changed by "
                "--config.KEY=VALUE"
            )
        else:
            rest.append(argument)
    return app.parse_flags_with_usage(rest)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
