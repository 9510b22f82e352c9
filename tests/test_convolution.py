"""The fast convolutions against the plain one, in both directions, and which backend gets which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax import convolution
from stf_jax.convolution import convolve, plain, winograd_matrices

KERNELS = [(3, 3), (5, 5), (1, 1), (3,), (5,), (3, 3, 3), (3, 5, 1)]


def drawn(*shape, seed=0):
    values = np.random.default_rng((seed, *shape)).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def far(got, expected):
    """The largest difference, in units of the largest expected value."""
    return float(jnp.abs(got - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize("piece", [2_000, 10**9], ids=["in pieces", "whole"])
@pytest.mark.parametrize("taps", KERNELS, ids=str)
def test_winograd_equals_the_plain_convolution_and_its_gradients(monkeypatch, taps, piece):
    monkeypatch.setattr(convolution, "_PIECE", piece)
    for name in ("_MIN_CHANNELS", "_MIN_CHANNELS_SMALL", "_MIN_WORK"):
        monkeypatch.setattr(convolution, name, 1)
    # Odd sizes: tiles stick out at the end.
    x, kernel, dy = drawn(2, 6, 7, 9, 6), drawn(*taps, 6, 5), drawn(2, 6, 7, 9, 5)
    bias = drawn(5)
    pieces = convolution._pieces(x, *convolution._axes(kernel.shape))[1]
    assert (pieces > 1) == (piece == 2_000 and len(taps) < 3 and taps != (1, 1))

    def run(function):
        y, pull = jax.vjp(function, x, kernel, bias)
        return y, *pull(dy)

    def slow(x, kernel, bias):
        return plain(x, kernel) + bias.reshape(1, 1, 1, 1, -1)

    expected = jax.jit(functools.partial(run, slow))()
    got = jax.jit(functools.partial(run, convolve))()
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and far(one, other) < 1e-5
    text = jax.jit(functools.partial(run, convolve)).lower().as_text()
    assert "stablehlo.convolution" not in text


@pytest.mark.parametrize("taps", [(3, 3), (5, 5), (3,), (5,), (3, 3, 3)], ids=str)
def test_winograd_is_accurate_with_many_channels(taps):
    channels = 128
    x, kernel = drawn(1, 4, 6, 6, channels), drawn(*taps, channels, channels)
    assert far(convolution.winograd(x, kernel), plain(x, kernel)) < 1e-5
    dy = drawn(1, 4, 6, 6, channels, seed=1)
    expected = jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](dy)[0]
    assert far(convolution.gradients(x, dy, kernel)[1], expected) < 1e-5


@pytest.mark.parametrize("outputs, taps", [(2, 1), (2, 3), (2, 5), (4, 3)])
def test_matrices_compute_a_correlation(outputs, taps):
    a, g, b = winograd_matrices(outputs, taps)
    signal = np.random.default_rng(0).normal(size=outputs + taps - 1)
    kernel = np.random.default_rng(1).normal(size=taps)
    expected = [signal[i : i + taps] @ kernel for i in range(outputs)]
    np.testing.assert_allclose(a @ ((g @ kernel) * (b @ signal)), expected, rtol=1e-10)


def lowered(platform, dtype=jnp.float32, channels=128, taps=(3, 3)):
    """The operations of a convolution and its gradients for a platform that need not be here."""

    def gradients(x, kernel):
        return jax.grad(lambda *args: jnp.square(convolve(*args)).sum(), argnums=(0, 1))(x, kernel)

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in [(1, 8, 20, 20, channels), (*taps, channels, channels)]
    ]
    exported = jax.export.export(jax.jit(gradients), platforms=[platform])(*shapes)
    text = exported.mlir_module()
    return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")


def test_a_gpu_gets_plain_convolutions_only():
    assert lowered("cuda") == (3, 0)


def test_a_cpu_gets_matrix_products_where_channels_are_many():
    convolutions, products = lowered("cpu")
    assert convolutions == 0 and products >= 3 * 16
    assert lowered("cpu", channels=32) == (3, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_stays_with_the_plain_convolution(dtype):
    # Transforms would lose what few digits there are.
    assert lowered("cpu", dtype=dtype) == (3, 0)


def test_kernels_that_winograd_does_not_suit_are_plain():
    assert lowered("cpu", channels=128, taps=(5, 5, 5)) == (3, 0)
    assert lowered("cpu", channels=128, taps=(2, 2)) == (3, 0)
    x = drawn(1, 2, 6, 6, 128)
    assert convolve(x, drawn(3, 3, 128, 4), stride=2).shape == (1, 2, 3, 3, 4)
