"""Work that is timed in turn, each side in a process of its own: what benchmarks share."""

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

CLASSES = 101
VGG = ("spatial/.*", "temporal/block.*")


def settings_of(scale: str, work: str) -> Any:
    """The run's settings of a case; nothing else is configured by hand."""
    from configs import demo, ucf101
    from stf_jax.run import Settings

    cards = {"demo": demo.get_config, "laptop": lambda: ucf101.get_config("laptop")}
    config = cards.get(scale, ucf101.get_config)()
    if scale == "paper":
        config.batch_size = 1
    if work == "step frozen":
        config.stages.first.rates = (*((name, 0.0) for name in VGG), (".*", 1.0))
    return Settings.of(config)


def _ours(scale: str, work: str) -> Callable[[], float | None]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from stf_jax.evaluate import score_batch
    from stf_jax.inputs import Batch
    from stf_jax.parallel import divide, place
    from stf_jax.train import initial_state, train_step

    settings = settings_of(scale, work)
    size, side, channels = settings.config.batch_size, settings.records.size, 8
    chance = np.random.default_rng(0)
    clip = (size, settings.sampling.num_frames, side, side)
    arrays: dict[str, Any] = {
        "rgb": chance.integers(0, 256, (*clip, 3), np.uint8),
        "flow": chance.integers(0, 256, (*clip[:2], channels, *clip[2:]), np.uint8),
        "label": np.zeros(size, np.int32),
        "mask": np.ones(size, bool),
        "entry": np.arange(size, dtype=np.int32),
        "seed": np.zeros((size, 2), np.uint32),
    }
    batch = divide(Batch(**arrays), settings.mesh)
    model = settings.model(CLASSES)
    params = settings.initial_params(model)
    if work == "forward":

        def forward() -> None:
            score_batch(params, batch, model=model, inputs=settings.inputs).block_until_ready()

        return forward
    rates = settings.stages["first"].rates
    state = place(initial_state(params, settings.optimizer, rates), settings.mesh)
    key = jax.random.key(0)

    def step() -> float:
        nonlocal state
        state, record = train_step(
            state,
            batch,
            key,
            jnp.float32(1e-5),
            model=model,
            inputs=settings.inputs,
            augment=settings.augment,
            optimizer=settings.optimizer,
            rates=rates,
            mesh=settings.mesh,
        )
        jax.block_until_ready((state, record))
        return float(record.loss)

    return step


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mb() -> float:
    (line,) = [
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 1024


def _work(
    pipe: Connection,
    imports: str,
    make: Callable[..., Callable[[], Any]],
    args: tuple[Any, ...],
) -> None:
    """A process of one framework: makes the case, warms up, then runs when it is told to."""
    for name in imports.split():
        __import__(name)
    gc.collect()
    baseline = _resident_mb()
    free = ctypes.CDLL(None).malloc_trim
    run = make(*args)
    run()
    # What building and compiling took is not what the work takes.
    gc.collect()
    free(0)
    Path("/proc/self/clear_refs").write_text("5")
    pipe.send("ready")
    loss = None
    while pipe.recv() == "run":
        began = time.perf_counter()
        loss = run()
        pipe.send(time.perf_counter() - began)
    pipe.send((_peak_mb() - baseline, loss))


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two that are timed in turn, each in a process of its own.

    Args:
      imports: modules, separated by spaces, whose memory does not count.
      make: makes what is timed.
      args: its arguments.
      environment: changes of the process's environment.
    """

    imports: str
    make: Callable[..., Callable[[], Any]]
    args: tuple[Any, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Timed:
    """What timing a side has shown.

    Args:
      seconds: of each round.
      peak_mb: resident memory at its highest while timed, less that after the imports.
      loss: of the last round, or None.
    """

    seconds: list[float]
    peak_mb: float
    loss: float | None

    @property
    def median(self) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range of the rounds' seconds."""
        return (max(self.seconds) - min(self.seconds)) / 2


def time_in_turn(sides: Mapping[str, Side], rounds: int) -> dict[str, Timed]:
    """Times sides in turn, in changing order, so that what slows the machine slows all."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        arguments = (theirs, side.imports, side.make, side.args)
        process = context.Process(target=_work, args=arguments, daemon=True)
        with mock.patch.dict(os.environ, side.environment):
            process.start()
        processes.append(process)
        assert pipes[name].recv() == "ready"
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            pipes[name].send("run")
            seconds[name].append(pipes[name].recv())
    found = {}
    for name in sides:
        pipes[name].send("end")
        found[name] = Timed(seconds[name], *pipes[name].recv())
    for process in processes:
        process.join()
    return found


def our_side(scale: str, work: str, environment: Mapping[str, str] | None = None) -> Side:
    """The network of a card, in this framework."""
    return Side("jax stf_jax.train", _ours, (scale, work), environment or {})
