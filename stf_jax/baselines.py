"""Two published networks, small, that ours is compared with: C3D and a CNN with an LSTM.

They take the place of ours in the same run: clips, augmentation, training, evaluation, checkpoints
and report do not know which network it is. Each sees one stream: colour, as published, or flow.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stf_jax.recurrent import BiLSTM, LSTMSettings
from stf_jax.streams import SpatialStream
from stf_jax.vgg import (
    BLOCK,
    HE_NORMAL,
    ClipDropout,
    Convolution,
    check_setting,
    is_count,
    pool2x2,
)

# C3D's convolutions: name, and channels in multiples of the first one's.
_C3D_BLOCKS = (
    (("conv1a", 1),),
    (("conv2a", 2),),
    (("conv3a", 4), ("conv3b", 4)),
    (("conv4a", 8), ("conv4b", 8)),
    (("conv5a", 8), ("conv5b", 8)),
)


@dataclasses.dataclass(frozen=True)
class C3DSettings:
    """The size of C3D.

    Args:
      width: channels of its first convolution; 64 as published.
      dense: units of each of its two fully connected layers; 4096 as published.

    Raises:
      ValueError: an impossible value (names it).
    """

    width: int
    dense: int

    def __post_init__(self) -> None:
        """Checks the values."""
        _check_counts("c3d", self)


@dataclasses.dataclass(frozen=True)
class CNNLSTMSettings:
    """The size of the CNN with an LSTM.

    Args:
      width: channels of the first block of its VGG-16, which is 64 wide as published.
      hidden: units of the LSTM; 256 in LRCN.

    Raises:
      ValueError: an impossible value (names it).
    """

    width: int
    hidden: int

    def __post_init__(self) -> None:
        """Checks the values."""
        _check_counts("cnn_lstm", self)


def _check_counts(section: str, settings: C3DSettings | CNNLSTMSettings) -> None:
    for key, value in dataclasses.asdict(settings).items():
        check_setting(is_count(value), f"{section}.{key}", value, "an integer from 1 on")


def pool2x2x2(x: Float[Array, "b t h w c"]) -> Float[Array, "b tt hh ww c"]:
    """Halves t, h and w by the maximum of 2x2x2 cells; an odd last frame is a pair by itself.

    Example:
      >>> pool2x2x2(jnp.arange(12.0).reshape(1, 3, 2, 2, 1)).ravel().tolist()
      [7.0, 11.0]
    """
    x = pool2x2(x)
    if x.shape[1] % 2:
        x = jnp.concatenate([x, x[:, -1:]], axis=1)
    first, second = x[:, ::2], x[:, 1::2]
    # Unlike the gradient of a maximum, that of a choice needs no equality of rounded numbers.
    return jnp.where(first >= second, first, second)


def volumes_left(frames: int) -> int:
    """Length of what `Volumes` makes of so many frames; its first fully connected layer needs it.

    Example:
      >>> volumes_left(24)
      2
    """
    return -(-frames // 16)


class Volumes(nn.Module):
    """The eight 3x3x3 convolutions of C3D in five blocks, pooled in between.

    Attributes:
      width: channels of the first block; the blocks have it times 1, 2, 4, 8, 8.
      norm_groups: as in `Convolution`.
      dtype: as in `Convolution`.

    Source: Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015,
      section 3.2. Differs: an odd last frame counts in every pooling, and an odd last row or column
      in none; He-normal start; normalisation on request.
    """

    width: int
    norm_groups: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w i"], train: bool = True
    ) -> dict[str, Float[Array, "b _t _h _w _c"]]:
        """Returns what comes out of every block's pooling, 'block1' to 'block5'.

        The first block's pools frames by themselves, the others' pairs of frames too: t is divided
        by 16, h and w by 32.
        """
        del train  # `nn.remat` calls both networks' first parts alike
        outputs = {}
        for number, block in enumerate(_C3D_BLOCKS, start=1):
            for name, multiple in block:
                convolution = Convolution(
                    multiple * self.width,
                    (3, 3, 3),
                    norm_groups=self.norm_groups,
                    dtype=self.dtype,
                    name=name,
                )
                x = convolution(x)
            x = checkpoint_name(pool2x2(x) if number == 1 else pool2x2x2(x), BLOCK)
            outputs[f"block{number}"] = x
        return outputs


class FullyConnected(nn.Module):
    """A matrix product with bias, and optional ReLU.

    Attributes:
      features: units.
      relu: whether to clip below zero.
      dtype: as in `Convolution`.
    """

    features: int
    relu: bool
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """Maps the last axis; He-normal before a ReLU, else Glorot-uniform."""
        init = HE_NORMAL if self.relu else nn.initializers.glorot_uniform()
        y = nn.Dense(self.features, dtype=self.dtype, kernel_init=init, name="product")(x)
        return nn.relu(y) if self.relu else y


class C3D(nn.Module):
    """3-D convolutions of one size, two fully connected layers, classifier.

    Attributes:
      stream: what it sees: 'rgb' or 'flow'.
      volumes: its convolutions.
      dense: units of each fully connected layer.
      num_classes: classes.
      drop: probability of dropout after the first and the second of these layers.
      dtype: as in `Convolution`; the classifier's is float32.

    Source: as `Volumes`; the paper sees colour.
    """

    stream: str
    volumes: Volumes
    dense: int
    num_classes: int
    drop: tuple[float, float]
    dtype: DTypeLike | None = None
    scored: ClassVar[tuple[str, ...]] = ("logits",)

    @nn.compact
    def __call__(
        self,
        rgb: Float[Array, "b n h w 3"],
        flow: Float[Array, "b n h w c"],
        *,
        train: bool,
        rows: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b k"], dict[str, Array]]:
        """Classifies clips; arguments as those of `ActionNetwork`.

        Returns:
          float32 logits `b k`, and 'block1' to 'block5' `b t h w c`, 'fc6' and 'fc7' `b d` (before
          dropout) and 'logits'.

        Raises:
          ValueError: frames below 32 px.
        """
        x = _seen(self.stream, rgb, flow)
        features: dict[str, Array] = dict(self.volumes(x, train))
        x = rearrange(features["block5"], "b t h w c -> b (t h w c)")
        for name, rate in zip(("fc6", "fc7"), self.drop, strict=True):
            features[name] = FullyConnected(self.dense, True, self.dtype, name=name)(x)
            x = features[name]
            if train:
                x = ClipDropout(rate, name=f"drop_{name}")(x, _rows(x, rows))
        logits = FullyConnected(self.num_classes, False, name="head")(x.astype(jnp.float32))
        features["logits"] = logits
        return logits, features


class CNNLSTM(nn.Module):
    """VGG-16 on every frame, an LSTM over the frames, a classifier at each of its steps.

    The loss is the mean of the steps' losses, the answer the mean of their probabilities.

    Attributes:
      stream: what it sees: 'rgb' or 'flow'.
      spatial: its convolutions; so called because VGG-16's ImageNet weights fit those that see
        colour.
      hidden: units of the LSTM, which runs forwards and has no normalisation.
      num_classes: classes.
      drop: probability of dropout before and after the LSTM.
      dtype: as in `Convolution`; the classifier's is float32.

    Source: Donahue et al., Long-term Recurrent Convolutional Networks, CVPR 2015, section 4 (LRCN).
      Differs: VGG-16 up to its last pooling in the place of CaffeNet up to its layer fc6.
    """

    stream: str
    spatial: SpatialStream
    hidden: int
    num_classes: int
    drop: tuple[float, float]
    dtype: DTypeLike | None = None
    scored: ClassVar[tuple[str, ...]] = ("step_logits",)

    @nn.compact
    def __call__(
        self,
        rgb: Float[Array, "b n h w 3"],
        flow: Float[Array, "b n h w c"],
        *,
        train: bool,
        rows: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b k"], dict[str, Array]]:
        """Classifies clips; arguments as those of `ActionNetwork`.

        Returns:
          float32 log-probabilities `b k`, and 'block1' to 'block5' `b t h w c`, 'states'
          `b s hidden` (before dropout), 'step_logits' `b s k` and 'logits', one step per frame.

        Raises:
          ValueError: frames below 32 px.
        """
        x = _seen(self.stream, rgb, flow)
        features: dict[str, Array] = dict(self.spatial(x, train))
        x = rearrange(pool2x2(features["block5"]), "b t h w c -> b t (h w c)")
        if train:
            x = ClipDropout(self.drop[0], name="drop_input")(x, _rows(x, rows))
        cell = LSTMSettings(
            "lstm", self.hidden, "none", "units", forget_bias=1.0, bidirectional=False
        )
        x = features["states"] = BiLSTM(cell, self.dtype, name="recurrent")(x)[:, :, 0]
        if train:
            x = ClipDropout(self.drop[1], name="drop_output")(x, _rows(x, rows))
        steps = FullyConnected(self.num_classes, False, name="head")(x.astype(jnp.float32))
        features["step_logits"] = steps
        total = nn.logsumexp(nn.log_softmax(steps), axis=1)
        features["logits"] = total - jnp.log(steps.shape[1])
        return features["logits"], features


def _seen(
    stream: str, rgb: Float[Array, "b n h w 3"], flow: Float[Array, "b n h w c"]
) -> Float[Array, "b n h w i"]:
    """The stream that a network sees."""
    if min(rgb.shape[2:4]) < 32:
        raise ValueError(
            f"frames of {rgb.shape[2]}x{rgb.shape[3]} px are too small: five poolings halve "
            "them, so they need at least 32x32"
        )
    return rgb if stream == "rgb" else flow


def _rows(x: Array, rows: Int[Array, " b"] | None) -> Int[Array, " b"]:
    return jnp.arange(len(x)) if rows is None else rows
