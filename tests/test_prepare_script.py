"""experiments/prepare.py as a user runs it: exit codes, and a disk that does not take it."""

import hashlib
import importlib.util
import os
import shutil
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


def _run(*command, before=(), **kwargs):
    return subprocess.run(
        [*before, *_command(*command)],
        capture_output=True,
        text=True,
        env=_environment(),
        **kwargs,
    )


def test_prepares_reports_checks_and_mends(videos, tmp_path):
    (videos / "left" / "page.avi").write_text("<html>404</html>")
    done = _run(videos, tmp_path / "records")
    assert done.returncode == 2, done.stderr
    assert "16 videos" in done.stdout and "1 cannot be used" in done.stdout
    assert "left/page.avi: NOT USED: not a video: HTML document" in done.stdout
    (shard,) = (tmp_path / "records").rglob("*.array_record*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    done = _run(videos, tmp_path / "records", "--verify")
    assert done.returncode == 3, done.stderr
    assert f"mended: {shard.name} has {len(whole) // 2} bytes" in done.stdout
    assert shard.read_bytes() == whole


def test_a_full_disk_ends_it_and_leaves_nothing_half_written(videos, tmp_path):
    """A quota on the size of files, which workers inherit, stands for the full disk."""

    # XFSZ ignored: as from a full disk comes an error, no signal. 2 blocks of 1024 bytes.
    limited = ["bash", "-c", "trap '' XFSZ; ulimit -f 2; exec \"$@\"", "bash"]
    done = _run(videos, tmp_path / "records", before=limited)
    assert done.returncode == 1
    assert "error: [Errno 27] File too large" in done.stderr
    assert not list((tmp_path / "records").rglob("*.npz"))
    assert not list((tmp_path / "records").rglob("*.part"))
    assert _run(videos, tmp_path / "records").returncode == 0


def test_a_folder_that_nobody_can_write_fails_before_any_work(videos):
    done = _run(videos, Path("/proc/records"))  # not even root can
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "/proc/records" in done.stderr
    assert "videos ->" not in done.stderr


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
