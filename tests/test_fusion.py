"""Fusion and temporal pyramid against hand-worked values and plain loops."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.fusion import (
    Fusion,
    FusionSettings,
    TPNSettings,
    blurred_sum,
    segment_vectors,
    temporal_pyramid,
)

FUSION = FusionSettings((3, 3, 3), 4, True, "after", "feichtenhofer", 0.0, ())
TPN = TPNSettings(4, 4, (1, 2, 4), "mean")


def ramp(frames):
    return jnp.arange(1.0, frames + 1).reshape(1, frames, 1, 1, 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def test_pyramid_of_a_ramp_by_hand():
    mean = temporal_pyramid(ramp(8), (1, 2, 4)).ravel()
    assert mean.tolist() == [4.5, 2.5, 6.5, 1.5, 3.5, 5.5, 7.5]
    assert mean[0] == mean[1:3].mean() and mean[1:3].tolist() == [mean[3:5].mean(), mean[5:].mean()]
    assert temporal_pyramid(ramp(8), (1, 2, 4), "max").ravel().tolist() == [8, 4, 8, 2, 4, 6, 8]
    assert temporal_pyramid(-ramp(8), (2,), "max").ravel().tolist() == [-1, -5]
    # Levels come in the order of the setting, and the finest one is the frames themselves.
    assert temporal_pyramid(ramp(4), (4, 1)).ravel().tolist() == [1, 2, 3, 4, 2.5]
    assert temporal_pyramid(ramp(6), (3,)).ravel().tolist() == [1.5, 3.5, 5.5]


@pytest.mark.parametrize("psi", ["mean", "max"])
def test_pyramid_keeps_places_channels_and_clips_apart(psi):
    x = normal(0, 2, 8, 2, 3, 4)
    maps = [
        getattr(np, psi)(x[:, bin_ * 8 // bins : (bin_ + 1) * 8 // bins], axis=1)
        for bins in (1, 2, 4)
        for bin_ in range(bins)
    ]
    got = temporal_pyramid(jnp.asarray(x), (1, 2, 4), psi)
    np.testing.assert_allclose(got, np.stack(maps, axis=1), atol=1e-6)


@pytest.mark.parametrize("stride, starts", [(4, [0, 4, 8]), (2, [0, 2, 4, 6, 8]), (8, [0, 8])])
def test_segments_are_the_pyramids_of_the_windows(stride, starts):
    x = normal(1, 2, 12, 2, 3, 4)
    settings = dataclasses.replace(TPN, stride=stride)
    got = segment_vectors(jnp.asarray(x), settings)
    assert got.shape == (2, len(starts), 7 * 2 * 3 * 4)
    for (clip, (number, start)), level in itertools.product(
        itertools.product(range(2), enumerate(starts)), (1, 2, 4)
    ):
        window = x[clip, start : start + 4]
        expected = window.reshape(level, 4 // level, 2, 3, 4).mean(axis=1).ravel()
        first = (level - 1) * 24  # maps of the coarser levels come before
        part = got[clip, number, first : first + level * 24]
        np.testing.assert_allclose(part, expected, atol=1e-6)


def test_segments_take_the_pyramids_psi_and_levels():
    settings = TPNSettings(4, 4, (2,), "max")
    assert segment_vectors(ramp(8), settings).tolist() == [[[2, 4], [6, 8]]]


def test_paper_size_segments():
    shape = jax.ShapeDtypeStruct((2, 24, 7, 7, 512), jnp.float32)
    settings = TPNSettings(8, 8, (1, 2, 4), "mean")
    got = jax.eval_shape(lambda x: segment_vectors(x, settings), shape)
    assert got.shape == (2, 3, 175_616)


@pytest.mark.parametrize("frames", [3, 5, 10])
def test_clips_that_windows_do_not_fit_are_refused(frames):
    with pytest.raises(ValueError, match=rf"{frames} frames.*window=4.*stride=4.*multiple of 4"):
        segment_vectors(ramp(frames), TPN)


def test_bins_that_do_not_divide_the_frames_are_refused():
    with pytest.raises(ValueError, match="6 frames cannot be divided into 4 equal bins"):
        temporal_pyramid(ramp(6), (1, 2, 4))


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


def cells(x, how):
    """2x2 cells of h and w, an odd last row or column left out."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = [x[:, :, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)]
    return getattr(np, how)(corners, axis=0)


def fused(settings, params, *maps):
    apply = jax.jit(Fusion(settings, 0).apply)
    return np.asarray(apply({"params": {"conv": params}}, *map(jnp.asarray, maps)))


