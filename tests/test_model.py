"""The whole network: its size, what each switch of its configuration does, and what it leaves."""

import copy
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from stf_jax.fusion import blurred_sum
from stf_jax.metrics import cross_entropy
from stf_jax.model import PAPER_MODEL, Head, _folded, build_model, fold_pyramid, unread
from stf_jax.recurrent import BiLSTM, LSTMSettings
from stf_jax.streams import SpatialStream, TemporalStream

CLASSES = 5
RGB = jnp.asarray(np.random.default_rng(1).normal(0, 1, (2, 8, 32, 32, 3)), jnp.float32)
FLOW = jnp.asarray(np.random.default_rng(2).normal(0, 1, (2, 8, 32, 32, 4)), jnp.float32)
QUICK = {"xla_backend_optimization_level": 0}  # compiles faster what runs only once

TAIL = ["fused", "pyramid", "states", "step_logits", "logits"]
CHAINS = {
    "rgb": [*(f"rgb_block{n}" for n in range(1, 6)), "rgb_map", *TAIL],
    "flow": [
        *(f"flow_block{n}" for n in range(1, 5)),
        *("flow_mst1", "flow_conv3d1", "flow_mst2", "flow_conv3d2", "flow_map"),
        *TAIL,
    ],
}
FEATURES = {*CHAINS["rgb"], *CHAINS["flow"]}


def downstream(roots):
    """The named features and everything that is computed from them."""
    return {
        name
        for root in roots
        for chain in CHAINS.values()
        if root in chain
        for name in chain[chain.index(root) :]
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


@functools.cache
def traced(network, clip=RGB.shape[:4], flow_channels=4):
    """(parameters, features) as shapes; nothing is computed."""
    rgb = jax.ShapeDtypeStruct((*clip, 3), jnp.float32)
    flow = jax.ShapeDtypeStruct((*clip, flow_channels), jnp.float32)
    (_, features), params = jax.eval_shape(
        lambda key, *x: network.init_with_output(key, *x, train=False), jax.random.key(0), rgb, flow
    )
    return params, {name: leaf.shape for name, leaf in features.items()}


def by_path(params):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(params["params"])
    }


def parameter_shapes(network, *clip):
    return {name: leaf.shape for name, leaf in by_path(traced(network, *clip)[0]).items()}


