import csv

import av
import numpy as np
import pytest
from PIL import Image

from stf_jax.predict import Prediction
from stf_jax.timeline import (
    AnnotatedVideo,
    Caption,
    Captions,
    FlowInset,
    Piece,
    annotate,
    draw_timeline,
    mean_probabilities,
    pieces,
    segments,
    write_timeline,
)
from stf_jax.video import VideoReader, read_video
from stf_jax.watch import Scored

NAMES = ("run", "walk", "sït")


def _window(start, end, *probabilities):
    prediction = Prediction(NAMES, np.array(probabilities, np.float32))
    return Scored(float(start), float(end), 4, prediction, {}, 0.0)


# Windows of 4 s every 2 s.
WINDOWS = (
    _window(0, 4, 0.8, 0.2, 0.0),
    _window(2, 6, 0.6, 0.4, 0.0),
    _window(4, 8, 0.2, 0.8, 0.0),
    _window(6, 10, 0.0, 0.4, 0.6),
    _window(8, 12, 0.3, 0.3, 0.4),
)


def test_moments_get_the_mean_of_their_windows():
    made = pieces(WINDOWS)
    assert [(p.start, p.end) for p in made] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    expected = [
        (0.8, 0.2, 0.0), (0.7, 0.3, 0.0), (0.4, 0.6, 0.0), (0.1, 0.6, 0.3), (0.15, 0.35, 0.5),
        (0.3, 0.3, 0.4),
    ]  # fmt: skip
    np.testing.assert_allclose([p.probabilities for p in made], expected, atol=1e-6)
    # Times without a window make no piece; an end that differs by rounding makes none either.
    apart = (_window(0, 1 + 1e-9, 1, 0, 0), _window(1, 2, 1, 0, 0), _window(5, 6, 1, 0, 0))
    assert [(p.start, p.end) for p in pieces(apart)] == [(0, 1), (1, 2), (5, 6)]
    assert pieces(()) == ()


def test_neighbours_of_one_label_are_merged():
    made = pieces(WINDOWS)
    found = segments(made, NAMES, 0.5)
    assert [(s.start, s.end, s.label) for s in found] == [
        (0, 4, "run"), (4, 8, "walk"), (8, 10, "sït")
    ]  # fmt: skip
    assert [s.probability for s in found] == pytest.approx([0.75, 0.6, 0.5])
    # Below the threshold there is no label, and nothing is merged across it.
    broken = (
        *made[:1],
        Piece(2.0, 4.0, np.array([0.4, 0.3, 0.3])),
        Piece(4.0, 5.0, made[0].probabilities),
    )
    assert [(s.start, s.end) for s in segments(broken, NAMES, 0.5)] == [(0, 2), (4, 5)]
    # Probabilities of a segment are weighted by time: 1 s of 0.6 and 3 s of 1.0.
    uneven = (Piece(0.0, 1.0, np.array([0.6, 0.4, 0])), Piece(1.0, 4.0, np.array([1.0, 0, 0])))
    (one,) = segments(uneven, NAMES, 0.5)
    assert (one.start, one.end, one.label) == (0, 4, "run")
    assert one.probability == pytest.approx(0.9)
    assert segments(made, NAMES, 0.9) == ()
    np.testing.assert_allclose(mean_probabilities(uneven), [0.9, 0.1, 0.0])
    assert mean_probabilities(made[:1]) is made[0].probabilities


def test_the_table_of_labels(tmp_path):
    path = tmp_path / "t.csv"
    write_timeline(path, {"a, b.mp4": segments(pieces(WINDOWS), NAMES, 0.5), "c.mp4": ()})
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[2] == {
        "input": "a, b.mp4", "start_s": "8.000", "end_s": "10.000", "label": "sït",
        "probability": "0.500000",
    }  # fmt: skip
    assert [row["label"] for row in rows] == ["run", "walk", "sït"]


def test_the_picture_shows_when_each_class_is_likely(tmp_path):
    made = pieces((_window(0, 5, 1, 0, 0), _window(5, 10, 0, 1, 0)))
    draw_timeline(tmp_path / "t.png", "a.mp4", made, segments(made, NAMES, 0.5), NAMES)
    drawn = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).astype(int)
    # Full probability is dark blue: run's row on the left half, walk's below it on the right.
    dark = (drawn[..., 2] > drawn[..., 0] + 60) & (drawn.sum(axis=-1) < 300)
    rows, columns = np.nonzero(dark[:, : int(0.85 * dark.shape[1])])  # left of the colour bar
    left = columns < np.median(columns)
    assert rows[left].mean() + 20 < rows[~left].mean()
    draw_timeline(tmp_path / "n.png", "a.mp4", made, (), NAMES)  # no label at all
    assert (tmp_path / "n.png").stat().st_size > 1000


