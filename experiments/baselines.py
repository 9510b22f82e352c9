"""How far videos can be told apart without a network: by their length, their colour, their motion.

    python experiments/baselines.py --config=configs/ucf101.py:laptop --config.data.root=DIR

Reads the same prepared records and the same split as training with this card, prepares them if need
be, and classifies the test videos by features of whole videos:
  metadata              number of frames, frames per second, seconds
  linear                mean of each colour, and histograms of the direction (weighted by speed) and
                        speed of the optical flow; a linear classifier
  linear, colour alone; linear, flow alone
  all features          together, by any kind of classifier
Kind and regularisation are chosen by cross-validation over whole groups of the training videos,
those that a network's stop rule watches included; then the test videos are scored once.

Writes into --out (experiments/results): baselines.csv, a row for each, in the place of older ones
of the same data and protocol, and baselines/<data>/<baseline>.csv, the scores of every test video.
  classifier, setting   what was chosen; cv_accuracy: its mean accuracy on held-out training groups
                        (the best of many, which flatters it); tried: the best of every kind
  top1                  on the test, with Wilson's 95 % interval over videos, low95 to high95
  mean_class            accuracy, mean over classes; its 95 % interval from resampling groups
  seconds               for choosing and fitting; read_seconds: for the features of all videos
Videos that cannot be read are listed, and counted as `excluded`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

# Cards are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Experiment card, such as configs/ucf101.py:laptop."
)
_OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the tables.")


def main(argv: Sequence[str]) -> None:
    """Measures and writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if _CONFIG.value is None:
        raise app.UsageError("--config is missing, such as --config=configs/ucf101.py:laptop")
    try:
        import sklearn  # noqa: F401
    except ImportError:
        sys.exit("error: scikit-learn is missing: `make install` brings it")
    from experiments.bench.table import write_rows
    from experiments.features import measure
    from stf_jax.datasets import load_index
    from stf_jax.progress import say
    from stf_jax.records import prepare_records
    from stf_jax.run import Settings

    try:
        settings = Settings.of(_CONFIG.value)
        if settings.records.flow_source != "stored":
            raise ValueError(
                "records.flow_source: got 'online', allowed: 'stored': flow is read from records"
            )
        index = load_index(settings.config.data)
        if index.resplit_seed is not None:
            raise ValueError(
                "data.protocol: got 'paper_resplit', allowed: any other: it draws a new split in "
                "every epoch, and there are no epochs here; 'random_fixed' draws one"
            )
        say(index.summary())
        records = prepare_records(index, settings.records)
        out = Path(_OUT.value)
        write_rows(out / "baselines.csv", measure(settings, index, records, out))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command begins anew")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("STF_DEBUG"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
