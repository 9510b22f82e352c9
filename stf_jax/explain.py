"""Why a network says what it says: where it looked, and what each stream, step and level gave."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from stf_jax.baselines import C3D, CNNLSTM
from stf_jax.charts import picture
from stf_jax.checkpoint import Params
from stf_jax.flow import flow_to_colour
from stf_jax.index import some
from stf_jax.inputs import Batch, InputSettings, compute_flow, flow_to_pixels, network_input
from stf_jax.model import STREAMS, ActionNetwork, LateFusion, Network, maps_of
from stf_jax.predict import Predictor, Trained
from stf_jax.prepare import RecordSettings


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What one network's score of one class rests on, for one clip.

    Args:
      label: the class.
      probabilities: float32 `k`.
      heat: by stream, Grad-CAM: float32 `t h w` in [0, 1], h w as the network's input; 1 is the
        place in the clip that speaks most for the class. All zero where nothing does.
      stream_gain: by stream, what the class's logit loses when the stream's map is set to zero.
      step_probabilities: float32 `s k`, of every recurrent step by itself.
      part_gain: float32 `s n`: what the class's logit loses when one level of the temporal pyramid
        is set to zero in one step. Parts overlap, so these do not add up to the logit.
      level_gain: float32 `n`: the same for a level in all steps.
      levels: bins of the levels.
    """

    label: int
    probabilities: np.ndarray
    heat: dict[str, np.ndarray]
    stream_gain: dict[str, float]
    step_probabilities: np.ndarray
    part_gain: np.ndarray
    level_gain: np.ndarray
    levels: tuple[int, ...]


def explain(
    network: Network,
    params: Params,
    batch: Batch,
    inputs: InputSettings,
    stored: RecordSettings,
    label: int | None = None,
) -> dict[str, Explanation]:
    """Explains the score of a clip.

    Args:
      network: as trained, its pyramid not folded.
      params: its parameters.
      batch: one clip.
      inputs: how it becomes network input.
      stored: how the records hold it.
      label: the class to explain; None is the one that the network chooses.

    Returns:
      By network: 'fused' (or 'rgb', 'flow' for a network of one stream); both with late fusion.

    Raises:
      ValueError: several clips, or a network without streams' maps and a pyramid.

    Source: Selvaraju et al., Grad-CAM, ICCV 2017, equations 1 and 2, over space and time.
    """
    network = _explained_kind(network)
    if len(batch.label) != 1:
        raise ValueError(f"one clip is explained at a time, got a batch of {len(batch.label)}")
    batch = jax.tree.map(jnp.asarray, compute_flow(batch, stored))
    rgb, flow = network_input(batch, inputs, augment=None)
    if label is None:
        logits, _ = network.apply({"params": params}, rgb, flow, train=False)
        label = int(np.asarray(logits)[0].argmax())
    if isinstance(network, LateFusion):
        parts = {"rgb": (network.rgb, params["rgb"]), "flow": (network.flow, params["flow"])}
    else:
        alone = "rgb" if network.spatial is not None else "flow"
        parts = {"fused" if network.sees_both else alone: (network, params)}
    return {name: _explain_one(part, p, rgb, flow, label) for name, (part, p) in parts.items()}


def _explained_kind(network: Network) -> ActionNetwork | LateFusion:
    """The network, if it is one that explanations are of."""
    if not isinstance(network, C3D | CNNLSTM):
        return network
    name = "c3d" if isinstance(network, C3D) else "cnn_lstm"
    raise ValueError(
        "explanations show streams, maps and the pyramid of the network of model.architecture="
        f"'stf'; that of {name!r} has none: choose another run"
    )


def _explain_one(
    network: ActionNetwork, params: Params, rgb: Array, flow: Array, label: int
) -> Explanation:
    found = jax.device_get(_explained(network, params, rgb, flow, jnp.int32(label)))
    streams = [name for name in STREAMS if name in found["heat"]]
    found["heat"] = {name: found["heat"][name] for name in streams}
    found["stream_gain"] = {name: float(found["stream_gain"][name]) for name in streams}
    return Explanation(label=label, levels=tuple(network.tpn.levels), **found)


