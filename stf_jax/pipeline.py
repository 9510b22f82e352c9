"""Records -> batches with tf.data: which frames, which flow fields, in which order.

Everything random is a function of (seed, epoch, video id), and the order of (seed, epoch): a
stream that starts at step k gives the very batches that one started at 0 gives from there on.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stf_jax import flow as optical_flow
from stf_jax.index import ClipEntry
from stf_jax.inputs import Batch
from stf_jax.prepare import RecordSettings, flow_between
from stf_jax.records import Records
from stf_jax.views import ClipPlan

if TYPE_CHECKING:
    import tensorflow as tf
else:
    from stf_jax.records import tf

_CHOICES = {
    "stride_per": ("clip", "frame"),
    "short_policy": ("clip_tau", "redraw", "interval"),
    "train": ("tau", "interval", "mix"),
    "eval": ("frac", "int", "int_centred"),
    "flow_edge": ("clamp", "inset"),
    "flow_pad": ("zero", "repeat_last"),
    "flow_step": ("frame", "stride"),
}


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Which frames of a video make a clip (SPEC section 1) and which fields a stack (section 2).

    Args:
      num_frames: frames per clip (the paper's T = 24).
      frame_stride: smallest and largest training stride, both included (the paper's tau, 2 to 10).
      flow_frames: flow fields per frame (the paper's L = 4), centred on the frame.
      stride_per: 'clip' draws one stride for all gaps of a clip, 'frame' one for every gap, from
        the same strides (SPEC 1.5).
      short_policy: what is done about strides that do not fit the video (SPEC 1.6): 'clip_tau'
        draws only from those that do; 'redraw' draws from all until one fits, which is the same
        distribution by other draws; 'interval' draws once from all and takes the evaluation's
        frames if the clip would run past the end.
      train: 'tau' trains on the strides above, 'interval' on the evaluation's frames, 'mix' on
        either with equal chance (SPEC 1.9).
      eval: how the evaluation spreads a clip over its video (SPEC 1.8); see `evaluation_indices`.
      flow_edge: 'clamp' repeats the outermost fields where a window leaves the video, 'inset' keeps
        frames away from the ends so that none does (SPEC 2.6).
      flow_pad: the window of a frame repeated past the end: 'zero', no motion, or 'repeat_last',
        the window of the last frame (SPEC 2.7).
      flow_step: 'frame' reads the stored fields, between neighbouring frames of the video; 'stride'
        computes them anew between neighbouring frames of the clip (SPEC 2.5), which is then a
        video of its own: it knows no `flow_edge` and no `flow_pad` but the default ones.

    Raises:
      ValueError: an impossible value (names it).
    """

    num_frames: int
    frame_stride: tuple[int, int]
    flow_frames: int
    stride_per: str
    short_policy: str
    train: str
    eval: str
    flow_edge: str
    flow_pad: str
    flow_step: str

    def __post_init__(self) -> None:
        """Checks the values."""
        low, high = self.frame_stride
        if not 1 <= low <= high:
            raise ValueError(f"sampling.frame_stride must be 1 <= low <= high, got {low}, {high}")
        if self.num_frames < 2:
            raise ValueError(f"sampling.num_frames must be at least 2, got {self.num_frames}")
        if self.flow_frames < 2 or self.flow_frames % 2:
            raise ValueError(
                f"sampling.flow_frames must be even (paper: 4), got {self.flow_frames}"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"sampling.{name}: got {getattr(self, name)!r}, one of {allowed}")
        if self.flow_step == "stride" and (self.flow_edge, self.flow_pad) != ("clamp", "zero"):
            raise ValueError(
                "sampling.flow_step='stride' takes no stored fields: flow_edge must be 'clamp' and "
                f"flow_pad 'zero', got {self.flow_edge!r} and {self.flow_pad!r}"
            )


