import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stf_jax.optim import (
    OptimizerSettings,
    StageSettings,
    averaged,
    learning_rate_fn,
    make_optimizer,
    parameter_path,
)

STAGE = StageSettings(
    learning_rate=0.1,
    schedule="constant",
    boundaries=(),
    factors=(),
    warmup_epochs=0.0,
    max_epochs=10,
    patience=5,
    min_delta=0.001,
    rates=((".*", 1.0),),
    divide_clips=1,
)
PARAMS = {
    "spatial": {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
    "head": {"kernel": jnp.full((3, 2), 2.0)},
}


def _rates(steps, **changes):
    rate = learning_rate_fn(dataclasses.replace(STAGE, **changes), steps_per_epoch=10)
    return [float(rate(step)) for step in steps]


def test_constant():
    assert _rates([0, 50, 99]) == pytest.approx([0.1] * 3)


def test_piecewise_by_hand():
    rates = _rates(
        [0, 9, 10, 24, 25, 99], schedule="piecewise", boundaries=(1.0, 2.5), factors=(0.5, 0.1)
    )
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.005, 0.005])


def test_cosine_after_warm_up():
    rates = _rates([0, 5, 10, 55, 100], schedule="cosine", warmup_epochs=1.0)
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0], abs=1e-8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "cosin"}, "cosin"),
        ({"boundaries": (1.0,), "factors": ()}, "go together"),
        ({"boundaries": (1.0,), "factors": (0.1,)}, "piecewise"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"rates": ()}, "rates: got none"),
        ({"rates": ("spatial/.*", 0.1)}, "rates: got .'spatial/"),
        ({"rates": (("(", 1.0),)}, "no regular expression"),
        ({"rates": ((".*", -1.0),)}, "factor -1.0"),
        ({"divide_clips": 0}, "divide_clips must be at least 1, got 0"),
    ],
)
def test_impossible_stages_are_named(changes, said, annotations_off):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(STAGE, **changes)


def _settings(**changes):
    base = {"name": "adam", "weight_decay": 0.0, "clip": 0.0, "accumulate": 1, "ema": 0.0}
    return OptimizerSettings(**{**base, **changes})


def _updates(settings, gradients, rates=((".*", 1.0),)):
    tx = make_optimizer(settings, rates)
    return tx.update(gradients, tx.init(PARAMS), PARAMS)[0]


def test_first_adam_update_is_the_sign():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, -3.0), PARAMS)
    for leaf in jax.tree.leaves(_updates(_settings(), gradients)):
        np.testing.assert_allclose(leaf, 1.0, rtol=1e-5)


def test_muon_follows_kernels_by_orthogonal_matrices_and_the_rest_by_adam():
    """As published, but that the iteration makes singular values of 0.7 to 1.2 and not of 1."""
    random = np.random.default_rng(0)
    shapes = {
        "spatial": {"conv": {"kernel": (3, 3, 4, 8), "bias": (8,)}},
        "head": {"kernel": (8, 2)},
    }
    draw = lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    params, gradients = (
        jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(2)
    )
    tx = make_optimizer(_settings(name="muon"), ((".*", 1.0),))
    updates = tx.update(gradients, tx.init(params), params)[0]
    matrix = np.asarray(updates["spatial"]["conv"]["kernel"]).reshape(36, 8)
    left, _, right = np.linalg.svd(
        np.asarray(gradients["spatial"]["conv"]["kernel"]).reshape(36, 8)
    )
    values = np.diag(left.T[:8] @ -matrix @ right.T) / (0.2 * np.sqrt(36))
    assert 0.65 < values.min() and values.max() < 1.25
    # Adam would have moved every entry by 1 at first, and later by about 0.2.
    assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2, rel=0.25)
    for got, gradient in (
        (updates["head"]["kernel"], gradients["head"]["kernel"]),
        (updates["spatial"]["conv"]["bias"], gradients["spatial"]["conv"]["bias"]),
    ):
        np.testing.assert_array_equal(np.sign(got), -np.sign(gradient))
        assert np.abs(got).min() > 0.9
    # Frozen or decayed as with any other.
    rates = (("spatial/.*", 0.0), (".*", 1.0))
    tx = make_optimizer(_settings(name="muon", weight_decay=0.5), rates)
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    updates = tx.update(zeros, tx.init(params), params)[0]
    assert not np.any(updates["spatial"]["conv"]["kernel"])
    np.testing.assert_allclose(
        updates["head"]["kernel"], -0.5 * params["head"]["kernel"], rtol=1e-6
    )


