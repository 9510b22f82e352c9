"""The training step and the loop of one stage."""

import dataclasses
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from stf_jax import hosts, progress, startup
from stf_jax.augment import AugmentSettings, mix, mixup_shares, next_row
from stf_jax.checkpoint import Checkpoints, Params, digest_of
from stf_jax.evaluate import evaluate_subset
from stf_jax.hosts import Interrupted
from stf_jax.index import ClipEntry, VideoIndex
from stf_jax.inputs import Batch, InputSettings, compute_flow, network_input
from stf_jax.metrics import Sums, cross_entropy
from stf_jax.model import Network
from stf_jax.monitor import Monitor, Profiler, StepRecord, norms_of_parts
from stf_jax.optim import OptimizerSettings, averaged, by_path, learning_rate_fn, make_optimizer
from stf_jax.parallel import (
    COMPILER_OPTIONS,
    divided_ahead,
    gather,
    in_parts,
    keep_placed,
    largest,
    part_of_batch,
    place,
    shapes_of_rows,
    shapes_placed,
)
from stf_jax.pipeline import batches, steps_per_epoch
from stf_jax.records import Records
from stf_jax.run import (
    Run,
    Settings,
    allowed_mismatches,
    best_params,
    check_stamp,
    epoch_index,
    source_weights,
    stamp_of,
    usable_entries,
)
from stf_jax.transfer import (
    HAND_OFF,
    Weights,
    count_fates,
    starting_params,
    write_fates,
)

Rates: TypeAlias = tuple[tuple[str, float], ...]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps done in this stage.
      params: the network's parameters.
      opt_state: the optimiser's.
      average: the moving average of the parameters; () without `optimizer.ema`.
      sums: loss and hits of the epoch so far, so that even an epoch's figures survive a kill.
    """

    # As in `Sums`, leaves may stand for arrays.
    step: Any
    params: Any
    opt_state: Any
    average: Any
    sums: Any

    @property
    def scored_params(self) -> Params:
        """The parameters that are validated and handed on: the averaged ones where there are."""
        return self.average if jax.tree.leaves(self.average) else self.params


def initial_state(params: Params, optimizer: OptimizerSettings, rates: Rates) -> TrainState:
    """The state before the first step of a stage; `parallel.place` puts it on the devices."""
    opt_state = make_optimizer(optimizer, rates).init(params)
    # A copy: a step gives its buffers away, and none may be given twice.
    average: Any = jax.tree.map(jnp.copy, params) if optimizer.ema else ()
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average, Sums.zero())


def abstract_state(settings: Settings, num_classes: int, stage: str) -> TrainState:
    """The shapes and dtypes of a state of a stage; costs no memory.

    Raises:
      ValueError: the stage's `rates` do not fit the network's parameters.
    """
    rates = settings.stages[stage].rates
    start = functools.partial(initial_state, optimizer=settings.optimizer, rates=rates)
    return jax.eval_shape(start, settings.abstract_params(num_classes))


@functools.partial(
    jax.jit,
    static_argnames=("model", "inputs", "augment", "optimizer", "rates", "mesh"),
    donate_argnames=("state",),
    compiler_options=COMPILER_OPTIONS,
)
def train_step(
    state: TrainState,
    batch: Batch,
    key: Array,
    learning_rate: Array,
    *,
    model: Network,
    inputs: InputSettings,
    augment: AugmentSettings,
    optimizer: OptimizerSettings,
    rates: Rates,
    mesh: Mesh,
) -> tuple[TrainState, StepRecord]:
    """One update of all parameters together (paper, section 3.5: nothing is frozen).

    Args:
      state: before the step; its buffers are reused.
      batch: clips; masked rows do not count.
      key: the stage's key; the step folds its own number in.
      learning_rate: float32 scalar.
      model: the network.
      inputs: how clips become network input.
      augment: what is done to them in training.
      optimizer: what turns gradients into updates, and in how many parts the batch is worked on.
      rates: factors of the learning rate (`StageSettings`).
      mesh: the devices that the state lies on and the batch is divided among.

    Returns:
      The state after the step, and what the step tells.
    """
    examples = _examples(batch, inputs, augment)
    dropout = jax.random.fold_in(key, state.step)
    total = batch.mask.astype(jnp.float32).sum()

    def loss_fn(params: Params, part: _Examples) -> tuple[Array, Sums]:
        """The part's share of the mean loss of the whole batch, and its sums."""
        outputs: Any = model.apply(
            {"params": params}, part.rgb, part.flow,
            train=True, rows=part.row, rngs={"dropout": dropout},
        )  # fmt: skip
        logits, features = outputs
        scores = [features[name] for name in model.scored]
        loss = cross_entropy(scores, part.label, augment.label_smoothing)
        if augment.mixup:
            other = cross_entropy(scores, part.other_label, augment.label_smoothing)
            loss = part.share * loss + (1 - part.share) * other
        sums = Sums.of(loss, logits, part.label, part.mask)
        return sums.loss / total, sums

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if optimizer.accumulate == 1:
        (mean, sums), gradients = gradient(state.params, examples)
    else:
        zeros = jax.tree.map(jnp.zeros_like, ((jnp.zeros(()), Sums.zero()), state.params))

        def add(so_far: Any, part: _Examples) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, gradient(state.params, part)), None

        parts = in_parts(examples, optimizer.accumulate, mesh)
        ((mean, sums), gradients), _ = jax.lax.scan(add, zeros, parts)
    tx = make_optimizer(optimizer, rates)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    updates = jax.tree.map(lambda update: learning_rate * update, updates)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if optimizer.ema:
        average = averaged(average, params, state.step, optimizer.ema)
    after = TrainState(state.step + 1, params, opt_state, average, state.sums + sums)
    record = StepRecord(mean, sums.count, norms_of_parts(gradients), norms_of_parts(updates))
    return keep_placed(after, mesh), record


