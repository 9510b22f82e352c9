"""The network against its independent twin in PyTorch: answers and gradients of every parameter."""

import copy
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stf_jax.model import PAPER_MODEL, build_model

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: it is the optional extra 'bench'"
)

from experiments.bench.torch_network import TorchNetwork, flax_gradients, load_flax  # noqa: E402

CLASSES = 5  # as many as the tiny configuration's LSTM has units, for head.combine sum and mean
CLIPS, FRAMES, FLOW_CHANNELS = 3, 8, 4
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster what runs only once
# Not with a normalisation: unoptimised, XLA computes the input of a max-pool a second time for the
# gradient, rounded otherwise, and finds no entry that equals the maximum.
OPTIONS = {"none": QUICK, "group": None}

# Largest difference, in shares of the tensor's largest entry.
TOLERANCES = {"float32": 1e-4, "float64": 1e-9}

# The size of the frames, the precision, and what differs from the tiny configuration. Every word of
# every switch of the model is in one of them. Group normalisation, and statistics of three clips,
# enlarge float32's rounding so much that now and then a ReLU or a max-pool decides otherwise.
COMBINATIONS = {
    "default": ((32, 32), "float32", {}),
    "odd sizes, matched": (
        (40, 48),
        "float32",
        {"mst.width": 24, "mst.temporal": (1, 3, 7), "conv3d.mid": "matched", "fusion.init": "he"},
    ),
    "temporal first": (
        (32, 32),
        "float64",
        {
            "norm": "group",
            "norm_groups": 3,
            "conv3d.order": "temporal_first",
            "conv3d.mid_relu": False,
            "conv3d.mid": "matched",
            "temporal.pool4": "before_mst1",
            "fusion.pool5": "before",
            "fusion.relu": False,
            "fusion.kernel": (1, 5, 3),
            "tpn.psi": "max",
            "lstm.ln": "ifo",
            "lstm.forget_bias": -0.5,
            "head.pool": "mean_probs",
        },
    ),
    "flow only, full kernels": (
        (40, 48),
        "float64",
        {
            "streams": "flow",
            "conv3d.factorised": False,
            "conv3d.width": 28,
            "mst.spatial": (5, 3),
            "mst.temporal": (1, 5),
            "temporal.pool4": "after_3d1",
            "fusion.init": "he",
            "fusion.pool5": "stride",
            "fusion.kernel": (5, 3, 1),
            "tpn.stride": 2,
            "lstm.ln": "ba2016",
            "lstm.ln_axis": "batch",
            "head.combine": "sum",
            "head.pool": "last",
        },
    ),
    "rgb only, one direction": (
        (32, 64),
        "float64",
        {
            "streams": "rgb",
            "width": 3,
            "norm": "group",
            "norm_groups": 1,
            "fusion.init": "he",
            "fusion.width": 20,
            "fusion.pool5": "average",
            "tpn.window": 6,
            "tpn.stride": 1,
            "tpn.levels": (3, 2),
            "lstm.ln": "none",
            "lstm.bidirectional": False,
            "head.pool": "per_step_loss",
        },
    ),
    "rgb only, batch statistics": (
        (32, 32),
        "float64",
        {
            "streams": "rgb",
            "lstm.ln": "ifgo",
            "lstm.ln_axis": "batch",
            "fusion.pool5": "stride",
            "fusion.kernel": (3, 5, 3),
            "head.pool": "last",
            "lstm.hidden": 7,
        },
    ),
    "rgb only, parts apart": (
        (32, 32),
        "float32",
        {
            "streams": "rgb",
            "lstm.ln": "ba2016",
            "tpn.stride": 1,
            "head.combine": "mean",
            "head.pool": "per_step_loss",
        },
    ),
}


