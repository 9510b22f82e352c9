import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from configs import ucf101
from stf_jax import flow as optical_flow
from stf_jax import prepare
from stf_jax.prepare import (
    RecordSettings,
    describe,
    encode_video,
    locked,
    manifest_text,
    read_manifest,
    read_staged,
    stage_videos,
    staged_path,
)
from stf_jax.video import read_video


@pytest.fixture
def settings(tmp_path):
    return RecordSettings(
        root=str(tmp_path / "records"),
        size=32,
        resize="squash",
        flow_size=64,
        flow_source="stored",
        flow_algorithm="dis",
        tvl1=optical_flow.TvL1Settings(**ucf101.get_config().records.tvl1),
        flow_bound=8.0,
        jpeg_quality=95,
        min_truncated_frames=12,
        max_pixels=10**6,
        max_frames=1000,
        max_seconds=60.0,
        timeout=60.0,
        workers=1,
    )


def _decode(data, flags):
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def test_frames_are_the_videos_own(tmp_path, settings, make_video):
    path = make_video(tmp_path / "v.avi", frames=10)
    encoded = encode_video(path, settings)
    video = read_video(path)
    assert len(encoded.frames) == 10 and len(encoded.flow) == 9
    for stored, frame in zip(encoded.frames, video.frames, strict=True):
        expected = cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA)
        difference = np.abs(_decode(stored, cv2.IMREAD_COLOR)[..., ::-1].astype(int) - expected)
        assert difference.mean() < 4  # JPEG's loss, no more; swapped colours would be far off


def test_flow_is_computed_large_and_stored_small_with_its_values_scaled(
    tmp_path, settings, make_video
):
    path = make_video(tmp_path / "v.avi", frames=6)
    encoded = encode_video(path, settings)
    frames = read_video(path).frames
    greys = [
        optical_flow.to_grey(cv2.resize(f, (64, 64), interpolation=cv2.INTER_AREA)) for f in frames
    ]
    compute = optical_flow.make_flow("dis")
    for k, stored in enumerate(encoded.flow):
        both = _decode(stored, cv2.IMREAD_GRAYSCALE)
        field = optical_flow.dequantise(np.stack([both[:32], both[32:]], -1), 8.0)
        full = compute(greys[k], greys[k + 1])
        # Half the side, half the displacement.
        assert np.median(np.abs(field.mean((0, 1)) - full.mean((0, 1)) / 2)) < 0.05


@pytest.mark.parametrize(("size", "stored"), [((48, 64), (32, 43)), ((64, 48), (43, 32))])
def test_short_side_keeps_the_aspect(tmp_path, settings, make_video, size, stored):
    path = make_video(tmp_path / "v.avi", frames=3, size=size, speed=2.0)
    whole = dataclasses.replace(settings, resize="short_side", flow_size=48, flow_bound=4.0)
    encoded = encode_video(path, whole)
    frames = read_video(path).frames  # their shorter side is 48 px: flow is computed as they are
    for k, data in enumerate(encoded.frames):
        expected = cv2.resize(frames[k], stored[::-1], interpolation=cv2.INTER_AREA)
        difference = np.abs(_decode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(int) - expected)
        assert difference.mean() < 4
    for k, data in enumerate(encoded.flow):
        both = _decode(data, cv2.IMREAD_GRAYSCALE)
        assert both.shape == (2 * stored[0], stored[1])
        full = optical_flow.make_flow("dis")(*map(optical_flow.to_grey, frames[k : k + 2]))
        expected = optical_flow.quantise(optical_flow.resize_flow(full, stored), 4.0)
        field = np.stack([both[: stored[0]], both[stored[0] :]], -1)
        assert np.abs(field.astype(int) - expected).mean() < 2  # JPEG's loss


def test_a_ribbon_that_no_jpeg_holds_is_a_fault(tmp_path, settings, make_video):
    path = make_video(tmp_path / "v.avi", frames=2, size=(16, 2048))
    ribbon = dataclasses.replace(settings, resize="short_side", size=1024)
    row, encoded = describe("v.avi", path, ribbon)
    assert encoded is None and row.reason == "too long and narrow: 2048x16 px"


