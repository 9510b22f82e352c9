"""The ONNX graph of a function computes what JAX computes, for any number of clips."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import export, lax

from stf_jax.onnx_graph import onnx_model


def _both(function, *arrays, clips=(1, 3)):
    """Results by JAX and by ONNX Runtime; the model is made without knowing how many clips."""
    (batch,) = export.symbolic_shape("batch")
    names = [f"x{i}" for i in range(len(arrays))]
    specs = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in arrays]
    model = onnx_model(function, dict(zip(names, specs, strict=True)), "y", {"made": "here"})
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for count in clips:
        taken = [np.resize(a, (count, *a.shape[1:])) for a in arrays]
        (got,) = session.run(["y"], dict(zip(names, taken, strict=True)))
        yield np.asarray(jax.jit(function)(*taken)), got


def _numbers(*shape, dtype=np.float32):
    chance = np.random.default_rng(0)
    if dtype == np.uint8:
        return chance.integers(0, 256, shape, dtype)
    return chance.normal(size=shape).astype(dtype)


def _scanned(reverse):
    def function(x):
        def step(carry, row):
            carry = 0.5 * carry + row
            return carry, jnp.tanh(carry)

        start = jnp.zeros((x.shape[0], x.shape[2]))
        last, rows = lax.scan(step, start, x.swapaxes(0, 1), reverse=reverse)
        return last[None] - 2 * rows

    return function


def _convolved(**how):
    kernel = _numbers(3, 3, 2, 5)

    def function(x):
        return lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how
        )

    return function


_FUNCTIONS = {
    "every second": lambda x: x[:, 1::2, ::-1],
    "stretch": lambda x: x[:, 2:5],
    "one": lambda x: x[:, 3],
    "windows": lambda x: x[:, np.array([[0, 1, 2], [2, 3, 4]])],
    "grid": lambda x: x[:, ::2, ::2] + x[:, 1::2, 1::2],
    "irregular": lambda x: x[:, np.array([4, 0, 0, 2])],
    "table": lambda x: jnp.arange(7.0)[jnp.clip(jnp.floor(x), -3, 3).astype(int)[..., None] + 3],
    "atan2": lambda x: jnp.arctan2(x, x[:, ::-1]),
    "atan2 at axes": lambda x: jnp.arctan2(jnp.floor(x), jnp.floor(x[:, ::-1])),
    "remainder": lambda x: jnp.mod(3 * x, 1.25),
    "argmax": lambda x: lax.argmax(x, 1, jnp.int32),
    "statistics": lambda x: (x - x.mean(1, keepdims=True)) * lax.rsqrt(jnp.square(x).sum((1, 2)))[
        :, None, None
    ],
    "chosen": lambda x: jnp.where((x > 0) & (x < 1) | (x != x), x, -x**2),
    "softmax": lambda x: jax.nn.log_softmax(x, axis=-1),
    "filled": lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 1, 4))], axis=1),
    "repeated": lambda x: jnp.repeat(x, 3, axis=1).reshape(-1, 4),
    "split": lambda x: jnp.split(x, 2, axis=2)[1] - jnp.stack([x, -x], 2)[:, :, 1, :2],
    "inner product": lambda x: jnp.einsum("bij,bkj->bik", x, x[:, :3]),
    "matrix product": lambda x: x @ _numbers(4, 3),
    "finite": lambda x: jnp.isfinite(jnp.log(jnp.abs(x))).astype(jnp.float32),
    "scan": _scanned(reverse=False),
    "scan back": _scanned(reverse=True),
}  # fmt: skip


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_operations_are_those_of_jax(name):
    with jax.numpy_rank_promotion("allow"):
        for expected, got in _both(_FUNCTIONS[name], _numbers(1, 6, 4)):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 1), "padding": ((0, 1), (2, 0)), "rhs_dilation": (1, 2)},
    ],
)
def test_convolutions_are_those_of_jax(how):
    for expected, got in _both(_convolved(**how), _numbers(1, 6, 7, 2)):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bytes_become_numbers():
    for expected, got in _both(lambda x: x.astype(jnp.float32) / 2, _numbers(1, 5, dtype=np.uint8)):
        np.testing.assert_array_equal(got, expected)


def test_what_is_not_needed_is_left_out():
    (batch,) = export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 3), np.float32)
    model = onnx_model(lambda x: (jnp.tanh(x), 2 * x)[1], {"x": spec}, "y", {})
    assert [node.op_type for node in model.graph.node] == ["Mul", "Identity"]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: jnp.cumsum(x, axis=1), "'cumsum'"),
        (lambda x: x.at[:, 0].set(1.0), "'scatter'"),
        (lambda x: lax.conv_transpose(x[None], jnp.ones((2, 3, 3)), (2,), "SAME"), "transposed"),
    ],
)
def test_what_is_not_translated_is_named(function, named):
    with pytest.raises(ValueError, match=named):
        onnx_model(function, {"x": jax.ShapeDtypeStruct((2, 3), np.float32)}, "y", {})
