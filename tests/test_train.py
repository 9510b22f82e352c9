import dataclasses
import functools
import gzip
import json
import os
import signal
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import ucf101
from stf_jax import train
from stf_jax.augment import mixup_shares
from stf_jax.datasets import load_index
from stf_jax.evaluate import score_batch
from stf_jax.inputs import Batch, network_input
from stf_jax.monitor import Profiler
from stf_jax.parallel import place
from stf_jax.pipeline import batches, steps_per_epoch
from stf_jax.records import prepare_records
from stf_jax.run import Run, Settings, epoch_index, stamp_of, usable_entries
from stf_jax.train import (
    Interrupted,
    StageProgress,
    abstract_state,
    initial_state,
    train_stage,
    train_step,
)


@pytest.fixture
def parts(tiny_config, tmp_path):
    """A run, its settings, index and records."""
    settings = Settings.of(tiny_config)
    index = load_index(settings.config.data)
    records = prepare_records(index, settings.records)
    return Run(tmp_path / "run"), settings, index, records


def _batch(parts) -> Batch:
    _, settings, index, records = parts
    entries = usable_entries(index, records, "train")
    return next(batches(records, entries, settings.sampling, batch_size=4, train=True, stop_step=1))


def _step(settings, state, batch, rate=1e-3):
    return train_step(
        state,
        batch,
        jax.random.key(1),
        np.float32(rate),
        model=settings.model(2),
        inputs=settings.inputs,
        augment=settings.augment,
        optimizer=settings.optimizer,
        rates=settings.stages["first"].rates,
        mesh=settings.mesh,
    )


def _state(settings):
    params = settings.initial_params(settings.model(2))
    rates = settings.stages["first"].rates
    return place(initial_state(params, settings.optimizer, rates), settings.mesh)


def _host(tree):
    return jax.tree.map(np.array, tree)


def _equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, _host(a), _host(b)))


def test_every_parameter_moves_the_loss_falls_and_one_program_does_it(parts):
    settings = parts[1]
    batch, state = _batch(parts), _state(settings)
    before = _host(state.params)
    programs = train_step._cache_size()
    losses = []
    for _ in range(30):
        state, record = _step(settings, state, batch, rate=3e-3)
        losses.append(float(record.loss))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert train_step._cache_size() - programs <= 1
    still = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_flatten_with_path(before)[0],
            jax.tree.leaves(_host(state.params)),
            strict=True,
        )
        if np.array_equal(old, new)
    ]
    # A bias before a normalisation that takes the mean away again has no effect; none is expected
    # to stand still to the bit, though, because several channels share a group.
    assert not still
    assert int(state.step) == 30 and float(state.sums.count) == 120


def test_masked_rows_do_not_count(parts):
    """Whatever stands in the rows that fill up a batch, the step is the same."""
    settings = parts[1]
    batch = _batch(parts)
    mask = np.array([True, True, True, False])
    other = batch.rgb.copy()
    other[3] = 255 - other[3]
    labels = batch.label.copy()
    labels[3] = 1 - labels[3]
    results = []
    for rgb, label in ((batch.rgb, batch.label), (other, labels)):
        filled = batch._replace(rgb=rgb, label=label, mask=mask)
        state, record = _step(settings, _state(settings), filled)
        results.append((float(record.loss), _host(state.params), float(state.sums.count)))
    assert results[0][0] == results[1][0] and results[0][2] == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), results[0][1], results[1][1]
    )


def test_a_rate_of_zero_changes_nothing_and_rates_scale_updates(parts):
    settings = parts[1]
    batch = _batch(parts)
    start = _host(_state(settings).params)
    moved = [_host(_step(settings, _state(settings), batch, rate)[0].params)
             for rate in (0.0, 1e-4, 2e-4)]  # fmt: skip
    assert _equal(moved[0], start)
    one, two = (
        np.concatenate([(a - b).ravel() for a, b in zip(
            jax.tree.leaves(m), jax.tree.leaves(start), strict=True)])
        for m in moved[1:]
    )  # fmt: skip
    np.testing.assert_allclose(two, 2 * one, rtol=1e-2, atol=2e-7)