@functools.cache
def drawn(network):
    """Random parameters that depend on their path and shape alone; gains are around 1."""

    def draw(path, leaf):
        name = "/".join(key.key for key in path)
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 1, leaf.shape)
        if name.endswith("kernel"):
            return jnp.asarray(values * (2 / np.prod(leaf.shape[:-1])) ** 0.5, jnp.float32)
        return jnp.asarray(0.2 * values + name.endswith("scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, traced(network)[0])


@functools.partial(jax.jit, static_argnums=0)
def compiled(module, variables, x):
    return module.apply(variables, x)


STREAMS = {}


def share_layers(call, args, kwargs, context):
    """Lets networks with an equal recurrent layer share its compiled code."""
    module = context.module
    if isinstance(module, BiLSTM) and isinstance(module.parent, nn.Module):
        return compiled(module.clone(parent=None), module.variables, *args)
    return call(*args, **kwargs)


def remember_streams(call, args, kwargs, context):
    """Equal streams with `drawn` parameters give equal maps of RGB and FLOW: computes them once."""
    if not isinstance(context.module, SpatialStream | TemporalStream):
        return share_layers(call, args, kwargs, context)
    stream = context.module.clone(parent=None)
    if stream not in STREAMS:
        STREAMS[stream] = call(*args, **kwargs)
    return STREAMS[stream]


def evaluate(network, rgb, flow, interceptor=share_layers):
    """The features of clips with `drawn` parameters."""
    variables = drawn(network)
    with nn.intercept_methods(interceptor):
        got = network.apply(variables, rgb, flow, train=False)[1]
    return jax.tree.map(np.asarray, got)


@functools.cache
def features(network):
    """`evaluate` of RGB and FLOW."""
    return evaluate(network, RGB, FLOW, remember_streams)


@pytest.fixture
def tiny(tiny_model_config):
    """The network of a changed tiny configuration."""
    return lambda changes=None: build_model(switched(tiny_model_config, changes or {}), CLASSES)


@pytest.mark.parametrize("flow_channels, total", [(8, 216_005_251), (4, 216_002_947)])
def test_parameters_at_paper_size(flow_channels, total):
    network = build_model(PAPER_MODEL, 101)
    params = parameter_shapes(network, (1, 24, 224, 224), flow_channels)
    sizes = {name: int(np.prod(shape)) for name, shape in params.items()}
    assert sum(sizes.values()) == total

    def size(prefix):
        return sum(count for name, count in sizes.items() if name.startswith(prefix))

    assert size("spatial/") == 14_714_688
    assert size("temporal/block") == 5_276_032 + total - 216_002_947
    assert size("temporal/") - size("temporal/block") == 39_854_080
    assert size("fusion/") == 14_156_288
    assert size("recurrent/") + size("head/") == 142_001_859


def test_features_at_paper_size():
    _, got = traced(build_model(PAPER_MODEL, 101), (2, 24, 224, 224), 8)
    assert got.keys() == FEATURES
    expected = {
        "rgb_block1": (2, 24, 224, 224, 64),
        "rgb_block5": (2, 24, 14, 14, 512),
        "rgb_map": (2, 24, 14, 14, 512),
        "flow_block4": (2, 24, 28, 28, 512),
        "flow_mst1": (2, 24, 28, 28, 1536),
        "flow_conv3d1": (2, 24, 14, 14, 512),
        "flow_mst2": (2, 24, 14, 14, 1536),
        "flow_map": (2, 24, 14, 14, 512),
        "fused": (2, 24, 7, 7, 512),
        "pyramid": (2, 3, 175_616),
        "states": (2, 3, 2, 101),
        "step_logits": (2, 3, 101),
        "logits": (2, 101),
    }
    assert {name: got[name] for name in expected} == expected


THREE_D = ("temporal/mst1/", "temporal/conv3d1/", "temporal/mst2/", "temporal/conv3d2/")
EVERY_CONVOLUTION = ("spatial/", "temporal/", "fusion/")
STARTS = ("rgb_block1", "flow_block1")
HE = {"fusion.init": "he"}
GROUP = {"norm": "group"}
NARROW = {"mst.width": 16}
SUM = {"head.combine": "sum"}

# What the switch is compared with, the switch, whose parameters change in number or shape, and
# which features change first: in shape or, where parameters stay, in value.
SWITCHES = [
    (HE, {"width": 8}, ("spatial/", "temporal/block", "temporal/mst1/", "fusion/"), STARTS),
    ({}, GROUP, EVERY_CONVOLUTION, STARTS),
    ({}, {"norm_groups": 2}, (), ()),
    ({}, {"mst.spatial": (3, 5, 7)}, ("temporal/mst1/", "temporal/mst2/"), ("flow_mst1",)),
    ({}, {"mst.temporal": (3, 5, 5)}, ("temporal/mst1/", "temporal/mst2/"), ("flow_mst1",)),
    ({}, NARROW, THREE_D, ("flow_mst1",)),
    ({}, {"conv3d.factorised": False}, THREE_D, ("flow_mst1",)),
    (NARROW, {"conv3d.order": "temporal_first"}, THREE_D, ("flow_mst1",)),
    ({}, {"conv3d.mid_relu": False}, (), ("flow_mst1",)),
    ({}, {"conv3d.mid": "matched"}, THREE_D, ("flow_mst1",)),
    ({}, {"conv3d.temporal": 1}, (THREE_D[1], THREE_D[3]), ("flow_conv3d1",)),
    (HE, {"conv3d.width": 16}, (*THREE_D[1:], "fusion/"), ("flow_conv3d1",)),
    ({}, {"temporal.pool4": "before_mst1"}, (), ("flow_mst1",)),
    ({}, {"temporal.pool4": "after_3d1"}, (), ("flow_conv3d1",)),
    ({}, {"temporal.init": "glorot"}, (), ()),
    ({}, {"temporal.conv1_init": "rgb_mean"}, (), ()),
    ({}, {"fusion.kernel": (3, 5, 1)}, ("fusion/",), ("fused",)),
    (HE, {"fusion.width": 16}, ("fusion/", "recurrent/"), ("fused",)),
    ({}, {"fusion.relu": False}, (), ("fused",)),
    ({}, {"fusion.pool5": "before"}, (), ("fused",)),
    ({}, {"fusion.pool5": "stride"}, (), ("fused",)),
    ({}, {"fusion.pool5": "average"}, (), ("fused",)),
    ({}, {"fusion.init": "he"}, (), ()),
    ({}, {"fusion.drop_rgb": 0.5}, (), ()),  # of training alone, as is the next: see below
    ({}, {"fusion.loss_without": ("rgb",)}, (), ()),
    ({}, {"tpn.window": 8}, (), ("pyramid",)),
    ({}, {"tpn.stride": 2}, (), ("pyramid",)),
    ({}, {"tpn.levels": (4,)}, ("recurrent/",), ("pyramid",)),
    ({}, {"tpn.psi": "max"}, (), ("pyramid",)),
    ({}, {"lstm.cell": "mean"}, ("recurrent/", "head/"), ("states",)),
    ({}, {"lstm.hidden": 6}, ("recurrent/", "head/"), ("states",)),
    ({}, {"lstm.ln": "ifo"}, ("recurrent/",), ("states",)),
    ({}, {"lstm.ln": "ifgo"}, ("recurrent/",), ("states",)),
    ({}, {"lstm.ln": "ba2016"}, ("recurrent/",), ("states",)),
    ({}, {"lstm.ln": "none"}, ("recurrent/",), ("states",)),
    ({}, {"lstm.ln_axis": "batch"}, (), ("states",)),
    ({}, {"lstm.forget_bias": 0.0}, (), ("states",)),
    ({}, {"lstm.bidirectional": False}, ("recurrent/backward/", "head/"), ("states",)),
    ({}, SUM, ("head/",), ("step_logits",)),
    (SUM, {"head.combine": "mean"}, (), ("step_logits",)),
    ({}, {"head.pool": "mean_probs"}, (), ("logits",)),
    ({}, {"head.pool": "last"}, (), ("logits",)),
    ({}, {"head.pool": "per_step_loss"}, (), ()),
    ({}, {"drop.input": 0.9, "drop.output": 0.8}, (), ()),
    ({}, {"drop.semantics": "keep"}, (), ()),
    ({}, {"precision": "bfloat16"}, (), STARTS),
    ({}, {"remat.spatial": "all"}, (), ()),
    ({}, {"remat.temporal": "blocks"}, (), ()),
]


@pytest.mark.parametrize(
    "base, change, parameters, first",
    SWITCHES,
    ids=[f"{next(iter(change))}={next(iter(change.values()))}" for _, change, *_ in SWITCHES],
)
def test_a_switch_changes_what_it_says_and_nothing_else(tiny, base, change, parameters, first):
    before, after = tiny(base), tiny(base | change)
    assert before != after or change == {"norm_groups": 2}
    old, new = parameter_shapes(before), parameter_shapes(after)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    for prefix in parameters:
        assert any(name.startswith(prefix) for name in changed), prefix
    assert all(name.startswith(parameters) for name in changed), changed
    if parameters and downstream(first) == FEATURES:
        return  # nothing is left that should stay
    # Equal paths and shapes have equal numbers, so the features tell where the switch acts.
    old, new = features(before), features(after)
    assert old.keys() == new.keys()
    touched = {name for name in FEATURES if not np.array_equal(old[name], new[name])}
    assert touched == downstream(first)


def test_every_switch_is_tried(tiny_model_config):
    keys = set()
    for key, value in tiny_model_config.items():
        keys |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    others = {key for key in keys if key.startswith(("architecture", "c3d.", "cnn_lstm."))}
    assert len(others) == 5  # of other networks: test_baselines
    tried = {key for _, change, *_ in SWITCHES for key in change}
    assert keys - tried - others == {"streams"}


def test_a_single_stream_is_the_same_stream_alone(tiny):
    both = tiny()
    for streams, part, other in [("rgb", "spatial", "flow"), ("flow", "temporal", "rgb")]:
        alone = tiny({"streams": streams})
        old, new = parameter_shapes(both), parameter_shapes(alone)
        assert {name.split("/")[0] for name in new} == {part, "fusion", "recurrent", "head"}
        changed = {name for name in new if new[name] != old[name]}
        assert changed == {"fusion/conv/kernel"}
        assert (old["fusion/conv/kernel"][-2], new["fusion/conv/kernel"][-2]) == (64, 32)
        got = features(alone)
        assert got.keys() == {name for name in FEATURES if not name.startswith(other)}
        for name in got.keys() - set(TAIL):
            np.testing.assert_array_equal(got[name], features(both)[name], err_msg=name)
        # The other input is not even looked at.
        rgb, flow = (RGB, FLOW + 1) if streams == "rgb" else (RGB + 1, FLOW)
        np.testing.assert_array_equal(evaluate(alone, rgb, flow)["logits"], got["logits"])


def test_both_inputs_matter_each_to_its_own_stream(tiny):
    network = tiny()
    base = features(network)
    for rgb, flow, start in [(RGB + 1, FLOW, "rgb_block1"), (RGB, FLOW + 1, "flow_block1")]:
        got = evaluate(network, rgb, flow)
        touched = {name for name in FEATURES if not np.array_equal(got[name], base[name])}
        assert touched == downstream([start])


def test_clips_of_a_batch_do_not_see_each_other(tiny):
    network = tiny()
    base = features(network)
    got = evaluate(network, RGB.at[1].multiply(-1), FLOW.at[1].multiply(-1))
    for name in FEATURES:
        np.testing.assert_allclose(got[name][0], base[name][0], rtol=1e-4, err_msg=name)
        assert np.abs(got[name][1] - base[name][1]).max() > 1e-3, name
        assert np.abs(base[name][0] - base[name][1]).max() > 1e-3, name


def test_group_normalisation_is_everywhere_or_nowhere(tiny):
    for changes, groups in [({}, 0), (GROUP, 8), (GROUP | {"norm_groups": 2}, 2)]:
        network = tiny(changes)
        parts = (network.spatial, network.temporal, network.fusion)
        assert [part.norm_groups for part in parts] == [groups] * 3
    params = parameter_shapes(network)
    convolutions = {name.removesuffix("/kernel") for name in params if "kernel" in name}
    convolutions -= {name for name in convolutions if name.startswith(("recurrent", "head"))}
    assert len(convolutions) == 13 + 9 + 16 + 1
    assert all(f"{name}/norm/scale" in params for name in convolutions)


def test_maps_come_from_the_last_layers_and_the_temporal_one_is_heavier(tiny):
    got = features(tiny())
    np.testing.assert_array_equal(got["rgb_map"], got["rgb_block5"])
    np.testing.assert_array_equal(got["flow_map"], got["flow_conv3d2"])
    # The blur weighs the spatial map 1 to 3, so the order of the maps is not free.
    network = tiny({"fusion.kernel": (1, 1, 1), "fusion.relu": False, "fusion.pool5": "average"})
    kernel = blurred_sum(jax.random.key(0), (1, 1, 1, 64, 32))
    params = jax.tree.map(lambda leaf: leaf, drawn(network))
    params["params"]["fusion"]["conv"] = {"kernel": kernel, "bias": jnp.zeros(32)}
    with nn.intercept_methods(remember_streams):
        fused = network.apply(params, RGB, FLOW, train=False)[1]["fused"]
    expected = (0.25 * got["rgb_map"] + 0.75 * got["flow_map"]).mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(fused, expected, rtol=1e-4, atol=1e-5)


def test_layers_start_as_their_settings_say(tiny):
    network = tiny({"temporal.init": "normal001", "lstm.ln": "ifo"})
    key = jax.random.key(0, impl="rbg")  # the default generator takes longer to compile
    others = ("block3", "block4", "block5", "mst2", "branch2", "branch3", "backward")

    def init(key):
        params = by_path(network.init(key, RGB, FLOW, train=False))
        return {k: v for k, v in params.items() if not any(part in k for part in others)}

    # Enough to see one layer of each kind; every other kernel takes its time to compile.
    params = jax.jit(init, compiler_options=QUICK)(key)
    for name, leaf in params.items():
        layer = name.split("/")[1]
        if not name.endswith("kernel"):
            np.testing.assert_array_equal(leaf, float(name.endswith("scale")), err_msg=name)
        elif name.startswith("fusion"):
            np.testing.assert_array_equal(leaf, blurred_sum(key, leaf.shape))
        elif name.startswith(("recurrent", "head")):
            limit = (6 / sum(leaf.shape)) ** 0.5
            assert 0.9 * limit < np.abs(leaf).max() <= limit, name
        else:
            he = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            random = name.startswith("temporal/block1_conv1") or not layer.startswith("block")
            spread = 0.01 if name.startswith("temporal") and random else he
            assert leaf.std() == pytest.approx(spread, rel=0.2), name


def dropout_outputs(network, key):
    """(features, what the input dropout gives, what the output dropout gives) in training."""
    variables = drawn(network)
    with nn.intercept_methods(remember_streams):
        (_, got), state = network.apply(
            variables,
            RGB,
            FLOW,
            train=True,
            rngs={"dropout": jax.random.key(key)},
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: (module.name or "").startswith("drop_"),
        )
    (first,), (second,) = (
        state["intermediates"][f"drop_{name}"]["__call__"] for name in ("input", "output")
    )
    return got, np.asarray(first), np.asarray(second)


@pytest.mark.parametrize("semantics, rates", [("drop", (0.4, 0.25)), ("keep", (0.6, 0.75))])
def test_dropout_leaves_out_the_share_it_is_told(tiny, semantics, rates):
    changes = {"drop.semantics": semantics, "drop.input": rates[0], "drop.output": rates[1]}
    network = tiny(changes | {"fusion.relu": False, "lstm.hidden": 100})
    got, pyramid, states = dropout_outputs(network, 0)
    for name, after, rate in [("pyramid", pyramid, 0.4), ("states", states, 0.25)]:
        assert after.shape == got[name].shape
        dropped = after == 0
        assert not (got[name] == 0).any()
        assert dropped.mean() == pytest.approx(rate, abs=0.07)
        np.testing.assert_allclose(
            after[~dropped], np.asarray(got[name])[~dropped] / (1 - rate), rtol=1e-5
        )
        # Every clip and step has a mask of its own.
        assert (dropped[0] != dropped[1]).any() and (dropped[:, 0] != dropped[:, 1]).any()


def test_dropout_acts_in_training_only_and_follows_its_key(tiny):
    network = tiny()
    base = features(network)
    one, again, other = (dropout_outputs(network, key)[0] for key in (1, 1, 2))
    for name in FEATURES:
        np.testing.assert_array_equal(one[name], again[name], err_msg=name)
    for name in ("states", "step_logits", "logits"):
        assert np.abs(one[name] - base[name]).max() > 1e-3
        assert np.abs(one[name] - other[name]).max() > 1e-3
    for name in FEATURES - {"states", "step_logits", "logits"}:
        np.testing.assert_array_equal(one[name], base[name], err_msg=name)
    # Without input dropout the states are whole: only what the head reads is thinned out.
    got, _, after = dropout_outputs(tiny({"drop.input": 0.0}), 1)
    np.testing.assert_array_equal(got["states"], base["states"])
    assert (after == 0).any()
    undisturbed, *_ = dropout_outputs(tiny({"drop.input": 0.0, "drop.output": 0.0}), 1)
    np.testing.assert_array_equal(undisturbed["logits"], base["logits"])


def test_a_share_of_the_training_clips_is_fused_without_colour(tiny):
    """Such a clip's outputs do not depend on its colours; the others are as in evaluation."""
    clips, share = 64, 0.7
    network = tiny({"fusion.drop_rgb": share, "drop.input": 0.0, "drop.output": 0.0})
    random = np.random.default_rng(0)
    flow = jnp.asarray(random.normal(size=(1, 8, 32, 32, 8)).repeat(clips, 0), jnp.float32)
    colours = [
        jnp.asarray(random.normal(size=(1, 8, 32, 32, 3)).repeat(clips, 0), jnp.float32)
        for _ in range(2)
    ]
    params = network.init(jax.random.key(0), colours[0][:1], flow[:1], train=False)

    @functools.partial(jax.jit, static_argnames="train")
    def fused(rgb, key, train):
        rngs = {"dropout": jax.random.key(key)}
        return network.apply(params, rgb, flow, train=train, rngs=rngs)[1]["fused"]

    one, other = (np.asarray(fused(rgb, 1, True)) for rgb in colours)
    dropped = np.array([np.array_equal(a, b) for a, b in zip(one, other, strict=True)])
    assert dropped.mean() == pytest.approx(share, abs=0.15)
    np.testing.assert_allclose(one[~dropped], fused(colours[0], 1, False)[~dropped], atol=1e-5)
    again = np.asarray(fused(colours[0], 2, True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, again, strict=True))


@pytest.mark.parametrize(
    "pool, name", [("mean_logits", "logits"), ("per_step_loss", "step_logits")]
)
def test_training_clips_are_also_classified_without_a_stream(tiny, pool, name):
    """As `without` does it in evaluation, and by what is left of the clip alone."""
    still = {"drop.input": 0.0, "drop.output": 0.0, "head.pool": pool}
    network = tiny(still | {"fusion.loss_without": ("rgb", "flow")})
    assert network.scored == (name, f"without_rgb_{name}", f"without_flow_{name}")
    params = network.init(jax.random.key(0), RGB, FLOW, train=False)

    def outputs(rgb, flow, **how):
        return network.apply(params, rgb, flow, **how)[1]

    got = outputs(RGB, FLOW, train=True, rngs={"dropout": jax.random.key(0)})
    scored = outputs(RGB, FLOW, train=False)
    assert got.keys() - scored.keys() == {
        f"without_{stream}_{scores}"
        for stream in ("rgb", "flow")
        for scores in ("logits", "step_logits")
    }
    np.testing.assert_allclose(got["logits"], scored["logits"], atol=1e-5)
    for stream in ("rgb", "flow"):
        alone = network.apply(params, scored, stream, method="without")
        np.testing.assert_allclose(got[f"without_{stream}_logits"], alone, atol=1e-5)
    other = outputs(-RGB, FLOW, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(other["without_rgb_logits"], got["without_rgb_logits"])
    assert np.abs(other["without_flow_logits"] - got["without_flow_logits"]).max() > 1e-3


def test_only_both_streams_are_also_scored_without_one(tiny):
    change = {"fusion.loss_without": ("rgb",)}
    assert tiny(change | {"streams": "flow"}).scored == ("logits",)
    assert tiny(change | {"streams": "late"}).scored == ("rgb_logits", "flow_logits")


def test_the_gradient_reaches_every_parameter(tiny):
    network = tiny()
    weights = jnp.asarray(np.random.default_rng(3).normal(0, 1, (2, CLASSES)))

    def loss(params):
        key = {"dropout": jax.random.key(0)}
        return (network.apply(params, RGB, FLOW, train=True, rngs=key)[0] * weights).sum()

    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)(drawn(network))
    for name, leaf in by_path(gradients).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-8, name


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("pool", ["mean_logits", "mean_probs", "last", "per_step_loss"])
@pytest.mark.parametrize("combine", ["project", "sum", "mean"])
def test_the_head_by_plain_formulas(combine, pool):
    rng = np.random.default_rng(4)
    states = rng.normal(0, 1, (3, 4, 2, CLASSES)).astype(np.float32)
    head = Head(CLASSES, combine, pool)
    variables = {}
    if combine == "project":
        kernel, bias = rng.normal(0, 1, (2, CLASSES, CLASSES)), rng.normal(0, 1, CLASSES)
        params = {"kernel": kernel.reshape(-1, CLASSES), "bias": bias}
        variables = {"params": {"project": jax.tree.map(jnp.float32, params)}}

    def combined(forward, backward):
        if combine == "project":
            return forward @ kernel[0] + backward @ kernel[1] + bias
        return (forward + backward) * (1 if combine == "sum" else 0.5)

    steps = combined(states[:, :, 0], states[:, :, 1])
    expected = {
        "mean_logits": steps.mean(axis=1),
        "mean_probs": np.log(np.exp(log_softmax(steps)).mean(axis=1)),
        "last": combined(states[:, 3, 0], states[:, 0, 1]),
        "per_step_loss": steps.mean(axis=1),
    }
    logits, step_logits = head.apply(variables, jnp.asarray(states))
    np.testing.assert_allclose(step_logits, steps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, expected[pool], rtol=1e-4, atol=1e-5)


def test_only_a_projection_gets_below_the_loss_floor():
    # Of 101 classes: log(1 + 100 exp(-4)) with the sum, log(1 + 100 exp(-2)) with the mean, as
    # every unit lies between -1 and 1 (SPEC 16.11).
    layer = BiLSTM(LSTMSettings("lstm", 101, "tf", "units", 1.0, True))
    x = jnp.asarray(np.random.default_rng(5).normal(0, 1, (2, 3, 4)), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 50, p.shape), jnp.float32), params)
    states = layer.apply(params, x)
    assert 0.999 < np.abs(states).max() <= 1
    best = jnp.full((1, 3, 2, 101), -1.0).at[..., 7].set(1.0)
    floors = {"sum": 1.0410, "mean": 2.6771}
    for combine, floor in floors.items():
        head = Head(101, combine, "mean_logits")
        assert -log_softmax(np.asarray(head.apply({}, best)[0]))[0, 7] == pytest.approx(
            floor, abs=1e-3
        )
        assert (-log_softmax(np.asarray(head.apply({}, states)[0]))).min() > floor
    project = {"kernel": 5 * jnp.tile(jnp.eye(101), (2, 1)), "bias": jnp.zeros(101)}
    logits, _ = Head(101, "project", "mean_logits").apply({"params": {"project": project}}, best)
    assert -log_softmax(np.asarray(logits))[0, 7] < 1e-5


