"""Archives of videos: fetched from where they are published, checked, and unpacked once.

An archive is a stranger's: nothing of it is written outside its folder, no link is made, and no
small file becomes a disk full of zeros. Folders and files appear whole, by renaming, or not at all.
"""

import dataclasses
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import stat
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from stf_jax import progress

_MARKER = ".unpacked.json"
_CHUNK = 1 << 20

# Videos are compressed already: real archives of them grow by a few per cent.
_MAX_RATIO = 50
# Below this, bytes, nothing is a bomb.
_HARMLESS = 64 << 20
_MAX_BYTES = 1 << 40
_MAX_MEMBERS = 5_000_000

# Programs that unpack RAR: name, and arguments before the archive and the target folder.
_RAR_TOOLS = {
    "unrar": ("x", "-o+", "-idq", "--", "{archive}", "{folder}/"),
    "unar": ("-q", "-f", "-D", "-o", "{folder}", "--", "{archive}"),
    "bsdtar": ("-x", "--no-same-owner", "-f", "{archive}", "-C", "{folder}"),
    "7z": ("x", "-y", "-bd", "-o{folder}", "--", "{archive}"),
    "7zz": ("x", "-y", "-bd", "-o{folder}", "--", "{archive}"),
}

_TRIES = 5
_PAUSE = 1.0  # seconds before the second try; doubles with each
_TIMEOUT = 30.0  # seconds without a byte


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an archive is published, and how to know that it is the right one.

    Args:
      url: http or https.
      bytes: its size.
      sha256: its digest; '' where no trustworthy record of it is known: then it is not fetched.
    """

    url: str
    bytes: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def fetch_into(root: Path, source: Source) -> None:
    """Downloads an archive beside `root` and unpacks it there, unless that is done.

    A download that was cut is taken up where it ended. The archive is kept.

    Raises:
      ValueError: the file is not the one that is expected, or cannot be unpacked.
      OSError: no connection, or no room.
      RuntimeError: another process is at it.
    """
    if _filled(root, source.name):
        return
    by_hand = (
        f"download {source.url} yourself and pass it as --config.data.archive=/path/to/"
        f"{source.name}"
    )
    if not source.sha256:
        raise ValueError(
            f"data.download: no trustworthy size and digest of {source.url} is known, so it is "
            f"not fetched unseen; {by_hand}"
        )
    archive = root.with_name(source.name)
    with _alone(root):
        if not archive.exists():
            _download(source, archive, by_hand)
    unpack_into(root, archive)


def unpack_into(root: Path, archive: Path) -> None:
    """Unpacks an archive into `root`, unless that is done; what it is, its content says.

    Raises:
      FileNotFoundError: there is no such archive, or no program for its format.
      ValueError: it is damaged, dangerous or of an unknown format, or `root` holds other files.
      OSError: no room.
      RuntimeError: another process is at it.
    """
    with _alone(root):
        if _filled(root, archive.name):
            return
        if not archive.is_file():
            raise FileNotFoundError(
                f"{archive} is not there; expected the archive to unpack into {root} "
                "(--config.data.archive)"
            )
        aside = root.with_name(f".{root.name}.part")
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run has left
        aside.mkdir()
        try:
            _unpack(archive, aside)
            (aside / _MARKER).write_text(json.dumps({"archive": archive.name}) + "\n")
            if root.exists():
                root.rmdir()
            aside.rename(root)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    progress.say(f"unpacked {archive} into {root}")


def _filled(root: Path, name: str) -> bool:
    """Whether `root` holds the content of the archive of that name.

    Raises:
      ValueError: it holds something else.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(f"{root} is a file; data.root must name a folder to unpack into")
    marker = root / _MARKER
    if marker.is_file():
        there = json.loads(marker.read_text())["archive"]
        if there == name:
            return True
        raise ValueError(
            f"{root} was unpacked from {there}, not from {name}: choose another --config.data.root"
        )
    if any(root.iterdir()):
        raise ValueError(
            f"{root} holds files that were not unpacked from {name}: leave data.archive and "
            "data.download out to use them, or choose another --config.data.root"
        )
    return False


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.with_name(f".{root.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{root} is being fetched or unpacked by another process; wait until it ends"
            ) from None
        yield


# --- unpacking -------------------------------------------------------------------------------


def _unpack(archive: Path, folder: Path) -> None:
    with open(archive, "rb") as file:
        head = file.read(8)
    if head.startswith(b"PK"):
        _unzip(archive, folder)
    elif head.startswith(b"Rar!"):
        _unrar(archive, folder)
    else:
        raise ValueError(
            f"{archive}: expected a ZIP or RAR archive, got a file that starts with {head!r}; "
            "download it again, or unpack it yourself and leave data.archive out"
        )


