"""The streams against plain loops, and what each of their settings changes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.streams import (
    MST,
    Conv3D,
    Conv3DSettings,
    MSTSettings,
    SpatialStream,
    TemporalSettings,
    TemporalStream,
    inflated,
    kernel_init,
)

CONV3D = Conv3DSettings(True, "spatial_first", True, "out", 32, 3)
MST_SETTINGS = MSTSettings((1, 3, 5), (3, 3, 5), 32)
TEMPORAL = TemporalSettings("after_mst1", "he", "random")
KEY = jax.random.key(1, impl="rbg")  # the default generator takes three times as long to compile


def looped_convolution(x, kernel, bias):
    """Every output as a sum over the taps that lie inside; kernel `t h w i o`."""
    sizes, taps = x.shape[1:4], kernel.shape[:3]
    y = np.zeros((*x.shape[:4], kernel.shape[-1])) + bias
    for place in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, taps)):
            source = [p + k - (n - 1) // 2 for p, k, n in zip(place, tap, taps, strict=True)]
            if all(0 <= s < n for s, n in zip(source, sizes, strict=True)):
                y[(slice(None), *place)] += x[(slice(None), *source)] @ kernel[tap]
    return y


def full_kernel(name, kernel):
    """A stored kernel as `t h w i o`."""
    if name == "spatial":
        return kernel[None]
    return kernel[:, None, None] if name == "temporal" else kernel


@pytest.mark.parametrize("mid_relu", [True, False])
@pytest.mark.parametrize(
    "names", [["spatial", "temporal"], ["temporal", "spatial"], ["full"]], ids="-".join
)
def test_convolution_equals_a_plain_loop(names, mid_relu):
    order = "temporal_first" if names[0] == "temporal" else "spatial_first"
    settings = Conv3DSettings(len(names) == 2, order, mid_relu, "out", 4, 3)
    layer = Conv3D(4, 3, 5, settings, "he", 0)
    x = jax.random.normal(jax.random.key(0), (2, 6, 3, 4, 3))
    params = jax.jit(layer.init)(KEY, x)["params"]
    assert params.keys() == set(names)
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    expected = np.asarray(x)
    for name in names:
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        expected = looped_convolution(expected, full_kernel(name, kernel), bias)
        if mid_relu or name == names[-1]:
            expected = np.maximum(expected, 0)
    np.testing.assert_allclose(jax.jit(layer.apply)({"params": params}, x), expected, atol=1e-4)
    assert (expected == 0).any() and (expected > 0).any()


def test_mst_puts_its_branches_side_by_side():
    layer = MST(dataclasses.replace(MST_SETTINGS, width=4), CONV3D, "he", 0)
    x = jax.random.normal(jax.random.key(0), (1, 5, 6, 6, 3))
    params = jax.jit(layer.init)(KEY, x)["params"]
    y = jax.jit(layer.apply)({"params": params}, x)
    assert y.shape == (1, 5, 6, 6, 12)
    for number, (spatial, temporal) in enumerate([(1, 3), (3, 3), (5, 5)]):
        branch = Conv3D(4, spatial, temporal, CONV3D, "he", 0)
        apply = jax.jit(branch.apply)
        alone = apply({"params": params[f"branch{number + 1}"]}, x)
        np.testing.assert_array_equal(y[..., 4 * number : 4 * number + 4], alone)
        # How far one place is seen tells the kernel's size.
        moved = apply({"params": params[f"branch{number + 1}"]}, x.at[0, 2, 3, 3].add(50.0))
        seen = np.argwhere(np.abs(moved - alone).sum(axis=-1)[0] > 0)
        low, high = seen.min(axis=0), seen.max(axis=0)
        assert high[1] - low[1] + 1 == spatial and high[0] - low[0] + 1 == temporal


def test_parameters_of_the_paper_size_layers():
    conv3d = dataclasses.replace(CONV3D, width=512)
    mst = dataclasses.replace(MST_SETTINGS, width=512)

    def counts(conv3d):
        stream = TemporalStream(64, mst, conv3d, TEMPORAL, 0)
        params = jax.eval_shape(
            lambda key: stream.init(key, jnp.zeros((1, 8, 32, 32, 4))), jax.random.key(0)
        )["params"]
        return {
            "/".join(key.key for key in path[:-1]): sum(
                leaf.size
                for other, leaf in jax.tree.leaves_with_path(params)
                if other[:-1] == path[:-1]
            )
            for path, _ in jax.tree.leaves_with_path(params)
        }

    got = counts(conv3d)
    table = {
        "mst1/branch1/spatial": 262_656,
        "mst1/branch1/temporal": 786_944,
        "mst1/branch2/spatial": 2_359_808,
        "mst1/branch2/temporal": 786_944,
        "mst1/branch3/spatial": 6_554_112,
        "mst1/branch3/temporal": 1_311_232,
        "conv3d1/spatial": 7_078_400,
        "conv3d1/temporal": 786_944,
    }
    assert {name: got[name] for name in table} == table
    new = {name: count for name, count in got.items() if not name.startswith("block")}
    assert sum(new.values()) == 39_854_080
    assert sum(got.values()) - sum(new.values()) == 5_276_032
    # Unfactorised, the whole network has 299.9 M instead of 216.0 M (SPEC section 9).
    full = counts(dataclasses.replace(conv3d, factorised=False))
    assert round((216_002_947 + sum(full.values()) - sum(got.values())) / 1e6, 1) == 299.9


@pytest.mark.parametrize("order", ["spatial_first", "temporal_first"])
def test_the_matched_width_has_as_many_weights_as_the_full_kernel(order):
    settings = Conv3DSettings(True, order, True, "matched", 512, 3)
    for inputs in (512, 1536):
        params = jax.eval_shape(
            lambda key, n=inputs: Conv3D(512, 3, 3, settings, "he", 0).init(
                key, jnp.zeros((1, 3, 4, 4, n))
            ),
            jax.random.key(0),
        )["params"]
        weights = sum(params[name]["kernel"].size for name in ("spatial", "temporal"))
        assert 0.999 < weights / (27 * inputs * 512) <= 1
        if (inputs, order) == (512, "spatial_first"):
            assert params["spatial"]["bias"].shape == (1152,)  # R(2+1)D's


@pytest.mark.parametrize(
    "pool4, sides",
    [
        ("after_mst1", {"mst1": 4, "conv3d1": 2, "mst2": 2, "conv3d2": 2}),
        ("before_mst1", {"mst1": 2, "conv3d1": 2, "mst2": 2, "conv3d2": 2}),
        ("after_3d1", {"mst1": 4, "conv3d1": 4, "mst2": 2, "conv3d2": 2}),
    ],
)
def test_pool4_stands_where_it_is_told(pool4, sides):
    stream = TemporalStream(4, MST_SETTINGS, CONV3D, dataclasses.replace(TEMPORAL, pool4=pool4), 0)
    shapes = jax.eval_shape(
        lambda key: stream.init_with_output(key, jnp.zeros((2, 5, 32, 32, 6)))[0], jax.random.key(0)
    )
    assert {name: shapes[name].shape[2] for name in sides} == sides
    assert all(out.shape[:2] == (2, 5) for out in shapes.values())
    assert shapes["block4"].shape == (2, 5, 4, 4, 32)
    assert [shapes[name].shape[-1] for name in sides] == [96, 32, 96, 32]


def test_frames_of_the_spatial_stream_do_not_see_each_other():
    stream = SpatialStream(4, 0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 32, 32, 3))
    params = jax.jit(stream.init)(KEY, x)
    together = jax.jit(stream.apply)(params, x)["block5"]
    assert together.shape == (2, 3, 2, 2, 32)
    alone = jax.jit(stream.apply)(params, x[1:, 2:])["block5"]
    np.testing.assert_allclose(together[1:, 2:], alone, atol=1e-5)


def test_temporal_stream_sees_time_and_the_inflated_one_not_yet():
    x = jax.random.normal(jax.random.key(0), (1, 6, 32, 32, 4))
    changed = x.at[0, 2].add(jax.random.normal(jax.random.key(5), (32, 32, 4)))

    def changed_frames(init):
        settings = dataclasses.replace(TEMPORAL, init=init)
        stream = TemporalStream(4, MST_SETTINGS, CONV3D, settings, 0)
        params = jax.jit(stream.init)(KEY, x)
        apply = jax.jit(stream.apply)
        a, b = (apply(params, clip)["conv3d2"] for clip in (x, changed))
        return np.flatnonzero(np.abs(a - b).sum(axis=(0, 2, 3, 4)) > 0).tolist()

    assert changed_frames("he") == [0, 1, 2, 3, 4, 5]
    assert changed_frames("inflate") == [2]


def test_initialisers_have_the_spread_of_their_names():
    shape = (3, 3, 200, 100)
    draws = {
        name: np.asarray(kernel_init(name)(jax.random.key(0), shape, jnp.float32))
        for name in ("he", "glorot", "normal001", "inflate")
    }
    assert draws["he"].std() == pytest.approx((2 / 1800) ** 0.5, rel=0.02)
    limit = (6 / (1800 + 900)) ** 0.5
    assert draws["glorot"].std() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert np.abs(draws["glorot"]).max() <= limit
    assert draws["normal001"].std() == pytest.approx(0.01, rel=0.02)
    np.testing.assert_array_equal(draws["inflate"], draws["he"])
    full = np.asarray(inflated(jax.random.key(0), (3, *shape)))
    np.testing.assert_array_equal(full[1], draws["he"])
    assert not full[[0, 2]].any()


def test_inflation_needs_channels_that_fit():
    with pytest.raises(ValueError, match="passes 5 channels on to 3"):
        inflated(jax.random.key(0), (3, 5, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MSTSettings((1, 4), (3, 3), 8), r"mst\.spatial: got \(1, 4\)"),
        (lambda: MSTSettings((), (), 8), r"mst\.spatial: got \(\)"),
        (lambda: MSTSettings((1, 3), (3,), 8), r"mst\.temporal: got \(3,\).*2 branches"),
        (lambda: MSTSettings((1,), (3,), 0), r"mst\.width: got 0"),
        (lambda: Conv3DSettings(1, "spatial_first", True, "out", 8, 3), r"factorised: got 1"),
        (lambda: Conv3DSettings(True, "both", True, "out", 8, 3), r"order: got 'both'"),
        (lambda: Conv3DSettings(True, "spatial_first", True, "in", 8, 3), r"mid: got 'in'"),
        (lambda: Conv3DSettings(True, "spatial_first", True, "out", 8.5, 3), r"width: got 8\.5"),
        (lambda: Conv3DSettings(True, "spatial_first", True, "out", 8, 2), r"temporal: got 2"),
        (lambda: TemporalSettings("after", "he", "random"), r"pool4: got 'after'"),
        (lambda: TemporalSettings("after_mst1", "she", "random"), r"temporal\.init: got 'she'"),
        (lambda: TemporalSettings("after_mst1", "he", "mean"), r"conv1_init: got 'mean'"),
    ],
)
def test_impossible_settings_are_refused(annotations_off, make, message):
    with pytest.raises(ValueError, match=message):
        make()
