import colorsys
import dataclasses
import itertools
from collections import Counter

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import ucf101
from stf_jax.augment import AugmentSettings, augment_clip, mix, mixup_shares, next_row
from stf_jax.flow import make_flow, quantise, to_grey
from stf_jax.inputs import Batch, InputSettings, network_input
from stf_jax.run import Settings

PLAIN = AugmentSettings(
    crop="centre", scales=(), area=(0.08, 1.0), aspect=(0.75, 4 / 3), flip=False, brightness=0.0,
    contrast=0.0, saturation=0.0, hue=0.0, mixup=0.0, label_smoothing=0.0,
)  # fmt: skip
INPUTS = InputSettings(
    crop_size=24,
    rgb_preprocess="zero_one",
    rgb_mean="none",
    flow_channels="uv",
    flow_mean="none",
    flow_scale=1.0,
)
LITERATURE = (1.0, 0.875, 0.75, 0.66)


def _seeds(count):
    return np.random.default_rng(7).integers(0, 2**32, (count, 2), np.uint32)


def _augmented(rgb, flow, settings, count, size=24):
    """The same clip, augmented from `count` seeds: float64 rgb and flow, `n t s s c`."""

    def one(seed):
        return augment_clip(jnp.asarray(rgb), jnp.asarray(flow), seed, settings, size)

    return tuple(np.asarray(x, np.float64) for x in jax.jit(jax.vmap(one))(_seeds(count)))


def _positions(side):
    """A clip that tells where its pixels come from: red and u the row, green and v the column."""
    rows, columns = np.mgrid[:side, :side].astype(np.uint8) * 4
    rgb = np.stack([rows, columns, rows], -1)[None].repeat(2, 0)
    return rgb, np.stack([rows, columns] * 2, -1)[None].repeat(2, 0)


def _window(rgb):
    """Top, left, height and width of the window that a `_positions` clip shows, px."""
    middle = rgb[0, 4:-4, 4:-4, :2] / 4  # away from where the frame's edge is repeated
    steps = middle[-1, 0, 0] - middle[0, 0, 0], middle[0, -1, 1] - middle[0, 0, 1]
    height, width = (len(rgb[0]) * step / (len(middle) - 1) for step in steps)
    centre = middle.mean(axis=(0, 1)) + 0.5
    return np.array([centre[0] - height / 2, centre[1] - width / 2, height, width])


# --- windows ----------------------------------------------------------------------------------


def test_corners_are_the_four_and_the_centre_equally_often():
    rgb, flow = _positions(33)
    colours, fields = _augmented(rgb, flow, dataclasses.replace(PLAIN, crop="corners"), 400)
    np.testing.assert_array_equal(colours[..., :2], fields[..., :2])
    found = Counter((c[0, 0, 0, :2] / 4).astype(int).tobytes() for c in colours)
    places = {np.array(p).tobytes() for p in [(0, 0), (0, 9), (9, 0), (9, 9), (4, 4)]}
    assert found.keys() == places
    # Chi-square with 4 degrees of freedom: 18.5 is the 0.1 % point.
    assert sum((n - 80) ** 2 / 80 for n in found.values()) < 18.5


