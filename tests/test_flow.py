import cv2
import numpy as np
import pytest

from configs import ucf101
from stf_jax import tvl1
from stf_jax.flow import (
    FLOW_ALGORITHMS,
    OPENCV_ALGORITHMS,
    ZERO_FLOW,
    TvL1Settings,
    dequantise,
    flow_to_colour,
    make_flow,
    quantise,
    resize_flow,
    to_grey,
)

TVL1 = TvL1Settings(**ucf101.get_config().records.tvl1)

_BORDER = 12  # what enters there has no match in the other frame

# Mean end-point error that any of the algorithms keeps within here, px: three times what the worst
# of them showed. A field that is zero, swapped or of the wrong sign is 1.5 and more off.
_BOUND = 0.2


def _texture(size, seed=0, scale=4):
    """A smooth random texture, uint8 `h w`."""
    height, width = size
    noise = np.random.default_rng(seed).normal(size=(height + 40, width + 40))
    smooth = cv2.GaussianBlur(noise, (0, 0), scale / 2)[20:-20, 20:-20]
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def _shifted(motion, size=(96, 128)):
    """Two frames cut from one texture, so that all of it moves by `motion` = (u, v)."""
    u, v = motion
    whole = _texture((size[0] + 40, size[1] + 40))
    frames = []
    for x, y in ((20, 20), (20 - u, 20 - v)):
        frames.append(np.ascontiguousarray(whole[y : y + size[0], x : x + size[1]]))
    return frames


def _flow(algorithm):
    """The function of two frames by which an algorithm computes their flow."""
    if algorithm == "tvl1":
        return lambda a, b: tvl1.flow_on_cpu(a[None], b[None], TVL1)[0]
    return make_flow(algorithm)


def _inner(field):
    return field[_BORDER:-_BORDER, _BORDER:-_BORDER]


