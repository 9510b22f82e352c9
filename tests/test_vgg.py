"""The trunk against Keras's own VGG16, and the port of its weights."""

import functools
import hashlib
import warnings

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax import vgg
from stf_jax.model import PAPER_MODEL, build_model
from stf_jax.streams import Conv3DSettings, MSTSettings, SpatialStream, TemporalSettings
from stf_jax.streams import TemporalStream as Temporal

CONV3D = Conv3DSettings(True, "spatial_first", True, "out", 32, 3)
KEY = jax.random.key(1, impl="rbg")  # the default generator takes three times as long to compile


@pytest.fixture(scope="module")
def keras_vgg(tmp_path_factory):
    """(images, each block's last convolution on them, path of the .h5 that Keras wrote)."""
    keras = pytest.importorskip("keras")
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("vgg") / "vgg.h5"
    last = ["block1_conv2", "block2_conv2", "block3_conv3", "block4_conv3", "block5_conv3"]
    images = rng.normal(0, 1, (2, 64, 64, 3)).astype(np.float32)
    with warnings.catch_warnings():
        # TensorFlow's variables do not know numpy 2's `copy` argument.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(64, 64, 3))
        for layer in model.layers:
            if layer.weights:
                kernel, bias = (w.shape for w in layer.weights)
                spread = (2 / np.prod(kernel[:-1])) ** 0.5
                layer.set_weights([rng.normal(0, spread, kernel), rng.normal(0, 0.1, bias)])
        model.save(path)
        outputs = keras.Model(model.input, [model.get_layer(name).output for name in last])(images)
        return images, [np.asarray(output) for output in outputs], path


