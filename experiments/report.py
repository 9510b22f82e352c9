"""Writes the HTML report of a run and prints its path.

python experiments/report.py --workdir=runs/demo
"""

import sys
from pathlib import Path

from absl import app, flags

from stf_jax.report import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def main(argv: list[str]) -> None:
    """Reads the flags, writes the page, prints where it is."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected: {' '.join(argv[1:])}. Give the run as --workdir=...")
    try:
        print(write_report(Path(_WORKDIR.value)))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    app.run(main)
