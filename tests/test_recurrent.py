"""The recurrent layer against a plain numpy LSTM, and what normalisation makes it blind to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.recurrent import LSTM, BiLSTM, LSTMCell, LSTMSettings, Normalisation

HIDDEN = 5
SETTINGS = LSTMSettings("lstm", HIDDEN, "tf", "units", 1.0, True)
READINGS = ["tf", "ifo", "ifgo", "ba2016", "none"]


def drawn(shapes, seed=0):
    """Random parameters of these shapes; gains are around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.5, leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_for(layer, x, seed=0):
    return drawn(jax.eval_shape(layer.init, jax.random.key(0), x)["params"], seed)


@functools.partial(jax.jit, static_argnums=0)
def compiled(layer, params, x):
    return layer.apply({"params": params}, x)


def run(layer, params, x):
    return np.asarray(compiled(layer, params, x))


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(0, 1, (4, 3, 7)), jnp.float32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def looped_norm(x, params, axis):
    """Gain, bias, mean and variance of one vector after the other."""
    x = np.array(x if axis == "units" else x.T)
    for vector in x:
        mean = sum(vector) / len(vector)
        variance = sum((vector - mean) ** 2) / len(vector)
        vector[:] = (vector - mean) / np.sqrt(variance + 1e-5)
    return (x if axis == "units" else x.T) * params["scale"] + params["bias"]