def test_equal_configurations_give_equal_networks(tiny_model_config):
    network = build_model(tiny_model_config, CLASSES)
    lists = copy.deepcopy(tiny_model_config)
    lists["mst"]["spatial"] = list(lists["mst"]["spatial"])
    lists["tpn"]["levels"] = list(lists["tpn"]["levels"])
    for config in (ConfigDict(tiny_model_config), ConfigDict(lists), lists):
        same = build_model(config, CLASSES)
        assert same == network and hash(same) == hash(network)
    assert build_model(tiny_model_config, CLASSES + 1) != network


# Another possible value in every section that some networks do not read.
OTHER = {
    "width": 8,
    "mst.spatial": (1, 1, 3),
    "conv3d.temporal": 1,
    "temporal.init": "glorot",
    "fusion.relu": False,
    "tpn.psi": "max",
    "lstm.ln": "none",
    "head.pool": "last",
    "c3d.dense": 5,
    "cnn_lstm.hidden": 3,
}


@pytest.mark.parametrize(
    "architecture, streams",
    [
        *(("stf", streams) for streams in ("both", "rgb", "flow", "late")),
        *((name, stream) for name in ("c3d", "cnn_lstm") for stream in ("rgb", "flow")),
    ],
)
def test_unread_settings_are_those_whose_change_leaves_the_network_as_it_is(
    tiny_model_config, architecture, streams
):
    chosen = {"architecture": architecture, "streams": streams, "fusion.init": "he"}
    config = switched(tiny_model_config, chosen)
    network = build_model(config, CLASSES)
    without_effect = {
        key.partition(".")[0]
        for key, value in OTHER.items()
        if build_model(switched(config, {key: value}), CLASSES) == network
    }
    assert set(unread(architecture, streams)) == without_effect


