"""Writes the HTML report of a run, or of several side by side, and prints its path.

python experiments/report.py --workdir=runs/demo
python experiments/report.py --workdir=runs/a --workdir=runs/b --out=compare.html
"""

import sys
from pathlib import Path

from absl import app, flags

from stf_jax.report import write_report

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Folder of the run; said again, of the next run beside it.", required=True
)
_OUT = flags.DEFINE_string(
    "out", None, "Where the page goes; report/index.html in the folder of a single run by default."
)


def main(argv: list[str]) -> None:
    """Reads the flags, writes the page, prints where it is."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected: {' '.join(argv[1:])}. Give the run as --workdir=...")
    try:
        out = Path(_OUT.value) if _OUT.value else None
        print(write_report(*map(Path, _WORKDIR.value), out=out))
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    app.run(main)
