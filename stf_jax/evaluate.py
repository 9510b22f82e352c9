"""Scoring videos with a trained network: one pure function that everything calls."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from stf_jax import progress
from stf_jax.checkpoint import Params
from stf_jax.datasets import load_index
from stf_jax.index import ClipEntry, VideoIndex
from stf_jax.inputs import (
    Batch,
    InputSettings,
    compute_flow,
    flow_to_pixels,
    network_input,
)
from stf_jax.model import STREAMS, ActionNetwork, LateFusion, Network, fold_pyramid
from stf_jax.parallel import COMPILER_OPTIONS, divide, divided_ahead, gather, part_of_batch, place
from stf_jax.pipeline import batches, planned_batches, steps_per_epoch
from stf_jax.prepare import RecordSettings
from stf_jax.records import Records, prepare_records
from stf_jax.run import (
    Run,
    Settings,
    TrainedOn,
    described,
    of_known_classes,
    scored_index,
    stage_params,
    stamp_of,
    usable_entries,
    with_source,
)
from stf_jax.scores import Scores, Views, all_figures
from stf_jax.views import ClipPlan, EvalSettings, is_upright, one_view, plan_clips

# The name of the scores of all streams together.
_WHOLE = "fused"


def _apply(
    params: Params,
    batch: Batch,
    window: Array | None,
    model: Network,
    inputs: InputSettings,
    mirrored: bool,
) -> Any:
    rgb, flow = network_input(batch, inputs, None, window, mirrored=mirrored)
    return model.apply({"params": params}, rgb, flow, train=False)


def _softmax(logits: Array) -> Array:
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


@functools.partial(
    jax.jit, static_argnames=("model", "inputs", "mirrored"), compiler_options=COMPILER_OPTIONS
)
def score_batch(
    params: Params,
    batch: Batch,
    window: Int[Array, "b 2"] | None = None,
    *,
    model: Network,
    inputs: InputSettings,
    mirrored: bool = False,
) -> Float[Array, "b k"]:
    """Class probabilities of each clip of a batch.

    Args:
      params: of the network.
      batch: clips, their flow computed.
      window: which window of them is seen; see `network_input`.
      model: the network.
      inputs: how clips become network input.
      mirrored: whether they are mirrored.
    """
    return _softmax(_apply(params, batch, window, model, inputs, mirrored)[0])


@functools.partial(
    jax.jit, static_argnames=("model", "inputs", "mirrored"), compiler_options=COMPILER_OPTIONS
)
def score_streams(
    params: Params,
    batch: Batch,
    window: Int[Array, "b 2"] | None = None,
    *,
    model: LateFusion | ActionNetwork,
    inputs: InputSettings,
    mirrored: bool = False,
) -> dict[str, Float[Array, "b k"]]:
    """As `score_batch`, and what single streams say.

    Of late fusion the probabilities of both networks, 'rgb' and 'flow'; of a network that fuses
    maps 'without_flow' and 'without_rgb' (`ActionNetwork.without`).
    """
    logits, features = _apply(params, batch, window, model, inputs, mirrored)
    if isinstance(model, LateFusion):
        each = {name: features[f"{name}_logits"] for name in STREAMS}
    else:
        each = {
            f"without_{name}": model.apply({"params": params}, features, name, method="without")
            for name in STREAMS
        }
    return {name: _softmax(scores) for name, scores in {_WHOLE: logits, **each}.items()}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A network and what it is shown.

    Args:
      model: the network.
      params: its parameters, on the devices.
      inputs: how clips become network input.
      stored: how the records hold them.
      mesh: the devices that batches are divided among.
      each_stream: whether a network of both streams is also scored without either.
    """

    model: Network
    params: Params
    inputs: InputSettings
    stored: RecordSettings
    mesh: Mesh
    each_stream: bool = False

    def views(
        self, batch: Batch, windows: Sequence[np.ndarray | None], mirrored: Sequence[bool]
    ) -> dict[str, list[Array]]:
        """Scores the views of a batch: of each stream those of each window, mirrored in turn.

        Args:
          batch: clips, divided among the devices.
          windows: each an int32 `b 2` for the clips of this process, or None for the centre.
          mirrored: see `ClipPlan`.
        """
        batch = compute_flow(batch, self.stored)
        scores: dict[str, list[Array]] = {}
        for window, turn in itertools.product(windows, mirrored):
            # What has its usual value is not named: the usual view is the program that predictions
            # run, compiled once.
            told: dict[str, Any] = {"model": self.model, "inputs": self.inputs}
            if window is not None:
                told["window"] = divide(window, self.mesh)
            if turn:
                told["mirrored"] = True
            for name, probabilities in self._streams(batch, told).items():
                scores.setdefault(name, []).append(probabilities)
        return scores

    def _streams(self, batch: Batch, told: dict[str, Any]) -> dict[str, Array]:
        two_streams = isinstance(self.model, ActionNetwork) and self.model.sees_both
        if isinstance(self.model, LateFusion) or (self.each_stream and two_streams):
            return score_streams(self.params, batch, **told)
        return {_WHOLE: score_batch(self.params, batch, **told)}