def _error(field, motion):
    """Mean end-point error, px."""
    return np.hypot(*np.moveaxis(field - np.array(motion, np.float32), -1, 0)).mean()


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
@pytest.mark.parametrize("motion", [(3, -2), (-2, 0), (0, 4)])
def test_a_moved_texture_gives_its_motion(algorithm, motion):
    field = _flow(algorithm)(*_shifted(motion))
    assert field.shape == (96, 128, 2) and field.dtype == np.float32
    assert _error(_inner(field), motion) < _BOUND / 2
    np.testing.assert_allclose(np.median(_inner(field), (0, 1)), motion, atol=0.15)


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_a_mirrored_clip_has_the_opposite_horizontal_flow(algorithm):
    frames = _shifted((3, -2))
    compute = _flow(algorithm)
    plain = compute(*frames)
    mirrored = compute(*(np.ascontiguousarray(frame[:, ::-1]) for frame in frames))
    expected = plain[:, ::-1] * np.array([-1, 1], np.float32)
    assert _error(_inner(mirrored - expected), (0, 0)) < _BOUND / 2


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_a_reversed_clip_has_the_opposite_flow(algorithm):
    previous, following = _shifted((3, -2))
    assert _error(_inner(_flow(algorithm)(following, previous)), (-3, 2)) < _BOUND / 2


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_a_still_clip_has_no_flow(algorithm):
    frame = _texture((96, 128))
    field = _flow(algorithm)(frame, frame.copy())
    assert np.abs(_inner(field)).max() < 0.01
    assert np.abs(field).max() < 0.2  # Farneback's corners


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_a_rendered_disc_moves_over_its_ground(algorithm):
    # Ground truth by construction: both textures are sampled at the places they came from.
    height, width = 96, 128
    ground_motion, disc_motion = (-1.5, 0.5), (2.5, -1.5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ground, cover = _texture((height, width), 1), _texture((height, width), 2)
    centre, radius = (62.0, 50.0), 26.0
    frames = []
    for time in (0, 1):
        places = [(x - time * u, y - time * v) for u, v in (ground_motion, disc_motion)]
        behind, before = (
            cv2.remap(texture, *place, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
            for texture, place in zip((ground, cover), places, strict=True)
        )
        inside = np.hypot(places[1][0] - centre[0], places[1][1] - centre[1]) < radius
        frames.append(np.where(inside, before, behind))
    field = _flow(algorithm)(*frames)
    distance = np.hypot(x - centre[0], y - centre[1])
    # At its rim the disc covers and uncovers ground: no algorithm is right there.
    assert _error(field[distance < radius - 8], disc_motion) < _BOUND
    outside = _inner(distance > radius + 12)
    assert _error(_inner(field)[outside], ground_motion) < _BOUND


@pytest.mark.parametrize("algorithm", OPENCV_ALGORITHMS)
def test_any_number_of_threads_gives_the_same_bits(algorithm):
    frames = _shifted((3, -2))
    before = cv2.getNumThreads()
    try:
        fields = []
        for threads in (1, 2, 5, 2):
            cv2.setNumThreads(threads)
            fields.append(_flow(algorithm)(*frames))
            assert cv2.getNumThreads() == threads  # left as it was found
    finally:
        cv2.setNumThreads(before)
    for field in fields[1:]:
        np.testing.assert_array_equal(field, fields[0])


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_nothing_is_kept_between_calls(algorithm):
    frames, others = _shifted((3, -2)), _shifted((-4, 1))
    compute = _flow(algorithm)
    first = compute(*frames).copy()
    compute(*others)
    np.testing.assert_array_equal(compute(*frames), first)


def test_flow_runs_on_one_thread(monkeypatch):
    # Every core already has a worker of its own.
    seen, compute = [], cv2.calcOpticalFlowFarneback

    def spy(*args, **kwargs):
        seen.append(cv2.getNumThreads())
        return compute(*args, **kwargs)

    monkeypatch.setattr(cv2, "calcOpticalFlowFarneback", spy)
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        make_flow("farneback")(*_shifted((3, -2)))
    finally:
        cv2.setNumThreads(before)
    assert seen == [1]


def test_threads_are_given_back_after_an_error():
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        with pytest.raises(cv2.error):
            make_flow("farneback")(np.zeros((8, 8), np.uint8), np.zeros((9, 9), np.uint8))
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_algorithms_differ():
    # Or a name would lead to another's flow.
    fields = [_flow(name)(*_shifted((3, -2))) for name in FLOW_ALGORITHMS]
    for k in range(len(fields)):
        assert np.abs(fields[k] - fields[k - 1]).max() > 1e-3


def test_an_unknown_algorithm_lists_the_known():
    with pytest.raises(ValueError, match="'brox'") as caught:
        make_flow("brox")
    assert all(name in str(caught.value) for name in OPENCV_ALGORITHMS)


def test_grey_weighs_red_green_and_blue():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]], np.uint8)
    np.testing.assert_array_equal(to_grey(colours), [[76, 150, 29, 90]])


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 32), (96, 128), (48, 128), (96, 16), (48, 64)])
def test_resized_flow_is_scaled_with_its_field(size):
    field = np.full((48, 64, 2), (6, -4), np.float32)
    resized = resize_flow(field, size)
    assert resized.shape == (*size, 2) and resized.dtype == np.float32
    expected = np.broadcast_to([6 * size[1] / 64, -4 * size[0] / 48], (*size, 2))
    np.testing.assert_allclose(resized, expected, rtol=1e-6)


def test_flow_resized_equals_flow_of_frames_resized():
    big = _shifted((4, -4), size=(192, 256))
    small = [cv2.resize(frame, (128, 96), interpolation=cv2.INTER_AREA) for frame in big]
    compute = make_flow("dis")
    field = resize_flow(compute(*big), (96, 128))
    assert _error(_inner(field), (2, -2)) < _BOUND
    assert _error(_inner(field - compute(*small)), (0, 0)) < _BOUND