def test_names_are_drawn_as_they_are(tmp_path, drawn_texts):
    names = ("win $x^{$", "_$a_b$", r"\$c")  # the first would be a broken formula
    made = pieces((_window(0, 5, 1, 0, 0), _window(5, 10, 0, 1, 0)))
    draw_timeline(tmp_path / "t.png", "$v_1$.mp4", made, segments(made, names, 0.5), names)
    assert {(told, False) for told in (*names, "$v_1$.mp4")} <= {*drawn_texts}
    assert drawn_texts.count((names[0], False)) >= 2  # beside its row, and in its bar


@pytest.mark.parametrize("size", [(48, 64), (120, 322)])
def test_the_annotated_video_has_every_frame(make_video, tmp_path, tiny_records, size):
    settings = tiny_records[1].settings
    path = make_video(tmp_path / "v.mkv", frames=13, size=size, speed=2.0)
    made = (Piece(0.0, 0.24, np.array([0.75, 0.25, 0])), Piece(0.24, 0.52, np.array([0, 0.25, 0])))
    captions = Captions(made, NAMES, 0.5)
    assert captions.at(0.2) == Caption("run", 0.75, True)
    assert captions.at(0.24 - 1e-9) == captions.at(9.0) == Caption("walk", 0.25, False)
    assert captions.at(-1.0).label == ""
    out = tmp_path / "out.mp4"
    assert annotate(out, VideoReader(path), captions, FlowInset(settings)) == 13
    written = read_video(out)
    np.testing.assert_allclose(written.timestamps, np.arange(13) / 25, atol=2e-3)
    first, last = written.frames[2].astype(int), written.frames[-2].astype(int)
    band = first[-8:-4]
    # The bar is blue over three quarters of the width, then grey over one.
    blue = (band[..., 2] - band[..., 0] > 60).mean(axis=0)
    width = first.shape[1]
    assert blue[: int(0.7 * width)].mean() > 0.9 and blue[int(0.8 * width) :].mean() < 0.1
    grey = (np.ptp(last[-8:-4], axis=-1) < 30) & (last[-8:-4, :, 0] > 60)
    assert grey[:, : int(0.2 * width)].mean() > 0.9
    assert not list(tmp_path.glob("*.part"))


def test_motion_is_drawn_into_the_corner(make_video, tmp_path, tiny_records):
    frames = read_video(make_video(tmp_path / "v.mp4", frames=3, speed=2.0)).frames
    inset = FlowInset(tiny_records[1].settings)
    still, moving = inset.after(frames[0]), inset.after(frames[1])
    assert still.shape == (36, 36, 3) and still.min() > 240  # no motion is white
    # The square moves to the right, which is red, in the middle of the left third.
    red = moving[..., 0].astype(int) - moving[..., 2]
    assert red[14:22, 12:22].mean() > 60 and abs(red[28:, :].mean()) < 30


@pytest.mark.parametrize("size", [(96, 96), (47, 333), (240, 320), (31, 8)])
def test_frames_of_any_size_are_written(tmp_path, size):
    path = tmp_path / "v.mp4"
    frame = np.full((*size, 3), 200, np.uint8)
    with AnnotatedVideo(path) as video:
        for number in range(3):
            # Two at the same time: a player would lose one of them.
            video.write(frame, [0.0, 0.0, 0.04][number], Caption("a label " * 9, 0.5, True))
    assert len(read_video(path).frames) == 3


def test_an_unfinished_video_is_removed(tmp_path):
    frame = np.zeros((32, 320, 3), np.uint8)
    with pytest.raises(RuntimeError, match="stop"), AnnotatedVideo(tmp_path / "v.mp4") as video:
        video.write(frame, 0.0, Caption("", 0.0, False))
        raise RuntimeError("stop")
    with AnnotatedVideo(tmp_path / "v.mp4"):
        pass  # no frame
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"written as .mp4, got .*v.avi"):
        AnnotatedVideo(tmp_path / "v.avi")
    with pytest.raises(OSError):
        AnnotatedVideo(tmp_path / "absent" / "v.mp4")


def test_the_written_video_is_plain_h264(tmp_path):
    with AnnotatedVideo(tmp_path / "v.mp4") as video:
        video.write(np.zeros((32, 320, 3), np.uint8), 0.0, Caption("run", 1.0, True))
    with av.open(str(tmp_path / "v.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.width) == ("h264", "yuv420p", 320)
