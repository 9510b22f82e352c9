"""What native code writes to standard error, with jaxlib's last words turned into a message.

Where several processes train one run and process 0 dies, or another falls silent, jaxlib prints a
dump of its stack and aborts the process; nothing in that process can be done about it.
"""

import os
import re
import select
import signal
import sys

# All processes must have started after so long, seconds: a queue may start them one by one.
START = 300
AGAIN = "Start all of them again: the same commands go on from the last checkpoint."


def watch() -> None:
    """Puts a reader, a very small process, behind standard error; before JAX starts its threads.

    Python writes past it, to where standard error went before.
    """
    terminal = os.dup(2)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        try:
            os.close(writing)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            # It ends when the last that writes to it has ended.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            relay(reading, terminal)
        finally:
            os._exit(0)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding="utf-8", errors="replace")


def relay(source: int, target: int) -> None:
    """Copies one file to another until it ends, but jaxlib's dump of a lost process as a message.

    Args:
      source: file descriptor of a pipe.
      target: file descriptor.
    """
    held = b""
    while True:
        # What looks like the beginning of a dump is held back until it is one, or nothing follows.
        ready = select.select([source], [], [], 2.0)[0]
        read = os.read(source, 1 << 16) if ready else b""
        held += read
        if ready and not read:
            os.write(target, _in_short(held))
            return
        if not re.search(rb"coordination_service|distributed service", held) or not ready:
            os.write(target, held)
            held = b""


def _in_short(text: bytes) -> bytes:
    if b"distributed service detected fatal errors" not in text:
        return text
    start = re.search(rb"^.*(coordination_service|distributed service)", text, re.MULTILINE)
    assert start is not None
    status = re.search(rb"absl::Status: ([^\n]*)", text)
    reason = status[1].decode(errors="replace") if status else "no reason"
    if b"RegisterTask" in text:
        told = (
            f"not all processes of this run have met ({reason}). Start all of them within {START} "
            "s, each with a number of its own; --coordinator must name a port of process 0's "
            "machine that the others reach."
        )
    else:
        silent = re.search(rb"stopped sending heartbeats\):\s*((?:\d+\s)+)", text)
        who = "process " + b" ".join(silent[1].split()).decode() if silent else "process 0"
        told = (
            f"{who} of this run has ended, or cannot be reached any more ({reason}); its own "
            f"output says why. {AGAIN}"
        )
    return text[: start.start()] + f"\nerror: {told}\n".encode()
