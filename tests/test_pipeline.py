import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tensorflow as tf

from configs import ucf101
from stf_jax import pipeline, prepare
from stf_jax.datasets import ClipEntry, VideoIndex
from stf_jax.flow import TvL1Settings, dequantise, make_flow, quantise, to_grey
from stf_jax.pipeline import (
    SamplingSettings,
    batches,
    clip_indices,
    decode_clip,
    epoch_order,
    evaluation_indices,
    flow_indices,
    frame_indices,
    sample_seed,
    steps_per_epoch,
)
from stf_jax.predict import clip_of
from stf_jax.records import prepare_records
from stf_jax.run import Settings

PAPER = SamplingSettings(
    num_frames=24, frame_stride=(2, 10), flow_frames=4, stride_per="clip",
    short_policy="clip_tau", train="tau", eval="frac", flow_edge="clamp", flow_pad="zero",
    flow_step="frame",
)  # fmt: skip
SHORT = dataclasses.replace(PAPER, num_frames=8, frame_stride=(2, 4))
_train = tf.function(clip_indices, reduce_retracing=True, autograph=False)


def _draws(video_frames, count, settings=PAPER):
    seeds = np.random.default_rng(0).integers(0, 2**31, (count, 2)).astype(np.int32)
    return tf.map_fn(
        lambda seed: _train(tf.constant(video_frames), settings, seed), tf.constant(seeds)
    ).numpy()


def test_long_videos_get_every_stride_equally_often():
    strides = Counter()
    for clip in _draws(1000, 1800):
        assert 0 <= clip[0] and clip[-1] <= 999
        (step,) = set(np.diff(clip))  # one stride per clip
        strides[int(step)] += 1
    assert sorted(strides) == list(range(2, 11))  # both ends included
    # Chi-square with 8 degrees of freedom: 26.1 is the 0.1 % point.
    assert sum((n - 200) ** 2 / 200 for n in strides.values()) < 26.1


def test_every_start_of_a_short_video_is_drawn():
    # 24 frames at stride 2 span 47 of 52 frames: starts 0 to 5, the last window included.
    starts = {int(clip[0]) for clip in _draws(52, 200)}
    assert starts == set(range(6))


@pytest.mark.parametrize(
    ("frames", "stride"), [(24, 1), (28, 1), (46, 1), (47, 2), (69, 2), (70, 3)]
)
def test_largest_stride_that_fits(frames, stride):
    clips = _draws(frames, 60)
    assert max(np.diff(clips).max(axis=1)) == stride
    assert clips.min() >= 0 and clips.max() <= frames - 1


def test_a_video_of_22_frames_repeats_its_last():
    for wanted in (_draws(22, 1)[0], evaluation_indices(tf.constant(22), PAPER).numpy()):
        shown = frame_indices(tf.constant(wanted), tf.constant(22)).numpy()
        assert shown.tolist() == [*range(22), 21, 21]


def test_evaluation_covers_the_whole_video():
    # floor(k N / T) by hand for N = 47: 0, 1, 3, 5, 7, ... 45.
    clip = evaluation_indices(tf.constant(47), PAPER).numpy().tolist()
    assert clip == [(k * 47) // 24 for k in range(24)]
    assert clip[:5] == [0, 1, 3, 5, 7] and clip[-1] == 45


def test_flow_window_is_centred_and_clamped():
    windows = flow_indices(tf.constant([0, 1, 10, 28, 29]), tf.constant(30), PAPER)
    assert windows.numpy().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 1, 2],
        [8, 9, 10, 11],
        [26, 27, 28, 28],
        [27, 28, 28, 28],
    ]


def test_repeated_frames_do_not_move():
    windows = flow_indices(tf.constant([20, 21, 22, 23]), tf.constant(22), PAPER)
    assert windows.numpy().tolist() == [[18, 19, 20, 20], [19, 20, 20, 20], [-1] * 4, [-1] * 4]
    assert (flow_indices(tf.constant([0, 1]), tf.constant(1), PAPER).numpy() == -1).all()


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("frame_stride", (3, 2), "low <= high"),
        ("frame_stride", (0, 2), "1 <= low"),
        ("num_frames", 1, "at least 2"),
        ("flow_frames", 3, "even"),
        ("stride_per", "video", "'clip', 'frame'"),
        ("short_policy", None, "'clip_tau', 'redraw', 'interval'"),
        ("train", "Tau", "'tau', 'interval', 'mix'"),
        ("eval", 1, "'frac', 'int', 'int_centred'"),
        ("flow_edge", True, "'clamp', 'inset'"),
        ("flow_pad", "", "'zero', 'repeat_last'"),
        ("flow_step", 1, "'frame', 'stride'"),
    ],
)
def test_impossible_sampling_is_named(annotations_off, key, value, allowed):
    with pytest.raises(ValueError, match=rf"sampling\.{key}\b.*{allowed}"):
        dataclasses.replace(PAPER, **{key: value})