@pytest.mark.parametrize(
    "key, near",
    [
        ("widht", "did you mean 'width'"),
        ("mst.spacial", "did you mean 'spatial'"),
        ("conv3d.factorized", "did you mean 'factorised'"),
        ("temporal.bn", "the keys pool4, init, conv1_init"),
        ("fusion.kernels", "did you mean 'kernel'"),
        ("tpn.level", "did you mean 'levels'"),
        ("lstm.unit", "the keys cell, hidden, ln"),
        ("head.pooling", "did you mean 'pool'"),
        ("drop.in", "the keys input, output, semantics"),
    ],
)
def test_an_unknown_key_is_named_with_its_neighbour(tiny_model_config, key, near):
    *section, last = key.split(".")
    place = tiny_model_config[section[0]] if section else tiny_model_config
    place[last] = 1
    with pytest.raises(ValueError) as caught:
        build_model(tiny_model_config, CLASSES)
    assert str(caught.value).startswith(f"model.{key}: got 'an unknown key', allowed: the keys ")
    assert near in str(caught.value)


@pytest.mark.parametrize("key", ["width", "head", "mst.width", "lstm.ln", "drop.semantics"])
def test_a_missing_key_is_named(tiny_model_config, key):
    *section, last = key.split(".")
    del (tiny_model_config[section[0]] if section else tiny_model_config)[last]
    with pytest.raises(ValueError, match=rf"^model\.{key}: got 'nothing'.*is missing"):
        build_model(tiny_model_config, CLASSES)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("width", 0, "an integer from 1 on"),
        ("width", True, "an integer from 1 on"),
        ("streams", "all", "'both', 'rgb', 'flow'"),
        ("norm", "batch", "'none', 'group'"),
        ("norm_groups", 0, "an integer from 1 on"),
        ("mst.spatial", (2, 3, 5), "odd kernel sizes, one per branch"),
        ("mst.temporal", (3, 5), "one size for each of the 3 branches"),
        ("conv3d.order", "time_first", "'spatial_first', 'temporal_first'"),
        ("conv3d.mid", "in", "'out', 'matched'"),
        ("temporal.pool4", "after", "'after_mst1', 'before_mst1', 'after_3d1'"),
        ("fusion.pool5", "none", "'after', 'before', 'stride', 'average'"),
        ("tpn.levels", (1, 3), "divisors of tpn.window (4)"),
        ("lstm.ln", "layer", "'tf', 'ifo', 'ifgo', 'ba2016', 'none'"),
        ("head.combine", "max", "'project', 'sum', 'mean'"),
        ("head.pool", "first", "'mean_logits', 'mean_probs', 'last', 'per_step_loss'"),
        ("drop.input", 1.0, "0 <= p < 1"),
        ("drop.output", -0.1, "0 <= p < 1"),
        ("drop.input", "half", "0 <= p < 1"),
        ("drop.semantics", "rate", "'drop', 'keep'"),
    ],
)
def test_an_impossible_value_is_named(annotations_off, tiny_model_config, key, value, allowed):
    with pytest.raises(ValueError) as caught:
        build_model(switched(tiny_model_config, {key: value}), CLASSES)
    assert str(caught.value).startswith(f"model.{key}: got {value!r}, allowed: ")
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fusion.width": 16}, r"fusion\.init: got 'feichtenhofer'.*fusion\.width \(16\) equal"),
        ({"width": 8}, r"fusion\.init.*model\.width times 8 = 64, conv3d\.width = 32"),
        ({"conv3d.width": 8}, r"fusion\.init.*conv3d\.width = 8"),
        (
            {"temporal.init": "inflate", "conv3d.mid": "matched"},
            r"temporal\.init: got 'inflate'.*or conv3d\.mid 'out'",
        ),
        (
            {"head.combine": "sum", "lstm.hidden": 6},
            r"head\.combine: got 'sum'.*lstm\.hidden \(6\).*classes \(5\)",
        ),
        ({"drop.semantics": "keep", "drop.input": 0.0}, r"drop\.input: got 0\.0.*0 < p <= 1"),
    ],
)
def test_values_that_do_not_go_together_are_named(tiny, changes, message):
    with pytest.raises(ValueError, match=rf"^model\.{message}"):
        tiny(changes)