def evaluate(
    scorer: Scorer, stream: Iterable[Batch], plan: ClipPlan, entries: Sequence[ClipEntry]
) -> Scores:
    """Scores every clip of a plan exactly once, one batch at a time.

    Args:
      scorer: the network.
      stream: the clips of the plan in batches, or this process's part of each; masked rows are
        left out.
      plan: what to score.
      entries: what `ClipPlan.entry` points into.

    Returns:
      The scores, independent of batch size and order, in every process.

    Raises:
      ValueError: a clip is missing or comes twice (names its video).
    """
    rows: dict[str, np.ndarray] = {}
    seen = np.zeros(len(plan), int)
    for local, batch in divided_ahead(stream, scorer.mesh):
        scores = scorer.views(batch, plan.windows_of(np.asarray(local.entry)), plan.mirrored)
        scores, numbers, mask = gather((scores, batch.entry, batch.mask))
        numbers = numbers[mask]
        np.add.at(seen, numbers, 1)
        for name, parts in scores.items():
            if name not in rows:
                shape = len(plan), len(parts), parts[0].shape[1]
                rows[name] = np.empty(shape, np.float32)
            rows[name][numbers] = np.stack([part[mask] for part in parts], axis=1)
    for wrong, told in ((seen > 1, "came twice in one"), (seen < 1, "was left out of the")):
        for number in np.flatnonzero(wrong):
            raise ValueError(f"{entries[plan.entry[number]].video_id} {told} evaluation")
    parts = {name: _scores(plan, entries, found) for name, found in rows.items()}
    whole = parts.pop(_WHOLE)
    return dataclasses.replace(whole, streams=parts)


