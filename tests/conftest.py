"""What every test runs under: the CPU, strict shapes, and annotations that are checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Checks every annotated shape and type of the package while tests run; must precede its import.
jaxtyping.install_import_hook("stf_jax", "beartype.beartype")

# [3] + [2, 3] is an error here: broadcasting that nobody wrote hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def annotations_off():
    """Lets values of a wrong type through to the package's own checks, as outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny_model_config() -> dict:
    """The `model` part of a configuration, one sixteenth as wide as the paper's.

    Fits clips of 8 frames (2 windows of 4) at 32x32; a fresh copy, so a test may change it.
    """
    return {
        "width": 4,
        "streams": "both",
        "norm": "none",
        "norm_groups": 8,
        "mst": {"spatial": (1, 3, 5), "temporal": (3, 3, 5), "width": 32},
        "conv3d": {
            "factorised": True,
            "order": "spatial_first",
            "mid_relu": True,
            "mid": "out",
            "width": 32,
        },
        "temporal": {"pool4": "after_mst1", "init": "he", "conv1_init": "random"},
        "fusion": {
            "kernel": (3, 3, 3),
            "width": 32,
            "relu": True,
            "pool5": "after",
            "init": "feichtenhofer",
        },
        "tpn": {"window": 4, "stride": 4, "levels": (1, 2, 4), "psi": "mean"},
        "lstm": {
            "hidden": 5,
            "ln": "tf",
            "ln_axis": "units",
            "forget_bias": 1.0,
            "bidirectional": True,
        },
        "head": {"combine": "project", "pool": "mean_logits"},
        "drop": {"input": 0.5, "output": 0.25, "semantics": "drop"},
    }
