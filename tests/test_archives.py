import functools
import hashlib
import http.server
import io
import os
import stat
import threading
import zipfile
from pathlib import Path

import pytest

from stf_jax import archives
from stf_jax.archives import Source, fetch_into, unpack_into

VIDEO = os.urandom(5000)


def _zip(path: Path, members, **writing) -> Path:
    with zipfile.ZipFile(path, "w", **writing) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def _tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*")
            if p.is_file() and not p.name.startswith(".")}  # fmt: skip


GOOD = [("UCF-101/Archery/a ü.avi", VIDEO), ("UCF-101/b.avi", b"b"), ("UCF-101/empty/", b"")]


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder for the root, so that what lands outside of it can be seen."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def _left_behind(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if not p.name.endswith(".lock"))


def test_a_zip_is_unpacked_whole_and_once(tmp_path, place):
    archive = _zip(tmp_path / "a.zip", GOOD, compression=zipfile.ZIP_DEFLATED)
    unpack_into(place / "root", archive)
    assert _tree(place / "root") == {"UCF-101/Archery/a ü.avi": VIDEO, "UCF-101/b.avi": b"b"}
    assert (place / "root" / "UCF-101" / "empty").is_dir()
    assert _left_behind(place) == ["root"]
    kept = (place / "root" / "UCF-101" / "b.avi").stat().st_mtime_ns
    archive.unlink()  # not needed any more
    unpack_into(place / "root", archive)
    assert (place / "root" / "UCF-101" / "b.avi").stat().st_mtime_ns == kept


def test_names_with_backslashes_are_paths(tmp_path, place):
    unpack_into(place / "root", _zip(tmp_path / "a.zip", [("ucf action\\Run\\1.avi", VIDEO)]))
    assert _tree(place / "root") == {"ucf action/Run/1.avi": VIDEO}


def test_unpacking_that_was_killed_starts_afresh(tmp_path, place, monkeypatch):
    archive = _zip(tmp_path / "a.zip", GOOD)
    (place / ".root.part" / "UCF-101").mkdir(parents=True)
    (place / ".root.part" / "UCF-101" / "half.avi").write_bytes(b"ha")
    unpack_into(place / "root", archive)
    assert set(_tree(place / "root")) == {"UCF-101/Archery/a ü.avi", "UCF-101/b.avi"}
    assert _left_behind(place) == ["root"]


def test_files_of_others_are_left_alone(tmp_path, place):
    archive = _zip(tmp_path / "a.zip", GOOD)
    (place / "root").mkdir()
    (place / "root" / "mine.avi").write_bytes(b"mine")
    with pytest.raises(ValueError, match="root holds files that were not unpacked from a.zip"):
        unpack_into(place / "root", archive)
    assert _tree(place / "root") == {"mine.avi": b"mine"}
    unpack_into(place / "other", archive)
    with pytest.raises(ValueError, match="was unpacked from a.zip, not from b.zip"):
        unpack_into(place / "other", tmp_path / "b.zip")
    with pytest.raises(FileNotFoundError, match="c.zip is not there; expected the archive"):
        unpack_into(place / "new", tmp_path / "c.zip")
    with pytest.raises(ValueError, match="mine.avi is a file"):
        unpack_into(place / "root" / "mine.avi", archive)


@pytest.mark.parametrize(
    "name", ["../out.avi", "a/../../out.avi", "/tmp/out.avi", "..\\out.avi", "C:\\out.avi", "//x/y"]
)
def test_members_that_lead_out_are_refused(tmp_path, place, name):
    archive = _zip(tmp_path / "a.zip", [("fine.avi", VIDEO), (name, b"evil")])
    with pytest.raises(ValueError, match="refused: the member .* leads out"):
        unpack_into(place / "root", archive)
    assert _left_behind(place) == [] and not Path("/tmp/out.avi").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_links_and_devices_are_refused(tmp_path, place, kind):
    link = zipfile.ZipInfo("link.avi")
    link.create_system, link.external_attr = 3, (kind | 0o777) << 16
    archive = _zip(tmp_path / "a.zip", [(link, b"/etc/passwd")])
    with pytest.raises(ValueError, match="'link.avi' is a link or a device"):
        unpack_into(place / "root", archive)
    assert _left_behind(place) == []


