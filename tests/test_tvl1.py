import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ucf101
from experiments.bench.flow import render
from stf_jax import tvl1
from stf_jax.flow import TvL1Settings, make_flow

SETTINGS = TvL1Settings(**ucf101.get_config().records.tvl1)
SIZE = (96, 128)  # that of test_flow's frames: compiled once


def _plane(height, width, seed=0):
    return np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)


def _error(field, truth):
    return float(np.hypot(*np.moveaxis(field - truth, -1, 0)).mean())


@pytest.fixture(scope="module")
def scenes():
    """Rendered pairs with their true motion: first [n h w], second [n h w], truth [n h w 2]."""
    kinds = ("translation", "rotation", "zoom", "occlusion")
    cases = [(kind, px) for kind in kinds for px in (1.0, 4.0)]
    rendered = [render(kind, px, SIZE, seed=k) for k, (kind, px) in enumerate(cases)]
    return cases, *(np.stack(arrays) for arrays in zip(*rendered, strict=True))


# --- pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 3, 5])
def test_the_median_is_the_median(side):
    image = _plane(9, 12)
    image[2:5, 3:6] = 1.0  # ties
    padded = np.pad(image, side // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    expected = np.median(windows, axis=(2, 3))
    np.testing.assert_array_equal(tvl1.median_filter(jnp.asarray(image), side), expected)


def test_a_warp_by_whole_pixels_moves_them():
    image = _plane(8, 10)
    whole = [jnp.full((8, 10), float(shift)) for shift in (2, -1)]
    read, inside = tvl1.warp(jnp.asarray(image), *whole)
    np.testing.assert_allclose(read[1:, :8], image[:-1, 2:], atol=1e-6)
    expected = np.zeros((8, 10))
    expected[1:, :8] = 1
    np.testing.assert_array_equal(inside, expected)
    # Outside: the nearest pixel inside.
    np.testing.assert_allclose(read[3, 8:], [image[2, 9]] * 2, atol=1e-6)


def test_a_warp_by_parts_of_pixels_is_exact_for_parabolas():
    y, x = np.mgrid[:12, :14].astype(np.float32)

    def parabola(x, y):
        return 0.3 * x * x - 0.2 * x * y + 0.1 * y * y + x - 2 * y

    u, v = 0.4 * np.sin(x), 0.7 * np.cos(y)  # another one at every pixel
    read, _ = tvl1.warp(*(jnp.asarray(a) for a in (parabola(x, y), u, v)))
    expected = parabola(x + u, y + v)
    np.testing.assert_allclose(read[2:-3, 2:-3], expected[2:-3, 2:-3], rtol=1e-4, atol=1e-4)


def test_derivatives_are_exact_for_cubics():
    y, x = np.mgrid[:9, :11].astype(np.float32)
    dx, dy = tvl1.derivatives(jnp.asarray(0.1 * x**3 - y**2 + x * y))
    np.testing.assert_allclose(dx[:, 2:-2], (0.3 * x**2 + y)[:, 2:-2], atol=1e-3)
    np.testing.assert_allclose(dy[2:-2], (x - 2 * y)[2:-2], atol=1e-3)
    # The edge is repeated: at x = 0 the rule sees 0, 0, 0, 0.1 and 0.8 in the first row.
    np.testing.assert_allclose(dx[0, 0], (8 * (0.1 - 0) - (0.8 - 0)) / 12, atol=1e-6)


def test_divergence_is_minus_the_adjoint_of_the_differences():
    height, width = 7, 9
    u, p, q = (_plane(height, width, seed) for seed in range(3))
    after, before = ((0, 1), (0, 1)), ((1, 0), (1, 0))
    right, below = tvl1._forward(jnp.pad(u, after))
    expected = np.diff(u, axis=1, append=u[:, -1:])
    np.testing.assert_allclose(right, expected, atol=1e-6)
    # Where the differences are always 0 the dual never leaves 0.
    p[:, -1], q[-1] = 0, 0
    divergence = tvl1._divergence(jnp.pad(p, before), jnp.pad(q, before))
    product = float((right * p + below * q).sum())
    assert abs(product) > 0.1
    np.testing.assert_allclose(product, -float((divergence * u).sum()), rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 20), (17, 21)])
def test_shrinking_keeps_a_slope_and_enlarging_brings_it_back(size):
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    slope = 2 * x - 3 * y
    small = tvl1.shrink(jnp.asarray(slope))
    assert small.shape == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    np.testing.assert_allclose(small[1:-1, 1:-1], slope[::2, ::2][1:-1, 1:-1], atol=1e-4)
    back = tvl1.enlarge(small, *size)
    np.testing.assert_allclose(back[4:-4, 4:-4], slope[4:-4, 4:-4], atol=1e-4)


