"""Optical flow by TV-L1 in JAX: the smoothest field that explains most of the brightness.

It minimises |grad u| + |grad v| + attachment |I1(x + u, y + v) - I0(x, y)|, summed over the image:
coarse to fine, linearised anew at every warp, and solved by the primal-dual algorithm, which has
no coupling weight between field and data to trade accuracy for. A median filter before every warp
takes out what the linearisation got wrong (Sun et al.).

Every operation is element by element or a gather, so a pair's field depends neither on how many
threads compute it nor on its neighbours in a batch.

Sources: Zach, Pock and Bischof, A Duality Based Approach for Realtime TV-L1 Optical Flow, 2007;
Chambolle and Pock, A First-Order Primal-Dual Algorithm, 2011; Sun, Roth and Black, Secrets of
Optical Flow Estimation, 2010.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from stf_jax.flow import PAIRS_PER_CALL, TvL1Settings

# Pairs computed together where many small steps would leave the device idle. A CPU takes one pair
# at a time, whose planes stay in its cache.
_ABREAST = 8

Plane = Float32[Array, "h w"]
Field = tuple[Plane, Plane]
Bordered = Float32[Array, "h_and_1 w_and_1"]
Resized = Float32[Array, "h2 w2"]


@functools.partial(jax.jit, static_argnames="settings")
def tvl1_flow(
    previous: UInt8[Array, "b n h w"], following: UInt8[Array, "b n h w"], settings: TvL1Settings
) -> Float32[Array, "b n h w 2"]:
    """Flow of pairs of grey frames: u right, v down, px per frame.

    Args:
      previous: brightness, 0 to 255, of n frames of b clips.
      following: the frame after each.
      settings: see there.
    """

    def one(pair: tuple[Array, Array]) -> Array:
        return _pair(*pair, settings)

    def in_turn(a: Array, b: Array) -> Array:
        pairs = a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:])
        return jax.lax.map(one, pairs).reshape(*a.shape, 2)

    def abreast(a: Array, b: Array) -> Array:
        # Clips may lie on several devices; their fields never do.
        return jax.vmap(lambda *clip: jax.lax.map(one, clip, batch_size=_ABREAST))(a, b)

    return jax.lax.platform_dependent(previous, following, cpu=in_turn, default=abreast)


def flow_on_cpu(
    previous: UInt8[np.ndarray, "n h w"],
    following: UInt8[np.ndarray, "n h w"],
    settings: TvL1Settings,
) -> Float32[np.ndarray, "n h w 2"]:
    """`tvl1_flow` of any number of pairs, on the CPU whatever else the machine has.

    So a cache holds the same bytes whether or not the machine that made it has a GPU, and one
    compiled program serves videos of any length.
    """
    count, fields = len(previous), []
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for start in range(0, count, PAIRS_PER_CALL):
            # The last call is filled up with its last pair.
            rows = np.minimum(np.arange(start, start + PAIRS_PER_CALL), count - 1)
            computed = tvl1_flow(previous[None, rows], following[None, rows], settings)
            fields.append(np.asarray(computed[0, : count - start]))
    return np.concatenate(fields)


def _pair(previous: Array, following: Array, settings: TvL1Settings) -> Array:
    """The field of one pair, float32 `h w 2`."""
    levels = [(previous.astype(jnp.float32), following.astype(jnp.float32))]
    while min(levels[-1][0].shape) >= 2 * settings.coarsest - 1:
        levels.append((shrink(levels[-1][0]), shrink(levels[-1][1])))
    u = v = jnp.zeros_like(levels[-1][0])
    for first, second in reversed(levels):
        if u.shape != first.shape:
            u, v = (2 * enlarge(component, *first.shape) for component in (u, v))
        u, v = _level(first, second, (u, v), settings)
    return jnp.stack([u, v], axis=-1)


def _level(first: Plane, second: Plane, flow: Field, settings: TvL1Settings) -> Field:
    """Improves a field at one size of the pyramid."""
    height, width = first.shape
    dual = (jnp.zeros((height + 1, width + 1), jnp.float32),) * 4

    def one(
        _: Any, state: tuple[Field, tuple[Bordered, ...]]
    ) -> tuple[Field, tuple[Bordered, ...]]:
        flow, dual = state
        u, v = (median_filter(component, settings.median) for component in flow)
        warped, inside = warp(second, u, v)
        # The derivatives of both frames' mean: exact to one order more than those of either.
        dx, dy = derivatives(0.5 * (first + warped))
        # What has left the image has nothing to compare with: there only smoothness counts.
        dx, dy, difference = dx * inside, dy * inside, (warped - first) * inside
        rest = difference - dx * u - dy * v
        return _solve((u, v), dual, (rest, dx, dy), settings)

    return jax.lax.fori_loop(0, settings.warps, one, (flow, dual))[0]


def _solve(
    flow: Field,
    dual: tuple[Bordered, ...],
    data: tuple[Plane, Plane, Plane],
    settings: TvL1Settings,
) -> tuple[Field, tuple[Bordered, ...]]:
    """Primal-dual iterations on one linearisation: rest + dx u + dy v is to be small.

    Arrays with a neighbour to look at carry a border of zeros, of which only the inside is ever
    written: a slice of them is a shifted field, and XLA turns each iteration into few plain loops
    (a pad or a roll in their place would put a branch on every element).

    Args:
      flow: u and v.
      dual: four planes `h+1 w+1`, zero in the first row and column: the dual of du/dx, du/dy,
        dv/dx and dv/dy.
      data: rest, dx and dy.
      settings: see there.
    """
    rest, dx, dy = jax.lax.optimization_barrier(data)  # computed once, not in every iteration
    inverse = 1 / jnp.maximum(dx * dx + dy * dy, 1e-6)
    step = settings.step
    dual_step = 1 / (8 * step)  # the two must not exceed 1 / |divergence|^2 together
    limit = settings.attachment * step
    height, width = rest.shape
    corner = jax.lax.dynamic_update_slice

    def iterate(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        u, v, ahead_u, ahead_v, *dual = state
        dual = [
            *_dual_step(dual[0], dual[1], *_forward(ahead_u), dual_step),
            *_dual_step(dual[2], dual[3], *_forward(ahead_v), dual_step),
        ]
        smooth_u = u + step * _divergence(dual[0], dual[1])
        smooth_v = v + step * _divergence(dual[2], dual[3])
        move = jnp.clip(-(rest + dx * smooth_u + dy * smooth_v) * inverse, -limit, limit)
        new_u, new_v = smooth_u + move * dx, smooth_v + move * dy
        ahead_u = corner(ahead_u, 2 * new_u - u, (0, 0))
        ahead_v = corner(ahead_v, 2 * new_v - v, (0, 0))
        return (new_u, new_v, ahead_u, ahead_v, *dual)

    border = jnp.zeros((height + 1, width + 1), jnp.float32)
    state = (*flow, *(corner(border, component, (0, 0)) for component in flow), *dual)
    u, v, _, _, *dual_planes = jax.lax.fori_loop(0, settings.iterations, iterate, state)
    return (u, v), tuple(dual_planes)


def _forward(bordered: Bordered) -> tuple[Plane, Plane]:
    """Differences to the right and below of a plane with a border after it; 0 at its ends."""
    height, width = bordered.shape[0] - 1, bordered.shape[1] - 1
    plane = bordered[:height, :width]
    last_column = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) == width - 1
    last_row = jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0) == height - 1
    right = jnp.where(last_column, 0, bordered[:height, 1:] - plane)
    below = jnp.where(last_row, 0, bordered[1:, :width] - plane)
    return right, below


def _divergence(p: Bordered, q: Bordered) -> Plane:
    """Minus the adjoint of `_forward`, of two planes with a border of zeros before them."""
    return p[1:, 1:] - p[1:, :-1] + q[1:, 1:] - q[:-1, 1:]


def _dual_step(
    p: Bordered, q: Bordered, right: Plane, below: Plane, step: float
) -> tuple[Bordered, Bordered]:
    """Moves a dual pair along the differences and back into the unit disc."""
    new_p, new_q = p[1:, 1:] + step * right, q[1:, 1:] + step * below
    shorten = jax.lax.rsqrt(jnp.maximum(1, new_p * new_p + new_q * new_q))
    return (
        jax.lax.dynamic_update_slice(p, new_p * shorten, (1, 1)),
        jax.lax.dynamic_update_slice(q, new_q * shorten, (1, 1)),
    )


def warp(image: Plane, u: Plane, v: Plane) -> tuple[Plane, Plane]:
    """Reads an image at (x + u, y + v), by cubic convolution.

    Returns:
      What is there (at the nearest place inside where that is outside), and 1 inside, 0 outside.
    Source: Keys, Cubic Convolution Interpolation, 1981 (a = -1/2).
    """
    height, width = image.shape
    x = jnp.arange(width, dtype=jnp.float32)[None, :] + u
    y = jnp.arange(height, dtype=jnp.float32)[:, None] + v
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = jnp.clip(x, 0, width - 1), jnp.clip(y, 0, height - 1)
    left, top = jnp.floor(x), jnp.floor(y)
    across, down = _cubic(x - left), _cubic(y - top)
    # One border row before and two behind: every place has its four neighbours each way.
    padded = jnp.pad(image, ((1, 2), (1, 2)), mode="edge")
    stride = width + 3
    place = top.astype(jnp.int32) * stride + left.astype(jnp.int32)
    flat = padded.reshape(-1)
    read = jnp.zeros_like(image)
    for j in range(4):
        row = [flat.at[place + (j * stride + i)].get(mode="promise_in_bounds") for i in range(4)]
        read += down[j] * sum(a * b for a, b in zip(across, row, strict=True))
    return read, inside.astype(jnp.float32)


def _cubic(t: Array) -> tuple[Array, Array, Array, Array]:
    """Weights of the four neighbours of a place a share `t` behind the second."""
    t2, t3 = t * t, t * t * t
    return (
        -0.5 * t + t2 - 0.5 * t3,
        1 - 2.5 * t2 + 1.5 * t3,
        0.5 * t + 2 * t2 - 1.5 * t3,
        0.5 * (t3 - t2),
    )


def derivatives(image: Plane) -> tuple[Plane, Plane]:
    """d/dx and d/dy by the five-point rule (1 -8 0 8 -1) / 12; the edge is repeated beyond it."""

    def along_rows(plane: Array) -> Array:
        size = plane.shape[1]
        at = functools.partial(
            jax.lax.dynamic_slice_in_dim,
            jnp.pad(plane, ((0, 0), (2, 2)), mode="edge"),
            slice_size=size,
            axis=1,
        )
        return (8 * (at(3) - at(1)) - (at(4) - at(0))) / 12

    return along_rows(image), along_rows(image.T).T


def shrink(image: Plane) -> Resized:
    """Every other pixel of an image blurred by (1 4 6 4 1) / 16 each way: pixel i from pixel 2i."""

    def rows(plane: Array) -> Array:
        half = (plane.shape[0] + 1) // 2
        padded = jnp.pad(plane, ((2, 3), (0, 0)), mode="edge")
        at = [padded[k : k + 2 * half - 1 : 2] for k in range(5)]
        return (at[0] + at[4] + 4 * (at[1] + at[3]) + 6 * at[2]) / 16

    return rows(rows(image).T).T


def enlarge(plane: Plane, height: int, width: int) -> Resized:
    """The inverse of `shrink`'s places: pixel 2i from pixel i, those between by their mean."""

    def rows(plane: Array, count: int) -> Array:
        following = jnp.concatenate([plane[1:], plane[-1:]])
        both = jnp.stack([plane, 0.5 * (plane + following)], axis=1)
        return both.reshape(-1, plane.shape[1])[:count]

    return rows(rows(plane, height).T, width).T


