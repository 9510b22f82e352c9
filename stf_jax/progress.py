"""What a user sees of a program at work: lines that stay, bars with the time left, memory."""

import resource
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_silent = False


def silence() -> None:
    """From now on lines and bars are not shown: another process of the same run shows them."""
    global _silent
    _silent = True


def say(message: str) -> None:
    """Prints one line to standard output without tearing a progress bar apart."""
    if _silent:
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int,
    description: str,
    unit: str,
    initial: int = 0,
    disable: bool = False,
) -> tqdm:
    """Returns a progress bar that shows the rate and the remaining time.

    In a terminal it redraws itself; in a log file it adds a line every 15 seconds at the most, so
    that the log of a run that takes days stays readable.

    Args:
      iterable: what to count, or None to count by hand with `update`.
      total: how many items there are, including those done before.
      description: what is being done.
      unit: the singular name of an item.
      initial: items that an earlier, interrupted run has done.
      disable: show nothing.

    Returns:
      A tqdm bar, also usable as a context manager.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=f" {unit}",
        initial=initial,
        disable=disable or _silent,
        mininterval=0.2 if interactive else 15.0,
        maxinterval=1.0 if interactive else 30.0,
        dynamic_ncols=interactive,
        ncols=None if interactive else 120,
    )


class TimeLeft:
    """How long the steps that are left will take at the pace of those done, and of all between.

    The first step is left out: it is compiled.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._steps = 0

    def after_step(self, left: int) -> str:
        """To be called after each step; returns the time for `left` more, such as '1:02:03'."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return "?"
        self._steps += 1
        return tqdm.format_interval((now - self._began) / self._steps * left)


def peak_memory_mb() -> int:
    """The most memory that this process, or one of its finished workers, has held so far, MiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    kibibytes = max(resource.getrusage(one).ru_maxrss for one in who)
    return round(kibibytes / (1024 if sys.platform.startswith("linux") else 1024**2))
