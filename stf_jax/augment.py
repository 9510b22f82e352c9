"""Augmentation on the device: windows, flips, colours, mixtures, each from the sample's own seed.

The paper has none; everything is off by default. Both streams of a clip get the same window and
the same flip, and flow stays the motion of what is seen: its values are scaled with the window, u
is negated by a flip. Windows and colours are those of the temporal segment networks (Wang et al.,
ECCV 2016), mixtures those of mixup (Zhang et al., ICLR 2018).
"""

import dataclasses
import functools

import dm_pix
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, UInt8, UInt32

from stf_jax.flow import ZERO_FLOW

_CROPS = ("centre", "random", "corners", "resized")


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """What is done to training clips.

    Args:
      crop: where the window of `inputs.crop_size` is cut from the stored frame: 'centre';
        'random', anywhere; 'corners', in one of the four or in the centre; 'resized', anywhere,
        with `area` and `aspect` drawn, rescaled to `inputs.crop_size`. With
        `records.resize='short_side'` all but 'centre' also move the stored square along the longer
        side of the frame (SPEC 3.2).
      scales: sides of the window as shares of the stored side, instead of `inputs.crop_size`; it is
        rescaled to that. Height and width are drawn apart, but are equal or neighbours in this
        list. The literature's are (1, 0.875, 0.75, 0.66); () does not rescale.
      area: of 'resized': smallest and largest share of the stored area.
      aspect: of 'resized': smallest and largest width over height.
      flip: mirror half of the clips, u negated (SPEC 2.12); wrong where left and right are
        different classes.
      brightness: colours are shifted by up to this share of full white, either way.
      contrast: colours are stretched about the clip's mean by 1 - contrast to 1 + contrast.
      saturation: saturation is multiplied by 1 - saturation to 1 + saturation.
      hue: hues are turned by up to this share of the full circle, either way.
      mixup: alpha of the Beta distribution that shares are drawn from, 0 for none: every clip is
        mixed with the next one of its batch, and so are their losses.
      label_smoothing: this share of the target is spread over all classes alike (Szegedy et al.,
        CVPR 2016).

    Raises:
      ValueError: an impossible value (names it).
    """

    crop: str
    scales: tuple[float, ...]
    area: tuple[float, float]
    aspect: tuple[float, float]
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float
    mixup: float
    label_smoothing: float

    def __post_init__(self) -> None:
        """Checks the values; lists, as stored runs have them, become tuples."""
        for name in ("scales", "area", "aspect"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.crop not in _CROPS:
            raise ValueError(f"augment.crop: got {self.crop!r}, one of {_CROPS}")
        if not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"augment.scales must lie in (0, 1], got {self.scales}")
        if self.scales and self.crop == "resized":
            raise ValueError(
                f"augment.scales: got {self.scales}, but augment.crop='resized' draws its sizes "
                "from augment.area and augment.aspect: leave one of the two out"
            )
        for name, high in (("area", 1.0), ("aspect", float("inf"))):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
                raise ValueError(f"augment.{name} must be 0 < low <= high <= {high}, got {value}")
        for name, high in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(
                    f"augment.{name} must be in [0, {high}], got {getattr(self, name)}"
                )
        if self.mixup < 0:
            raise ValueError(f"augment.mixup must not be negative, got {self.mixup}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"augment.label_smoothing must be in [0, 1), got {self.label_smoothing}"
            )

    @property
    def moves(self) -> bool:
        """Whether windows lie elsewhere than in the centre."""
        return self.crop != "centre"

    @property
    def rescales(self) -> bool:
        """Whether windows have another size than the network's input."""
        return bool(self.scales) or self.crop == "resized"