@functools.partial(jax.jit, static_argnums=0)
def _explained(
    network: ActionNetwork,
    params: Params,
    rgb: Float[Array, "1 t h w 3"],
    flow: Float[Array, "1 t h w c"],
    label: Int[Array, ""],
) -> dict[str, Array | dict[str, Array]]:
    weights = {"params": params}
    called: Any = network.apply(weights, rgb, flow, train=False)
    features = called[1]
    maps = maps_of(features)

    def classified(pyramid: Array) -> Any:
        return network.apply(weights, pyramid, method="classify")

    def score(maps: dict[str, Array]) -> Array:
        made: Any = network.apply(weights, maps, method="pyramid_of")
        return classified(made)[0][0, label]

    whole, slopes = jax.value_and_grad(score)(maps)
    heat = {name: _heat(maps[name], slopes[name], rgb.shape[2]) for name in maps}
    pyramid = features["pyramid"]
    logits, steps = classified(pyramid)
    level_of = np.repeat(np.arange(len(network.tpn.levels)), network.tpn.levels)
    vectors = rearrange(pyramid, "1 s (n d) -> s n d", n=len(level_of))

    def lost_stream(name: str) -> Array:
        left: Any = network.apply(weights, features, name, method="without")
        return whole - left[0, label]

    def lost(parts: Array) -> Array:
        """What the logit loses without the marked parts, bool `s n`."""
        left = jnp.where(parts[:, level_of, None], jnp.zeros_like(vectors), vectors)
        return whole - classified(rearrange(left, "s n d -> 1 s (n d)"))[0][0, label]

    shape = len(vectors), len(network.tpn.levels)
    single = jnp.eye(shape[0] * shape[1], dtype=bool).reshape(-1, *shape)
    one_level = jnp.repeat(jnp.eye(shape[1], dtype=bool)[:, None], shape[0], axis=1)
    return {
        "probabilities": jax.nn.softmax(logits[0].astype(jnp.float32)),
        "heat": heat,
        "stream_gain": {name: lost_stream(name) for name in maps},
        "step_probabilities": jax.nn.softmax(steps[0].astype(jnp.float32)),
        "part_gain": jax.lax.map(lost, single).reshape(shape),
        "level_gain": jax.lax.map(lost, one_level),
    }


def _heat(features: Array, slope: Array, size: int) -> Float[Array, "t size size"]:
    """Grad-CAM of one map, scaled to its largest value and to the size of the input."""
    weights = slope.mean(axis=(1, 2, 3), keepdims=True)
    heat = jax.nn.relu((weights * features).sum(axis=-1))[0].astype(jnp.float32)
    heat = jax.image.resize(heat, (len(heat), size, size), "linear")
    return heat / jnp.maximum(heat.max(), 1e-12)


_SHOWN = 8  # frames


def draw(
    explained: Explanation,
    batch: Batch,
    stored: RecordSettings,
    names: tuple[str, ...],
    path: Path,
    truth: str = "",
) -> None:
    """Draws an explanation: frames and flow with the heat over them, steps, levels (PNG).

    Frames are dark where there is no heat. Flow keeps its colours, which mean directions; on both,
    lines run where the heat is a third and two thirds of its largest value in the clip.

    Args:
      explained: what `explain` returns for the batch.
      batch: the clip.
      stored: how the records hold it.
      names: of the classes.
      path: of the picture.
      truth: the true class, for the title; '' leaves it out.
    """
    rows, _ = clip_pictures(explained, batch, stored)
    count = len(explained.heat)
    probability = explained.probabilities[explained.label]
    told = f"why '{names[explained.label]}' ({probability:.1%})"
    told += f", truly '{truth}'" if truth else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with picture(path, 12.0, 1.75 * count + 3.2, dots=110) as figure:
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.75 * count, 3.0))
        top, bottom = halves
        figure.suptitle(told, fontsize=13)
        _draw_heat(top, explained, rows)
        left, right = bottom.subplots(1, 2)
        _draw_steps(left, explained, names)
        _draw_parts(right, explained)