def test_row_tells_the_truth_about_a_good_file(tmp_path, settings, make_video):
    path = make_video(tmp_path / "v.avi", frames=10, size=(48, 64), fps=25)
    row, encoded = describe("a/v.avi", path, settings)
    assert encoded is not None and row.usable
    assert (row.status, row.reason, row.num_frames) == ("ok", "", 10)
    assert (row.width, row.height, row.fps) == (64, 48, 25.0)
    assert row.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert row.bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty"), (b"<html><body>404</body></html>", "HTML")]
)
def test_unusable_files_say_why(tmp_path, settings, content, said):
    path = tmp_path / "v.avi"
    path.write_bytes(content)
    row, encoded = describe("v.avi", path, settings)
    assert encoded is None and row.status == "invalid" and said in row.reason
    assert row.bytes == len(content)


def test_a_missing_file_is_a_row_not_a_crash(tmp_path, settings):
    row, _ = describe("v.avi", tmp_path / "gone.avi", settings)
    assert row.status == "invalid" and "cannot be read" in row.reason


def test_a_cut_video_is_used_only_with_enough_frames(tmp_path, settings, make_video):
    whole = make_video(tmp_path / "whole.avi", frames=60, size=(96, 128)).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) * 9 // 10])
    row, encoded = describe("cut.avi", cut, settings)
    assert row.status == "truncated" and encoded is not None
    assert 12 <= row.num_frames < 60 and str(row.num_frames) in row.reason
    strict = dataclasses.replace(settings, min_truncated_frames=50)
    row, encoded = describe("cut.avi", cut, strict)
    assert row.status == "invalid" and encoded is None and "before its time" in row.reason


def test_staging_round_trip_is_exact(tmp_path, settings, make_video):
    path = make_video(tmp_path / "v.avi", frames=5)
    row, encoded = describe("v.avi", path, settings)
    prepare.write_staged(tmp_path / "s.npz", row, encoded)
    staged = read_staged(tmp_path / "s.npz")
    assert (staged.row, staged.frames, staged.flow) == (row, encoded.frames, encoded.flow)
    assert staged.times == encoded.times == (0, 40_000, 80_000, 120_000, 160_000)


def test_manifest_round_trip_with_hostile_names(tmp_path, settings):
    rows = [
        prepare.invalid_row('a, "b"\nnew line/ü.avi', "empty file"),
        dataclasses.replace(prepare.invalid_row("-x", ""), status="ok", fps=29.97, record=3),
    ]
    (tmp_path / "m.csv").write_bytes(manifest_text(rows))
    assert read_manifest(tmp_path / "m.csv") == {row.video_id: row for row in rows}


def _stage(videos, folder, settings):
    """The rows by video id, in the order given."""
    rows = {row.video_id: row for row in stage_videos(videos, folder, settings)}
    return {video_id: rows[video_id] for video_id in videos}


def _digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.npz")}


def test_finished_videos_are_not_done_twice(tmp_path, settings, make_video):
    videos = {f"{i}.avi": make_video(tmp_path / f"{i}.avi", frames=4 + i) for i in range(3)}
    folder = tmp_path / "staged"
    rows = _stage(videos, folder, settings)
    assert list(rows) == list(videos) and [r.num_frames for r in rows.values()] == [4, 5, 6]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.npz")}
    staged_path(folder, "1.avi").unlink()
    staged_path(folder, "2.avi").write_bytes(staged_path(folder, "2.avi").read_bytes()[:-9])
    (folder / ".left.npz.1.part").write_bytes(b"half")
    prepare.sweep(folder)
    assert _stage(videos, folder, settings) == rows
    after = {p: p.stat().st_mtime_ns for p in folder.glob("*.npz")}
    changed = {p for p in after if after[p] != before[p]}
    assert changed == {staged_path(folder, "1.avi"), staged_path(folder, "2.avi")}
    assert not list(folder.glob(".*.part"))


