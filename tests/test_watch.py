import dataclasses
import threading
import time
import weakref

import numpy as np
import pytest

from stf_jax.predict import Prediction, Predictor
from stf_jax.run import Settings
from stf_jax.video import VideoFault, read_video
from stf_jax.watch import (
    Input,
    Newest,
    Paced,
    Scored,
    Taken,
    Watcher,
    Windows,
    WindowSettings,
    expand,
    field_sources,
    latency_table,
    open_input,
    write_latency,
)

WHOLE = WindowSettings(4.0, 2.0, "frames", whole=1000)


@pytest.fixture(scope="module")
def predictor(tiny_card) -> Predictor:
    """Random weights: what they make of a clip is all that is compared here."""
    settings = Settings.of(tiny_card)
    model = settings.model(2)
    return Predictor(settings, ("left", "right"), model, settings.initial_params(model))


def _opened(path, live=False):
    return open_input(str(path), max_pixels=10**6, live=live, timeout=1.0)


def _taken(number, seconds=None, picture=None):
    seconds = number / 25 if seconds is None else seconds
    picture = np.zeros((2, 2, 3), np.uint8) if picture is None else picture
    return Taken(number, seconds, 0.0, 0.0, picture, None, None)


def _divided(settings, frames):
    """First and last number of the frames of every window."""
    windows, found = Windows(settings), []
    for frame in frames:
        found += [(w[0].number, w[-1].number) for w in windows.add(frame)]
    return found + [(w[0].number, w[-1].number) for w in windows.finish()]


# --- windows -----------------------------------------------------------------------------------


def test_windows_cover_a_video_by_hand():
    every_two = WindowSettings(4.0, 2.0, "frames")
    numbered = [_taken(k) for k in range(11)]
    assert _divided(every_two, numbered[:10]) == [(0, 3), (2, 5), (4, 7), (6, 9)]
    # The last one ends with the video, and is as long as the others.
    assert _divided(every_two, numbered) == [(0, 3), (2, 5), (4, 7), (6, 9), (7, 10)]
    assert _divided(WindowSettings(4.0, 4.0, "frames"), numbered[:8]) == [(0, 3), (4, 7)]
    assert _divided(every_two, numbered[:3]) == [(0, 2)]
    assert _divided(every_two, []) == []
    # 25 frames per second: 0.2 s are five, and every 0.1 s is every two and a half.
    seconds = WindowSettings(0.2, 0.1, "seconds")
    assert _divided(seconds, numbered[:10]) == [(0, 4), (3, 7), (5, 9)]
    # A clock that does not start with a whole number, and its rounding.
    shifted = [_taken(k, 1 / 3 + k * 0.04 - 1 / 3) for k in range(10)]
    assert _divided(seconds, shifted) == [(0, 4), (3, 7), (5, 9)]


def test_a_short_file_is_one_window():
    settings = WindowSettings(4.0, 2.0, "frames", whole=6)
    numbered = [_taken(k) for k in range(7)]
    assert _divided(settings, numbered[:6]) == [(0, 5)]
    assert _divided(settings, numbered) == [(0, 3), (2, 5), (3, 6)]


def test_gaps_in_time_make_no_empty_windows():
    settings = WindowSettings(0.2, 0.1, "seconds")
    times = [0.0, 0.04, 0.08, 0.12, 0.16, 1e9, 1e9 + 0.04]  # as after a damaged time stamp
    frames = [_taken(k, t) for k, t in enumerate(times)]
    began = time.monotonic()
    found = _divided(settings, frames)
    assert time.monotonic() - began < 1.0  # and not one turn for every tenth of a second
    assert found[0] == (0, 4) and found[-1] == (5, 6)
    assert {n for a, b in found for n in range(a, b + 1)} == set(range(7))


def test_only_the_frames_of_a_window_are_kept():
    settings = WindowSettings(6.0, 3.0, "frames", whole=20)
    windows, alive, most = Windows(settings), weakref.WeakSet(), 0
    for number in range(1000):
        frame = _taken(number)
        alive.add(frame)
        for window in windows.add(frame):
            assert len(window) == 6
            del window
        del frame
        most = max(most, len(alive))
    assert len(alive) <= 6 + 3
    assert most <= 20 + 6 + 3


