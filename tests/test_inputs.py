import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ucf101
from experiments.bench.flow import render
from stf_jax import tvl1
from stf_jax.augment import AugmentSettings, mirror_flow
from stf_jax.flow import TvL1Settings, dequantise, flow_to_colour, quantise, to_grey
from stf_jax.inputs import (
    STILL_FLOW,
    Batch,
    InputSettings,
    _flow_of_pairs,
    compute_flow,
    flow_to_pixels,
    network_input,
    read_flow,
)
from stf_jax.prepare import RecordSettings
from stf_jax.run import Settings

SETTINGS = InputSettings(
    crop_size=16, rgb_preprocess="caffe", rgb_mean="none", flow_channels="uv",
    flow_mean="const128", flow_scale=1.0,
)  # fmt: skip
PLAIN = AugmentSettings(
    crop="centre", scales=(), area=(0.08, 1.0), aspect=(0.75, 4 / 3), flip=False, brightness=0.0,
    contrast=0.0, saturation=0.0, hue=0.0, mixup=0.0, label_smoothing=0.0,
)  # fmt: skip
FLIP = dataclasses.replace(PLAIN, flip=True)


def _batch(size=16, count=1, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rgb=jnp.asarray(rng.integers(0, 256, (count, 3, size, size, 3), np.uint8)),
        flow=jnp.asarray(rng.integers(0, 256, (count, 3, 8, size, size), np.uint8)),
        label=jnp.zeros(count, jnp.int32),
        mask=jnp.ones(count, bool),
        entry=jnp.arange(count, dtype=jnp.int32),
        seed=jnp.asarray(rng.integers(0, 2**32, (count, 2), np.uint32)),
    )


def _channels_last(flow):
    return np.moveaxis(np.asarray(flow), 2, -1)


