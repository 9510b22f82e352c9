"""From the bytes of a batch to network input: cropping, augmenting, normalising, on the device."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8, UInt32

from stf_jax.augment import AugmentSettings, augment_clip, mirror_flow
from stf_jax.flow import ZERO_FLOW, TvL1Settings, colour_wheel
from stf_jax.prepare import RecordSettings
from stf_jax.tvl1 import tvl1_flow

# ImageNet means of the three colour channels in the order blue, green, red (SPEC 3.3).
CAFFE_MEANS_BGR = (103.939, 116.779, 123.68)

# The readings of a stack of flow fields and what each makes of a field without motion.
STILL_FLOW = {"uv": ZERO_FLOW, "uv_half": ZERO_FLOW, "mag": 0, "gray": 255, "u": ZERO_FLOW}

_CHOICES = {
    "rgb_preprocess": ("caffe", "zero_one", "minus1_1"),
    "rgb_mean": ("none", "clip"),
    "flow_channels": tuple(STILL_FLOW),
    "flow_mean": ("const128", "per_field", "none"),
}


class Batch(NamedTuple):
    """One batch as it leaves the input pipeline.

    Attributes:
      rgb: uint8 `b t h w 3`, colour frames at the stored size.
      flow: uint8 `b t c h w`, c = 2L quantised components: u, v of field 1, u, v of field 2, ...;
        before `compute_flow` perhaps the two grey frames of each field in their place. A field is
        a picture here, as it is stored; it becomes channels on the device.
      label: int32 `b`.
      mask: bool `b`, False for rows that only fill up the last batch.
      entry: int32 `b`, position of the video in the list of clips that the pipeline was given.
      seed: uint32 `b 2`, randomness of this sample: a function of (seed, epoch, video id) only.
    """

    rgb: UInt8[Array, "b t h w 3"]
    flow: UInt8[Array, "b t c h w"]
    label: Int[Array, " b"]
    mask: Bool[Array, " b"]
    entry: Int[Array, " b"]
    seed: UInt32[Array, "b 2"]


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """How a stored clip becomes network input.

    Args:
      crop_size: side of the square that the network sees, px; at most the stored size. Cut from
        the centre; in training `augment` may have it elsewhere.
      rgb_preprocess: 'caffe' (blue, green, red minus the ImageNet means; SPEC 3.3), 'zero_one' or
        'minus1_1' (red, green, blue scaled).
      rgb_mean: what is subtracted from that: 'none', or 'clip', the mean frame of the clip: what
        stands still, such as a background that few videos share, vanishes. Not in the paper.
      flow_channels: what of the L fields around a frame the network sees; see `read_flow` (SPEC
        2.3).
      flow_mean: what is subtracted from it (SPEC 2.10): 'const128', the value of a still field,
        which is 128 for 'uv', 'uv_half' and 'u', 0 for 'mag' and 255 (white) for 'gray';
        'per_field', the spatial mean of each channel of each frame; or 'none'.
      flow_scale: what is left is multiplied by it (SPEC 2.10: 1 or 1/128).

    Raises:
      ValueError: an impossible value (names it).
    """

    crop_size: int
    rgb_preprocess: str
    rgb_mean: str
    flow_channels: str
    flow_mean: str
    flow_scale: float

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"inputs.{name}: got {getattr(self, name)!r}, one of {allowed}")
        if self.crop_size < 16:
            raise ValueError(f"inputs.crop_size must be at least 16 px, got {self.crop_size}")

    def channels(self, flow_frames: int) -> int:
        """Flow channels of the network for stacks of `flow_frames` fields.

        Raises:
          ValueError: half of the fields do not lie in the middle of the stack.
        """
        if self.flow_channels == "uv_half" and flow_frames % 4:
            raise ValueError(
                "inputs.flow_channels='uv_half' takes the middle half of the fields: "
                f"sampling.flow_frames must be divisible by 4, got {flow_frames}"
            )
        return 2 * flow_frames if self.flow_channels == "uv" else flow_frames


def compute_flow(batch: Batch, stored: RecordSettings) -> Batch:
    """Computes the flow of a batch from records without, on the devices that the batch lies on.

    Returns:
      The batch with quantised fields in `flow`; the batch itself if it has them already.
    """
    if stored.flow_source == "stored" or stored.flow_algorithm != "tvl1":
        return batch
    fields = _flow_of_pairs(batch.flow, settings=stored.tvl1, bound=stored.flow_bound)
    return batch._replace(flow=fields)


@functools.partial(jax.jit, static_argnames=("settings", "bound"))
def _flow_of_pairs(
    pairs: UInt8[Array, "b t c h w"], *, settings: TvL1Settings, bound: float
) -> UInt8[Array, "b t c h w"]:
    """Pairs of grey frames -> quantised u and v, as `flow.quantise` would store them."""
    previous, following = rearrange(pairs, "b t (l two) h w -> two b (t l) h w", two=2)
    fields = jnp.clip(tvl1_flow(previous, following, settings), -bound, bound)
    quantised = jnp.floor(fields * (127.5 / bound) + 127.5 + 0.5).astype(jnp.uint8)
    return rearrange(quantised, "b (t l) h w uv -> b t (l uv) h w", t=pairs.shape[1])


def network_input(
    batch: Batch,
    settings: InputSettings,
    augment: AugmentSettings | None,
    window: Int[Array, "b 2"] | None = None,
    *,
    mirrored: bool = False,
) -> tuple[Float[Array, "b t h2 w2 3"], Float[Array, "b t h2 w2 c"]]:
    """Crops, augments and normalises both streams in the same way.

    Args:
      batch: stored clips; its per-sample seeds decide what is drawn.
      settings: see there.
      augment: what training clips get; None for evaluation.
      window: of evaluation, top and left of each clip's crop in halves of the room that it has;
        None is the centre.
      mirrored: of evaluation, whether clips are turned left to right, u negated.

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
    rgb, flow = batch.rgb, rearrange(batch.flow, "b t c h w -> b t h w c")
    if augment is None:
        if window is None:
            rgb, flow = (_centre_crop(x, settings.crop_size) for x in (rgb, flow))
        else:
            cut = jax.vmap(functools.partial(_crop_at, size=settings.crop_size))
            rgb, flow = cut(rgb, window), cut(flow, window)
        if mirrored:
            rgb, flow = rgb[:, :, :, ::-1], jax.vmap(mirror_flow)(flow)
    else:
        one = functools.partial(augment_clip, settings=augment, crop_size=settings.crop_size)
        rgb, flow = jax.vmap(one)(rgb, flow, batch.seed)
    return _normalise_rgb(rgb, settings), _normalise_flow(flow, settings)


