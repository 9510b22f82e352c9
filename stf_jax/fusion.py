"""From two maps per frame to one vector per segment: 3-D convolution and temporal pyramid."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stf_jax.vgg import (
    HE_NORMAL,
    Convolution,
    check_choice,
    check_setting,
    even_size,
    is_count,
    pool2x2,
)

# Shares of the spatial and the temporal map at the start (SPEC 5.7).
_SPATIAL, _TEMPORAL = 0.25, 0.75


@dataclasses.dataclass(frozen=True)
class FusionSettings:
    """The convolution that joins the streams (SPEC 5).

    Args:
      kernel: its size as the paper writes it: (h, w, t).
      width: output channels.
      relu: whether a ReLU follows.
      pool5: how h and w are halved: max-pooling 'after' the convolution, max-pooling of each map
        'before' it, 'stride' 2 in it, or 'average' pooling after it.
      init: 'feichtenhofer' (a Gaussian blur of 0.25 spatial + 0.75 temporal map) or 'he'.
      drop_rgb: share of training clips whose colour map is left out, as zeros. Colour gives few
        videos away by their backgrounds, before their motion is learnt; these clips cannot be.
      loss_without: streams, 'rgb' and 'flow' or one of them: every training clip is classified once
        more with zeros in the place of that stream's map, and this loss is added. So the other
        stream learns what it would by itself, whatever is learnt faster. Costs another pass from
        the fusion on, and its memory, in training.

    Raises:
      ValueError: an impossible value (names it).
    """

    kernel: Sequence[int]
    width: int
    relu: bool
    pool5: str
    init: str
    drop_rgb: float
    loss_without: Sequence[str]

    def __post_init__(self) -> None:
        """Checks the values and makes them hashable."""
        kernel = tuple(self.kernel)
        object.__setattr__(self, "kernel", kernel)
        odd = len(kernel) == 3 and all(is_count(size) and size % 2 for size in kernel)
        check_setting(odd, "fusion.kernel", kernel, "three odd sizes (h, w, t)")
        check_setting(is_count(self.width), "fusion.width", self.width, "an integer from 1 on")
        check_setting(isinstance(self.relu, bool), "fusion.relu", self.relu, "True, False")
        check_choice("fusion.pool5", self.pool5, ("after", "before", "stride", "average"))
        check_choice("fusion.init", self.init, ("feichtenhofer", "he"))
        share = 0 <= self.drop_rgb < 1
        check_setting(share, "fusion.drop_rgb", self.drop_rgb, "0 <= share < 1")
        without = tuple(self.loss_without)
        object.__setattr__(self, "loss_without", without)
        allowed = [(), ("rgb",), ("flow",), ("rgb", "flow")]
        told = ", ".join(map(str, allowed))
        check_setting(without in allowed, "fusion.loss_without", without, told)


class Fusion(nn.Module):
    """Concatenates the maps of the streams and convolves them in space and time.

    Attributes:
      settings: the convolution.
      norm_groups: as in `Convolution`.
      dtype: as in `Convolution`.

    Source: paper, section 3.3; SPEC 5. Differs: no.
    """

    settings: FusionSettings
    norm_groups: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, *maps: Float[Array, "b t h w _c"]) -> Float[Array, "b t hh ww d"]:
        """Fuses maps, the spatial stream's first; h and w are halved, odd sizes rounded down."""
        settings = self.settings
        x = jnp.concatenate(maps, axis=-1)
        if settings.pool5 == "before":
            x = pool2x2(x)
        elif settings.pool5 == "stride":
            x = even_size(x)
        height, width, length = settings.kernel
        he = settings.init == "he"
        x = Convolution(
            settings.width,
            (length, height, width),
            norm_groups=self.norm_groups,
            relu=settings.relu,
            stride=2 if settings.pool5 == "stride" else 1,
            kernel_init=HE_NORMAL if he else blurred_sum,
            dtype=self.dtype,
            name="conv",
        )(x)
        if settings.pool5 in ("after", "average"):
            x = pool2x2(x, "max" if settings.pool5 == "after" else "mean")
        return x


def blurred_sum(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "t h w i o"]:
    """Initialises the fusion kernel as a Gaussian blur (sigma 1) of the weighted sum of the maps.

    Args:
      key: not used: nothing here is random.
      shape: `t h w i o`; i = 2 o for two maps (0.25 of the first, 0.75 of the second), i = o for a
        single one.
      dtype: of the kernel.

    Returns:
      The kernel.

    Raises:
      ValueError: i is neither o nor 2 o.

    Source: SPEC 5.7 (the code of Feichtenhofer et al., 2016).

    Example:
      >>> blurred_sum(jax.random.key(0), (1, 1, 1, 2, 1)).ravel().tolist()
      [0.25, 0.75]
    """
    *sizes, inputs, outputs = shape
    if inputs not in (outputs, 2 * outputs):
        raise ValueError(
            f"model.fusion.init: 'feichtenhofer' adds maps of equal width and keeps it; got "
            f"{inputs} channels of all maps together and fusion.width {outputs}. Make model.width "
            "times 8, conv3d.width and fusion.width equal, or choose 'he'."
        )
    shares = (1.0,) if inputs == outputs else (_SPATIAL, _TEMPORAL)
    channels = np.concatenate([share * np.eye(outputs) for share in shares])
    blur = np.ones(())
    for size in sizes:
        offsets = np.arange(size) - (size - 1) / 2
        blur = np.multiply.outer(blur, np.exp(-(offsets**2) / 2))
    return jnp.asarray(np.multiply.outer(blur / blur.sum(), channels), dtype)


