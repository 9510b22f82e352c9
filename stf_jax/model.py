"""The network, wired in the order in which data flows through it."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import chex  # type: ignore[import-untyped]
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from stf_jax.baselines import C3D, CNNLSTM, C3DSettings, CNNLSTMSettings, Volumes
from stf_jax.fusion import Fusion, FusionSettings, TPNSettings, segment_vectors
from stf_jax.recurrent import BiLSTM, LSTMSettings
from stf_jax.streams import (
    Conv3DSettings,
    MSTSettings,
    SpatialStream,
    TemporalSettings,
    TemporalStream,
    take_views,
)
from stf_jax.vgg import (
    BLOCK,
    CONVOLUTION,
    ClipDropout,
    check_choice,
    check_setting,
    is_count,
)

# The streams, in the order in which the fusion takes their maps.
STREAMS = ("rgb", "flow")

# The `model` part of a configuration, at the paper's size (SPEC section 15).
PAPER_MODEL: Mapping[str, Any] = {
    "architecture": "stf",
    "width": 64,
    "streams": "both",
    "precision": "float32",
    "remat": {"spatial": "none", "temporal": "none"},
    "norm": "none",
    "norm_groups": 8,
    "mst": {"spatial": (1, 3, 5), "temporal": (3, 3, 5), "width": 512},
    "conv3d": {
        "factorised": True,
        "order": "spatial_first",
        "mid_relu": True,
        "mid": "out",
        "width": 512,
        "temporal": 3,
    },
    "temporal": {"pool4": "after_mst1", "init": "he", "conv1_init": "random"},
    "fusion": {
        "kernel": (3, 3, 3),
        "width": 512,
        "relu": True,
        "pool5": "after",
        "init": "feichtenhofer",
        "drop_rgb": 0.0,
        "loss_without": (),
    },
    "tpn": {"window": 8, "stride": 8, "levels": (1, 2, 4), "psi": "mean"},
    "lstm": {
        "cell": "lstm",
        "hidden": 101,
        "ln": "tf",
        "ln_axis": "units",
        "forget_bias": 1.0,
        "bidirectional": True,
    },
    "head": {"combine": "project", "pool": "mean_logits"},
    "drop": {"input": 0.5, "output": 0.25, "semantics": "drop"},
    "c3d": {"width": 64, "dense": 4096},
    "cnn_lstm": {"width": 64, "hidden": 256},
}


_REMAT = {
    "none": None,
    "convolutions": jax.checkpoint_policies.save_only_these_names(CONVOLUTION, BLOCK),
    "blocks": jax.checkpoint_policies.save_only_these_names(BLOCK),
    "all": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class RematSettings:
    """What the backward pass computes again instead of reading it from memory, per stream.

    'none' keeps what each operation needs. 'convolutions' keeps the outputs of convolutions,
    before normalisation and ReLU; 'blocks' those of VGG's blocks and of the 3-D layers; 'all'
    computes 'all' of the stream again. The results are the same.

    Args:
      spatial: of the spatial stream.
      temporal: of the temporal stream.

    Raises:
      ValueError: an unknown word (names it).
    """

    spatial: str
    temporal: str

    def __post_init__(self) -> None:
        """Checks the words."""
        for key in ("spatial", "temporal"):
            check_choice(f"remat.{key}", getattr(self, key), tuple(_REMAT))


@functools.cache
def _remat(module: type[nn.Module], how: str) -> Any:
    """The class of a stream that forgets; cached, because equal networks need equal classes."""
    if how == "none":
        return module
    train = 2  # the argument's place, counted with self
    return nn.remat(module, policy=_REMAT[how], static_argnums=train)


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """The classifier (SPEC 7.7, 7.8).

    Args:
      combine: the directions' states become logits by a learned projection ('project'), or are
        the logits by their 'sum' or 'mean'; the latter two bound the logits.
      pool: how steps become one answer: 'mean_logits'; 'mean_probs', the logarithm of the mean
        softmax; 'last', from the state each direction ends with; 'per_step_loss', mean of logits,
        and the loss reads every step's.

    Raises:
      ValueError: an unknown word (names it).
    """

    combine: str
    pool: str

    def __post_init__(self) -> None:
        """Checks the words."""
        check_choice("head.combine", self.combine, ("project", "sum", "mean"))
        pools = ("mean_logits", "mean_probs", "last", "per_step_loss")
        check_choice("head.pool", self.pool, pools)


@dataclasses.dataclass(frozen=True)
class DropSettings:
    """Dropout before and after the recurrent layer (SPEC 7.9, 7.10).

    Args:
      input: probability for each component of the pyramid vectors.
      output: probability for each unit of the states that the head reads.
      semantics: what a probability is of: to 'drop' or to 'keep' (as in TensorFlow 1).

    Raises:
      ValueError: an impossible value (names it).
    """

    input: float
    output: float
    semantics: str

    def __post_init__(self) -> None:
        """Checks the values."""
        check_choice("drop.semantics", self.semantics, ("drop", "keep"))
        for key in ("input", "output"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if self.semantics == "drop":
                check_setting(number and 0 <= value < 1, f"drop.{key}", value, "0 <= p < 1")
            else:
                check_setting(
                    number and 0 < value <= 1, f"drop.{key}", value, "0 < p <= 1 (kept share)"
                )

    def rate(self, value: float) -> float:
        """The share that is dropped."""
        return value if self.semantics == "drop" else 1 - value


class Head(nn.Module):
    """From the states of all steps and directions to class logits.

    Attributes:
      num_classes: classes.
      combine: as in `HeadSettings`.
      pool: as in `HeadSettings`.

    Source: SPEC 7.7, 7.8. Differs: the paper's formula is lost.
    """

    num_classes: int
    combine: str
    pool: str

    @nn.compact
    def __call__(
        self, states: Float[Array, "b s n d"]
    ) -> tuple[Float[Array, "b k"], Float[Array, "b s k"]]:
        """Returns the clip's logits, and every step's."""
        if self.combine == "project":
            project = nn.Dense(
                self.num_classes, kernel_init=nn.initializers.glorot_uniform(), name="project"
            )
        else:
            project = None

        def combined(x: Float[Array, "b s n d"]) -> Float[Array, "b s k"]:
            if project is not None:
                return project(rearrange(x, "b s n d -> b s (n d)"))
            return x.sum(axis=2) if self.combine == "sum" else x.mean(axis=2)

        steps = combined(states)
        if self.pool == "last":
            # The forward direction ends at the last step, the backward one at the first.
            last = jnp.concatenate([states[:, -1:, :1], states[:, :1, 1:]], axis=2)
            return combined(last)[:, 0], steps
        if self.pool == "mean_probs":
            total = nn.logsumexp(nn.log_softmax(steps), axis=1)
            return total - jnp.log(steps.shape[1]), steps
        return steps.mean(axis=1), steps


def maps_of(features: Mapping[str, Array]) -> dict[str, Float[Array, "b t h w _c"]]:
    """The maps of the streams among a network's features, by the names of the streams."""
    return {name: features[f"{name}_map"] for name in STREAMS if f"{name}_map" in features}