class _Examples(NamedTuple):
    """What the loss of each clip of a batch is computed from."""

    rgb: Float[Array, "b t h w 3"]
    flow: Float[Array, "b t h w c"]
    label: Int[Array, " b"]
    other_label: Int[Array, " b"]  # of the clip that is mixed in
    share: Float[Array, " b"]  # of the clip itself in the mixture
    mask: Bool[Array, " b"]
    row: Int[Array, " b"]


def _examples(batch: Batch, inputs: InputSettings, augment: AugmentSettings) -> _Examples:
    rgb, flow = network_input(batch, inputs, augment)
    share = jnp.ones(len(batch.label))
    if augment.mixup:
        share = mixup_shares(batch.seed, batch.mask, augment.mixup)
        rgb, flow = mix(rgb, share), mix(flow, share)
    row = jnp.arange(len(batch.label))
    return _Examples(rgb, flow, batch.label, next_row(batch.label), share, batch.mask, row)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is being compiled beside other work; each raises what the compiler raises.

    Args:
      weights: the program that draws the first weights; done at once if none are drawn.
      step: the training step.
    """

    weights: futures.Future[Any]
    step: futures.Future[Any]


def compile_ahead(settings: Settings, num_classes: int, name: str, *, fresh: bool) -> Ahead:
    """Starts to compile what the first step needs, beside what else there is to do before it.

    The calls find the programs: they are those of these shapes, wherever they were compiled.

    Args:
      settings: the run's settings.
      num_classes: of its videos.
      name: of the stage; another one that trains the same parts uses the same program.
      fresh: whether weights are going to be drawn.
    """
    model, stored = settings.in_stage(name).model(num_classes), settings.records
    step: Callable[[], Any] = _nothing
    draw: Callable[[], Any] = _nothing
    # Flow that is computed on the devices comes from a program that decides how it lies on them.
    if stored.flow_source == "stored" or stored.flow_algorithm != "tvl1":
        arguments = _step_shapes(settings, num_classes, name)
        step = train_step.lower(*arguments, **_static(settings, name, model)).compile
    if fresh:
        draw = functools.partial(settings.compile_initial_params, model)
    # Threads that Python waits for at the end: XLA does not survive being left alone.
    workers = futures.ThreadPoolExecutor(2, thread_name_prefix="compiler")
    ahead = Ahead(step=workers.submit(step), weights=workers.submit(draw))
    workers.shutdown(wait=False)
    return ahead


def _nothing() -> None:
    pass


def _step_shapes(settings: Settings, num_classes: int, name: str) -> tuple[Any, ...]:
    """The shapes of the other arguments of `train_step`, as they lie on the devices."""
    state = shapes_placed(abstract_state(settings, num_classes, name), settings.mesh)
    batch = shapes_of_rows(settings.in_stage(name).stored_batch(), settings.mesh)
    return state, batch, jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), jnp.float32)


def _static(settings: Settings, name: str, model: Network) -> dict[str, Any]:
    """The arguments of `train_step` that a program is compiled for."""
    return {
        "model": model,
        "inputs": settings.inputs,
        "augment": settings.augment,
        "optimizer": settings.optimizer,
        "rates": settings.stages[name].rates,
        "mesh": settings.mesh,
    }


@dataclasses.dataclass
class StageProgress:
    """What the loop remembers between epochs; stored with every checkpoint.

    Attributes:
      epoch: epochs done.
      best_epoch: epoch with the best validation accuracy, 0 before any.
      best_top1: that accuracy (ties: the lower loss wins); None without a validation set.
      best_loss: its loss.
      plateau_top1: accuracy that the stop rule compares with.
      plateau_epochs: epochs since it last rose by more than `min_delta`.
      seconds: time spent, over all restarts.
      waiting_seconds: those of them in which training stood still for want of clips.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_top1: float | None = None
    best_loss: float | None = None
    plateau_top1: float = -1.0
    plateau_epochs: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0

    def update(self, top1: float, loss: float, min_delta: float) -> bool:
        """Takes in one validation; returns whether it is the best so far."""
        if top1 > self.plateau_top1 + min_delta:
            self.plateau_top1, self.plateau_epochs = top1, 0
        else:
            self.plateau_epochs += 1
        best = (-1.0, 0.0) if self.best_top1 is None else (self.best_top1, -(self.best_loss or 0))
        if (top1, -loss) <= best:
            return False
        self.best_epoch, self.best_top1, self.best_loss = self.epoch, top1, loss
        return True


