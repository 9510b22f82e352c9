"""What comes before the first training step: imports, kept programs, and where the time goes.

XLA's compiled programs are kept between starts, in JAX's own cache. JAX writes its entries in
place, reads whatever it finds and never replaces one: an entry that a kill has cut short would be
met, and refused, at every start. So each has its digest beside it, and what does not agree with it
is removed before JAX looks.
"""

import hashlib
import importlib
import os
import platform
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from stf_jax import progress

# Bytes of programs that are kept; the oldest go first. One of a training step has a few MB.
_KEPT = 512 * 2**20
_ENTRY, _NOTE = "-cache", "-cache.sha256"

_own_folder: Path | None = None
_marks: list[tuple[str, float]] = []


class Later:
    """A library that is imported when something of it is first used.

    TensorFlow and orbax take longer to import than all else together: meanwhile the training step,
    which needs neither, is compiled.
    """

    def __init__(self, name: str, also: str = ""):
        """Names it, and a module that has to be imported before anything of it is used."""
        self._name, self._also = name, also

    def __getattr__(self, name: str) -> Any:
        if self._also:
            importlib.import_module(self._also)
        return getattr(importlib.import_module(self._name), name)


def keep_programs(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Has JAX keep what it compiles; to be called before JAX is imported.

    Nothing is changed where `JAX_COMPILATION_CACHE_DIR` names a folder: that one is JAX's and the
    user's business. `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.

    Args:
      environment: where JAX will read its settings; those already there are left alone.

    Returns:
      The folder, cleaned of damaged entries, or None if there is none of ours.
    """
    global _own_folder
    enabled = environment.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower()
    if "JAX_COMPILATION_CACHE_DIR" in environment or enabled in ("false", "0", "no", "off"):
        return None
    home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "stf_jax" / f"programs-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(folder, _KEPT)
    except OSError as error:
        progress.say(f"{folder}: compiled programs are not kept ({error})")
        return None
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # XLA's own files beside the programs have no digests, and a choice of kernels that they hold
    # could change the last bits of a run.
    environment.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
    _own_folder = folder
    return folder


def note_programs() -> None:
    """Notes the digests of what has been compiled since the last call: it will be used again."""
    if _own_folder is None:
        return
    try:
        for entry in _own_folder.glob(f"*{_ENTRY}"):
            note = entry.with_name(entry.name.removesuffix(_ENTRY) + _NOTE)
            if not note.exists():
                note.write_text(_digest(entry))
    except OSError:
        pass  # gone, or a full disk: without a note it is compiled again, that is all


def _sweep(folder: Path, limit: int) -> None:
    """Removes entries that are not what was noted, notes without an entry, and what is too much."""
    for note in folder.glob(f"*{_NOTE}"):
        if not note.with_name(note.name.removesuffix(_NOTE) + _ENTRY).exists():
            note.unlink(missing_ok=True)
    whole = []
    for entry in folder.glob(f"*{_ENTRY}"):
        note = entry.with_name(entry.name.removesuffix(_ENTRY) + _NOTE)
        if note.exists() and note.read_text(errors="replace") == _digest(entry):
            whole.append((entry, note))
            continue
        # Without a note: of a start that was killed before it noted anything.
        damaged = note.exists()
        entry.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        if damaged:
            progress.say(f"{folder}: removed a damaged program ({entry.name}); compiled again")
    sizes = 0
    for entry, note in sorted(whole, key=lambda pair: -pair[0].stat().st_mtime_ns):
        sizes += entry.stat().st_size
        if sizes > limit:
            entry.unlink(missing_ok=True)
            note.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _processor() -> str:
    """Names the kind of processor: a home folder may serve several, programs fit only one."""
    told = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        told += "".join(dict.fromkeys(x for x in lines if x.startswith(("model name", "flags"))))
    except OSError:
        pass  # not Linux
    return hashlib.sha256(told.encode()).hexdigest()[:12]


# --- where the time goes ---------------------------------------------------------------------


def begin() -> None:
    """Starts to measure: from when the system started this process."""
    _marks[:] = [("", _process_began())]


def reached(part: str) -> None:
    """Says that a part of the start is over; counts once, and only if measuring has begun."""
    if _marks and part not in (name for name, _ in _marks):
        _marks.append((part, time.monotonic()))


def parts() -> dict[str, float]:
    """Seconds of each part of the start, in order; empty if nothing is measured."""
    pairs = zip(_marks, _marks[1:], strict=False)
    return {name: round(now - before, 2) for (_, before), (name, now) in pairs}


def first_step_done() -> bool:
    """Ends the measurement, and says what came of it, when called for the first time."""
    if not _marks or _marks[-1][0] == "first step":
        return False
    reached("first step")
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts().items())
    total = _marks[-1][1] - _marks[0][1]
    progress.say(f"first training step {total:.1f} s after the command: {told}")
    return True


def _process_began() -> float:
    """When this process was started, on the clock of `time.monotonic`."""
    try:
        # The 22nd field, in ticks since the machine started; names of programs may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.monotonic()  # not Linux
    return time.monotonic() - age