def test_iterations_are_chambolle_and_pocks():
    """Against the same steps written out in numpy."""
    height, width, seeds = 6, 8, itertools.count()
    u, v, rest, dx, dy = (_plane(height, width, next(seeds)) for _ in range(5))
    settings = dataclasses.replace(SETTINGS, iterations=4, attachment=0.3, step=0.25)
    dual = (jnp.zeros((height + 1, width + 1), jnp.float32),) * 4
    data = tuple(jnp.asarray(a) for a in (rest, dx, dy))
    got, _ = tvl1._solve((jnp.asarray(u), jnp.asarray(v)), dual, data, settings)

    fields = np.stack([u, v]).astype(np.float64)
    ahead, p = fields.copy(), np.zeros((2, 2, height, width))  # component, direction
    for _ in range(4):
        p[:, 0] += 0.5 * np.diff(ahead, axis=2, append=ahead[:, :, -1:])
        p[:, 1] += 0.5 * np.diff(ahead, axis=1, append=ahead[:, -1:])
        p /= np.maximum(1, np.sqrt((p**2).sum(axis=1, keepdims=True)))
        divergence = np.diff(p[:, 0], axis=2, prepend=0) + np.diff(p[:, 1], axis=1, prepend=0)
        smooth = fields + 0.25 * divergence
        residual = rest + dx * smooth[0] + dy * smooth[1]
        move = np.clip(-residual / (dx**2 + dy**2), -0.3 * 0.25, 0.3 * 0.25)
        moved = smooth + move * np.stack([dx, dy])
        ahead, fields = 2 * moved - fields, moved
    np.testing.assert_allclose(np.stack(got), fields, atol=1e-4)


# --- whole -----------------------------------------------------------------------------------


def test_no_worse_than_opencv_on_rendered_motion(scenes):
    cases, first, second, truth = scenes
    fields = tvl1.flow_on_cpu(first, second, SETTINGS)
    theirs = make_flow("tvl1_opencv")
    for k, (kind, px) in enumerate(cases):
        error = _error(fields[k], truth[k])
        assert error <= _error(theirs(first[k], second[k]), truth[k]), (kind, px)
        assert error < 0.1 * px, (kind, px)


def test_large_motion_is_found():
    # A twelfth of the height: 2 px at the coarsest size, where a linearisation reaches it.
    first, second, truth = render("translation", 8.0, SIZE, seed=3)
    (field,) = tvl1.flow_on_cpu(first[None], second[None], SETTINGS)
    inner = (slice(12, -12), slice(12, -12))
    assert _error(field[inner], truth[inner]) < 0.1


def test_a_pair_has_the_same_bits_in_any_company(scenes):
    _, first, second, _ = scenes
    whole = tvl1.flow_on_cpu(first, second, SETTINGS)
    for rows in (slice(5, 6), slice(2, 8), [7, 0, 3]):
        some = tvl1.flow_on_cpu(first[rows], second[rows], SETTINGS)
        np.testing.assert_array_equal(some, whole[rows])


def test_no_motion_is_exactly_zero(scenes):
    _, first, _, _ = scenes
    assert not tvl1.flow_on_cpu(first[:1], first[:1], SETTINGS).any()


def test_each_setting_changes_the_program():
    """A setting that nobody reads would be stamped all the same."""
    frames = jax.ShapeDtypeStruct((1, 1, 16, 20), jnp.uint8)

    def program(**changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        return tvl1.tvl1_flow.lower(frames, frames, settings).as_text()

    plain = program()
    assert plain == program()
    for name in ("attachment", "step", "warps", "iterations"):
        assert program(**{name: 2 * getattr(SETTINGS, name)}) != plain, name
    assert program(median=3) != plain and program(coarsest=8) != plain


@pytest.mark.parametrize(
    "wrong", [{"warps": 0}, {"iterations": 0}, {"median": 4}, {"step": 0.0}, {"coarsest": 2}]
)
def test_impossible_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"records.tvl1.{next(iter(wrong))}"):
        dataclasses.replace(SETTINGS, **wrong)


def test_a_gpu_can_run_it():
    shape = jax.ShapeDtypeStruct((2, 16, 64, 64), jnp.uint8)
    exported = jax.export.export(tvl1.tvl1_flow, platforms=["cuda"])(shape, shape, SETTINGS)
    assert exported.platforms == ("cuda",)
    assert exported.out_avals[0].shape == (2, 16, 64, 64, 2)
    # Both clips and eight of their pairs go abreast.
    assert "tensor<2x8x64x64xf32>" in exported.mlir_module()
