from collections import Counter

import numpy as np
import pytest
import tensorflow as tf

from stf_jax import prepare
from stf_jax.datasets import ClipEntry, VideoIndex
from stf_jax.pipeline import (
    SamplingSettings,
    batches,
    epoch_order,
    evaluation_indices,
    flow_indices,
    frame_indices,
    steps_per_epoch,
    training_indices,
)

PAPER = SamplingSettings(num_frames=24, frame_stride=(2, 10), flow_frames=4)
_train = tf.function(training_indices, reduce_retracing=True, autograph=False)


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
    windows = flow_indices(tf.constant([0, 1, 10, 28, 29]), tf.constant(30), 4).numpy().tolist()
    assert windows == [
        [0, 0, 0, 1],
        [0, 0, 1, 2],
        [8, 9, 10, 11],
        [26, 27, 28, 28],
        [27, 28, 28, 28],
    ]


def test_repeated_frames_do_not_move():
    windows = flow_indices(tf.constant([20, 21, 22, 23]), tf.constant(22), 4).numpy().tolist()
    assert windows == [[18, 19, 20, 20], [19, 20, 20, 20], [-1] * 4, [-1] * 4]
    assert (flow_indices(tf.constant([0, 1]), tf.constant(1), 4).numpy() == -1).all()


@pytest.mark.parametrize(
    "wrong",
    [{"frame_stride": (3, 2)}, {"frame_stride": (0, 2)}, {"num_frames": 1}, {"flow_frames": 3}],
)
def test_impossible_sampling_is_named(wrong):
    base = {"num_frames": 24, "frame_stride": (2, 10), "flow_frames": 4}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingSettings(**{**base, **wrong})


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    first = epoch_order(50, 1, 0)
    assert sorted(first) == list(range(50))
    assert not np.array_equal(first, epoch_order(50, 1, 1))
    assert not np.array_equal(first, epoch_order(50, 2, 0))


# --- whole streams, over records made from real encoded files (conftest) ----------------------


def _stream(tiny_records, **changes):
    index, records = tiny_records
    arguments = {"batch_size": 3, "train": True, "seed": 5, **changes}
    sampling = SamplingSettings(num_frames=8, frame_stride=(2, 4), flow_frames=4)
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
            np.testing.assert_array_equal(batch.flow[0, t, ..., 2 * offset], field[:size, :, 0])
            np.testing.assert_array_equal(batch.flow[0, t, ..., 2 * offset + 1], field[size:, :, 0])


def test_a_one_frame_video_stands_still(tmp_path, make_video):
    from stf_jax.records import prepare_records

    make_video(tmp_path / "a" / "one.avi", frames=1)
    entry = ClipEntry(video_id="a/one.avi", label=0, group="g", subset="train")
    index = VideoIndex(
        name="one", root=tmp_path, class_names=("a",), entries=(entry,), protocol="test",
        leaky=False, overlap=0.0, notes=(), missing=0,
    )  # fmt: skip
    settings = prepare.RecordSettings(
        root=str(tmp_path / "records"), size=32, flow_size=32, flow_algorithm="dis",
        flow_bound=8.0, jpeg_quality=95, min_truncated_frames=4, max_pixels=10**6,
        max_frames=1000, max_seconds=60.0, timeout=60.0, workers=1,
    )  # fmt: skip
    records = prepare_records(index, settings)
    sampling = SamplingSettings(num_frames=8, frame_stride=(2, 4), flow_frames=4)
    for train in (True, False):
        (batch,) = batches(records, index.entries, sampling, batch_size=1, train=train)
        assert (batch.flow == 128).all()
        assert (batch.rgb == batch.rgb[:, :1]).all()
