"""SAME convolutions of clips in space, in time or in both, by the algorithm that suits the backend.

On a GPU a convolution is one call of its library. On a CPU, XLA's convolutions leave much of the
machine unused, above all in the gradient of the kernel. There, convolutions of many channels are
done as matrix products of Winograd-transformed tiles, which multiply 2.25 times less for a 3x3
kernel, piece by piece so that what lies between stays in cache. Both ways give the same result up
to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import export, lax
from jaxtyping import Array, Float

# Winograd's tiles have this many outputs along each axis. Larger ones multiply less but lose
# digits: with 4 the error of a 5x5 kernel exceeds 1e-5 of the largest output.
_TILE = 2

# From how many channels on, in and out, Winograd is faster than XLA's convolution on two AVX-512
# cores: for large clips, and for the gradient of a kernel or clips of a single piece.
_MIN_CHANNELS, _MIN_CHANNELS_SMALL = 128, 64

# From how many multiply-adds on it is worth the time that its longer program takes to compile.
_MIN_WORK = 2 * 10**8

# Transforms of several axes multiply their rounding: 4x4x4 places of a tile are accurate, 6x6x6
# are not.
_MAX_PLACES = 64

# Work is cut into pieces whose transformed input is about as large as a last-level cache, bytes.
_PIECE = 24 * 2**20

Arrays = list[jax.Array]


def convolve(
    x: Float[Array, "b t h w i"],
    kernel: Float[Array, "... i o"],
    bias: Float[Array, " o"] | None = None,
    *,
    stride: int = 1,
) -> Float[Array, "b t hh ww o"]:
    """Convolves a clip in space, in time or in both; zero padding keeps the size (SAME).

    A spatial kernel sees single frames (t folds into b); a temporal kernel sees single places (h
    and w fold into one axis, which moves no data).

    Args:
      x: `b t h w i`.
      kernel: `h w i o` (space), `t i o` (time) or `t h w i o` (both), of the type of `x`.
      bias: added to the result; None is none.
      stride: step in h and w; time is never thinned out.

    Returns:
      `b t h w o`, h and w divided by `stride` (rounded up).

    Raises:
      ValueError: a kernel of another rank, or a temporal kernel with a stride.

    Example:
      >>> clip = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
      >>> convolve(clip, jnp.array([1.0, 0.0, 0.0]).reshape(3, 1, 1)).ravel().tolist()
      [0.0, 0.0, 1.0]
    """
    if kernel.ndim not in (3, 4, 5) or (kernel.ndim == 3 and stride > 1):
        raise ValueError(
            f"a kernel is 'h w i o', 't i o' (stride 1) or 't h w i o'; got shape {kernel.shape} "
            f"with stride {stride}"
        )
    if bias is None:
        bias = jnp.zeros(kernel.shape[-1:], x.dtype)
    taps = kernel.shape[:-2]
    places = math.prod(_TILE + size - 1 for size in taps if size > 1)
    exact = jnp.finfo(x.dtype).bits >= 32
    odd = all(size % 2 for size in taps)
    if stride > 1 or not odd or places > _MAX_PLACES or not exact or is_open(x):
        return plain(x, kernel, stride=stride) + _everywhere(bias)
    return _convolve(x, kernel, bias)


def is_open(x: jax.Array) -> bool:
    """Whether the number of clips is left open, as in an export for batches of any size.

    What suits a CPU best is chosen by size, so such a program has none of it: it is a sequence of
    single operations, for whoever runs it to choose algorithms for.
    """
    return export.is_symbolic_dim(x.shape[0])


def _everywhere(bias: jax.Array) -> jax.Array:
    return bias.reshape(1, 1, 1, 1, -1)


def _pays(x: jax.Array, kernel_shape: Sequence[int], channels: int) -> bool:
    """Whether Winograd is worth it on a CPU."""
    work = x.size // x.shape[-1] * math.prod(kernel_shape)
    return work >= _MIN_WORK and min(kernel_shape[-2:]) >= channels


@jax.custom_vjp
def _convolve(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    small = _pieces(x, *_axes(kernel.shape))[1] == 1
    if _pays(x, kernel.shape, _MIN_CHANNELS_SMALL if small else _MIN_CHANNELS):
        y = lax.platform_dependent(x, kernel, cpu=winograd, default=plain)
    else:
        y = plain(x, kernel)
    return y + _everywhere(bias)


def _convolve_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
    return _convolve(x, kernel, bias), (x, kernel)


def _convolve_backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = residuals

    def plain_gradients(x: jax.Array, dy: jax.Array, kernel: jax.Array) -> Any:
        return *jax.vjp(plain, x, kernel)[1](dy), dy.sum((0, 1, 2, 3))

    if not _pays(x, kernel.shape, _MIN_CHANNELS_SMALL):
        return plain_gradients(x, dy, kernel)
    return lax.platform_dependent(x, dy, kernel, cpu=gradients, default=plain_gradients)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def plain(
    x: Float[Array, "b t h w i"], kernel: Float[Array, "... i o"], *, stride: int = 1
) -> Float[Array, "b t hh ww o"]:
    """`convolve` as one operation of XLA."""
    if kernel.ndim == 5:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, stride, stride),
            padding="SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    in_space = kernel.ndim == 4
    images = "(b t) h w" if in_space else "b t (h w)"
    y = lax.conv_general_dilated(
        rearrange(x, f"b t h w i -> {images} i"),
        kernel if in_space else rearrange(kernel, "t i o -> t 1 i o"),
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    sizes = {"b": x.shape[0]} if in_space else {"h": x.shape[2]}
    return rearrange(y, f"{images} o -> b t h w o", **sizes)


# --- Winograd ----------------------------------------------------------------------------------


@functools.cache
def winograd_matrices(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transforms of F(outputs, taps), by the Toom-Cook construction in exact fractions.

    For a signal d of outputs + taps - 1 values and a kernel g, A ((G g) * (B d)) is their valid
    correlation. Points are 0, 1, -1, 2, -1/2, 1/2, -2 and infinity: small and balanced, so that
    little is lost to rounding.

    Returns:
      A `outputs n`, G `n taps`, B `n n`, n = outputs + taps - 1; float64.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).

    Example:
      >>> a, g, b = winograd_matrices(2, 3)
      >>> (a @ ((g @ [1, 2, 3]) * (b @ [1, 10, 100, 1000]))).tolist()
      [321.0, 3210.0]
    """
    half = Fraction(1, 2)
    points = [Fraction(0), Fraction(1), Fraction(-1), Fraction(2), -half, half, Fraction(-2)]
    points = points[: outputs + taps - 2]

    def polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
        """Coefficients, lowest first, of the product of (z - root)."""
        terms = [Fraction(1)]
        for root in roots:
            shifted = [Fraction(0), *terms]
            padded = [*terms, Fraction(0)]
            terms = [up - root * same for up, same in zip(shifted, padded, strict=True)]
        return terms

    others = [[q for q in points if q != p] for p in points]
    scale = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    a = [[*(p**row for p in points), Fraction(row == outputs - 1)] for row in range(outputs)]
    g = [[p**tap / s for tap in range(taps)] for p, s in zip(points, scale, strict=True)]
    g += [[Fraction(tap == taps - 1) for tap in range(taps)]]
    b = [[*polynomial(rest), Fraction(0)] for rest in others] + [polynomial(points)]
    to_array = functools.partial(np.array, dtype=np.float64)
    return to_array(a), to_array(g), to_array(b)