def test_a_width_that_does_not_take_part_is_not_held_against_the_fusion(tiny):
    assert tiny({"streams": "rgb", "conv3d.width": 8}).temporal is None
    assert tiny({"streams": "flow", "width": 2}).spatial is None


@pytest.mark.parametrize(
    "clip, message",
    [
        ((1, 8, 31, 40), "frames of 31x40 px are too small.*at least 32x32"),
        ((1, 6, 32, 32), r"6 frames.*tpn\.window=4.*tpn\.stride=4"),
    ],
)
def test_clips_that_do_not_fit_are_refused(tiny, clip, message):
    with pytest.raises(ValueError, match=message):
        traced(tiny(), clip)


def test_streams_of_different_length_are_refused(annotations_off, tiny):
    with pytest.raises(AssertionError, match=r"\(2, 8, 32, 32\), \(2, 4, 32, 32\)"):
        tiny().init(jax.random.key(0), RGB, FLOW[:, :4], train=False)


def test_odd_map_sizes_are_rounded_down(tiny):
    _, got = traced(tiny(), (1, 8, 50, 70))
    assert got["rgb_map"] == got["flow_map"] == (1, 8, 3, 4, 32)
    assert got["fused"] == (1, 8, 1, 2, 32)


# --- what serves inference and large scales ----------------------------------------------------


