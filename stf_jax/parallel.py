"""How arrays lie on devices: clips are divided among them, weights are on each, or divided too.

Every jitted function runs unchanged on one device or many: XLA divides the work as its arguments
lie. The mesh has two axes: 'data' divides the clips of a batch; 'model' divides the recurrent
layer's input matrices, two thirds of all weights, along the pyramid vector.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from einops import rearrange
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from stf_jax.optim import parameter_path

Tree = TypeVar("Tree")

# Of the large programs. On a CPU XLA orders operations for concurrency unless told otherwise, and
# then keeps maps of both streams at once: a third more memory, no gain. GPUs do not read it.
COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

_DIVIDED = re.compile(r"(.*/)?recurrent/(forward|backward)/input/kernel")


@functools.cache
def make_mesh(model_devices: int = 1) -> Mesh:
    """All devices as a grid of 'data' x 'model'.

    Args:
      model_devices: size of the axis 'model'; 1 keeps every weight whole on each device.

    Raises:
      ValueError: the devices cannot be divided like that (names both).
    """
    devices = jax.devices()
    if model_devices < 1 or len(devices) % model_devices:
        raise ValueError(
            f"model_devices: got {model_devices}, allowed: divisors of the number of devices "
            f"({len(devices)})"
        )
    return Mesh(np.array(devices).reshape(-1, model_devices), ("data", "model"))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh | AbstractMesh) -> None:
    """Makes sure that a batch can be divided among the devices, and into parts.

    Raises:
      ValueError: it cannot (names all).
    """
    devices = mesh.shape["data"]
    if batch_size % devices:
        raise ValueError(
            f"batch_size: got {batch_size}, allowed: multiples of the {devices} devices that share "
            "a batch. Change it, or show fewer devices (CUDA_VISIBLE_DEVICES)."
        )
    if batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size: got {batch_size}, which optimizer.accumulate={accumulate} parts on "
            f"{devices} devices do not divide: change one of the two"
        )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How each array of a tree of parameters, or of a training state, lies on the mesh.

    Raises:
      ValueError: an input matrix cannot be divided evenly (names it).
    """
    parts = mesh.shape["model"]

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = parameter_path(path)
        if parts == 1 or not _DIVIDED.fullmatch(name):
            return NamedSharding(mesh, PartitionSpec())
        if leaf.shape[0] % parts:
            raise ValueError(
                f"{name} has {leaf.shape[0]} rows, which model_devices={parts} does not divide"
            )
        return NamedSharding(mesh, PartitionSpec("model"))

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: Tree, mesh: Mesh) -> Tree:
    """Puts parameters or a training state where they belong.

    They lie so from the first step, as restored ones do: one compiled step fits all of them. With
    several processes each puts what its own devices hold, and all of them must have the same.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings(tree, mesh))

    def of(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # `device_put` would send all of it around to compare it.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(of, tree, shardings(tree, mesh))


def on_host(tree: Any) -> Any:
    """Copies of arrays in the memory of the host, whole; every process must ask for them."""

    def of(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return gather(leaf)
        return np.array(leaf)

    return jax.tree.map(of, tree)


def largest(value: int) -> int:
    """The largest of the processes' numbers; every process must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def keep_placed(tree: Tree, mesh: Mesh) -> Tree:
    """Inside a jitted function: what comes out lies as `place` would put it."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def shapes_placed(tree: Tree, mesh: Mesh) -> Tree:
    """The shapes of what `place` would return, to compile for."""
    return _shapes(tree, shardings(tree, mesh))


def shapes_of_rows(batch: Tree, mesh: Mesh) -> Tree:
    """The shapes of what `divide` would return, to compile for."""
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return _shapes(batch, jax.tree.map(lambda _: rows, batch))


def _shapes(tree: Tree, places: Any) -> Tree:
    def of(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(of, tree, places)


def part_of_batch(devices: np.ndarray, process: int) -> tuple[int, int]:
    """Which part of every batch a process reads: the rows that its own devices work on.

    Args:
      devices: those of the mesh, 'data' x 'model' (`Mesh.devices`).
      process: `jax.process_index()`.

    Returns:
      (i, n): the i-th of n equal parts. Processes that share the rows of a batch, because the axis
      'model' spans them, read the same part.

    Raises:
      ValueError: its devices do not lie together on the axis 'data' (names them).
    """
    places = [
        row
        for row, sharing in enumerate(devices)
        if any(device.process_index == process for device in sharing)
    ]
    count, total = len(places), len(devices)
    together = places == list(range(places[0], places[0] + count))
    if not together or total % count or places[0] % count:
        raise ValueError(
            f"process {process} has places {places} of {total} on the axis 'data', which are not "
            "an equal part of it: give every process as many devices, model_devices dividing them"
        )
    return places[0] // count, total // count


def divide(batch: Tree, mesh: Mesh) -> Tree:
    """Divides the rows of a batch among the devices.

    Args:
      batch: numpy arrays, the rows of this process (see `part_of_batch`).
      mesh: the devices.

    Returns:
      Arrays of the whole batch, of which each device holds its rows.
    """
    rows = NamedSharding(mesh, PartitionSpec("data"))
    place_rows = functools.partial(jax.make_array_from_process_local_data, rows)
    return jax.tree.map(place_rows, batch)


def in_parts(batch: Tree, parts: int, mesh: Mesh) -> Tree:
    """Inside a jitted function: the rows of a batch in equal parts, along a new first axis.

    Every device gives the same number of its own rows to each part, so none has to be moved.
    """
    devices = mesh.shape["data"]
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))

    def divide_rows(x: jax.Array) -> jax.Array:
        x = rearrange(x, "(d n m) ... -> n (d m) ...", d=devices, n=parts)
        return jax.lax.with_sharding_constraint(x, rows)

    return jax.tree.map(divide_rows, batch)


def divided_ahead(stream: Iterable[Tree], mesh: Mesh) -> Iterator[tuple[Tree, Tree]]:
    """Divides batches one ahead, so that one is copied to a GPU while it works on another.

    Yields:
      Each batch as it was read, and divided.
    """
    waiting: tuple[Tree, Tree] | None = None
    for batch in stream:
        following = batch, divide(batch, mesh)
        if waiting is not None:
            yield waiting
        waiting = following
    if waiting is not None:
        yield waiting


def gather(tree: Any) -> Any:
    """Arrays whose rows are divided among devices, whole, as numpy arrays in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)