def test_window_settings_are_read_and_checked(predictor):
    sampling = predictor.settings.sampling  # 8 frames at strides of 1 to 3
    parse = WindowSettings.parse
    assert parse("", "", sampling) == WindowSettings(16.0, 8.0, "frames", whole=2000)
    assert parse("5s", "", sampling) == WindowSettings(5.0, 2.5, "seconds")
    assert parse("5", "1s", sampling) == WindowSettings(5.0, 1.0, "seconds")
    assert parse("120f", "30f", sampling) == WindowSettings(120.0, 30.0, "frames")
    assert parse("", "4f", sampling) == WindowSettings(16.0, 4.0, "frames", whole=2000)
    for window, hop, message in (
        ("5x", "", "--window=5x: expected seconds such as 5s"),
        ("5s", "-1s", "--hop=-1s: expected"),
        ("5s", "25f", "--hop=25f is in frames, but windows are in seconds"),
        ("5s", "6s", "windows of 5 seconds every 6: expected a hop of at least"),
        ("0f", "", "windows of 0 frames"),
        ("5s", "0s", "every 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(window, hop, sampling)


# --- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records, sampling",
    [
        ({}, {}),
        ({"resize": "short_side"}, {"flow_edge": "inset"}),
        ({"flow_source": "online", "flow_size": 36}, {}),
        ({}, {"flow_step": "stride"}),
    ],
    ids=["squash", "short side, inset", "online", "stride"],
)
def test_one_window_is_the_prediction_of_the_file(
    predictor, records, sampling, make_video, tmp_path
):
    """Though it encodes a few frames only, and computes only some fields: to the last bit."""
    settings = predictor.settings
    changed = dataclasses.replace(
        predictor,
        settings=dataclasses.replace(
            settings,
            records=dataclasses.replace(settings.records, **records),
            sampling=dataclasses.replace(settings.sampling, **sampling),
        ),
    )
    for frames in (70, 5, 1):
        path = make_video(tmp_path / f"{frames}.mp4", frames=frames, speed=2.0)
        (scored,) = Watcher(changed, WHOLE).watch(_opened(path))
        expected = changed.predict(path)
        assert scored.prediction.class_names == expected.class_names
        np.testing.assert_array_equal(
            scored.prediction.probabilities, expected.probabilities, strict=True
        )
        assert (scored.start, scored.frames) == (0.0, frames)
        assert scored.end == pytest.approx(frames / 25)
        assert scored.lag > 0 and min(scored.latency.values()) >= 0


def test_windows_are_scored_like_videos_of_their_own(predictor, make_video, tmp_path):
    path = make_video(tmp_path / "long.avi", frames=50, speed=2.0)
    frames = read_video(path).frames
    watching = Watcher(predictor, WindowSettings(20.0, 10.0, "frames")).watch(_opened(path))
    found = list(watching)
    assert [(w.start, w.frames) for w in found] == [(0.0, 20), (0.4, 20), (0.8, 20), (1.2, 20)]
    for number, scored in enumerate(found):
        expected = predictor.predict(frames[10 * number : 10 * number + 20])
        np.testing.assert_array_equal(
            scored.prediction.probabilities, expected.probabilities, strict=True
        )
    assert (watching.frames, watching.dropped) == (50, 0)
    assert watching.seconds == pytest.approx(49 / 25)
    # They are scores of these windows, not one score repeated.
    assert len({w.prediction.probabilities.tobytes() for w in found}) == 4


def test_only_what_the_clip_reads_is_computed(predictor, make_video, tmp_path):
    path = make_video(tmp_path / "long.mp4", frames=100)
    watcher, seen = Watcher(predictor, WHOLE), []
    score = watcher.score
    watcher.score = lambda window, encoder: (seen.append(window), score(window, encoder))[1]
    list(watcher.watch(_opened(path)))
    # Eight frames, 12 or 13 apart, and four fields around each, of which the first has two.
    places = [k * 100 // 8 for k in range(8)]
    assert [f.number for f in seen[0] if f.stored] == places
    fields = {max(0, c + offset) for c in places for offset in range(-2, 2)}
    assert {f.number for f in seen[0] if f.field} == fields


def test_fields_across_dropped_frames_are_not_read(predictor, make_video, tmp_path):
    assert field_sources([4, 5, 6]) == [0, 1]
    assert field_sources([0, 3, 4, 5, 9]) == [1, 1, 2, 2]
    assert field_sources([0, 3, 6]) == [0, 1]  # there is no other
    assert field_sources([7]) == []
    assert field_sources([0, 9, 10, 19, 28, 37, 38]) == [1, 1, 1, 1, 5, 5]
    path = make_video(tmp_path / "v.mp4", frames=24, speed=2.0)
    watcher, seen = Watcher(predictor, WHOLE), []
    score = watcher.score

    def gap(window, encoder):
        seen.extend(window[:8] + window[16:])
        return score(seen, encoder)

    watcher.score = gap
    list(watcher.watch(_opened(path)))
    assert [f.number for f in seen if f.field is None] == [7, 23]  # before the gap, and the last


# --- live sources ------------------------------------------------------------------------------


def test_the_oldest_waiting_frames_are_dropped_and_counted():
    taken, done = threading.Event(), threading.Event()

    def source():
        yield _taken(0)
        assert taken.wait(5)
        yield from (_taken(k) for k in range(1, 20))
        done.set()

    newest = Newest(source(), 4, threading.Event())
    frames = iter(newest)
    assert next(frames).number == 0
    taken.set()
    assert done.wait(5)
    assert [frame.number for frame in frames] == [16, 17, 18, 19]
    assert newest.dropped == 15


def test_a_fault_of_a_live_source_arrives_after_its_frames():
    def source():
        yield _taken(0)
        raise VideoFault("camera", "was pulled out", "Put it back.")

    frames = iter(Newest(source(), 4, threading.Event()))
    assert next(frames).number == 0
    with pytest.raises(VideoFault, match="was pulled out"):
        next(frames)


class _Steered:
    """Frames of a video at 25 per second; after the first `free` it waits to be let go."""

    seconds = 0.0

    def __init__(self, frames, free):
        self.frames, self.free = frames, free
        self.go, self.through = threading.Event(), threading.Event()

    def __iter__(self):
        for number, frame in enumerate(self.frames):
            if number == self.free:
                assert self.go.wait(10)
            self.seconds = number / 25
            yield frame
        self.through.set()


def test_a_slow_network_loses_frames_and_says_how_many(predictor, make_video, tmp_path):
    frames = read_video(make_video(tmp_path / "v.mp4", frames=20, speed=2.0)).frames
    source = _Steered(frames, free=5)
    watcher = Watcher(predictor, WindowSettings(4.0, 4.0, "frames", whole=1000))
    score, kept = watcher.score, []

    def slow(window, encoder):
        source.go.set()
        assert source.through.wait(10)  # the camera delivers all while the first window is scored
        return score(window, encoder)

    watcher.score = slow
    watching = watcher.watch(
        Input("camera", source, True, None), queue=5, keep=lambda f, t: kept.append((f, t))
    )
    found = list(watching)
    # Frames 0 to 4 were taken before; of the fifteen that came then the last five could wait.
    assert (watching.frames, watching.dropped) == (10, 10)
    numbers = [0, 1, 2, 3, 4, 15, 16, 17, 18, 19]
    assert [round(25 * t) for _, t in kept] == numbers
    for (frame, _), number in zip(kept, numbers, strict=True):
        np.testing.assert_array_equal(frame, frames[number])
    # Windows lie in time as if nothing had been lost: 0 to 3, 4 to 7, 12 to 15, and the last four.
    starts = [(round(25 * w.start), w.frames) for w in found]
    assert starts == [(0, 4), (4, 1), (15, 1), (16, 4)]
    whole = predictor.predict(frames[16:]).probabilities
    np.testing.assert_array_equal(found[-1].prediction.probabilities, whole)


def test_paced_frames_come_at_their_time():
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(round(seconds, 6))
        now[0] += seconds

    source = _Steered([np.zeros((2, 2, 3), np.uint8)] * 5, free=99)
    paced = Paced(source, clock=lambda: now[0], sleep=sleep)
    arrived = []
    for number, _ in enumerate(paced):
        arrived.append(round(now[0] - 100.0, 6))
        assert paced.seconds == source.seconds
        now[0] += 0.1 if number == 1 else 0.01  # one of them takes long
    # Late frames come at once, and what was lost is not lost again.
    assert arrived == [0.0, 0.04, 0.14, 0.15, 0.16]
    assert slept == [0.03]


def test_a_file_played_as_a_camera_takes_its_time(predictor, make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=30, fps=60, speed=2.0)
    watcher = Watcher(predictor, WindowSettings(10.0, 10.0, "frames", whole=1000))
    watcher.start_up()
    source = _opened(path, live=True)
    assert source.live
    began = time.monotonic()
    watching = watcher.watch(source)
    found = list(watching)
    assert time.monotonic() - began >= 29 / 60
    assert watching.frames + watching.dropped == 30 and found[-1].end == pytest.approx(0.5)


def test_stopping_ends_with_what_was_found(predictor, make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=50)
    stop = threading.Event()
    watcher = Watcher(predictor, WindowSettings(10.0, 10.0, "frames"))
    watching = watcher.watch(
        _opened(path), stop=stop, keep=lambda _, t: stop.set() if t >= 14 / 25 else None
    )
    assert [(round(25 * w.start), w.frames) for w in watching] == [(0, 10), (5, 10)]
    assert watching.frames == 15
    # A camera that delivers nothing more does not keep it waiting.
    source = _Steered(read_video(path).frames, free=12)
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    watching = watcher.watch(
        Input("camera", source, True, None),
        stop=stop,
        keep=lambda _, t: timer.start() if t == 11 / 25 else None,
    )
    found = list(watching)
    timer.join()
    assert not source.go.is_set() and watching.frames == 12
    assert [(round(25 * w.start), w.frames) for w in found] == [(0, 10), (2, 10)]
    source.go.set()


# --- inputs ------------------------------------------------------------------------------------


def test_folders_are_replaced_by_their_videos(make_video, tmp_path):
    one = make_video(tmp_path / "a" / "v10.mp4", frames=2)
    two = make_video(tmp_path / "a" / "v9.mp4", frames=2)
    deep = make_video(tmp_path / "a" / "b" / "w.avi", frames=2)
    (tmp_path / "a" / "notes.txt").write_text("no video")
    pictures = tmp_path / "a" / "pictures"
    pictures.mkdir()
    (pictures / "1.png").touch()
    (tmp_path / "none").mkdir()
    names = [str(tmp_path / "x.mp4"), str(tmp_path / "a"), str(tmp_path / "none"), "udp://h:1"]
    found = list(expand(names))
    assert [name for name, wrong in found if not wrong] == [
        names[0], str(deep), str(pictures), str(two), str(one), "udp://h:1"
    ]  # fmt: skip
    ((name, wrong),) = [pair for pair in found if pair[1]]
    assert name == names[2] and "holds no video" in wrong
    # A folder of pictures is a video itself.
    assert list(expand([str(pictures)])) == [(str(pictures), "")]


def test_inputs_are_told_apart(make_video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_video(tmp_path / "http:" / "v.mp4", frames=2)
    plain = open_input("http://v.mp4", max_pixels=10**6, live=False, timeout=1.0)
    assert plain.file is not None and plain.file.resolve() == path  # what exists is a path
    for name, live in (
        ("http://127.0.0.1:9/v.mp4", False),
        ("udp://127.0.0.1:9", True),
        ("rtsp://127.0.0.1:9/x", True),
        ("pipe:0", False),
    ):
        opened = open_input(name, max_pixels=10**6, live=False, timeout=1.0)
        assert (opened.file, opened.live) == (None, live)
        assert open_input(name, max_pixels=10**6, live=True, timeout=1.0).live
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        _opened("absent.mp4")
    with pytest.raises(FileNotFoundError, match="no camera /dev/video97; this machine has"):
        _opened("/dev/video97")


def test_a_bad_input_is_named_while_it_is_watched(predictor, tmp_path):
    path = tmp_path / "words.mp4"
    path.write_text("not a video")
    with pytest.raises(VideoFault, match="words.mp4.*not a video"):
        list(Watcher(predictor, WHOLE).watch(_opened(path)))


def test_what_came_before_a_fault_is_scored(predictor, make_video, tmp_path):
    frames = read_video(make_video(tmp_path / "v.mp4", frames=12)).frames

    class Failing(_Steered):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("the disk is gone")

    watching = Watcher(predictor, WindowSettings(10.0, 5.0, "frames")).watch(
        Input("v", Failing(frames, free=99), False, None)
    )
    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for scored in watching:
            found.append(scored)
    assert [(round(25 * w.start), w.frames) for w in found] == [(0, 10), (2, 10)]


def test_latencies_by_hand(tmp_path):
    def scored(decode, network, lag):
        times = {"decode": decode, "flow": 0.1, "pack": 0.0, "network": network}
        nothing = Prediction((), np.zeros(0, np.float32))
        return Scored(0.0, 1.0, 4, nothing, times, lag)

    windows = [scored(0.1, 0.2, 0.3), scored(0.3, 0.2, 0.5)]
    rows = latency_table(windows)
    assert rows[0] == {
        "stage": "decode", "windows": 2, "p50_ms": 200.0, "p95_ms": 290.0, "share": 0.4
    }  # fmt: skip
    assert [row["p50_ms"] for row in rows] == [200, 100, 0, 200, 500, 400]
    assert [row["stage"] for row in rows[-2:]] == ["all", "lag"] and rows[-2]["share"] == 1.0
    write_latency(tmp_path / "l.csv", rows)
    lines = (tmp_path / "l.csv").read_text().splitlines()
    assert lines[:2] == ["stage,windows,p50_ms,p95_ms,share", "decode,2,200.0,290.0,0.4"]
    assert latency_table([]) == []
