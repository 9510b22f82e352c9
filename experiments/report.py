"""Writes the HTML report of a run, or of several side by side, and prints its path.

python experiments/report.py --workdir=runs/demo
python experiments/report.py --workdir=runs/a --workdir=runs/b --out=compare.html
python experiments/report.py --results

The last one writes the page of all results, experiments/results/README.md, from the files there.
"""

import sys
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stf_jax.report import write_report  # noqa: E402

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Folder of the run; said again, of the next run beside it."
)
_OUT = flags.DEFINE_string(
    "out", None, "Where the page goes; report/index.html in the folder of a single run by default."
)
_RESULTS = flags.DEFINE_bool("results", False, "Write experiments/results/README.md instead.")


def main(argv: list[str]) -> None:
    """Reads the flags, writes the page, prints where it is."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected: {' '.join(argv[1:])}. Give the run as --workdir=...")
    if bool(_WORKDIR.value) == _RESULTS.value:
        sys.exit("report: name runs by --workdir=..., or the page of all results by --results")
    try:
        if _RESULTS.value:
            from experiments import results_page

            print(results_page.write())
            return
        out = Path(_OUT.value) if _OUT.value else None
        print(write_report(*map(Path, _WORKDIR.value or ()), out=out))
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    app.run(main)