def _draw_heat(figure: Any, explained: Explanation, rows: dict[str, np.ndarray]) -> None:
    frames = len(next(iter(rows.values())))
    shown = np.linspace(0, frames - 1, min(_SHOWN, frames)).round().astype(int)
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for (name, pictures), line in zip(rows.items(), axes, strict=True):
        for frame, ax in zip(shown, line, strict=True):
            heat = explained.heat[name][frame]
            light = 1.0 if name == "flow" else 0.35 + 0.65 * heat[..., None]
            ax.imshow(np.rint(light * pictures[frame]).astype(np.uint8))
            for ink, width in (("white", 2.2), ("black", 0.9)):
                if heat.max() > 1 / 3:
                    ax.contour(heat, levels=[1 / 3, 2 / 3], colors=ink, linewidths=width)
            ax.set(xticks=[], yticks=[], title=f"frame {frame + 1}")
            ax.title.set_fontsize(8)
        gain = explained.stream_gain[name]
        line[0].set_ylabel(f"{name}\nlogit without it {-gain:+.2f}", fontsize=9)


def clip_pictures(
    explained: Explanation, batch: Batch, stored: RecordSettings
) -> tuple[dict[str, np.ndarray], float]:
    """The pictures that the heat lies over.

    Args:
      explained: what `explain` returns for the batch.
      batch: the clip.
      stored: how the records hold it.

    Returns:
      By stream, uint8 `t h w 3`, the centre crop; and the speed that is drawn in full colour, px
      per frame.
    """
    rgb = np.asarray(batch.rgb[0])
    size = next(iter(explained.heat.values())).shape[1]
    begin = (rgb.shape[1] - size) // 2
    window = (slice(None), slice(begin, begin + size), slice(begin, begin + size))
    pictures = {"rgb": rgb[window]}
    stacks = np.asarray(compute_flow(batch, stored).flow[0])
    centre = stacks.shape[1] // 4 * 2
    fields = rearrange(stacks[:, centre : centre + 2], "t uv h w -> t h w uv")[window]
    flow = np.asarray(flow_to_pixels(jnp.asarray(fields), stored.flow_bound))
    # The fastest hundredth is left out, so that one bad vector does not pale all the others.
    fastest = max(float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), 99)), 0.25)
    pictures["flow"] = np.stack([flow_to_colour(field, fastest) for field in flow])
    return {name: pictures[name] for name in explained.heat}, fastest