def _combine(matrix: np.ndarray, parts: Arrays) -> Arrays:
    """Each row's weighted sum of arrays, without the multiplications by 0, 1 and -1."""

    def row_sum(row: np.ndarray) -> jax.Array:
        terms = [
            (part if abs(w) == 1 else part * np.asarray(abs(w), part.dtype), w > 0)
            for w, part in zip(row, parts, strict=True)
            if w
        ]
        terms.sort(key=lambda term: not term[1])  # a positive one first
        first, positive = terms[0]
        total = first if positive else -first
        for term, plus in terms[1:]:
            total = total + term if plus else total - term
        return total

    return [row_sum(row) for row in matrix]


def _every(length: int, start: int, count: int, x: jax.Array, axis: int) -> jax.Array:
    """`count` entries from `start` on, every `length`-th."""
    return lax.slice_in_dim(x, start, start + (count - 1) * length + 1, length, axis)


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths)


def _input_tiles(x: jax.Array, axes: Sequence[int], taps: Sequence[int]) -> Arrays:
    """B d of all tiles, one array per place in the transformed tile."""
    parts = [x]
    for axis, size in zip(axes, taps, strict=True):
        tiles = -(-x.shape[axis] // _TILE)
        width = _TILE + size - 1
        before = size // 2
        after = (tiles - 1) * _TILE + width - x.shape[axis] - before
        matrix = winograd_matrices(_TILE, size)[2]
        spread = [_pad(part, axis, before, max(0, after)) for part in parts]
        parts = [
            new
            for part in spread
            for new in _combine(matrix, [_every(_TILE, k, tiles, part, axis) for k in range(width)])
        ]
    return parts


def _output_tiles(parts: Arrays, axes: Sequence[int], taps: Sequence[int]) -> Arrays:
    """A m of all tiles, one array per place in the tile of outputs."""
    for axis_number in reversed(range(len(axes))):
        matrix = winograd_matrices(_TILE, taps[axis_number])[0]
        width = matrix.shape[1]
        # The last axis changes fastest in the list.
        groups = [parts[i : i + width] for i in range(0, len(parts), width)]
        sums = [_combine(matrix, group) for group in groups]
        parts = [group[row] for row in range(_TILE) for group in sums]
    return parts


def _gradient_tiles(dy: jax.Array, axes: Sequence[int], taps: Sequence[int]) -> Arrays:
    """The gradient of what `_output_tiles` takes: the transpose of A, applied to all tiles."""
    parts = [dy]
    for axis, size in zip(axes, taps, strict=True):
        tiles = -(-dy.shape[axis] // _TILE)
        matrix = winograd_matrices(_TILE, size)[0].T
        whole = [_pad(part, axis, 0, tiles * _TILE - dy.shape[axis]) for part in parts]
        parts = [
            new
            for part in whole
            for new in _combine(matrix, [_every(_TILE, k, tiles, part, axis) for k in range(_TILE)])
        ]
    return parts


def _interleave(parts: Arrays, axes: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Puts the outputs of tiles in their places and cuts off what sticks out."""
    for axis in reversed(axes):
        parts = [jnp.stack(parts[i : i + _TILE], axis + 1) for i in range(0, len(parts), _TILE)]
        parts = [part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :]) for part in parts]
    return parts[0][tuple(slice(0, size) for size in shape)]


def _axes(kernel_shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a clip that a kernel reaches along, and how far: its taps there."""
    first = {3: 1, 4: 2, 5: 1}[len(kernel_shape)]
    reach = [(first + i, size) for i, size in enumerate(kernel_shape[:-2]) if size > 1]
    return tuple(axis for axis, _ in reach), tuple(size for _, size in reach)


def winograd(x: Float[Array, "b t h w i"], kernel: Float[Array, "... i o"]) -> Array:
    """`plain` for odd kernels and stride 1, by matrix products of transformed tiles."""
    axis, pieces = _pieces(x, *_axes(kernel.shape))
    function = _winograd_of(kernel)
    if pieces == 1:
        return function(x)
    return _join(lax.map(function, _cut(x, axis, pieces)), axis)


def _winograd_of(kernel: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """`winograd` of a piece; transforms the kernel only once for all pieces."""
    axes, taps = _axes(kernel.shape)
    matrices = _kernel_tiles(kernel.reshape(*taps, *kernel.shape[-2:]))

    def piece(x: jax.Array) -> jax.Array:
        tiles = _input_tiles(x, axes, taps)
        products = [jnp.dot(tile, matrix) for tile, matrix in zip(tiles, matrices, strict=True)]
        outputs = _output_tiles(products, axes, taps)
        return _interleave(outputs, axes, (*x.shape[:-1], kernel.shape[-1]))

    return piece


def gradients(
    x: Float[Array, "b t h w i"], dy: Float[Array, "b t h w o"], kernel: Float[Array, "... i o"]
) -> tuple[Array, Array, Array]:
    """The gradients of `winograd`'s input, of its kernel and of a bias, given that of its output.

    All come from one loop: apart, XLA puts off what only the optimiser reads, the gradients of all
    kernels and biases, and keeps two maps per layer until then.
    """
    axes, taps = _axes(kernel.shape)
    axis, pieces = _pieces(x, axes, taps)
    # The gradient of the input is a convolution with the kernel turned round.
    turned = jnp.swapaxes(jnp.flip(kernel, range(kernel.ndim - 2)), -1, -2)
    channels = _MIN_CHANNELS_SMALL if pieces == 1 else _MIN_CHANNELS
    if _pays(dy, turned.shape, channels):
        backwards = _winograd_of(turned)
    else:
        backwards = functools.partial(plain, kernel=turned)

    def piece(x: jax.Array, dy: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        tiles, spread = _input_tiles(x, axes, taps), _gradient_tiles(dy, axes, taps)
        outer = jnp.stack([_outer(a, b) for a, b in zip(tiles, spread, strict=True)])
        return (outer, dy.sum((0, 1, 2, 3))), backwards(dy)

    if pieces == 1:
        (gradient, of_bias), dx = piece(x, dy)
    else:

        def add(sums: Any, maps: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            more, dx = piece(*maps)
            return jax.tree.map(jnp.add, sums, more), dx

        cut = _cut(x, axis, pieces), _cut(dy, axis, pieces)
        like = jax.eval_shape(piece, cut[0][0], cut[1][0])[0]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        (gradient, of_bias), dx = lax.scan(add, zeros, cut)
        dx = _join(dx, axis)
    gradient = gradient.reshape(*(_TILE + size - 1 for size in taps), *kernel.shape[-2:])
    for number, size in enumerate(taps):
        matrix = jnp.asarray(winograd_matrices(_TILE, size)[1], x.dtype)
        gradient = jnp.moveaxis(jnp.tensordot(matrix.T, gradient, (1, number)), 0, number)
    return dx, gradient.reshape(kernel.shape), of_bias


def _kernel_tiles(kernel: jax.Array) -> Arrays:
    """G g along every axis: one matrix `i o` per place in the transformed tile."""
    for number, size in enumerate(kernel.shape[:-2]):
        matrix = jnp.asarray(winograd_matrices(_TILE, size)[1], kernel.dtype)
        kernel = jnp.moveaxis(jnp.tensordot(matrix, kernel, (1, number)), 0, number)
    return list(kernel.reshape(-1, *kernel.shape[-2:]))


def _outer(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The sum over pixels of the outer products of channels."""
    # As matrices: XLA would copy arrays of more axes into another order first.
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


# --- pieces ------------------------------------------------------------------------------------


def _pieces(x: jax.Array, axes: Sequence[int], taps: Sequence[int]) -> tuple[int, int]:
    """An axis that the kernel does not reach along, and into how many equal pieces to cut it."""
    free = [axis for axis in (1, 2) if axis not in axes]
    if not axes or not free:
        return 1, 1
    growth = math.prod((_TILE + size - 1) / _TILE for size in taps)
    wanted = math.ceil(x.size * x.dtype.itemsize * growth / _PIECE)
    length = x.shape[free[0]]
    fitting = (n for n in range(min(length, max(1, wanted)), length + 1) if length % n == 0)
    return free[0], next(fitting)


def _cut(x: jax.Array, axis: int, pieces: int) -> jax.Array:
    """The pieces of an axis as a new leading axis."""
    shape = (*x.shape[:axis], pieces, x.shape[axis] // pieces, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join(pieces: jax.Array, axis: int) -> jax.Array:
    """Undoes `_cut`."""
    x = jnp.moveaxis(pieces, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