def leaf_sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, (4,)),
        ({"streams": "late"}, (4,)),
        ({"tpn.levels": (4, 2)}, (4,)),
        ({"tpn.window": 8, "tpn.levels": (1, 4, 8, 8)}, (8,)),
        ({"lstm.bidirectional": False}, (4,)),
        ({"lstm.cell": "mean"}, (4,)),
    ],
    ids=str,
)
def test_a_folded_pyramid_gives_the_same_answers_with_fewer_weights(tiny, changes, kept):
    network = tiny(changes)
    params = drawn(network)["params"]
    folded, fewer = fold_pyramid(network, params)
    part = folded.rgb if "streams" in changes else folded
    assert part.tpn.levels == kept
    assert leaf_sizes(fewer) < leaf_sizes(params)
    got = folded.apply({"params": fewer}, RGB, FLOW, train=False)[0]
    expected = network.apply({"params": params}, RGB, FLOW, train=False)[0]
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    # What is folded is not folded again.
    assert fold_pyramid(folded, fewer)[0] == folded


def test_levels_that_do_not_divide_the_finest_stay(tiny):
    network = tiny({"tpn.levels": (4,)})
    params = drawn(network)["params"]
    assert fold_pyramid(network, params) == (network, params)
    network = tiny({"tpn.psi": "max"})
    assert fold_pyramid(network, params)[0] is network
    rows = jnp.arange(6.0).reshape(6, 1) + 1  # bins of 1, 2 and 3, one row each
    np.testing.assert_allclose(
        _folded(rows, (1, 2, 3)).ravel(), [2, 3, 4 + 1 / 3, 5 + 1 / 3, 6 + 1 / 3]
    )


