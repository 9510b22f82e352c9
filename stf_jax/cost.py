"""What a network costs: size and work of every layer, memory of a training step, all by tracing.

Nothing here knows a formula of a layer: shapes, parameters and products are read off the modules
and the operations that they trace to, so a changed layer cannot leave an outdated figure behind.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core
from ml_collections import ConfigDict

from stf_jax.baselines import FullyConnected
from stf_jax.checkpoint import Params
from stf_jax.metrics import cross_entropy
from stf_jax.model import Head, build_model
from stf_jax.optim import by_path
from stf_jax.recurrent import LSTM
from stf_jax.run import Settings, source_weights
from stf_jax.train import abstract_state
from stf_jax.transfer import Fate, plan_transfer
from stf_jax.vgg import KERAS_FILE, Convolution, vgg16_fates

# What counts as one layer: everything inside it is added to it.
_LAYERS = (Convolution, LSTM, Head, FullyConnected)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer, or a sum of layers.

    Args:
      name: path of its parameters, such as 'spatial/block1_conv1'.
      output: shape of what it returns; () for a sum.
      parameters: scalars.
      macs: multiply-adds per forward pass of convolutions and matrix products, counted as the
        plain algorithm does them, whatever a backend makes of it. Sums and point-wise work are
        left out, as is usual.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    macs: int


def layer_costs(settings: Settings, num_classes: int, batch: int = 1) -> list[LayerCost]:
    """The layers of a network in the order in which data flows through them.

    Args:
      settings: of the run.
      num_classes: classes.
      batch: clips.

    Returns:
      One row per convolution, LSTM direction and head.
    """
    described = settings.config.model.to_dict()
    described["fusion"]["loss_without"] = ()  # what an answer takes, not what training adds to it
    network = build_model(described, num_classes)
    params = settings.abstract_params(num_classes)
    outputs: dict[str, tuple[int, ...]] = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, _LAYERS):
            first = jax.tree.leaves(result)[0]
            outputs["/".join(context.module.path)] = first.shape
        return result

    def forward(params: Params, rgb: jax.Array, flow: jax.Array) -> jax.Array:
        with nn.intercept_methods(record):
            # As in training: without a backward pass a CPU computes some layers in pieces.
            rngs = {"dropout": jax.random.key(0)}
            outcome: Any = network.apply({"params": params}, rgb, flow, train=True, rngs=rngs)
        return outcome[0]

    jaxpr = jax.make_jaxpr(forward)(params, *_clips(settings, batch))
    sizes = {name: math.prod(leaf.shape) for name, leaf in by_path(params).items()}
    macs = dict.fromkeys(outputs, 0)
    for scope, count in _products(jaxpr.jaxpr, "", 1):
        (layer,) = [name for name in outputs if f"/{name}/" in f"/{scope}/"]
        macs[layer] += count
    return [
        LayerCost(
            name,
            shape,
            sum(size for path, size in sizes.items() if path.startswith(f"{name}/")),
            macs[name],
        )
        for name, shape in outputs.items()
    ]


def total(name: str, layers: list[LayerCost]) -> LayerCost:
    """The sum of layers."""
    return LayerCost(
        name, (), sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers)
    )


def _clips(settings: Settings, batch: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in settings.clip_shapes(batch)]


def _products(jaxpr: core.Jaxpr, scope: str, times: int) -> Iterator[tuple[str, int]]:
    """Scope and multiply-adds of every convolution and matrix product, `times` each."""
    for equation in jaxpr.eqns:
        inner = f"{scope}/{equation.source_info.name_stack}"
        kind = equation.primitive.name
        results, shapes = (
            [getattr(var.aval, "shape", ()) for var in part]
            for part in (equation.outvars, equation.invars)
        )
        result = results[0] if results else ()
        if kind == "conv_general_dilated":
            # A kernel's output axis is part of the result already.
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = [size for axis, size in enumerate(shapes[1]) if axis != out_axis]
            yield inner, times * math.prod(result) * math.prod(kernel)
        elif kind == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield inner, times * math.prod(result) * math.prod(shapes[0][i] for i in contracted)
        elif kind == "cond":
            # Algorithms for different backends: count the plain one, which does the most.
            branches = [list(_products(b.jaxpr, inner, times)) for b in equation.params["branches"]]
            yield from max(branches, key=lambda found: sum(count for _, count in found))
        else:
            rounds = equation.params.get("length", 1) if kind == "scan" else 1
            for part in _jaxprs(equation.params):
                yield from _products(part, inner, times * rounds)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training step holds at once, before the compiler's work space.

    Args:
      parameters: master weights.
      gradients: one per weight.
      optimizer: its state, and the averaged weights.
      activations: what the backward pass reads; `remat` makes it less.
      batch: clips that are worked on at a time.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def memory_plan(settings: Settings, num_classes: int) -> MemoryPlan:
    """What a training step of this configuration needs, by tracing it; nothing is computed."""
    state = abstract_state(settings, num_classes, settings.config.stage_order[0])
    parts = settings.optimizer.accumulate
    network, batch = settings.model(num_classes), settings.config.batch_size // parts

    def residuals(params: Params, rgb: jax.Array, flow: jax.Array) -> Any:
        def loss(params: Params) -> jax.Array:
            rngs = {"dropout": jax.random.key(0)}
            outputs: Any = network.apply({"params": params}, rgb, flow, train=True, rngs=rngs)
            scores = [outputs[1][name] for name in network.scored]
            return cross_entropy(scores, jnp.zeros(batch, jnp.int32)).mean()

        return jax.vjp(loss, params)[1]

    jaxpr = jax.make_jaxpr(residuals)(state.params, *_clips(settings, batch)).jaxpr
    # Weights are counted already, and one array may be read by several operations.
    weights = set(jaxpr.invars[: len(jax.tree.leaves(state.params))])
    kept = {var for var in jaxpr.outvars if isinstance(var, core.Var)} - weights
    parameters = _bytes(state.params)
    return MemoryPlan(
        parameters=parameters,
        # A sum, and the part that is added to it.
        gradients=parameters * (1 if parts == 1 else 2),
        optimizer=_bytes(state.opt_state) + _bytes(state.average),
        activations=_bytes([var.aval for var in kept]),
        batch=batch,
    )


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def inspection(config: ConfigDict) -> str:
    """What a configuration makes, as text: layers, memory, and where weights come from.

    Classes are counted as the data set's own: 101 for 'ucf101', else 2, because no data is read.
    """
    settings = Settings.of(config)
    num_classes = 101 if config.data.name == "ucf101" else 2
    layers = layer_costs(settings, num_classes)
    rgb, flow = settings.clip_shapes(1)
    lines = [
        f"One clip: rgb {_sizes(rgb[1:])}, flow {_sizes(flow[1:])}; {num_classes} classes.",
        "",
        *_layer_table(layers),
        "",
        *_memory_table(memory_plan(settings, num_classes)),
        "",
        *_origins(settings, num_classes),
    ]
    return "\n".join(lines)


def _layer_table(layers: list[LayerCost]) -> list[str]:
    whole = total("total", layers)
    groups: dict[str, list[LayerCost]] = {}
    for layer in layers:
        groups.setdefault(_group(layer.name), []).append(layer)
    lines = [f"{'layer':<36}{'output':>18}{'parameters':>14}{'share':>8}{'GMAC':>11}{'share':>8}"]

    def row(layer: LayerCost) -> str:
        return (
            f"{layer.name:<36}{_sizes(layer.output[1:]):>18}{layer.parameters:>14,}"
            f"{layer.parameters / whole.parameters:>8.1%}{layer.macs / 1e9:>11,.3f}"
            f"{layer.macs / whole.macs:>8.1%}"
        )

    for name, members in groups.items():
        lines += [row(layer) for layer in members]
        if len(members) > 1:
            lines.append(row(total(f"= {name}", members)))
    return [*lines, row(whole)]


def _group(name: str) -> str:
    """The block of the specification's table (section 9) that a layer belongs to."""
    stream, _, layer = name.partition("/")
    if stream in ("rgb", "flow"):  # late fusion: two networks
        return f"{stream}/{_group(layer)}"
    if stream == "temporal":
        return "temporal, VGG" if layer.startswith("block") else "temporal, MST and 3DCNN"
    return "recurrent and head" if stream in ("recurrent", "head") else stream


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _memory_table(plan: MemoryPlan) -> list[str]:
    parts = {
        "parameters": plan.parameters,
        "gradients": plan.gradients,
        "optimiser": plan.optimizer,
        f"kept for the backward pass ({plan.batch} clips)": plan.activations,
        "together, before the compiler's work space": plan.total,
    }
    return [
        "Memory of a training step",
        *(f"{name:<44}{size / 2**20:>12,.0f} MiB" for name, size in parts.items()),
    ]


