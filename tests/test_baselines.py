"""C3D and the CNN with an LSTM: sizes, what they see, and the run that they share with ours."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from configs import ucf101
from stf_jax.baselines import C3D, CNNLSTM, Volumes, pool2x2x2
from stf_jax.cost import layer_costs, total
from stf_jax.explain import Explainer
from stf_jax.main import run_experiment
from stf_jax.model import PAPER_MODEL, build_model, fold_pyramid
from stf_jax.parallel import place
from stf_jax.pipeline import batches
from stf_jax.predict import Predictor, Trained
from stf_jax.run import Settings, usable_entries
from stf_jax.train import initial_state, train_step

CLASSES = 3
CHANCE = np.random.default_rng(0)
RGB = jnp.asarray(CHANCE.normal(size=(2, 5, 32, 32, 3)), jnp.float32)
FLOW = jnp.asarray(CHANCE.normal(size=(2, 5, 32, 32, 8)), jnp.float32)


def made(config, architecture, streams="rgb", **changes):
    """A network and its parameters."""
    config = {**config, "architecture": architecture, "streams": streams, **changes}
    network = build_model(config, CLASSES)
    init = jax.jit(lambda key: network.init(key, RGB, FLOW, train=False)["params"])
    return network, init(jax.random.key(0))


@pytest.fixture(scope="module", params=["c3d", "cnn_lstm"])
def small(request, tiny_model_settings):
    """Each network of colour, its parameters and its features of RGB and FLOW."""
    network, params = made(tiny_model_settings, request.param)
    apply = jax.jit(lambda rgb, flow: network.apply({"params": params}, rgb, flow, train=False)[1])
    return network, params, apply


def test_the_published_c3d_has_its_published_size():
    """Channels of table and figure 3 of the paper; 24 frames of 112 px instead of 16."""
    network = build_model({**PAPER_MODEL, "architecture": "c3d", "streams": "rgb"}, 101)
    clips = [jax.ShapeDtypeStruct((1, 24, 112, 112, n), jnp.float32) for n in (3, 8)]

    def init(key, rgb, flow):
        return network.init_with_output(key, rgb, flow, train=False)

    (logits, features), variables = jax.eval_shape(init, jax.random.key(0), *clips)
    shapes = {name: feature.shape[1:] for name, feature in features.items()}
    assert logits.shape == (1, 101)
    assert shapes == {
        "block1": (24, 56, 56, 64),
        "block2": (12, 28, 28, 128),
        "block3": (6, 14, 14, 256),
        "block4": (3, 7, 7, 512),
        "block5": (2, 3, 3, 512),
        "fc6": (4096,),
        "fc7": (4096,),
        "logits": (101,),
    }
    channels = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    weights = sum(27 * i * o + o for i, o in zip(channels[:-1], channels[1:], strict=True))
    sizes = jax.tree.map(lambda leaf: leaf.size, variables["params"])
    assert sum(jax.tree.leaves(sizes["volumes"])) == weights


def test_laptop_sizes_cost_no_more_than_ours():
    """So a row of a study compares networks of one size: within 30 % below."""
    found = {}
    for name, streams in (("stf", "both"), ("c3d", "rgb"), ("cnn_lstm", "rgb")):
        config = ucf101.get_config("laptop")
        config.model.update(architecture=name, streams=streams)
        config.stages.first.divide_clips = 1  # a C3D takes clips of one length only
        layers = layer_costs(Settings.of(config), 8)
        found[name] = total(name, layers).macs
        if name == "c3d":
            first = layers[0]
            assert (first.name, first.output) == ("volumes/conv1a", (1, 24, 64, 64, 16))
            assert first.macs == 24 * 64 * 64 * 27 * 3 * 16
            assert layers[-1].name == "head" and layers[-1].macs == 128 * 8
        if name == "cnn_lstm":
            shapes = {layer.name: layer.output for layer in layers}
            assert shapes["spatial/block5_conv3"] == (1, 24, 4, 4, 96)
            assert shapes["recurrent/forward"] == (1, 24, 64)
            assert shapes["head"] == (1, 24, 8)
    for name in ("c3d", "cnn_lstm"):
        assert 0.7 * found["stf"] < found[name] < found["stf"]


def test_pooling_in_time_keeps_the_odd_frame_and_passes_its_gradient():
    x = jnp.asarray(CHANCE.permutation(5 * 4 * 4).reshape(1, 5, 4, 4, 1).astype(np.float32))
    expected = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), ((0, 0), (0, 1), *((0, 0),) * 3)
    )
    np.testing.assert_array_equal(pool2x2x2(x), expected)
    gradient = jax.grad(lambda x: pool2x2x2(x).sum())(x)
    largest = np.isin(np.asarray(x), np.asarray(expected))
    np.testing.assert_array_equal(gradient, largest.astype(np.float32))


def test_volumes_are_convolutions_and_poolings_of_xla():
    volumes = Volumes(width=2, norm_groups=0)
    variables = jax.jit(volumes.init)(jax.random.key(0), RGB)
    got = jax.jit(volumes.apply)(variables, RGB)
    x, number = RGB, 0
    for names in ("1a", "2a", "3a 3b", "4a 4b", "5a 5b"):
        for name in names.split():
            weights = variables["params"][f"conv{name}"]
            x = lax.conv_general_dilated(
                x, weights["kernel"], (1, 1, 1), "SAME",
                dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            )  # fmt: skip
            x = jnp.maximum(x + weights["bias"].reshape(1, 1, 1, 1, -1), 0)
        number += 1
        frames = 1 if number == 1 else 2
        window = (1, frames, 2, 2, 1)
        ends = ((0, 0), (0, x.shape[1] % frames), *((0, 0),) * 3)
        x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, ends)
        np.testing.assert_allclose(got[f"block{number}"], x, rtol=1e-4, atol=1e-5)
    assert x.shape == (2, 1, 1, 1, 16)


def test_a_network_sees_its_own_stream_only(small):
    apply = small[2]
    still = jnp.zeros_like
    with_flow, without = apply(RGB, FLOW), apply(RGB, still(FLOW))
    np.testing.assert_array_equal(with_flow["logits"], without["logits"])
    assert np.abs(with_flow["logits"] - apply(still(RGB), FLOW)["logits"]).max() > 1e-3


def test_the_order_of_frames_counts(small):
    network, _, apply = small
    forwards, backwards = apply(RGB, FLOW), apply(RGB[:, ::-1], FLOW)
    assert np.abs(forwards["logits"] - backwards["logits"]).max() > 1e-4
    if isinstance(network, CNNLSTM):  # but not for the CNN
        turned = backwards["block5"][:, ::-1]
        np.testing.assert_allclose(forwards["block5"], turned, atol=1e-5)


def test_the_answer_is_the_mean_of_the_steps_probabilities(tiny_model_settings):
    network, params = made(tiny_model_settings, "cnn_lstm")
    logits, features = network.apply({"params": params}, RGB, FLOW, train=False)
    steps = np.exp(np.asarray(features["step_logits"], np.float64))
    expected = (steps / steps.sum(axis=2, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(np.exp(logits), expected, rtol=1e-5)
    assert features["states"].shape == (2, 5, 6)
    assert network.scored == ("step_logits",)


def test_a_clip_drops_the_same_in_whatever_part_of_a_batch(small):
    network, params, apply = small

    @jax.jit
    def trained(rgb, flow, rows):
        rngs = {"dropout": jax.random.key(7)}
        variables = {"params": params}
        return network.apply(variables, rgb, flow, train=True, rows=rows, rngs=rngs)[1]

    both = trained(RGB, FLOW, jnp.arange(2))["logits"]
    second = trained(RGB[1:], FLOW[1:], jnp.array([1]))["logits"]
    np.testing.assert_allclose(second, both[1:], rtol=1e-4, atol=1e-5)
    assert np.abs(both - apply(RGB, FLOW)["logits"]).max() > 1e-3


@pytest.mark.parametrize("architecture", ["c3d", "cnn_lstm"])
def test_flow_instead_of_colour_and_what_is_forgotten(tiny_model_settings, architecture):
    """Another stream has other first kernels; forgetting maps changes no gradient."""
    network, params = made(tiny_model_settings, architecture, "flow")
    kernel = next(leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 4)
    assert kernel.shape[-2] == 8
    remat = {"spatial": "none", "temporal": "blocks"}
    forgetful = made(tiny_model_settings, architecture, "flow", remat=remat)[0]

    def gradient(network):
        def loss(params):
            return network.apply({"params": params}, RGB, FLOW, train=False)[0][:, 0].sum()

        return jax.jit(jax.grad(loss))(params)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    jax.tree.map(close, gradient(network), gradient(forgetful))
    text = str(jax.make_jaxpr(lambda p: forgetful.apply({"params": p}, RGB, FLOW, train=True,
        rngs={"dropout": jax.random.key(0)})[0])(params))  # fmt: skip
    assert "checkpoint" in text or "remat" in text


def test_bfloat16_ends_in_float32(tiny_model_settings):
    for name in ("c3d", "cnn_lstm"):
        network, params = made(tiny_model_settings, name, precision="bfloat16")
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        logits, features = jax.eval_shape(
            lambda p, n=network: n.apply({"params": p}, RGB, FLOW, train=False), params
        )
        assert logits.dtype == jnp.float32 and features["block5"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "i3d"}, r"model\.architecture: got 'i3d'.*'stf', 'c3d', 'cnn_lstm'"),
        ({"architecture": "c3d"}, r"model\.streams: got 'both', allowed: 'rgb' \(as published\)"),
        ({"architecture": "c3d", "streams": "late"}, r"model\.streams: got 'late'"),
        ({"c3d": {"width": 0, "dense": 4}}, r"model\.c3d\.width: got 0"),
        ({"cnn_lstm": {"width": 4, "hidden": 2.5}}, r"model\.cnn_lstm\.hidden: got 2\.5"),
        ({"cnn_lstm": {"width": 4}}, r"model\.cnn_lstm\.hidden: got 'nothing'"),
    ],
)
def test_what_cannot_work_names_its_key(annotations_off, tiny_model_config, changes, said):
    with pytest.raises(ValueError, match=said):
        build_model({**tiny_model_config, **changes}, CLASSES)


def test_imagenet_weights_are_for_the_frames_of_the_cnn_alone(tiny_config):
    tiny_config.pretrained = "keras"
    tiny_config.model.update(architecture="c3d", streams="rgb")
    with pytest.raises(ValueError, match="pretrained: got 'keras', allowed: 'none' .*'c3d'"):
        Settings.of(tiny_config)
    tiny_config.model.update(architecture="cnn_lstm", streams="flow")
    with pytest.raises(ValueError, match="pretrained: .*'cnn_lstm' and model.streams='flow'"):
        Settings.of(tiny_config)
    tiny_config.model.streams = "rgb"
    assert "spatial" in Settings.of(tiny_config).abstract_params(2)


def test_frames_that_five_poolings_would_use_up_are_named(small):
    network, params, _ = small
    rgb, flow = (jnp.zeros((1, 5, 31, 40, n)) for n in (3, 8))
    with pytest.raises(ValueError, match="31x40 px are too small"):
        network.apply({"params": params}, rgb, flow, train=False)


@pytest.mark.parametrize("architecture", ["c3d", "cnn_lstm"])
def test_each_learns_through_the_training_step_of_ours(tiny_config, tiny_records, architecture):
    tiny_config.model.update(architecture=architecture, streams="rgb", norm="none")
    tiny_config.model.drop.update(input=0.0, output=0.0)
    settings = Settings.of(tiny_config)
    index, records = tiny_records
    entries = usable_entries(index, records, "train")
    options = {"batch_size": 4, "train": True, "stop_step": 1}
    batch = next(batches(records, entries, settings.sampling, **options))
    model, rates = settings.model(2), settings.stages["first"].rates
    params = settings.initial_params(model)
    before = jax.tree.map(np.array, params)
    state = place(initial_state(params, settings.optimizer, rates), settings.mesh)
    losses = []
    for _ in range(25):
        state, record = train_step(
            state, batch, jax.random.key(1), np.float32(3e-3), model=model, inputs=settings.inputs,
            augment=settings.augment, optimizer=settings.optimizer, rates=rates,
            mesh=settings.mesh,
        )  # fmt: skip
        losses.append(float(record.loss))
    # One step at this rate may go astray.
    assert np.median(losses[-5:]) < 0.6 * np.median(losses[:5])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_a_whole_run_ends_in_a_report_and_predicts(tiny_config, tiny_videos, tmp_path):
    tiny_config.model.update(architecture="c3d", streams="flow")
    tiny_config.eval.each_stream = True  # a network of one stream has none to do without
    tiny_config.stages.first.max_epochs = 1
    results = run_experiment(tiny_config, tmp_path, "tiny", {})
    assert results["num_videos"] and (tmp_path / "report" / "index.html").stat().st_size
    assert results["streams"] == {}
    assert json.loads((tmp_path / "config.json").read_text())["model"]["architecture"] == "c3d"
    trained = Trained.read(tmp_path)
    predictor = Predictor.of(trained)
    assert isinstance(predictor.model, C3D)
    assert fold_pyramid(predictor.model, trained.params) == (predictor.model, trained.params)
    (video, *_) = sorted(tiny_videos.rglob("*.avi"))
    assert predictor.predict(video).probabilities.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="architecture='stf'; that of 'c3d' has none"):
        Explainer.load(tmp_path)
    assert isinstance(predictor.model, nn.Module)
