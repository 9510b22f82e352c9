"""Saving and restoring a run with orbax, and the one decision where weights come from."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stf_jax.model import Params
from stf_jax.optim import parameter_path
from stf_jax.vgg import find_vgg16, port_vgg16, read_vgg16

# Orbax reports every internal timing, and JAX every kind of device that is not there.
for _chatty in ("absl", "jax"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints in one folder: a tree of arrays and a JSON record per step.

    A step's folder appears by renaming, so a kill leaves whole checkpoints only; the temporary
    folder it leaves is removed at the next start.
    """

    def __init__(self, folder: Path, *, keep: int):
        """Opens `folder`, which is made if absent; `keep` is how many of the last steps to keep."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            item_handlers={
                "tree": ocp.StandardCheckpointHandler(),
                "record": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, record: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is on disk.

        A step that is already there stays: training is deterministic, so it is the same one.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(dict(record))
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads the newest checkpoint.

        Args:
          like: a tree of the expected structure, shapes and dtypes (arrays or their shapes).

        Returns:
          Its step, tree and record.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it holds other leaves (lists them).
        """
        step = self.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"{self._folder} holds no checkpoint. Train first, or name the right --workdir."
            )
        stored = self._manager.item_metadata(step)["tree"]
        _check_same_leaves(stored, like, self._folder / str(step))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)),
                record=ocp.args.JsonRestore(),
            ),
        )
        return step, restored["tree"], restored["record"]

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {parameter_path(path): tuple(leaf.shape) for path, leaf in leaves}


def _check_same_leaves(stored: Any, like: Any, where: Path) -> None:
    have, want = _shapes(stored), _shapes(like)
    faults = [f"missing: {name} {want[name]}" for name in want if name not in have]
    faults += [f"extra: {name} {have[name]}" for name in have if name not in want]
    faults += [
        f"mismatched: {name} is {have[name]}, expected {want[name]}"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if faults:
        shown = "\n  ".join(faults[:20]) + (
            f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        )
        raise ValueError(
            f"{where} does not fit the network of this configuration:\n  {shown}\n"
            "Use the configuration that it was trained with (config.json beside it)."
        )


def starting_params(
    initialise: Callable[[], Params],
    *,
    expected: Params,
    previous: tuple[str, Params] | None,
    vgg: str,
    temporal_init: str,
    conv1_init: str,
) -> tuple[Params, dict[str, str]]:
    """Decides where the weights of a stage's first step come from.

    Args:
      initialise: makes the randomly initialised parameters.
      expected: their shapes.
      previous: name and best weights of the stage before, if there is one: the hand-off.
      vgg: else, the ImageNet weights: 'keras', a file, or 'none' for training from scratch.
      temporal_init: how the 3-D layers start (`model.temporal.init`).
      conv1_init: how the first flow convolution starts (`model.temporal.conv1_init`).

    Returns:
      The parameters, and the fate of every tensor by its path: nothing is dropped in silence.

    Raises:
      ValueError: the hand-off's tensors are not those of this network (lists them).
    """
    if previous is not None:
        name, source = previous
        _check_same_leaves(source, expected, Path(f"the hand-off from stage '{name}'"))
        return source, {path: f"copied from stage '{name}'" for path in _shapes(source)}
    params = initialise()
    weights = find_vgg16(vgg)
    if weights is None:
        return params, {path: "initialised at random" for path in _shapes(params)}
    return port_vgg16(
        params, read_vgg16(weights), temporal_init=temporal_init, conv1_init=conv1_init
    )


def write_fates(path: Path, fates: Mapping[str, str], params: Params) -> None:
    """Writes one line per tensor: path, shape, fate (JSON, readable)."""
    shapes = _shapes(params)
    rows = {name: {"shape": list(shapes[name]), "fate": fate} for name, fate in fates.items()}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def count_parameters(params: Params) -> int:
    """Number of scalars in a tree."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)))
