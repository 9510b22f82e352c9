"""The VGG-16 trunk, the convolution that every layer uses, and the port of the Keras weights."""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.convolution import convolve, is_open

KERAS_FILE = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
KERAS_MD5 = "6d6bbae143d832006294945121d1f1fc"
KERAS_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/vgg16/{KERAS_FILE}"

Tensor = np.ndarray | Array

HE_NORMAL = nn.initializers.he_normal()

_EPSILON = 1e-5  # of normalisations

# Names of intermediates that a `remat` policy may keep.
CONVOLUTION, BLOCK = "convolution", "block"

# Channels of a block in multiples of the first block's, and its number of convolutions.
_BLOCKS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
_WIDTH = 64  # channels of the first block in the published network

# Without a backward pass, frames go through the blocks in pieces whose largest map has this size at
# most, bytes: below it, matrix products of the last blocks become too small to be fast.
_FRAMES = 80 * 2**20

# From which size on, bytes, a CPU pools a map frame by frame.
_LARGE = 2**24


def check_setting(ok: bool, key: str, got: object, allowed: str) -> None:
    """Raises a ValueError that names the key, what came and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"model.{key}: got {got!r}, allowed: {allowed}")


def check_choice(key: str, got: object, allowed: tuple[str, ...]) -> None:
    """As `check_setting`, for one of several words."""
    check_setting(got in allowed, key, got, ", ".join(map(repr, allowed)))


def is_count(value: object) -> bool:
    """Whether a setting's value is an integer of at least 1 (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def pool2x2(x: Float[Array, "b t h w c"], how: str = "max") -> Float[Array, "b t hh ww c"]:
    """Halves h and w by the 'max' or 'mean' of 2x2 cells; an odd last row or column is dropped.

    Example:
      >>> pool2x2(jnp.arange(9.0).reshape(1, 1, 3, 3, 1)).ravel().tolist()
      [4.0]
    """
    x = even_size(x)
    if how == "mean":
        return reduce(x, "b t (h h2) (w w2) c -> b t h w c", "mean", h2=2, w2=2)
    return _max_pool(x)


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    return _max_pool_forward(x)[0]


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of every 2x2 cells, and which of the four it was (the first, if several are).

    JAX's own gradient of a maximum looks for the values equal to it. XLA may compute these values
    again, a rounding apart, and then the gradient is lost; besides, an index takes a sixteenth of
    the memory.
    """
    if is_open(x) or x.nbytes < _LARGE:
        return _largest_of_cells(x)

    def frame_by_frame(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        best, place = lax.map(_largest_of_cells, rearrange(x, "b t h w c -> t b 1 h w c"))
        return tuple(rearrange(a, "t b 1 h w c -> b t h w c") for a in (best, place))

    # XLA would find the place only when the backward pass reads it, and keep the whole map until
    # then. It does not put off what a loop returns.
    return lax.platform_dependent(x, cpu=frame_by_frame, default=_largest_of_cells)


def _largest_of_cells(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    best, place = x[:, :, ::2, ::2], jnp.zeros((), jnp.uint8)
    for number, (row, column) in enumerate(((0, 1), (1, 0), (1, 1)), start=1):
        cell = x[:, :, row::2, column::2]
        place = jnp.where(cell > best, jnp.uint8(number), place)
        best = jnp.maximum(best, cell)
    return best, place


def _max_pool_backward(place: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    cells = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 1, 2, 1, 2, 1)
    spread = [rearrange(a, "b t h w c -> b t h 1 w 1 c") for a in (place, dy)]
    dx = jnp.where(spread[0] == cells, spread[1], jnp.zeros((), dy.dtype))
    return (rearrange(dx, "b t h h2 w w2 c -> b t (h h2) (w w2) c"),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def even_size(x: Float[Array, "b t h w c"]) -> Float[Array, "b t hh ww c"]:
    """Drops an odd last row and column, as pooling with floor does."""
    return x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0); its gradient reads what comes out, which the next layer keeps anyway."""
    return jnp.maximum(x, 0)


relu.defvjp(
    lambda x: (jnp.maximum(x, 0),) * 2,
    lambda y, dy: (jnp.where(y > 0, dy, jnp.zeros((), dy.dtype)),),
)