def test_a_mixtures_loss_is_the_mixture_of_its_losses(parts):
    """The step's loss by hand: mixed clips, scored against both labels, filler rows alone."""
    settings = parts[1]
    plain = dataclasses.replace(settings.augment, crop="centre")
    mixed = dataclasses.replace(plain, mixup=1.0)
    config = settings.config.as_configdict().copy_and_resolve_references()
    config.model.drop.update(input=0.0, output=0.0)
    settings = dataclasses.replace(Settings.of(config), augment=mixed)
    batch = _batch(parts)._replace(label=np.array([0, 1, 1, 0], np.int32))
    batch = batch._replace(mask=np.array([True, True, True, False]))
    rgb, flow = network_input(jax.tree.map(jnp.asarray, batch), settings.inputs, plain)
    share = np.asarray(mixup_shares(jnp.asarray(batch.seed), jnp.asarray(batch.mask), 1.0))
    assert (share[:2] < 1).all() and share[2] == 1
    own = share.reshape(4, 1, 1, 1, 1)
    clips = [own * x + (1 - own) * np.roll(x, -1, axis=0) for x in (rgb, flow)]
    params = _state(settings).params
    apply = jax.jit(functools.partial(settings.model(2).apply, train=False))
    logits, _ = apply({"params": params}, *clips)
    losses = -jax.nn.log_softmax(logits)
    first, second = losses[np.arange(4), batch.label], losses[np.arange(4), [1, 1, 0, 0]]
    expected = float((share * first + (1 - share) * second)[:3].mean())
    loss = float(_step(settings, _state(settings), batch)[1].loss)
    assert loss == pytest.approx(expected, rel=1e-4)
    logits, _ = apply({"params": params}, rgb, flow)
    unmixed = -jax.nn.log_softmax(logits)[np.arange(4), batch.label][:3].mean()
    assert abs(float(unmixed) - loss) > 1e-3


def _small(settings):
    """One stream, which compiles sooner, and an update that is the gradient: its size shows."""
    config = settings.config.as_configdict().copy_and_resolve_references()
    config.model.streams = "rgb"
    config.augment.label_smoothing = 0.1
    config.optimizer.update(name="sgdm", clip=0.0, ema=0.5)
    return config


@pytest.mark.parametrize("mixup", [0.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_parts_of_a_batch_add_up_to_the_batch(parts, mixup):
    """Same loss, update and sums; dropout, smoothing and filler rows included."""
    config = _small(parts[1])
    config.augment.mixup = mixup
    whole = Settings.of(config)
    config.optimizer.accumulate = 2
    batch = _batch(parts)._replace(mask=np.array([True, True, True, False]))
    found = []
    for settings in (whole, Settings.of(config)):
        state, record = _step(settings, _state(settings), batch, rate=0.1)
        found.append((_host(state.params), jax.tree.map(float, record), float(state.sums.count)))
    (one, record, count), (two, other, other_count) = found
    assert other.loss == pytest.approx(record.loss, rel=1e-5) and other_count == count == 3
    assert other.clips == record.clips == 3
    assert other.gradient_norms == pytest.approx(record.gradient_norms, rel=1e-4)
    for part, norm in record.gradient_norms.items():
        assert 0 < record.update_norms[part] == pytest.approx(0.1 * norm, rel=1e-5)
    start = _host(_state(whole).params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, start)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, two)
    largest = max(jax.tree.leaves(moved))
    assert largest > 1e-3 and max(jax.tree.leaves(apart)) < 1e-4 * largest


def test_averaged_weights_are_validated_stored_and_resumed(parts):
    """The best weights are the moving average, computed here by hand from every step's."""
    run, settings, index, records = parts
    config = _small(settings)
    config.optimizer.accumulate = 2
    config.stages.first.max_epochs = 1
    settings = Settings.of(config)
    real, seen = train.train_step, []

    def watched(state, *args, **kwargs):
        seen.append(_host(state.params))
        state, record = real(state, *args, **kwargs)
        seen.append(_host(state.params))
        return state, record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        train_stage(run, settings, "first", index, records)
    average = seen[0]
    for step, params in enumerate(seen[1::2]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
    best = run.best("first")
    _, stored, _ = best.restore(settings.abstract_params(2))
    best.close()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), average, stored)
    assert not _equal(stored, seen[-1])
    _, last, _ = _final(run, "first", settings)
    assert _equal(last.average, stored) and _equal(last.params, seen[-1])