def test_folding_saves_60_8_million_weights_at_paper_size():
    network = build_model(PAPER_MODEL, 101)
    params = traced(network, (1, 24, 224, 224), 8)[0]["params"]
    fewer = jax.eval_shape(lambda params: fold_pyramid(network, params)[1], params)
    assert leaf_sizes(params) - leaf_sizes(fewer) == 60_813_312


@pytest.mark.parametrize("streams", ["both", "late"])
def test_views_that_share_frames_score_as_if_alone(tiny, streams):
    network = tiny({"streams": streams})
    variables = drawn(network)
    views = jnp.array(
        [[0, 1, 2, 3, 4, 5, 6, 7], [7, 7, 6, 5, 5, 3, 1, 0], [0, 0, 2, 2, 4, 4, 6, 6]]
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def score(rgb, flow, views=None):
        return network.apply(variables, rgb, flow, train=False, views=views)[0]

    got = score(RGB, FLOW, views)
    assert got.shape == (2 * 3, CLASSES)
    for number, view in enumerate(views):
        expected = score(RGB[:, view], FLOW[:, view])
        np.testing.assert_allclose(got[number::3], expected, atol=2e-4)


def test_views_compute_the_features_of_a_frame_once(tiny):
    network = tiny()
    clips = [jax.ShapeDtypeStruct((1, 8, 32, 32, c), jnp.float32) for c in (3, 4)]
    views = jnp.tile(jnp.arange(8), (5, 1))
    got = jax.eval_shape(
        lambda *x: network.apply(drawn(network), *x, train=False, views=views)[1], *clips
    )
    assert got["rgb_block5"].shape[:2] == got["flow_block4"].shape[:2] == (1, 8)
    assert got["rgb_map"].shape[:2] == got["flow_mst1"].shape[:2] == (5, 8)


def test_views_need_frames_that_do_not_depend_on_each_other(tiny):
    network = tiny(GROUP)
    with pytest.raises(ValueError, match="views share frames.*'group'"):
        network.apply(drawn(network), RGB, FLOW, train=False, views=jnp.zeros((1, 8), jnp.int32))


def test_without_recurrence_the_classifier_reads_the_mean_of_the_steps(tiny):
    network = tiny({"lstm.cell": "mean"})
    variables = drawn(network)
    got = features(network)
    pyramid = np.asarray(got["pyramid"])
    project = jax.tree.map(np.asarray, variables["params"]["head"]["project"])
    expected = pyramid.mean(axis=1) @ project["kernel"] + project["bias"]
    np.testing.assert_allclose(got["logits"], expected, rtol=1e-3, atol=1e-3)
    assert got["states"].shape == (2, 1, 1, pyramid.shape[-1])
    with pytest.raises(ValueError, match=r"head\.combine: got 'sum'.*lstm\.cell 'lstm'"):
        tiny({"lstm.cell": "mean", "lstm.hidden": CLASSES, "head.combine": "sum"})


def test_order_can_be_taken_away_everywhere(tiny):
    """Frames in another order: nothing changes once no part is left that sees it."""
    blind = {
        "mst.temporal": (1, 1, 1),
        "conv3d.temporal": 1,
        "fusion.kernel": (3, 3, 1),
        "tpn.levels": (1,),
        "lstm.cell": "mean",
    }
    order = np.random.default_rng(7).permutation(8)

    def change(changes):
        network = tiny(changes)
        one, other = features(network), evaluate(network, RGB[:, order], FLOW[:, order])
        return np.abs(one["logits"] - other["logits"]).max() / np.abs(one["logits"]).max()

    assert change(blind) < 1e-5
    for kept, usual in (("lstm.cell", "lstm"), ("conv3d.temporal", 3)):  # one part sees it
        assert change(blind | {kept: usual}) > 1e-3, kept


def test_late_fusion_is_two_networks_and_the_mean_of_their_probabilities(tiny):
    late = tiny({"streams": "late"})
    params = drawn(late)["params"]
    logits, got = late.apply({"params": params}, RGB, FLOW, train=False)
    assert late.scored == ("rgb_logits", "flow_logits")
    probabilities = []
    for name in ("rgb", "flow"):
        alone = tiny({"streams": name})
        expected, features = alone.apply({"params": params[name]}, RGB, FLOW, train=False)
        np.testing.assert_array_equal(got[f"{name}_logits"], expected)
        np.testing.assert_array_equal(got[f"{name}_fused"], features["fused"])
        probabilities.append(jax.nn.softmax(expected))
    np.testing.assert_allclose(jax.nn.softmax(logits), sum(probabilities) / 2, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(logits).sum(axis=1), 1, rtol=1e-5)


def test_each_network_of_late_fusion_learns_from_its_own_loss(tiny):
    late = tiny({"streams": "late", "head.pool": "per_step_loss"})
    assert late.scored == ("rgb_step_logits", "flow_step_logits")
    params, label = drawn(late)["params"], jnp.array([1, 3])

    def loss(network, params):
        features = network.apply({"params": params}, RGB, FLOW, train=False)[1]
        return cross_entropy([features[name] for name in network.scored], label).mean()

    def gradient(network, params):
        slope = jax.grad(functools.partial(loss, network))
        return jax.jit(slope, compiler_options=QUICK)(params)

    got = gradient(late, params)
    for name in ("rgb", "flow"):
        alone = tiny({"streams": name, "head.pool": "per_step_loss"})
        expected = gradient(alone, params[name])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7
            ),
            got[name],
            expected,
        )


