"""From the bytes of a batch to network input: cropping, flipping, normalising, on the device."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

# ImageNet means of the three colour channels in the order blue, green, red (SPEC 3.3).
CAFFE_MEANS_BGR = (103.939, 116.779, 123.68)


class Batch(NamedTuple):
    """One batch as it leaves the input pipeline.

    Attributes:
      rgb: uint8 `b t h w 3`, colour frames at the stored size.
      flow: uint8 `b t h w c`, c = 2L quantised components: u, v of field 1, u, v of field 2, ...
      label: int32 `b`.
      mask: bool `b`, False for rows that only fill up the last batch.
      entry: int32 `b`, position of the video in the list of clips that the pipeline was given.
      seed: uint32 `b 2`, randomness of this sample: a function of (seed, epoch, video id) only.
    """

    rgb: UInt8[Array, "b t h w 3"]
    flow: UInt8[Array, "b t h w c"]
    label: Int[Array, " b"]
    mask: Bool[Array, " b"]
    entry: Int[Array, " b"]
    seed: UInt32[Array, "b 2"]


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """How a stored clip becomes network input.

    Args:
      crop_size: side of the square that the network sees, px; at most the stored size. Cut from
        the centre, or anywhere in training if `random_crop`.
      rgb_preprocess: 'caffe' (blue, green, red minus the ImageNet means; SPEC 3.3), 'zero_one' or
        'minus1_1' (red, green, blue scaled).
      flow_scale: the quantised flow minus 128 is multiplied by it (SPEC 2.10: 1 or 1/128).
      random_crop: training only; the paper has none (SPEC 8.8).
      flip: mirror half of the training clips, colours and flow alike, u negated (SPEC 2.12); the
        paper has none, and it is wrong where left and right are different classes.

    Raises:
      ValueError: an impossible value (names it).
    """

    crop_size: int
    rgb_preprocess: str
    flow_scale: float
    random_crop: bool
    flip: bool

    def __post_init__(self) -> None:
        """Checks the values."""
        allowed = ("caffe", "zero_one", "minus1_1")
        if self.rgb_preprocess not in allowed:
            raise ValueError(
                f"inputs.rgb_preprocess: got {self.rgb_preprocess!r}, one of {allowed}"
            )
        if self.crop_size < 16:
            raise ValueError(f"inputs.crop_size must be at least 16 px, got {self.crop_size}")


def network_input(
    batch: Batch, settings: InputSettings, *, train: bool
) -> tuple[Float[Array, "b t h2 w2 3"], Float[Array, "b t h2 w2 c"]]:
    """Crops, flips (training) and normalises both streams in the same way.

    Args:
      batch: stored clips; its per-sample seeds decide crop and flip.
      settings: see there.
      train: whether to augment.

    Returns:
      float32 colour and flow, spatially `crop_size` x `crop_size`.

    Raises:
      ValueError: the stored clips are smaller than `crop_size`.
    """
    height, width = batch.rgb.shape[2:4]
    if min(height, width) < settings.crop_size:
        raise ValueError(
            f"inputs.crop_size is {settings.crop_size} px but the records hold {height}x{width} px "
            "frames: lower it, or raise records.size and prepare again"
        )
    if train:
        rgb, flow = jax.vmap(functools.partial(_augment, settings=settings))(
            batch.rgb, batch.flow, batch.seed
        )
    else:
        rgb, flow = (_centre_crop(x, settings.crop_size) for x in (batch.rgb, batch.flow))
    return _normalise_rgb(rgb, settings), (flow.astype(jnp.float32) - 128.0) * settings.flow_scale


def flow_to_pixels(flow: Array, bound: float) -> Array:
    """Quantised flow back to px per frame: uint8 -> float32 (SPEC 2.8 inverted)."""
    return flow.astype(jnp.float32) * (2.0 * bound / 255.0) - bound


def _centre_crop(clip: Array, size: int) -> Array:
    top, left = ((side - size) // 2 for side in clip.shape[-3:-1])
    return clip[..., top : top + size, left : left + size, :]


def _augment(rgb: Array, flow: Array, seed: Array, settings: InputSettings) -> tuple[Array, Array]:
    """One clip, `t h w c`: both streams get the same window and the same flip."""
    crop_key, flip_key = jax.random.split(jax.random.wrap_key_data(seed, impl="threefry2x32"))
    if settings.random_crop:
        room = jnp.array([side - settings.crop_size + 1 for side in rgb.shape[1:3]])
        top, left = jax.random.randint(crop_key, (2,), 0, room)
        rgb, flow = (
            jax.lax.dynamic_slice(
                x,
                (0, top, left, 0),
                (x.shape[0], settings.crop_size, settings.crop_size, x.shape[3]),
            )
            for x in (rgb, flow)
        )
    else:
        rgb, flow = (_centre_crop(x, settings.crop_size) for x in (rgb, flow))
    if settings.flip:
        mirrored = jax.random.bernoulli(flip_key)
        rgb = jnp.where(mirrored, rgb[:, :, ::-1], rgb)
        flow = jnp.where(mirrored, mirror_flow(flow), flow)
    return rgb, flow


def mirror_flow(flow: UInt8[Array, "t h w c"]) -> UInt8[Array, "t h w c"]:
    """Mirrors quantised flow left to right: columns reversed, u -> 255 - u, v kept (SPEC 2.12)."""
    fields = rearrange(flow[:, :, ::-1], "t h w (l uv) -> t h w l uv", uv=2)
    negated = jnp.stack([255 - fields[..., 0], fields[..., 1]], axis=-1)
    return rearrange(negated, "t h w l uv -> t h w (l uv)")


def _normalise_rgb(rgb: Array, settings: InputSettings) -> Array:
    rgb = rgb.astype(jnp.float32)
    if settings.rgb_preprocess == "caffe":
        return rgb[..., ::-1] - jnp.array(CAFFE_MEANS_BGR).reshape(1, 1, 1, 1, 3)
    if settings.rgb_preprocess == "zero_one":
        return rgb / 255.0
    return rgb / 127.5 - 1.0