def _left_out(maps: Mapping[str, Array], stream: str) -> dict[str, Array]:
    """The maps with zeros in the place of one stream's."""
    return {**maps, stream: jnp.zeros_like(maps[stream])}


class ActionNetwork(nn.Module):
    """Two streams, convolutional fusion, temporal pyramid, Bi-LN-LSTM, classifier.

    Attributes:
      spatial: the stream that sees colour, or None.
      temporal: the stream that sees flow, or None.
      fusion: joins their maps.
      tpn: how the fused map becomes one vector per segment.
      drop: dropout around the recurrent layer.
      recurrent: the recurrent layer.
      head: the classifier.

    Source: Ou and Sun (2021), sections 3.1 to 3.4; SPEC sections 3 to 7.
    """

    spatial: SpatialStream | None
    temporal: TemporalStream | None
    fusion: Fusion
    tpn: TPNSettings
    drop: DropSettings
    recurrent: BiLSTM
    head: Head

    @property
    def sees_both(self) -> bool:
        """Whether it has both streams."""
        return self.spatial is not None and self.temporal is not None

    @property
    def scored(self) -> tuple[str, ...]:
        """The features that the loss reads."""
        name = "step_logits" if self.head.pool == "per_step_loss" else "logits"
        return (name, *(f"without_{stream}_{name}" for stream in self._also_without))

    @property
    def _also_without(self) -> Sequence[str]:
        """The streams without which training clips are classified as well."""
        return self.fusion.settings.loss_without if self.sees_both else ()

    @nn.compact
    def __call__(
        self,
        rgb: Float[Array, "b n h w 3"],
        flow: Float[Array, "b n h w c"],
        *,
        train: bool,
        views: Int[Array, "v t"] | None = None,
        rows: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "bv k"], dict[str, Array]]:
        """Classifies clips.

        Args:
          rgb: float32 `b n h w 3`, normalised colour.
          flow: float32 `b n h w c`, normalised flow; the fields of a frame are its channels.
          train: dropout on (needs the rng 'dropout').
          views: which of the n frames make up each of v clips, int32 `v t`: clips that share
            frames share the 2-D layers' work on them. None is one clip of all frames, as they
            come. Only without normalisation, whose statistics are those of a whole clip.
          rows: place of each clip in the batch that these are a part of: dropout then draws for
            it what it would draw in the whole batch. None: these are the batch.

        Returns:
          float32 logits `b k`, and every named intermediate: 'rgb_block1' to 'rgb_block5',
          'flow_block1' to 'flow_block4', 'flow_mst1', 'flow_conv3d1', 'flow_mst2', 'flow_conv3d2'
          and 'rgb_map', 'flow_map' `b t h w c`, 'fused' `b t h w c`, 'pyramid' `b s d`, 'states'
          `b s n d` (n directions, before dropout), 'step_logits' `b s k`, 'logits' `b k`; without
          recurrence (`lstm.cell` 'mean') s = 1 in the last three but one. With
          `views` b is `(b v)` from the first 3-D layers on. In training also what is `scored`
          besides: 'without_rgb_logits', say.

        Raises:
          ValueError: frames below 32 px, a number of frames that the windows do not fit, or views
            of a network with normalisation.
        """
        chex.assert_equal_shape_prefix([rgb, flow], 4)
        if views is not None and self.fusion.norm_groups:
            raise ValueError(
                "views share frames only where a frame's features depend on that frame alone: not "
                "with model.norm 'group'. Score the clips one by one."
            )
        if min(rgb.shape[2:4]) < 32:
            raise ValueError(
                f"frames of {rgb.shape[2]}x{rgb.shape[3]} px are too small: five poolings halve "
                "them, so they need at least 32x32"
            )
        features: dict[str, Array] = {}
        maps = []
        if self.spatial is not None:
            blocks = self.spatial(rgb, train)
            features |= {f"rgb_{name}": block for name, block in blocks.items()}
            last = blocks["block5"]
            features["rgb_map"] = last if views is None else take_views(last, views)
            maps.append(features["rgb_map"])
        if self.temporal is not None:
            blocks = self.temporal(flow, train, views)
            features |= {f"flow_{name}": block for name, block in blocks.items()}
            features["flow_map"] = blocks["conv3d2"]
            maps.append(blocks["conv3d2"])

        def dropped(name: str, rate: float, x: Array, *, whole: bool = False) -> Array:
            if not train:
                return x
            places = jnp.arange(len(rgb)) if rows is None else rows
            return ClipDropout(rate, whole, name=name)(x, places)

        def answered(*maps: Array, which: str = "") -> dict[str, Array]:
            after = {"fused": self.fusion(*maps)}
            after["pyramid"] = segment_vectors(after["fused"], self.tpn)
            x = dropped(f"{which}drop_input", self.drop.rate(self.drop.input), after["pyramid"])
            after["states"] = self.recurrent(x)
            x = dropped(f"{which}drop_output", self.drop.rate(self.drop.output), after["states"])
            after["logits"], after["step_logits"] = self.head(x)
            return after

        whole = list(maps)
        if self.sees_both:
            drop_rgb = self.fusion.settings.drop_rgb
            whole[0] = dropped("drop_rgb", drop_rgb, maps[0], whole=True)
        features |= answered(*whole)
        for stream in self._also_without if train else ():
            which = f"without_{stream}_"
            rest = _left_out(maps_of(features), stream)
            alone = answered(*(rest[name] for name in STREAMS), which=which)
            features |= {which + name: alone[name] for name in ("logits", "step_logits")}
        return features["logits"], features

    def pyramid_of(self, maps: Mapping[str, Float[Array, "b t h w _c"]]) -> Float[Array, "b s d"]:
        """The pyramid vectors of maps, 'rgb' and 'flow' or one of them; without dropout."""
        # JAX hands dicts on in the order of their keys.
        ordered = [maps[name] for name in STREAMS if name in maps]
        return segment_vectors(self.fusion(*ordered), self.tpn)

    def classify(
        self, pyramid: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b k"], Float[Array, "b s k"]]:
        """Logits of pyramid vectors, and every step's; without dropout."""
        return self.head(self.recurrent(pyramid))

    def without(self, features: Mapping[str, Array], stream: str) -> Float[Array, "b k"]:
        """Logits of clips that are fused without one of the streams.

        Its map is zeros, as for `fusion.loss_without` and `fusion.drop_rgb` in training, and as
        where a stream's last ReLU lets nothing through. An even picture would not be nothing: with
        group normalisation its borders make a map as large as any.

        Args:
          features: what a call returned for the clips.
          stream: 'rgb' or 'flow'; one that the network has.
        """
        return self.classify(self.pyramid_of(_left_out(maps_of(features), stream)))[0]


class LateFusion(nn.Module):
    """Two networks, one per stream, whose class probabilities are averaged.

    Each has a loss of its own, so they are trained as if apart: what fusing maps is compared with.

    Attributes:
      rgb: the network of the spatial stream.
      flow: the network of the temporal stream.

    Source: the two-stream original (averaging); the paper fuses maps instead.
    """

    rgb: ActionNetwork
    flow: ActionNetwork

    @property
    def scored(self) -> tuple[str, ...]:
        """The features that the loss reads: one of each network."""
        return tuple(f"rgb_{name}" for name in self.rgb.scored) + tuple(
            f"flow_{name}" for name in self.flow.scored
        )

    @nn.compact
    def __call__(
        self,
        rgb: Float[Array, "b n h w 3"],
        flow: Float[Array, "b n h w c"],
        *,
        train: bool,
        views: Int[Array, "v t"] | None = None,
        rows: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "bv k"], dict[str, Array]]:
        """As `ActionNetwork`; the logits are log-probabilities.

        'fused', 'pyramid', 'states', 'step_logits' and 'logits' come twice, with 'rgb_' and 'flow_'
        before their names.
        """
        features: dict[str, Array] = {}
        for name, network in (("rgb", self.rgb), ("flow", self.flow)):
            got = network(rgb, flow, train=train, views=views, rows=rows)[1]
            features |= {k if k.startswith(name) else f"{name}_{k}": v for k, v in got.items()}
        scores = jnp.stack([features["rgb_logits"], features["flow_logits"]])
        features["logits"] = nn.logsumexp(nn.log_softmax(scores), axis=0) - jnp.log(2.0)
        return features["logits"], features


