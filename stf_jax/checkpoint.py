"""Saving and restoring a run with orbax."""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from stf_jax import hosts, progress, startup
from stf_jax.model import Params
from stf_jax.optim import by_path, parameter_path
from stf_jax.parallel import on_host

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
else:
    ocp = startup.Later("orbax.checkpoint")

# Orbax reports every internal timing, and JAX every kind of device that is not there.
for _chatty in ("absl", "jax"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)


_DIGESTS = "digests.json"
# What a whole checkpoint holds, for people.
_CONTENT = f"tree/, record.json and {_DIGESTS}"
# Left free beside what a save needs, bytes: logs and reports are written too.
_SPARE = 64 * 2**20
# Arrays of about so many bytes are read back at a time to verify a save.
_READ = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class _Copy:
    """One copy of a checkpoint on disk: folder `<step>`, `<step>.copy1`, ..."""

    step: int
    number: int
    path: Path


class Checkpoints:
    """The checkpoints in one folder: a tree of arrays and a JSON record per step.

    A save runs beside the training. It is written under a temporary name, read back, compared with
    what was to be saved, described by the digest of every file and then renamed: a folder named by
    a step is a whole checkpoint, whenever the process or the machine stops. Older steps are deleted
    only after that. Every file is checked against its digest before it is used, because neither
    disks nor the array format notice a flipped bit; damaged steps are set aside and the newest
    whole one is used.

    Where several processes train one run, all of them call the same methods in the same order.
    Process 0 alone writes, deletes and chooses; the others read what it has chosen.
    """

    def __init__(self, folder: Path, *, keep: int, copies: int = 1):
        """Names a folder, which is made if absent.

        Args:
          folder: the folder.
          keep: how many of the last steps to keep.
          copies: how often each step is stored; the others stand in for a damaged one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._keep, self._copies = folder, keep, copies
        self._worker = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, futures.Future[None]] | None = None
        self._warned = False

    def steps(self) -> list[int]:
        """The steps on disk, the oldest first."""
        return sorted({copy.step for copy in self._found()})

    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        return max(self.steps(), default=None)

    def clean(self) -> None:
        """Removes what a killed save left; to be called by who alone may write here."""
        if not hosts.leads():
            return
        for path in sorted(self._folder.glob(".saving-*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            progress.say(f"{self._folder}: removed {path.name}, left by a save that was killed")

    def check_space(self, tree: Any) -> None:
        """Makes sure that a tree (arrays or their shapes) can be saved.

        Raises:
          OSError: the disk is too full (says what is needed and what is free), or the folder is
            gone.
        """
        if not hosts.leads():
            return
        self._check_there()
        needed = _bytes(tree) * self._copies + _SPARE
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(
                f"{self._folder}: a checkpoint needs {needed / 2**20:.0f} MiB, but only "
                f"{free / 2**20:.0f} MiB are free. Make room, or choose another --workdir; the "
                "same command goes on",
            )

    def save(self, step: int, tree: Any, record: Mapping[str, Any]) -> None:
        """Starts to save; the arrays may be changed as soon as this returns.

        A step that is already there stays: training is deterministic, so it is the same one.

        Raises:
          OSError: the disk is too full, or the save before this one failed (says why).
        """
        self.wait()
        if hosts.from_first(lambda: any(copy.step == step for copy in self._found())):
            return
        self.check_space(tree)
        # Copies: the next training step writes into the buffers of this one.
        arrays = on_host(by_path(tree))
        if not hosts.leads():
            return
        self._saving = step, self._worker.submit(self._write, step, arrays, dict(record))

    def wait(self) -> None:
        """Returns when the save under way is on disk and verified.

        Raises:
          OSError: it failed (says why, and what remains).
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        error = future.exception()
        if error is not None:
            self._check_there()
            latest = self.latest_step()
            remains = "no step is saved" if latest is None else f"the last saved step is {latest}"
            raise OSError(
                f"{self._folder}: step {step} could not be saved ({error}); {remains}. Once the "
                "cause is mended the same command goes on from there",
            ) from error

    def restore(
        self, like: Any, *, set_aside: bool = False, step: int | None = None, part: str = ""
    ) -> tuple[int, Any, dict[str, Any]]:
        """Reads the newest whole checkpoint.

        Args:
          like: a tree of the expected structure, shapes and dtypes (arrays or their shapes); None
            takes what there is, as a dict of arrays by path.
          set_aside: rename damaged ones, so that they are not met again; for who alone may write.
          step: read this one; None is the newest.
          part: read only what lies under this name, such as 'params', of which `like` speaks.

        Returns:
          Its step, tree (of numpy arrays) and record.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it holds other leaves (lists them).
          OSError: all are damaged, or it was removed while it was read (says how).
        """
        self.wait()
        chosen, name = hosts.from_first(lambda: self._choose(set_aside, step))
        path = self._folder / name
        damage = "" if hosts.leads() else _damage(path)
        if damage:
            raise OSError(f"{path}: whole in process 0, but here {damage}: see to the file system")
        try:
            record = json.loads((path / "record.json").read_text(encoding="utf-8"))
            return chosen, _read(path, like, part), record
        except (OSError, ValueError, AttributeError) as error:
            # Orbax fails in many ways where a file is gone.
            damage = _damage(path)
            if not damage:
                raise
            raise OSError(
                f"{path} was whole and changed while it was read: now {damage}; expected "
                f"{_CONTENT} in it. {self._advice()}"
            ) from error

    def _choose(self, set_aside: bool, step: int | None) -> tuple[int, str]:
        """Step and folder of the newest whole checkpoint; see `restore`."""
        found = [copy for copy in self._found() if step in (None, copy.step)]
        if not found:
            told = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self._folder} holds no {told}: expected a folder there that is named by its "
                f"step and holds {_CONTENT}. Train first, or name the right --workdir. If there "
                f"was one: {self._advice()}"
            )
        damages: list[str] = []
        for copy in found:
            damage = _damage(copy.path)
            if not damage:
                if damages:
                    progress.say(f"{self._folder}: step {copy.step} ({copy.path.name}) is used")
                return copy.step, copy.path.name
            damages.append(f"{copy.path.name}: {damage}")
            aside = f"; set aside as {_set_aside(copy.path)}" if set_aside else ""
            progress.say(f"{self._folder}: {damages[-1]}{aside}")
        raise OSError(
            f"{self._folder}: no checkpoint is whole ({'; '.join(damages)}). {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            f"Restore {self._folder} from a backup, or remove {self._folder.parent} to train this "
            "stage again"
        )

    def _check_there(self) -> None:
        """Says more than "no such file" of a folder that was there when the run began."""
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{self._folder} is gone: it was there when this program began, and held the "
                "checkpoints of this stage. It was removed, renamed or unmounted since. Bring it "
                "back, and the same command goes on from its last step"
            )

    def close(self) -> None:
        """Waits for a save under way and ends its thread.

        Raises:
          OSError: the save failed (see `wait`).
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def _found(self) -> list[_Copy]:
        """Every copy of every step, the newest first; speaks once of what does not belong here."""
        self._check_there()
        found, strays = [], []
        for path in sorted(self._folder.iterdir()):
            match = re.fullmatch(r"(\d+)(?:\.copy(\d+))?", path.name)
            if match and ((path / "tree").exists() or (path / _DIGESTS).exists()):
                found.append(_Copy(int(match[1]), int(match[2] or 0), path))
            elif not re.fullmatch(r"\..*|.*\.damaged\d*", path.name):
                strays.append(path.name)
        if strays and not self._warned:
            self._warned = True
            progress.say(f"{self._folder}: not checkpoints of ours, ignored: {', '.join(strays)}")
        return sorted(found, key=lambda copy: (-copy.step, copy.number))

    def _write(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Saves, verifies, copies, and then deletes what is older than the kept steps."""
        with hosts.undisturbed():
            aside = self._folder / f".saving-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()  # not its parents: a folder that vanished is an error
            with _orbax(ocp.StandardCheckpointHandler) as checkpointer:
                checkpointer.save((aside / "tree").absolute(), args=ocp.args.StandardSave(arrays))
            (aside / "record.json").write_text(json.dumps(record), encoding="utf-8")
            _check_written(aside, arrays)
            _finish(aside)
            for number in range(1, self._copies):
                copy = self._folder / f".saving-{step}.copy{number}"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(aside, copy)
                damage = _damage(copy)
                if damage:
                    raise OSError(f"the copy reads back otherwise: {damage}")
                _finish(copy)
                copy.rename(self._folder / f"{step}.copy{number}")
            aside.rename(self._folder / str(step))
            _flush(self._folder)
            kept = sorted({copy.step for copy in self._found()})[-self._keep :]
            for old in self._found():
                if old.step not in kept:
                    # Renamed first, so that a kill leaves no half of it under its name.
                    gone = old.path.rename(self._folder / f".saving-old-{old.path.name}")
                    shutil.rmtree(gone)


