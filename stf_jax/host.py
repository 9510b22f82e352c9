"""The process on its machine: what they are, how it gets memory, whether it overlooks a GPU."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"
# What NVIDIA's driver makes for the first GPU.
_GPU = Path("/dev/nvidia0")


def leaves_gpu_unused(backend: str) -> bool:
    """Whether there is an NVIDIA GPU that JAX does not use.

    Args:
      backend: what JAX runs on (`jax.default_backend()`), such as 'cpu'.
    """
    return backend == "cpu" and _GPU.exists()


def commit() -> str:
    """The commit that this program is of, with '-dirty' if it was changed since.

    Result files do not count: they are written by what the commit describes.
    """
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    name, changed = (
        subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout.strip()
        for words in (
            ["describe", "--always"],
            ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results"],
        )
    )
    return (name + "-dirty" * bool(changed)) or "unknown (no git checkout)"


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    # Linux only: elsewhere a process cannot be kept to some of them.
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> str:
    """How many cores there are, and how many of them this process may use if not all."""
    count, usable = os.cpu_count(), len(usable_cores())
    return f"{count} CPU cores" if usable == count else f"{usable} of {count} CPU cores"


_DEVICES_FLAG = "--xla_force_host_platform_device_count"


def devices_for(batch_size: int, parts: int = 1) -> int:
    """How many devices a CPU had best be for training: at most one for each usable core.

    Args:
      batch_size: clips of a batch, which the devices share evenly.
      parts: that each batch is worked through in (`optimizer.accumulate`).
    """
    most = min(len(usable_cores()), batch_size)
    return max(n for n in range(1, most + 1) if n == 1 or batch_size % (n * parts) == 0)


def divide_cores(
    batch_size: int, parts: int = 1, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Lets JAX see a CPU as several devices that share a batch; before it looks for devices.

    Each then works through clips of its own on one core, which leaves less of the cores unused than
    dividing single operations among them (experiments/bench/cores.py). GPUs are not concerned.

    Args:
      batch_size: clips of a batch.
      parts: that each batch is worked through in.
      environment: where XLA will read its flags; a number that is there already is left alone.
    """
    if batch_size < 1 or parts < 1:
        return  # will be refused, by name
    told = environment.get("XLA_FLAGS", "")
    count = devices_for(batch_size, parts)
    if count > 1 and _DEVICES_FLAG not in told:
        environment["XLA_FLAGS"] = f"{told} {_DEVICES_FLAG}={count}".strip()


def machine() -> str:
    """System, kind of processor and cores."""
    return f"{platform.system()} {platform.machine()}, {cores()}"


def huge_page_environment(environment: Mapping[str, str], setting: str) -> dict[str, str] | None:
    """The environment in which large arrays get huge pages, or None if nothing is to be changed.

    Args:
      environment: the present one; its own `GLIBC_TUNABLES` are left alone.
      setting: what the kernel says of transparent huge pages, such as 'always [madvise] never'.

    Returns:
      A copy with one variable added, where programs may ask for huge pages and have not.

    Example:
      >>> huge_page_environment({}, "always [madvise] never")
      {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
      >>> huge_page_environment({}, "[always] madvise never") is None
      True
    """
    if "[madvise]" not in setting or _TUNABLES in environment:
        return None
    return {**environment, _TUNABLES: "glibc.malloc.hugetlb=1"}


def use_huge_pages() -> None:
    """Starts this very command again so that large arrays get huge pages; to be called first.

    A training step takes gigabytes from the system and gives them back; in pages of 4 KiB this is
    up to a third of its time on a CPU. The C library reads its setting only when a process starts.
    """
    try:
        setting = _SETTING.read_text()
    except OSError:
        return  # not Linux, or a kernel without huge pages
    if platform.libc_ver()[0] != "glibc":
        return
    environment = huge_page_environment(os.environ, setting)
    if environment is not None:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
