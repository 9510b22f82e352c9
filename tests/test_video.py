import csv
import functools
import http.server
import itertools
import os
import pickle
import socket
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from stf_jax.video import Limits, StreamReader, VideoFault, VideoReader, read_video


def _pictures(count, size=(48, 64), step=2):
    """A smooth texture that slides to the left: easy to encode, no two pictures alike.

    Only its brightness varies: colours are stored at half the size and would not survive.
    """
    height, width = size
    cells = np.random.default_rng(0).uniform(20, 180, (-(-height // 8), width // 8 + 8))
    wide = cv2.resize(cells, (width + step * count, height), interpolation=cv2.INTER_CUBIC)
    coloured = (np.clip(wide, 0, 200)[..., None] + (50, 25, 0)).astype(np.uint8)
    return [np.ascontiguousarray(coloured[:, step * k : step * k + width]) for k in range(count)]


def _write(
    path,
    pictures,
    codec,
    pix_fmt="yuv420p",
    *,
    rate=25,
    times=None,
    tick=None,
    aspect=None,
    **options,
):
    """Encodes pictures as given; `times` are in `tick` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = tick
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, picture in enumerate(pictures):
            layout = "rgba" if picture.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(picture, format=layout)
            if times is not None:
                frame.pts, frame.time_base = times[number], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _opencv(path, *, upright=True):
    """The second decoder."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, float(upright))
    frames, milliseconds = [], []
    while True:
        found, frame = capture.read()
        if not found:
            break
        frames.append(frame[..., ::-1])
        milliseconds.append(capture.get(cv2.CAP_PROP_POS_MSEC))
    capture.release()
    return frames, np.array(milliseconds) / 1000


def _assert_alike(frames, expected, tolerance=2.0):
    """Equal in number, and each picture but for rounding; colours swapped are 20 and more off."""
    assert len(frames) == len(expected) > 0
    for frame, other in zip(frames, expected, strict=True):
        assert frame.shape == other.shape
        assert np.abs(frame.astype(int) - other).mean() < tolerance


def _cut(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


def _fault(path, **kwargs):
    with pytest.raises(VideoFault) as caught:
        read_video(path, **kwargs)
    assert repr(os.fspath(path)) in str(caught.value)
    assert caught.value.advice in str(caught.value)
    return caught.value.reason


# --- good files ------------------------------------------------------------------------------

_GOOD = [
    (".avi", "mpeg4", "avi", "mpeg4"),
    (".mp4", "libx264", "mp4", "h264"),
    (".mkv", "libx264", "matroska", "h264"),
    (".mpg", "mpeg1video", "mpeg", "mpeg1video"),
    (".mpg", "mpeg2video", "mpeg", "mpeg2video"),
]


@pytest.mark.parametrize(("suffix", "encoder", "container", "codec"), _GOOD)
def test_equals_a_second_decoder(tmp_path, make_video, suffix, encoder, container, codec):
    path = make_video(tmp_path / f"v{suffix}", frames=30, codec=encoder)
    video = read_video(path)
    frames, _ = _opencv(path)
    assert len(frames) == 30
    _assert_alike(video.frames, frames)
    assert video.frames.dtype == np.uint8
    np.testing.assert_allclose(video.timestamps, np.arange(30) / 25, atol=1e-9)
    info = video.info
    assert (info.num_frames, info.width, info.height, info.fps) == (30, 64, 48, 25)
    assert info.codec == codec and container in info.container.split(",")
    assert (info.rotation, info.truncated, info.notes) == (0, False, ())


def test_colours_and_levels_are_the_pictures_own(tmp_path):
    # Written by hand, so that no encoder has a say: brightness 16..235 is black..white.
    levels = np.arange(16, 236, 20, dtype=np.uint8)
    planes = [bytes([level] * 64 * 48 + [128] * 2 * 32 * 24) for level in levels]
    path = tmp_path / "v.y4m"
    path.write_bytes(b"YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420\n" + b"FRAME\n".join([b"", *planes]))
    frames = read_video(path).frames
    expected = (levels.astype(float) - 16) * 255 / 219
    assert np.abs(frames - expected[:, None, None, None]).max() <= 1

    red = np.full((48, 64, 3), (200, 40, 10), np.uint8)
    frames = read_video(_write(tmp_path / "red.avi", [red] * 3, "mpeg4")).frames
    assert np.abs(frames.astype(int) - red).max() < 8


@pytest.mark.parametrize(
    ("name", "encoder"), [("v.avi", "mpeg4"), ("v.avi", "libx264"), ("v.mp4", "libx264")]
)
def test_frames_come_in_the_order_of_display(tmp_path, name, encoder):
    # B-frames are stored out of order, and in AVI files their stamps may be wrong too.
    pictures = _pictures(20, step=4)
    video = read_video(_write(tmp_path / name, pictures, encoder, bf="2"))
    assert len(video.frames) == 20
    for number, frame in enumerate(video.frames):
        off = [np.abs(frame.astype(int) - picture).mean() for picture in pictures]
        assert np.argmin(off) == number
    np.testing.assert_allclose(video.timestamps, np.arange(20) / 25, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 3])
def test_reader_gives_the_same_frames_every_time(tmp_path, make_video, threads):
    path = make_video(tmp_path / "v.mp4", frames=20)
    reader = VideoReader(path, threads=threads)
    first, second = np.stack(list(reader)), np.stack(list(reader))
    np.testing.assert_array_equal(first, second)
    video = read_video(path)
    np.testing.assert_array_equal(first, video.frames)
    assert reader.info == video.info


def test_info_is_known_only_after_the_last_frame(tmp_path, make_video):
    reader = VideoReader(make_video(tmp_path / "v.avi", frames=3))
    with pytest.raises(RuntimeError, match="only after iterating"):
        _ = reader.info
    frames = iter(reader)
    next(frames)
    with pytest.raises(RuntimeError, match="v.avi"):
        _ = reader.info
    with pytest.raises(RuntimeError, match="v.avi"):
        _ = reader.timestamps
    assert len(list(frames)) == 2
    assert reader.info.num_frames == len(reader.timestamps) == 3
    next(iter(reader))  # begun anew: what was known is known no more
    with pytest.raises(RuntimeError, match="only after iterating"):
        _ = reader.info


def test_ntsc_time_stamps_do_not_drift(tmp_path):
    rate = Fraction(30000, 1001)
    video = read_video(_write(tmp_path / "v.mp4", _pictures(40), "libx264", rate=rate))
    np.testing.assert_allclose(video.timestamps, np.arange(40) * 1001 / 30000, atol=1e-6)
    assert video.info.fps == pytest.approx(float(rate))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_keeps_its_times(tmp_path, suffix):
    times = [0, 40, 50, 200, 210, 1000]
    tick = Fraction(1, 1000)
    path = _write(tmp_path / f"v{suffix}", _pictures(6), "libx264", times=times, tick=tick)
    video = read_video(path)
    np.testing.assert_allclose(video.timestamps, np.array(times) / 1000, atol=1e-3)
    frames, seconds = _opencv(path)
    _assert_alike(video.frames, frames)
    np.testing.assert_allclose(video.timestamps, seconds - seconds[0], atol=1e-3)
    assert not video.info.truncated


def test_dropped_frames_of_an_avi_are_no_frames(tmp_path):
    # Where nothing was recorded it holds empty chunks, which must not end the decoding.
    times = [0, 1, 2, 10, 11, 12]
    tick = Fraction(1, 25)
    path = _write(tmp_path / "v.avi", _pictures(6), "mpeg4", times=times, tick=tick)
    content = path.read_bytes()
    data = content[content.index(b"movi") : content.index(b"idx1")]
    assert data.count(b"00dc\0\0\0\0") == 7
    video = read_video(path)
    _assert_alike(video.frames, _pictures(6), tolerance=6)
    np.testing.assert_allclose(video.timestamps, np.array(times) / 25, atol=1e-9)
    assert video.info.header_frames == 13 and not video.info.truncated


def test_joined_files_run_on(tmp_path):
    # MPEG files may be joined end to end: the clock starts again, and here the size changes too.
    parts = [_write(tmp_path / "a.mpg", _pictures(40), "mpeg1video")]
    parts.append(_write(tmp_path / "b.mpg", _pictures(40, (96, 128)), "mpeg1video"))
    joined = tmp_path / "joined.mpg"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = read_video(joined)
    # The last picture before a joint may be lost to both decoders.
    assert 78 <= len(video.frames) == len(_opencv(joined)[0])
    assert video.frames.shape[1:] == (48, 64, 3)
    assert (np.diff(video.timestamps) > 0).all()
    assert video.timestamps[-1] == pytest.approx(79 / 25, abs=0.1)


# --- headers that lie ------------------------------------------------------------------------


def _avi_claiming(path, claim):
    """Puts a frame count into both headers of an AVI file."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"avih") + 8 + 16, claim)
    struct.pack_into("<I", content, content.index(b"strh") + 8 + 32, claim)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("claim", "truncated"), [(5, False), (31, False), (60, True)])
def test_frames_are_counted_by_decoding(tmp_path, make_video, claim, truncated):
    path = _avi_claiming(make_video(tmp_path / "v.avi", frames=30), claim)
    info = read_video(path).info
    assert (info.num_frames, info.header_frames, info.truncated) == (30, claim, truncated)


def test_real_clips_hold_as_many_frames_as_their_list_says():
    if "STF_DATA" not in os.environ:
        pytest.skip(reason="STF_DATA does not name the folder of real clips")
    root = Path(os.environ["STF_DATA"], "ucf101_8")
    with open(root / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # The shortest of each class, and two whose header claims other numbers.
    rows.sort(key=lambda row: (row["class"], int(row["frames"])))
    chosen = [next(group) for _, group in itertools.groupby(rows, lambda row: row["class"])]
    liars = ("v_JugglingBalls_g18_c02.avi", "v_JumpingJack_g20_c04.avi")
    chosen += [row for row in rows if row["path"].endswith(liars)]
    assert len(chosen) >= 8
    for row in chosen:
        reader = VideoReader(root / row["path"])
        assert sum(1 for _ in reader) == int(row["frames"]), row["path"]
        info = reader.info
        assert (info.width, info.height) == (int(row["width"]), int(row["height"]))
        assert info.fps == pytest.approx(float(row["fps"]), abs=0.01)
        assert not info.truncated
        if row["path"].endswith(liars):
            assert info.header_frames != info.num_frames
    _assert_alike(read_video(root / chosen[0]["path"]).frames, _opencv(root / chosen[0]["path"])[0])


# --- damaged files ---------------------------------------------------------------------------


def test_a_cut_avi_gives_what_is_left_and_says_so(tmp_path):
    # A key frame every third, so that the bytes are spread evenly over the video.
    path = _cut(_write(tmp_path / "v.avi", _pictures(40, (96, 128)), "mpeg4", g="3"), 0.6)
    video = read_video(path)
    _, data = path.read_bytes().split(b"movi")
    begun = data.count(b"00dc")  # every picture is one chunk; the last one is cut
    assert 10 < begun < 35
    assert begun - 1 <= video.info.num_frames <= begun
    _assert_alike(video.frames, _opencv(path)[0])
    assert video.info.truncated and video.info.header_frames == 40
    assert any("before the time that its header promises" in note for note in video.info.notes)


def test_a_cut_between_two_pictures_is_told_by_the_header_alone(tmp_path):
    content = _write(tmp_path / "v.avi", _pictures(40, (96, 128)), "mpeg4").read_bytes()
    start = content.index(b"movi") + 4
    for _ in range(30):
        (size,) = struct.unpack_from("<I", content, start + 4)
        start += 8 + size + size % 2
    # Without the extended index, as in most old files, libav knows no other length.
    path = tmp_path / "cut.avi"
    path.write_bytes(content[:start].replace(b"indx", b"JUNK"))
    info = read_video(path).info
    assert (info.num_frames, info.header_frames, info.truncated) == (30, 40, True)
    assert info.notes == ("ends 10 frames before the time that its header promises",)


def test_an_mkv_may_promise_more_for_its_pictures_than_for_the_file(tmp_path, make_video):
    path = make_video(tmp_path / "v.mkv", frames=30)
    content = path.read_bytes()
    assert content.count(b"00:00:01.200") == 1
    assert not read_video(path).info.truncated
    path.write_bytes(content.replace(b"00:00:01.200", b"00:00:02.200"))
    info = read_video(path).info
    assert info.num_frames == 30 and info.truncated


def test_a_cut_mkv_gives_what_is_left_and_says_so(tmp_path):
    # Matroska files do not count frames, but say how long they last.
    path = _cut(_write(tmp_path / "v.mkv", _pictures(40, (96, 128)), "libx264", g="3"), 0.6)
    video = read_video(path)
    assert 5 < video.info.num_frames < 36
    _assert_alike(video.frames, _opencv(path)[0])
    assert video.info.truncated and video.info.header_frames is None


def test_a_cut_mpg_gives_what_is_left_and_says_so(tmp_path, make_video):
    path = _cut(make_video(tmp_path / "v.mpg", frames=60, size=(96, 128)), 0.6)
    video = read_video(path)
    assert 5 < video.info.num_frames < 55
    _assert_alike(video.frames, _opencv(path)[0])
    assert video.info.truncated


def test_a_hole_in_the_middle_is_marked(tmp_path):
    path = _write(tmp_path / "v.avi", _pictures(40, (96, 128)), "mpeg4")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    path.write_bytes(content)
    video = read_video(path)
    assert video.info.num_frames == len(_opencv(path)[0])
    assert video.info.truncated


def test_an_mp4_cut_before_its_index_is_a_fault(tmp_path, make_video):
    path = _cut(make_video(tmp_path / "v.mp4", frames=40), 0.5)
    assert b"moov" not in path.read_bytes()
    assert _fault(path) == "MP4 without moov box"


def test_an_mp4_cut_anywhere_in_its_index_is_a_fault(tmp_path, make_video):
    # libav says many things about these, none of them helpful.
    content = make_video(tmp_path / "v.mp4", frames=20).read_bytes()
    start = content.index(b"moov") - 4
    path = tmp_path / "cut.mp4"
    for end in range(start + 16, content.index(b"stco"), 97):
        path.write_bytes(content[:end])
        assert _fault(path) == "MP4 with a cut moov box", end - start


def test_an_mp4_with_its_index_first_gives_what_is_left(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "g": "5"})
        stream.width, stream.height = 128, 96
        for picture in _pictures(40, (96, 128)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    info = read_video(_cut(path, 0.6)).info
    assert 5 < info.num_frames < 35
    assert info.truncated and info.header_frames == 40


def test_an_avi_without_pictures_is_a_fault(tmp_path, make_video):
    # Downloaders that reserve the space first leave zeros when they are stopped.
    path = make_video(tmp_path / "v.avi")
    content = path.read_bytes()
    start = content.index(b"movi") + 4
    path.write_bytes(content[:start] + bytes(len(content) - start))
    assert _fault(path) == "no decodable frame"


# --- what is no video ------------------------------------------------------------------------

_CONCAT = b"ffconcat version 1.0\nfile v.avi\n"
_PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nv.avi\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no video here\n" * 1000, "not a video: text"),
        ("Grüße\n".encode() * 1000, "not a video: text"),
        (b"\x1b[31mcoloured\x1b[0m\n" * 50, "not a video: text"),
        (_CONCAT, "not a video: text"),
        (_PLAYLIST, "not a video: text"),
        (
            b"<!DOCTYPE html>\n<html><body>404 Not found</body></html>\n",
            "not a video: HTML document",
        ),
        (b"\xef\xbb\xbf\n <HTML>moved</HTML>", "not a video: HTML document"),
        (bytes(100_000), "not a video: only zero bytes"),
        (b"%PDF-1.7\n\x00\x01\x02", "not a video: PDF document"),
        (b"PK\x03\x04" + bytes(100), "not a video: ZIP archive"),
        (np.random.default_rng(0).bytes(50_000), "not a video: unrecognised content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_content_is_named(tmp_path, make_video, content, reason):
    make_video(tmp_path / "v.avi", frames=3)  # what the playlists would lead to
    path = tmp_path / "wrong.avi"
    path.write_bytes(content)
    assert _fault(path) == reason


@pytest.mark.parametrize(("encoding", "kind"), [(".png", "png"), (".jpg", "jpeg")])
def test_a_picture_named_like_a_video_is_a_fault(tmp_path, encoding, kind):
    path = tmp_path / "v.mp4"
    path.write_bytes(cv2.imencode(encoding, _pictures(1)[0])[1].tobytes())
    assert kind in _fault(path) and "still picture" in _fault(path)


def _sound(path, cover=None):
    """A second of silence, with or without a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        if cover is not None:
            picture = container.add_stream("mjpeg")
            picture.height, picture.width = cover.shape[:2]
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(cover, format="rgb24").reformat(format="yuvj420p")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def test_sound_alone_is_a_fault(tmp_path):
    assert _fault(_sound(tmp_path / "v.mp4")) == "no video stream (audio only)"


def test_a_cover_picture_is_no_video(tmp_path):
    path = _sound(tmp_path / "v.mp4", _pictures(1)[0])
    with av.open(str(path)) as container:
        assert container.streams.best("video") is not None  # or there is nothing to refuse
    assert _fault(path) == "no video stream (audio only)"


def test_a_directory_or_a_pipe_is_a_fault(tmp_path):
    (tmp_path / "v.avi").mkdir()
    assert _fault(tmp_path / "v.avi") == "no pictures"
    os.mkfifo(tmp_path / "pipe.avi")  # must not wait for a writer
    assert _fault(tmp_path / "pipe.avi") == "not a regular file"


def test_a_folder_of_pictures_is_a_video(tmp_path):
    pictures = _pictures(12)
    for number, picture in enumerate(pictures):
        # Numbers without leading zeros: by letters, 10 would come before 2.
        suffix = (".png", ".JPG")[number == 3]
        cv2.imwrite(str(tmp_path / f"frame {number}{suffix}"), picture[..., ::-1])
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    video = read_video(tmp_path)
    assert video.frames.shape == (12, 48, 64, 3)
    for number, (got, want) in enumerate(zip(video.frames, pictures, strict=True)):
        assert np.abs(got.astype(int) - want).mean() <= (6 if number == 3 else 1), number
    np.testing.assert_allclose(video.timestamps, np.arange(12) / 25)
    info = video.info
    assert (info.num_frames, info.header_frames, info.fps) == (12, 12, None)
    assert (info.container, info.codec, info.truncated) == ("folder", "png", False)


def test_a_damaged_picture_of_a_folder_is_damage(tmp_path):
    for number, picture in enumerate(_pictures(5)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").write_text("<html>")
    info = read_video(tmp_path).info
    assert info.num_frames == 3 and info.truncated
    assert "undecodable picture: 2.png (1x)" in info.notes
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert _fault(tmp_path) == "no decodable frame"


def test_limits_hold_for_a_folder_of_pictures(tmp_path):
    for number, picture in enumerate(_pictures(5)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    assert read_video(tmp_path, Limits(48 * 64, 5, 4 / 25)).info.num_frames == 5
    assert _fault(tmp_path, limits=Limits(max_pixels=48 * 64 - 1)) == "too many pixels: 64x48"
    assert _fault(tmp_path, limits=Limits(max_frames=4)) == "too many frames: more than 4"
    assert _fault(tmp_path, limits=Limits(max_seconds=0.1)) == "too long: more than 0.1 s"


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "none.avi")


def test_faults_travel_between_processes():
    fault = VideoFault(Path("a", "b.avi"), "empty file", "Copy it again.")
    copy = pickle.loads(pickle.dumps(fault))
    assert type(copy) is VideoFault and str(copy) == str(fault)
    assert (copy.path, copy.reason, copy.advice) == ("a/b.avi", "empty file", "Copy it again.")


# --- what is accepted and made canonical -----------------------------------------------------


@pytest.mark.parametrize("name", ["v.avi", "v.txt", "v.png", "v.h264", "v"])
def test_the_name_decides_nothing(tmp_path, make_video, name):
    right = make_video(tmp_path / "right.mp4", frames=5)
    wrong = tmp_path / name
    wrong.write_bytes(right.read_bytes())
    np.testing.assert_array_equal(read_video(wrong).frames, read_video(right).frames)


@pytest.mark.parametrize(
    "name",
    [
        "a b.avi",
        "Übung.avi",
        "a,b.avi",
        "a\"b'c.avi",
        "a\nb.avi",
        "-i.avi",
        "%03d.avi",
        "file:a.avi",
        "concat:a|b.avi",
    ],
)
def test_any_path_works(tmp_path, make_video, monkeypatch, name):
    plain = make_video(tmp_path / "plain.avi", frames=4)
    monkeypatch.chdir(tmp_path)  # a leading dash counts only in a bare name
    Path(name).write_bytes(plain.read_bytes())
    assert read_video(name).info.num_frames == 4
    Path(name).write_bytes(b"")
    assert _fault(name) == "empty file"


@pytest.mark.parametrize(
    ("name", "encoder", "pix_fmt"),
    [
        ("ten bits.mkv", "ffv1", "yuv420p10le"),
        ("ten bits.mp4", "libx264", "yuv420p10le"),
        ("rgb.mkv", "ffv1", "bgr0"),
        ("full chroma.mkv", "libx264", "yuv444p"),
        ("sixteen bits.mkv", "ffv1", "gbrp16le"),
    ],
)
def test_every_depth_becomes_eight_bit_rgb(tmp_path, name, encoder, pix_fmt):
    pictures = _pictures(5)
    path = _write(tmp_path / name, pictures, encoder, pix_fmt)
    frames = read_video(path).frames
    assert frames.dtype == np.uint8
    _assert_alike(frames, pictures, tolerance=6)  # the encoder's loss
    _assert_alike(frames, _opencv(path)[0])


@pytest.mark.parametrize(
    ("name", "encoder"), [("v.mkv", "ffv1"), ("v.avi", "ffv1"), ("v.mp4", "libx264")]
)
def test_grey_becomes_three_equal_channels(tmp_path, name, encoder):
    pictures = [np.repeat(picture[..., :1], 3, -1) for picture in _pictures(5)]
    path = _write(tmp_path / name, pictures, encoder, "gray")
    frames = read_video(path).frames
    assert (frames == frames[..., :1]).all()
    _assert_alike(frames, _opencv(path)[0])
    if encoder == "ffv1":  # lossless; the other does not note that its black is 0
        np.testing.assert_array_equal(frames, pictures)


@pytest.mark.parametrize(
    ("name", "encoder", "pix_fmt"), [("v.mov", "qtrle", "argb"), ("v.mkv", "ffv1", "bgra")]
)
def test_alpha_is_dropped(tmp_path, name, encoder, pix_fmt):
    # Not blended with black or white: what is stored under a transparent pixel is what we see.
    pictures = [np.dstack([p, p[::-1, :, 0]]) for p in _pictures(4)]
    frames = read_video(_write(tmp_path / name, pictures, encoder, pix_fmt)).frames
    np.testing.assert_array_equal(frames, np.stack(pictures)[..., :3])


@pytest.mark.parametrize(
    ("name", "encoder", "pix_fmt"),
    [
        ("v.avi", "mpeg4", "yuv420p"),
        ("v.mpg", "mpeg1video", "yuv420p"),
        ("v.mkv", "libx264", "yuv444p"),
    ],
)
def test_odd_sizes_stay(tmp_path, name, encoder, pix_fmt):
    pictures = _pictures(5, (47, 63))
    path = _write(tmp_path / name, pictures, encoder, pix_fmt)
    video = read_video(path)
    assert (video.info.height, video.info.width) == (47, 63)
    _assert_alike(video.frames, pictures, tolerance=6)
    _assert_alike(video.frames, _opencv(path)[0])


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv", ".mpg"])
def test_one_frame_is_a_video(tmp_path, make_video, suffix):
    path = make_video(tmp_path / f"v{suffix}", frames=1)
    video = read_video(path)
    _assert_alike(video.frames, _opencv(path)[0])
    assert video.info.num_frames == 1 and not video.info.truncated
    np.testing.assert_array_equal(video.timestamps, [0.0])


def _turned(frame, matrix):
    """Moves every pixel (x, y) to (a x + c y, b x + d y), pushed back to start at (0, 0)."""
    a, b, c, d = matrix
    y, x = np.indices(frame.shape[:2])
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    result = np.zeros((down.max() + 1, across.max() + 1, 3), np.uint8)
    result[down, across] = frame
    return result


@pytest.mark.parametrize(
    ("matrix", "rotation", "mirrored"),
    [
        ((1, 0, 0, 1), 0, False),
        ((0, 1, -1, 0), 90, False),
        ((-1, 0, 0, -1), 180, False),
        ((0, -1, 1, 0), 270, False),
        ((-1, 0, 0, 1), 0, True),
        ((1, 0, 0, -1), 180, True),
        ((0, 1, 1, 0), 270, True),
        ((0, -1, -1, 0), 90, True),
    ],
)
def test_rotation_and_mirror_flags_are_applied(tmp_path, make_video, matrix, rotation, mirrored):
    path = make_video(tmp_path / "v.mp4", frames=3)
    content = bytearray(path.read_bytes())
    position = content.index(b"tkhd") + 4 + 40
    for offset, value in zip((0, 4, 12, 16), matrix, strict=True):
        struct.pack_into(">i", content, position + offset, value << 16)
    path.write_bytes(content)
    video = read_video(path)
    stored, _ = _opencv(path, upright=False)
    _assert_alike(video.frames, [_turned(frame, matrix) for frame in stored])
    if not mirrored:  # which the second decoder does not know
        _assert_alike(video.frames, _opencv(path, upright=True)[0])
    assert video.info.rotation == rotation
    assert (video.info.height, video.info.width) == video.frames.shape[1:3]
    assert mirrored == any("mirrored" in note for note in video.info.notes)


def test_pixels_become_square(tmp_path):
    pictures = _pictures(5)
    plain = read_video(_write(tmp_path / "plain.mp4", pictures, "libx264"))
    wide = read_video(_write(tmp_path / "wide.mp4", pictures, "libx264", aspect=Fraction(3, 2)))
    assert (wide.info.height, wide.info.width) == (48, 96)
    expected = [cv2.resize(f, (96, 48), interpolation=cv2.INTER_CUBIC) for f in plain.frames]
    _assert_alike(wide.frames, expected, tolerance=3)
    assert any("aspect" in note for note in wide.info.notes)


@pytest.mark.parametrize(
    ("aspect", "noted"), [(Fraction(4096, 4083), False), (Fraction(8, 1), True)]
)
def test_pixels_nearly_square_or_absurd_stay(tmp_path, aspect, noted):
    info = read_video(_write(tmp_path / "v.mp4", _pictures(2), "libx264", aspect=aspect)).info
    assert (info.height, info.width) == (48, 64)
    assert noted == any("aspect" in note for note in info.notes)


def _combs(frames):
    """How much each line differs from the mean of the lines above and below."""
    lines = np.asarray(frames, float)
    return np.abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean()


@pytest.mark.parametrize(
    ("name", "encoder", "options"),
    [
        ("v.mpg", "mpeg2video", {"flags": "+ildct+ilme", "b": "4000000"}),
        ("v.mp4", "libx264", {"x264-params": "tff=1:interlaced=1", "crf": "10"}),
    ],
)
def test_interlaced_frames_are_deinterlaced_one_for_one(tmp_path, name, encoder, options):
    # Fast motion: the odd lines show it half a frame later.
    moments = _pictures(24, step=6)
    woven = [moment.copy() for moment in moments[::2]]
    for frame, later in zip(woven, moments[1::2], strict=True):
        frame[1::2] = later[1::2]
    assert _combs(woven) > 4 * _combs(moments)
    path = _write(tmp_path / name, woven, encoder, **options)
    video = read_video(path)
    assert len(video.frames) == 12
    assert _combs(video.frames) < 2 * _combs(moments)
    np.testing.assert_allclose(video.timestamps, np.arange(12) / 25, atol=1e-9)
    assert video.info.notes == ("deinterlaced",) and not video.info.truncated
    for k, frame in enumerate(video.frames):  # in step: the frame's own moment is the nearest
        off = [np.abs(frame.astype(int) - moment).mean() for moment in moments]
        assert np.argmin(off) // 2 == k


# --- limits ----------------------------------------------------------------------------------


def test_limits_are_inclusive_and_beyond_them_is_a_fault(tmp_path, make_video):
    path = make_video(tmp_path / "v.avi", frames=30, size=(48, 64), fps=25)
    assert read_video(path, Limits(48 * 64, 30, 1.2)).info.num_frames == 30
    assert _fault(path, limits=Limits(max_pixels=48 * 64 - 1)) == "too many pixels: 64x48"
    assert _fault(path, limits=Limits(max_frames=29)) == "too many frames: more than 29"
    assert _fault(path, limits=Limits(max_seconds=1.1)) == "too long: more than 1.1 s"


def test_a_limit_stops_decoding_at_once(tmp_path, make_video):
    path = make_video(tmp_path / "v.avi", frames=30)
    given = []
    with pytest.raises(VideoFault, match="too many frames"):
        given.extend(VideoReader(path, Limits(max_frames=7)))
    for _ in range(2):
        with pytest.raises(VideoFault, match="too many pixels"):
            next(iter(VideoReader(path, Limits(max_pixels=10))))
    seen = 0
    with pytest.raises(VideoFault, match="too long"):
        for _ in VideoReader(path, Limits(max_seconds=0.2)):
            seen += 1
    assert seen == 6  # at 0, 0.04 ... 0.2 s


def test_limits_hold_for_pictures_as_delivered(tmp_path):
    path = _write(tmp_path / "v.mp4", _pictures(2), "libx264", aspect=Fraction(3, 1))
    assert _fault(path, limits=Limits(max_pixels=48 * 64)) == "too many pixels: 192x48"


# --- streams and cameras ---------------------------------------------------------------------


class _Server(http.server.BaseHTTPRequestHandler):
    """Sends a file; of 'half.mkv' one half, and then it waits."""

    def do_GET(self):
        data = self.server.data
        half = self.path == "/half.mkv"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.server.ended.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(make_video, tmp_path):
    """A real video, and the address that a server on this machine sends it from."""
    path = make_video(tmp_path / "v.mkv", frames=60, size=(96, 128), speed=2.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.data, server.ended, server.daemon_threads = path.read_bytes(), threading.Event(), True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield path, f"http://127.0.0.1:{server.server_port}"
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_stream_has_the_frames_of_its_file(served):
    path, address = served
    whole = read_video(path)
    stream, times = StreamReader(f"{address}/v.mkv", timeout=5.0), []
    for frame, expected in zip(stream, whole.frames, strict=True):
        np.testing.assert_array_equal(frame, expected)
        times.append(stream.seconds)
    np.testing.assert_allclose(times, whole.timestamps, atol=1e-6)
    assert stream.broken == ""


def test_a_stream_that_falls_silent_keeps_what_came(served):
    path, address = served
    stream = StreamReader(f"{address}/half.mkv", timeout=0.5)
    began = time.monotonic()
    count = sum(1 for _ in stream)
    assert 10 < count < 60 and stream.broken == "reading stopped: nothing came any more"
    assert time.monotonic() - began < 5


def test_streams_that_are_none_say_why(served):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}/v.mkv"
        with pytest.raises(VideoFault, match=r"nothing came within 0.2 s\. Is its sender running"):
            list(StreamReader(mute, timeout=0.2))
        closed = silent.getsockname()[1]
    for address, reason in (
        (f"http://127.0.0.1:{closed}/v.mkv", "cannot be opened: Connection refused"),
        ("gopher-x://h/v", "cannot be opened: .*Expected the address of a video stream"),
    ):
        with pytest.raises(VideoFault, match=reason):
            list(StreamReader(address, timeout=1.0))
    with pytest.raises(VideoFault, match="too many pixels: 128x96"):
        list(StreamReader(f"{served[1]}/v.mkv", limits=Limits(max_pixels=100), timeout=5.0))


def test_a_stream_may_not_lead_to_files_of_this_machine(make_video, tmp_path):
    """A playlist that someone else serves: a file would be played, and its pictures shown."""
    path = make_video(tmp_path / "v.ts", frames=20, codec="libx264")
    for name, place in (("own", "v.ts"), ("others", f"file://{path}")):
        lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:3", "#EXTINF:3,", place, "#EXT-X-ENDLIST"]
        (tmp_path / f"{name}.m3u8").write_text("\n".join(lines))
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert sum(1 for _ in StreamReader(f"{address}/own.m3u8", timeout=5.0)) == 20
            with pytest.raises(VideoFault, match="cannot be opened|no video stream"):
                list(StreamReader(f"{address}/others.m3u8", timeout=5.0))
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_device_is_read_by_its_driver():
    """libav's own test picture stands for a camera: both are devices of a driver."""
    device = StreamReader("testsrc=size=64x48:rate=25:duration=0.4", device="lavfi")
    frames = [(frame.shape, device.seconds) for frame in device]
    assert [shape for shape, _ in frames] == [(48, 64, 3)] * 10
    np.testing.assert_allclose([seconds for _, seconds in frames], np.arange(10) / 25)
    with pytest.raises(VideoFault, match="cannot be opened: .*a camera that nothing else uses"):
        list(StreamReader("/dev/video97", device="v4l2"))


def test_the_time_of_the_latest_frame_is_known_while_reading(make_video, tmp_path):
    path = make_video(tmp_path / "v.mkv", frames=20, fps=10)
    reader, times = VideoReader(path), []
    for _ in reader:
        times.append(reader.seconds)
    np.testing.assert_allclose(times, reader.timestamps, atol=1e-6)