def _orbax(handler: Any) -> "ocp.Checkpointer":
    """Orbax for this process alone: of itself it would wait for all processes at every turn."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIGESTS)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(folder: Path) -> None:
    """Describes every file by its digest and brings all of it to disk."""
    files = _files(folder)
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in (*files, folder / _DIGESTS, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, or ''."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        expected = {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, OSError, AttributeError) as error:
        return f"its {_DIGESTS} cannot be read ({error})"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not what was written (its digest differs)"
    extra = {path.relative_to(folder).as_posix() for path in _files(folder)} - set(expected)
    return f"{sorted(extra)[0]} does not belong to it" if extra else ""


def _set_aside(folder: Path) -> str:
    for number in itertools.count():
        aside = folder.with_name(f"{folder.name}.damaged{number or ''}")
        if not aside.exists():
            folder.rename(aside)
            return aside.name
    raise AssertionError("unreachable")


def _check_written(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Reads a save back and compares every bit, a part at a time.

    Raises:
      OSError: an array differs (names it).
    """
    part: dict[str, Any] = {}
    names = list(arrays)
    for name in names:
        part[name] = jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
        if _bytes(part) < _READ and name != names[-1]:
            continue
        with _orbax(ocp.PyTreeCheckpointHandler) as checkpointer:
            read = checkpointer.restore(
                (folder / "tree").absolute(),
                args=ocp.args.PyTreeRestore(item=part, partial_restore=True),
            )
        for key in part:
            if read[key].tobytes() != arrays[key].tobytes():
                raise OSError(f"{key} reads back otherwise than it was written")
        part = {}


