import io
import json
import time

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stf_jax import monitor, progress
from stf_jax.flow import flow_to_colour, quantise
from stf_jax.index import ClipEntry
from stf_jax.inputs import Batch
from stf_jax.metrics import summarise
from stf_jax.monitor import (
    Monitor,
    StepRecord,
    clip_picture,
    confusion_picture,
    forget_rows,
    norms_of_parts,
)


def _record(loss=1.0, clips=4):
    return StepRecord(loss, clips, {"spatial": 3.0, "head": 4.0}, {"spatial": 0.5, "head": 0.0})


def _told(shown, steps, loss=1.0):
    for step in steps:
        shown.step(
            _record(loss + step), step=step, epoch=1, top1=0.5, learning_rate=0.1,
            waiting_seconds=0.0,
        )  # fmt: skip


def _events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def _curve(folder, tag):
    return [(event.step, event.value) for event in _events(folder).Scalars(tag)]


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_norms_are_those_of_all_numbers_of_a_part():
    tree = {"a": {"kernel": np.full((2, 2), 3.0), "bias": np.array([8.0])}, "b": np.zeros(2)}
    assert jax.tree.map(float, norms_of_parts(tree)) == {"a": 10.0, "b": 0.0}


def test_every_nth_step_is_logged_with_all_that_it_told(tmp_path):
    shown = Monitor(tmp_path, "first", step=0, every=3)
    shown.begin_epoch()
    _told(shown, range(1, 8))
    shown.close()
    rows = _rows(tmp_path / "steps.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["gradient_norm"] == {"spatial": 3.0, "head": 4.0}
    assert (rows[0]["stage"], rows[0]["kind"], rows[0]["loss"]) == ("first", "step", 4.0)
    folder = tmp_path / "tensorboard" / "first"
    assert _curve(folder, "step/loss") == [(3, 4.0), (6, 7.0)]
    assert _curve(folder, "gradient norm/head") == [(3, 4.0), (6, 4.0)]
    assert _curve(folder, "update norm/spatial") == [(3, 0.5), (6, 0.5)]
    assert _curve(folder, "speed/peak memory in MiB")[0][1] > 50


def test_rates_leave_the_first_step_out_and_begin_anew_with_each_epoch(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0, 102.0, 107.0, 107.0, 900.0])
    shown = Monitor(tmp_path, "first", step=0, every=2)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(clock))
    for step, waited in enumerate((50.0, 51.0, 51.5, 53.0, 60.0), start=1):
        if step == 5:
            shown.begin_epoch()
        shown.step(_record(), step=step, epoch=1, top1=0.0, learning_rate=0.1,
                   waiting_seconds=waited)  # fmt: skip
    monkeypatch.undo()
    shown.close()
    first, second = _rows(tmp_path / "steps.jsonl")
    # Step 2 alone in 2 s, of which 1 waiting; steps 3 and 4 in 5 s, of which 2.
    assert (first["clips_per_second"], first["waiting_share"]) == (4 / 2, 1 / 2)
    assert (second["clips_per_second"], second["waiting_share"]) == (8 / 5, 2 / 5)


def test_steps_done_again_are_told_once(tmp_path):
    """Killed after step 9, with a half written event and row; step 4 was the last saved one."""
    folder = tmp_path / "tensorboard" / "first"
    killed = Monitor(tmp_path, "first", step=0, every=1)
    _told(killed, range(1, 10), loss=100.0)
    killed.close()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    with open(tmp_path / "steps.jsonl", "a") as log:
        log.write('{"stage": "first", "st')
    resumed = Monitor(tmp_path, "first", step=4, every=1)
    _told(resumed, range(5, 8), loss=200.0)
    resumed.close()
    expected = [(step, 100.0 + step) for step in range(1, 5)]
    expected += [(step, 200.0 + step) for step in range(5, 8)]
    assert _curve(folder, "step/loss") == expected
    assert [(r["step"], r["loss"]) for r in _rows(tmp_path / "steps.jsonl")] == expected