Network: TypeAlias = ActionNetwork | LateFusion | C3D | CNNLSTM
Params: TypeAlias = Mapping[str, Any]

# A ConfigDict is no Mapping, though it acts as one.
Config: TypeAlias = Mapping[str, Any] | ConfigDict
Section = TypeVar("Section")


def build_model(config: Config, num_classes: int) -> Network:
    """Makes the network that a configuration describes.

    Args:
      config: the `model` part of a configuration, complete; see `PAPER_MODEL` for the keys, and
        the settings classes for what they mean.
      num_classes: classes.

    Returns:
      The network, an `ActionNetwork` or, with streams 'late', two; with another `architecture` one
      of `baselines`. Equal configurations give equal networks, so that one compiled step serves
      both.

    Raises:
      ValueError: an unknown or missing key, an impossible value, or values that do not go together
        (names the key, what came and what is allowed).

    Example:
      >>> build_model(PAPER_MODEL, 101).head.num_classes
      101
    """
    _check_keys("", config, list(PAPER_MODEL))
    check_choice("architecture", config["architecture"], ("stf", "c3d", "cnn_lstm"))
    check_setting(is_count(config["width"]), "width", config["width"], "an integer from 1 on")
    check_choice("streams", config["streams"], ("both", "rgb", "flow", "late"))
    check_choice("precision", config["precision"], ("float32", "bfloat16"))
    check_choice("norm", config["norm"], ("none", "group"))
    groups = config["norm_groups"]
    check_setting(is_count(groups), "norm_groups", groups, "an integer from 1 on")
    mst = _section(MSTSettings, "mst", config)
    conv3d = _section(Conv3DSettings, "conv3d", config)
    temporal = _section(TemporalSettings, "temporal", config)
    fusion = _section(FusionSettings, "fusion", config)
    lstm = _section(LSTMSettings, "lstm", config)
    head = _section(HeadSettings, "head", config)
    remat = _section(RematSettings, "remat", config)
    drop, tpn = _section(DropSettings, "drop", config), _section(TPNSettings, "tpn", config)
    c3d = _section(C3DSettings, "c3d", config)
    cnn_lstm = _section(CNNLSTMSettings, "cnn_lstm", config)
    if config["architecture"] != "stf":
        return _baseline(config, num_classes, remat, drop, c3d, cnn_lstm)
    _check_combination(config, conv3d, temporal, fusion)
    check_setting(
        head.combine == "project" or (lstm.cell == "lstm" and lstm.hidden == num_classes),
        "head.combine",
        head.combine,
        f"'project', or lstm.cell 'lstm' (is {lstm.cell!r}) and lstm.hidden ({lstm.hidden}) equal "
        f"to the number of classes ({num_classes})",
    )
    width, norm_groups, dtype = config["width"], _norm_groups(config), _dtype(config)
    spatial = functools.partial(_remat(SpatialStream, remat.spatial), width, norm_groups, dtype)
    stream = _remat(TemporalStream, remat.temporal)
    flow = functools.partial(stream, width, mst, conv3d, temporal, norm_groups, dtype)

    def network(streams: str) -> ActionNetwork:
        # Parts are made anew for each network: one part in two networks would share its weights.
        return ActionNetwork(
            spatial=spatial() if streams != "flow" else None,
            temporal=flow() if streams != "rgb" else None,
            fusion=Fusion(fusion, norm_groups, dtype),
            tpn=tpn,
            drop=drop,
            recurrent=BiLSTM(lstm, dtype),
            head=Head(num_classes, head.combine, head.pool),
        )

    if config["streams"] == "late":
        return LateFusion(rgb=network("rgb"), flow=network("flow"))
    return network(config["streams"])


