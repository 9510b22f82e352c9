"""Shows why a finished run classifies videos as it does: heat maps, streams, steps, levels.

    python experiments/explain.py --workdir=runs/demo --out=why FILE [FILE ...] [--class=NAME]

Writes for every file one picture per network (two with late fusion) and prints the figures. Exit
code 1 if a file could not be used; the others are still explained.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from stf_jax import host

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUT = flags.DEFINE_string("out", "explained", "Folder of the pictures.")
_CLASS = flags.DEFINE_string("class", None, "The class to explain; default: the one chosen.")


def main(argv: Sequence[str]) -> None:
    """Explains each file."""
    if len(argv) < 2:
        raise app.UsageError("name at least one video file")
    from stf_jax.explain import Explainer
    from stf_jax.video import VideoFault

    try:
        explainer = Explainer.load(Path(_WORKDIR.value))
        label = None if _CLASS.value is None else explainer.label_of(_CLASS.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    failed = False
    for number, name in enumerate(argv[1:], 1):
        try:
            told = explainer.explain_file(Path(name), Path(_OUT.value), label, number)
        except (VideoFault, OSError) as fault:
            print(f"{name}\n  error: {fault}", file=sys.stderr)
            failed = True
            continue
        print(f"{name}\n  " + "\n  ".join(told))
    sys.exit(int(failed))


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
