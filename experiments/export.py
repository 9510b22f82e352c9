"""Exports a finished run for other programs, each file checked against JAX on real clips.

    python experiments/export.py --workdir=runs/demo --out=exported
    python experiments/export.py --workdir=runs/demo --out=exported --formats=onnx,safetensors

StableHLO (for `jax.export`, CPU and CUDA), TensorFlow SavedModel, ONNX, and the weights as
safetensors; beside them signature.json (what has to happen to a video first), model_card.md and
parity.json. ONNX and safetensors need `make install EXTRAS=export`. Exit code 1 if a format could
not be made or was refused; the others are there all the same.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from stf_jax import host

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
_FORMATS = flags.DEFINE_list(
    "formats", ["stablehlo", "savedmodel", "onnx", "safetensors"], "Which of these."
)
_CLIPS = flags.DEFINE_integer("clips", 8, "Test videos of the run to check with.", lower_bound=1)
_VIDEOS = flags.DEFINE_list("videos", [], "Video files to check with instead.")


def main(argv: Sequence[str]) -> None:
    """Exports and says how far each file is from JAX."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)  # TensorFlow tells of every file that it writes
    from stf_jax.export import check_formats, export_run, videos_to_check
    from stf_jax.predict import Predictor, Trained
    from stf_jax.run import Run
    from stf_jax.video import VideoFault

    run = Run(Path(_WORKDIR.value))
    try:
        check_formats(_FORMATS.value)
        trained = Trained.read(run.workdir)
        results = run.read_json("results.json")
        predictor = Predictor.of(trained)
        videos = _VIDEOS.value or videos_to_check(run, _CLIPS.value)
        clips = [predictor.clip(video) for video in videos]
        if predictor.warning:
            print(f"note: {predictor.warning}", file=sys.stderr)
        rows = []
        for row in export_run(trained, results, Path(_OUT.value), _FORMATS.value, clips):
            rows.append(row)
            if row["error"]:
                print(f"{row['format']}: not exported: {row['error']}", file=sys.stderr)
                continue
            print(
                f"{row['format']}: {row['file']}, largest difference "
                f"{row['largest_difference']:.1e} (limit {row['limit']:g}), same class "
                f"{row['same_class']} of {row['clips']} clips, {row['runtime']}",
                flush=True,
            )
    except (ValueError, OSError, ImportError, VideoFault) as error:
        sys.exit(f"error: {error}")
    sys.exit(int(any(row["error"] for row in rows)))


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