def flow_to_pixels(flow: Array, bound: float) -> Array:
    """Quantised flow back to px per frame: uint8 -> float32 (SPEC 2.8 inverted)."""
    return flow.astype(jnp.float32) * (2.0 * bound / 255.0) - bound


def read_flow(
    flow: UInt8[Array, "b t h w c"] | Float32[Array, "b t h w c"], reading: str
) -> Float32[Array, "b t h w c2"]:
    """What the network sees of its L fields, on the scale of bytes (SPEC 2.3).

    'uv': u and v of each, 2L channels. 'uv_half': u and v of the L/2 fields in the middle, L
    channels. 'u': u of each. 'mag': the speed of each, 0 for none to 255 for `records.flow_bound`
    and more. 'gray': the brightness of each field's picture in the colours of
    `flow.flow_to_colour`, whose full colour is `records.flow_bound`; white is no motion.

    For speeds and colours 127 and 128 both stand for no motion, so that the mirror image of a
    still field, whose u is 255 - 128, stands still.

    Args:
      flow: quantised, or on that scale; u, v of field 1, u, v of field 2, ... of each frame.
      reading: one of `STILL_FLOW`.
    """
    if reading == "uv":
        return flow.astype(jnp.float32)
    fields = rearrange(flow, "b t h w (l uv) -> b t h w l uv", uv=2).astype(jnp.float32)
    if reading == "u":
        return fields[..., 0]
    if reading == "uv_half":
        count = fields.shape[-2] // 2
        middle = fields[..., count // 2 : count // 2 + count, :]
        return rearrange(middle, "b t h w l uv -> b t h w (l uv)")
    motion = (fields - 127.5 - 0.5 * jnp.sign(fields - 127.5)) / 127.0
    u, v = motion[..., 0], motion[..., 1]
    speed = jnp.hypot(u, v)
    if reading == "mag":
        return 255.0 * jnp.minimum(speed, 1.0)
    return 255.0 * jnp.where(speed <= 1, 1 - speed * (1 - _grey_hue(u, v)), 0.75 * _grey_hue(u, v))


def _grey_hue(u: Array, v: Array) -> Array:
    """Brightness, 0 to 1, of the full colour of a direction: brightness is linear in colour."""
    wheel = jnp.asarray(colour_wheel() @ (0.299, 0.587, 0.114), jnp.float32)
    place = jnp.mod(jnp.arctan2(v, u) / (2 * jnp.pi), 1.0) * (len(wheel) - 1)
    below = jnp.floor(place).astype(int)
    share = place - below
    return (1 - share) * wheel[below] + share * wheel[(below + 1) % len(wheel)]


def _centre_crop(clip: Array, size: int) -> Array:
    top, left = ((side - size) // 2 for side in clip.shape[-3:-1])
    return clip[..., top : top + size, left : left + size, :]


def _crop_at(clip: Array, window: Array, size: int) -> Array:
    top, left = (jnp.array(clip.shape[1:3]) - size) * window // 2
    return jax.lax.dynamic_slice(clip, (0, top, left, 0), (len(clip), size, size, clip.shape[-1]))


def _normalise_rgb(rgb: Array, settings: InputSettings) -> Array:
    rgb = rgb.astype(jnp.float32)
    if settings.rgb_preprocess == "caffe":
        rgb = rgb[..., ::-1] - jnp.array(CAFFE_MEANS_BGR).reshape(1, 1, 1, 1, 3)
    elif settings.rgb_preprocess == "zero_one":
        rgb = rgb / 255.0
    else:
        rgb = rgb / 127.5 - 1.0
    return rgb - rgb.mean(axis=1, keepdims=True) if settings.rgb_mean == "clip" else rgb


def _normalise_flow(flow: Array, settings: InputSettings) -> Array:
    read = read_flow(flow, settings.flow_channels)
    if settings.flow_mean == "const128":
        read -= float(STILL_FLOW[settings.flow_channels])
    elif settings.flow_mean == "per_field":
        read -= read.mean(axis=(2, 3), keepdims=True)
    return read * settings.flow_scale
