"""Numbers as the report says them to people."""

import math


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage with a non-breaking space; 'n/a' if there is no such number.

    Example:
      >>> percent(469 / 480).replace(chr(160), " ")
      '97.7 %'
    """
    if share is None or not math.isfinite(share):
        return "n/a"
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def decimal(value: float | None) -> str:
    """A loss with three decimals, or three significant digits below 0.001.

    Example:
      >>> decimal(0.69314), decimal(0.0000421), decimal(float("nan"))
      ('0.693', '4.21e-05', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"


def grouped(count: int) -> str:
    """A count with thousands separated.

    Example:
      >>> grouped(216005251)
      '216,005,251'
    """
    return f"{count:,}"


def scored_videos(subset: str) -> str:
    """How the videos are called that figures are about; nothing else than a test is called one.

    Example:
      >>> scored_videos("validation")
      'held-out training videos'
    """
    return {"test": "test videos", "validation": "held-out training videos"}[subset]


def duration(seconds: float) -> str:
    """A time span in the two units that a person would use.

    Example:
      >>> [duration(s).replace(chr(160), " ") for s in (4.2, 75.0, 3 * 3600 + 120.0)]
      ['4.2 s', '1 min 15 s', '3 h 2 min']
    """
    space = "\N{NO-BREAK SPACE}"
    if seconds < 59.95:
        parts = f"{seconds:.1f} s"
    elif seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        parts = f"{minutes} min {rest} s"
    else:
        hours, minutes = divmod(round(seconds / 60), 60)
        parts = f"{hours} h {minutes} min"
    return parts.replace(" ", space)