def test_jax_flow_has_the_same_bytes_however_it_is_computed(
    tmp_path, settings, make_video, monkeypatch
):
    one_size = dataclasses.replace(settings.tvl1, coarsest=64)  # compiled in a moment
    settings = dataclasses.replace(settings, flow_algorithm="tvl1", tvl1=one_size, workers=2)
    videos = {
        f"{i}.avi": make_video(tmp_path / f"{i}.avi", frames=n) for i, n in enumerate((3, 20))
    }
    list(stage_videos(videos, tmp_path / "staged", settings))  # by two processes of one thread each
    for video_id, path in videos.items():
        staged = read_staged(staged_path(tmp_path / "staged", video_id))
        assert len(staged.flow) == len(staged.frames) - 1 and len(set(staged.flow)) > 1
        for pairs in (8, 3):
            monkeypatch.setattr(optical_flow, "PAIRS_PER_CALL", pairs)
            assert encode_video(path, settings).flow == staged.flow


def test_records_for_online_flow_hold_frames_only(tmp_path, settings, make_video):
    path = make_video(tmp_path / "v.avi", frames=5)
    square = dataclasses.replace(settings, flow_size=settings.size)
    stored = encode_video(path, square)
    online = encode_video(path, dataclasses.replace(square, flow_source="online"))
    assert online.frames == stored.frames and len(stored.flow) == 4 and not online.flow


def _environment():
    """In which a script imports the package that is tested, not one that is installed."""
    return {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parents[1])}


_STAGE = """
import pickle, sys
from stf_jax.prepare import stage_videos
from pathlib import Path
if __name__ == "__main__":
    videos, folder, settings = pickle.loads(bytes.fromhex(sys.argv[1]))
    list(stage_videos(videos, folder, settings))
"""