def test_a_stage_that_begins_anew_tells_nothing_of_before(tmp_path, monkeypatch):
    for loss in (100.0, 200.0):
        # A clock that was set back between two starts must not turn their order round.
        monkeypatch.setattr(monitor.time, "time_ns", lambda loss=loss: int(1e18 / loss))
        shown = Monitor(tmp_path, "first", step=0, every=1)
        shown.sample_clips(_batch(), _ENTRIES, 4.0)
        _told(shown, [1, 2], loss)
        shown.close()
    events = _events(tmp_path / "tensorboard" / "first")
    assert [e.value for e in events.Scalars("step/loss")] == [201.0, 202.0]
    assert len(events.Images("clips/1: video 5")) == 1


_ENTRIES = [ClipEntry(f"video {i}", 0, "g", "train") for i in range(6)]


def _batch():
    chance = np.random.default_rng(0)
    arrays = Batch(
        rgb=chance.integers(0, 256, (4, 9, 16, 20, 3), np.uint8),
        flow=chance.integers(0, 256, (4, 9, 8, 16, 20), np.uint8),
        label=np.zeros(4, np.int32),
        mask=np.array([True, True, False, True]),
        entry=np.array([5, 2, 0, 1], np.int32),
        seed=np.zeros((4, 2), np.uint32),
    )
    return jax.tree.map(jax.numpy.asarray, arrays)


def test_clips_are_drawn_with_the_flow_that_starts_at_each_frame(tmp_path):
    shown, batch = Monitor(tmp_path, "first", step=0, every=1), _batch()
    shown.sample_clips(batch, _ENTRIES, 4.0)
    shown.close()
    events = _events(tmp_path / "tensorboard" / "first")
    # Three at the most, and not the row that only fills the batch up.
    assert events.Tags()["images"] == ["clips/1: video 5", "clips/2: video 2"]
    (told,) = events.Images("clips/2: video 2")
    drawn = np.array(Image.open(io.BytesIO(told.encoded_image_string)))
    # Of 4 fields around a frame the third one starts at it: u and v are components 4 and 5.
    flow = np.moveaxis(np.asarray(batch.flow[1, :, 4:6]), 1, -1)
    np.testing.assert_array_equal(drawn, clip_picture(np.asarray(batch.rgb[1]), flow, 4.0))


def test_a_clip_is_frames_above_their_flow_in_colours():
    frames = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.full((2, 48, 50, 3), 90, "u1")
    motion = np.zeros((2, 48, 50, 2), np.float32)
    motion[0], motion[1] = (4, 0), (0, -2)
    drawn = clip_picture(frames, quantise(motion, 4.0), 4.0)
    # Twice as large, to be seen, in frames of 2 px.
    assert drawn.shape == (2 * (2 * 48 + 4), 2 * (2 * 50 + 4), 3)
    assert (
        (drawn[2:98, 106:206] == 90).all() and not drawn[:2].any() and not drawn[:, 104:106].any()
    )
    assert (drawn[102:198, 2:102] == (255, 0, 0)).all()  # right, as fast as can be: red
    half_up = flow_to_colour(np.full((1, 1, 2), (0, -2), np.float32), 4.0)
    assert np.abs(drawn[102:198, 106:206].astype(int) - half_up[0, 0]).max() <= 1


def test_of_long_clips_eight_frames_at_equal_distances_are_drawn():
    frames = np.arange(71, dtype=np.uint8)[:, None, None, None] * np.ones((71, 96, 96, 3), "u1")
    drawn = clip_picture(frames, np.full((71, 96, 96, 2), 128, np.uint8), 4.0)
    assert drawn[50, 50::100, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]


