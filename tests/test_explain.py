"""Explanations against what they claim: heat where the evidence is, gains by doing without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.explain import draw, explain
from stf_jax.fusion import segment_vectors
from stf_jax.inputs import Batch, InputSettings, network_input
from stf_jax.model import build_model

INPUTS = InputSettings(32, "minus1_1", "none", "uv", "const128", 1 / 32)


def _batch(seed=0):
    chance = np.random.default_rng(seed)
    return Batch(
        rgb=chance.integers(0, 256, (1, 8, 36, 36, 3), np.uint8),
        flow=chance.integers(100, 156, (1, 8, 8, 36, 36), np.uint8),
        label=np.zeros(1, np.int32),
        mask=np.ones(1, bool),
        entry=np.zeros(1, np.int32),
        seed=np.zeros((1, 2), np.uint32),
    )


def _inputs(batch):
    return network_input(jax.tree.map(jnp.asarray, batch), INPUTS, augment=None)


def _network(config, streams):
    network = build_model({**config, "streams": streams}, num_classes=3)
    rgb, flow = _inputs(_batch())
    init = jax.jit(lambda key: network.init(key, rgb, flow, train=False)["params"])
    return network, init(jax.random.key(0))


@pytest.fixture(scope="module")
def found(tiny_model_settings, tiny_records):
    """A fused network, its clip and the explanation of class 1."""
    network, params = _network(tiny_model_settings, "both")
    batch, stored = _batch(), tiny_records[1].settings
    ((name, explained),) = explain(network, params, batch, INPUTS, stored, label=1).items()
    assert name == "fused"
    return network, params, batch, stored, explained


def _logits(network, params, maps):
    fused = network.fusion.apply({"params": params["fusion"]}, *maps)
    pyramid = segment_vectors(fused, network.tpn)
    states = network.recurrent.apply({"params": params["recurrent"]}, pyramid)
    return network.head.apply({"params": params["head"]}, states)[0][0]


def test_probabilities_are_the_networks_and_heat_is_grad_cam(found):
    """The heat at the maps' own size, from central differences instead of the gradient."""
    network, params, batch, _, explained = found
    inputs = _inputs(batch)
    logits, features = network.apply({"params": params}, *inputs, train=False)
    np.testing.assert_allclose(explained.probabilities, jax.nn.softmax(logits[0]), rtol=1e-5)
    maps = [features["rgb_map"], features["flow_map"]]

    @jax.jit
    def weights_of(rgb, flow):
        def weight(channel):
            # Raising a whole channel by e moves the score by e times the sum of its gradient.
            up, down = (
                _logits(network, params, [rgb.at[..., channel].add(e), flow])[1]
                for e in (1e-2, -1e-2)
            )
            return (up - down) / 2e-2 / rgb[..., 0].size

        return jax.lax.map(weight, jnp.arange(rgb.shape[-1]))

    weights = np.asarray(weights_of(*maps))
    heat = np.maximum((np.asarray(maps[0])[0] * weights).sum(-1), 0)
    expected = jax.image.resize(jnp.asarray(heat, jnp.float32), (len(heat), 32, 32), "linear")
    expected = np.asarray(expected / expected.max())
    np.testing.assert_allclose(explained.heat["rgb"], expected, atol=0.03)
    assert explained.heat["rgb"].shape == explained.heat["flow"].shape == (8, 32, 32)
    assert explained.heat["flow"].max() <= 1 and explained.heat["flow"].min() >= 0


def test_gains_are_what_is_lost_by_doing_without(found):
    network, params, batch, _, explained = found
    inputs = _inputs(batch)
    logits, features = network.apply({"params": params}, *inputs, train=False)
    maps = [features["rgb_map"], features["flow_map"]]
    without_flow = _logits(network, params, [maps[0], jnp.zeros_like(maps[1])])
    lost = float(logits[0, 1] - without_flow[1])
    assert explained.stream_gain["flow"] == pytest.approx(lost, abs=1e-5) and lost
    # Level 2 of step 2: bins 1 and 2 of seven.
    pyramid = np.array(features["pyramid"])
    vectors = pyramid.reshape(pyramid.shape[1], 7, -1)
    vectors[1, 1:3] = 0
    states = network.recurrent.apply({"params": params["recurrent"]}, jnp.asarray(pyramid))
    left = network.head.apply({"params": params["head"]}, states)[0][0, 1]
    assert explained.part_gain[1, 1] == pytest.approx(float(logits[0, 1] - left), abs=1e-5)
    assert explained.part_gain.shape == (2, 3) and explained.level_gain.shape == (3,)
    assert explained.step_probabilities.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.slow
def test_late_fusion_is_explained_network_by_network(tiny_model_settings, tiny_records):
    network, params = _network(tiny_model_settings, "late")
    stored = tiny_records[1].settings
    explained = explain(network, params, _batch(), INPUTS, stored)
    assert explained.keys() == {"rgb", "flow"}
    assert explained["rgb"].heat.keys() == {"rgb"} and explained["flow"].heat.keys() == {"flow"}
    assert explained["rgb"].label == explained["flow"].label


def test_the_picture_can_be_read(found, tmp_path):
    from matplotlib.image import imread

    _, _, batch, stored, explained = found
    draw(explained, batch, stored, ("one", "two", "three"), tmp_path / "new" / "why.png")
    picture = imread(tmp_path / "new" / "why.png")
    assert picture.shape[1] > 1000 and picture.std() > 0.1


def test_names_are_drawn_as_they_are(found, tmp_path, drawn_texts):
    _, _, batch, stored, explained = found
    names = ("_one", "$x_2$", r"\$three")
    draw(explained, batch, stored, names, tmp_path / "why.png", truth="$y^2$")
    probability = explained.probabilities[1]
    title = f"why '$x_2$' ({probability:.1%}), truly '$y^2$'"
    assert {(told, False) for told in (*names, title)} <= {*drawn_texts}


def test_one_clip_at_a_time(found):
    network, params, batch, stored, _ = found
    two = Batch(*(np.concatenate([x, x]) for x in batch))
    with pytest.raises(ValueError, match="batch of 2"):
        explain(network, params, two, INPUTS, stored)
