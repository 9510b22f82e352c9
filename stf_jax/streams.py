"""The two streams: VGG-16 on single frames, and its 3-D relative on optical flow."""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.vgg import (
    BLOCK,
    HE_NORMAL,
    Convolution,
    check_choice,
    check_setting,
    is_count,
    pool2x2,
    vgg_blocks,
)


@dataclasses.dataclass(frozen=True)
class MSTSettings:
    """The multi-scale spatio-temporal layer MST_3DCNN (SPEC 4.8 to 4.10).

    Args:
      spatial: height and width of each branch's kernel, px of its input; odd.
      temporal: length of each branch's kernel, frames; odd.
      width: channels of each branch.

    Raises:
      ValueError: an impossible value (names it).
    """

    spatial: Sequence[int]
    temporal: Sequence[int]
    width: int

    def __post_init__(self) -> None:
        """Checks the values and makes them hashable."""
        for key in ("spatial", "temporal"):
            sizes = tuple(getattr(self, key))
            object.__setattr__(self, key, sizes)
            odd = bool(sizes) and all(is_count(size) and size % 2 for size in sizes)
            check_setting(odd, f"mst.{key}", sizes, "odd kernel sizes, one per branch")
        check_setting(
            len(self.spatial) == len(self.temporal),
            "mst.temporal",
            self.temporal,
            f"one size for each of the {len(self.spatial)} branches of mst.spatial",
        )
        check_setting(is_count(self.width), "mst.width", self.width, "an integer from 1 on")


@dataclasses.dataclass(frozen=True)
class Conv3DSettings:
    """How 3-D convolutions are made, in 3DCNN and in the branches of MST (SPEC 4.4 to 4.7).

    Args:
      factorised: as one convolution in space and one in time, instead of a full one.
      order: which of the two comes first.
      mid_relu: ReLU between the two.
      mid: channels between the two: as many as come 'out', or 'matched' so that both together have
        as many weights as the full kernel.
      width: output channels of 3DCNN.
      temporal: length of its kernels, frames; odd. Those of MST have `mst.temporal`.

    Raises:
      ValueError: an impossible value (names it).
    """

    factorised: bool
    order: str
    mid_relu: bool
    mid: str
    width: int
    temporal: int

    def __post_init__(self) -> None:
        """Checks the values."""
        for key in ("factorised", "mid_relu"):
            value = getattr(self, key)
            check_setting(isinstance(value, bool), f"conv3d.{key}", value, "True, False")
        check_choice("conv3d.order", self.order, ("spatial_first", "temporal_first"))
        check_choice("conv3d.mid", self.mid, ("out", "matched"))
        check_setting(is_count(self.width), "conv3d.width", self.width, "an integer from 1 on")
        odd = is_count(self.temporal) and self.temporal % 2 == 1
        check_setting(odd, "conv3d.temporal", self.temporal, "an odd length")


@dataclasses.dataclass(frozen=True)
class TemporalSettings:
    """What is peculiar to the temporal stream (SPEC 4.2, 4.12).

    Args:
      pool4: where the fourth pooling stands: 'after_mst1', 'before_mst1' or 'after_3d1'.
      init: how the kernels of the 3-D layers start: 'he', 'glorot', 'normal001' (standard deviation
        0.01), or 'inflate' (acting on single frames: from VGG-16 where its weights are used, else
        from He-normal). The first flow convolution follows it, except that 'inflate' is 'he' there.
      conv1_init: 'random', or 'rgb_mean' where VGG-16's weights are used (see `port_vgg16`).

    Raises:
      ValueError: an unknown word (names it).
    """

    pool4: str
    init: str
    conv1_init: str

    def __post_init__(self) -> None:
        """Checks the words."""
        check_choice("temporal.pool4", self.pool4, ("after_mst1", "before_mst1", "after_3d1"))
        check_choice("temporal.init", self.init, ("he", "glorot", "normal001", "inflate"))
        check_choice("temporal.conv1_init", self.conv1_init, ("random", "rgb_mean"))