def test_bombs_are_refused_before_a_byte_is_written(tmp_path, place, monkeypatch):
    bomb = _zip(tmp_path / "bomb.zip", [("zeros.avi", bytes(80 << 20))],
                compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    assert bomb.stat().st_size < 1 << 20
    many = _zip(tmp_path / "many.zip", GOOD)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(ValueError, match=r"bomb.zip: refused: its \d+ bytes would become 83886080"):
        unpack_into(place / "root", bomb)
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 2)
    with pytest.raises(ValueError, match="refused: 3 members, at most 2"):
        unpack_into(place / "root", many)
    assert _left_behind(place) == []


def test_a_size_that_lies_writes_no_more_than_it_says(tmp_path, place):
    """A header that promises 10 bytes of 80 MB of zeros: the checks above believe it."""
    path = _zip(tmp_path / "a.zip", [("zeros.avi", bytes(80 << 20))],
                compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data.replace((80 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="a.zip is damaged"):
        unpack_into(place / "root", path)
    assert _left_behind(place) == []


def test_a_member_twice_is_refused(tmp_path, place):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = _zip(tmp_path / "a.zip", [("a.avi", b"1"), ("a.avi", b"2")])
    with pytest.raises(ValueError, match="the member 'a.avi' comes twice"):
        unpack_into(place / "root", archive)


@pytest.mark.parametrize("damage", ["cut", "flip", "html", "empty"])
def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path, place, damage):
    path = _zip(tmp_path / "a.zip", GOOD)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[200] ^= 1  # in the first video
    changed = {"cut": data[:3000], "flip": data, "html": b"<html>", "empty": b""}[damage]
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="a.zip(: expected a ZIP or RAR| is damaged)"):
        unpack_into(place / "root", path)
    assert _left_behind(place) == []


def test_an_encrypted_archive_is_named(tmp_path, place):
    path = _zip(tmp_path / "a.zip", [("a.avi", b"x")])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    path.write_bytes(data)
    with pytest.raises(ValueError, match="'a.avi' is encrypted"):
        unpack_into(place / "root", path)


def test_no_room_is_said_before_it_is_full(tmp_path, place, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="a.zip needs 0.00 GB in .*, only 0.00 GB are free"):
        unpack_into(place / "root", _zip(tmp_path / "a.zip", GOOD))
    assert _left_behind(place) == []


def test_a_second_process_gets_a_message(tmp_path, place):
    archive = _zip(tmp_path / "a.zip", GOOD)
    with archives._alone(place / "root"), pytest.raises(RuntimeError, match="another process"):
        unpack_into(place / "root", archive)


# --- RAR -------------------------------------------------------------------------------------


@pytest.fixture
def rar(tmp_path) -> Path:
    """What a tool would take for RAR; the programs below read only its name."""
    path = tmp_path / "UCF101.rar"
    path.write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(100))
    return path


def _program(monkeypatch, tmp_path, name: str, script: str) -> None:
    """Puts a program alone on the search path."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_rar_without_a_program_says_what_to_install(rar, place, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(
        FileNotFoundError, match="install one of unrar, unar, bsdtar, 7z.*apt insta"
    ):
        unpack_into(place / "root", rar)
    assert _left_behind(place) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unrar", 'test "$1 $2 $3 $4 $5" = "x -o+ -idq -- {rar}" && cd "$6"'),
        ("unar", 'test "$1 $2 $3 $4 $6 $7" = "-q -f -D -o -- {rar}" && cd "$5"'),
        ("bsdtar", 'test "$1 $2 $3 $4 $5" = "-x --no-same-owner -f {rar} -C" && cd "$6"'),
        ("7z", 'test "$1 $2 $3 $5 $6" = "x -y -bd -- {rar}" && cd "${{4#-o}}"'),
    ],
)
def test_rar_is_unpacked_by_the_program_that_is_there(
    rar, place, monkeypatch, tmp_path, name, arguments
):
    script = arguments.format(rar=rar) + " && mkdir UCF-101 && echo hello > UCF-101/a.avi"
    _program(monkeypatch, tmp_path, name, script)
    unpack_into(place / "root", rar)
    assert _tree(place / "root") == {"UCF-101/a.avi": b"hello\n"}
    assert _left_behind(place) == ["root"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("cd $6 && echo no password; exit 3", "unrar failed with code 3: no password"),
        ("cd $6 && ln -s /etc/passwd link.avi", "'link.avi' is a link or a device"),
        ("cd $6 && mkfifo pipe.avi; sleep 60", "'pipe.avi' is a link or a device"),
        ("cd $6 && truncate -s 100M zeros.avi; sleep 60", "refused: its 108 bytes would become"),
    ],
)
def test_what_a_program_unpacks_is_watched(rar, place, monkeypatch, tmp_path, script, said):
    _program(monkeypatch, tmp_path, "unrar", script)
    with pytest.raises(ValueError, match=said):
        unpack_into(place / "root", rar)
    assert _left_behind(place) == []


# --- downloading -----------------------------------------------------------------------------


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; `cuts` says after how many bytes each answer breaks off."""

    def __init__(self, *args, content, cuts, ranges, asked, status):
        self.content, self.cuts, self.ranges = content, cuts, ranges
        self.asked, self.status = asked, status
        super().__init__(*args)

    def do_GET(self):
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        if self.status != 200:
            self.send_error(self.status)
            return
        start = int(wanted[6:-1]) if wanted and self.ranges else 0
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(content: bytes, cuts=(), ranges=True, status=200):
        asked: list[str | None] = []
        handler = functools.partial(
            _Server, content=content, cuts=list(cuts), ranges=ranges, asked=asked, status=status
        )
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/videos.zip", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def content() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in GOOD:
            archive.writestr(name, data)
    return buffer.getvalue()


