import csv
import dataclasses
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from stf_jax.datasets import load_index
from stf_jax.evaluate import (
    Scorer,
    _viewed,
    evaluate,
    evaluate_subset,
    score_batch,
    worth_showing,
    write_samples,
)
from stf_jax.inputs import Batch, network_input
from stf_jax.main import run_experiment
from stf_jax.model import fold_pyramid
from stf_jax.pipeline import batches, decode_clip, planned_batches, steps_per_epoch
from stf_jax.predict import Predictor
from stf_jax.prepare import encode_video
from stf_jax.records import prepare_records
from stf_jax.run import Run, Settings, usable_entries
from stf_jax.scores import all_figures
from stf_jax.views import plan_clips


@pytest.fixture
def parts(tiny_config):
    settings = Settings.of(tiny_config)
    index = load_index(settings.config.data)
    records = prepare_records(index, settings.records)
    return settings, index, records, settings.initial_params(settings.model(2))


def _with(settings: Settings, **changes) -> Settings:
    """The settings with others, by dotted names."""
    config = settings.config.as_configdict().copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return Settings.of(config)


def test_the_batch_size_does_not_change_a_score(parts):
    settings, index, records, params = parts
    results = []
    for size in (3, 4):
        settings = _with(settings, batch_size=size)
        # The clips of a video lie in other batches each time.
        views = dataclasses.replace(settings.eval, num_clips=2, num_crops=3)
        scores = evaluate_subset(settings, params, index, records, "test", views=views)
        assert scores.entries == tuple(usable_entries(index, records, "test"))
        results.append(scores)
    one, other = results
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)
    np.testing.assert_allclose(one.views.probabilities, other.views.probabilities, atol=1e-6)
    # They are scores of these views, not one score repeated.
    rows = one.views.probabilities
    assert len(rows) == 6 * len(one.entries)
    assert len(np.unique(rows.round(6), axis=0)) == len(rows)


def _stored(records, entry, settings, wanted) -> Batch:
    """Chosen frames of one video as a batch of one, read without the pipeline."""
    example = records.parse(tf.constant(records.read(records.rows[entry.video_id].record)))
    rgb, flow = decode_clip(
        example["frames"], example["flow"], tf.constant(wanted), settings.sampling, records.settings
    )
    return Batch(
        rgb.numpy()[None], flow.numpy()[None], np.zeros(1, np.int32), np.ones(1, bool),
        np.zeros(1, np.int32), np.zeros((1, 2), np.uint32),
    )  # fmt: skip