class GroupNorm(nn.Module):
    """Group normalisation over a whole clip: statistics of its channel groups over t, h and w.

    Attributes:
      max_groups: there are as many groups as the largest divisor of the channels up to it.

    Source: Wu and He, Group Normalization (2018); not in the paper.
    """

    max_groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Normalises, at least in float32, to the type of `x`; gains start at 1, biases at 0."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        groups = max(n for n in range(1, self.max_groups + 1) if channels % n == 0)
        return _group_norm(groups, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _group_norm(groups: int, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _group_norm_forward(groups, x, scale, bias)[0]


def _group_norm_forward(
    groups: int, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, Any]:
    exact = x.astype(scale.dtype)
    mean = _group_mean(exact.mean((1, 2, 3)), groups)
    variance = _group_mean(jnp.square(exact - _clipwise(mean)).mean((1, 2, 3)), groups)
    inverse = lax.rsqrt(variance + _EPSILON)
    y = (exact - _clipwise(mean)) * _clipwise(inverse * scale[None]) + bias.reshape(1, 1, 1, 1, -1)
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _group_norm_backward(
    groups: int, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, mean, inverse = residuals
    dy = dy.astype(scale.dtype)
    normal = (x.astype(scale.dtype) - _clipwise(mean)) * _clipwise(inverse)
    from_bias, from_scale = dy.sum((1, 2, 3)), (dy * normal).sum((1, 2, 3))
    places = math.prod(x.shape[1:4])
    level = _group_mean(from_bias * scale[None], groups) / places
    slope = _group_mean(from_scale * scale[None], groups) / places
    dx = _clipwise(inverse * scale[None]) * dy - _clipwise(inverse) * (
        _clipwise(level) + normal * _clipwise(slope)
    )
    return dx.astype(x.dtype), from_scale.sum(0), from_bias.sum(0)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _group_mean(x: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """Every channel gets the mean of its group."""
    means = reduce(x, "b (g c) -> b g", "mean", g=groups)
    return jnp.repeat(means, x.shape[1] // groups, axis=1)


def _clipwise(x: Float[Array, "b c"]) -> Float[Array, "b 1 1 1 c"]:
    return x[:, None, None, None]


class Convolution(nn.Module):
    """Convolution with bias, then optional group normalisation, then optional ReLU.

    Attributes:
      features: output channels.
      kernel_size: (h, w), (t,) or (t, h, w).
      norm_groups: most groups of the normalisation, which takes the largest divisor of `features`
        up to it; 0 is no normalisation (the paper's). Statistics are those of the whole clip: those
        of one frame would take away how its motion compares with that of other frames.
      relu: whether to clip below zero.
      stride: step in h and w.
      kernel_init: how the kernel starts; biases start at zero.
      dtype: of the convolution, the ReLU and the output, such as bfloat16; None is that of the
        input. Parameters and normalisation keep theirs.
    """

    features: int
    kernel_size: tuple[int, ...]
    norm_groups: int = 0
    relu: bool = True
    stride: int = 1
    kernel_init: nn.initializers.Initializer = HE_NORMAL
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t hh ww o"]:
        """Maps a clip to a clip."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        dtype = x.dtype if self.dtype is None else self.dtype
        weights = kernel.astype(dtype), bias.astype(dtype)
        y = convolve(x.astype(dtype), *weights, stride=self.stride)
        y = checkpoint_name(y, CONVOLUTION)
        if self.norm_groups:
            y = GroupNorm(self.norm_groups, name="norm")(y)
        return relu(y) if self.relu else y


class ClipDropout(nn.Module):
    """Dropout whose draws for a clip depend on the clip's place in the batch and on nothing else.

    So they are the same in whatever parts a batch is worked through.

    Attributes:
      rate: probability for each number.
      whole: of whole clips instead; what is left keeps its size then, as in evaluation.
    """

    rate: float
    whole: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, " b *rest"], rows: Int[Array, " b"]
    ) -> Float[Array, " b *rest"]:
        """Drops numbers of clips that stand in the places `rows` of the batch."""
        if not self.rate:
            return x
        key = self.make_rng("dropout")

        shape = (1,) * (x.ndim - 1) if self.whole else x.shape[1:]

        def kept(row: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - self.rate, shape)

        left = x if self.whole else x / (1 - self.rate)
        return jnp.where(jax.vmap(kept)(rows), left, jnp.zeros_like(x))


def vgg_blocks(
    x: Float[Array, "b t h w i"],
    *,
    width: int,
    last: str,
    norm_groups: int,
    train: bool,
    dtype: DTypeLike | None = None,
    first_init: nn.initializers.Initializer = HE_NORMAL,
) -> dict[str, Float[Array, "b t _h _w _c"]]:
    """The convolutions of VGG-16 from 'block1_conv1' to `last`, on each frame by itself.

    Called inside a module's `nn.compact` method, which then owns the layers under Keras's names.
    Blocks are 3x3 convolutions with ReLU; a 2x2 max-pool comes between blocks, none after the end.

    Args:
      x: float32 `b t h w i`.
      width: channels of block 1; the blocks have `width` times 1, 2, 4, 8, 8.
      last: name of the last convolution, such as 'block5_conv3'.
      norm_groups: as in `Convolution`.
      train: whether a backward pass follows. If none does, a CPU takes a few frames at a time
        through all blocks and keeps less.
      dtype: as in `Convolution`.
      first_init: how the first kernel starts; the others are He-normal.

    Returns:
      The output of every block: 'block1' to the block of `last`.

    Source: SPEC 3.4, 3.5. Differs: no.
    """
    layers: dict[str, Convolution] = {}
    for block, (multiple, count) in enumerate(_BLOCKS, start=1):
        for conv in range(1, count + 1):
            if last in layers:
                break
            name = f"block{block}_conv{conv}"
            layers[name] = Convolution(
                width * multiple,
                (3, 3),
                norm_groups=norm_groups,
                relu=False,
                kernel_init=HE_NORMAL if layers else first_init,
                dtype=dtype,
                name=name,
            )
    if last not in layers:
        raise ValueError(f"VGG-16 has no convolution {last!r}: block1_conv1 to block5_conv3")
    if is_open(x):
        return _through(layers, x)
    frames, largest = x.shape[1], math.prod(x.shape[:-1]) * width * x.dtype.itemsize
    fitting = (n for n in range(1, frames + 1) if frames % n == 0 and largest <= n * _FRAMES)
    pieces = next(fitting, frames)
    # Statistics of a normalisation are those of the whole clip.
    if train or norm_groups or pieces == 1 or layers[last].is_initializing():
        return _through(layers, x)
    return _through_in_pieces(layers, x, pieces)


def _through(layers: Mapping[str, Callable[[Array], Array]], x: Array) -> dict[str, Array]:
    """The outputs of the blocks that layers, each without its ReLU, make up."""
    outputs = {}
    for name, following in itertools.zip_longest(layers, list(layers)[1:], fillvalue=""):
        x = layers[name](x)
        block = name.partition("_")[0]
        if following.startswith(block):
            x = relu(x)
        elif following:
            outputs[block] = relu(x)
            # The larger of two values is clipped like each of them: pooling first leaves a
            # quarter to be clipped, and to be kept for the backward pass.
            x = checkpoint_name(relu(pool2x2(x)), BLOCK)
        else:
            outputs[block] = checkpoint_name(relu(x), BLOCK)
    return outputs


def _through_in_pieces(
    layers: Mapping[str, Convolution], x: Array, pieces: int
) -> dict[str, Array]:
    """As `_through`, on a CPU for equal pieces of the frames, one after the other."""
    unbound = {name: layer.unbind() for name, layer in layers.items()}
    weights = {name: variables for name, (_, variables) in unbound.items()}

    def whole(x: Array, weights: Mapping[str, Any]) -> dict[str, Array]:
        def layer(name: str, x: Array) -> Array:
            with jax.named_scope(name):  # which its module has lost with its parent
                module: Any = unbound[name][0]
                return module.apply(weights[name], x)

        return _through({name: functools.partial(layer, name) for name in layers}, x)

    def in_pieces(x: Array, weights: Mapping[str, Any]) -> dict[str, Array]:
        cut = rearrange(x, "b (n t) h w c -> n b t h w c", n=pieces)
        outputs = lax.map(lambda piece: whole(piece, weights), cut)
        return {k: rearrange(y, "n b t h w c -> b (n t) h w c") for k, y in outputs.items()}

    return lax.platform_dependent(x, weights, cpu=in_pieces, default=whole)


def vgg16_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the published network without its dense layers, by name.

    Example:
      >>> shapes = vgg16_shapes()
      >>> shapes["block1_conv1/kernel"], sum(int(np.prod(s)) for s in shapes.values())
      ((3, 3, 3, 64), 14714688)
    """
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for block, (multiple, count) in enumerate(_BLOCKS, start=1):
        for conv in range(1, count + 1):
            features = _WIDTH * multiple
            shapes[f"block{block}_conv{conv}/kernel"] = (3, 3, channels, features)
            shapes[f"block{block}_conv{conv}/bias"] = (features,)
            channels = features
    return shapes


def read_vgg16(path: Path | str) -> dict[str, np.ndarray]:
    """Reads VGG-16's convolutions from a Keras .h5 file.

    Args:
      path: the `notop` weights that Keras distributes, or a whole VGG-16 that Keras saved as .h5.
        The layer's name is looked for in the path of each data set and the rank tells kernel (4)
        from bias (1), so the habits of Keras 1, 2 and 3 are all understood; `.weights.h5` files of
        Keras 3 are not, because they hold no layer names.

    Returns:
      26 float32 arrays: 'block1_conv1/kernel' (h w i o), 'block1_conv1/bias' (o), ...

    Raises:
      FileNotFoundError: no such file.
      ValueError: not HDF5, or a tensor is missing, doubled or of another shape (names them).

    Source: SPEC 3.6.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of VGG-16 weights")
    try:
        with h5py.File(path, "r") as file:
            found = _conv_datasets(file)
            faults = _tensor_faults(found)
            if faults:
                shown = "\n  ".join(faults[:10])
                more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
                raise ValueError(
                    f"{path} does not hold the 13 convolutions of VGG-16:\n  {shown}{more}\n"
                    f"Expected is Keras's {KERAS_FILE}."
                )
            return {name: np.asarray(sets[0], np.float32) for name, sets in found.items()}
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an HDF5 file: {error}") from error


def _conv_datasets(file: h5py.File) -> dict[str, list[h5py.Dataset]]:
    found: dict[str, list[h5py.Dataset]] = {name: [] for name in vgg16_shapes()}

    def visit(name: str, item: object) -> None:
        layer = re.search(r"(?:^|/)(block\d_conv\d)(?=/)", name)
        if not isinstance(item, h5py.Dataset) or not layer or name.startswith("optimizer"):
            return
        kind = {4: "kernel", 1: "bias"}.get(item.ndim, f"rank {item.ndim}")
        found.setdefault(f"{layer[1]}/{kind}", []).append(item)

    file.visititems(visit)
    return found


def _tensor_faults(found: Mapping[str, list[h5py.Dataset]]) -> list[str]:
    expected = vgg16_shapes()
    faults = []
    for name, sets in found.items():
        if name not in expected:
            faults.append(f"unexpected: {name}")
        elif len(sets) != 1:
            faults.append(f"{'doubled' if sets else 'missing'}: {name}")
        elif sets[0].shape != expected[name]:
            faults.append(f"{name} is {sets[0].shape}, expected {expected[name]}")
    return faults


def find_vgg16(setting: str, *, md5: str = KERAS_MD5) -> Path | None:
    """Decides which file of ImageNet weights to use, and makes sure that it is the right one.

    Args:
      setting: 'none' (train from scratch), 'keras' (Keras's own cache, `~/.keras/models` or below
        `$KERAS_HOME`, filled by a download of 56 MiB if need be), or the path of a file.
      md5: digest that the file must have.

    Returns:
      The file, or None for 'none'.

    Raises:
      FileNotFoundError: no such file, or it cannot be downloaded (says which file to put where).
      ValueError: the file has another digest (names both).

    Source: SPEC 3.6.
    """
    if setting == "none":
        return None
    if setting != "keras":
        return _checked(Path(setting).expanduser(), md5)
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser()
    path = home / "models" / KERAS_FILE
    if not path.exists():
        _download(path, md5)
    return _checked(path, md5)


def _download(path: Path, md5: str) -> None:
    # Keras brings TensorFlow with it, which nothing else here needs.
    import keras

    try:
        keras.utils.get_file(KERAS_FILE, KERAS_URL, cache_subdir="models", file_hash=md5)
    except Exception as error:  # Keras raises a bare Exception when it cannot download.
        raise FileNotFoundError(
            f"VGG-16's ImageNet weights are not at {path} and could not be downloaded ({error}). "
            f"Fetch {KERAS_URL} on a machine with internet access and put it at {path} (md5 "
            f"{md5}); or name another place with --config.pretrained=FILE; or train from scratch "
            "with --config.pretrained=none."
        ) from error


def _checked(path: Path, md5: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file of VGG-16 weights. Expected is Keras's {KERAS_FILE} "
            f"(md5 {md5}); 'keras' downloads it, 'none' trains from scratch."
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != md5:
        raise ValueError(
            f"{path} is not Keras's {KERAS_FILE}: its md5 is {digest}, expected {md5}. Delete it "
            "and fetch it again, or name another file."
        )
    return path


# The 3-D layers stand in the places of these convolutions (SPEC 4.1).
_REPLACED = {
    "mst1": "block4_conv3",
    "conv3d1": "block5_conv1",
    "mst2": "block5_conv2",
    "conv3d2": "block5_conv3",
}


@dataclasses.dataclass(frozen=True)
class _Ported:
    value: Tensor
    fate: str


def port_vgg16(
    params: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    temporal_init: str,
    conv1_init: str,
) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Puts VGG-16's weights into the places that have a counterpart.

    All 13 convolutions go into `spatial`, block1_conv2 to block4_conv2 into `temporal`. On request
    the 3-D layers and the first flow convolution start from VGG-16 too. Everything else stays.

    Args:
      params: the network's parameters, with or without each stream.
      tensors: what `read_vgg16` returns.
      temporal_init: `model.temporal.init`; 'inflate' fills the 3-D layers with the kernels of the
        convolutions that they replace, acting on single frames at first.
      conv1_init: `model.temporal.conv1_init`; 'rgb_mean' gives every flow channel the mean of the
        three colour kernels.

    Returns:
      New parameters, and the fate of every leaf by its path, such as 'copied from
      block3_conv2/kernel' or 'initialised at random'.

    Raises:
      ValueError: a tensor does not fit its place (names both).

    Source: SPEC 3.6, 4.12.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    values, fates = [], {}
    for path, leaf in leaves:
        name = "/".join(key.key for key in path)
        ported = _port_leaf(name, leaf, tensors, temporal_init, conv1_init)
        if np.shape(ported.value) != np.shape(leaf):
            raise ValueError(
                f"VGG-16's ImageNet weights do not fit: {name} is {np.shape(leaf)}, "
                f"but '{ported.fate}' gives {np.shape(ported.value)}. They need model.width=64 "
                "(and widths of 512 for 'inflate'); --config.pretrained=none trains from scratch."
            )
        values.append(jnp.asarray(ported.value, leaf.dtype))
        fates[name] = ported.fate
    return jax.tree_util.tree_unflatten(tree, values), fates


def vgg16_fates(params: Mapping[str, Any], temporal_init: str, conv1_init: str) -> dict[str, str]:
    """What `port_vgg16` would say of each parameter, given their shapes; no weights are read.

    Raises:
      ValueError: as `port_vgg16`.
    """
    # Broadcast zeros have every shape and take no memory.
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in vgg16_shapes().items()}
    like = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    fates: dict[str, str] = {}

    def port() -> None:
        fates.update(port_vgg16(like, zeros, temporal_init=temporal_init, conv1_init=conv1_init)[1])

    jax.eval_shape(port)  # abstract: even what is inflated is not computed
    return fates


def _port_leaf(
    name: str,
    leaf: Tensor,
    tensors: Mapping[str, Tensor],
    temporal_init: str,
    conv1_init: str,
) -> _Ported:
    # The networks of late fusion are called as their streams' inputs are.
    group, layer, *rest = name.removeprefix("rgb/").removeprefix("flow/").split("/")
    tensor = f"{layer}/{rest[-1]}" if rest else ""
    untouched = _Ported(leaf, "initialised at random")
    if group not in ("spatial", "temporal") or "norm" in rest:
        return untouched
    if group == "spatial" or (tensor in tensors and layer != "block1_conv1"):
        return _Ported(tensors[tensor], f"copied from {tensor}")
    if layer == "block1_conv1" and conv1_init == "rgb_mean":
        return _first_from_colour(leaf, tensor, tensors[tensor])
    if layer in _REPLACED and temporal_init == "inflate":
        if rest[-2] == "temporal":
            return _Ported(leaf, "initialised as identity in time")
        return _inflated(leaf, f"{_REPLACED[layer]}/{rest[-1]}", tensors)
    return untouched


def _first_from_colour(leaf: Tensor, name: str, source: Tensor) -> _Ported:
    if source.ndim == 1:
        return _Ported(source, f"copied from {name}")
    mean = source.mean(axis=2, keepdims=True)
    return _Ported(np.repeat(mean, leaf.shape[2], axis=2), f"averaged over colours from {name}")


def _inflated(leaf: Tensor, name: str, tensors: Mapping[str, Tensor]) -> _Ported:
    fate = f"inflated from {name}"
    source = tensors[name]
    if source.ndim == 1:
        return _Ported(source, fate)
    size, inputs = leaf.shape[-4], leaf.shape[-2]
    kernel = _fit_space(source, size)
    copies = max(1, inputs // kernel.shape[2])
    kernel = np.tile(kernel, (1, 1, copies, 1)) / copies
    if leaf.ndim == 5:
        frames = np.zeros((leaf.shape[0], *kernel.shape), np.float32)
        frames[len(frames) // 2] = kernel
        return _Ported(frames, fate)
    return _Ported(kernel, fate)


def _fit_space(kernel: Tensor, size: int) -> Tensor:
    """Pads with zeros, or sums to a single tap: a constant image gives what it gave before."""
    if size == 1:
        return kernel.sum(axis=(0, 1), keepdims=True)
    margin = (size - kernel.shape[0]) // 2
    return np.pad(kernel, ((margin, margin), (margin, margin), (0, 0), (0, 0)))