@pytest.mark.parametrize("pool5", ["after", "before", "stride", "average"])
@pytest.mark.parametrize("kernel, relu", [((3, 3, 3), True), ((3, 5, 1), False)])
def test_fusion_equals_a_plain_loop(pool5, kernel, relu):
    settings = FusionSettings(kernel, 4, relu, pool5, "he", 0.0, ())
    spatial, temporal = normal(2, 2, 4, 5, 6, 2), normal(3, 2, 4, 5, 6, 3)
    height, width, length = kernel
    params = {"kernel": normal(4, length, height, width, 5, 4), "bias": normal(5, 4)}
    x = np.concatenate([spatial, temporal], axis=-1)
    if pool5 == "before":
        x = cells(x, "max")
    elif pool5 == "stride":
        x = x[:, :, :4]
    expected = looped_convolution(x, params["kernel"], params["bias"])
    if relu:
        expected = np.maximum(expected, 0)
    if pool5 in ("after", "average"):
        expected = cells(expected, "max" if pool5 == "after" else "mean")
    elif pool5 == "stride":
        # SAME padding of an even size puts the spare zero last: outputs sit at odd places.
        expected = expected[:, :, 1::2, 1::2]
    assert expected.shape == (2, 4, 2, 3, 4) and (expected < 0).any() != relu
    got = fused(settings, jax.tree.map(jnp.asarray, params), spatial, temporal)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_feichtenhofer_adds_a_quarter_and_three_quarters():
    # Maps that are constant in time and space, a value per channel (SPEC 16.4).
    a, b = np.arange(1.0, 5.0, dtype=np.float32), np.array([8.0, 3, 0, 5], np.float32)
    maps = [jnp.broadcast_to(v, (1, 6, 8, 8, 4)) for v in (a, b)]
    settings = dataclasses.replace(FUSION, pool5="average")
    params = Fusion(settings, 0).init(jax.random.key(0), *maps)["params"]
    assert not params["conv"]["bias"].any()
    y = fused(settings, params["conv"], *maps)
    assert y.shape == (1, 6, 4, 4, 4)
    expected = 0.25 * a + 0.75 * b
    inner = y[:, 1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, np.broadcast_to(expected, inner.shape), rtol=1e-5)
    for border in (y[:, 0], y[:, -1], y[:, :, 0], y[:, :, :, -1]):
        assert (border < 0.999 * expected).all()


def test_feichtenhofer_is_a_gaussian_of_each_channel():
    kernel = np.asarray(blurred_sum(jax.random.key(0), (3, 1, 5, 4, 2)))
    gauss = np.zeros((3, 1, 5))
    for t, w in itertools.product(range(3), range(5)):
        gauss[t, 0, w] = np.exp(-((t - 1) ** 2 + (w - 2) ** 2) / 2)
    gauss /= gauss.sum()
    for i, o in itertools.product(range(4), range(2)):
        share = (0.25 if i < 2 else 0.75) * (i % 2 == o)
        np.testing.assert_allclose(kernel[..., i, o], share * gauss, atol=1e-7)
    single = np.asarray(blurred_sum(jax.random.key(0), (3, 1, 5, 2, 2)))
    np.testing.assert_allclose(single, kernel[..., :2, :] * 4, atol=1e-7)


def test_initialisations_by_name():
    maps = [jnp.zeros((1, 3, 4, 4, 64))] * 2
    settings = dataclasses.replace(FUSION, width=64, init="he")
    key = jax.random.key(0, impl="rbg")  # the default generator takes longer to compile
    he = jax.jit(Fusion(settings, 0).init)(key, *maps)["params"]["conv"]["kernel"]
    assert float(he.std()) == pytest.approx((2 / (27 * 128)) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="12 channels of all maps together and fusion.width 4"):
        blurred_sum(jax.random.key(0), (3, 3, 3, 12, 4))


def test_parameters_at_paper_size():
    def init(key, *maps, **changes):
        return Fusion(dataclasses.replace(FUSION, width=512, **changes), 0).init(key, *maps)

    maps = [jax.ShapeDtypeStruct((2, 24, 14, 14, 512), jnp.float32)] * 2
    params = jax.eval_shape(init, jax.random.key(0), *maps)["params"]
    assert params["conv"]["kernel"].shape == (3, 3, 3, 1024, 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 14_156_288


def test_time_is_never_thinned_out():
    maps = [jax.ShapeDtypeStruct((2, 24, 14, 14, 4), jnp.float32)] * 2
    for pool5 in ("after", "before", "stride", "average"):
        layer = Fusion(dataclasses.replace(FUSION, pool5=pool5), 0)
        out = jax.eval_shape(
            lambda *m, f=layer: f.init_with_output(jax.random.key(0), *m)[0], *maps
        )
        assert out.shape == (2, 24, 7, 7, 4)


@pytest.mark.parametrize(
    "settings, section, key, value, allowed",
    [
        (FUSION, "fusion", "kernel", (3, 3), "three odd sizes"),
        (FUSION, "fusion", "kernel", (3, 3, 2), "three odd sizes"),
        (FUSION, "fusion", "width", 0, "an integer from 1 on"),
        (FUSION, "fusion", "relu", 1, "True, False"),
        (FUSION, "fusion", "pool5", "max", "'after', 'before', 'stride', 'average'"),
        (FUSION, "fusion", "init", "glorot", "'feichtenhofer', 'he'"),
        (FUSION, "fusion", "drop_rgb", 1.0, "0 <= share < 1"),
        (FUSION, "fusion", "loss_without", ("both",), "(), ('rgb',), ('flow',), ('rgb', 'flow')"),
        (TPN, "tpn", "window", 0, "an integer from 1 on"),
        (TPN, "tpn", "stride", 2.0, "an integer from 1 on"),
        (TPN, "tpn", "levels", (1, 3), r"divisors of tpn\.window \(4\)"),
        (TPN, "tpn", "levels", (), r"divisors of tpn\.window \(4\)"),
        (TPN, "tpn", "psi", "sum", "'mean', 'max'"),
    ],
)
def test_impossible_settings_are_refused(annotations_off, settings, section, key, value, allowed):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(settings, **{key: value})
    message = str(caught.value)
    assert message.startswith(f"model.{section}.{key}: got {value!r}, allowed: ")
    assert allowed.replace("\\", "") in message