def test_views_are_what_cutting_and_turning_by_hand_gives(parts):
    """Frames chosen, windows cut and clips mirrored in numpy, then scored one at a time."""
    settings, index, records, params = parts
    views = dataclasses.replace(settings.eval, num_clips=2, num_crops=5, flip=True)
    scores = evaluate_subset(settings, params, index, records, "test", views=views)
    entries = scores.entries[:2]
    model, folded = fold_pyramid(settings.model(2), params)
    frames, wanted = settings.sampling.num_frames, []
    for video, entry in enumerate(entries):
        total = records.rows[entry.video_id].num_frames
        for clip in range(2):
            numbers = [(2 * k + clip) * total // (2 * frames) for k in range(frames)]
            stored = _stored(records, entry, settings, numbers)
            for top, left in ((0, 0), (0, 4), (2, 2), (4, 0), (4, 4)):  # of 36 px, 32 are seen
                rgb = stored.rgb[:, :, top : top + 32, left : left + 32]
                flow = stored.flow[..., top : top + 32, left : left + 32]
                wanted.append((video, stored._replace(rgb=rgb, flow=flow)))
                turned = flow[..., ::-1].copy()
                turned[:, :, ::2] = 255 - turned[:, :, ::2]
                turned = stored._replace(rgb=rgb[:, :, :, ::-1], flow=turned)
                wanted.append((video, turned))
    by_hand = np.stack([
        np.asarray(score_batch(folded, batch, model=model, inputs=settings.inputs))[0]
        for _, batch in wanted
    ])  # fmt: skip
    order = np.lexsort(
        (scores.views.mirrored, scores.views.crop, scores.views.clip, scores.views.video)
    )
    given = scores.views.probabilities[order][: len(by_hand)]
    np.testing.assert_allclose(given, by_hand, atol=1e-5)
    means = by_hand.reshape(2, 20, 2).mean(axis=1)
    np.testing.assert_allclose(scores.probabilities[:2], means, atol=1e-5)
    videos, clips = scores.clips()
    first = clips[np.flatnonzero(videos == 0)]
    np.testing.assert_allclose(first, by_hand[:20].reshape(2, 10, 2).mean(axis=1), atol=1e-5)


def test_crops_of_frames_that_kept_their_aspect_reach_their_ends(tiny_config, tmp_path):
    """48x64 px stored as 36x48: the windows of 32 px begin at columns 0, 8 and 16."""
    tiny_config.records.update(resize="short_side", root=str(tmp_path / "records"))
    settings = Settings.of(tiny_config)
    index = load_index(settings.config.data)
    records = prepare_records(index, settings.records)
    entries = usable_entries(index, records, "test")[:1]
    whole = _whole_frames(records, entries[0])
    assert whole.shape[1:3] == (36, 48)
    seen = _seen(settings, records, entries, num_crops=3)
    for window, left in zip(seen, (0, 8, 16), strict=True):
        np.testing.assert_array_equal(window, whole[:, 2:34, left : left + 32])
    seen = _seen(settings, records, entries, num_crops=5)
    corners = ((0, 0), (0, 16), (2, 8), (4, 0), (4, 16))
    for window, (top, left) in zip(seen, corners, strict=True):
        np.testing.assert_array_equal(window, whole[:, top : top + 32, left : left + 32])


def _whole_frames(records, entry) -> np.ndarray:
    example = records.parse(tf.constant(records.read(records.rows[entry.video_id].record)))
    data = [tf.io.decode_jpeg(f, 3, dct_method="INTEGER_ACCURATE") for f in example["frames"]]
    return np.stack(data)


def _seen(settings, records, entries, **views) -> list[np.ndarray]:
    """All frames of the first clip's windows, as bytes, that a network would see of a video."""
    total = records.rows[entries[0].video_id].num_frames
    sampling = dataclasses.replace(settings.sampling, num_frames=total)
    plan = plan_clips(
        [0], np.array([False]), dataclasses.replace(settings.eval, **views), aspect_kept=True
    )
    inputs = dataclasses.replace(settings.inputs, rgb_preprocess="zero_one")
    windows = []
    for batch in planned_batches(records, entries, sampling, plan, batch_size=1):
        (place,) = plan.windows_of(batch.entry)
        batch = jax.tree.map(jnp.asarray, batch)
        rgb, _ = network_input(batch, inputs, None, jnp.asarray(place))
        windows.append(np.rint(255 * np.asarray(rgb[0])).astype(np.uint8))
    return windows


def test_drawn_clips_are_averaged_and_every_draw_is_another(parts):
    settings, index, records, params = parts
    one, two, four = (
        evaluate_subset(
            settings, params, index, records, "test",
            views=dataclasses.replace(settings.eval, repeats=n),
        )
        for n in (1, 2, 4)
    )  # fmt: skip
    videos = len(one.entries)
    assert np.abs(one.probabilities - two.probabilities).max() > 0
    drawn = four.views.probabilities.reshape(4, videos, 2)
    assert len(np.unique(drawn.round(7), axis=0)) == 4
    np.testing.assert_allclose(drawn.mean(axis=0), four.probabilities, atol=1e-6)
    # The draws of fewer are the first ones of more, whatever batches they lie in.
    np.testing.assert_allclose(drawn[:2].mean(axis=0), two.probabilities, atol=1e-6)
    other = _with(settings, seed=1)
    views = dataclasses.replace(settings.eval, repeats=2)
    again = evaluate_subset(other, params, index, records, "test", views=views)
    assert np.abs(again.probabilities - two.probabilities).max() > 0
    # They are the clips that training draws in its epochs.
    entries = usable_entries(index, records, "test")
    epoch = steps_per_epoch(videos, 4)
    training = batches(
        records, entries, settings.sampling, batch_size=4, train=True, stop_step=2 * epoch
    )
    model, folded = fold_pyramid(settings.model(2), params)
    for number, batch in enumerate(training):
        found = score_batch(folded, batch, model=model, inputs=settings.inputs)
        same = drawn[number // epoch, batch.entry[batch.mask]]
        np.testing.assert_allclose(found[batch.mask], same, atol=1e-6)


def test_each_class_is_classified_as_often_as_asked(parts):
    """Table 3 of the paper: the fewer videos a class has, the more clips of each are drawn."""
    settings, index, records, params = parts
    gone = [entry.video_id for entry in index.subset("test") if entry.label == 0][1:]
    few = tuple(entry for entry in index.entries if entry.video_id not in gone)
    index = dataclasses.replace(index, entries=few)
    views = dataclasses.replace(settings.eval, min_per_class=5)
    scores = evaluate_subset(settings, params, index, records, "test", views=views)
    rest = len(scores.entries) - 1
    assert [e.label for e in scores.entries] == [0] + rest * [1]
    facts = all_figures(scores, bins=5, seed=0, groups_known=True)
    each = -(-5 // rest)
    assert facts["clip_level"]["counts"] == [5, rest * each]
    assert facts["counts"] == [1, rest] and facts["num_videos"] == 1 + rest
    assert facts["clip_level"]["num_clips"] == 5 + rest * each
    # The same videos get the same draws when others ask for more of theirs.
    views = dataclasses.replace(settings.eval, repeats=5)
    more = evaluate_subset(settings, params, index, records, "test", views=views)
    np.testing.assert_allclose(scores.probabilities[0], more.probabilities[0], atol=1e-6)


def test_streams_of_two_networks_are_scored_apart(parts):
    settings, index, records, params = parts
    # One network of both streams: what the fusion does not weigh might as well be zeros.
    views = dataclasses.replace(settings.eval, each_stream=True)
    scores = evaluate_subset(settings, params, index, records, "test", views=views)
    assert set(scores.streams) == {"without_flow", "without_rgb"}
    facts = all_figures(scores, bins=5, seed=0, groups_known=True)
    assert all(told["what"].startswith("ablation") for told in facts["streams"].values())
    model, folded = fold_pyramid(settings.model(2), params)
    batch = next(batches(records, scores.entries, settings.sampling, batch_size=4, train=False))
    kernel = folded["fusion"]["conv"]["kernel"]
    half = kernel.shape[3] // 2
    for name, left_out in (("without_flow", np.s_[half:]), ("without_rgb", np.s_[:half])):
        deaf = kernel.at[..., left_out, :].set(0)
        conv = {**folded["fusion"]["conv"], "kernel": deaf}
        changed = {**folded, "fusion": {"conv": conv}}
        alone = score_batch(changed, batch, model=model, inputs=settings.inputs)[batch.mask]
        given = scores.streams[name].probabilities[: len(alone)]
        np.testing.assert_allclose(alone, given, atol=1e-6)
        assert np.abs(given - scores.probabilities[: len(alone)]).max() > 1e-4
    plain = evaluate_subset(settings, params, index, records, "test")
    np.testing.assert_allclose(plain.probabilities, scores.probabilities, atol=1e-6)
    assert not plain.streams


def test_both_networks_of_late_fusion_are_scored_with_their_mean(parts):
    settings, index, records, _ = parts
    late = _with(settings, **{"model.streams": "late"})
    params = late.initial_params(late.model(2))
    scores = evaluate_subset(late, params, index, records, "test")
    assert set(scores.streams) == {"rgb", "flow"}
    each = [scores.streams[name].probabilities for name in ("rgb", "flow")]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(np.mean(each, axis=0), scores.probabilities, atol=1e-6)
    alone = _with(settings, **{"model.streams": "rgb"})
    own = evaluate_subset(alone, params["rgb"], index, records, "test")
    np.testing.assert_allclose(own.probabilities, each[0], atol=1e-6)


@pytest.mark.parametrize("streams", ["rgb", "flow"])
def test_streams_of_a_network_that_has_one_are_refused(parts, streams):
    settings, *_ = parts
    with pytest.raises(
        ValueError, match=rf"eval.each_stream .*--streams.*model.streams='{streams}"
    ):
        _viewed(_with(settings, **{"model.streams": streams}), {"each_stream": True})
    # A card may say it: it has nothing to do without then, and a study is of both kinds.
    _with(settings, **{"model.streams": streams, "eval.each_stream": True})
    _viewed(_with(settings, **{"model.streams": "late"}), {"each_stream": True})


def test_every_clip_counts_exactly_once(parts):
    settings, index, records, params = parts
    entries = usable_entries(index, records, "train")
    labels = [entry.label for entry in entries]
    plan = plan_clips(labels, np.zeros(len(labels), bool), settings.eval, aspect_kept=False)
    stream = list(planned_batches(records, entries, settings.sampling, plan, batch_size=4))
    model, folded = fold_pyramid(settings.model(2), params)
    scorer = Scorer(model, folded, settings.inputs, settings.records, settings.mesh)
    missing = entries[4 * (len(stream) - 1)].video_id
    with pytest.raises(ValueError, match=f"{missing} was left out"):
        evaluate(scorer, stream[:-1], plan, entries)
    with pytest.raises(ValueError, match=f"{entries[0].video_id} came twice"):
        evaluate(scorer, [*stream, stream[0]], plan, entries)


def test_batches_do_not_pile_up(parts):
    """However many views there are, a few batches are in memory."""
    settings, index, records, params = parts
    entries = usable_entries(index, records, "test")
    labels = [entry.label for entry in entries]
    views = dataclasses.replace(settings.eval, num_clips=16)
    plan = plan_clips(labels, np.zeros(len(labels), bool), views, aspect_kept=False)
    made, most = [], 0

    def watched():
        nonlocal most
        for batch in planned_batches(records, entries, settings.sampling, plan, batch_size=4):
            batch = jax.tree.map(np.copy, batch)
            made.append(weakref.ref(batch.rgb))
            most = max(most, sum(old() is not None for old in made))
            yield batch

    model, folded = fold_pyramid(settings.model(2), params)
    scorer = Scorer(model, folded, settings.inputs, settings.records, settings.mesh)
    evaluate(scorer, watched(), plan, entries)
    assert len(made) == 4 * len(entries) >= 12 and most <= 4


def test_an_empty_subset_is_named(parts):
    settings, index, records, params = parts
    bare = dataclasses.replace(index, entries=index.subset("train"))
    with pytest.raises(ValueError, match="test subset of .* holds no usable video"):
        evaluate_subset(settings, params, bare, records, "test")


def test_prediction_of_a_file_gives_the_score_of_the_evaluation(parts):
    settings, index, records, params = parts
    scores = evaluate_subset(settings, params, index, records, "test")
    predictor = Predictor(settings, index.class_names, settings.model(2), params)
    for entry, row in zip(scores.entries, scores.probabilities, strict=True):
        prediction = predictor.predict(index.path(entry))
        np.testing.assert_allclose(prediction.probabilities, row, atol=1e-6)


def test_a_video_of_one_frame_can_be_predicted(parts, make_video, tmp_path):
    settings, index, _, params = parts
    predictor = Predictor(settings, index.class_names, settings.model(2), params)
    path = make_video(tmp_path / "one.mp4", frames=1)
    assert len(encode_video(path, settings.records).flow) == 0
    assert predictor.predict(path).probabilities.sum() == pytest.approx(1.0, abs=1e-5)


def test_samples_hold_what_the_network_saw(parts, tmp_path):
    settings, index, records, params = parts
    scores = evaluate_subset(settings, params, index, records, "test")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "old.npz").touch()
    write_samples(tmp_path / "samples", settings, records, scores, count=2)
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["0.npz", "1.npz"]
    ids = set()
    for path in files:
        with np.load(path, allow_pickle=False) as sample:
            ids.add(str(sample["video_id"]))
            assert sample["frames"].shape == (8, 36, 36, 3) and sample["frames"].dtype == np.uint8
            assert sample["flow"].shape == (8, 36, 36, 2)
            assert np.abs(sample["flow"]).max() <= settings.records.flow_bound * 1.01
    assert len(ids) == 2 and ids <= {entry.video_id for entry in index.subset("test")}


def test_the_worst_mistakes_and_one_of_each_class_are_shown():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    called = np.array([0, 1, 1, 1, 0, 0, 2, 2])
    sure = np.array([0.9, 0.6, 0.7, 0.5, 0.8, 0.95, 0.4, 0.4])
    probabilities = np.repeat((1 - sure[:, None]) / 2, 3, axis=1)
    probabilities[np.arange(8), called] = sure
    # Mistakes: 5 (0.95), 4 (0.8), 2 (0.7), 1 (0.6); 2 and 1 are the commonest pair, 0 called 1.
    assert worth_showing(probabilities, labels, 8) == [5, 2, 4, 1, 0, 3]
    assert worth_showing(probabilities, labels, 4) == [5, 2, 0, 3]
    right = np.eye(3)[labels]
    assert worth_showing(right, labels, 8) == [0, 3, 5]


def test_a_whole_run_without_stored_flow(tiny_config, tmp_path):
    """Training, evaluation, samples and prediction compute TV-L1 from the frames they read."""
    tiny_config.records.update(flow_source="online", flow_algorithm="tvl1", flow_size=36)
    tiny_config.records.tvl1.update(coarsest=36, iterations=5)  # compiled in a moment
    for stage in tiny_config.stages.values():
        stage.max_epochs = 1
    workdir = tmp_path / "run"
    results = run_experiment(tiny_config, workdir, "test", {})
    stamp = Run(workdir).read_json("data.json")["records"]
    assert (stamp["flow_source"], stamp["flow_algorithm"]) == ("online", "tvl1")
    assert stamp["tvl1"]["iterations"] == 5
    with np.load(workdir / "samples" / "0.npz") as sample:
        assert 0.05 < np.hypot(*np.moveaxis(sample["flow"], -1, 0)).mean() < 3  # px, not grey
    predictor = Predictor.load(workdir)
    root = Path(tiny_config.data.root)
    with open(workdir / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == results["num_videos"]
    for row in rows[:2]:
        scores = predictor.predict(root / row["video_id"]).probabilities
        written = [float(row[name]) for name in predictor.class_names]
        np.testing.assert_allclose(scores, written, atol=1e-5)