# --- the switches of SPEC sections 1 and 2 ----------------------------------------------------

# Three frames, so that every clip can be listed.
THREE = dataclasses.replace(PAPER, num_frames=3, frame_stride=(1, 3))


def _clips(video_frames, count, settings):
    return Counter(map(tuple, _draws(video_frames, count, settings).tolist()))


def _evenly(counts, shares, limit=26.1):
    """Chi-square of counts against shares: 26.1 is the 0.1 % point for 8 degrees of freedom."""
    assert counts.keys() == shares.keys()
    total = sum(counts.values())
    assert sum((counts[k] - total * p) ** 2 / (total * p) for k, p in shares.items()) < limit


@pytest.mark.parametrize(
    ("video_frames", "seed", "clip"),
    [
        (30, (1, 2), range(6, 30)),
        (60, (0, 0), range(0, 47, 2)),
        (100, (0, 0), range(20, 67, 2)),
        (100, (1, 2), range(15, 85, 3)),
        (1000, (-5, 77), range(270, 478, 9)),
    ],
)
def test_the_defaults_draw_what_they_always_drew(video_frames, seed, clip):
    """Golden: drawn before there were any switches, so that old runs can be repeated."""
    drawn = clip_indices(tf.constant(video_frames), PAPER, tf.constant(seed))
    assert drawn.numpy().tolist() == list(clip)


def test_every_gap_has_its_own_stride():
    each = dataclasses.replace(THREE, stride_per="frame")
    # Of the strides 1 to 3 only 1 and 2 fit into 5 frames: 1 + 1 leaves three starts, and so on.
    shares = {
        (0, 1, 2): 1 / 12, (1, 2, 3): 1 / 12, (2, 3, 4): 1 / 12, (0, 1, 3): 1 / 8,
        (1, 2, 4): 1 / 8, (0, 2, 3): 1 / 8, (1, 3, 4): 1 / 8, (0, 2, 4): 1 / 4,
    }  # fmt: skip
    _evenly(_clips(5, 600, each), shares)
    clips = _draws(1000, 100, dataclasses.replace(PAPER, stride_per="frame"))
    gaps = np.diff(clips)
    assert set(gaps.ravel()) == set(range(2, 11)) and clips.min() >= 0 and clips.max() <= 999
    assert abs(np.corrcoef(gaps[:, 0], gaps[:, 1])[0, 1]) < 0.35  # 3.5 standard deviations


@pytest.mark.parametrize("stride_per", ["clip", "frame"])
def test_drawing_again_keeps_the_distribution(stride_per):
    again = dataclasses.replace(THREE, short_policy="redraw", stride_per=stride_per)
    if stride_per == "clip":  # 6 frames: stride 1 has four starts, stride 2 two, 3 does not fit
        shares = {(s, s + 1, s + 2): 1 / 8 for s in range(4)}
        _evenly(_clips(6, 400, again), shares | {(0, 2, 4): 1 / 4, (1, 3, 5): 1 / 4})
    # What was drawn for a long video is kept for a short one if it fits: that is rejection.
    long, short = (np.diff(_draws(n, 100, again)) for n in (100, 6))
    fits = long <= 2
    assert 0 < fits.sum() < fits.size
    np.testing.assert_array_equal(long[fits], short[fits])
    assert set(short[~fits]) == {1, 2}
    # Where nothing fits there is nothing to draw again.
    assert _clips(3, 20, dataclasses.replace(again, frame_stride=(2, 3))) == {(0, 1, 2): 20}