def _origins(settings: Settings, num_classes: int) -> list[str]:
    """Where each weight of the first stage would come from; reads and downloads nothing."""
    config = settings.config
    params = settings.abstract_params(num_classes)
    shapes = {name: tuple(leaf.shape) for name, leaf in by_path(params).items()}
    first, *later = config.stage_order
    title = f"Weights of stage '{first}'"
    if settings.transfer.source:
        source = source_weights(settings, {"flow": settings.records.stamp(), "classes": ()})
        assert source is not None
        _, fates = plan_transfer(by_path(params), source, settings.transfer)
        title += f" ({source.label}, if its classes are others)"
    elif config.pretrained == "none":
        fates = {name: Fate(shapes[name], "initialised at random") for name in shapes}
    else:
        told = vgg16_fates(params, config.model.temporal.init, config.model.temporal.conv1_init)
        fates = {name: Fate(shapes[name], fate) for name, fate in told.items()}
        files = {"keras": f"Keras's {KERAS_FILE}"}
        title += f" ({files.get(config.pretrained, config.pretrained)})"
    return [
        title,
        *(f"{name:<52}{_sizes(fate.shape):>20}  {fate.fate}" for name, fate in fates.items()),
        *(f"Weights of stage '{name}': all from the best of the stage before" for name in later),
    ]