def test_killed_at_any_moment_it_ends_the_same(tmp_path, settings, make_video):
    import pickle

    videos = {f"{i}.avi": make_video(tmp_path / f"{i}.avi", frames=30 + i) for i in range(12)}
    _stage(videos, tmp_path / "quiet", settings)
    script = tmp_path / "stage.py"
    script.write_text(_STAGE)
    argument = pickle.dumps((videos, tmp_path / "storm", settings)).hex()
    for delay in (0.8, 1.1, 1.4):
        process = subprocess.Popen(
            [sys.executable, str(script), argument],
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _stage(videos, tmp_path / "storm", settings)
    assert _digests(tmp_path / "storm") == _digests(tmp_path / "quiet")


def _crash(*_):
    os._exit(7)


def _hang(*_):
    time.sleep(60)


@pytest.mark.parametrize(
    ("fault", "said"), [(_crash, "exit code 7"), (_hang, "did not end within 1 s")]
)
def test_a_worker_that_dies_or_hangs_marks_its_video(tmp_path, settings, monkeypatch, fault, said):
    monkeypatch.setattr(prepare, "_stage_one", fault)
    brief = dataclasses.replace(settings, timeout=1.0)
    rows = _stage({"v.avi": tmp_path / "v.avi"}, tmp_path / "staged", brief)
    assert rows["v.avi"].status == "invalid" and said in rows["v.avi"].reason


def _hold(folder, ready, release):
    with locked(folder):
        ready.set()
        release.wait(30)


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RuntimeError, match=f"process {holder.pid}"), locked(tmp_path):
        pass
    holder.kill()  # its lock goes with it
    holder.join()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 8},
        {"resize": "crop"},
        {"flow_algorithm": "sift"},
        {"flow_source": "streamed"},
        {"jpeg_quality": 0},
        {"flow_bound": 0.0},
    ],
)
def test_impossible_settings_are_named(settings, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
        dataclasses.replace(settings, **wrong)


def test_only_what_changes_the_bytes_is_in_the_stamp(settings):
    same = dataclasses.replace(settings, root="elsewhere", workers=7, timeout=9.0)
    assert same.stamp() == settings.stamp()
    for change in (
        {"size": 40},
        {"resize": "short_side"},
        {"flow_bound": 4.0},
        {"flow_algorithm": "farneback"},
        {"flow_algorithm": "dis_quick"},
        {"flow_algorithm": "tvl1"},
        {"flow_algorithm": "tvl1_opencv"},
        {"flow_source": "online", "flow_size": 32},
    ):
        assert dataclasses.replace(settings, **change).stamp() != settings.stamp()


# --- what it will take -----------------------------------------------------------------------


def test_a_sample_tells_what_the_rest_will_take(tmp_path, settings, make_video, capsys):
    """Of 20 videos of like size a sample of 4 comes first; the other 16 take 4 times as much."""
    videos = {f"{i:02}.avi": make_video(tmp_path / f"{i:02}.avi", frames=6) for i in range(20)}
    rows = list(stage_videos(videos, tmp_path / "staged", settings))
    first = [row.video_id for row in rows[:4]]
    assert sorted(first) == ["00.avi", "06.avi", "13.avi", "19.avi"]
    said = capsys.readouterr().out
    staged = sum(staged_path(tmp_path / "staged", k).stat().st_size for k in first)
    assert said.startswith("to do: 16 videos, about 96 frames")
    assert f"{16 * 6 * 48 * 64 * 3 / 1e9:.3g} GB decoded" in said
    told = float(said.split("decoded), ")[1].split(" GB on disk")[0])
    assert told == pytest.approx(4 * staged / 1e9, rel=0.01)


def test_a_disk_that_would_not_hold_it_stops_it_early(tmp_path, settings, make_video, monkeypatch):
    videos = {f"{i:02}.avi": make_video(tmp_path / f"{i:02}.avi", frames=3) for i in range(12)}
    free = shutil.disk_usage(tmp_path)._replace(free=64 << 20)  # what is to be left free, no more
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=r"0.0671 GB free and the 8 videos .* need about .* GB"):
        list(stage_videos(videos, tmp_path / "staged", settings))
    assert len(list((tmp_path / "staged").glob("*.npz"))) == 4  # the sample, which stays
    monkeypatch.undo()
    assert len(list(stage_videos(videos, tmp_path / "staged", settings))) == 12


def test_a_worker_ends_soon_after_its_parent_was_killed(tmp_path):
    """Or it would go on for as long as its video, while the next run does it too."""
    script = tmp_path / "orphan.py"
    script.write_text(_ORPHAN)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as run:
        worker = int(run.stdout.readline())
        run.kill()
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}") or "State:\tZ" in _status(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by 10 s")


def _status(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return file.read()
    except OSError:
        return "State:\tZ"


_ORPHAN = """
import multiprocessing, os, time
from stf_jax import prepare

def work(parent):
    prepare._begin_worker(parent)
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(os.getpid(),))
    worker.start()
    worker.join()
"""


def test_variable_frame_rates_keep_their_times(tmp_path, settings):
    times, tick = [0, 40, 50, 200, 210, 1000], Fraction(1, 1000)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = tick
        for time_of in times:
            picture = np.full((48, 64, 3), time_of % 251, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_of, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    row, encoded = describe("v.mp4", tmp_path / "v.mp4", settings)
    np.testing.assert_allclose(encoded.times, [1000 * t for t in times], atol=1000)
    assert row.fps > 0


def test_what_a_video_may_cost_is_a_setting(tmp_path, settings, make_video):
    path = make_video(tmp_path / "v.avi", frames=30, size=(48, 64))
    for limit, said in (
        ({"max_pixels": 1000}, "too many pixels: 64x48"),
        ({"max_frames": 20}, "too many frames: more than 20"),
        ({"max_seconds": 0.5}, "too long: more than 0.5 s"),
    ):
        row, encoded = describe("v.avi", path, dataclasses.replace(settings, **limit))
        assert encoded is None and row.reason == said