def small_tensors():
    """Random tensors named as VGG-16's, of one sixteenth of its width."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in vgg.vgg16_shapes().items():
        small = [size // 16 if size > 3 else size for size in shape]
        spread = (2 / np.prod(small[:-1])) ** 0.5 if len(small) > 1 else 0.1
        tensors[name] = rng.normal(0, spread, small)
    return tensors


def write_h5(path, tensors, naming):
    with h5py.File(path, "w") as file:
        for name, value in tensors.items():
            layer, kind = name.split("/")
            file[naming.format(layer=layer, kind=kind, k1={"kernel": "W", "bias": "b"}[kind])] = (
                value
            )
    return path


def test_the_trunk_has_the_published_number_of_parameters():
    shapes = jax.eval_shape(
        lambda key: SpatialStream(64, 0).init(key, jnp.zeros((1, 1, 64, 64, 3))), jax.random.key(0)
    )["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_714_688
    named = {f"{a}/{b}": leaf.shape for a, kinds in shapes.items() for b, leaf in kinds.items()}
    assert named == vgg.vgg16_shapes()


def test_every_block_gives_what_keras_gives(keras_vgg):
    images, theirs, path = keras_vgg
    stream = SpatialStream(64, 0)
    clip = jnp.asarray(images)[None]  # two frames
    params = jax.eval_shape(stream.init, jax.random.key(0), clip)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    ported, fates = vgg.port_vgg16(
        {"spatial": params}, vgg.read_vgg16(path), temporal_init="he", conv1_init="random"
    )
    assert len(fates) == 26
    assert all(f"spatial/{fate.removeprefix('copied from ')}" == p for p, fate in fates.items())
    ours = jax.jit(stream.apply)({"params": ported["spatial"]}, clip)
    for number, expected in enumerate(theirs, start=1):
        difference = np.abs(np.asarray(ours[f"block{number}"][0]) - expected).max()
        assert difference < 1e-4 * np.abs(expected).max(), f"block{number}"


@pytest.mark.parametrize(
    "naming",
    ["{layer}/{layer}_{k1}_1:0", "{layer}/{layer}/{kind}:0", "model_weights/{layer}/{kind}"],
)
def test_every_habit_of_naming_is_read(tmp_path, monkeypatch, naming):
    tensors = small_tensors()
    monkeypatch.setattr(vgg, "_WIDTH", 4)
    path = write_h5(tmp_path / "w.h5", tensors, naming)
    with h5py.File(path, "a") as file:  # what surrounds the weights in real files
        file["optimizer_weights/block1_conv1/kernel:0"] = np.zeros((3, 3, 3, 4))
        file.create_group("block1_pool")
    read = vgg.read_vgg16(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value.astype(np.float32), err_msg=name)


def test_a_damaged_file_is_refused_with_the_tensors_names(tmp_path, monkeypatch):
    tensors = small_tensors()
    monkeypatch.setattr(vgg, "_WIDTH", 4)
    del tensors["block3_conv2/bias"]
    tensors["block2_conv1/kernel"] = np.zeros((3, 3, 4, 9))
    path = write_h5(tmp_path / "w.h5", tensors, "{layer}/{kind}:0")
    with h5py.File(path, "a") as file:
        file["again/block5_conv3/bias:0"] = np.zeros(32)
    with pytest.raises(ValueError, match="13 convolutions") as caught:
        vgg.read_vgg16(path)
    assert "missing: block3_conv2/bias" in str(caught.value)
    assert "block2_conv1/kernel is (3, 3, 4, 9), expected (3, 3, 4, 8)" in str(caught.value)
    assert "doubled: block5_conv3/bias" in str(caught.value)
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    with pytest.raises(ValueError, match="text.h5 cannot be read as an HDF5 file"):
        vgg.read_vgg16(text)
    with pytest.raises(FileNotFoundError, match="absent.h5"):
        vgg.read_vgg16(tmp_path / "absent.h5")


def test_where_weights_come_from(tmp_path, monkeypatch):
    file = tmp_path / "models" / vgg.KERAS_FILE
    file.parent.mkdir()
    file.write_bytes(b"weights")
    md5 = hashlib.md5(b"weights").hexdigest()
    assert vgg.find_vgg16("none") is None
    assert vgg.find_vgg16(str(file), md5=md5) == file
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert vgg.find_vgg16("keras", md5=md5) == file
    for setting in (str(file), "keras"):
        with pytest.raises(ValueError, match=f"md5 is {md5}, expected {vgg.KERAS_MD5}"):
            vgg.find_vgg16(setting)
    with pytest.raises(FileNotFoundError, match=r"/nowhere/w\.h5: there is no such file"):
        vgg.find_vgg16("/nowhere/w.h5")


def test_without_internet_the_error_says_what_to_do(tmp_path, monkeypatch):
    keras = pytest.importorskip("keras")

    def offline(*_, **__):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.utils, "get_file", offline)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        vgg.find_vgg16("keras")
    for part in (str(tmp_path / "models" / vgg.KERAS_FILE), vgg.KERAS_MD5, "none", vgg.KERAS_URL):
        assert part in str(caught.value)


def test_a_download_lands_where_it_is_looked_for(tmp_path, monkeypatch):
    keras = pytest.importorskip("keras")

    def download(name, url, *, cache_subdir, file_hash):
        assert (url, file_hash) == (vgg.KERAS_URL, hashlib.md5(b"weights").hexdigest())
        path = tmp_path / cache_subdir / name
        path.parent.mkdir()
        path.write_bytes(b"weights")

    monkeypatch.setattr(keras.utils, "get_file", download)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    found = vgg.find_vgg16("keras", md5=hashlib.md5(b"weights").hexdigest())
    assert found == tmp_path / "models" / vgg.KERAS_FILE


def temporal_stream(spatial=(1, 3, 5), conv3d=CONV3D, init="he", norm_groups=0):
    mst = MSTSettings(spatial, (3, 3, 5), 32)
    return Temporal(4, mst, conv3d, TemporalSettings("after_mst1", init, "random"), norm_groups)


def test_fates_name_every_leaf_and_random_layers_stay(tiny_model_config):
    network = build_model({**tiny_model_config, "norm": "group"}, 3)
    zeros = jnp.zeros((1, 8, 32, 32, 3)), jnp.zeros((1, 8, 32, 32, 2))
    params = jax.jit(lambda key: network.init(key, *zeros, train=False))(KEY)
    params = params["params"]
    tensors = small_tensors()
    ported, fates = vgg.port_vgg16(params, tensors, temporal_init="he", conv1_init="random")
    before, after = (
        {"/".join(k.key for k in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, ported)
    )
    assert fates.keys() == before.keys() == after.keys()
    for path, fate in fates.items():
        if fate.startswith("copied from "):
            source = tensors[fate.removeprefix("copied from ")]
            assert path.endswith(fate.removeprefix("copied from "))
            np.testing.assert_array_equal(after[path], source.astype(np.float32), err_msg=path)
        else:
            assert fate == "initialised at random"
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    copied = sorted(path for path, fate in fates.items() if fate.startswith("copied"))
    in_temporal = {path.split("/")[1] for path in copied if path.startswith("temporal")}
    assert len(copied) == 26 + 16
    assert in_temporal == {
        *("block1_conv2", "block2_conv1", "block2_conv2"),
        *("block3_conv1", "block3_conv2", "block3_conv3", "block4_conv1", "block4_conv2"),
    }


@pytest.mark.parametrize(
    "conv3d",
    [
        CONV3D,
        Conv3DSettings(True, "temporal_first", True, "out", 32, 3),
        Conv3DSettings(False, "spatial_first", True, "out", 32, 3),
    ],
)
def test_an_inflated_stream_is_vgg_on_grey_frames(conv3d):
    tensors = small_tensors()
    grey = jax.random.normal(jax.random.key(1), (1, 3, 32, 32, 1)).repeat(3, axis=-1)
    spatial, temporal = SpatialStream(4, 0), temporal_stream((3, 3, 5), conv3d, "inflate")
    params = {
        "spatial": jax.jit(spatial.init)(KEY, grey)["params"],
        "temporal": jax.jit(temporal.init)(KEY, grey)["params"],
    }
    ported, fates = vgg.port_vgg16(params, tensors, temporal_init="inflate", conv1_init="rgb_mean")
    assert fates["temporal/block1_conv1/kernel"] == "averaged over colours from block1_conv1/kernel"
    branch = "spatial" if conv3d.factorised else "full"
    expected = {"mst1": "block4_conv3", "conv3d1": "block5_conv1"}
    expected |= {"mst2": "block5_conv2", "conv3d2": "block5_conv3"}
    for layer, source in expected.items():
        within = f"{layer}/branch1" if layer.startswith("mst") else layer
        assert fates[f"temporal/{within}/{branch}/kernel"] == f"inflated from {source}/kernel"
    rgb = jax.jit(spatial.apply)({"params": ported["spatial"]}, grey)["block5"]
    flow = jax.jit(temporal.apply)({"params": ported["temporal"]}, grey)["conv3d2"]
    np.testing.assert_allclose(flow, rgb, rtol=1e-4, atol=1e-5 * float(rgb.max()))
    assert float(rgb.max()) > 0


def test_a_single_tap_answers_a_constant_image_as_the_whole_kernel_does():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4))
    single = vgg._fit_space(kernel, 1)
    np.testing.assert_allclose(single[0, 0], kernel.sum(axis=(0, 1)))


def test_weights_of_another_width_are_refused():
    stream = SpatialStream(8, 0)
    clip = jnp.zeros((1, 1, 32, 32, 3))
    shapes = jax.eval_shape(stream.init, jax.random.key(0), clip)["params"]
    params = {"spatial": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)}
    with pytest.raises(ValueError, match=r"spatial/block1_conv1/bias is \(8,\).*gives \(4,\)"):
        vgg.port_vgg16(params, small_tensors(), temporal_init="he", conv1_init="random")


def test_the_paper_size_network_takes_every_tensor():
    network = build_model(PAPER_MODEL, 101)
    clip = (1, 24, 224, 224)
    params = jax.eval_shape(
        lambda key: network.init(key, jnp.zeros((*clip, 3)), jnp.zeros((*clip, 8)), train=False),
        jax.random.key(0),
    )["params"]
    # Only the shapes matter here: numbers that take no memory.
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    trunks = {group: params[group] for group in ("spatial", "temporal")}
    trunks["temporal"] = {k: v for k, v in trunks["temporal"].items() if k.startswith("block")}
    tensors = {
        name: np.broadcast_to(np.float32(1), shape) for name, shape in vgg.vgg16_shapes().items()
    }
    ported, fates = vgg.port_vgg16(trunks, tensors, temporal_init="he", conv1_init="random")
    assert sum(fate.startswith("copied") for fate in fates.values()) == 26 + 16
    ones = sum(int(jnp.sum(leaf)) for leaf in jax.tree.leaves(ported))
    # 9 convolutions of the temporal stream less its first, of 8 flow channels (SPEC section 9).
    assert ones == 14_714_688 + 5_276_032 - (3 * 3 * 4 * 64 + 64)


def test_pooling_drops_an_odd_last_row_and_column():
    x = jnp.arange(15.0).reshape(1, 1, 3, 5, 1)
    assert vgg.pool2x2(x).ravel().tolist() == [6.0, 8.0]
    assert vgg.pool2x2(x, "mean").ravel().tolist() == [3.0, 5.0]


def test_group_normalisation_takes_the_statistics_of_one_clip_and_group():
    conv = vgg.Convolution(12, (3, 3), norm_groups=8, relu=False)
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 6, 5)) * 4 + 1
    params = jax.jit(conv.init)(KEY, x)
    apply = jax.jit(conv.apply)
    y = np.asarray(apply(params, x))
    groups = y.reshape(2, 3, 36, 6, 2)  # 6 is the largest divisor of 12 up to 8
    np.testing.assert_allclose(groups.mean(axis=(1, 2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var(axis=(1, 2, 4)), 1, atol=1e-3)
    assert np.abs(groups.mean(axis=(2, 4))).max() > 0.01  # frames may differ in their means
    changed = apply(params, x.at[1, 2].add(3.0 * x[1, 1]))
    np.testing.assert_array_equal(changed[0], y[0])
    assert (np.abs(changed[1] - y[1]).max(axis=(1, 2, 3)) > 0.1).all()


def test_a_kernel_of_another_rank_is_refused():
    with pytest.raises(ValueError, match=r"kernel is 'h w i o'.*\(3, 3\)"):
        vgg.convolve(jnp.zeros((1, 1, 4, 4, 3)), jnp.zeros((3, 3)))


@pytest.mark.parametrize("last", ["block5_conv3", "block4_conv2"])
def test_without_a_backward_pass_a_cpu_takes_a_few_frames_at_a_time(monkeypatch, last):
    class Trunk(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return vgg.vgg_blocks(x, width=4, last=last, norm_groups=0, train=train)

    x = jax.random.normal(KEY, (2, 6, 32, 32, 3))
    monkeypatch.setattr(vgg, "_FRAMES", 2 * 2 * 32 * 32 * 4 * 4)  # two frames of two clips
    params = jax.jit(functools.partial(Trunk().init, train=False))(KEY, x)
    whole, pieces = (
        jax.jit(functools.partial(Trunk().apply, train=train)) for train in (True, False)
    )
    expected, got = whole(params, x), pieces(params, x)
    assert list(got) == list(expected)
    for name, block in expected.items():
        np.testing.assert_allclose(got[name], block, atol=1e-6 * float(jnp.abs(block).max()))
    assert "2x2x32x32x4xf32" in pieces.lower(params, x).as_text()
    on_gpu = jax.export.export(pieces, platforms=["cuda"])(params, x).mlir_module()
    assert "stablehlo.while" not in on_gpu and on_gpu.count("stablehlo.convolution") == len(
        params["params"]
    )


def test_large_maps_are_pooled_frame_by_frame_on_a_cpu_only(monkeypatch):
    x, dy = (jax.random.normal(KEY, (2, 3, height, height, 4)) for height in (6, 3))

    def run(x, dy):
        y, pull = jax.vjp(lambda x: vgg.pool2x2(x), x)
        return y, *pull(dy)

    expected = jax.jit(lambda *a: run(*a))(x, dy)
    monkeypatch.setattr(vgg, "_LARGE", 1)
    frames = jax.jit(lambda *a: run(*a))
    for one, other in zip(frames(x, dy), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    for platform, loops in (("cpu", 1), ("cuda", 0)):
        text = jax.export.export(frames, platforms=[platform])(x, dy).mlir_module()
        assert text.count("stablehlo.while") == loops
