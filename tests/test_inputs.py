import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.flow import quantise
from stf_jax.inputs import Batch, InputSettings, flow_to_pixels, mirror_flow, network_input

SETTINGS = InputSettings(
    crop_size=16, rgb_preprocess="caffe", flow_scale=1.0, random_crop=False, flip=False
)


def _batch(size=16, count=1, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rgb=jnp.asarray(rng.integers(0, 256, (count, 3, size, size, 3), np.uint8)),
        flow=jnp.asarray(rng.integers(0, 256, (count, 3, size, size, 8), np.uint8)),
        label=jnp.zeros(count, jnp.int32),
        mask=jnp.ones(count, bool),
        entry=jnp.arange(count, dtype=jnp.int32),
        seed=jnp.asarray(rng.integers(0, 2**32, (count, 2), np.uint32)),
    )


def test_pure_red_lands_in_the_last_channel():
    red = np.zeros((1, 3, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    rgb, _ = network_input(_batch()._replace(rgb=jnp.asarray(red)), SETTINGS, train=False)
    np.testing.assert_allclose(rgb[0, 0, 0, 0], [-103.939, -116.779, 255 - 123.68], rtol=1e-6)


@pytest.mark.parametrize(("mode", "low", "high"), [("zero_one", 0, 1), ("minus1_1", -1, 1)])
def test_scaled_colours(mode, low, high):
    batch = _batch()
    rgb, _ = network_input(batch, dataclasses.replace(SETTINGS, rgb_preprocess=mode), train=False)
    expected = low + (high - low) * np.asarray(batch.rgb, np.float64) / 255
    np.testing.assert_allclose(rgb, expected, atol=1e-6)


def test_flow_is_centred_and_scaled():
    batch = _batch()._replace(flow=jnp.full((1, 3, 16, 16, 8), 192, jnp.uint8))
    _, flow = network_input(batch, dataclasses.replace(SETTINGS, flow_scale=0.25), train=False)
    np.testing.assert_array_equal(flow, 16.0)


def test_evaluation_crops_the_centre():
    batch = _batch(size=22)
    _, flow = network_input(batch, SETTINGS, train=False)
    np.testing.assert_array_equal(flow, np.asarray(batch.flow, float)[:, :, 3:19, 3:19] - 128)


def test_training_without_augmentation_equals_evaluation():
    batch = _batch(size=22)
    for a, b in zip(
        network_input(batch, SETTINGS, train=True),
        network_input(batch, SETTINGS, train=False),
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
    flow = np.stack([rows, columns] * 4, -1)[None, None].repeat(count, 0).repeat(3, 1)
    batch = batch._replace(rgb=jnp.asarray(rgb), flow=jnp.asarray(flow))
    settings = dataclasses.replace(SETTINGS, random_crop=True, rgb_preprocess="zero_one")
    colours, fields = network_input(batch, settings, train=True)
    np.testing.assert_allclose(colours[..., :2] * 255, fields[..., :2] + 128, atol=1e-3)
    corners = {tuple(corner) for corner in np.asarray(fields[:, 0, 0, 0, :2] + 128).astype(int)}
    assert corners == {(i, j) for i in range(room) for j in range(room)}


def test_flip_mirrors_both_and_negates_u_only():
    settings = dataclasses.replace(SETTINGS, flip=True, rgb_preprocess="zero_one")
    batch = _batch(count=64)
    rgb, flow = network_input(batch, settings, train=True)
    plain_rgb, plain_flow = network_input(batch, settings, train=False)
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
    settings = dataclasses.replace(SETTINGS, random_crop=True, flip=True)
    batch = _batch(size=22, count=6)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    shuffled = jax.tree.map(lambda x: x[order], batch)
    for a, b in zip(
        network_input(batch, settings, train=True),
        network_input(shuffled, settings, train=True),
        strict=True,
    ):
        np.testing.assert_array_equal(a[order], b)


def test_a_crop_larger_than_the_records_is_refused():
    with pytest.raises(ValueError, match="crop_size is 32"):
        network_input(_batch(), dataclasses.replace(SETTINGS, crop_size=32), train=False)


def test_unknown_preprocessing_is_named():
    with pytest.raises(ValueError, match="cafe"):
        dataclasses.replace(SETTINGS, rgb_preprocess="cafe")
