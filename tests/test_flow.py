import cv2
import numpy as np
import pytest

from stf_jax.flow import (
    FLOW_ALGORITHMS,
    ZERO_FLOW,
    dequantise,
    flow_to_colour,
    make_flow,
    quantise,
    resize_flow,
    to_grey,
)


def _texture(height=96, width=128, seed=0):
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def _moved(picture, right, down):
    matrix = np.array([[1, 0, right], [0, 1, down]], np.float32)
    size = picture.shape[1], picture.shape[0]
    return cv2.warpAffine(picture, matrix, size, borderMode=cv2.BORDER_REFLECT)


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_a_moved_texture_gives_its_motion(algorithm):
    before = _texture()
    flow = make_flow(algorithm)(before, _moved(before, 3, -2))
    assert flow.shape == (96, 128, 2) and flow.dtype == np.float32
    inside = flow[16:-16, 16:-16].reshape(-1, 2)
    np.testing.assert_allclose(np.median(inside, axis=0), (3, -2), atol=0.15)


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_a_mirrored_clip_gives_minus_u(algorithm):
    before = _texture(seed=1)
    after = _moved(before, 2, 1)
    plain = make_flow(algorithm)(before, after)
    mirrored = make_flow(algorithm)(
        np.ascontiguousarray(before[:, ::-1]), np.ascontiguousarray(after[:, ::-1])
    )
    middle = (slice(16, -16), slice(16, -16))
    u, v = (np.median(plain[middle][..., k]) for k in (0, 1))
    mu, mv = (np.median(mirrored[middle][..., k]) for k in (0, 1))
    assert mu == pytest.approx(-u, abs=0.1) and mv == pytest.approx(v, abs=0.1)


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_flow_against_rendered_truth(algorithm):
    """A disc moves over still ground: the truth is known at every pixel."""
    ground, disc = _texture(seed=2), _texture(seed=3)
    y, x = np.mgrid[:96, :128]

    def scene(right, down):
        mask = (x - 60 - right) ** 2 + (y - 48 - down) ** 2 < 24**2
        return np.where(mask, _moved(disc, right, down), ground).astype(np.uint8), mask

    (before, mask), (after, _) = scene(0, 0), scene(2, 1)
    flow = make_flow(algorithm)(before, after)
    truth = np.where(mask[..., None], (2.0, 1.0), (0.0, 0.0))
    error = np.linalg.norm(flow - truth, axis=-1)
    border = cv2.dilate(cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT,
                                         np.ones((3, 3))), np.ones((9, 9))) > 0  # fmt: skip
    assert error[~border].mean() < 0.25  # away from the edge of the disc
    assert error.mean() < 0.25 * np.linalg.norm(truth, axis=-1)[mask].mean()


@pytest.mark.parametrize("algorithm", FLOW_ALGORITHMS)
def test_the_same_bits_on_any_number_of_threads(algorithm):
    before = _texture(64, 64)
    after = _moved(before, 1.5, 0)
    threads = cv2.getNumThreads()
    try:
        fields = []
        for number in (1, 2, 4):
            cv2.setNumThreads(number)
            fields.append(make_flow(algorithm)(before, after))
            assert cv2.getNumThreads() == number  # left as it was
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(fields[0], fields[1])
    np.testing.assert_array_equal(fields[0], fields[2])


def test_nothing_moves_nothing():
    still = _texture()
    for algorithm in FLOW_ALGORITHMS:
        assert np.abs(make_flow(algorithm)(still, still)).max() < 0.05


def test_an_unknown_algorithm_lists_the_known_ones():
    with pytest.raises(ValueError, match="'brox'; choose one of: dis, tvl1, farneback"):
        make_flow("brox")


def test_grey_weighs_the_colours():
    frame = np.zeros((1, 3, 3), np.uint8)
    frame[0, range(3), range(3)] = 255  # red, green, blue
    assert to_grey(frame).tolist() == [[76, 150, 29]]


@pytest.mark.parametrize("bound", [20.0, 8.0, 4.0, 3.3])
def test_quantising_and_back_is_within_half_a_step(bound):
    flow = np.linspace(-bound, bound, 5001).astype(np.float32)
    stored = quantise(flow, bound)
    assert np.abs(dequantise(stored, bound) - flow).max() <= bound / 255 * 1.001
    assert (np.diff(stored.astype(int)) >= 0).all() and set(stored) == set(range(256))
    ends = quantise(np.array([-9 * bound, -bound, 0, bound, 9 * bound], np.float32), bound)
    assert ends.tolist() == [0, 0, ZERO_FLOW, 255, 255]


def test_resizing_scales_the_values_with_the_field():
    flow = np.zeros((10, 20, 2), np.float32)
    flow[..., 0], flow[..., 1] = 4.0, 3.0
    half = resize_flow(flow, (5, 5))
    np.testing.assert_allclose(half, np.broadcast_to((1.0, 1.5), (5, 5, 2)), rtol=1e-6)
    twice = resize_flow(flow, (20, 40))
    np.testing.assert_allclose(twice, np.broadcast_to((8.0, 6.0), (20, 40, 2)), rtol=1e-6)


def test_flow_of_a_smaller_picture_is_the_smaller_flow():
    before = _texture(128, 128)
    flow = make_flow("dis")(before, _moved(before, 4, 2))
    small = cv2.resize(before, (64, 64), interpolation=cv2.INTER_AREA)
    small_after = cv2.resize(_moved(before, 4, 2), (64, 64), interpolation=cv2.INTER_AREA)
    expected = make_flow("dis")(small, small_after)
    resized = resize_flow(flow, (64, 64))
    middle = (slice(12, -12), slice(12, -12))
    assert np.abs(np.median(resized[middle] - expected[middle], axis=(0, 1))).max() < 0.15


def test_colours_of_directions():
    def colour(u, v):
        return flow_to_colour(np.array([[[u, v]]], np.float32), 1.0)[0, 0].tolist()

    assert colour(0, 0) == [255, 255, 255]
    assert colour(1, 0) == [255, 0, 0]  # right is red
    red, green, blue = colour(0, 1)  # down is yellow
    assert min(red, green) > 180 > 60 > blue
    red, green, blue = colour(-1, 0)  # left is between cyan and blue
    assert blue > 200 > red
    assert sum(colour(0.5, 0)) > sum(colour(1, 0))  # slower is paler
    assert sum(colour(3, 0)) < sum(colour(1, 0))  # too fast is darker
