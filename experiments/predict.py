"""Classifies video files with a finished run.

    python experiments/predict.py --workdir=runs/demo FILE [FILE ...] [--top=5]

--workdir may be an exported model.safetensors too.

Exit code 1 if a file could not be used; the others are still classified.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from stf_jax import host, startup

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, or an exported file.", required=True
)
_TOP = flags.DEFINE_integer("top", 5, "Classes to print per file.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Prints the classes of each file, most probable first."""
    if len(argv) < 2:
        raise app.UsageError("name at least one video file")
    from stf_jax.predict import Predictor
    from stf_jax.video import VideoFault

    try:
        predictor = Predictor.load(_WORKDIR.value)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if predictor.warning:
        print(f"note: {predictor.warning}", file=sys.stderr)
    failed = False
    for name in argv[1:]:
        try:
            prediction = predictor.predict(name)
        except (VideoFault, OSError) as fault:
            print(f"{name}\n  error: {fault}", file=sys.stderr)
            failed = True
            continue
        print(name)
        for label, probability in prediction.top(_TOP.value):
            print(f"  {probability:7.2%}  {label}")
    sys.exit(int(failed))


if __name__ == "__main__":
    host.use_huge_pages()
    startup.keep_programs()
    app.run(main)
