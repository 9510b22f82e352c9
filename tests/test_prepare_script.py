"""experiments/prepare.py as a user runs it: exit codes, and a disk that does not take it."""

import hashlib
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def videos(tiny_videos, tmp_path) -> Path:
    """A copy of the tiny videos that a test may spoil."""
    return shutil.copytree(tiny_videos, tmp_path / "videos")


def _command(videos, root, *more):
    return [
        sys.executable,
        str(ROOT / "experiments" / "prepare.py"),
        f"--config={ROOT / 'configs' / 'folder.py'}:laptop",
        f"--config.data.root={videos}",
        f"--config.records.root={root}",
        "--config.records.size=36",
        "--config.records.flow_size=48",
        "--config.records.min_truncated_frames=8",
        "--config.records.workers=2",
        *more,
    ]


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _run(*command, **kwargs):
    return subprocess.run(
        _command(*command), capture_output=True, text=True, env=_environment(), **kwargs
    )


def test_prepares_reports_checks_and_mends(videos, tmp_path):
    done = _run(videos, tmp_path / "records")
    assert done.returncode == 0, done.stderr
    assert "16 videos" in done.stdout and "0 cannot be used" in done.stdout
    (videos / "left" / "page.avi").write_text("<html>404</html>")
    done = _run(videos, tmp_path / "records")
    assert done.returncode == 2, done.stderr
    assert "left/page.avi: NOT USED: not a video: HTML document" in done.stdout
    for shard in (tmp_path / "records").rglob("*.array_record*"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    done = _run(videos, tmp_path / "records", "--verify")
    assert done.returncode == 3, done.stderr
    assert "mended: video_records-videos.array_record-00000-of-00001 is not what" in done.stdout
    done = _run(videos, tmp_path / "records", "--verify")
    assert done.returncode == 2 and "all intact" in done.stdout


def test_a_full_disk_ends_it_and_leaves_nothing_half_written(videos, tmp_path):
    """A quota on the size of files, which workers inherit, stands for the full disk."""

    def quota():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as for a full disk, an error, no signal

    done = _run(videos, tmp_path / "records", preexec_fn=quota)
    assert done.returncode == 1
    assert "error: [Errno 27] File too large" in done.stderr
    assert not list((tmp_path / "records").rglob("*.npz"))
    assert not list((tmp_path / "records").rglob("*.part"))
    assert _run(videos, tmp_path / "records").returncode == 0


@pytest.mark.parametrize("where", ["read-only", "a file"])
def test_a_folder_that_cannot_be_written_fails_at_once(videos, tmp_path, where):
    if where == "a file":
        root = tmp_path / "records"
        root.write_text("in the way")
    else:
        root = Path("/proc/records")  # nobody can write there, not even root
    done = _run(videos, root)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and str(root) in done.stderr
    assert "videos ->" not in done.stderr  # before any work


def _digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="Apache Beam is not installed: make test-beam",
)
def test_beam_makes_the_same_bytes(videos, tmp_path):
    (videos / "left" / "empty.avi").touch()
    assert _run(videos, tmp_path / "ordinary").returncode == 2
    done = _run(videos, tmp_path / "beam", "--beam=--runner=DirectRunner")
    assert done.returncode == 2, done.stderr
    assert "DirectRunner makes 1 shards" in done.stdout
    assert "left/empty.avi: NOT USED: empty file" in done.stdout
    assert _digests(tmp_path / "beam") == _digests(tmp_path / "ordinary")