def median_filter(image: Plane, side: int) -> Plane:
    """The median of `side` x `side` pixels around each; the edge is repeated beyond it.

    By forgetting: of half of the values and two more neither the smallest nor the largest can be
    the median; they go and one more comes in. Minima and maxima of whole planes, no sorting.

    Args:
      image: any plane.
      side: odd; 1 leaves the image as it is.
    """
    height, width = image.shape
    padded = jnp.pad(image, side // 2, mode="edge")
    around = [padded[j : j + height, i : i + width] for j in range(side) for i in range(side)]
    kept, waiting = around[: len(around) // 2 + 2], around[len(around) // 2 + 2 :]
    while len(kept) > 1:
        kept = _without_extremes(kept) + waiting[:1]
        waiting = waiting[1:]
    return kept[0]


def _without_extremes(planes: list[Array]) -> list[Array]:
    """All but the smallest and the largest value at every pixel, in any order."""
    planes = list(planes)
    count = len(planes)

    def order(i: int, j: int) -> None:
        a, b = planes[i], planes[j]
        planes[i], planes[j] = jnp.minimum(a, b), jnp.maximum(a, b)

    # After this the smallest is in the first half and the largest in the second (an odd one out
    # in the middle is in both).
    for k in range(count // 2):
        order(k, count - 1 - k)
    for k in range(1, (count + 1) // 2):
        order(0, k)
    for k in range(count // 2, count - 1):
        order(k, count - 1)
    return planes[1:-1]