def train_stage(
    run: Run,
    settings: Settings,
    name: str,
    index: VideoIndex,
    records: Records,
    ahead: Ahead | None = None,
    profiler: Profiler | None = None,
) -> dict[str, Any]:
    """Trains one stage to its end, from wherever it stands.

    Args:
      run: the run's folder.
      settings: the run's settings.
      name: the stage.
      index: the videos.
      records: their stored frames and flow.
      ahead: of `compile_ahead`, waited for before weights are drawn and before the first step.
      profiler: what traces steps; None for nothing.

    Returns:
      The stage's summary, also written to its `done.json`.

    Raises:
      Interrupted: after SIGTERM or SIGINT, with everything saved.
      FloatingPointError: the loss is not finite (names step and videos).
    """
    done = run.stage_file(name, "done.json")
    earlier = hosts.from_first(lambda: json.loads(done.read_text()) if done.exists() else None)
    if earlier is not None:
        return earlier
    stage = settings.stages[name]
    number = settings.config.stage_order.index(name)
    entries = usable_entries(epoch_index(index, records, number, 0), records, "train")
    per_epoch = _epoch_steps(settings, name, len(entries))
    best, last = run.best(name), run.last(name)
    for checkpoints in (best, last):
        checkpoints.clean()
    last.check_space(abstract_state(settings, len(index.class_names), name))
    with closing(last), closing(best):
        if ahead is not None:
            ahead.weights.result()
        state, memory = _start(run, settings, name, stamp_of(index, settings), last)
        startup.reached("weights")
        hosts.check_same(f"what stage '{name}' starts from", lambda: digest_of(state))
        step, every = int(state.step), settings.config.log_every_steps
        with (
            closing(Monitor(run.workdir, name, step=step, every=every)) as monitor,
            closing(profiler or Profiler(0)) as profiler,
            stop_requests() as stop,
        ):
            loop = _Loop(
                run, settings, name, index, records, best, last, monitor, profiler, stop, step
            )
            loop.ahead = ahead
            stopped = loop.finished(memory)
            while not stopped:
                state = loop.epoch(state, memory)
                stopped = loop.finished(memory)
    summary = {
        "name": name,
        "learning_rate": stage.learning_rate,
        "epochs": memory.epoch,
        "steps": memory.epoch * per_epoch,
        "best_epoch": memory.best_epoch,
        "best_top1": memory.best_top1,
        "stopped": stopped,
        "seconds": round(memory.seconds, 1),
        "waiting_seconds": round(memory.waiting_seconds, 1),
        "peak_memory_mb": progress.peak_memory_mb(),
    }
    run.write_json(f"stages/{name}/done.json", summary)
    return summary