def test_pure_red_lands_in_the_last_channel():
    red = np.zeros((1, 3, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    rgb, _ = network_input(_batch()._replace(rgb=jnp.asarray(red)), SETTINGS, augment=None)
    np.testing.assert_allclose(rgb[0, 0, 0, 0], [-103.939, -116.779, 255 - 123.68], rtol=1e-6)


@pytest.mark.parametrize(("mode", "low", "high"), [("zero_one", 0, 1), ("minus1_1", -1, 1)])
def test_scaled_colours(mode, low, high):
    batch = _batch()
    rgb, _ = network_input(batch, dataclasses.replace(SETTINGS, rgb_preprocess=mode), augment=None)
    expected = low + (high - low) * np.asarray(batch.rgb, np.float64) / 255
    np.testing.assert_allclose(rgb, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["caffe", "zero_one", "minus1_1"])
def test_the_mean_frame_of_each_clip_is_taken_away(mode):
    """What stands still is nothing, in whatever colour; what moves is the same on any ground."""
    rgb = np.full((2, 3, 16, 16, 3), 70, np.uint8)
    rgb[1] = 200
    for frame in range(3):
        rgb[:, frame, 2, frame] += 30  # a speck that walks
    settings = dataclasses.replace(SETTINGS, rgb_preprocess=mode, rgb_mean="clip")
    batch = _batch()._replace(rgb=jnp.asarray(rgb), flow=jnp.zeros((2, 3, 8, 16, 16), jnp.uint8))
    got, _ = network_input(batch, settings, augment=None)
    scale = {"caffe": 1.0, "zero_one": 1 / 255, "minus1_1": 1 / 127.5}[mode]
    expected = np.zeros((2, 3, 16, 16, 3))
    expected[:, :, 2, :3] = -10
    for frame in range(3):
        expected[:, frame, 2, frame] = 20
    np.testing.assert_allclose(got, expected * scale, atol=1e-4 * scale)


def test_flow_is_centred_and_scaled():
    batch = _batch()._replace(flow=jnp.full((1, 3, 8, 16, 16), 192, jnp.uint8))
    _, flow = network_input(batch, dataclasses.replace(SETTINGS, flow_scale=0.25), augment=None)
    np.testing.assert_array_equal(flow, 16.0)


def test_evaluation_crops_the_centre():
    batch = _batch(size=22)
    _, flow = network_input(batch, SETTINGS, augment=None)
    np.testing.assert_array_equal(
        flow, _channels_last(batch.flow).astype(float)[:, :, 3:19, 3:19] - 128
    )


def test_training_without_augmentation_equals_evaluation():
    batch = _batch(size=22)
    for a, b in zip(
        network_input(batch, SETTINGS, PLAIN),
        network_input(batch, SETTINGS, augment=None),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_random_crop_takes_the_same_window_of_both_streams_and_every_window():
    # Position is written into the pixels: rgb holds the row and column, so does flow.
    size, room = 19, 4
    rows, columns = np.mgrid[:size, :size].astype(np.uint8)
    count = 200
    batch = _batch(size=size, count=count)
    rgb = np.stack([rows, columns, rows], -1)[None, None].repeat(count, 0).repeat(3, 1)
    flow = np.stack([rows, columns] * 4)[None, None].repeat(count, 0).repeat(3, 1)
    batch = batch._replace(rgb=jnp.asarray(rgb), flow=jnp.asarray(flow))
    settings = dataclasses.replace(SETTINGS, rgb_preprocess="zero_one")
    colours, fields = network_input(batch, settings, dataclasses.replace(PLAIN, crop="random"))
    np.testing.assert_allclose(colours[..., :2] * 255, fields[..., :2] + 128, atol=1e-3)
    corners = {tuple(corner) for corner in np.asarray(fields[:, 0, 0, 0, :2] + 128).astype(int)}
    assert corners == {(i, j) for i in range(room) for j in range(room)}


def test_flip_mirrors_both_and_negates_u_only():
    settings = dataclasses.replace(SETTINGS, rgb_preprocess="zero_one")
    batch = _batch(count=64)
    rgb, flow = network_input(batch, settings, FLIP)
    plain_rgb, plain_flow = network_input(batch, settings, augment=None)
    flipped = 0
    for i in range(64):
        if np.array_equal(rgb[i], plain_rgb[i]):
            np.testing.assert_array_equal(flow[i], plain_flow[i])
            continue
        flipped += 1
        np.testing.assert_array_equal(rgb[i], plain_rgb[i][:, :, ::-1])
        mirrored = np.asarray(plain_flow[i])[:, :, ::-1]
        np.testing.assert_array_equal(flow[i][..., 1::2], mirrored[..., 1::2])
        np.testing.assert_array_equal(flow[i][..., 0::2], -1 - mirrored[..., 0::2])
    assert 16 < flipped < 48  # a fair coin, 4 standard deviations


def test_mirrored_flow_is_the_flow_of_the_mirrored_motion():
    field = np.random.default_rng(1).uniform(-19, 19, (1, 4, 6, 2)).astype(np.float32)
    mirrored = field[:, :, ::-1] * np.array([-1, 1], np.float32)
    back = flow_to_pixels(mirror_flow(jnp.asarray(quantise(field, 20.0))), 20.0)
    np.testing.assert_allclose(back, mirrored, atol=20 / 255 + 1e-4)


def test_augmentation_depends_on_the_sample_not_on_its_place():
    settings = dataclasses.replace(FLIP, crop="random")
    batch = _batch(size=22, count=6)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    shuffled = jax.tree.map(lambda x: x[order], batch)
    for a, b in zip(
        network_input(batch, SETTINGS, settings),
        network_input(shuffled, SETTINGS, settings),
        strict=True,
    ):
        np.testing.assert_array_equal(a[order], b)


def test_a_crop_larger_than_the_records_is_refused():
    with pytest.raises(ValueError, match="crop_size is 32"):
        network_input(_batch(), dataclasses.replace(SETTINGS, crop_size=32), augment=None)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("crop_size", 15, "at least 16"),
        ("rgb_mean", "video", "'none', 'clip'"),
        ("rgb_preprocess", "cafe", "'caffe', 'zero_one', 'minus1_1'"),
        ("flow_channels", "vu", "'uv', 'uv_half', 'mag', 'gray', 'u'"),
        ("flow_mean", 128, "'const128', 'per_field', 'none'"),
    ],
)
def test_impossible_inputs_are_named(annotations_off, key, value, allowed):
    with pytest.raises(ValueError, match=rf"inputs\.{key}\b.*{allowed}"):
        dataclasses.replace(SETTINGS, **{key: value})


# --- readings of the flow stack (SPEC 2.3) and its mean (SPEC 2.10) ---------------------------


def _read(field_values, reading):
    """The channels of one pixel whose L fields are (u, v) bytes."""
    stack = np.array(field_values, np.uint8).reshape(1, 1, 1, 1, -1)
    return np.asarray(read_flow(jnp.asarray(stack), reading)).ravel()


def test_each_reading_by_hand():
    fields = [(0, 128), (129, 140), (130, 150), (128, 255)]
    assert _read(fields, "uv").tolist() == [0, 128, 129, 140, 130, 150, 128, 255]
    assert _read(fields, "uv_half").tolist() == [129, 140, 130, 150]
    assert _read(fields, "u").tolist() == [0, 129, 130, 128]
    # From 128 up and from 127 down, the bound is 127 steps away.
    steps = np.array([127, np.hypot(1, 12), np.hypot(2, 22), 127])
    np.testing.assert_allclose(_read(fields, "mag"), steps * 255 / 127, rtol=1e-6)
    np.testing.assert_allclose(_read([(255, 255), (0, 0)], "mag"), 255)  # beyond the bound
    # Right is red, straight up and down between hues, left light blue; half speed is paler.
    assert _read([(255, 128)], "gray") == pytest.approx(0.299 * 255, abs=1e-3)
    half = 255 * (1 - 63 / 127 * (1 - 0.299))
    assert _read([(191, 127)], "gray") == pytest.approx(half, abs=1e-3)


def test_gray_is_the_grey_of_the_colour_picture():
    rng = np.random.default_rng(3)
    flow = rng.integers(0, 256, (1, 1, 40, 40, 8), np.uint8)
    grey = np.asarray(read_flow(jnp.asarray(flow), "gray"))
    for k in range(4):
        # The picture is drawn from px: zero lies between 127 and 128, half a step from both.
        field = dequantise(flow[0, 0, ..., 2 * k : 2 * k + 2], 127.5).astype(np.float32)
        field -= np.sign(field) / 2
        picture = to_grey(flow_to_colour(field, max_magnitude=127.0))
        assert np.abs(grey[0, 0, ..., k] - picture).max() < 1.6  # both roundings of the picture
    assert grey.std() > 20


@pytest.mark.parametrize("reading", STILL_FLOW)
@pytest.mark.parametrize("mean", ["const128", "per_field"])
def test_a_still_video_is_zero(reading, mean):
    settings = dataclasses.replace(SETTINGS, flow_channels=reading, flow_mean=mean)
    batch = _batch()._replace(flow=jnp.full((1, 3, 8, 16, 16), 128, jnp.uint8))
    _, flow = network_input(batch, settings, augment=None)
    np.testing.assert_array_equal(flow, 0)


def _negated(flow, reading):
    """Mirrors network flow of a reading: left and right swapped, u negated about 127.5."""
    flow = np.array(flow)[:, :, ::-1]
    if reading == "u":
        return -1 - flow
    if reading in ("uv", "uv_half"):
        flow[..., 0::2] = -1 - flow[..., 0::2]
    return flow  # a speed is the same both ways


@pytest.mark.parametrize("reading", STILL_FLOW)
def test_a_flipped_clip_moves_the_other_way(reading):
    """Flipped means mirrored before it is read: the colour of -u, not a mirrored colour."""
    settings = dataclasses.replace(SETTINGS, flow_channels=reading)
    batch = _batch(count=12)
    plain = np.asarray(network_input(batch, settings, augment=None)[1])
    trained = network_input(batch, settings, FLIP)[1]
    back = jnp.stack([mirror_flow(jnp.asarray(clip)) for clip in _channels_last(batch.flow)])
    back = jnp.moveaxis(back, -1, 2)
    opposite = np.asarray(network_input(batch._replace(flow=back), settings, augment=None)[1])
    flipped = [not np.array_equal(a, b) for a, b in zip(trained, plain, strict=True)]
    assert 0 < sum(flipped) < 12
    for i in range(12):
        np.testing.assert_array_equal(trained[i], (opposite if flipped[i] else plain)[i])
        if reading != "gray":
            np.testing.assert_allclose(opposite[i], _negated(plain[i], reading), atol=1e-4)
    if reading == "gray":  # the opposite direction has another hue
        assert np.abs(opposite - plain[:, :, :, ::-1]).max() > 50


@pytest.mark.parametrize("reading", ["mag", "gray"])
def test_a_still_clip_stays_still_when_flipped(reading):
    settings = dataclasses.replace(SETTINGS, flow_channels=reading)
    still = jnp.full((12, 3, 8, 16, 16), 128, jnp.uint8)
    _, flow = network_input(_batch(count=12)._replace(flow=still), settings, FLIP)
    np.testing.assert_array_equal(flow, 0)


def test_means_of_the_flow():
    batch = _batch(size=20)
    bytes_ = _channels_last(batch.flow).astype(np.float64)[:, :, 2:18, 2:18]
    per_field = dataclasses.replace(SETTINGS, flow_mean="per_field", flow_scale=0.5)
    expected = (bytes_ - bytes_.mean(axis=(2, 3), keepdims=True)) / 2
    np.testing.assert_allclose(
        network_input(batch, per_field, augment=None)[1], expected, atol=1e-4
    )
    none = dataclasses.replace(SETTINGS, flow_mean="none")
    np.testing.assert_array_equal(network_input(batch, none, augment=None)[1], bytes_)


@pytest.mark.parametrize("reading", STILL_FLOW)
def test_channels_say_what_the_network_gets(reading):
    config = ucf101.get_config("laptop")
    config.inputs.flow_channels = reading
    settings = Settings.of(config)
    rgb_shape, flow_shape = settings.clip_shapes(1)
    batch = _batch(size=64)
    rgb, flow = network_input(batch, settings.inputs, augment=None)
    assert rgb.shape[2:] == rgb_shape[2:] and flow.shape[2:] == flow_shape[2:]
    assert flow.shape[-1] == (8 if reading == "uv" else 4)  # L = 4
    # The first layer of the network is that wide: 8 filters of 3 x 3.
    kernels = jax.tree.leaves(settings.abstract_params(5))
    assert (3, 3, flow.shape[-1], 8) in [leaf.shape for leaf in kernels]


def test_half_of_a_stack_must_lie_in_its_middle():
    config = ucf101.get_config("laptop")
    config.inputs.flow_channels, config.sampling.flow_frames = "uv_half", 6
    with pytest.raises(ValueError, match="uv_half.*flow_frames must be divisible by 4, got 6"):
        Settings.of(config)


def test_flow_computed_on_the_device_is_quantised_as_stored_flow():
    stored = _online_settings()
    rendered = [
        render(kind, 1.5, (32, 32), seed=k)[:2]
        for k, kind in enumerate(("translation", "zoom", "rotation", "occlusion"))
    ]
    # Two clips of one frame each, with two fields each.
    pairs = np.stack([np.stack(pair) for pair in rendered]).reshape(2, 1, 4, 32, 32)
    batch = _batch(count=2)._replace(flow=jnp.asarray(pairs))
    flow = np.asarray(compute_flow(batch, stored).flow)
    assert flow.shape == (2, 1, 4, 32, 32) and flow.dtype == np.uint8
    first, second = (np.stack(frames) for frames in zip(*rendered, strict=True))
    fields = quantise(tvl1.flow_on_cpu(first, second, stored.tvl1), stored.flow_bound)
    expected = fields.transpose(0, 3, 1, 2).reshape(2, 4, 32, 32)
    # One level: a sum in another order may fall on the other side of a half.
    assert np.abs(flow[:, 0].astype(int) - expected.astype(int)).max() <= 1
    assert np.abs(expected.astype(int) - 128).mean() > 10


@pytest.mark.parametrize("change", [{"flow_source": "stored"}, {"flow_algorithm": "dis"}])
def test_fields_that_are_there_are_left_alone(change):
    batch = _batch()
    assert compute_flow(batch, dataclasses.replace(_online_settings(), **change)) is batch


def test_a_gpu_can_compute_flow_online():
    shape = jax.ShapeDtypeStruct((2, 4, 8, 32, 32), jnp.uint8)
    stored = _online_settings()
    exported = jax.export.export(_flow_of_pairs, platforms=["cuda"])(
        shape, settings=stored.tvl1, bound=stored.flow_bound
    )
    assert exported.platforms == ("cuda",) and exported.out_avals[0].shape == shape.shape


def _online_settings():
    card = ucf101.get_config("laptop").records
    # One size of the pyramid: compiled in a moment.
    tvl1_settings = TvL1Settings(**{**card.tvl1, "coarsest": 32})
    return RecordSettings(
        **{**card, "size": 32, "flow_size": 32, "flow_source": "online", "flow_algorithm": "tvl1",
           "tvl1": tvl1_settings},
    )  # fmt: skip