def _unzip(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [(_safe_name(archive, info), info) for info in opened.infolist()]
            _check_members(archive, members)
            total = sum(info.file_size for _, info in members)
            _check_room(archive.name, folder.parent, total)
            with progress.bar(total=total, description=f"unpack {archive.name}", unit="B") as bar:
                for name, info in members:
                    target = folder / name
                    if info.is_dir():
                        target.mkdir(parents=True, exist_ok=True)
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(info) as source, open(target, "xb") as written:
                        while chunk := source.read(_CHUNK):
                            written.write(chunk)
                            bar.update(len(chunk))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{archive} is damaged ({error}): download it again") from error


def _safe_name(archive: Path, info: zipfile.ZipInfo) -> str:
    """The path of a member below the target.

    Raises:
      ValueError: it is none, or the member is neither file nor folder.
    """
    name = info.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(
            f"{archive}: refused: the member {info.filename!r} leads out of its folder"
        )
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{archive}: refused: the member {info.filename!r} is a link or a device")
    if info.flag_bits & 1:
        raise ValueError(f"{archive}: {info.filename!r} is encrypted; unpack it yourself")
    return name


def _check_members(archive: Path, members: list[tuple[str, zipfile.ZipInfo]]) -> None:
    """Refuses bombs and archives in which a file would be written twice."""
    if len(members) > _MAX_MEMBERS:
        raise ValueError(f"{archive}: refused: {len(members)} members, at most {_MAX_MEMBERS}")
    seen: set[str] = set()
    for name, info in members:
        if not info.is_dir() and name in seen:
            raise ValueError(f"{archive}: refused: the member {name!r} comes twice")
        seen.add(name)
    total = sum(info.file_size for _, info in members)
    _check_growth(archive, total)


def _check_growth(archive: Path, total: int) -> None:
    size = archive.stat().st_size
    if total > _MAX_BYTES or total > max(_HARMLESS, _MAX_RATIO * size):
        raise ValueError(
            f"{archive}: refused: its {size} bytes would become {total} or more, as no archive of "
            "videos does; unpack it yourself if you trust it"
        )


def _check_room(what: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, only {free / 1e9:.2f} GB are free"
        )


def _unrar(archive: Path, folder: Path) -> None:
    """Runs a program, watching what it writes; Python has none of its own for RAR."""
    tool = next((name for name in _RAR_TOOLS if shutil.which(name)), None)
    if tool is None:
        raise FileNotFoundError(
            f"{archive} is a RAR archive and no program for it is installed: install one of "
            f"{', '.join(_RAR_TOOLS)} (Debian: `apt install unar` or `libarchive-tools`), or "
            "unpack it yourself, point --config.data.root there and leave data.archive out"
        )
    _check_room(archive.name, folder.parent, archive.stat().st_size)
    places = {"archive": str(archive.absolute()), "folder": str(folder.absolute())}
    command = [tool, *(part.format(**places) for part in _RAR_TOOLS[tool])]
    progress.say(f"unpacking {archive} with {tool}")
    with open(folder.with_name(folder.name + ".log"), "w+b") as log:
        Path(log.name).unlink()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                _check_written(archive, folder)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()[-500:]
            raise ValueError(f"{archive}: {tool} failed with code {process.returncode}: {said}")
    _check_written(archive, folder)


def _check_written(archive: Path, folder: Path) -> None:
    total = members = 0
    for place, names, files in os.walk(folder):
        for name in (*names, *files):
            try:
                facts = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue  # renamed by the program at work
            if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
                raise ValueError(f"{archive}: refused: the member {name!r} is a link or a device")
            total, members = total + facts.st_size * stat.S_ISREG(facts.st_mode), members + 1
    if members > _MAX_MEMBERS:
        raise ValueError(f"{archive}: refused: more than {_MAX_MEMBERS} members")
    _check_growth(archive, total)


# --- downloading -----------------------------------------------------------------------------


def _download(source: Source, archive: Path, by_hand: str) -> None:
    """Fetches a file whole or not at all; a part that is there is gone on with."""
    part = archive.with_name(archive.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    _check_room(source.name, archive.parent, source.bytes - have)
    failure = "the connection ended"
    with (
        progress.bar(
            total=source.bytes, initial=have, description=f"download {source.name}", unit="B"
        ) as bar,
        open(part, "ab") as file,
    ):
        for attempt in range(_TRIES):
            if file.tell() >= source.bytes:
                break
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                _receive(source, file, bar)
            except urllib.error.HTTPError as error:
                failure = str(error)
                error.close()
                if error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                failure = str(error)
        received = file.tell()
    if received < source.bytes:
        raise OSError(
            f"{source.url}: got {received} of {source.bytes} bytes "
            f"({failure}). Is there internet? The same command goes on "
            f"from there; or {by_hand}"
        )
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if received != source.bytes or digest != source.sha256:
        part.unlink()
        raise ValueError(
            f"{source.url} gave {received} bytes with sha256 {digest}, expected {source.bytes} "
            f"with {source.sha256}: it is not the file that this program knows and was removed"
        )
    part.rename(archive)


def _receive(source: Source, file: BinaryIO, bar: tqdm) -> None:
    have = file.tell()
    wanted = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(source.url, headers=wanted)
    if request.type not in ("http", "https"):
        raise ValueError(f"{source.url}: expected http or https")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.truncate(0)  # a server that cannot go on in the middle
            file.seek(0)
            bar.reset()
        # One byte more than expected is enough to know that it is another file.
        while file.tell() <= source.bytes and (chunk := response.read(_CHUNK)):
            file.write(chunk)
            bar.update(len(chunk))