def test_stages_hand_over_weights_and_nothing_else(parts):
    run, settings, index, records = parts
    train_stage(run, settings, "first", index, records)
    best = run.best("first")
    _, handed, _ = best.restore(settings.abstract_params(2))
    best.close()
    stamp = stamp_of(index, settings)
    state, memory = train._start(run, settings, "second", stamp, run.last("second"))
    assert _equal(state.params, handed)
    assert not _equal(state.params, settings.initial_params(settings.model(2)))
    assert memory == StageProgress() and int(state.step) == 0
    moments = [x for x in jax.tree.leaves(state.opt_state) if jnp.ndim(x)]
    assert moments and not any(np.any(x) for x in _host(moments))
    fates = json.loads(run.stage_file("second", "weights.json").read_text())
    assert {row["fate"] for row in fates.values()} == {"copied from stage 'first'"}
    scratch = json.loads(run.stage_file("first", "weights.json").read_text())
    assert {row["fate"] for row in scratch.values()} == {"initialised at random"}
    assert fates.keys() == scratch.keys()


def _final(run, name, settings):
    last = run.last(name)
    try:
        return last.restore(train.abstract_state(settings, 2, name))
    finally:
        last.close()


@pytest.mark.parametrize(
    ("crop", "asked"), [("random", True), ("corners", True), ("centre", False)]
)
def test_the_stream_moves_the_square_if_crops_move(parts, monkeypatch, crop, asked):
    run, settings, index, records = parts

    class Seen(Exception):
        pass

    def stream(*_, random_crop, **__):
        raise Seen(random_crop)

    monkeypatch.setattr(train, "batches", stream)
    settings = dataclasses.replace(
        settings, augment=dataclasses.replace(settings.augment, crop=crop)
    )
    with pytest.raises(Seen, match=str(asked)):
        train_stage(run, settings, "first", index, records)


def test_the_step_that_is_compiled_ahead_is_the_one_that_is_called(parts, monkeypatch):
    """Same shapes, dtypes, places and settings: JAX finds the program instead of making another."""
    run, settings, index, records = parts
    seen = []

    class Seen(Exception):
        pass

    def called(*arguments, **static):
        seen.append((arguments, static))
        raise Seen

    monkeypatch.setattr(train, "train_step", called)
    with pytest.raises(Seen):
        train_stage(run, settings, "first", index, records)
    ((arguments, static),) = seen
    ahead = train._step_shapes(settings, 2, "first")
    assert static == train._static(settings, "first", settings.model(2))
    kinds = [
        [(np.shape(x), jax.typeof(x).dtype, jax.typeof(x).weak_type) for x in jax.tree.leaves(a)]
        for a in (arguments, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ahead[:2]))
    ]
    assert kinds[0][: len(kinds[1])] == kinds[1]
    places = [[x.sharding for x in jax.tree.leaves(a[:2])] for a in (arguments, ahead)]
    assert places[0] == places[1]
    assert [x.dtype for x in ahead[2:]] == [arguments[2].dtype, arguments[3].dtype]