def test_a_stride_that_does_not_fit_falls_back_to_the_interval():
    fall_back = dataclasses.replace(THREE, short_policy="interval", frame_stride=(3, 5))
    # 8 frames: of the strides 3 to 5 only 3 fits, with two starts; floor(k 8 / 3) is 0, 2, 5.
    _evenly(_clips(8, 400, fall_back), {(0, 2, 5): 2 / 3, (0, 3, 6): 1 / 6, (1, 4, 7): 1 / 6})
    each = dataclasses.replace(fall_back, stride_per="frame")
    shares = {(0, 3, 6): 1 / 18, (1, 4, 7): 1 / 18, (0, 3, 7): 1 / 9, (0, 4, 7): 1 / 9}
    _evenly(_clips(8, 600, each), {(0, 2, 5): 2 / 3, **shares})
    assert _clips(2, 5, fall_back) == {(0, 1, 2): 5}


def test_training_may_take_the_evaluations_frames():
    spread = dataclasses.replace(THREE, train="interval")
    assert _clips(10, 20, spread) == {(0, 3, 6): 20}
    assert _clips(10, 20, dataclasses.replace(spread, eval="int_centred")) == {(1, 4, 7): 20}


def test_training_may_mix_both():
    both = _draws(1000, 400, dataclasses.replace(THREE, train="mix"))
    strided = _draws(1000, 400, THREE)
    spread = (both == [0, 333, 666]).all(axis=1)
    assert 140 < spread.sum() < 260  # a fair coin, 6 standard deviations
    np.testing.assert_array_equal(both[~spread], strided[~spread])
    # The coin says nothing about the strides.
    assert set(np.diff(strided[spread])[:, 0]) == set(np.diff(strided[~spread])[:, 0]) == {1, 2, 3}