def test_shrinking_averages():
    field = np.zeros((2, 4, 2), np.float32)
    field[..., 0] = [[1, 3, 5, 7], [1, 3, 5, 7]]
    np.testing.assert_allclose(resize_flow(field, (1, 2))[0, :, 0], [1, 3])  # half of 2 and 6


# --- bytes -----------------------------------------------------------------------------------

_BOUND_CASES = [20.0, 15.0, 8.0, 4.0, 1.0, 0.3, 7.7, 33.3]


@pytest.mark.parametrize("bound", _BOUND_CASES)
def test_quantised_ends_and_middle(bound):
    values = np.array([-2 * bound, -bound, 0, bound, 2 * bound], np.float32)
    quantised = quantise(values, bound)
    assert quantised.dtype == np.uint8
    assert quantised.tolist() == [0, 0, ZERO_FLOW, 255, 255]
    assert ZERO_FLOW == 128
    assert quantise(np.array([-0.0], np.float32), bound).tolist() == [128]


@pytest.mark.parametrize("bound", _BOUND_CASES)
def test_quantiser_comes_back_within_half_a_step(bound):
    values = np.linspace(-bound, bound, 10_001, dtype=np.float32)
    back = dequantise(quantise(values, bound), bound)
    assert back.dtype == np.float32
    assert np.abs(back - values).max() <= bound / 255 * 1.0001
    assert np.diff(quantise(values, bound).astype(int)).min() >= 0
    assert len(np.unique(quantise(values, bound))) == 256
    np.testing.assert_allclose(dequantise(np.array([0, 255], np.uint8), bound), [-bound, bound])


@pytest.mark.parametrize("bound", _BOUND_CASES)
def test_every_byte_comes_back_as_itself(bound):
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(quantise(dequantise(levels, bound), bound), levels)


def test_quantised_values_by_hand():
    # round(255 (v + 20) / 40): 1 px is 6.375 levels.
    values = np.array([-10, -1, 1, 3, -2, 10], np.float32)
    assert quantise(values, 20.0).tolist() == [64, 121, 134, 147, 115, 191]


# --- colours ---------------------------------------------------------------------------------


def _colour(u, v, max_magnitude=1.0):
    return flow_to_colour(np.array([[[u, v]]], np.float32), max_magnitude)[0, 0].astype(int)


def test_rest_is_white():
    assert (flow_to_colour(np.zeros((3, 4, 2), np.float32)) == 255).all()
    assert _colour(0, 0).tolist() == [255, 255, 255]


def test_directions_have_the_middlebury_colours():
    assert _colour(1, 0).tolist() == [255, 0, 0]  # right: red
    red, green, blue = _colour(0, 1)  # down: yellow
    assert red > 200 and green > 200 and blue < 20
    red, green, blue = _colour(-1, 0)  # left: light blue
    assert red < 20 and 100 < green < blue and blue > 240
    red, green, blue = _colour(0, -1)  # up: violet
    assert green < 20 and red > 80 and blue > 240


def test_hue_goes_round_without_a_jump():
    angle = np.linspace(0, 2 * np.pi, 721)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)[None]
    colours = flow_to_colour(circle, 1.01)[0].astype(int)
    # The wheel's last hue is a sixth of the way from red to magenta, as in Middlebury's own.
    assert np.abs(np.diff(colours, axis=0)).max() < 45
    assert len(np.unique(colours, axis=0)) > 200


def test_slower_is_paler_and_too_fast_is_darker():
    full, half, over = _colour(1, 0), _colour(0.5, 0), _colour(2, 0)
    np.testing.assert_allclose(half, [255, 128, 128], atol=1)  # half way to white
    assert over.sum() < full.sum()
    field = np.array([[[8, 0], [4, 0]]], np.float32)  # without a maximum: the fastest in the field
    np.testing.assert_array_equal(flow_to_colour(field)[0], [full, half])