def test_clipping_bounds_the_global_norm():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 100.0), PARAMS)
    updates = _updates(_settings(name="sgdm", clip=0.5), gradients)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)


def test_decay_pulls_kernels_and_leaves_biases():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = _updates(_settings(weight_decay=0.1), zeros)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["spatial"]["conv"]["bias"], 0.0)


def test_frozen_leaves_stay_to_the_bit_and_do_not_count_in_the_clipped_norm():
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    gradients["spatial"]["conv"]["kernel"] *= 1e6
    settings = _settings(name="sgdm", clip=1.0)
    updates = _updates(settings, gradients, (("spatial/.*", 0.0), (".*", 1.0)))
    after = optax.apply_updates(PARAMS, updates)
    assert (after["spatial"]["conv"]["kernel"] == PARAMS["spatial"]["conv"]["kernel"]).all()
    assert float(optax.tree.norm(updates["head"])) == pytest.approx(1.0, rel=1e-5)
    decayed = _updates(_settings(weight_decay=0.1), gradients, (("spatial/.*", 0.0), (".*", 1.0)))
    assert not np.any(decayed["spatial"]["conv"]["kernel"])


def test_each_part_has_its_rate_and_the_first_expression_counts():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, -3.0), PARAMS)
    rates = ((".*/bias", 2.0), ("spatial/.*", 0.1), (".*", 1.0))
    updates = _updates(_settings(), gradients, rates)
    for leaf, factor in (
        (updates["spatial"]["conv"]["bias"], 2.0),
        (updates["spatial"]["conv"]["kernel"], 0.1),
        (updates["head"]["kernel"], 1.0),
    ):
        np.testing.assert_allclose(leaf, factor, rtol=1e-5)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((("spatial/.*", 0.1),), "matches 1 parameters, such as 'head/kernel'"),
        ((("spacial/.*", 0.1), (".*", 1.0)), "spacial.* match no parameter"),
        (((".*", 1.0), ("head/.*", 0.1)), "head.* match no parameter, or only"),
    ],
)
def test_rates_must_cover_every_parameter_and_be_used(rates, said):
    with pytest.raises(ValueError, match=said):
        make_optimizer(_settings(), rates).init(PARAMS)


def test_the_average_by_hand():
    """The early decays are 1/10 and 2/11; from step 990 on (1 + n) / (10 + n) is above 0.99."""
    average = {"w": jnp.array([1.0])}
    average = averaged(average, {"w": jnp.array([2.0])}, 0, 0.99)
    assert float(average["w"][0]) == pytest.approx(0.1 * 1 + 0.9 * 2)
    average = averaged(average, {"w": jnp.array([0.0])}, 1, 0.99)
    assert float(average["w"][0]) == pytest.approx(2 / 11 * 1.9)
    late = averaged({"w": jnp.array([1.0])}, {"w": jnp.array([0.0])}, 5000, 0.99)
    assert float(late["w"][0]) == pytest.approx(0.99)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="adamm"):
        _settings(name="adamm")
    with pytest.raises(ValueError, match="accumulate.*0"):
        _settings(accumulate=0)
    with pytest.raises(ValueError, match="ema.*1.0"):
        _settings(ema=1.0)


def test_parameter_paths_read_like_files():
    path = jax.tree_util.tree_flatten_with_path(PARAMS)[0][-1][0]
    assert parameter_path(path) == "spatial/conv/kernel"
