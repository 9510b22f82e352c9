"""What the app's process does in tests of the server: no network, but every way to end."""

import os
import time
from pathlib import Path

from stf_jax.video import VideoFault


def prepare(source, max_seconds):
    """As `app._prepare`."""
    return {"classes": ("left", "right"), "warning": source}


def analyse(source, max_seconds, file, name, why):
    """As `app._analyse`: a file says itself what becomes of it."""
    content = Path(file).read_bytes()
    if content == b"bad":
        raise VideoFault(name, "no video in it", "Send another one.")
    if content == b"crash":
        os._exit(3)
    if content.startswith(b"slow "):
        Path(content[5:].decode()).write_text(str(os.getpid()))
        time.sleep(60)
    return {"name": name, "why": why, "bytes": len(content)}