def _epoch_steps(settings: Settings, name: str, videos: int) -> int:
    """Steps of an epoch of a stage, which sees every video `divide_clips` times."""
    batch_size = settings.in_stage(name).config.batch_size
    return settings.stages[name].divide_clips * steps_per_epoch(videos, batch_size)


def _start(
    run: Run, settings: Settings, name: str, stamp: dict[str, Any], last: Checkpoints
) -> tuple[TrainState, StageProgress]:
    """Where a stage goes on: its own last checkpoint, else the hand-off, else VGG, else scratch."""
    num_classes = len(stamp["classes"])
    if hosts.from_first(last.latest_step) is not None:
        like = abstract_state(settings, num_classes, name)
        step, state, record = last.restore(like, set_aside=True)
        where = run.workdir / "stages" / name / "last" / str(step)
        allow = allowed_mismatches(settings.config.allow_mismatch)
        check_stamp(record.pop("stamp", {}), stamp, where, allow)
        state, memory = place(state, settings.mesh), StageProgress(**record)
        progress.say(f"stage '{name}': continuing after step {step} (epoch {memory.epoch + 1})")
        return state, memory
    config = settings.config
    source = _source(run, settings, name, stamp)
    first = name == config.stage_order[0]
    params, fates = starting_params(
        lambda: settings.initial_params(settings.model(num_classes)),
        expected=settings.abstract_params(num_classes),
        source=source,
        rules=settings.transfer if first else HAND_OFF,
        vgg=config.pretrained,
        temporal_init=config.model.temporal.init,
        conv1_init=config.model.temporal.conv1_init,
    )
    write_fates(run.stage_file(name, "weights.json"), fates)
    told = count_fates(fates)
    progress.say(f"stage '{name}': {told} (each in {run.stage_file(name, 'weights.json')})")
    state = initial_state(params, settings.optimizer, settings.stages[name].rates)
    return place(state, settings.mesh), StageProgress()


def _source(run: Run, settings: Settings, name: str, stamp: dict[str, Any]) -> Weights | None:
    """The trained weights that a stage starts from: the stage before, else another run, if any."""
    order = settings.config.stage_order
    position = order.index(name)
    if not position:
        return source_weights(settings, stamp)
    allow = allowed_mismatches(settings.config.allow_mismatch)
    previous = order[position - 1]
    params = best_params(run, settings, previous, stamp, allow)
    return Weights(f"stage '{previous}'", by_path(params), other_classes=False)