@pytest.mark.slow  # the quick one: test_a_switch_changes_what_it_says_and_nothing_else
def test_bfloat16_computes_maps_low_and_everything_else_high(tiny):
    exact, low = tiny(GROUP), tiny(GROUP | {"precision": "bfloat16"})
    variables = drawn(exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn(low))} == {jnp.dtype("float32")}
    label = jnp.array([1, 3])

    def loss(network, params):
        logits, features = network.apply({"params": params}, RGB, FLOW, train=False)
        return cross_entropy([logits], label).mean(), features

    both = [
        jax.jit(
            jax.value_and_grad(functools.partial(loss, network), has_aux=True),
            compiler_options=QUICK,
        )(variables["params"])
        for network in (exact, low)
    ]
    (loss_exact, features_exact), (loss_low, features_low) = both[0][0], both[1][0]
    kinds = {name: feature.dtype.name for name, feature in features_low.items()}
    high = {"states", "step_logits", "logits"}
    assert {name for name, kind in kinds.items() if kind == "float32"} == high
    assert {kinds[name] for name in kinds.keys() - high} == {"bfloat16"}
    # 8 bits of mantissa: each of the 30 layers rounds by up to 0.4 %.
    assert 0 < abs(float(loss_low - loss_exact)) < 0.05 * float(loss_exact)
    for name in ("rgb_map", "flow_map", "states"):
        error = np.asarray(features_low[name], np.float32) - np.asarray(features_exact[name])
        assert 0 < np.abs(error).mean() < 0.05 * np.abs(features_exact[name]).mean(), name
    # Together: before a normalisation a bias has no gradient, only rounding.
    low, high = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for _, g in both[::-1]
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(both[1][1])} == {"float32"}
    # Roundings flip a few ReLUs and maxima, and the paths behind them.
    cosine = low @ high / np.linalg.norm(low) / np.linalg.norm(high)
    assert 0.9 < cosine < 0.9999


@functools.cache
def gradients(network):
    """Of the loss of RGB and FLOW, by the `drawn` parameters."""

    def loss(params):
        logits, _ = network.apply({"params": params}, RGB, FLOW, train=False)
        return cross_entropy([logits], jnp.array([1, 3])).mean()

    return jax.jit(jax.grad(loss), compiler_options=QUICK)(drawn(network)["params"])


@pytest.mark.parametrize(
    "how",
    [*(pytest.param(how, marks=pytest.mark.slow) for how in ("convolutions", "blocks")), "all"],
)
def test_forgetting_changes_no_gradient(tiny, how):
    network = tiny({"remat.spatial": how, "remat.temporal": how})
    assert network == tiny({"remat.spatial": how, "remat.temporal": how})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())),
        gradients(network),
        gradients(tiny()),
    )


def direction(params, part, chance):
    """A random step of one part of the parameters."""
    return {
        name: jax.tree.map(
            lambda leaf, here=name == part: jnp.asarray(chance.normal(size=leaf.shape)) * here, tree
        )
        for name, tree in params.items()
    }


def moved(params, step, size):
    return jax.tree.map(lambda p, d: p + size * d, params, step)


@pytest.mark.slow  # PyTorch's gradients are compared with in every run: test_torch_oracle.py
@pytest.mark.parametrize("changes", [{}, GROUP | {"head.pool": "per_step_loss", "tpn.psi": "max"}])
def test_gradients_are_slopes(tiny, changes):
    """The gradient of every part against differences of the loss, in float64."""
    network, label = tiny(changes), jnp.array([1, 3])
    with jax.enable_x64(True):
        params, rgb, flow = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (drawn(network)["params"], RGB, FLOW)
        )

        def plain_loss(params):
            features = network.apply({"params": params}, rgb, flow, train=False)[1]
            return cross_entropy([features[name] for name in network.scored], label).mean()

        loss = jax.jit(plain_loss, compiler_options=QUICK)
        gradient = jax.jit(jax.grad(plain_loss), compiler_options=QUICK)(params)
        chance = np.random.default_rng(0)
        for part in params:
            step, size = direction(params, part, chance), 1e-7
            difference = loss(moved(params, step, size)) - loss(moved(params, step, -size))
            pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True)
            slope = float(sum(jnp.vdot(g, d) for g, d in pairs))
            assert float(difference) / (2 * size) == pytest.approx(slope, rel=1e-4), part