@pytest.mark.parametrize("which", ["weights", "step"])
def test_a_compiler_that_fails_ends_the_stage(parts, which):
    run, settings, index, records = parts
    done, failed = futures.Future(), futures.Future()
    done.set_result(None)
    failed.set_exception(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    ahead = train.Ahead(**{"weights": done, "step": done} | {which: failed})
    with pytest.raises(RuntimeError, match="out of memory"):
        train_stage(run, settings, "first", index, records, ahead)


@pytest.fixture
def resplit(tiny_config, tmp_path):
    """As `parts`, under the paper's protocol."""
    tiny_config.data.protocol = "paper_resplit"
    settings = Settings.of(tiny_config)
    index = load_index(settings.config.data)
    return Run(tmp_path / "run"), settings, index, prepare_records(index, settings.records)


def test_every_epoch_of_the_papers_protocol_trains_and_tests_on_its_own_split(resplit, monkeypatch):
    run, settings, index, records = resplit
    trained, tested = [], []
    real_batches, real_evaluate = train.batches, train.evaluate_subset

    def stream(records, entries, *args, **kwargs):
        trained.append({entry.video_id for entry in entries})
        return real_batches(records, entries, *args, **kwargs)

    def score(settings, params, index, records, subset):
        scores = real_evaluate(settings, params, index, records, subset)
        tested.append({entry.video_id for entry in scores.entries})
        return scores

    monkeypatch.setattr(train, "batches", stream)
    monkeypatch.setattr(train, "evaluate_subset", score)
    summary = train_stage(run, settings, "first", index, records)
    everything = {entry.video_id for entry in index.entries}
    assert len(trained) == len(tested) == summary["epochs"] == 2
    for epoch in range(2):
        view = epoch_index(index, records, 0, epoch)
        assert trained[epoch] == {entry.video_id for entry in view.subset("train")}
        assert tested[epoch] == everything - trained[epoch]
    assert trained[0] != trained[1] and len(tested[0]) == round(0.3 * len(everything))
    # The result is the last epoch's, whichever was best.
    assert summary["best_epoch"] == 2
    last = [row for row in _log(run) if row["kind"] == "validation"][-1]
    assert summary["best_top1"] == last["top1"]


@pytest.mark.parametrize("protocol", [pytest.param("parts", marks=pytest.mark.slow), "resplit"])
def test_stopping_at_any_step_and_going_on_equals_never_stopping(
    protocol, request, tmp_path, monkeypatch
):
    """Bit for bit: weights, optimiser, sums and the figures of every epoch."""
    whole, settings, index, records = request.getfixturevalue(protocol)
    train_stage(whole, settings, "first", index, records)
    broken = Run(tmp_path / "broken")
    real = train.train_step
    starts = 0
    while not broken.stage_file("first", "done.json").exists():
        starts += 1
        done = []

        def stop_after_two(*args, _done=done, **kwargs):
            _done.append(1)
            if len(_done) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(train, "train_step", stop_after_two)
        try:
            train_stage(broken, settings, "first", index, records)
        except Interrupted as stopped:
            assert stopped.signum == signal.SIGTERM
    assert starts > 2
    step, state, memory = _final(whole, "first", settings)
    other_step, other_state, other_memory = _final(broken, "first", settings)
    assert step == other_step and _equal(state, other_state)
    timeless = {"seconds": 0, "waiting_seconds": 0}
    assert memory | timeless == other_memory | timeless
    logs = [_log(run) for run in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 2 * settings.stages["first"].max_epochs
    steps = [_log(run, "steps.jsonl") for run in (whole, broken)]
    assert steps[0] == steps[1] and len(steps[0]) == step
    curves = [_curve(run, "first", "step/loss") for run in (whole, broken)]
    assert curves[0] == curves[1] and [at for at, _ in curves[0]] == list(range(1, step + 1))


def test_divided_clips_are_shorter_and_more_and_hand_on_to_whole_ones(parts, tmp_path, monkeypatch):
    """Half the frames, twice the clips: from every video two an epoch, other moments each."""
    whole, settings, index, records = parts
    config = settings.config.as_configdict().copy_and_resolve_references()
    config.stages.first.divide_clips = 2
    settings = Settings.of(config)
    seen, frames, real = [], [], train.train_step

    def watched(state, batch, *args, **kwargs):
        entry, mask, seed = (np.asarray(x) for x in (batch.entry, batch.mask, batch.seed))
        seen.append([(int(e), tuple(s)) for e, s in zip(entry[mask], seed[mask], strict=True)])
        frames.append(batch.rgb.shape[:2])
        return real(state, batch, *args, **kwargs)

    monkeypatch.setattr(train, "train_step", watched)
    summary = train_stage(whole, settings, "first", index, records)
    videos = len(usable_entries(index, records, "train"))
    assert videos == 8 and frames == [(8, 4)] * summary["steps"] and summary["steps"] == 4
    for epoch in range(2):
        clips = [clip for step in seen[2 * epoch : 2 * epoch + 2] for clip in step]
        assert sorted(entry for entry, _ in clips) == sorted([*range(videos)] * 2)
        assert len(set(clips)) == 2 * videos  # by their randomness
    rows = [row for row in _log(whole) if row["kind"] == "train"]
    assert [row["num_videos"] for row in rows] == [videos, videos]

    # Stopped and continued, it is the same to the bit, and whole clips go on from its weights.
    broken, steps = Run(tmp_path / "broken"), []

    def stopped_once(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", stopped_once)
    with pytest.raises(Interrupted):
        train_stage(broken, settings, "first", index, records)
    train_stage(broken, settings, "first", index, records)
    assert len(steps) == 4
    ends = [_final(run, "first", settings)[1] for run in (whole, broken)]
    assert _equal(*ends)
    monkeypatch.setattr(train, "train_step", watched)
    frames.clear()
    train_stage(whole, settings, "second", index, records)
    assert set(frames) == {(4, 8)}


@pytest.mark.parametrize(
    "changes, allowed",
    [
        ({}, "1, 2"),  # 8 frames: 4 of them fill a window, 2 cannot be divided into 4 bins
        ({"model.tpn.levels": (1,)}, "1, 2, 4"),
        ({"model.tpn.levels": (1,), "model.tpn.window": 6, "model.tpn.stride": 2}, "1, 2, 4"),
        ({"model.architecture": "cnn_lstm", "model.streams": "rgb"}, "1, 2, 4"),
        (
            {"model.architecture": "c3d", "model.streams": "rgb"},
            "1, 2, 4",
        ),  # one step is left of all
        ({"model.architecture": "c3d", "model.streams": "rgb", "sampling.num_frames": 24}, "1"),
    ],
)
def test_divided_clips_must_fit_the_network(tiny_config, changes, allowed):
    tiny_config.update_from_flattened_dict(changes)
    for parts in range(2, 9):
        tiny_config.stages.first.divide_clips = parts
        if str(parts) in allowed.split(", "):
            Settings.of(tiny_config)
            continue
        with pytest.raises(ValueError, match="first.divide_clips: got") as error:
            Settings.of(tiny_config)
        assert f"allowed: {allowed} (" in str(error.value)


def _log(run, name="metrics.jsonl"):
    rows = [json.loads(line) for line in (run.workdir / name).read_text().splitlines()]
    measured = ("seconds", "waiting_seconds", "clips_per_second", "waiting_share", "memory_mb")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def _events(run, stage):
    folder = run.workdir / "tensorboard" / stage
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def _curve(run, stage, tag):
    return [(event.step, event.value) for event in _events(run, stage).Scalars(tag)]


def test_a_torn_line_and_what_will_be_done_again_leave_the_log(parts):
    """A kill in mid-write leaves half a line, one before a save leaves rows of steps undone."""
    run, settings, index, records = parts
    run.workdir.mkdir(parents=True)
    log = run.workdir / "metrics.jsonl"
    earlier = '{"stage": "zeroth", "step": 9}'
    log.write_text(f'{earlier}\n{{"stage": "first", "step": 3}}\n{{"stage": "fi')
    train_stage(run, settings, "first", index, records)
    first, *rows = log.read_text().splitlines()
    assert first == earlier
    assert len(rows) == 2 * settings.stages["first"].max_epochs
    assert [json.loads(row)["epoch"] for row in rows] == [1, 1, 2, 2]


def test_a_second_signal_acts_at_once(request):
    # Python's own, also where a shell has started the tests in the background, deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        with train.stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_names_step_and_videos(parts, monkeypatch):
    run, settings, index, records = parts
    real = train.train_step

    def poisoned(state, batch, *args, **kwargs):
        state, record = real(state, batch, *args, **kwargs)
        return state, record.replace(loss=record.loss * np.float32("nan"))

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(FloatingPointError) as error:
        train_stage(run, settings, "first", index, records)
    assert "step 0" in str(error.value) and ".mp4" in str(error.value)


def test_the_stop_rule_by_hand():
    memory = StageProgress()
    outcomes = []
    for epoch, (top1, loss) in enumerate(
        [(0.5, 1.0), (0.6, 1.1), (0.6, 0.9), (0.6, 0.95), (0.55, 0.5)], 1
    ):
        memory.epoch = epoch
        outcomes.append(memory.update(top1, loss, min_delta=0.01))
    # Equal accuracy with a lower loss is better, but no rise.
    assert outcomes == [True, True, True, False, False]
    assert (memory.best_epoch, memory.best_top1, memory.best_loss) == (3, 0.6, 0.9)
    assert memory.plateau_epochs == 3


def test_a_stage_ends_when_validation_settles(parts):
    run, settings, index, records = parts
    config = settings.config.as_configdict().copy_and_resolve_references()
    config.stages.first.update(max_epochs=9, patience=2, learning_rate=0.0)
    summary = train_stage(run, Settings.of(config), "first", index, records)
    assert summary["epochs"] == 3 and "settled" in summary["stopped"]
    # A second call has nothing to do.
    assert train_stage(run, Settings.of(config), "first", index, records) == summary


def test_the_steps_of_ucf101_can_be_built_for_a_gpu():
    """Lowered, not run: no GPU is needed to see that nothing in them is for CPUs only."""
    settings = Settings.of(ucf101.get_config())
    size, side = settings.config.batch_size, settings.records.size
    clip = (size, settings.sampling.num_frames, side, side)
    shape = jax.ShapeDtypeStruct
    batch = Batch(
        rgb=shape((*clip, 3), jnp.uint8),
        flow=shape((*clip[:2], 8, *clip[2:]), jnp.uint8),
        label=shape((size,), jnp.int32),
        mask=shape((size,), jnp.bool_),
        entry=shape((size,), jnp.int32),
        seed=shape((size, 2), jnp.uint32),
    )
    state = abstract_state(settings, 101, "first")
    key = jax.eval_shape(lambda: jax.random.key(0))
    static = {"model": settings.model(101), "inputs": settings.inputs}
    training = {"optimizer": settings.optimizer, "mesh": settings.mesh}
    training |= {"augment": settings.augment, "rates": settings.stages["first"].rates}
    step = jax.export.export(train_step, platforms=["cuda"])(
        state, batch, key, shape((), jnp.float32), **static, **training
    )
    scoring = jax.export.export(score_batch, platforms=["cuda"])(state.params, batch, **static)
    assert step.platforms == scoring.platforms == ("cuda",)
    # 39 convolutions; their two gradients each, but for the inputs of the two first ones.
    assert scoring.mlir_module().count("stablehlo.convolution") == 39
    assert step.mlir_module().count("stablehlo.convolution") == 3 * 39 - 2


def test_the_norms_of_a_step_are_those_of_gradient_and_update(parts):
    """Against what the step leaves behind: its parameters, and Adam's first moment."""
    settings = parts[1]
    assert settings.optimizer.name == "adam"
    state, rate = _state(settings), 1e-3
    before = _host(state.params)
    state, record = _step(settings, state, _batch(parts), rate=rate)
    record = jax.tree.map(float, record)
    after, moment = _host(state.params), _host(optax.tree.get(state.opt_state, "mu"))

    def norm(tree):
        return np.sqrt(
            sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree))
        )

    whole = np.sqrt(sum(value**2 for value in record.gradient_norms.values()))
    clipped = min(1.0, (settings.optimizer.clip or np.inf) / whole)
    assert set(record.gradient_norms) == set(record.update_norms) == set(before)
    for part in before:
        # Adam keeps a tenth of the first gradient, which was clipped before.
        gradient = norm(moment[part]) / 0.1 / clipped
        assert record.gradient_norms[part] == pytest.approx(gradient, rel=1e-4)
        change = norm(jax.tree.map(lambda a, b: a.astype(float) - b, after[part], before[part]))
        assert record.update_norms[part] == pytest.approx(change, rel=1e-3)
    assert record.clips == 4 and len(set(record.gradient_norms.values())) == len(before)


def test_a_stage_shows_curves_clips_and_a_trace(parts, capsys):
    run, settings, index, records = parts
    profiler = Profiler(2)
    train_stage(run, settings, "first", index, records, profiler=profiler)
    profiler.conclude()
    folder = run.workdir / "tensorboard" / "first"
    events = _events(run, "first")
    rows = [json.loads(line) for line in (run.workdir / "steps.jsonl").read_text().splitlines()]
    steps = 2 * steps_per_epoch(len(usable_entries(index, records, "train")), 4)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for tag, key in (("step/loss", "loss"), ("step/learning rate", "learning_rate")):
        curve = [(row["step"], pytest.approx(row[key])) for row in rows]
        assert _curve(run, "first", tag) == curve
    parts_of_network = ("spatial", "temporal", "fusion", "recurrent", "head")
    norms = {f"{kind} norm/{p}" for kind in ("gradient", "update") for p in parts_of_network}
    assert norms <= set(events.Tags()["scalars"])
    for row in _log(run):
        (event,) = [e for e in events.Scalars(f"epoch top1/{row['kind']}") if e.step == row["step"]]
        assert event.value == pytest.approx(row["top1"])
    clips = [tag for tag in events.Tags()["images"] if tag.startswith("clips/")]
    assert len(clips) == 3 and len(events.Images("confusion matrix")) == 2
    # The epoch's accuracy so far is, after its last step, the epoch's.
    assert rows[-1]["top1"] == [r for r in _log(run) if r["kind"] == "train"][-1]["top1"]
    assert rows[-1]["clips_per_second"] > 0 and 0 <= rows[-1]["waiting_share"] < 1
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    assert str(trace) in capsys.readouterr().out
    traced = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    marks = [event for event in traced if event.get("name") == "train"]
    # The first two steps of a start, one of them compiled, are left out.
    assert [int(mark["args"]["step_num"]) for mark in marks] == [2, 3]
    calls = [event for event in traced if "train_step" in event.get("name", "")]
    assert any(m["ts"] <= c["ts"] <= m["ts"] + m["dur"] for m in marks for c in calls)


def test_a_start_too_short_for_a_trace_says_so(capsys):
    profiler = Profiler(3)
    for step in range(2):
        with profiler.step(Path("nowhere"), step):
            pass
    profiler.close()
    profiler.conclude()
    assert "nothing was traced: this start did 2 training steps" in capsys.readouterr().out