def clip_indices(
    video_frames: tf.Tensor,
    settings: SamplingSettings,
    seed: tf.Tensor | None,
    clip: tf.Tensor | int = 0,
    num_clips: int = 1,
) -> tf.Tensor:
    """The frames of a clip: drawn at random in training, always the same ones in evaluation.

    With `flow_edge='inset'` they lie in [L/2, N - 1 - L/2], where every flow window is whole: the
    video is sampled as if it were L frames shorter. One with fewer than T + L frames is too short
    for that and is clamped.

    Args:
      video_frames: int32 scalar N, decoded frames of the video, at least 1.
      settings: see there.
      seed: int32 `2`; None for evaluation.
      clip: which of the evaluation's clips, from 0.
      num_clips: how many of them there are.

    Returns:
      int32 `num_frames`; past the end of a shorter video they run on (see `frame_indices`).

    Source: SPEC 2.6. The cited code's literal [L/2, N - L/2] counts frames from one; its upper end
    is this one.
    """
    margin = tf.constant(0)
    if settings.flow_edge == "inset":
        whole = video_frames - settings.flow_frames >= settings.num_frames
        margin = tf.where(whole, settings.flow_frames // 2, 0)
    inner = video_frames - 2 * margin
    if seed is None:
        return margin + evaluation_indices(inner, settings, clip, num_clips)
    return margin + training_indices(inner, settings, seed)


def training_indices(
    video_frames: tf.Tensor, settings: SamplingSettings, seed: tf.Tensor
) -> tf.Tensor:
    """Draws strides and a start for a clip, or takes the evaluation's frames (SPEC 1.4 to 1.9).

    The start is uniform on what the strides leave.

    Args:
      video_frames: int32 scalar, decoded frames of the video, at least 1.
      settings: see there.
      seed: int32 `2`.

    Returns:
      int32 `num_frames`; past the end of a shorter video they run on (see `frame_indices`).

    Source: paper, section 4.2; SPEC 1.5, 1.6 and 1.9 for what it leaves open.
    """
    spread = evaluation_indices(video_frames, settings)
    if settings.train == "interval":
        return spread
    stride_seed, start_seed = tf.unstack(tf.random.split(seed, 2))
    gaps = _gaps(video_frames, settings, stride_seed)
    offsets = tf.concat([[0], tf.cumsum(gaps)], 0)
    room = video_frames - 1 - offsets[-1]
    start = tf.random.stateless_uniform([], start_seed, 0, tf.maximum(0, room) + 1, tf.int32)
    strided = start + offsets
    if settings.short_policy == "interval":
        strided = tf.where(room >= 0, strided, spread)
    if settings.train == "mix":
        # A third stream of randomness: the strides and starts are those of 'tau'.
        heads = tf.random.stateless_uniform([], tf.random.fold_in(seed, 2)) < 0.5
        return tf.where(heads, spread, strided)
    return strided


def _gaps(video_frames: tf.Tensor, settings: SamplingSettings, seed: tf.Tensor) -> tf.Tensor:
    """The steps from frame to frame of a training clip, int32 `num_frames - 1`.

    A stride fits if a clip with all gaps of that size stays inside the video, so that any mixture
    of fitting gaps does too. Where none of `frame_stride` fits, 'clip_tau' and 'redraw' take the
    largest that does, and at least 1; 'interval' leaves it to its caller to see that they do not.
    """
    low, high = settings.frame_stride
    count = settings.num_frames - 1
    shape = [] if settings.stride_per == "clip" else [count]
    fits = (video_frames - 1) // count
    largest = tf.maximum(1, fits)
    if settings.short_policy == "redraw":
        # The strides in random order; the first that fits is the one drawing again would end at.
        strides = tf.range(low, high + 1)
        turns = tf.random.stateless_uniform([*shape, high + 1 - low], seed)
        first = tf.argmin(tf.where(strides <= fits, turns, 1.0), axis=-1)
        drawn = tf.where(fits >= low, tf.gather(strides, first), largest)
    else:
        if settings.short_policy == "clip_tau":
            low = tf.where(fits >= low, low, largest)
            high = tf.maximum(low, tf.minimum(high, fits))
        drawn = tf.random.stateless_uniform(shape, seed, low, high + 1, tf.int32)
    return tf.broadcast_to(drawn, [count])


def evaluation_indices(
    video_frames: tf.Tensor,
    settings: SamplingSettings,
    clip: tf.Tensor | int = 0,
    num_clips: int = 1,
) -> tf.Tensor:
    """Spreads clips over the video at the interval N/T (SPEC 1.8).

    By `settings.eval`, frame k is 'frac': floor(k N / T), which covers the whole video; 'int':
    k floor(N / T), which leaves out up to half of it at the end; 'int_centred': the same with as
    much left out before as behind, the odd frame behind.

    Several clips keep the interval and start one after the other: 'frac' deals m T frames,
    floor(k N / (m T)), out to m clips in turn; the starts of 'int' are spread evenly from the
    first frame on over what the interval leaves out, those of 'int_centred' about its middle. In a
    video that leaves little or nothing out several of these clips are the same.

    Args:
      video_frames: int32 scalar N.
      settings: see there.
      clip: which of the clips, from 0.
      num_clips: how many there are (m).

    Returns:
      int32 `num_frames`; a video with fewer frames than that is read frame by frame and runs on.

    Source: paper, section 4.2, the lost formula read as t = N/T.
    """
    k = tf.range(settings.num_frames)
    interval = video_frames // settings.num_frames
    room = video_frames - 1 - (settings.num_frames - 1) * interval
    if settings.eval == "frac":
        spread = ((k * num_clips + clip) * video_frames) // (settings.num_frames * num_clips)
    elif settings.eval == "int":
        spread = k * interval + clip * (room + 1) // num_clips
    else:
        spread = k * interval + (2 * clip + 1) * room // (2 * num_clips)
    return tf.where(video_frames < settings.num_frames, k, spread)


def frame_indices(wanted: tf.Tensor, video_frames: tf.Tensor) -> tf.Tensor:
    """Repeats the last frame for indices past the end (SPEC 1.3): int32 `t` -> int32 `t`."""
    return tf.minimum(wanted, video_frames - 1)


def flow_indices(
    wanted: tf.Tensor, video_frames: tf.Tensor, settings: SamplingSettings
) -> tf.Tensor:
    """The window of flow fields around each frame (SPEC 2.4 to 2.7).

    Field k is the motion from frame k to k + 1. Frame c reads fields c - L/2 to c + L/2 - 1, held
    inside the video at both ends. A repeated last frame does not move, which -1 stands for; with
    `flow_pad='repeat_last'` its window is repeated with it.

    Args:
      wanted: int32 `t`, from the samplers above.
      video_frames: int32 scalar.
      settings: see there.

    Returns:
      int32 `t l`; -1 means no motion.

    Source: paper, section 3.1; SPEC 2.4.
    """
    exists = tf.fill(tf.shape(wanted), video_frames > 1)
    if settings.flow_pad == "zero":
        exists &= wanted < video_frames
    else:
        wanted = frame_indices(wanted, video_frames)
    half = settings.flow_frames // 2
    window = wanted[:, None] + tf.range(-half, half)[None, :]
    return tf.where(exists[:, None], tf.clip_by_value(window, 0, video_frames - 2), -1)


def decode_clip(
    frames: tf.Tensor,
    flow: tf.Tensor,
    wanted: tf.Tensor,
    settings: SamplingSettings,
    stored: RecordSettings,
    seed: tf.Tensor | None = None,
    along: tf.Tensor | int = 1,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes just the frames and fields that a clip needs.

    Of frames that kept their aspect (`records.resize`) it returns a square from along the longer
    side, the same of every frame and field: batches need one shape.

    Args:
      frames: string `n`, JPEG frames of the video.
      flow: string `n-1`, JPEG fields, u above v; of no use with `flow_source='online'`.
      wanted: int32 `t` from a sampler.
      settings: see there.
      stored: how the frames and fields were made.
      seed: int32 `2`, of where the square lies; None takes it from `along`.
      along: place of the square in halves of the room that it has: 0, 1 (the centre) or 2.

    Returns:
      uint8 `t h w 3` and uint8 `t 2L h w`: u, v of the first field, then of the next; or, where
      `inputs.compute_flow` is still to compute them, the two grey frames of each field.
    """
    total, size = tf.size(frames), stored.size
    shown = frame_indices(wanted, total)
    corner = _corner(frames[0], size, seed, along) if stored.resize == "short_side" else None
    rgb = tf.map_fn(
        lambda data: _cut(_jpeg(data, 3)[None], corner, size)[0],
        tf.gather(frames, shown),
        fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
    )
    count = settings.num_frames
    if settings.flow_step == "frame":
        windows = flow_indices(wanted, total, settings)
    else:
        windows = flow_indices(tf.range(count), tf.constant(count), settings)
    if stored.flow_source == "online":
        numbers = tf.range(total) if settings.flow_step == "frame" else shown
        stacks = _online_fields(frames, numbers, windows, corner, stored)
    elif settings.flow_step == "frame":
        stacks = _stored_fields(flow, windows, corner, size)
    else:
        stacks = tf.gather(_clip_fields(rgb, shown, stored), windows)
    # Fields stay pictures: making channels of them here would cost as much as decoding them.
    return rgb, tf.reshape(stacks, [count, 2 * settings.flow_frames, size, size])


def evaluation_frames(video_frames: int, settings: SamplingSettings) -> tuple[int, ...]:
    """The frames of a video's evaluation clip, `num_frames` of them, in order.

    Args:
      video_frames: decoded frames of the video, at least 1; the last one stands for missing ones.
      settings: how it is sampled.
    """
    total = tf.constant(video_frames, tf.int32)
    wanted = clip_indices(total, settings, seed=None)
    return tuple(frame_indices(wanted, total).numpy().tolist())


@functools.lru_cache(maxsize=64)
def evaluation_reads(
    video_frames: int, settings: SamplingSettings, stored: RecordSettings
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What `decode_clip` reads of a video for its evaluation clip; the rest may be empty.

    Args:
      video_frames: decoded frames of the video, at least 1.
      settings: how it is sampled.
      stored: how it is stored.

    Returns:
      The frames and the stored fields, in order. The first frame is among them always: its size
      is the video's.
    """
    total = tf.constant(video_frames, tf.int32)
    wanted = clip_indices(total, settings, seed=None)
    frames = {0, *frame_indices(wanted, total).numpy().tolist()}
    if settings.flow_step == "stride":
        return tuple(sorted(frames)), ()
    windows = flow_indices(wanted, total, settings).numpy()
    fields = set(windows[windows >= 0].tolist())
    if stored.flow_source == "online":
        ends = fields | {field + 1 for field in fields}
        return tuple(sorted(frames | ends)), ()
    return tuple(sorted(frames)), tuple(sorted(fields))


def _corner(
    frame: tf.Tensor, size: int, seed: tf.Tensor | None, along: tf.Tensor | int
) -> tf.Tensor:
    """Top and left of the square that is cut from a video, int32 `2`: at `along`, or anywhere."""
    room = tf.io.extract_jpeg_shape(frame)[:2] - size
    if seed is None:
        return room * along // 2
    # Only one of the sides has room; squashed frames have none.
    most = tf.reduce_max(room) + 1
    drawn = tf.random.stateless_uniform([], tf.random.fold_in(seed, 3), 0, most, tf.int32)
    return tf.minimum(drawn, room)


def _cut(images: tf.Tensor, corner: tf.Tensor | None, size: int) -> tf.Tensor:
    """A square of each image: `n h w c` -> `n size size c`; None: they are squares already."""
    if corner is not None:
        top, left = corner[0], corner[1]
        images = images[:, top : top + size, left : left + size]
    return tf.ensure_shape(images, [None, size, size, images.shape[-1]])


def _stored_fields(
    flow: tf.Tensor, windows: tf.Tensor, corner: tf.Tensor | None, size: int
) -> tf.Tensor:
    """The stored fields of each window, uint8 `(t l) 2 h w`."""
    # Neighbouring windows overlap when the stride is below L: decode every field once.
    needed, where = tf.unique(tf.reshape(windows, [-1]))
    still = tf.fill([2, size, size], tf.constant(optical_flow.ZERO_FLOW, tf.uint8))

    def field(index: tf.Tensor) -> tf.Tensor:
        u_above_v = _jpeg(flow[index], 1)
        both = tf.reshape(u_above_v, [2, -1, tf.shape(u_above_v)[1], 1])
        return tf.ensure_shape(_cut(both, corner, size)[..., 0], [2, size, size])

    def moving(index: tf.Tensor) -> tf.Tensor:
        return tf.cond(index < 0, lambda: still, lambda: field(index))

    def each(decode: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
        signature = tf.TensorSpec([2, size, size], tf.uint8)
        return tf.map_fn(decode, needed, fn_output_signature=signature)

    # Only videos shorter than a clip have fields that stand still: others need not ask at each.
    fields = tf.cond(tf.reduce_any(needed < 0), lambda: each(moving), lambda: each(field))
    return tf.gather(fields, where)


def _clip_fields(rgb: tf.Tensor, shown: tf.Tensor, stored: RecordSettings) -> tf.Tensor:
    """Flow from each frame of a clip to the next, uint8 `t-1 2 h w` (SPEC 2.5).

    By the algorithm of the stored fields and quantised as they are, but on the stored frames, at
    their size; `flow_bound` now truncates px per stride. A frame repeated past the end of its
    video does not move.

    Args:
      rgb: uint8 `t h w 3`.
      shown: int32 `t`, which frames of the video these are.
      stored: names algorithm and bound.
    """

    def motion(frames: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        greys = np.stack([optical_flow.to_grey(frame) for frame in frames])
        return _motion(greys[:-1], greys[1:], np.diff(numbers) != 0, stored)

    optical_flow.use_one_thread()
    fields = tf.numpy_function(motion, [rgb, shown], tf.uint8)
    return tf.ensure_shape(fields, [rgb.shape[0] - 1, 2, stored.size, stored.size])


def _motion(
    previous: np.ndarray, following: np.ndarray, moves: np.ndarray, stored: RecordSettings
) -> np.ndarray:
    """Quantised flow of the pairs of grey frames that move, uint8 `n 2 h w`."""
    fields = np.zeros((*previous.shape, 2), np.float32)
    if moves.any():
        fields[moves] = flow_between(previous[moves], following[moves], stored)
    quantised = optical_flow.quantise(fields, stored.flow_bound)
    return np.ascontiguousarray(quantised.transpose(0, 3, 1, 2))


def _online_fields(
    frames: tf.Tensor,
    numbers: tf.Tensor,
    windows: tf.Tensor,
    corner: tf.Tensor | None,
    stored: RecordSettings,
) -> tf.Tensor:
    """What records without flow have for each field of each window, uint8 `(t l) 2 h w`.

    The field itself where it is computed here; for 'tvl1', which the accelerator computes, its two
    grey frames. No motion is a pair of the same frame.

    Args:
      frames: string `n`, JPEG frames of the video.
      numbers: int32, the frames of the video that the fields lie between.
      windows: int32 `t l`; field k lies between `numbers[k]` and `numbers[k + 1]`, -1 is none.
      corner: of the square to cut; None if frames are squares already.
      stored: names algorithm and bound.
    """
    size = stored.size
    needed, where = tf.unique(tf.reshape(windows, [-1]))
    first = tf.maximum(needed, 0)
    ends = tf.concat([first, first + tf.cast(needed >= 0, tf.int32)], 0)
    shown, place = tf.unique(tf.gather(numbers, ends))
    greys = tf.map_fn(
        lambda k: _cut(_jpeg(frames[k], 1)[None], corner, size)[0, ..., 0],
        shown,
        fn_output_signature=tf.TensorSpec([size, size], tf.uint8),
    )
    previous, following = tf.split(tf.gather(greys, place), 2)
    if stored.flow_algorithm == "tvl1":
        pairs = tf.stack([previous, following], axis=1)
    else:
        optical_flow.use_one_thread()
        moves = tf.not_equal(*tf.split(place, 2))
        motion = functools.partial(_motion, stored=stored)
        pairs = tf.numpy_function(motion, [previous, following, moves], tf.uint8)
    return tf.gather(tf.ensure_shape(pairs, [None, 2, size, size]), where)


def _jpeg(data: tf.Tensor, channels: int) -> tf.Tensor:
    # The accurate transform: the fast one differs between machines' libjpeg builds.
    return tf.io.decode_jpeg(data, channels=channels, dct_method="INTEGER_ACCURATE")


@functools.lru_cache(maxsize=2)
def epoch_order(num_videos: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of `num_videos` that depends on (seed, epoch) only."""
    return np.random.default_rng((seed, epoch)).permutation(num_videos)


def steps_per_epoch(num_videos: int, batch_size: int) -> int:
    """Steps that see every video once; the last batch may be partly masked."""
    return -(-num_videos // batch_size)


def sample_seed(seed: int, epoch: int, video_id: str) -> np.ndarray:
    """The randomness of one sample, uint32 `2`, from (seed, epoch, video id)."""
    state = np.random.SeedSequence((seed, epoch, zlib.crc32(video_id.encode())))
    return state.generate_state(2, np.uint32)


def batches(
    records: Records,
    entries: Sequence[ClipEntry],
    settings: SamplingSettings,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    random_crop: bool = False,
    start_step: int = 0,
    stop_step: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Streams batches from step `start_step` on.

    Every epoch (`steps_per_epoch` steps) holds each video exactly once: shuffled and sampled at
    random in training, in the order given and deterministic otherwise. The last batch of an epoch
    is filled up with masked rows.

    Args:
      records: the prepared set that holds the videos.
      entries: the usable clips to read.
      settings: how to sample.
      batch_size: rows per batch.
      train: random order and sampling, or evaluation's.
      seed: of order and sampling.
      random_crop: of frames that kept their aspect, train on a square from anywhere along the
        longer side instead of the central one (see `decode_clip`).
      start_step: first step to yield.
      stop_step: first step not to yield; None means the end of the first epoch.
      part: (i, n) reads the i-th n-th of every batch's rows: what one of n processes needs. Parts
        0 to n - 1, one after the other, are the batch.

    Yields:
      Batches of numpy arrays, deterministic given the arguments.

    Raises:
      ValueError: a batch cannot be divided like that (names both).
    """
    number, rows = _rows_of(part, batch_size)
    per_epoch = steps_per_epoch(len(entries), batch_size)
    stop_step = per_epoch if stop_step is None else stop_step

    def plan(slot: np.int64) -> _Planned | None:
        step, row = divmod(int(slot), rows)
        epoch, step = divmod(step, per_epoch)
        rank = step * batch_size + number * rows + row
        if rank >= len(entries):
            return None
        entry = int(epoch_order(len(entries), seed, epoch)[rank]) if train else rank
        return _Planned(entry, entry, sample_seed(seed, epoch, entries[entry].video_id))

    slots = range(start_step * rows, stop_step * rows)
    return _stream(records, entries, settings, plan, slots, rows, train, random_crop)


def planned_batches(
    records: Records,
    entries: Sequence[ClipEntry],
    settings: SamplingSettings,
    plan: ClipPlan,
    *,
    batch_size: int,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Streams the clips of a plan, each exactly once and in its order.

    Args:
      records: the prepared set that holds the videos.
      entries: the usable videos that the plan is about.
      settings: how to sample.
      plan: the clips. Drawn ones depend on the seed, their video and their number only.
      batch_size: rows per batch; the last one is filled up with masked rows.
      seed: of what is drawn.
      part: as in `batches`.

    Yields:
      Batches of numpy arrays, whose `entry` is the position of the clip in the plan.

    Raises:
      ValueError: a batch cannot be divided like that (names both).
    """
    number, rows = _rows_of(part, batch_size)

    def planned(slot: np.int64) -> _Planned | None:
        step, row = divmod(int(slot), rows)
        place = step * batch_size + number * rows + row
        if place >= len(plan):
            return None
        entry, clip = int(plan.entry[place]), int(plan.clip[place])
        random = sample_seed(seed, clip, entries[entry].video_id)
        return _Planned(place, entry, random, clip, int(plan.along[place]))

    slots = range(steps_per_epoch(len(plan), batch_size) * rows)
    return _stream(
        records, entries, settings, planned, slots, rows, plan.random, num_clips=plan.num_clips
    )


def _rows_of(part: tuple[int, int], batch_size: int) -> tuple[int, int]:
    """Number of a part of a batch, and its rows."""
    number, parts = part
    if batch_size % parts or not 0 <= number < parts:
        raise ValueError(
            f"part {number} of {parts} of a batch: batch_size is {batch_size}, allowed: multiples "
            f"of {parts}, and parts 0 to {parts - 1}"
        )
    return number, batch_size // parts


class _Planned(NamedTuple):
    """A clip to read: its number in the batch, its video, its randomness and its place."""

    number: int
    entry: int
    random: np.ndarray
    clip: int = 0
    along: int = 1


def _stream(
    records: Records,
    entries: Sequence[ClipEntry],
    settings: SamplingSettings,
    plan: Callable[[np.int64], _Planned | None],
    slots: range,
    rows: int,
    draw: bool,
    random_crop: bool = False,
    num_clips: int = 1,
) -> Iterator[Batch]:
    """Reads the clips of some slots, `rows` a batch; a slot without a clip becomes a masked row."""
    positions = [records.rows[entry.video_id].record for entry in entries]
    labels = np.array([entry.label for entry in entries], np.int32)

    def fetch(slot: np.int64) -> tuple[bytes, np.ndarray, np.ndarray]:
        planned = plan(slot)
        if planned is None:  # a masked row: any video will do
            numbers, random = (-1, 0, 0, 1), np.zeros(2, np.uint32)
        else:
            numbers = (planned.number, planned.entry, planned.clip, planned.along)
            random = planned.random
        return records.read(positions[numbers[1]]), np.array(numbers, np.int32), random

    @tf.autograph.experimental.do_not_convert  # nothing in it needs converting
    def load(slot: tf.Tensor) -> tuple[tf.Tensor, ...]:
        kinds = (tf.string, tf.int32, tf.uint32)
        serialised, numbers, random = tf.numpy_function(fetch, [slot], kinds)
        example = records.parse(tf.ensure_shape(serialised, []))
        number, entry, clip, along = tf.unstack(tf.ensure_shape(numbers, [4]))
        random = tf.ensure_shape(random, [2])
        chance = tf.bitcast(random, tf.int32) if draw else None
        wanted = clip_indices(tf.size(example["frames"]), settings, chance, clip, num_clips)
        rgb, flow = decode_clip(
            example["frames"],
            example["flow"],
            wanted,
            settings,
            records.settings,
            chance if random_crop else None,
            along,
        )
        return rgb, flow, tf.gather(labels, entry), number >= 0, number, random

    cores = os.cpu_count() or 1
    stream = (
        tf.data.Dataset.range(slots.start, slots.stop)
        .map(load, num_parallel_calls=cores, deterministic=True)
        .batch(rows, drop_remainder=True)
        .prefetch(2)
        .with_options(_options(cores))
    )
    for arrays in stream.as_numpy_iterator():
        yield Batch(*arrays)


def _options(cores: int) -> tf.data.Options:
    """One thread a core and a clip: a clip's own parts are too small to be shared out."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    return options