def _read(folder: Path, like: Any, part: str = "") -> Any:
    """The tree of a whole checkpoint, or what of it lies under `part`, in the structure of `like`.

    Of a part nothing else is read: the rest of a training state is twice its size.
    """
    path = (folder / "tree").absolute()
    if part:
        return _read_part(path, like, f"{part}/")
    with _orbax(ocp.StandardCheckpointHandler) as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        if like is not None:
            _check_same_leaves(stored, like, folder)
        leaves = by_path(stored if like is None else like)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()
        }
        arrays = checkpointer.restore(path, args=ocp.args.StandardRestore(wanted))
    if like is None:
        return arrays
    return jax.tree_util.tree_map_with_path(lambda p, _: arrays[parameter_path(p)], like)


def _read_part(path: Path, like: Any, prefix: str) -> Any:
    with _orbax(ocp.PyTreeCheckpointHandler) as checkpointer:
        stored = by_path(checkpointer.metadata(path).item_metadata.tree)
        here = {k.removeprefix(prefix): leaf for k, leaf in stored.items() if k.startswith(prefix)}
        _check_same_leaves(here, like, path.parent)
        wanted = {
            prefix + name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in by_path(like).items()
        }
        arrays = checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item=wanted, partial_restore=True)
        )
    return jax.tree_util.tree_map_with_path(
        lambda p, _: np.asarray(arrays[prefix + parameter_path(p)]), like
    )


def misfit(path: str, have: Any, want: Any) -> str:
    """How a tensor (an array, or its shape and type) differs from what is expected; '' if not.

    Args:
      path: its name.
      have: the tensor; None if it is missing.
      want: what is expected; None if nothing of this name is.

    Example:
      >>> misfit("head/bias", np.zeros(5), np.zeros(2))
      'mismatched: head/bias is (5,), expected (2,)'
    """
    if have is None:
        return f"missing: {path} {tuple(want.shape)}"
    if want is None:
        return f"extra: {path} {tuple(have.shape)}"
    if tuple(have.shape) != tuple(want.shape):
        return f"mismatched: {path} is {tuple(have.shape)}, expected {tuple(want.shape)}"
    kinds = np.dtype(have.dtype), np.dtype(want.dtype)
    return f"mismatched: {path} is {kinds[0]}, expected {kinds[1]}" * (kinds[0] != kinds[1])


def misfits(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """`misfit` of all tensors, by their paths: the expected ones, then the extra ones."""
    pairs = {path: (have[path] if path in have else None, leaf) for path, leaf in want.items()}
    pairs |= {path: (leaf, None) for path, leaf in have.items() if path not in want}
    return [told for path, pair in pairs.items() if (told := misfit(path, *pair))]


def unfitting(what: str, faults: Sequence[str], advice: str) -> ValueError:
    """The error of tensors that are not the network's.

    Args:
      what: holds them, for people.
      faults: by `misfit`; the first 20 are shown.
      advice: what to do.
    """
    shown = "\n  ".join(faults[:20]) + f"\n  and {len(faults) - 20} more" * (len(faults) > 20)
    return ValueError(
        f"{what}: its tensors are not those of the network of this configuration:\n"
        f"  {shown}\n{advice}"
    )


def _check_same_leaves(stored: Any, like: Any, where: Path) -> None:
    faults = misfits(by_path(stored), by_path(like))
    if faults:
        advice = "Use the configuration that it was trained with (config.json of its run)."
        raise unfitting(str(where), faults, advice)


def digest_of(tree: Any) -> str:
    """SHA-256 of a tree of arrays; every process must ask.

    Of the name, type, shape and bytes of each, sorted by name. Exported files state it of their
    weights (`signature.json`), so it must stay as it is.
    """
    total = hashlib.sha256()
    for name, array in sorted(on_host(by_path(tree)).items()):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def count_parameters(params: Params) -> int:
    """Number of scalars in a tree."""
    return int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)))