class SpatialStream(nn.Module):
    """VGG-16 up to its last convolution, on each frame by itself.

    Attributes:
      width: channels of the first block.
      norm_groups: as in `Convolution`.
      dtype: as in `Convolution`.

    Source: SPEC 3.4 to 3.7. Differs: no.
    """

    width: int
    norm_groups: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, frames: Float[Array, "b t h w i"], train: bool = True
    ) -> dict[str, Float[Array, "b t _h _w _c"]]:
        """Returns the output of every block; 'block5' is the map, h and w divided by 16.

        Args:
          frames: colour; flow where a baseline puts it there.
          train: as in `vgg_blocks`.
        """
        return vgg_blocks(
            frames,
            width=self.width,
            last="block5_conv3",
            norm_groups=self.norm_groups,
            train=train,
            dtype=self.dtype,
        )


class Conv3D(nn.Module):
    """A 3-D convolution: in space and then in time, the other way round, or in both at once.

    Attributes:
      features: output channels.
      spatial: height and width of the kernel.
      temporal: length of the kernel, frames.
      settings: how it is made.
      init_name: `temporal.init`.
      norm_groups: as in `Convolution`.
      dtype: as in `Convolution`.

    Source: SPEC 4.4 to 4.7; Conv[3x3x3] ~ Conv[3x3x1] + Conv[1x1x3]. Differs: no.
    """

    features: int
    spatial: int
    temporal: int
    settings: Conv3DSettings
    init_name: str
    norm_groups: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        """Maps a clip to a clip of the same size."""
        space = (self.spatial, self.spatial)
        make = functools.partial(
            Convolution,
            norm_groups=self.norm_groups,
            kernel_init=kernel_init(self.init_name),
            dtype=self.dtype,
        )
        if not self.settings.factorised:
            return make(self.features, (self.temporal, *space), name="full")(x)
        sizes = {"spatial": space, "temporal": (self.temporal,)}
        names = ["spatial", "temporal"]
        if self.settings.order == "temporal_first":
            names.reverse()
        mid = self._mid(x.shape[-1])
        x = make(mid, sizes[names[0]], relu=self.settings.mid_relu, name=names[0])(x)
        return make(self.features, sizes[names[1]], name=names[1])(x)

    def _mid(self, inputs: int) -> int:
        if self.settings.mid == "out":
            return self.features
        taps = [self.spatial**2, self.temporal]
        if self.settings.order == "temporal_first":
            taps.reverse()
        first, second = taps
        full = first * second * inputs * self.features
        return max(1, full // (first * inputs + second * self.features))


class MST(nn.Module):
    """MST_3DCNN: parallel 3-D convolutions of several sizes on one input, concatenated.

    Attributes:
      settings: the branches.
      conv3d: how each is made.
      init_name: `temporal.init`.
      norm_groups: as in `Convolution`.
      dtype: as in `Convolution`.

    Source: paper, section 3.2; SPEC 4.8 to 4.10. Differs: no.
    """

    settings: MSTSettings
    conv3d: Conv3DSettings
    init_name: str
    norm_groups: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w i"]) -> Float[Array, "b t h w o"]:
        """Returns branch 1, 2, ... along the channels."""
        sizes = zip(self.settings.spatial, self.settings.temporal, strict=True)
        branches = [
            Conv3D(
                self.settings.width,
                spatial,
                temporal,
                self.conv3d,
                self.init_name,
                self.norm_groups,
                self.dtype,
                name=f"branch{number}",
            )(x)
            for number, (spatial, temporal) in enumerate(sizes, start=1)
        ]
        return jnp.concatenate(branches, axis=-1)


class TemporalStream(nn.Module):
    """Nine convolutions of VGG-16 on every flow stack, then MST, 3DCNN, MST, 3DCNN over time.

    Attributes:
      width: channels of the first block.
      mst: the multi-scale layers.
      conv3d: the 3-D convolutions.
      settings: pooling and initialisation.
      norm_groups: as in `Convolution`.
      dtype: as in `Convolution`.

    Source: paper, section 3.2; SPEC 4. Differs: no.
    """

    width: int
    mst: MSTSettings
    conv3d: Conv3DSettings
    settings: TemporalSettings
    norm_groups: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        flow: Float[Array, "b n h w c"],
        train: bool = True,
        views: Int[Array, "v t"] | None = None,
    ) -> dict[str, Float[Array, "_b _t _h _w _c"]]:
        """Maps stacks of flow to the output of every block and 3-D layer.

        Args:
          flow: float32 `b n h w c`.
          train: as in `vgg_blocks`.
          views: which of the n stacks make up each of v clips (see `ActionNetwork`); None is one
            clip of all of them, in their order.

        Returns:
          'block1' to 'block4' of the n stacks, and 'mst1' to 'conv3d2' of the clips, whose batch
          is `(b v)`; 'conv3d2' is the map, h and w divided by 16.
        """
        init, groups, dtype = self.settings.init, self.norm_groups, self.dtype
        outputs = vgg_blocks(
            flow,
            width=self.width,
            last="block4_conv2",
            norm_groups=groups,
            train=train,
            dtype=dtype,
            first_init=kernel_init("he" if init == "inflate" else init),
        )
        mst = functools.partial(MST, self.mst, self.conv3d, init, groups, dtype)
        length = self.conv3d.temporal
        conv3d = functools.partial(
            Conv3D, self.conv3d.width, 3, length, self.conv3d, init, groups, dtype
        )
        layers = {
            "mst1": mst(name="mst1"),
            "conv3d1": conv3d(name="conv3d1"),
            "mst2": mst(name="mst2"),
            "conv3d2": conv3d(name="conv3d2"),
        }
        pooled = {"before_mst1": "mst1", "after_mst1": "conv3d1", "after_3d1": "mst2"}
        x = outputs["block4"] if views is None else take_views(outputs["block4"], views)
        for name, layer in layers.items():
            if name == pooled[self.settings.pool4]:
                x = pool2x2(x)
            outputs[name] = x = checkpoint_name(layer(x), BLOCK)
        return outputs