def unread(architecture: str, streams: str) -> tuple[str, ...]:
    """The keys of a `model` configuration that a network does not read, whatever their values.

    Args:
      architecture: as `model.architecture`.
      streams: as `model.streams`.

    Returns:
      Keys of settings and of whole sections.

    Example:
      >>> unread("stf", "rgb")
      ('c3d', 'cnn_lstm', 'mst', 'conv3d', 'temporal')
    """
    baselines = ("c3d", "cnn_lstm")
    if architecture != "stf":
        others = tuple(name for name in baselines if name != architecture)
        return ("width", *_TEMPORAL_PARTS, "fusion", "tpn", "lstm", "head", *others)
    return baselines + (_TEMPORAL_PARTS if streams == "rgb" else ())


# The sections that only the temporal stream is made of.
_TEMPORAL_PARTS = ("mst", "conv3d", "temporal")


def _norm_groups(config: Config) -> int:
    return config["norm_groups"] if config["norm"] == "group" else 0


def _dtype(config: Config) -> DTypeLike | None:
    return jnp.bfloat16 if config["precision"] == "bfloat16" else None


def _baseline(
    config: Config,
    num_classes: int,
    remat: RematSettings,
    drop: DropSettings,
    c3d: C3DSettings,
    cnn_lstm: CNNLSTMSettings,
) -> C3D | CNNLSTM:
    """One of the networks that ours is compared with."""
    stream, name = config["streams"], config["architecture"]
    one = f"'rgb' (as published) or 'flow' with model.architecture {name!r}, which sees one stream"
    check_setting(stream in STREAMS, "streams", stream, one)
    how = remat.spatial if stream == "rgb" else remat.temporal
    norm_groups, dtype = _norm_groups(config), _dtype(config)
    rates = drop.rate(drop.input), drop.rate(drop.output)
    if name == "c3d":
        volumes = _remat(Volumes, how)(c3d.width, norm_groups, dtype)
        return C3D(stream, volumes, c3d.dense, num_classes, rates, dtype)
    frames = _remat(SpatialStream, how)(cnn_lstm.width, norm_groups, dtype)
    return CNNLSTM(stream, frames, cnn_lstm.hidden, num_classes, rates, dtype)