def test_an_epoch_is_told_in_rows_curves_and_a_confusion_matrix(tmp_path):
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    figures = summarise(scores, np.array([0, 1, 1]))
    rows = [
        {"stage": "first", "kind": kind, "epoch": 1, "step": 7, "loss": loss, "top1": top1}
        for kind, loss, top1 in (("train", 2.0, 0.25), ("validation", 1.5, 0.75))
    ]
    shown = Monitor(tmp_path, "first", step=0, every=100)
    shown.epoch(rows, figures, ("left", "right"))
    shown.close()
    assert _rows(tmp_path / "metrics.jsonl") == rows
    folder = tmp_path / "tensorboard" / "first"
    for row in rows:
        assert _curve(folder, f"epoch loss/{row['kind']}") == [(7, row["loss"])]
        assert _curve(folder, f"epoch top1/{row['kind']}") == [(7, row["top1"])]
    (told,) = _events(folder).Images("confusion matrix")
    drawn = np.array(Image.open(io.BytesIO(told.encoded_image_string)))
    expected = confusion_picture(np.array([[1, 0], [1, 1]]), ("left", "right"))
    np.testing.assert_array_equal(drawn, expected)
    assert (told.step, told.height, told.width) == (7, *drawn.shape[:2])


@pytest.mark.parametrize("count", [3, 30])
def test_a_confusion_matrix_is_dark_where_videos_are(count):
    """All taken for the first class: its column, at the left, is dark, and nothing else."""
    confusion = np.zeros((count, count), int)
    confusion[:, 0] = 4
    drawn = confusion_picture(confusion, [f"class {i}" for i in range(count)]).astype(int)
    dark = (drawn[..., 2] > 80) & (drawn[..., 0] < 40)  # the dark end of the blues
    columns = np.flatnonzero(dark.sum(axis=0) > 0.5 * dark.sum(axis=0).max())
    rows = np.flatnonzero(dark.sum(axis=1) > 0)
    assert len(rows) / len(columns) == pytest.approx(count, rel=0.1)


def test_names_are_drawn_as_they_are(drawn_texts):
    confusion_picture(np.eye(2, dtype=int), ("a $x_1$", "_b"))
    assert {("a $x_1$", False), ("_b", False)} <= {*drawn_texts}


def test_a_folder_that_cannot_be_written_to_is_told_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    shown = Monitor(tmp_path, "first", step=0, every=1)
    _told(shown, [1, 2])
    shown.wait()
    shown.close()
    told = capsys.readouterr().out
    assert told.count("events are not written any more") == 1
    assert str(tmp_path / "tensorboard") in told and "steps.jsonl" in told
    assert len(_rows(tmp_path / "steps.jsonl")) == 2


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    shown = Monitor(tmp_path, "first", step=0, every=1)
    shown.sample_clips(_batch(), _ENTRIES, 4.0)
    _told(shown, [1])
    shown.epoch([{"step": 1}], None, ())
    shown.wait()
    shown.close()
    assert not list(tmp_path.iterdir())


def test_numbers_are_on_disk_when_wait_returns_though_a_picture_is_being_drawn(tmp_path):
    shown = Monitor(tmp_path, "first", step=0, every=1)
    shown.begin_epoch()
    _told(shown, [1])
    drawing = []
    shown._events.picture(
        1, "slow", lambda: drawing.append(time.sleep(0.3)) or np.zeros((2, 2, 3), "u1")
    )
    shown.wait()
    assert not drawing and _curve(tmp_path / "tensorboard" / "first", "step/loss") == [(1, 2.0)]
    shown.close()
    assert drawing


def test_rows_of_other_stages_stay(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"stage": "first", "step": 9}\n{"stage": "second", "step": 3}\n')
    forget_rows(path, "second", 2)
    assert _rows(path) == [{"stage": "first", "step": 9}]


def test_memory_is_the_fullest_devices_if_devices_tell(monkeypatch):
    told = [{"peak_bytes_in_use": 5 * 2**20}, {"peak_bytes_in_use": 9 * 2**20}, None]
    devices = [type("D", (), {"memory_stats": lambda self, stats=stats: stats})() for stats in told]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert monitor.memory_mb() == 9
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
    assert monitor.memory_mb() == progress.peak_memory_mb() > 50


def test_the_time_left_is_that_of_the_steps_after_the_first(monkeypatch):
    clock = iter([1000.0, 1010.0, 1030.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    left = progress.TimeLeft()
    # 10 s a step, then 15 s on the average of two.
    assert [left.after_step(n) for n in (400, 399, 398)] == ["?", "1:06:30", "1:39:30"]