def looped_lstm(params, x, settings, reverse):
    """One direction, step by step, in float64; (b, s, hidden)."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    cell, ln, axis = params["cell"], settings.ln, settings.ln_axis
    x = np.asarray(x, np.float64)
    c = h = np.zeros((x.shape[0], settings.hidden))
    states = np.zeros((*x.shape[:2], settings.hidden))
    for step in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        from_x = x[:, step] @ params["input"]["kernel"]
        from_h = h @ cell["recurrent"]["kernel"]
        if ln == "ba2016":
            from_x = looped_norm(from_x, cell["ln_x"], axis)
            from_h = looped_norm(from_h, cell["ln_h"], axis)
        i, f, o, g = np.split(from_x + from_h, 4, axis=1)
        if ln in ("tf", "ifgo", "ifo"):
            i = looped_norm(i, cell["ln_i"], axis)
            f = looped_norm(f, cell["ln_f"], axis)
            o = looped_norm(o, cell["ln_o"], axis)
        if ln in ("tf", "ifgo"):
            g = looped_norm(g, cell["ln_g"], axis)
        if ln == "ifo":
            g = g + cell["bias_g"]
        if ln == "none":
            i, f = i + cell["bias_i"], f + cell["bias_f"]
            o, g = o + cell["bias_o"], g + cell["bias_g"]
        c = sigmoid(f + settings.forget_bias) * c + sigmoid(i) * np.tanh(g)
        if ln == "tf":
            c = looped_norm(c, cell["ln_c"], axis)
        h = sigmoid(o) * np.tanh(looped_norm(c, cell["ln_c"], axis) if ln == "ba2016" else c)
        states[:, step] = h
    return states


@pytest.mark.parametrize("axis", ["units", "batch"])
@pytest.mark.parametrize("ln", READINGS)
def test_every_reading_equals_a_plain_loop(x, ln, axis):
    settings = dataclasses.replace(SETTINGS, ln=ln, ln_axis=axis)
    layer = BiLSTM(settings)
    params = drawn_for(layer, x)
    got = run(layer, params, x)
    assert got.shape == (4, 3, 2, HIDDEN)
    for number, (name, reverse) in enumerate([("forward", False), ("backward", True)]):
        expected = looped_lstm(params[name], x, settings, reverse)
        np.testing.assert_allclose(got[:, :, number], expected, atol=2e-5, err_msg=name)


def test_the_readings_differ_and_so_do_the_axes(x):
    params = drawn_for(BiLSTM(SETTINGS), x)["forward"]
    extra = {f"bias_{gate}": np.full(HIDDEN, 0.1) for gate in "ifog"}
    extra |= {f"ln_{a}": {"scale": np.ones(4 * HIDDEN), "bias": np.zeros(4 * HIDDEN)} for a in "xh"}
    params["cell"] |= extra
    results = [
        looped_lstm(params, x, dataclasses.replace(SETTINGS, ln=ln, ln_axis=axis), False)
        for ln in READINGS
        for axis in ("units", "batch")
        if (ln, axis) != ("none", "batch")
    ]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert np.abs(one - other).max() > 0.05


@pytest.mark.parametrize("ln", ["tf", "ba2016"])
def test_the_scan_equals_single_steps_of_the_cell(x, ln):
    settings = dataclasses.replace(SETTINGS, ln=ln)
    layer, cell = LSTM(settings, reverse=False), LSTMCell(settings)
    params = drawn_for(layer, x)
    carry = (jnp.zeros((4, HIDDEN)), jnp.zeros((4, HIDDEN)))
    step, states = jax.jit(cell.apply), []
    for number in range(x.shape[1]):
        projected = x[:, number] @ params["input"]["kernel"]
        carry, h = step({"params": params["cell"]}, carry, projected)
        np.testing.assert_array_equal(carry[1], h)
        states.append(h)
    np.testing.assert_allclose(run(layer, params, x), np.stack(states, axis=1), atol=1e-6)
    # Only 'tf' keeps the normalised cell state.
    gains = jax.tree.map(np.asarray, params["cell"]["ln_c"])
    kept = (np.asarray(carry[0]) - gains["bias"]) / gains["scale"]
    assert (np.abs(kept.mean(axis=1)).max() < 1e-5) == (ln == "tf")
    assert (np.abs(kept.var(axis=1) - 1).max() < 1e-2) == (ln == "tf")


def parameters(settings, inputs):
    """Shapes by path, without making them."""
    shapes = jax.eval_shape(BiLSTM(settings).init, jax.random.key(0), jnp.zeros((1, 3, inputs)))
    return {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(shapes["params"])
    }


@pytest.mark.parametrize(
    "ln, normed, biased, whole",
    [
        ("tf", "ifogc", "", ""),
        ("ifgo", "ifog", "", ""),
        ("ifo", "ifo", "g", ""),
        ("ba2016", "c", "", "xh"),
        ("none", "", "ifog", ""),
    ],
)
def test_each_reading_has_its_parameters(ln, normed, biased, whole):
    cell = {"recurrent/kernel": (5, 20)}
    cell |= {f"ln_{n}/{kind}": (5,) for n in normed for kind in ("scale", "bias")}
    cell |= {f"ln_{n}/{kind}": (20,) for n in whole for kind in ("scale", "bias")}
    cell |= {f"bias_{n}": (5,) for n in biased}
    expected = {f"cell/{name}": shape for name, shape in cell.items()} | {"input/kernel": (7, 20)}
    assert parameters(dataclasses.replace(SETTINGS, ln=ln), 7) == {
        f"{direction}/{name}": shape
        for direction in ("forward", "backward")
        for name, shape in expected.items()
    }


def test_parameters_at_paper_size():
    shapes = parameters(dataclasses.replace(SETTINGS, hidden=101), 175_616)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    norms = sum(size for name, size in sizes.items() if "/ln_" in name)
    assert norms == 2_020
    assert sum(sizes.values()) - norms == 141_979_336


def test_gains_start_at_one_and_biases_at_zero(x):
    params = BiLSTM(dataclasses.replace(SETTINGS, ln="ifo")).init(jax.random.key(0), x)["params"]
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == "kernel":
            limit = (6 / sum(leaf.shape)) ** 0.5  # Glorot, over all four gates
            assert 0.8 * limit < np.abs(leaf).max() <= limit
        else:
            np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"))
    one, other = (params[direction]["input"]["kernel"] for direction in ("forward", "backward"))
    assert np.abs(one - other).max() > 0.1


def test_reversing_the_steps_and_swapping_directions_mirrors_the_states(x):
    layer = BiLSTM(SETTINGS)
    params = drawn_for(layer, x)
    swapped = {"forward": params["backward"], "backward": params["forward"]}
    states = run(layer, params, x)
    mirrored = run(layer, swapped, x[:, ::-1])
    np.testing.assert_allclose(mirrored[:, ::-1, ::-1], states, atol=1e-6)
    # The mean over steps of a projection of both is then the same (V and V' swapped).
    np.testing.assert_allclose(mirrored.mean(axis=1)[:, ::-1], states.mean(axis=1), atol=1e-6)
    assert np.abs(mirrored - states).max() > 0.1


def test_forward_sees_the_past_and_backward_the_future(x):
    layer = BiLSTM(SETTINGS)
    params = drawn_for(layer, x)
    change = np.abs(run(layer, params, x.at[:, 1].add(1.0)) - run(layer, params, x))
    changed = change.max(axis=(0, 3)) > 1e-6
    assert changed.tolist() == [[False, True], [True, True], [True, False]]


def test_one_direction_is_the_forward_half(x):
    both = drawn_for(BiLSTM(SETTINGS), x)
    layer = BiLSTM(dataclasses.replace(SETTINGS, bidirectional=False))
    assert drawn_for(layer, x).keys() == {"forward"}
    alone = run(layer, {"forward": both["forward"]}, x)
    assert alone.shape == (4, 3, 1, HIDDEN)
    np.testing.assert_allclose(alone[:, :, 0], run(BiLSTM(SETTINGS), both, x)[:, :, 0], atol=1e-6)


@pytest.mark.parametrize(
    "factors, blind",
    [
        ((2, 5, 3, 1), {"tf", "ifgo", "ifo"}),  # each sigmoid gate by a factor of its own
        ((1, 1, 1, 4), {"tf", "ifgo"}),
        ((4, 4, 4, 4), {"tf", "ifgo", "ba2016"}),
    ],
    ids=["i f o", "g", "all alike"],
)
def test_normalised_gates_do_not_feel_the_scale_of_their_weights(x, factors, blind):
    felt = set()
    for ln in READINGS:
        layer = LSTM(dataclasses.replace(SETTINGS, ln=ln), reverse=False)
        params = drawn_for(layer, x)
        scale = np.repeat(np.float32(factors), HIDDEN)[None]
        larger = jax.tree_util.tree_map_with_path(
            lambda path, leaf, scale=scale: leaf * scale if path[-1].key == "kernel" else leaf,
            params,
        )
        change = np.abs(run(layer, larger, x) - run(layer, params, x)).max()
        assert change < 2e-3 or change > 2e-2
        if change > 2e-2:
            felt.add(ln)
    assert felt == set(READINGS) - blind


@pytest.mark.parametrize("ln", READINGS)
def test_the_first_step_does_not_feel_the_scale_of_the_input(x, ln):
    # The recurrent part is zero there, so W_x x alone is normalised (SPEC 16.5).
    layer = LSTM(dataclasses.replace(SETTINGS, ln=ln), reverse=False)
    params = drawn_for(layer, x)
    change = np.abs(run(layer, params, 3 * x) - run(layer, params, x)).max(axis=(0, 2))
    assert (change[0] < 1e-3) == (ln in ("tf", "ifgo", "ba2016"))
    # Later only 'ba2016' remains blind: it normalises W_x x apart from W_h h.
    assert (change[1:].min() < 1e-3) == (ln == "ba2016")


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, -2.0])
def test_the_forget_bias_by_hand(x, forget_bias):
    settings = dataclasses.replace(SETTINGS, ln="none", forget_bias=forget_bias)
    layer = LSTM(settings, reverse=False)
    params = jax.tree.map(jnp.zeros_like, drawn_for(layer, x))
    params["cell"]["bias_g"] = jnp.arange(1.0, HIDDEN + 1)
    # Weights of zero leave i = o = 1/2 and f = sigmoid(forget_bias) at every step.
    new, c = 0.5 * np.tanh(np.arange(1.0, HIDDEN + 1)), 0.0
    states = run(layer, params, x)
    for step in range(3):
        c = c / (1 + np.exp(-forget_bias)) + new
        expected = np.broadcast_to(0.5 * np.tanh(c), (4, HIDDEN))
        np.testing.assert_allclose(states[:, step], expected, atol=1e-6)


def test_only_batch_statistics_depend_on_the_rest_of_the_batch(x):
    for axis in ("units", "batch"):
        layer = BiLSTM(dataclasses.replace(SETTINGS, ln_axis=axis))
        params = drawn_for(layer, x)
        change = np.abs(run(layer, params, x[:2]) - run(layer, params, x)[:2]).max()
        assert (change < 1e-5) == (axis == "units")


def test_constant_features_have_finite_gradients():
    layer = Normalisation("units")
    x = jnp.full((2, 4), 3.0)
    params = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: layer.apply(params, x)[0, 0])(x)
    assert np.isfinite(gradient).all() and not layer.apply(params, x).any()


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden", 0),
        ("hidden", 2.0),
        ("ln", "layer"),
        ("ln_axis", "time"),
        ("forget_bias", "1"),
        ("bidirectional", 1),
    ],
)
def test_impossible_settings_are_refused(annotations_off, key, value):
    with pytest.raises(ValueError, match=rf"model\.lstm\.{key}: got {value!r}, allowed"):
        dataclasses.replace(SETTINGS, **{key: value})