def test_scaled_windows_have_neighbouring_sides_and_lie_in_corners():
    side = 40
    settings = dataclasses.replace(PLAIN, crop="corners", scales=LITERATURE)
    rgb, flow = _positions(side)
    colours, _ = _augmented(rgb, flow, settings, 300)
    sides = [40, 35, 30, 26]  # of 40, rounded
    windows = [_window(clip) for clip in colours]
    pairs = Counter()
    for top, left, height, width in windows:
        near = [min(sides, key=lambda s: abs(s - x)) for x in (height, width)]
        assert max(abs(near[0] - height), abs(near[1] - width)) < 0.1
        pairs[tuple(near)] += 1
        room = np.array([side - near[0], side - near[1]])
        places = [(0, 0), (0, room[1]), (room[0], 0), room, room // 2]
        assert min(np.abs(np.array(p) - (top, left)).max() for p in places) < 0.1
    allowed = {(a, b) for a, b in itertools.product(sides, sides)
               if abs(sides.index(a) - sides.index(b)) <= 1}  # fmt: skip
    assert pairs.keys() == allowed and min(pairs.values()) > 10  # 30 expected of each of 10


def test_resized_windows_have_the_areas_and_shapes_asked_for():
    side = 60
    settings = dataclasses.replace(PLAIN, crop="resized", area=(0.2, 0.5), aspect=(0.5, 2.0))
    rgb, flow = _positions(side)
    colours, _ = _augmented(rgb, flow, settings, 200)
    top, left, height, width = np.array([_window(clip) for clip in colours]).T
    areas, aspects = height * width / side**2, width / height
    assert 0.19 < areas.min() < 0.23 and 0.46 < areas.max() < 0.51
    assert 0.49 < aspects.min() < 0.56 and 1.8 < aspects.max() < 2.1
    assert 0.4 < (aspects > 1).mean() < 0.6  # as often wide as tall
    assert min(top.min(), left.min()) > -0.2
    assert max((top + height).max(), (left + width).max()) < side + 0.2
    assert len({(round(t), round(w)) for t, w in zip(top, width, strict=True)}) > 100


def test_rescaling_is_that_of_an_image_library():
    """Against Pillow's bilinear resize of the same window, smaller and larger."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), (48, 48))
    flow = np.full((1, 48, 48, 4), 128, np.uint8)
    for scale in (1.0, 0.375):  # 48 px and 18 px to 24 px
        settings = dataclasses.replace(PLAIN, scales=(scale,))
        (got,), _ = _augmented(smooth[None], flow, settings, 1)
        cut = round(48 * scale)
        box = ((48 - cut) // 2,) * 2 + ((48 + cut) // 2,) * 2
        want = Image.fromarray(smooth).resize((24, 24), Image.Resampling.BILINEAR, box=box)
        # Pillow rounds twice, and at its edge it does not look beyond the window.
        assert np.abs(got[0] - np.asarray(want, float))[2:-2, 2:-2].max() < 1.5


def test_a_scale_of_one_changes_nothing():
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    flow = rng.integers(0, 256, (2, 24, 24, 8)).astype(np.uint8)
    for settings in (PLAIN, dataclasses.replace(PLAIN, crop="corners", scales=(1.0,))):
        colours, fields = _augmented(rgb, flow, settings, 2)
        for got, stored in ((colours, rgb), (fields, flow)):
            np.testing.assert_array_equal(got, np.stack([stored] * 2))


# --- flow stays the motion of what is seen ----------------------------------------------------


def test_augmented_flow_is_the_flow_of_the_augmented_motion():
    """A texture that moves by (3, -2) px: what an algorithm sees in the cut, flipped, rescaled
    frames is what the cut, flipped, rescaled field says."""
    side, size, bound = 96, 64, 10.0
    noise = np.random.default_rng(0).integers(0, 256, (24, 24)).astype(np.float32)
    ground = cv2.resize(noise, (192, 192), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    views = [ground[40 + 2 * k :, 40 - 3 * k :][:side, :side] for k in range(2)]
    rgb = np.stack([np.stack([v] * 3, -1) for v in views]).astype(np.uint8)
    field = np.broadcast_to(np.array([3.0, -2.0], np.float32), (1, side, side, 2))
    flow = quantise(field.copy(), bound).repeat(2, 0)
    settings = dataclasses.replace(PLAIN, crop="random", scales=(1.0, 0.75, 0.5), flip=True)
    colours, fields = _augmented(rgb, flow, settings, 12, size)
    compute = make_flow("farneback")
    signs, speeds = Counter(), set()
    for clip, told in zip(colours, fields, strict=True):
        first, second = (to_grey(np.clip(f, 0, 255).astype(np.uint8)) for f in clip)
        seen = np.median(compute(first, second)[12:-12, 12:-12], axis=(0, 1))
        said = (told[0, 12:-12, 12:-12, :2].mean(axis=(0, 1)) - 128) * 2 * bound / 255
        np.testing.assert_allclose(seen, said, atol=0.25)
        signs[said[0] > 0] += 1
        speeds.add(round(abs(said[1]), 1))
    assert len(signs) == 2 and len(speeds) == 3  # both ways, at every scale


def test_scaled_flow_is_scaled_held_to_the_bound_and_still_where_it_was_still():
    values = np.array([128, 138, 100, 250, 4], np.uint8)  # still, slow, slow, fast, fast
    flow = np.zeros((1, 40, 40, 10), np.uint8)
    flow[..., 0::2], flow[..., 1::2] = values, values
    rgb = np.zeros((1, 40, 40, 3), np.uint8)
    settings = dataclasses.replace(PLAIN, scales=(0.5,))  # 20 px to 30: times 1.5
    _, ((fields,),) = _augmented(rgb, flow, settings, 1, 30)
    expected = [128, 143, 86, 255, 0]
    np.testing.assert_allclose(fields[..., 0::2], np.tile(expected, (30, 30, 1)), atol=1e-3)
    np.testing.assert_allclose(fields[..., 1::2], np.tile(expected, (30, 30, 1)), atol=1e-3)


def test_u_goes_with_the_width_and_v_with_the_height():
    flow = np.full((1, 60, 60, 4), 138, np.uint8)
    rgb = np.zeros((1, 60, 60, 3), np.uint8)
    settings = dataclasses.replace(PLAIN, crop="resized", area=(0.5, 0.5), aspect=(2.0, 2.0))
    _, fields = _augmented(rgb, flow, settings, 1)  # 30 px high, 60 wide, to 24
    u, v = fields[0, 0, 5, 5, :2] - 128
    assert (u, v) == pytest.approx((10 * 24 / 60, 10 * 24 / 30), abs=1e-3)


# --- colours ----------------------------------------------------------------------------------


def _coloured(**amount):
    rng = np.random.default_rng(2)
    rgb = rng.integers(40, 200, (3, 24, 24, 3)).astype(np.uint8)
    rgb[1:] = rgb[0]  # three equal frames
    flow = rng.integers(0, 256, (3, 24, 24, 4)).astype(np.uint8)
    colours, fields = _augmented(rgb, flow, dataclasses.replace(PLAIN, **amount), 30)
    np.testing.assert_array_equal(fields, np.stack([flow] * 30))  # light is not motion
    np.testing.assert_array_equal(colours[:, 1:], colours[:, :-1])  # the same for all frames
    assert colours.min() >= 0 and colours.max() <= 255
    assert len({clip.tobytes() for clip in colours}) == 30
    return rgb[0].astype(float), colours[:, 0]


def test_brightness_shifts():
    plain, colours = _coloured(brightness=0.1)
    shifts = (colours - plain).reshape(30, -1)
    assert np.ptp(shifts, axis=1).max() < 1e-3
    assert -25.5 <= shifts.min() < -15 and 15 < shifts.max() <= 25.5


def test_contrast_stretches_about_the_mean():
    plain, colours = _coloured(contrast=0.2)
    mean = plain.mean(axis=(0, 1))
    factors = [((clip - mean) / (plain - mean))[np.abs(plain - mean) > 5] for clip in colours]
    assert max(np.ptp(f) for f in factors) < 1e-3
    assert 0.8 <= min(f.min() for f in factors) < 0.9 and 1.1 < max(f.max() for f in factors) <= 1.2


def _hsv(picture):
    return np.array([colorsys.rgb_to_hsv(*p) for p in picture.reshape(-1, 3) / 255])


def test_hue_turns_and_keeps_the_rest():
    plain, colours = _coloured(hue=0.1)
    before, turns = _hsv(plain), []
    for clip in colours[:5]:
        after = _hsv(clip)
        np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=1e-3)
        turn = (after[:, 0] - before[:, 0] + 0.5) % 1 - 0.5
        assert np.ptp(turn[before[:, 1] > 0.1]) < 1e-3
        turns.append(np.median(turn))
    assert -0.1 <= min(turns) < 0 < max(turns) <= 0.1


def test_saturation_is_multiplied():
    plain, colours = _coloured(saturation=0.3)
    before, factors = _hsv(plain), []
    for clip in colours[:5]:
        after = _hsv(clip)
        np.testing.assert_allclose(after[:, 2], before[:, 2], atol=1e-3)
        inside = (before[:, 1] > 0.1) & (before[:, 1] < 0.7)
        factor = after[inside, 1] / before[inside, 1]
        assert np.ptp(factor) < 1e-2
        factors.append(np.median(factor))
    assert 0.7 <= min(factors) < 1 < max(factors) <= 1.3


# --- mixtures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "mean"), [(1.0, 0.75), (2.0, 0.6875)])
def test_shares_have_the_mean_of_their_distribution(alpha, mean):
    """The larger part of Beta(1, 1) is 3/4 on average, that of Beta(2, 2) 11/16."""
    share = np.asarray(mixup_shares(jnp.asarray(_seeds(2000)), jnp.ones(2000, bool), alpha))
    assert share.min() >= 0.5 and share.max() <= 1
    assert share.mean() == pytest.approx(mean, abs=4 * share.std() / np.sqrt(2000))


def test_a_share_is_the_samples_own():
    seeds = jnp.asarray(_seeds(6))
    mask = jnp.ones(6, bool)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    share = mixup_shares(seeds, mask, 0.4)
    np.testing.assert_array_equal(mixup_shares(seeds[order], mask, 0.4), share[order])


def test_mixtures_by_hand_and_rows_that_only_fill_up_do_not_mix():
    rows = jnp.array([[10.0], [20.0], [40.0], [99.0]])
    mixed = mix(rows, jnp.array([0.5, 0.75, 1.0, 1.0]))
    assert mixed.ravel().tolist() == [15.0, 25.0, 40.0, 99.0]
    assert next_row(jnp.array([4, 5, 6])).tolist() == [5, 6, 4]
    mask = jnp.array([True, True, True, False])
    share = np.asarray(mixup_shares(jnp.asarray(_seeds(4)), mask, 1.0))
    assert (share[:2] < 1).all() and share[2:].tolist() == [1, 1]


# --- settings ---------------------------------------------------------------------------------


def test_off_is_bit_for_bit_no_augmentation():
    """Every card's defaults: a training batch is what the evaluation would make of it."""
    rng = np.random.default_rng(3)
    batch = Batch(
        rgb=jnp.asarray(rng.integers(0, 256, (2, 2, 30, 30, 3), np.uint8)),
        flow=jnp.asarray(rng.integers(0, 256, (2, 2, 8, 30, 30), np.uint8)),
        label=jnp.zeros(2, jnp.int32),
        mask=jnp.ones(2, bool),
        entry=jnp.arange(2, dtype=jnp.int32),
        seed=jnp.asarray(_seeds(2)),
    )
    off = Settings.of(ucf101.get_config()).augment
    assert off == PLAIN and not off.moves and not off.rescales
    for trained, scored in zip(
        network_input(batch, INPUTS, off), network_input(batch, INPUTS, None), strict=True
    ):
        np.testing.assert_array_equal(trained, scored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "center"}, r"augment\.crop.*'centre', 'random', 'corners', 'resized'"),
        ({"scales": (1.0, 1.5)}, r"augment\.scales must lie in \(0, 1\].*1\.5"),
        ({"scales": (1.0,), "crop": "resized"}, "leave one of the two out"),
        (
            {"area": (0.5, 0.1)},
            r"augment\.area must be 0 < low <= high <= 1\.0, got \(0\.5, 0\.1\)",
        ),
        ({"aspect": (0.0, 1.0)}, r"augment\.aspect must be 0 < low"),
        ({"hue": 0.6}, r"augment\.hue must be in \[0, 0\.5\], got 0\.6"),
        ({"contrast": -0.1}, r"augment\.contrast must be in \[0, 1\], got -0\.1"),
        ({"mixup": -1.0}, r"augment\.mixup must not be negative, got -1\.0"),
    ],
)
def test_impossible_augmentation_is_named(annotations_off, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_mixtures_need_two_clips():
    config = ucf101.get_config()
    config.batch_size, config.augment.mixup = 1, 0.2
    with pytest.raises(ValueError, match=r"augment\.mixup=0\.2 .*batch_size must be at least 2"):
        Settings.of(config)
