"""Scoring videos with a trained network: one pure function that everything calls."""

import csv
import dataclasses
import functools
import io
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from stf_jax import prepare, progress
from stf_jax.checkpoint import Params
from stf_jax.datasets import load_index
from stf_jax.index import ClipEntry, VideoIndex
from stf_jax.inputs import Batch, InputSettings, compute_flow, flow_to_pixels, network_input
from stf_jax.metrics import Figures, summarise
from stf_jax.model import Network, fold_pyramid
from stf_jax.parallel import COMPILER_OPTIONS, divided_ahead, gather, part_of_batch, place
from stf_jax.pipeline import batches, steps_per_epoch
from stf_jax.prepare import RecordSettings
from stf_jax.records import Records, prepare_records
from stf_jax.run import (
    Run,
    Settings,
    TrainedOn,
    best_params,
    of_known_classes,
    scored_index,
    stamp_of,
    usable_entries,
    with_source,
)


@functools.partial(jax.jit, static_argnames=("model", "inputs"), compiler_options=COMPILER_OPTIONS)
def score_batch(
    params: Params, batch: Batch, *, model: Network, inputs: InputSettings
) -> Float[Array, "b k"]:
    """Class probabilities of each clip of a batch."""
    rgb, flow = network_input(batch, inputs, augment=None)
    logits, _ = model.apply({"params": params}, rgb, flow, train=False)
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of videos, in the order of `entries`.

    Args:
      entries: the videos.
      probabilities: float32 `n k`.
    """

    entries: tuple[ClipEntry, ...]
    probabilities: np.ndarray

    def figures(self) -> Figures:
        """Accuracies, confusion matrix and interval."""
        return summarise(self.probabilities, np.array([entry.label for entry in self.entries]))


def evaluate(
    model: Network,
    params: Params,
    inputs: InputSettings,
    stored: RecordSettings,
    stream: Iterable[Batch],
    entries: Sequence[ClipEntry],
    mesh: Mesh,
) -> Scores:
    """Scores every video of a stream exactly once.

    Args:
      model: the network.
      params: its parameters.
      inputs: how clips become network input.
      stored: how the records hold them.
      stream: batches, or this process's part of each; masked rows are left out.
      entries: what `Batch.entry` points into.
      mesh: the devices that batches are divided among.

    Returns:
      The scores, independent of batch size and order, in every process.

    Raises:
      ValueError: a video is missing or comes twice (names it).
    """
    rows: dict[int, np.ndarray] = {}
    for _, batch in divided_ahead(stream, mesh):
        batch = compute_flow(batch, stored)
        divided = score_batch(params, batch, model=model, inputs=inputs)
        scores, numbers, mask = gather((divided, batch.entry, batch.mask))
        for entry, row in zip(numbers[mask].tolist(), scores[mask], strict=True):
            if entry in rows:
                raise ValueError(f"{entries[entry].video_id} came twice in one evaluation")
            rows[entry] = row
    for number, entry in enumerate(entries):
        if number not in rows:
            raise ValueError(f"{entry.video_id} was left out of the evaluation")
    ordered = np.stack([rows[number] for number in range(len(entries))])
    return Scores(tuple(entries), ordered)


def evaluate_subset(
    settings: Settings,
    params: Params,
    index: VideoIndex,
    records: Records,
    subset: str,
    *,
    repeats: int = 1,
    show_progress: bool = False,
) -> Scores:
    """Scores the usable videos of one subset of an index.

    Args:
      settings: the run's settings.
      params: parameters of its network.
      index: the videos.
      records: their stored frames and flow.
      subset: of the index.
      repeats: 1 scores the deterministic clip of each video; more is how many clips are drawn from
        it as in training, without augmentation, and their probabilities averaged (SPEC 1.11).
      show_progress: whether to show a bar.
    """
    entries = usable_entries(index, records, subset)
    if not entries:
        raise ValueError(f"the {subset} subset of {index.root} holds no usable video")
    size = settings.config.batch_size
    steps = steps_per_epoch(len(entries), size)
    stream: Iterable[Batch] = batches(
        records,
        entries,
        settings.sampling,
        batch_size=size,
        train=False,
        seed=settings.config.seed,
        stop_step=repeats * steps,
        part=part_of_batch(settings.mesh.devices, jax.process_index()),
        draw=repeats > 1,
    )
    if show_progress:
        stream = progress.bar(
            stream, total=repeats * steps, description=f"score {subset}", unit="batch"
        )
    model, params = fold_pyramid(settings.model(len(index.class_names)), params)
    params = place(params, settings.mesh)
    # An iterator: whoever looks into a bar to see what it holds takes its first batch away.
    clips = iter(stream)
    drawn = [
        evaluate(
            model,
            params,
            settings.inputs,
            settings.records,
            itertools.islice(clips, steps),
            entries,
            settings.mesh,
        )
        for _ in range(repeats)
    ]
    mean = np.mean([scores.probabilities for scores in drawn], axis=0)
    return Scores(tuple(entries), mean)


def score_run(
    run: Run,
    settings: Settings,
    index: VideoIndex,
    records: Records,
    subset: str = "test",
    *,
    stamp: Mapping[str, Any],
    allow: Collection[str],
) -> Scores:
    """Scores a subset with the best weights of a run's last stage.

    Args:
      run: the run.
      settings: its settings.
      index: the videos.
      records: their stored frames and flow.
      subset: of the index.
      stamp: what the weights must have been trained with (`run.stamp_of`).
      allow: in what they may differ from it.

    Raises:
      ValueError: they were trained with another split, other classes or other flow.
    """
    params = best_params(run, settings, settings.evaluated_stage, stamp, allow)
    repeats = settings.config.eval.repeats
    return evaluate_subset(
        settings, params, index, records, subset, repeats=repeats, show_progress=True
    )


def score_again(
    run: Run, *, subset: str, changes: Mapping[str, Any], allow: Collection[str]
) -> tuple[dict[str, Any], Scores]:
    """Scores videos with a finished run: its own again, or others.

    Args:
      run: the run.
      subset: what to score.
      changes: settings of its `data` part that are to be others.
      allow: 'classes' leaves videos of classes out that the run does not know, 'trained' scores
        videos that it was trained on, 'split' and 'flow' use weights that were trained with others.

    Returns:
      The figures with what must be known about them, and the scores.

    Raises:
      FileNotFoundError: the run is not finished, or the videos are not there.
      ValueError: the run was trained on some of the videos, or for something else.
    """
    settings = run.settings()
    stored = run.read_json("data.json")["stamp"]
    index = load_index({**settings.config.data, **changes})
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
    scores = score_run(run, settings, index, records, subset, stamp=stamp, allow=allow)
    overlap = index.overlap if own else trained.related(entries, index)
    facts = {
        "subset": subset,
        "protocol": index.protocol,
        "leaky": index.leaky if own else bool(known) or overlap != 0.0,
        "overlap": overlap,
        "seen": index.seen if own else len(known) / max(1, len(entries)),
        "class_names": list(index.class_names),
        **dataclasses.asdict(scores.figures()),
    }
    return facts, scores


def write_scores(path: Path, scores: Scores, class_names: Sequence[str]) -> None:
    """Writes one CSV row per video: id, label, prediction, correct, and every probability."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["video_id", "label", "prediction", "correct", *class_names])
    for entry, row in zip(scores.entries, scores.probabilities, strict=True):
        best = int(row.argmax())
        names = class_names[entry.label], class_names[best]
        digits = [f"{p:.6f}" for p in row]
        writer.writerow([entry.video_id, *names, int(best == entry.label), *digits])
    prepare.write_aside(path, text.getvalue().encode())


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