def _section(settings: type[Section], name: str, config: Config) -> Section:
    fields = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    _check_keys(f"{name}.", config[name], fields)
    return settings(**config[name])


def _check_keys(prefix: str, config: Config, expected: list[str]) -> None:
    for key in config:
        near = difflib.get_close_matches(key, expected, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        allowed = f"the keys {', '.join(expected)}{hint}"
        check_setting(key in expected, f"{prefix}{key}", "an unknown key", allowed)
    for key in expected:
        check_setting(key in config, f"{prefix}{key}", "nothing", "a value: the key is missing")


def _check_combination(
    config: Config,
    conv3d: Conv3DSettings,
    temporal: TemporalSettings,
    fusion: FusionSettings,
) -> None:
    maps = {"model.width times 8": 8 * config["width"], "conv3d.width": conv3d.width}
    if config["streams"] == "rgb":
        del maps["conv3d.width"]
    elif config["streams"] == "flow":
        del maps["model.width times 8"]
    told = ", ".join(f"{name} = {value}" for name, value in maps.items())
    check_setting(
        fusion.init != "feichtenhofer" or set(maps.values()) == {fusion.width},
        "fusion.init",
        fusion.init,
        f"'he', or fusion.width ({fusion.width}) equal to the maps' widths ({told})",
    )
    check_setting(
        temporal.init != "inflate" or conv3d.mid == "out" or not conv3d.factorised,
        "temporal.init",
        temporal.init,
        "'he', 'glorot', 'normal001', or conv3d.mid 'out'",
    )


def fold_pyramid(network: Network, params: Params) -> tuple[Network, Params]:
    """The same classifier with fewer weights, for inference: coarse levels folded into the finest.

    A mean over a coarse bin is the mean of the finest means inside it, so that its weights can be
    shared out to them beforehand: of the paper's 1 + 2 + 4 maps 4 remain, and of the recurrent
    layer's input weights four sevenths. Dropout tells the levels apart, so training needs them all.

    Args:
      network: as `build_model` makes it.
      params: its parameters.

    Returns:
      A network without the levels that divide the finest one, and its parameters. With
      `tpn.psi` = 'max', nothing to fold, or no pyramid, they are those that came.

    Source: SPEC 6.5.
    """
    if isinstance(network, C3D | CNNLSTM):
        return network, params
    if isinstance(network, LateFusion):
        folded = {
            name: fold_pyramid(part, params[name])
            for name, part in (("rgb", network.rgb), ("flow", network.flow))
        }
        networks: dict[str, Any] = {name: part[0] for name, part in folded.items()}
        return LateFusion(**networks), {name: part[1] for name, part in folded.items()}
    levels = tuple(network.tpn.levels)
    finest = max(levels)
    kept = tuple(bins for bins in levels if finest % bins) + (finest,)
    if network.tpn.psi != "mean" or len(kept) == len(levels):
        return network, params
    smaller = network.clone(tpn=dataclasses.replace(network.tpn, levels=kept))
    if network.recurrent.settings.cell == "mean":  # the classifier reads the pyramid itself
        project = params["head"]["project"]
        project = {**project, "kernel": _folded(project["kernel"], levels)}
        return smaller, {**params, "head": {"project": project}}
    recurrent = {
        name: {**direction, "input": {"kernel": _folded(direction["input"]["kernel"], levels)}}
        for name, direction in params["recurrent"].items()
    }
    return smaller, {**params, "recurrent": recurrent}


@functools.partial(jax.jit, static_argnums=1)
def _folded(kernel: Float[Array, "_d e"], levels: tuple[int, ...]) -> Float[Array, "_d2 e"]:
    """The rows of levels that divide the finest, added to those of the finest."""
    finest = max(levels)
    maps = rearrange(kernel, "(n d) e -> n d e", n=sum(levels))
    kept: list[Array] = []
    total = jnp.zeros_like(maps[:finest])
    for bins, start in zip(levels, np.cumsum([0, *levels[:-1]]), strict=True):
        level = maps[start : start + bins]
        if finest % bins:
            kept.append(level)
        else:
            total = total + jnp.repeat(level, finest // bins, axis=0) / (finest // bins)
    return rearrange(jnp.concatenate([*kept, total]), "n d e -> (n d) e")
