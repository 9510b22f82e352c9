import csv
import os
import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from stf_jax.video import Limits, VideoFault, VideoReader, read_video


def _second_decoder(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        there, frame = capture.read()
        if not there:
            capture.release()
            return np.stack(frames)[..., ::-1]
        frames.append(frame)


def _encode(path, pictures, *, codec="libx264", pix_fmt="yuv420p", rate=25, pts=None, **options):
    """Encodes pictures as given; `pts` are their times in frames."""
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _pictures(count=10, height=48, width=64):
    """Smooth pictures whose brightness tells their number: 20, 30, 40, ..."""
    across = np.linspace(0, 20, width)[None, :, None]
    return [
        np.broadcast_to(20 + 10 * n + across, (height, width, 3)).astype(np.uint8)
        for n in range(count)
    ]


def _fault(path, **limits):
    with pytest.raises(VideoFault) as error:
        read_video(path, Limits(**limits))
    assert str(path) in str(error.value) or repr(str(path)) in str(error.value)
    return error.value.reason


# --- good files ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv", ".mpg"])
def test_frames_are_those_of_a_second_decoder(make_video, tmp_path, suffix):
    path = make_video(tmp_path / f"v{suffix}", frames=33, size=(64, 96))
    ours, theirs = read_video(path), _second_decoder(path)
    assert ours.frames.shape == theirs.shape == (33, 64, 96, 3)
    # Colour conversion rounds differently; another frame or another order would be far off.
    assert np.abs(ours.frames.astype(int) - theirs).mean(axis=(1, 2, 3)).max() < 3
    assert ours.info.num_frames == 33 and not ours.info.truncated
    assert ours.info.fps == pytest.approx(25, abs=0.01)
    np.testing.assert_allclose(ours.timestamps, np.arange(33) / 25, atol=1e-3)


def test_real_clips_have_the_frames_that_were_counted():
    """Against the counts that came with the clips; some of their headers say otherwise."""
    if "STF_DATA" not in os.environ:
        pytest.skip(reason="STF_DATA does not name the folder of real clips")
    root = Path(os.environ["STF_DATA"], "ucf101_8")
    with open(root / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    count = next(key for key in rows[0] if "frames" in key)
    name = next(key for key in rows[0] if "path" in key or "file" in key or "clip" == key)
    for row in rows[::40]:
        (path,) = (root / "UCF-101").rglob(Path(row[name]).name)
        assert sum(1 for _ in VideoReader(path)) == int(row[count]), path.name


def test_info_is_known_after_the_last_frame_only(make_video, tmp_path):
    reader = VideoReader(make_video(tmp_path / "v.mp4", frames=3))
    with pytest.raises(RuntimeError, match="after iterating"):
        _ = reader.info
    assert len(list(reader)) == len(list(reader)) == reader.info.num_frames == 3


def test_content_decides_not_the_name(make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=5)
    for name in ("v.avi", "v.txt", "v", "-v.mp4", 'ü , "quoted"\nnew line.mp4', "http:x.mp4"):
        copy = tmp_path / name
        copy.write_bytes(path.read_bytes())
        video = read_video(copy)
        assert len(video.frames) == 5 and "mp4" in video.info.container


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx264", "gray", ".mp4"),
        ("libx264", "yuv420p10le", ".mp4"),
        ("libx264", "yuv444p", ".mkv"),
        ("ffv1", "yuva420p", ".mkv"),
        ("mjpeg", "yuvj420p", ".avi"),
    ],
)
def test_every_depth_becomes_8_bit_rgb(tmp_path, codec, pix_fmt, suffix):
    pictures = _pictures()
    video = read_video(_encode(tmp_path / f"v{suffix}", pictures, codec=codec, pix_fmt=pix_fmt))
    assert video.frames.dtype == np.uint8 and video.frames.shape == (10, 48, 64, 3)
    means = video.frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, [p.mean() for p in pictures], atol=4)


