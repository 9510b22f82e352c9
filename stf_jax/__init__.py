"""Two-stream action recognition in JAX/Flax, after Ou & Sun (JIFS 41(4), 2021)."""

import os

# Read when TensorFlow is first imported, wherever that happens: no chatter on standard error, and
# no kernels that round differently from machine to machine; nor Keras, which brings matplotlib.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