def _scores(
    plan: ClipPlan, entries: Sequence[ClipEntry], found: Float32[np.ndarray, "n v k"]
) -> Scores:
    """The scores of the views of each clip of a plan, windows in order and mirrored in turn."""
    turns = len(plan.mirrored)
    count, each, _ = found.shape
    views = Views(
        video=np.repeat(plan.entry, each),
        clip=np.repeat(plan.clip, each),
        crop=np.repeat(plan.crop.reshape(-1), turns),
        mirrored=np.tile(np.array(plan.mirrored), count * each // turns),
        probabilities=rearrange(found, "n v k -> (n v) k"),
    )
    return Scores.of_views(entries, views)


def evaluate_subset(
    settings: Settings,
    params: Params,
    index: VideoIndex,
    records: Records,
    subset: str,
    *,
    views: EvalSettings | None = None,
    show_progress: bool = False,
) -> Scores:
    """Scores the usable videos of one subset of an index.

    Args:
      settings: the run's settings.
      params: parameters of its network.
      index: the videos.
      records: their stored frames and flow.
      subset: of the index.
      views: what of each video is scored; None is its one deterministic clip.
      show_progress: whether to show a bar.
    """
    entries = usable_entries(index, records, subset)
    if not entries:
        raise ValueError(f"the {subset} subset of {index.root} holds no usable video")
    views = views or one_view(settings.eval)
    size = settings.config.batch_size
    stored = [records.rows[entry.video_id] for entry in entries]
    plan = plan_clips(
        [entry.label for entry in entries],
        is_upright([row.width for row in stored], [row.height for row in stored]),
        views,
        aspect_kept=settings.records.resize == "short_side" and views.num_crops > 1,
    )
    stream: Iterable[Batch] = planned_batches(
        records,
        entries,
        settings.sampling,
        plan,
        batch_size=size,
        seed=settings.config.seed,
        part=part_of_batch(settings.mesh.devices, jax.process_index()),
    )
    if show_progress:
        total = steps_per_epoch(len(plan), size)
        stream = progress.bar(stream, total=total, description=f"score {subset}", unit="batch")
    model, params = fold_pyramid(settings.model(len(index.class_names)), params)
    scorer = Scorer(
        model=model,
        params=place(params, settings.mesh),
        inputs=settings.inputs,
        stored=settings.records,
        mesh=settings.mesh,
        each_stream=views.each_stream,
    )
    # An iterator: whoever looks into a bar to see what it holds takes its first batch away.
    return evaluate(scorer, iter(stream), plan, entries)


def score_run(
    run: Run,
    settings: Settings,
    index: VideoIndex,
    records: Records,
    subset: str = "test",
    *,
    stamp: Mapping[str, Any],
    allow: Collection[str],
    stage: str = "",
    checkpoint: str = "best",
) -> Scores:
    """Scores a subset with the weights of a run, as its settings say (`eval`).

    Args:
      run: the run.
      settings: its settings.
      index: the videos.
      records: their stored frames and flow.
      subset: of the index.
      stamp: what the weights must have been trained with (`run.stamp_of`).
      allow: in what they may differ from it.
      stage: whose weights; '' is the last stage's.
      checkpoint: which of them: see `run.stage_params`.

    Raises:
      FileNotFoundError: there are no such weights.
      ValueError: they were trained with another split, other classes or other flow.
    """
    stage = stage or settings.evaluated_stage
    params = stage_params(run, settings, stage, checkpoint, stamp, allow)
    return evaluate_subset(
        settings, params, index, records, subset, views=settings.eval, show_progress=True
    )


def run_figures(settings: Settings, index: VideoIndex, scores: Scores) -> dict[str, Any]:
    """The figures of a run's scores, and how its videos were viewed."""
    seed = settings.config.seed
    figures = all_figures(
        scores,
        bins=settings.eval.calibration_bins,
        seed=seed,
        groups_known=index.overlap is not None,
    )
    views = {
        "summary": settings.eval.summary(),
        **dataclasses.asdict(settings.eval),
        "seed": seed,
    }
    return {**figures, "views": views}


def score_again(
    run: Run,
    *,
    subset: str,
    changes: Mapping[str, Any],
    allow: Collection[str],
    views: Mapping[str, Any] | None = None,
    stage: str = "",
    checkpoint: str = "best",
) -> tuple[dict[str, Any], Scores]:
    """Scores videos with a run: its own again, or others.

    Args:
      run: the run; finished, for the figures of its protocol.
      subset: what to score.
      changes: settings of its `data` part that are to be others.
      allow: 'classes' leaves videos of classes out that the run does not know, 'trained' scores
        videos that it was trained on, 'split' and 'flow' use weights that were trained with others.
      views: settings of its `eval` part that are to be others, and `seed`, that of what is drawn.
      stage: whose weights; '' is the last stage's.
      checkpoint: which of them: see `run.stage_params`.

    Returns:
      The figures with what must be known about them, and the scores.

    Raises:
      FileNotFoundError: the run has no such weights, or the videos are not there.
      ValueError: the run was trained on some of the videos, or for something else.
    """
    # What is scored is what the figures are about, whatever the run's own were.
    asked = "test" if subset == "train" else subset
    settings = _viewed(run.settings(), {**(views or {}), "subset": asked})
    stored = run.read_json("data.json", "stamp")["stamp"]
    index = described(load_index({**settings.config.data, **changes}), settings)
    stamp = stamp_of(index, settings)
    # Another folder may be the same videos in another place: then nothing has changed.
    elsewhere = bool(changes) and stamp["split"] != stored["split"]
    if elsewhere:
        index = of_known_classes(index, stored["classes"], leave_out="classes" in allow)
        stamp = {**stored, "flow": stamp["flow"]}
    records = prepare_records(index, settings.records)
    if not elsewhere:
        index = with_source(run, settings, index, records)
        index = scored_index(run, settings, index, records)
    entries = usable_entries(index, records, subset)
    trained = TrainedOn.of(run)
    known = trained.known(entries, index, records)
    own = not elsewhere and subset != "train"
    if known and not own and "trained" not in allow:
        raise ValueError(
            f"{run.workdir} was trained on {len(known)} of the {len(entries)} videos to score, "
            f"such as {known[0].video_id}: their score would say nothing about new videos. Say "
            "--allow=trained to have it all the same."
        )
    stage = stage or settings.evaluated_stage
    scores = score_run(
        run,
        settings,
        index,
        records,
        subset,
        stamp=stamp,
        allow=allow,
        stage=stage,
        checkpoint=checkpoint,
    )
    overlap = index.overlap if own else trained.related(entries, index)
    facts = {
        "subset": subset,
        "stage": stage,
        "checkpoint": checkpoint,
        "protocol": index.protocol,
        "leaky": index.leaky if own else bool(known) or overlap != 0.0,
        "overlap": overlap,
        "seen": index.seen if own else len(known) / max(1, len(entries)),
        "class_names": list(index.class_names),
        **run_figures(settings, index, scores),
    }
    return facts, scores


def _viewed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with others of `eval`, or another seed, checked as a card's are.

    Raises:
      ValueError: the streams of a network that has one are asked for. In a card the same is no
        mistake: a study asks it of networks of one stream and of two.
    """
    streams = settings.config.model.streams
    asked = "each_stream" in changes and changes["each_stream"]
    if asked and streams in STREAMS:
        raise ValueError(
            "eval.each_stream (evaluate.py --streams) leaves out one of two streams, but with "
            f"model.streams={streams!r} the network has one: its scores are that stream's already. "
            "Leave it out, or train with model.streams='both' or 'late'"
        )
    config = settings.config.as_configdict().copy_and_resolve_references()
    for key, value in changes.items():
        (config if key == "seed" else config.eval)[key] = value
    return Settings.of(config)


def write_samples(
    folder: Path, settings: Settings, records: Records, scores: Scores, count: int = 8
) -> None:
    """Stores a few scored clips for the report: see `worth_showing`.

    Each file holds `video_id`, `frames` uint8 `t h w 3` as the network saw them, and `flow`
    float32 `t h w 2`, px per frame, the field that starts at each frame.
    """
    labels = np.array([entry.label for entry in scores.entries])
    chosen = worth_showing(scores.probabilities, labels, count)
    entries = [scores.entries[i] for i in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    stream = batches(records, entries, settings.sampling, batch_size=1, train=False)
    for number, (entry, batch) in enumerate(zip(entries, stream, strict=True)):
        centre = settings.sampling.flow_frames // 2 * 2
        fields = compute_flow(batch, settings.records).flow[0, :, centre : centre + 2]
        flow = flow_to_pixels(
            jnp.asarray(fields.transpose(0, 2, 3, 1)), settings.records.flow_bound
        )
        np.savez_compressed(
            folder / f"{number}.npz",
            allow_pickle=False,
            video_id=np.array(entry.video_id),
            frames=batch.rgb[0],
            flow=np.asarray(flow),
        )


def worth_showing(probabilities: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """The videos that tell most of a network: half of them mistakes, the others one per class.

    Args:
      probabilities: float `n k`, one row per video.
      labels: int `n`, the true classes.
      count: how many at most.

    Returns:
      Positions of the videos: the worst mistake (by the probability of the wrong class), the
      worst of the commonest pair of true and called class, the next worst and so on, then the
      first video of each class that is not among them.
    """
    called = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(called != labels)
    worst = wrong[np.argsort(-probabilities[wrong, called[wrong]], kind="stable")].tolist()
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in worst:
        pairs.setdefault((int(labels[i]), int(called[i])), []).append(i)
    # Commonest first; among equals the one with the worse mistake, which came first.
    commonest = [videos[0] for videos in sorted(pairs.values(), key=len, reverse=True)]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(worst, commonest))
    mistakes = list(dict.fromkeys(i for i in in_turn if i is not None))[: count // 2]
    first_of_class = {int(label): i for i, label in reversed(list(enumerate(labels)))}
    return list(dict.fromkeys([*mistakes, *sorted(first_of_class.values())]))[:count]