@pytest.mark.parametrize(
    ("reading", "of_47", "of_100"),
    [
        ("frac", [(k * 47) // 24 for k in range(24)], [(k * 100) // 24 for k in range(24)]),
        ("int", list(range(24)), list(range(0, 93, 4))),
        ("int_centred", list(range(11, 35)), list(range(3, 96, 4))),
    ],
)
def test_readings_of_the_evaluation_interval(reading, of_47, of_100):
    settings = dataclasses.replace(PAPER, eval=reading)
    assert clip_indices(tf.constant(47), settings, None).numpy().tolist() == of_47
    assert clip_indices(tf.constant(100), settings, None).numpy().tolist() == of_100
    assert clip_indices(tf.constant(22), settings, None).numpy().tolist() == list(range(24))


def test_inset_clips_have_whole_windows():
    inset = dataclasses.replace(THREE, flow_edge="inset")
    clips = _draws(9, 200, inset)
    assert set(clips.ravel()) == set(range(2, 7))  # L/2 to N - 1 - L/2, both ends included
    for clip in clips[:20]:
        windows = flow_indices(tf.constant(clip), tf.constant(9), inset).numpy()
        assert (np.diff(windows) == 1).all() and windows.min() >= 0 and windows.max() <= 7
    assert clip_indices(tf.constant(9), inset, None).numpy().tolist() == [2, 3, 5]
    assert _clips(7, 20, inset) == {(2, 3, 4): 20}


def test_videos_too_short_to_inset_are_clamped():
    inset = dataclasses.replace(THREE, flow_edge="inset")
    np.testing.assert_array_equal(_draws(6, 40, inset), _draws(6, 40, THREE))
    assert clip_indices(tf.constant(6), inset, None).numpy().tolist() == [0, 2, 4]


def test_repeated_frames_may_repeat_their_window():
    repeat = dataclasses.replace(PAPER, flow_pad="repeat_last")
    windows = flow_indices(tf.constant([20, 21, 22, 23]), tf.constant(22), repeat)
    assert windows.numpy().tolist() == [[18, 19, 20, 20]] + [[19, 20, 20, 20]] * 3
    assert (flow_indices(tf.constant([0, 1]), tf.constant(1), repeat).numpy() == -1).all()


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    first = epoch_order(50, 1, 0)
    assert sorted(first) == list(range(50))
    assert not np.array_equal(first, epoch_order(50, 1, 1))
    assert not np.array_equal(first, epoch_order(50, 2, 0))


# --- whole streams, over records made from real encoded files (conftest) ----------------------


def _stream(tiny_records, sampling=SHORT, **changes):
    index, records = tiny_records
    arguments = {"batch_size": 3, "train": True, "seed": 5, **changes}
    return list(batches(records, index.entries, sampling, **arguments))


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_video_once_per_epoch_and_the_rest_masked(tiny_records):
    count = len(tiny_records[0].entries)
    assert count % 3  # the last batch is partly filled
    steps = steps_per_epoch(count, 3)
    stream = _stream(tiny_records, stop_step=2 * steps)
    for epoch in (stream[:steps], stream[steps:]):
        seen = np.concatenate([b.entry[b.mask] for b in epoch])
        assert sorted(seen) == list(range(count))
    orders = [[b.entry.tolist() for b in e] for e in (stream[:steps], stream[steps:])]
    assert orders[0] != orders[1]


def test_same_seed_same_bytes_another_seed_not(tiny_records):
    first, again, other = (_stream(tiny_records, seed=s) for s in (5, 5, 6))
    assert all(_same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(_same(a, b) for a, b in zip(first, other, strict=True))


def test_starting_anywhere_equals_never_stopping(tiny_records):
    steps = 2 * steps_per_epoch(len(tiny_records[0].entries), 3)
    whole = _stream(tiny_records, stop_step=steps)
    for start in range(steps):
        rest = _stream(tiny_records, start_step=start, stop_step=steps)
        assert len(rest) == steps - start
        assert all(_same(a, b) for a, b in zip(whole[start:], rest, strict=True))


class _Counted:
    """Gives every position the bytes of one video; remembers what was read."""

    def __init__(self, example):
        self._example, self.reads = example, []

    def __getitem__(self, position):
        self.reads.append(position)
        return self._example


@pytest.mark.parametrize("train", [True, False])
def test_resuming_deep_in_a_long_training_reads_nothing_before_it(tiny_records, train):
    """UCF101's 9,537 training clips, step 700 of 1,193 of epoch 1,000: the clips of the plan."""
    count, size, epoch, step = 9537, 8, 1000, 700
    entries = [ClipEntry(f"a/{number}.avi", number % 5, "g", "train") for number in range(count)]
    records = tiny_records[1]
    row, counted = next(iter(records.rows.values())), _Counted(records.read(0))
    large = dataclasses.replace(
        records,
        rows={e.video_id: dataclasses.replace(row, record=k) for k, e in enumerate(entries)},
        _source=SimpleNamespace(data_source=counted),
    )
    start = (epoch if train else 0) * steps_per_epoch(count, size) + step
    stream = batches(
        large, entries, SHORT, batch_size=size, train=train, seed=3,
        start_step=start, stop_step=start + 2,
    )  # fmt: skip
    found = list(stream)
    order = epoch_order(count, 3, epoch) if train else np.arange(count)
    expected = order[step * size : (step + 2) * size]
    assert np.concatenate([batch.entry for batch in found]).tolist() == expected.tolist()
    assert sorted(counted.reads) == sorted(expected.tolist())
    for batch in found:
        assert batch.label.tolist() == [number % 5 for number in batch.entry]
        for seed, number in zip(batch.seed, batch.entry, strict=True):
            own = sample_seed(3, epoch if train else 0, f"a/{number}.avi")
            np.testing.assert_array_equal(seed, own)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_the_processes_are_the_batch(tiny_records, train, parts):
    """In order, also where the last batch is filled up and where a training is taken up again."""
    steps = steps_per_epoch(len(tiny_records[0].entries), 6)
    arguments = {"batch_size": 6, "train": train, "start_step": 1, "stop_step": 2 * steps}
    whole = _stream(tiny_records, **arguments)
    assert len(whole) == 2 * steps - 1 and not all(batch.mask.all() for batch in whole)
    shares = [_stream(tiny_records, part=(i, parts), **arguments) for i in range(parts)]
    for batch, *rows in zip(whole, *shares, strict=True):
        assert {len(part.mask) for part in rows} == {6 // parts}
        assert _same(batch, [np.concatenate(arrays) for arrays in zip(*rows, strict=True)])


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny_records):
    for part in ((0, 2), (3, 3), (-1, 3)):
        with pytest.raises(ValueError, match=f"part {part[0]} of {part[1]} .*batch_size is 3"):
            _stream(tiny_records, part=part)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_only_what_a_clip_needs_is_decoded(tiny_records, monkeypatch, stride):
    """Counted as it happens: each frame and each field once, however many windows show it."""
    decoded = Counter()
    decode = pipeline._jpeg

    def counting(data, channels):
        def count(*_):
            decoded[channels] += 1
            return np.int32(0)

        with tf.control_dependencies([tf.numpy_function(count, [data], tf.int32)]):
            return decode(tf.identity(data), channels)

    monkeypatch.setattr(pipeline, "_jpeg", counting)
    index, records = tiny_records
    # 21 frames or more: room for 6 frames at a stride of 4.
    longest = max(index.entries, key=lambda entry: records.rows[entry.video_id].num_frames)
    sampling = dataclasses.replace(SHORT, num_frames=6, frame_stride=(stride, stride))
    (_,) = batches(records, [longest], sampling, batch_size=1, train=True)
    # Windows of 4 fields: 6 of them apart, or overlapping; clamped ones repeat fields.
    fields = {1: 9, 2: 14, 4: 24}[stride]
    assert decoded[3] == 6 and fields - 4 <= decoded[1] <= fields


def test_labels_belong_to_their_videos(tiny_records):
    index, _ = tiny_records
    for batch in _stream(tiny_records):
        for entry, label in zip(batch.entry[batch.mask], batch.label[batch.mask], strict=True):
            assert index.entries[entry].label == label


def test_evaluation_does_not_depend_on_the_batch_size(tiny_records):
    clips = []
    for size in (1, 4):
        clips.append({})
        for batch in _stream(tiny_records, batch_size=size, train=False):
            for row in np.flatnonzero(batch.mask):
                clips[-1][int(batch.entry[row])] = (batch.rgb[row], batch.flow[row])
    assert clips[0].keys() == clips[1].keys()
    assert all(_same(clips[0][k], clips[1][k]) for k in clips[0])


def test_clip_holds_the_frames_and_fields_of_the_video(tiny_records):
    """The flow channels are u, v of the window's fields in order: read back from the records."""
    index, records = tiny_records
    batch = _stream(tiny_records, batch_size=1, train=False)[0]
    entry = index.entries[int(batch.entry[0])]
    example = records.parse(tf.constant(records.read(records.rows[entry.video_id].record)))
    total = len(example["frames"])
    size = records.settings.size
    wanted = [(k * total) // 8 for k in range(8)]
    for t, c in enumerate(wanted):
        frame = tf.io.decode_jpeg(example["frames"][c], dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(batch.rgb[0, t], frame)
        for offset in range(4):
            k = min(max(c - 2 + offset, 0), total - 2)
            field = tf.io.decode_jpeg(example["flow"][k], dct_method="INTEGER_ACCURATE").numpy()
            np.testing.assert_array_equal(batch.flow[0, t, 2 * offset], field[:size, :, 0])
            np.testing.assert_array_equal(batch.flow[0, t, 2 * offset + 1], field[size:, :, 0])


def test_prediction_reads_the_evaluations_clip(tiny_records):
    index, records = tiny_records
    other = dataclasses.replace(SHORT, eval="int_centred", flow_edge="inset")
    between = dataclasses.replace(SHORT, flow_step="stride")
    for sampling in (SHORT, other, between):
        batch = _stream(tiny_records, sampling, batch_size=1, train=False)[-1]
        entry = index.entries[int(batch.entry[0])]
        example = records.parse(tf.constant(records.read(records.rows[entry.video_id].record)))
        stored = (tuple(example[key].numpy().tolist()) for key in ("frames", "flow"))
        clip = clip_of(*stored, sampling, records.settings)
        assert np.array_equal(clip.rgb, batch.rgb) and np.array_equal(clip.flow, batch.flow)


def _moving(records, count, step):
    """JPEG frames of a texture that moves right by `step` px per frame and down by half of it."""
    size = records.size
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 1)).astype(np.float32)
    ground = cv2.resize(noise, (4 * size, 4 * size), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    frames = []
    for k in range(count):
        top, left = 2 * size - k * step // 2, 2 * size - k * step
        view = np.repeat(ground[top : top + size, left : left + size, None], 3, axis=2)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 100]
        frames.append(cv2.imencode(".jpg", view.astype(np.uint8), quality)[1].tobytes())
    return tuple(frames)


@pytest.mark.parametrize("algorithm", ["dis", "farneback"])
def test_flow_between_the_frames_of_a_clip(tiny_records, algorithm):
    """Field j takes sampled frame j to j + 1: strides of 2 frames at 2 px move 4 px, down 2."""
    stored = dataclasses.replace(
        tiny_records[1].settings, size=64, flow_bound=10.0, flow_algorithm=algorithm
    )
    between = dataclasses.replace(PAPER, num_frames=4, flow_step="stride")
    frames = _moving(stored, 8, 2)
    unread = (b"",) * 7  # no stored field is touched
    clip = clip_of(frames, unread, between, stored)  # frames 0, 2, 4, 6
    moved = dequantise(clip.flow[0, ..., 16:-16, 16:-16], 10.0).mean(axis=(2, 3))
    np.testing.assert_allclose(moved, np.tile([4.0, 2.0], (4, 4)), atol=0.4)


def test_the_window_of_a_clip_of_its_own(tiny_records):
    """Frame k reads fields k - 2 to k + 1 of the clip, clamped; a repeated frame stands still."""
    stored = dataclasses.replace(tiny_records[1].settings, size=48, flow_bound=10.0)
    between = dataclasses.replace(PAPER, num_frames=6, flow_step="stride")
    frames = _moving(stored, 4, 1)
    # Four frames and two repeats: fields 0, 1 and 2 move, 3 and 4 do not.
    frames = (*frames[:2], *_moving(stored, 10, 3)[8:])
    flow = clip_of(frames, (b"",) * 3, between, stored).flow[0]
    greys = [
        to_grey(tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy()) for data in frames
    ]
    compute = make_flow("dis")
    fields = [quantise(compute(a, b), 10.0) for a, b in itertools.pairwise(greys)]
    assert len({field.tobytes() for field in fields}) == 3
    fields += [np.full_like(fields[0], 128)] * 2
    for k, window in enumerate(
        [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 4], [3, 4, 4, 4]]
    ):
        expected = np.concatenate([fields[j] for j in window], axis=-1).transpose(2, 0, 1)
        np.testing.assert_array_equal(flow[k], expected)


@pytest.mark.parametrize("other", [{"flow_edge": "inset"}, {"flow_pad": "repeat_last"}])
def test_a_clip_of_its_own_has_no_stored_fields_to_choose(other):
    with pytest.raises(ValueError, match=f"flow_step='stride' .*{next(iter(other.values()))}"):
        dataclasses.replace(PAPER, flow_step="stride", **other)


def test_flow_is_not_computed_on_frames_too_small_for_it(tiny_config):
    tiny_config.sampling.flow_step = "stride"
    Settings.of(tiny_config)
    tiny_config.records.size = tiny_config.inputs.crop_size = 24
    with pytest.raises(ValueError, match="records.size must be at least 32 px, got 24"):
        Settings.of(tiny_config)


def _small_settings(tmp_path):
    return prepare.RecordSettings(
        root=str(tmp_path / "records"), size=32, resize="squash", flow_size=32,
        flow_source="stored",
        tvl1=TvL1Settings(**ucf101.get_config().records.tvl1),
        flow_algorithm="dis", flow_bound=8.0, jpeg_quality=95, min_truncated_frames=4,
        max_pixels=10**6, max_frames=1000, max_seconds=60.0, timeout=60.0, workers=1,
    )  # fmt: skip


def _ramp(height, width):
    """JPEG frame and field whose pixels tell their row (u) and column (v, red)."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 100]
    frame = cv2.imencode(".jpg", np.stack([columns] * 3, -1), quality)[1]
    field = cv2.imencode(".jpg", np.concatenate([rows, columns]), quality)[1]
    return frame.tobytes(), field.tobytes()


@pytest.mark.parametrize("sides", [(40, 61), (61, 40)])
def test_a_square_is_cut_from_along_the_longer_side(tiny_records, sides):
    stored = dataclasses.replace(tiny_records[1].settings, size=40, resize="short_side")
    frame, field = _ramp(*sides)
    seeds = np.random.default_rng(0).integers(0, 2**31, (300, 2)).astype(np.int32)

    @tf.function(autograph=False)
    def square(seed):
        frames, fields = tf.constant([frame] * 4), tf.constant([field] * 3)
        return decode_clip(frames, fields, tf.constant([0, 1, 3]), THREE, stored, seed)

    corners = Counter()
    for seed in [None, *map(tf.constant, seeds)]:
        rgb, flow = (x.numpy().astype(int) for x in square(seed))
        assert rgb.shape == (3, 40, 40, 3) and flow.shape == (3, 8, 40, 40)
        flow = flow.transpose(0, 2, 3, 1)
        # Colours and all fields show the same place.
        top, left = (round(float(flow[0, 0, :, 0].mean())), round(float(flow[0, :, 0, 1].mean())))
        for fields in np.split(flow, 4, axis=-1):
            assert np.abs(fields[..., 0] - np.arange(top, top + 40)[:, None]).max() <= 2
            assert np.abs(fields[..., 1] - np.arange(left, left + 40)).max() <= 2
        assert np.abs(rgb - np.arange(left, left + 40)[:, None]).max() <= 2
        if seed is None:
            assert (top, left) == ((0, 10) if sides[1] == 61 else (10, 0))
        else:
            corners[top + left] += 1
    _evenly(corners, dict.fromkeys(range(22), 1 / 22), limit=46.8)  # 21 degrees of freedom


def test_training_moves_the_square_only_if_asked(tmp_path, make_video):
    """Through whole streams: evaluation and plain training read the centre, random_crop moves."""
    entries = []
    for number in range(6):
        make_video(tmp_path / "a" / f"{number}.avi", frames=10, size=(32, 64), seed=number)
        entries.append(ClipEntry(f"a/{number}.avi", 0, "g", "train"))
    index = VideoIndex("wide", tmp_path, ("a",), tuple(entries), "test", False, 0.0, (), 0)
    stored = dataclasses.replace(
        _small_settings(tmp_path), resize="short_side", flow_algorithm="farneback"
    )
    records = prepare_records(index, stored)
    spread = dataclasses.replace(SHORT, train="interval")  # the same frames in all streams

    def clips(**arguments):
        arrays = {}
        for batch in batches(records, entries, spread, batch_size=2, **arguments):
            for row, entry in enumerate(batch.entry.tolist()):
                arrays[entry] = batch.rgb[row], batch.flow[row]
        return arrays

    centre, plain, moved = (
        clips(train=False),
        clips(train=True),
        clips(train=True, random_crop=True),
    )
    assert all(_same(centre[k], plain[k]) for k in range(6))
    assert sum(not _same(centre[k], moved[k]) for k in range(6)) >= 4
    again, other = (clips(train=True, random_crop=True, seed=s) for s in (0, 1))
    assert all(_same(moved[k], again[k]) for k in range(6))
    assert not all(_same(moved[k], other[k]) for k in range(6))


def test_a_one_frame_video_stands_still(tmp_path, make_video):
    make_video(tmp_path / "a" / "one.avi", frames=1)
    entry = ClipEntry(video_id="a/one.avi", label=0, group="g", subset="train")
    index = VideoIndex(
        name="one", root=tmp_path, class_names=("a",), entries=(entry,), protocol="test",
        leaky=False, overlap=0.0, notes=(), missing=0,
    )  # fmt: skip
    records = prepare_records(index, _small_settings(tmp_path))
    between = dataclasses.replace(SHORT, flow_step="stride")
    for sampling, train in itertools.product((SHORT, between), (True, False)):
        (batch,) = batches(records, index.entries, sampling, batch_size=1, train=train)
        assert (batch.flow == 128).all()
        assert (batch.rgb == batch.rgb[:, :1]).all()


# --- flow computed online --------------------------------------------------------------------


def _online(records, algorithm):
    return dataclasses.replace(
        records.settings, size=48, flow_size=48, flow_bound=10.0, flow_source="online",
        flow_algorithm=algorithm,
    )  # fmt: skip


def _greys(frames):
    """What an online field is computed from: the brightness that the JPEG holds."""
    return [
        tf.io.decode_jpeg(data, channels=1, dct_method="INTEGER_ACCURATE").numpy()[..., 0]
        for data in frames
    ]


def test_online_fields_are_their_two_grey_frames(tiny_records):
    stored = _online(tiny_records[1], "tvl1")
    frames = _moving(stored, 7, 2)
    greys = _greys(frames)
    # Frames 0 to 6 and one repeated past the end; windows are held inside the video.
    clip = clip_of(frames, (), dataclasses.replace(PAPER, num_frames=8), stored)
    assert clip.flow.shape == (1, 8, 8, 48, 48) and clip.flow.dtype == np.uint8
    for t in range(7):
        for offset in range(4):
            k = min(max(t - 2 + offset, 0), 5)
            np.testing.assert_array_equal(clip.flow[0, t, 2 * offset], greys[k])
            np.testing.assert_array_equal(clip.flow[0, t, 2 * offset + 1], greys[k + 1])
    assert np.array_equal(clip.flow[0, 7, ::2], clip.flow[0, 7, 1::2])  # no motion
    # Between the frames of the clip: 0, 1, 3, 5.
    between = dataclasses.replace(PAPER, num_frames=4, flow_step="stride")
    clip = clip_of(frames, (), between, stored)
    for offset, (a, b) in enumerate([(0, 1), (0, 1), (1, 3), (3, 5)]):  # of frame 1
        np.testing.assert_array_equal(clip.flow[0, 1, 2 * offset], greys[a])
        np.testing.assert_array_equal(clip.flow[0, 1, 2 * offset + 1], greys[b])


@pytest.mark.parametrize("algorithm", ["dis", "farneback"])
def test_the_host_computes_what_the_accelerator_does_not(tiny_records, algorithm):
    stored = _online(tiny_records[1], algorithm)
    frames = _moving(stored, 5, 2)
    compute = make_flow(algorithm)
    fields = [quantise(compute(a, b), 10.0) for a, b in itertools.pairwise(_greys(frames))]
    assert len({field.tobytes() for field in fields}) == 4
    clip = clip_of(frames, (), dataclasses.replace(PAPER, num_frames=6), stored)
    for t, window in enumerate([[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3]]):
        expected = np.concatenate([fields[k] for k in window], axis=-1).transpose(2, 0, 1)
        np.testing.assert_array_equal(clip.flow[0, t], expected)
    assert (clip.flow[0, 5] == 128).all()  # repeated past the end


def test_online_flow_is_the_stored_flow_but_for_the_jpegs(tmp_path, make_video):
    """Stored fields come from the frames before, online ones from those after encoding."""
    path = make_video(tmp_path / "v.mp4", frames=6, size=(64, 64), speed=2.0)
    stored = dataclasses.replace(
        _small_settings(tmp_path), size=64, flow_size=64, jpeg_quality=100, flow_bound=4.0
    )
    sampling = dataclasses.replace(PAPER, num_frames=6)
    clips = []
    for source in ("stored", "online"):
        settings = dataclasses.replace(stored, flow_source=source)
        video = prepare.encode_video(path, settings)
        assert len(video.flow) == (5 if source == "stored" else 0)
        clips.append(clip_of(video.frames, video.flow, sampling, settings))
    np.testing.assert_array_equal(clips[0].rgb, clips[1].rgb)
    difference = np.abs(clips[0].flow.astype(int) - clips[1].flow.astype(int))
    assert difference.mean() < 1.0  # 0.03 px
    assert np.abs(clips[0].flow.astype(int) - 128).mean() > 2  # and it does move


def test_online_flow_is_computed_at_the_stored_size(tmp_path):
    with pytest.raises(ValueError, match="flow_size must be size, 32, got 64"):
        dataclasses.replace(_small_settings(tmp_path), flow_source="online", flow_size=64)


@pytest.mark.parametrize("total", [5, 8, 9, 23, 60])
@pytest.mark.parametrize("how", ["frac", "int", "int_centred"])
def test_several_clips_are_spread_evenly(how, total):
    """Against loops in Python: interval N/T, starts one after the other (SPEC 1.8)."""
    settings = dataclasses.replace(PAPER, num_frames=8, eval=how)
    for count in (1, 3, 10):
        for clip in range(count):
            drawn = clip_indices(tf.constant(total), settings, None, tf.constant(clip), count)
            if total < 8:
                assert drawn.numpy().tolist() == list(range(8))
                continue
            step = total // 8
            left_out = total - 1 - 7 * step
            expected = {
                "frac": [math.floor(total / 8 * (k + clip / count) + 1e-9) for k in range(8)],
                "int": [k * step + math.floor(clip * (left_out + 1) / count) for k in range(8)],
                "int_centred": [
                    k * step + math.floor(left_out * (2 * clip + 1) / (2 * count) + 1e-9)
                    for k in range(8)
                ],
            }[how]
            assert drawn.numpy().tolist() == expected
            assert max(expected) < total
    if total >= 8:  # one clip of one is that of evaluation, as it always was
        one = clip_indices(tf.constant(total), settings, None)
        same = clip_indices(tf.constant(total), settings, None, tf.constant(0), 1)
        assert one.numpy().tolist() == same.numpy().tolist()