def _source(url: str, content: bytes, **changes) -> Source:
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return Source(url=url, **(known | changes))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    # Only the waits between tries: watching a program needs its own.
    monkeypatch.setattr(archives, "_PAUSE", 0.0)


def test_an_archive_is_fetched_checked_and_unpacked_once(place, serve, content):
    url, asked = serve(content)
    for _ in range(2):
        fetch_into(place / "root", _source(url, content))
    assert set(_tree(place / "root")) == {"UCF-101/Archery/a ü.avi", "UCF-101/b.avi"}
    assert asked == [None] and _left_behind(place) == ["root", "videos.zip"]


def test_a_cut_transfer_goes_on_where_it_ended(place, serve, content):
    url, asked = serve(content, cuts=[1000, 500])
    fetch_into(place / "root", _source(url, content))
    assert asked == [None, "bytes=1000-", "bytes=1500-"]
    assert (place / "videos.zip").read_bytes() == content


def test_a_later_start_goes_on_with_the_part_that_is_there(place, serve, content):
    (place / "videos.zip.part").write_bytes(content[:700])
    url, asked = serve(content)
    fetch_into(place / "root", _source(url, content))
    assert asked == ["bytes=700-"] and (place / "videos.zip").read_bytes() == content


def test_a_server_without_ranges_starts_again(place, serve, content):
    (place / "videos.zip.part").write_bytes(content[:700])
    url, asked = serve(content, ranges=False)
    fetch_into(place / "root", _source(url, content))
    assert (place / "videos.zip").read_bytes() == content


def test_a_transfer_that_never_ends_is_an_error_and_keeps_its_part(place, serve, content):
    url, asked = serve(content, cuts=[100, 100, 100, 100, 100])
    with pytest.raises(OSError, match=r"got 500 of \d+ bytes .*data.archive=/path/to/videos.zip"):
        fetch_into(place / "root", _source(url, content))
    assert len(asked) == 5 and (place / "videos.zip.part").read_bytes() == content[:500]
    fetch_into(place / "root", _source(url, content))
    assert asked[-1] == "bytes=500-"


@pytest.mark.parametrize("wrong", ["digest", "longer", "part"])
def test_another_file_is_refused_and_removed(place, serve, content, wrong):
    url, _ = serve(content)
    changes = {"digest": {"sha256": "0" * 64}, "longer": {"bytes": len(content) - 5}, "part": {}}
    if wrong == "part":
        (place / "videos.zip.part").write_bytes(bytes(700))
    with pytest.raises(ValueError, match="it is not the file that this program knows"):
        fetch_into(place / "root", _source(url, content, **changes[wrong]))
    assert _left_behind(place) == []


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, 5)])
def test_what_the_server_says_is_told(place, serve, content, status, tries):
    url, asked = serve(content, status=status)
    with pytest.raises(OSError, match=f"HTTP Error {status}.*Is there internet"):
        fetch_into(place / "root", _source(url, content))
    assert len(asked) == tries


def test_without_internet_the_way_by_hand_is_told(place, content):
    with pytest.raises(OSError, match="refused.*download http.* yourself and pass it as --config"):
        fetch_into(place / "root", _source("http://127.0.0.1:9/videos.zip", content))


def test_only_what_can_be_checked_is_fetched(place, content):
    with pytest.raises(ValueError, match="no trustworthy size and digest"):
        fetch_into(place / "root", Source("http://127.0.0.1:9/x.rar"))
    with pytest.raises(ValueError, match="expected http or https"):
        fetch_into(place / "root", _source("file:///etc/passwd", content))