def switched(config, changes):
    """A copy with values changed, {'tpn.psi': 'max'} say."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, config)
        assert last in section
        section[last] = value
    return config


def clips(size):
    chance = np.random.default_rng(1)
    return tuple(
        chance.normal(0, 1, (CLIPS, FRAMES, *size, channels)).astype(np.float32)
        for channels in (3, FLOW_CHANNELS)
    )


def drawn(network, size):
    """Random parameters, none of them zero; gains are around 1."""

    def draw(path, leaf):
        name = "/".join(key.key for key in path)
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 1, leaf.shape)
        if name.endswith("kernel"):
            values *= (2 / np.prod(leaf.shape[:-1])) ** 0.5
        else:
            values = 0.2 * values + name.endswith("scale")
        return values.astype(np.float32)

    shapes = jax.eval_shape(
        lambda key, *x: network.init(key, *x, train=False), jax.random.key(0), *clips(size)
    )
    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def by_name(tree):
    return {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def difference(got, expected):
    assert got.shape == expected.shape
    largest = np.abs(expected).max()
    assert largest > 1e-6  # else only rounding is compared
    return np.abs(got - expected).max() / largest


LABELS = np.arange(CLIPS) % CLASSES


def jax_answer(network, params, rgb, flow, *, every_step, options):
    def loss(params, rgb, flow):
        logits, features = network.apply({"params": params}, rgb, flow, train=False)
        steps = features["step_logits"]
        read = steps if every_step else logits[:, None]
        labels = np.broadcast_to(LABELS[:, None], read.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(read, jnp.asarray(labels))
        return losses.mean(), (logits, steps)

    answer = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)(params, rgb, flow)
    return jax.tree.map(np.asarray, answer)


def torch_answer(network, rgb, flow, *, every_step):
    logits, steps = network.all_logits(torch.from_numpy(rgb), torch.from_numpy(flow))
    read = steps if every_step else logits[:, None]
    labels = torch.from_numpy(LABELS)[:, None].expand(read.shape[:2])
    network.zero_grad()
    torch.nn.functional.cross_entropy(read.flatten(0, 1), labels.flatten()).backward()
    return flax_gradients(network), (logits.detach().numpy(), steps.detach().numpy())


@pytest.mark.parametrize("name", COMBINATIONS)
def test_answers_and_gradients_are_those_of_the_network_in_torch(name, tiny_model_config):
    size, precision, changes = COMBINATIONS[name]
    config = switched(tiny_model_config, changes)
    network = build_model(config, CLASSES)
    params = drawn(network, size)
    every_step = config["head"]["pool"] == "per_step_loss"
    params, rgb, flow = jax.tree.map(lambda x: x.astype(precision), (params, *clips(size)))
    with jax.enable_x64(precision == "float64"):
        expected_gradients, expected = jax_answer(
            network, params, rgb, flow, every_step=every_step, options=OPTIONS[config["norm"]]
        )
    for memory_format in (torch.channels_last, torch.contiguous_format):
        twin = TorchNetwork(
            config, CLASSES, FLOW_CHANNELS, frame_size=size, memory_format=memory_format
        ).eval()
        twin.to(getattr(torch, precision))
        load_flax(twin, params)
        gradients, answers = torch_answer(twin, rgb, flow, every_step=every_step)
        for got, want in zip(answers, expected, strict=True):
            assert difference(got, want) < TOLERANCES[precision]
        gradients, wanted = by_name(gradients), by_name(expected_gradients)
        assert gradients.keys() == wanted.keys()
        differences = {key: difference(gradients[key], wanted[key]) for key in wanted}
        worst = max(differences, key=differences.get)
        assert differences[worst] < TOLERANCES[precision], worst


def test_the_combinations_cover_every_word(tiny_model_config):
    words = {
        "streams": {"both", "rgb", "flow"},
        "norm": {"none", "group"},
        "conv3d.factorised": {True, False},
        "conv3d.order": {"spatial_first", "temporal_first"},
        "conv3d.mid_relu": {True, False},
        "conv3d.mid": {"out", "matched"},
        "temporal.pool4": {"after_mst1", "before_mst1", "after_3d1"},
        "fusion.relu": {True, False},
        "fusion.pool5": {"after", "before", "stride", "average"},
        "tpn.psi": {"mean", "max"},
        "lstm.ln": {"tf", "ifo", "ifgo", "ba2016", "none"},
        "lstm.ln_axis": {"units", "batch"},
        "lstm.bidirectional": {True, False},
        "head.combine": {"project", "sum", "mean"},
        "head.pool": {"mean_logits", "mean_probs", "last", "per_step_loss"},
    }
    configs = [switched(tiny_model_config, changes) for _, _, changes in COMBINATIONS.values()]
    for key, allowed in words.items():
        assert {functools.reduce(dict.get, key.split("."), config) for config in configs} == allowed


@pytest.mark.parametrize(("semantics", "rates"), [("drop", (0.25, 0.75)), ("keep", (0.75, 0.25))])
def test_dropout_acts_on_vectors_and_states_in_training_only(tiny_model_config, semantics, rates):
    changes = {
        "streams": "rgb", "drop.input": 0.25, "drop.output": 0.75, "drop.semantics": semantics,
        "lstm.hidden": 200,
    }  # fmt: skip
    network = TorchNetwork(
        switched(tiny_model_config, changes), CLASSES, FLOW_CHANNELS, frame_size=(32, 32)
    )
    seen = []
    for layer in (network.drop_input, network.drop_output):
        layer.register_forward_hook(lambda layer, given, got: seen.append((given[0], got)))
    batch = [torch.from_numpy(clip) for clip in clips((32, 32))]
    torch.manual_seed(0)
    network(*batch)
    for (given, got), rate in zip(seen, rates, strict=True):
        alive = given != 0
        kept = (got != 0) & alive
        assert abs(1 - kept.sum() / alive.sum() - rate) < 0.1
        torch.testing.assert_close(got[kept], given[kept] / (1 - rate))
    seen.clear()
    network.eval()(*batch)
    assert all(torch.equal(given, got) for given, got in seen)


@pytest.mark.parametrize(("flow_channels", "total"), [(8, 216_005_251), (4, 216_002_947)])
def test_the_paper_s_size_in_torch(flow_channels, total):
    with torch.device("meta"):
        network = TorchNetwork(PAPER_MODEL, 101, flow_channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == total


@pytest.fixture
def small(tiny_model_config):
    """A network in torch with weights that fit it."""
    config = switched(tiny_model_config, {"streams": "rgb", "lstm.ln": "ifo"})
    params = drawn(build_model(config, CLASSES), (32, 32))
    return TorchNetwork(config, CLASSES, FLOW_CHANNELS, frame_size=(32, 32)), params


def test_loading_copies_every_tensor(small):
    network, params = small
    load_flax(network, params)
    for parameter in network.parameters():
        parameter.grad = parameter.detach().clone()
    loaded, params = by_name(flax_gradients(network)), by_name(params)
    assert loaded.keys() == params.keys()
    assert all(np.array_equal(loaded[name], params[name]) for name in params)


def test_loading_names_every_tensor_that_does_not_fit(small):
    network, params = small
    before = [parameter.clone() for parameter in network.parameters()]
    del params["recurrent"]["forward"]["cell"]["bias_g"]
    params["spatial"]["block9_conv1"] = {"kernel": np.zeros((3, 3, 4, 4), np.float32)}
    kernel = params["fusion"]["conv"]["kernel"]
    params["fusion"]["conv"]["kernel"] = kernel[:, :, :1]
    with pytest.raises(ValueError) as error:
        load_flax(network, params)
    assert str(error.value).splitlines()[1:] == [
        "  missing: recurrent/forward/cell/bias_g",
        "  fusion/conv/kernel is (3, 3, 1, 32, 32), expected (3, 3, 3, 32, 32)",
        "  unexpected: spatial/block9_conv1/kernel",
    ]
    assert all(map(torch.equal, before, network.parameters()))


def test_gradients_need_a_backward_pass(small):
    with pytest.raises(ValueError, match="block1_conv1.* has no gradient"):
        flax_gradients(small[0])


def test_frames_of_another_size_are_refused(small):
    batch = [torch.from_numpy(clip) for clip in clips((32, 64))]
    with pytest.raises(ValueError, match=r"frames of \(32, 32\) px"):
        small[0](*batch)


def test_an_unknown_word_is_refused(tiny_model_config):
    config = switched(tiny_model_config, {"fusion.pool5": "never"})
    with pytest.raises(ValueError, match="fusion.pool5: got 'never', allowed: 'after'"):
        TorchNetwork(config, CLASSES, FLOW_CHANNELS)