@dataclasses.dataclass(frozen=True)
class TPNSettings:
    """The temporal pyramid network (SPEC 6).

    Args:
      window: frames that make one recurrent step.
      stride: frames from one window to the next.
      levels: bins per level, coarse first; each divides `window`.
      psi: what a bin takes of its frames: their 'mean' or 'max'.

    Raises:
      ValueError: an impossible value (names it).
    """

    window: int
    stride: int
    levels: Sequence[int]
    psi: str

    def __post_init__(self) -> None:
        """Checks the values and makes them hashable."""
        for key in ("window", "stride"):
            value = getattr(self, key)
            check_setting(is_count(value), f"tpn.{key}", value, "an integer from 1 on")
        levels = tuple(self.levels)
        object.__setattr__(self, "levels", levels)
        fit = bool(levels) and all(is_count(bins) and self.window % bins == 0 for bins in levels)
        check_setting(fit, "tpn.levels", levels, f"divisors of tpn.window ({self.window})")
        check_choice("tpn.psi", self.psi, ("mean", "max"))


def temporal_pyramid(
    features: Float[Array, "b t h w c"], levels: Sequence[int], psi: str = "mean"
) -> Float[Array, "b n h w c"]:
    """Summarises a stretch of time at several resolutions.

    At a level of n bins the t frames fall into n equal bins, and each becomes the mean (or
    maximum) of its frames: for 8 frames and levels (1, 2, 4) these are the paper's 3 formulas.

    Args:
      features: float32 `b t h w c`; t divisible by every level.
      levels: bins per level, coarse first.
      psi: 'mean' or 'max'.

    Returns:
      float32 `b n h w c`, n = sum(levels); level-major, then time.

    Raises:
      ValueError: t not divisible by a level (names both).

    Source: paper, section 3.3; SPEC 6. Differs: no.

    Example:
      >>> ramp = jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1, 1)
      >>> temporal_pyramid(ramp, (1, 2, 4)).ravel().tolist()
      [2.5, 1.5, 3.5, 1.0, 2.0, 3.0, 4.0]
    """
    for bins in levels:
        if features.shape[1] % bins:
            raise ValueError(
                f"{features.shape[1]} frames cannot be divided into {bins} equal bins of a "
                "temporal pyramid"
            )
    bins_of = [rearrange(features, "b (n t) h w c -> b n t h w c", n=bins) for bins in levels]
    maps = [x.mean(axis=2) if psi == "mean" else _largest(x) for x in bins_of]
    return jnp.concatenate(maps, axis=1)


def _largest(x: Float[Array, "b n t h w c"]) -> Float[Array, "b n h w c"]:
    """The maximum over t, chosen by its place, which its gradient goes to (see `pool2x2`)."""
    place = jax.lax.argmax(x, 2, jnp.int32)[:, :, None]
    chosen = place == jnp.arange(x.shape[2]).reshape(1, 1, -1, 1, 1, 1)
    return jnp.where(chosen, x, jnp.zeros((), x.dtype)).sum(axis=2)


def segment_vectors(
    features: Float[Array, "b t h w c"], settings: TPNSettings
) -> Float[Array, "b s d"]:
    """Cuts a clip into windows and makes one pyramid vector of each.

    Args:
      features: float32 `b t h w c`, the fused map.
      settings: windows and pyramid.

    Returns:
      float32 `b s d`, s = (t - window) / stride + 1 segments, d = sum(levels) h w c.

    Raises:
      ValueError: the windows do not end with the clip (names t, window and stride).

    Source: SPEC 6.1, 6.4. Differs: no.

    Example:
      >>> segment_vectors(jnp.ones((1, 24, 7, 7, 4)), TPNSettings(8, 8, (1, 2, 4), "mean")).shape
      (1, 3, 1372)
    """
    t, window, stride = features.shape[1], settings.window, settings.stride
    if t < window or (t - window) % stride:
        raise ValueError(
            f"clips of {t} frames do not divide into windows of tpn.window={window} frames at "
            f"every tpn.stride={stride} frames: the number of frames must be {window} or "
            f"{window} plus a multiple of {stride}"
        )
    frames = np.arange(0, t - window + 1, stride)[:, None] + np.arange(window)[None, :]
    windows = rearrange(features[:, frames], "b s t h w c -> (b s) t h w c")
    pyramid = temporal_pyramid(windows, settings.levels, settings.psi)
    return rearrange(pyramid, "(b s) n h w c -> b s (n h w c)", s=len(frames))