def test_odd_sizes_and_single_frames(tmp_path):
    odd = _encode(tmp_path / "odd.mkv", _pictures(4, 47, 63), codec="ffv1")
    assert read_video(odd).frames.shape == (4, 47, 63, 3)
    one = read_video(_encode(tmp_path / "one.mp4", _pictures(1)))
    assert one.frames.shape == (1, 48, 64, 3) and one.timestamps.tolist() == [0.0]


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_a_rotation_flag_is_applied(tmp_path, degrees, turns):
    """The display matrix of an MP4 track header, patched in by hand."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:12, :16] = 255  # a bright corner, upper left as stored
    path = _encode(tmp_path / "v.mp4", [picture] * 4)
    a, b = round(np.cos(np.radians(degrees))), round(np.sin(np.radians(degrees)))
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    upright = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    track = data.index(b"tkhd")
    place = data.index(upright, track)
    path.write_bytes(data[:place] + matrix + data[place + 36 :])
    video = read_video(path)
    assert video.info.rotation == degrees
    expected = np.rot90(picture, -turns)
    assert video.frames.shape[1:] == expected.shape
    assert np.abs(video.frames[0].astype(int) - expected).mean() < 8


def test_pixels_that_are_not_square_are_squared(tmp_path):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        for picture in _pictures(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    video = read_video(path)
    assert video.frames.shape == (3, 48, 96, 3)
    assert any("sample aspect ratio" in note for note in video.info.notes)


def test_a_variable_rate_keeps_its_times(tmp_path):
    times = [0, 1, 2, 10, 11, 30]
    path = _encode(tmp_path / "v.mkv", _pictures(6), pts=times, bf="0")
    video = read_video(path)
    np.testing.assert_allclose(video.timestamps, np.array(times) / 25, atol=2e-3)


# --- damaged and foreign files ---------------------------------------------------------------


def test_a_cut_avi_is_marked_and_counted(tmp_path):
    chance = np.random.default_rng(0)
    noise = [chance.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(40)]
    whole = _encode(tmp_path / "whole.avi", noise, codec="mpeg4", g="1").read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    info = read_video(cut).info
    assert info.header_frames == 40  # the header still promises all
    assert info.truncated and 15 < info.num_frames < 28
    assert any("before the time" in note for note in info.notes)


def test_a_cut_mkv_is_marked(tmp_path):
    chance = np.random.default_rng(0)
    noise = [chance.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(60)]
    whole = _encode(tmp_path / "whole.mkv", noise, g="5").read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    info = read_video(cut).info
    assert info.truncated and 20 < info.num_frames < 50


def test_a_cut_mp4_lacks_its_index(make_video, tmp_path):
    whole = make_video(tmp_path / "whole.mp4", frames=20).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    assert _fault(tmp_path / "cut.mp4") == "MP4 without moov box"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"Dear diary, this is no video.\n", "not a video: text"),
        ("Grüße, kein Video".encode(), "not a video: text"),
        (b"  <!DOCTYPE html><html>404</html>", "not a video: HTML document"),
        (bytes(5000), "not a video: only zero bytes"),
        (b"PK\x03\x04" + bytes(100), "not a video: ZIP archive"),
        (bytes(range(256)) * 40, "not a video: unrecognised content"),
    ],
)
def test_what_is_no_video_says_what_it_is(tmp_path, content, reason):
    path = tmp_path / "v.avi"
    path.write_bytes(content)
    assert _fault(path) == reason


def test_a_still_picture_is_no_video(tmp_path):
    cv2.imwrite(str(tmp_path / "v.png"), np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "v.png").rename(tmp_path / "v.mp4")
    assert _fault(tmp_path / "v.mp4").startswith("not a video: still picture")


def test_audio_only_has_no_video_stream(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp",
                                           layout="mono")  # fmt: skip
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert _fault(path) == "no video stream (audio only)"


def test_folders_and_lost_files(tmp_path):
    assert _fault(tmp_path) == "not a regular file"
    with pytest.raises(FileNotFoundError, match="lost.mp4"):
        read_video(tmp_path / "lost.mp4")


def test_limits_are_faults_and_not_shorter_videos(make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=30, size=(48, 64))
    assert len(read_video(path, Limits(48 * 64, 30, 1.2)).frames) == 30
    assert _fault(path, max_pixels=48 * 64 - 1) == "too many pixels: 64x48"
    assert _fault(path, max_frames=29) == "too many frames: more than 29"
    assert _fault(path, max_seconds=1.0) == "too long: more than 1 s"


def test_faults_travel_between_processes(tmp_path):
    fault = VideoFault(tmp_path / "v.avi", "empty file", "Copy it again.")
    again = pickle.loads(pickle.dumps(fault))
    assert (again.path, again.reason, again.advice) == (fault.path, fault.reason, fault.advice)
    assert str(again) == str(fault)
