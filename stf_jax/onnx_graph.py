"""A JAX function as an ONNX graph: every primitive of its jaxpr becomes a few nodes.

What is constant is computed by JAX while the graph is made. Sizes may depend on one unknown, the
number of clips. A primitive without a translation is an error that names it, so a graph is either
whole or not made; whether it computes the same is for whoever makes it to check.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import onnx
from jax.export import is_symbolic_dim
from jax.extend import core
from onnx import helper, numpy_helper

OPSET = 18

# A constant, or the name of what a node computes.
Value: TypeAlias = np.ndarray | str

_EVERYTHING = np.iinfo(np.int64).max

_SAME = {
    "abs": "Abs", "add": "Add", "and": "And", "ceil": "Ceil", "div": "Div", "eq": "Equal",
    "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual",
    "log": "Log", "logistic": "Sigmoid", "lt": "Less", "max": "Max", "min": "Min", "mul": "Mul",
    "neg": "Neg", "not": "Not", "or": "Or", "pow": "Pow", "sign": "Sign", "sqrt": "Sqrt",
    "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip

# What calls a function, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}

# What matters to gradients and to nothing else.
_NOTHING = ("name", "stop_gradient", "copy", "optimization_barrier")


def onnx_model(
    function: Callable[..., jax.Array],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    output: str,
    facts: Mapping[str, str],
) -> onnx.ModelProto:
    """Translates a function.

    Args:
      function: of arrays, in the order of `inputs`, to one array; jax-traceable.
      inputs: the names, shapes and dtypes; the first axis may be symbolic, the same for all.
      output: name of the result.
      facts: what the file says about itself.

    Returns:
      The model, checked by ONNX's own checker.

    Raises:
      ValueError: the function uses something that is not translated (names it).
    """
    closed = jax.make_jaxpr(function)(*inputs.values())
    graph = _Graph(next(iter(inputs)), next(iter(inputs.values())).shape[0])
    (result,) = graph.lower(closed.jaxpr, closed.consts, list(inputs))
    aval: Any = closed.out_avals[0]
    graph.nodes.append(helper.make_node("Identity", [graph.name(result)], [output]))
    nodes, constants = graph.needed(output)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "stf_jax",
            [_declared(name, spec) for name, spec in inputs.items()],
            [_declared(output, aval)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,  # of the year of OPSET: what reads the one reads the other
        producer_name="stf_jax",
    )
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model)
    return model


def _declared(name: str, spec: Any) -> onnx.ValueInfoProto:
    shape = [str(size) if is_symbolic_dim(size) else size for size in spec.shape]
    return helper.make_tensor_value_info(name, _type(spec.dtype), shape)


def _type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class _Graph:
    """Nodes in the making.

    Args:
      first: an input whose first axis is as long as there are clips.
      batch: that length, as JAX calls it.
    """

    def __init__(self, first: str, batch: Any) -> None:
        self.first, self.batch = first, batch
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names: dict[int, tuple[str, np.ndarray]] = {}
        self._numbers = itertools.count()

    def name(self, value: Value) -> str:
        """The name of a value; constants are stored once."""
        if isinstance(value, str):
            return value
        if id(value) not in self._names:
            name = f"c{next(self._numbers)}"
            self._names[id(value)] = name, value  # the value is kept, and with it its id
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
            # It makes an axis of what has none.
            del self._constants[name].dims[value.ndim :]
        return self._names[id(value)][0]

    def add(self, op: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node of one output; returns its name."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, count: int, *inputs: Value, **attributes: Any) -> list[str]:
        """Adds a node of several outputs."""
        outputs = [f"v{next(self._numbers)}" for _ in range(count)]
        names = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(op, names, outputs, **attributes))
        return outputs

    def needed(self, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes and constants that an output is made of."""
        wanted, kept = {output}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        constants = [tensor for name, tensor in self._constants.items() if name in wanted]
        return kept[::-1], constants

    def lower(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        """Adds the nodes of a jaxpr; returns its results."""
        known: dict[Any, Value] = {}
        known |= dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                kind: Any = atom.aval
                return np.asarray(atom.val, kind.dtype)
            return known[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            known |= dict(zip(equation.outvars, self._apply(equation, values), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, values: list[Value]) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        if name in _NOTHING:
            return values
        if name in _CALLS:
            called = parameters[_CALLS[name]]
            return self.lower(called.jaxpr, called.consts, values)
        if name == "scan":
            return self._scan(parameters, values)
        fixed = not any(
            is_symbolic_dim(size) for variable in equation.outvars for size in variable.aval.shape
        )
        if fixed and all(isinstance(value, np.ndarray) for value in values):
            made = equation.primitive.bind(*values, **parameters)
            made = made if equation.primitive.multiple_results else [made]
            return [np.asarray(array) for array in made]
        if name in _SAME:
            return [self.add(_SAME[name], *values)]
        if name not in _RULES:
            raise ValueError(
                f"ONNX: the network uses {name!r}, which stf_jax.onnx_graph does not translate; "
                "choose another format, or add a rule for it there"
            )
        made = _RULES[name](self, equation, *values)
        return made if isinstance(made, list) else [made]

    def _scan(self, parameters: Mapping[str, Any], values: list[Value]) -> list[Value]:
        """A loop of a known number of steps, one step after the other."""
        consts, carried = parameters["num_consts"], parameters["num_carry"]
        fixed, carry = values[:consts], values[consts : consts + carried]
        sequences, body = values[consts + carried :], parameters["jaxpr"]
        steps = range(parameters["length"])
        rows: dict[int, list[Value]] = {}
        for step in reversed(steps) if parameters["reverse"] else steps:
            place = np.asarray(step, np.int64)
            items = [self.add("Gather", sequence, place, axis=0) for sequence in sequences]
            out = self.lower(body.jaxpr, body.consts, [*fixed, *carry, *items])
            carry, rows[step] = out[:carried], out[carried:]
        axis = np.array([0])
        ordered = zip(*(rows[step] for step in steps), strict=True)
        stacked: list[Value] = [
            self.add("Concat", *(self.add("Unsqueeze", row, axis) for row in column), axis=0)
            for column in ordered
        ]
        return [*carry, *stacked]

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """To a shape of which one size may be unknown."""
        sizes = [-1 if is_symbolic_dim(size) else size for size in shape]
        if isinstance(value, np.ndarray):
            return value.reshape(sizes)
        if sizes.count(-1) > 1:
            raise ValueError(f"ONNX: a shape with two unknown sizes is not translated: {shape}")
        return self.add("Reshape", value, np.array(sizes, np.int64))

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Axes in another order."""
        if list(order) == list(range(len(order))):
            return value
        if isinstance(value, np.ndarray):
            return value.transpose(order)
        return self.add("Transpose", value, perm=list(order))

    def cut(
        self, value: Value, axes: Sequence[int], starts: Any, ends: Any, steps: Any = None
    ) -> str:
        """Stretches of axes."""
        steps = [1] * len(axes) if steps is None else steps
        return self.add(
            "Slice", value, *(np.array(a, np.int64) for a in (starts, ends, axes, steps))
        )

    def sizes(self, shape: Sequence[Any]) -> Value:
        """A shape as a tensor; unknown sizes are multiples of the number of clips."""
        parts: list[Value] = []
        for size in shape:
            if not is_symbolic_dim(size):
                parts.append(np.array([size], np.int64))
                continue
            factor = size // self.batch
            if is_symbolic_dim(factor) or not factor * self.batch == size:
                raise ValueError(f"ONNX: a size that is no multiple of the batch: {size}")
            clips = self.add("Shape", self.first, start=0, end=1)
            parts.append(self.add("Mul", clips, np.array([factor], np.int64)))
        if all(isinstance(part, np.ndarray) for part in parts):
            return np.concatenate(parts)
        return self.add("Concat", *parts, axis=0)


# --- rules: (graph, equation, inputs) -> output or outputs --------------------------------------


def _cast(graph: _Graph, equation: Any, x: Value) -> Value:
    return graph.add("Cast", x, to=_type(equation.params["new_dtype"]))


def _broadcast(graph: _Graph, equation: Any, x: Value, *_: Value) -> Value:
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    came = equation.invars[0].aval.shape
    aligned = [1] * len(shape)
    for size, axis in zip(came, axes, strict=True):
        aligned[axis] = size
    x = graph.reshape(x, aligned)
    if aligned == list(shape):
        return x
    # A size of 1 keeps what is there, so only those that grow have to be known.
    wanted = [1 if have == size else size for have, size in zip(aligned, shape, strict=True)]
    return graph.add("Expand", x, graph.sizes(wanted))


def _dot(graph: _Graph, equation: Any, a: Value, b: Value) -> Value:
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    ranks = [len(atom.aval.shape) for atom in equation.invars]
    out = equation.outvars[0].aval.dtype
    if any(atom.aval.dtype != out for atom in equation.invars):
        a, b = (graph.add("Cast", x, to=_type(out)) for x in (a, b))
    if not left_batch and left == (ranks[0] - 1,) and right == (0,) and ranks[1] == 2:
        return graph.add("MatMul", a, b)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = [[next(letters) for _ in range(rank)] for rank in ranks]
    for i, j in (*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)):
        names[1][j] = names[0][i]
    batch = [names[0][i] for i in left_batch]
    free = [n for i, n in enumerate(names[0]) if i not in (*left, *left_batch)]
    free += [n for i, n in enumerate(names[1]) if i not in (*right, *right_batch)]
    terms = ",".join("".join(n) for n in names)
    return graph.add("Einsum", a, b, equation=f"{terms}->{''.join(batch + free)}")


def _convolution(graph: _Graph, equation: Any, x: Value, kernel: Value) -> Value:
    parameters = equation.params
    layout = parameters["dimension_numbers"]
    if any(n != 1 for n in (*parameters["lhs_dilation"], parameters["batch_group_count"])):
        raise ValueError("ONNX: transposed convolutions are not translated")
    pads = list(zip(*parameters["padding"], strict=True))
    y = graph.add(
        "Conv",
        graph.transpose(x, layout.lhs_spec),
        graph.transpose(kernel, layout.rhs_spec),
        pads=[*pads[0], *pads[1]],
        strides=list(parameters["window_strides"]),
        dilations=list(parameters["rhs_dilation"]),
        group=parameters["feature_group_count"],
    )
    return graph.transpose(y, np.argsort(layout.out_spec).tolist())


def _reduction(op: str) -> Callable[..., Value]:
    def rule(graph: _Graph, equation: Any, x: Value) -> Value:
        axes = np.array(equation.params["axes"], np.int64)
        return graph.add(op, x, axes, keepdims=0)

    return rule


def _argmax(graph: _Graph, equation: Any, x: Value) -> Value:
    (axis,) = equation.params["axes"]
    place = graph.add("ArgMax", x, axis=axis, keepdims=0)
    return graph.add("Cast", place, to=_type(equation.params["index_dtype"]))


def _slice(graph: _Graph, equation: Any, x: Value) -> Value:
    parameters, shape = equation.params, equation.invars[0].aval.shape
    ends = [_EVERYTHING if is_symbolic_dim(n) else n for n in parameters["limit_indices"]]
    starts = parameters["start_indices"]
    return graph.cut(x, range(len(shape)), starts, ends, parameters["strides"])


def _reverse(graph: _Graph, equation: Any, x: Value) -> Value:
    axes = equation.params["dimensions"]
    count = len(axes)
    return graph.cut(x, axes, [-1] * count, [-_EVERYTHING] * count, [-1] * count)


def _stack(graph: _Graph, equation: Any, *parts: Value) -> Value:
    axis = equation.params["axis"]
    raised = [graph.add("Unsqueeze", part, np.array([axis])) for part in parts]
    return graph.add("Concat", *raised, axis=axis)


def _split(graph: _Graph, equation: Any, x: Value) -> list[Value]:
    sizes = np.array(equation.params["sizes"], np.int64)
    return [*graph.add_many("Split", len(sizes), x, sizes, axis=equation.params["axis"])]


def _gather(graph: _Graph, equation: Any, x: Value, places: Value) -> Value:
    """Constant places that form a grid along some axes, or any places along one axis."""
    numbers, shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    slices, axes = equation.params["slice_sizes"], numbers.start_index_map
    inside = equation.params["mode"] == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if not inside or numbers.operand_batching_dims:
        raise ValueError(f"ONNX: this way of indexing is not translated: {numbers}")
    out = equation.outvars[0].aval.shape
    rank = len(equation.invars[1].aval.shape) - 1
    if rank == 0 and isinstance(places, np.ndarray):
        ends = [int(start) + slices[axis] for start, axis in zip(places, axes, strict=True)]
        return graph.reshape(graph.cut(x, axes, places, ends), out)
    whole = all(slices[axis] == (1 if axis in axes else size) for axis, size in enumerate(shape))
    if not whole or numbers.collapsed_slice_dims != tuple(sorted(axes)):
        raise ValueError(f"ONNX: this way of indexing is not translated: {numbers}")
    if len(axes) == 1:
        y = _taken(graph, x, places, axes[0], equation.invars[1].aval.shape[:-1])
        order = [axes[0] + i for i in range(rank)]
    else:
        y, order = x, list(axes)
        for axis, line in zip(axes, _grid(places, numbers), strict=True):
            y = _taken(graph, y, line, axis, line.shape[:1])
    others = [i for i in range(len(out)) if i not in order]
    came = dict(zip(numbers.offset_dims, others, strict=True))
    new = iter(order)
    return graph.transpose(y, [came[i] if i in came else next(new) for i in range(len(out))])


def _grid(places: Value, numbers: Any) -> list[np.ndarray]:
    """The places along each axis, `n 1`, of which an index array is the product."""
    if isinstance(places, np.ndarray) and places.ndim == places.shape[-1] + 1:
        lines = []
        for axis in range(places.shape[-1]):
            along = np.moveaxis(places[..., axis], axis, 0).reshape(places.shape[axis], -1)
            if (along == along[:, :1]).all():
                lines.append(along[:, :1])
        if len(lines) == places.shape[-1]:
            return lines
    raise ValueError(f"ONNX: this way of indexing is not translated: {numbers}")


def _taken(graph: _Graph, x: Value, places: Value, axis: int, shape: Sequence[Any]) -> Value:
    """Places, `... 1`, along one axis."""
    if isinstance(places, np.ndarray):
        places = places[..., 0].astype(np.int64)
        step = places[1] - places[0] if places.ndim == 1 and len(places) > 1 else np.int64(0)
        if np.all(step > 0) and places.ndim == 1 and (np.diff(places) == step).all():
            return graph.cut(x, [axis], [places[0]], [places[-1] + 1], [step])
        return graph.add("Gather", x, places, axis=axis)
    return graph.add("Gather", x, graph.reshape(places, shape), axis=axis)


def _atan2(graph: _Graph, equation: Any, y: Value, x: Value) -> Value:
    """The direction of (x, y): of what lies on the left, the arc tangent is half a turn away."""
    dtype = equation.outvars[0].aval.dtype
    zero, half, back = (np.asarray(turn * np.pi, dtype) for turn in (0, 1, -1))
    up = graph.add("Where", graph.add("Less", y, zero), back, half)
    arc = graph.add("Atan", graph.add("Div", y, x))
    left = graph.add("Less", x, zero)
    turned = graph.add("Where", left, graph.add("Add", arc, up), arc)
    still = graph.add("And", graph.add("Equal", x, zero), graph.add("Equal", y, zero))
    return graph.add("Where", still, zero, turned)


def _not_equal(graph: _Graph, equation: Any, a: Value, b: Value) -> Value:
    return graph.add("Not", graph.add("Equal", a, b))


def _is_finite(graph: _Graph, equation: Any, x: Value) -> Value:
    return graph.add("Not", graph.add("Or", graph.add("IsNaN", x), graph.add("IsInf", x)))


def _integer_power(graph: _Graph, equation: Any, x: Value) -> Value:
    dtype = equation.outvars[0].aval.dtype
    return graph.add("Pow", x, np.asarray(equation.params["y"], dtype))


def _reshape(graph: _Graph, equation: Any, x: Value, *_: Value) -> Value:
    return graph.reshape(x, equation.outvars[0].aval.shape)


_RULES: dict[str, Callable[..., Any]] = {
    "argmax": _argmax,
    "atan2": _atan2,
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda graph, e, *x: graph.add("Concat", *x, axis=e.params["dimension"]),
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "dot_general": _dot,
    "expand_dims": _reshape,
    "gather": _gather,
    "integer_pow": _integer_power,
    "is_finite": _is_finite,
    "ne": _not_equal,
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_sum": _reduction("ReduceSum"),
    "rem": lambda graph, e, a, b: graph.add("Mod", a, b, fmod=1),
    "reshape": _reshape,
    "rev": _reverse,
    "rsqrt": lambda graph, e, x: graph.add("Reciprocal", graph.add("Sqrt", x)),
    "select_n": lambda graph, e, which, no, yes: graph.add("Where", which, yes, no),
    "slice": _slice,
    "split": _split,
    "square": lambda graph, e, x: graph.add("Mul", x, x),
    "squeeze": _reshape,
    "stack": _stack,
    "transpose": lambda graph, e, x: graph.transpose(x, e.params["permutation"]),
}
