"""Two-stream action recognition in JAX/Flax, after Ou & Sun (JIFS 41(4), 2021)."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stf_jax.predict import Predictor

# Read when TensorFlow is first imported, wherever that happens: no chatter on standard error, and
# no kernels that round differently from machine to machine; nor Keras, which brings matplotlib.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")


def load(source: "str | os.PathLike[str]") -> "Predictor":
    """A trained network, ready for videos and frames.

    Args:
      source: the folder of a finished run, or a `model.safetensors` that `experiments/export.py`
        made of one.

    Returns:
      The predictor; see `stf_jax.predict.Predictor.predict`.

    Raises:
      FileNotFoundError: nothing is there, or no finished run (says what is missing).
      ValueError: the file is no exported network, or the run's configuration is not what its
        weights were trained with.
      ModuleNotFoundError: the file needs a library that is not installed (gives the command).
    """
    from stf_jax.predict import Predictor  # what importing the package need not wait for

    return Predictor.load(source)