class _Loop:
    """One stage's loop; its methods share what does not change."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        name: str,
        index: VideoIndex,
        records: Records,
        best: Checkpoints,
        last: Checkpoints,
        monitor: Monitor,
        profiler: Profiler,
        stop: list[int],
        start_step: int,
    ):
        self._run, self._settings, self._name = run, settings, name
        self._index, self._records = index, records
        self._best, self._last, self._stop = best, last, stop
        self._monitor, self._profiler = monitor, profiler
        self._left = progress.TimeLeft()
        self._stage = settings.stages[name]
        self._training = settings.in_stage(name)
        self._model = self._training.model(len(index.class_names))
        # A stage's randomness differs from the other stages' but not between restarts.
        self._number = settings.config.stage_order.index(name)
        self._entries = self._trained_on(0)
        self._per_epoch = _epoch_steps(settings, name, len(self._entries))
        self._stamp = stamp_of(index, settings)
        self._rate = learning_rate_fn(self._stage, self._per_epoch)
        self._key = jax.random.fold_in(jax.random.key(settings.config.seed), self._number + 1)
        self._resplits = index.resplit_seed is not None
        self._validates = self._resplits or bool(usable_entries(index, records, "validation"))
        self._stream = divided_ahead(self._clips(start_step), settings.mesh)
        self._clock = time.monotonic()
        self.ahead: Ahead | None = None

    def _trained_on(self, epoch: int) -> list[ClipEntry]:
        view = epoch_index(self._index, self._records, self._number, epoch)
        return usable_entries(view, self._records, "train")

    def _clips(self, start: int) -> Iterator[Batch]:
        """The batches of all epochs, from a step on."""
        end = self._stage.max_epochs * self._per_epoch
        if not self._resplits:
            # One stream for all epochs: the next one's clips are read while one is validated.
            yield from self._batches(self._entries, start, end)
            return
        while start < end:
            epoch = start // self._per_epoch
            stop = (epoch + 1) * self._per_epoch
            yield from self._batches(self._trained_on(epoch), start, stop)
            start = stop

    def _batches(self, entries: Sequence[ClipEntry], start: int, stop: int) -> Iterator[Batch]:
        return batches(
            self._records,
            entries,
            self._training.sampling,
            batch_size=self._training.config.batch_size,
            train=True,
            seed=self._settings.config.seed * 1000 + self._number,
            random_crop=self._settings.augment.moves,
            start_step=start,
            stop_step=stop,
            part=part_of_batch(self._settings.mesh.devices, jax.process_index()),
        )

    def finished(self, memory: StageProgress) -> str:
        """Why the stage is over, or ''."""
        if self._validates and memory.plateau_epochs >= self._stage.patience:
            return f"validation accuracy settled ({self._stage.patience} epochs without a rise)"
        if memory.epoch >= self._stage.max_epochs:
            return "max_epochs reached"
        return ""

    def epoch(self, state: TrainState, memory: StageProgress) -> TrainState:
        """Trains to the end of the current epoch, validates and saves."""
        first = int(state.step) - memory.epoch * self._per_epoch
        self._entries = self._trained_on(memory.epoch)
        title = f"{self._name} epoch {memory.epoch + 1}/{self._stage.max_epochs}"
        self._monitor.begin_epoch()
        with progress.bar(
            total=self._per_epoch, initial=first, description=title, unit="step"
        ) as bar:
            for _, divided in self._timed(self._per_epoch - first, memory):
                state, told = self._step(state, memory, divided)
                bar.update()
                bar.set_postfix_str(told, refresh=False)
                step = int(state.step)
                due = step % self._settings.config.checkpoint_every_steps == 0
                asked = self._asked()
                if step % self._per_epoch and (due or asked):
                    self._save(state, memory)
                    if asked:
                        raise Interrupted(asked, everywhere=True)
        self._profiler.close()
        return self._end_epoch(state, memory)

    def _step(
        self, state: TrainState, memory: StageProgress, divided: Batch
    ) -> tuple[TrainState, str]:
        """One step; returns the state after it, and what the progress bar says of it."""
        step = int(state.step)
        rate = float(self._rate(step))
        self._await_program()
        divided = compute_flow(divided, self._settings.records)
        if step == 0:
            bound = self._settings.records.flow_bound
            self._monitor.sample_clips(divided, self._entries, bound)
        with self._profiler.step(self._run.workdir / "tensorboard" / self._name, step):
            state, record = train_step(
                state,
                divided,
                self._key,
                np.float32(rate),
                **_static(self._settings, self._name, self._model),
            )
            # Waits for the step; its norms stay on the device unless they are wanted.
            loss, clips, sums = jax.device_get((record.loss, record.clips, state.sums))
        self._check_finite(float(loss), step, divided)
        if startup.first_step_done():
            startup.note_programs()
        top1 = sums.means()["top1"]
        self._monitor.step(
            record.replace(loss=loss, clips=clips),
            step=step + 1,
            epoch=memory.epoch + 1,
            top1=top1,
            learning_rate=rate,
            waiting_seconds=memory.waiting_seconds,
        )
        left = self._left.after_step(self._stage.max_epochs * self._per_epoch - step - 1)
        return state, f"loss {float(loss):.3f}, top-1 {top1:.1%}, stage {left} left"

    def _timed(self, steps: int, memory: StageProgress) -> Iterator[tuple[Batch, Batch]]:
        """The next batches; the time until each is there counts as waiting."""
        for _ in range(steps):
            began = time.monotonic()
            batch = next(self._stream)
            memory.waiting_seconds += time.monotonic() - began
            yield batch

    def _await_program(self) -> None:
        startup.reached("clips")
        if self.ahead is not None:
            self.ahead.step.result()
            self.ahead = None
            startup.reached("compiler")

    def _check_finite(self, loss: float, step: int, divided: Batch) -> None:
        if np.isfinite(loss):
            return
        entry, mask = gather((divided.entry, divided.mask))
        ids = ", ".join(self._entries[i].video_id for i in entry[mask])
        self._last.wait()
        raise FloatingPointError(
            f"stage '{self._name}': the loss is {loss} at step {step}, on {ids}. The last finite "
            f"checkpoint is step {self._last.latest_step()}. Lower the learning rate, or look at "
            "these videos."
        )

    def _end_epoch(self, state: TrainState, memory: StageProgress) -> TrainState:
        view = epoch_index(self._index, self._records, self._number, memory.epoch)
        memory.epoch += 1
        step = int(state.step)
        videos = int(state.sums.count) // self._stage.divide_clips
        rows = [self._row("train", memory, step, state.sums.means(), videos)]
        improved, figures = True, None
        if self._validates:
            figures = evaluate_subset(
                self._settings,
                state.scored_params,
                view,
                self._records,
                "test" if self._resplits else "validation",
            ).figures()
            improved = memory.update(figures.top1, figures.loss, self._stage.min_delta)
            if self._resplits:
                # Every epoch is tested on other videos: the paper's result is the last one's.
                improved, memory.best_epoch = True, memory.epoch
                memory.best_top1, memory.best_loss = figures.top1, figures.loss
            means = {"loss": figures.loss, "top1": figures.top1}
            rows.append(self._row("validation", memory, step, means, figures.num_videos))
        else:
            memory.best_epoch = memory.epoch
        state = dataclasses.replace(state, sums=place(Sums.zero(), self._settings.mesh))
        if improved:
            self._best.save(
                step, state.scored_params, {"epoch": memory.epoch, "stamp": self._stamp}
            )
        self._tick(memory)
        seconds = {
            "seconds": round(memory.seconds, 1),
            "waiting_seconds": round(memory.waiting_seconds, 1),
        }
        self._monitor.epoch([r | seconds for r in rows], figures, self._index.class_names)
        progress.say(
            f"{self._name} epoch {memory.epoch}: "
            + ", ".join(f"{r['kind']} loss {r['loss']:.3f} top-1 {r['top1']:.1%}" for r in rows)
            + (" (best)" if improved and self._validates else "")
            + f", {memory.waiting_seconds / memory.seconds:.1%} of the time waiting for clips"
        )
        # What the stage continues from must never be ahead of the best weights that it speaks of.
        self._best.wait()
        self._save(state, memory)
        if asked := self._asked():
            raise Interrupted(asked, everywhere=True)
        return state

    def _asked(self) -> int:
        """The signal that asks to stop, whichever process has got it, or 0."""
        return largest(self._stop[0] if self._stop else 0)

    def _row(
        self, kind: str, memory: StageProgress, step: int, means: dict[str, float], count: int
    ) -> dict[str, Any]:
        return {
            "stage": self._name,
            "kind": kind,
            "epoch": memory.epoch,
            "step": step,
            "learning_rate": float(self._rate(step - 1)),
            "num_videos": count,
            **means,
        }

    def _save(self, state: TrainState, memory: StageProgress) -> None:
        self._tick(memory)
        self._monitor.wait()
        record = {**dataclasses.asdict(memory), "stamp": self._stamp}
        self._last.save(int(state.step), state, record)

    def _tick(self, memory: StageProgress) -> None:
        now = time.monotonic()
        memory.seconds += now - self._clock
        self._clock = now


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying; the second one acts at once.

    Yields:
      A list that holds the number of the signal once one has come.
    """
    received: list[int] = []
    old: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        received.append(number)
        progress.say(
            f"{signal.Signals(number).name}: finishing this step and saving. Again to stop at once."
        )
        restore()

    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