def take_views(
    frames: Float[Array, "b n h w c"], views: Int[Array, "v t"]
) -> Float[Array, "bv t h w c"]:
    """Puts clips together from frames: `(b v) t h w c`, the v clips of a batch row in a row.

    Example:
      >>> frames = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
      >>> take_views(frames, jnp.array([[0, 2], [1, 2]])).reshape(2, 2).tolist()
      [[0.0, 2.0], [1.0, 2.0]]
    """
    return rearrange(frames[:, views], "b v t h w c -> (b v) t h w c")


def kernel_init(name: str) -> nn.initializers.Initializer:
    """The initialiser that a word of `temporal.init` stands for."""
    return {
        "he": HE_NORMAL,
        "glorot": nn.initializers.glorot_uniform(),
        "normal001": nn.initializers.normal(0.01),
        "inflate": inflated,
    }[name]


def inflated(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Initialises a kernel so that the layer starts as a 2-D convolution of single frames.

    Args:
      key: randomness.
      shape: `h w i o` gives He-normal; `t i o` the identity at the middle frame, each output the
        mean of the inputs that fall on it; `t h w i o` a He-normal `h w i o` at the middle frame.
      dtype: of the kernel.

    Returns:
      The kernel.

    Raises:
      ValueError: the identity needs i to be a multiple of o (names both).

    Source: SPEC 4.12, a deviation from the paper.

    Example:
      >>> inflated(jax.random.key(0), (3, 2, 1))[:, :, 0].tolist()
      [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]
    """
    if len(shape) == 4:
        return HE_NORMAL(key, shape, dtype)
    if len(shape) == 5:
        return jnp.zeros(shape, dtype).at[shape[0] // 2].set(HE_NORMAL(key, shape[1:], dtype))
    length, inputs, outputs = shape
    if inputs % outputs:
        raise ValueError(
            f"model.temporal.init: 'inflate' passes {inputs} channels on to {outputs}, which needs "
            "a multiple; choose mst.width and conv3d.width accordingly, or another init"
        )
    identity = jnp.tile(jnp.eye(outputs, dtype=dtype), (inputs // outputs, 1)) * outputs / inputs
    return jnp.zeros(shape, dtype).at[length // 2].set(identity)