def with_heat(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A picture with heat over it, both `h w`: the more, the stronger. RGB, uint8."""
    from matplotlib import colormaps

    over = colormaps["inferno"](heat)[..., :3] * 255
    share = 0.65 * heat[..., None]
    return np.rint((1 - share) * picture + share * over).astype(np.uint8)


def _draw_steps(ax, explained: Explanation, names: tuple[str, ...]) -> None:
    """The classes over the recurrent steps: the explained one and its strongest rivals."""
    order = np.argsort(-explained.probabilities)[:4].tolist()
    classes = list(dict.fromkeys([explained.label, *order]))[:4]
    steps = np.arange(len(explained.step_probabilities))
    width, bars = 0.8 / len(classes), []
    for number, label in enumerate(classes):
        place = steps + (number - (len(classes) - 1) / 2) * width
        bars.append(ax.bar(place, explained.step_probabilities[:, label], width))
    names_of_steps = [f"step {step + 1}" for step in steps]
    if len(steps) < len(explained.part_gain):  # without recurrence
        names_of_steps = ["mean of the steps"]
    ax.set(xticks=steps, xticklabels=names_of_steps, ylim=(0, 1.3))
    ax.set(yticks=np.linspace(0, 1, 6), ylabel="probability")
    ax.set_title("each recurrent step by itself")
    # Handed over: of itself the legend leaves out names that begin with an underscore.
    told = [names[label] for label in classes]
    ax.legend(bars, told, fontsize=8, frameon=False, loc="upper center", ncols=2)  # above the bars


def _draw_parts(ax, explained: Explanation) -> None:
    gains = np.vstack([explained.part_gain, explained.level_gain])
    bound = max(float(np.abs(gains).max()), 1e-6)
    ax.imshow(gains, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for (row, column), gain in np.ndenumerate(gains):
        dark = abs(gain) > 0.6 * bound
        ax.text(column, row, f"{gain:+.2f}", ha="center", va="center", fontsize=9,
                color="white" if dark else "black")  # fmt: skip
    steps = [f"step {step + 1}" for step in range(len(explained.part_gain))]
    ax.set(yticks=range(len(gains)), yticklabels=[*steps, "all steps"])
    levels = [f"{bins} bin{'s' * (bins > 1)}" for bins in explained.levels]
    ax.set(xticks=range(len(levels)), xticklabels=levels)
    ax.set_title("what the logit loses without a level of the pyramid")


@dataclasses.dataclass(frozen=True)
class Explainer:
    """A trained network, its pyramid not folded, ready to explain videos.

    Args:
      predictor: what turns files into clips.
      network: the network.
      params: its weights.
    """

    predictor: Predictor
    network: Network
    params: Params

    @classmethod
    def load(cls, source: Path) -> "Explainer":
        """Reads a run's folder or an exported file; see `stf_jax.load`.

        Raises:
          ValueError: its network is none that is explained; besides, as `stf_jax.load`.
        """
        trained = Trained.read(source)
        network = _explained_kind(trained.settings.model(len(trained.class_names)))
        return cls(Predictor.of(trained), network, trained.params)

    def label_of(self, name: str) -> int:
        """The label of a class.

        Raises:
          ValueError: there is no such class (names those that there are).
        """
        names = self.predictor.class_names
        if name not in names:
            raise ValueError(f"no class is named {name!r}; there are {some(list(names))}")
        return names.index(name)

    def explain_file(self, video: Path, out: Path, label: int | None, number: int) -> list[str]:
        """Explains one file and draws it.

        Args:
          video: the file.
          out: folder of the pictures.
          label: the class to explain; None is the one that the network chooses.
          number: of the file, so that two of one name do not overwrite each other.

        Returns:
          What was found, line by line.

        Raises:
          VideoFault: the file is not a usable video (says why).
        """
        settings, names = self.predictor.settings, self.predictor.class_names
        batch = self.predictor.clip(video)
        found = explain(self.network, self.params, batch, settings.inputs, settings.records, label)
        lines = []
        for part, explained in found.items():
            path = out / f"{number:03d}_{video.stem}_{part}.png"
            draw(explained, batch, settings.records, names, path)
            lines += [f"{part}: {line}" for line in _in_words(explained, names)]
            lines.append(f"{part}: {path}")
        return lines


def _in_words(explained: Explanation, names: tuple[str, ...]) -> list[str]:
    label = explained.label
    steps = ", ".join(f"{p:.1%}" for p in explained.step_probabilities[:, label])
    streams = ", ".join(f"{name} {gain:+.2f}" for name, gain in explained.stream_gain.items())
    levels = ", ".join(
        f"{bins} {gain:+.2f}"
        for bins, gain in zip(explained.levels, explained.level_gain, strict=True)
    )
    return [
        f"{names[label]} {explained.probabilities[label]:.1%}; by its steps alone {steps}",
        f"share of its logit that goes with a stream: {streams}; with a pyramid level: {levels}",
    ]