def augment_clip(
    rgb: UInt8[Array, "t h w 3"],
    flow: UInt8[Array, "t h w c"],
    seed: UInt32[Array, " 2"],
    settings: AugmentSettings,
    crop_size: int,
) -> tuple[
    UInt8[Array, "t s s 3"] | Float32[Array, "t s s 3"],
    UInt8[Array, "t s s c"] | Float32[Array, "t s s c"],
]:
    """Cuts, flips and recolours one clip.

    Args:
      rgb: colours.
      flow: quantised; u, v of field 1, u, v of field 2, ...
      seed: the sample's randomness.
      settings: what to draw.
      crop_size: side `s` of the result.

    Returns:
      Both streams on the scale of bytes: bytes still, unless rescaled or recoloured.
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    place_key, flip_key = jax.random.split(key)
    rgb, flow = _cut(rgb, flow, place_key, settings, crop_size)
    if settings.flip:
        mirrored = jax.random.bernoulli(flip_key)
        rgb = jnp.where(mirrored, rgb[:, :, ::-1], rgb)
        flow = jnp.where(mirrored, mirror_flow(flow), flow)
    if settings.brightness or settings.contrast or settings.saturation or settings.hue:
        rgb = _recolour(rgb, jax.random.fold_in(key, 2), settings)
    return rgb, flow


def _cut(
    rgb: Array, flow: Array, key: Array, settings: AugmentSettings, crop_size: int
) -> tuple[Array, Array]:
    """The same window of both streams."""
    stored = jnp.array(rgb.shape[1:3])
    sides = _sides(stored, jax.random.fold_in(key, 2), settings, crop_size)
    corner = _corner(stored - sides, key, settings)
    if settings.rescales:
        scale = crop_size / sides.astype(jnp.float32)
        cut = functools.partial(_resample, corner=corner, scale=scale, size=crop_size)
        return cut(rgb), _stretch_flow(cut(flow), scale)
    return _window(rgb, corner, crop_size), _window(flow, corner, crop_size)


def _sides(stored: Array, key: Array, settings: AugmentSettings, crop_size: int) -> Array:
    """Height and width of the window, int32 `2`."""
    if settings.crop == "resized":
        keys = jax.random.split(key)
        share = jax.random.uniform(keys[0], minval=settings.area[0], maxval=settings.area[1])
        low, high = jnp.log(jnp.array(settings.aspect))
        aspect = jnp.exp(jax.random.uniform(keys[1], minval=low, maxval=high))
        sides = stored * jnp.sqrt(share * jnp.array([1 / aspect, aspect]))
    elif settings.scales:
        count = len(settings.scales)
        pairs = [(i, j) for i in range(count) for j in range(count) if abs(i - j) <= 1]
        shares = jnp.array([[settings.scales[i], settings.scales[j]] for i, j in pairs])
        sides = stored * shares[jax.random.randint(key, (), 0, len(pairs))]
    else:
        return jnp.array([crop_size, crop_size])
    return jnp.clip(jnp.round(sides).astype(stored.dtype), 1, stored)


def _corner(room: Array, key: Array, settings: AugmentSettings) -> Array:
    """Top and left of a window that leaves `room`, int32 `2`."""
    if settings.crop == "centre":
        return room // 2
    if settings.crop == "corners":
        keep_top, keep_left = jnp.array([0, 1]), jnp.array([1, 0])
        places = [0 * room, keep_top * room, keep_left * room, room, room // 2]
        return jnp.stack(places)[jax.random.randint(key, (), 0, len(places))]
    return jax.random.randint(key, (2,), 0, room + 1)


def _window(clip: Array, corner: Array, size: int) -> Array:
    start = (0, corner[0], corner[1], 0)
    return jax.lax.dynamic_slice(clip, start, (clip.shape[0], size, size, clip.shape[3]))


def _resample(clip: Array, corner: Array, scale: Array, size: int) -> Array:
    """The window at `corner`, `size / scale` px, as `size` x `size` px, bilinearly: float32."""
    shape = (clip.shape[0], size, size, clip.shape[3])
    shift = -corner.astype(jnp.float32) * scale
    return jax.image.scale_and_translate(
        clip.astype(jnp.float32), shape, (1, 2), scale, shift, method="linear", antialias=True
    )


def _stretch_flow(flow: Array, scale: Array) -> Array:
    """Scales u and v with the picture, held to the bound as stored ones are (SPEC 2.8, 2.9).

    About the value of a still field, which so stays still.
    """
    factors = jnp.tile(scale[::-1], flow.shape[-1] // 2).reshape(1, 1, 1, -1)
    return jnp.clip(ZERO_FLOW + (flow - ZERO_FLOW) * factors, 0.0, 255.0)


def mirror_flow(
    flow: UInt8[Array, "t h w c"] | Float32[Array, "t h w c"],
) -> UInt8[Array, "t h w c"] | Float32[Array, "t h w c"]:
    """Mirrors quantised flow left to right: columns reversed, u -> 255 - u, v kept (SPEC 2.12)."""
    fields = rearrange(flow[:, :, ::-1], "t h w (l uv) -> t h w l uv", uv=2)
    negated = jnp.stack([255 - fields[..., 0], fields[..., 1]], axis=-1)
    return rearrange(negated, "t h w l uv -> t h w (l uv)")


def _recolour(rgb: Array, key: Array, settings: AugmentSettings) -> Array:
    """Other light on the whole clip: all its frames alike, or the light itself would move."""
    shift, stretch, saturate, turn = (
        jax.random.uniform(k, minval=-1.0) for k in jax.random.split(key, 4)
    )
    # One tall picture, so that the contrast is about the mean of the clip.
    picture = rearrange(rgb, "t h w c -> (t h) w c").astype(jnp.float32) / 255.0
    if settings.brightness:
        picture = dm_pix.adjust_brightness(picture, settings.brightness * shift)
    if settings.contrast:
        picture = dm_pix.adjust_contrast(picture, 1 + settings.contrast * stretch)
    picture = jnp.clip(picture, 0.0, 1.0)
    if settings.saturation:
        picture = dm_pix.adjust_saturation(picture, 1 + settings.saturation * saturate)
    if settings.hue:
        picture = dm_pix.adjust_hue(picture, settings.hue * turn)
    picture = 255.0 * jnp.clip(picture, 0.0, 1.0)
    return rearrange(picture, "(t h) w c -> t h w c", t=rgb.shape[0])


def mixup_shares(
    seed: UInt32[Array, "b 2"], mask: Bool[Array, " b"], alpha: float
) -> Float32[Array, " b"]:
    """The share of each clip in its mixture with the next one of the batch, 0.5 to 1.

    Beta(alpha, alpha), the larger part to the clip itself: with random neighbours these are the
    same mixtures, and the class that training accuracy counts is the one that is seen more of. A
    clip whose neighbour only fills up the batch stays alone.

    Args:
      seed: the samples' randomness.
      mask: rows that count.
      alpha: above 0; small ones leave most clips nearly alone.
    """

    def draw(data: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), 3)
        return jax.random.beta(key, alpha, alpha, dtype=jnp.float32)

    share = jax.vmap(draw)(seed)
    return jnp.where(mask & next_row(mask), jnp.maximum(share, 1 - share), 1.0)


def mix(rows: Float[Array, " b *rest"], share: Float32[Array, " b"]) -> Float[Array, " b *rest"]:
    """Each row mixed with the next one: clips, or their losses on either's label."""
    own = share.reshape(-1, *(1,) * (rows.ndim - 1)).astype(rows.dtype)
    return own * rows + (1 - own) * next_row(rows)


def next_row(rows: Array) -> Array:
    """For each row the one that it is mixed with: the next, after the last the first."""
    return jnp.roll(rows, -1, axis=0)
