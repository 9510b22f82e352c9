"""The network's speed and memory on this machine, against the same network in PyTorch.

    python experiments/bench/model.py [--scales=laptop,paper] [--rounds=5]

Forward pass and training step (forward, backward, clipping, Adam), with and without the VGG layers
frozen, at paper scale (24 frames, 224x224, one clip) and laptop scale (`configs/ucf101.py:laptop`,
four clips). Each framework runs in a process of its own with every core; the two are timed in turn,
so that what slows the machine for a while slows both. Both get huge pages, as
`stf_jax.main` gives itself (they help PyTorch too). Needs `make install EXTRAS=bench`.

Writes experiments/results/bench_model.csv; a case that is there already is replaced, others stay.
  case            scale, work, and what is frozen; 'matrix product' is the machine's own rate
  ours_s          median seconds of stf_jax; ours_spread_s: half the range
  theirs_s        the same of PyTorch
  ratio           ours / theirs: below 1 is faster
  ours_peak_mb    resident memory at its highest while timed, less that after the imports
  theirs_peak_mb  the same of PyTorch
  loss            of stf_jax's last step, on noise for clips
  gflops_per_s    multiply-adds of the layers x 2 / ours_s; a backward pass counts twice a forward
                  one, less what frozen layers and the first layers leave out
Whatever algorithm does it, the multiply-adds are those of the plain one.
"""

import ctypes
import functools
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from absl import app, flags

# Cards and the PyTorch network are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.table import processor, write_rows  # noqa: E402
from stf_jax import host  # noqa: E402

_SCALES = flags.DEFINE_list("scales", ["laptop", "paper"], "Which of laptop, paper.")
_WORK = flags.DEFINE_list("work", ["forward", "step", "step frozen"], "Which of the kinds of work.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each case is timed.")
_OUT = flags.DEFINE_string("out", "experiments/results/bench_model.csv", "The table.")

CLASSES = 101
VGG = ("spatial/.*", "temporal/block.*")


def settings_of(scale: str, work: str) -> Any:
    """The run's settings of a case; nothing else is configured by hand."""
    from configs import ucf101
    from stf_jax.run import Settings

    config = ucf101.get_config("laptop" if scale == "laptop" else "")
    if scale == "paper":
        config.batch_size = 1
    if work == "step frozen":
        config.stages.first.rates = (*((name, 0.0) for name in VGG), (".*", 1.0))
    return Settings.of(config)


def multiply_adds(settings: Any, work: str) -> int:
    """What the layers of a case multiply and add."""
    from stf_jax.cost import layer_costs

    total = 0
    for layer in layer_costs(settings, CLASSES, settings.config.batch_size):
        frozen = work == "step frozen" and layer.name.startswith(("spatial/", "temporal/block"))
        first = layer.name.endswith("block1_conv1")
        passes = 1 if work == "forward" or frozen else 2 if first else 3
        total += passes * layer.macs
    return total


def _ours(scale: str, work: str) -> Callable[[], float | None]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from stf_jax.evaluate import score_batch
    from stf_jax.inputs import Batch
    from stf_jax.parallel import place
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
    batch = Batch(**arrays)
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


def _theirs(shapes: Sequence[tuple[int, ...]], config: dict, work: str) -> Callable[[], None]:
    import torch

    from experiments.bench.torch_network import TorchNetwork

    rgb, flow = (torch.randn(shape) for shape in shapes)
    network = TorchNetwork(config, CLASSES, shapes[1][-1], frame_size=(shapes[0][2], shapes[0][3]))
    if work == "forward":
        network.eval()

        def forward() -> None:
            with torch.no_grad():
                torch.softmax(network(rgb, flow), dim=-1)

        return forward
    network.train()
    if work == "step frozen":
        for name, parameter in network.named_parameters():
            if name.startswith(("spatial.", "temporal.block")):
                parameter.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-5)
    labels = torch.zeros(shapes[0][0], dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(rgb, flow), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()

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
    pipe: Connection, imports: str, make: Callable[..., Callable[[], Any]], args: Any
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


def time_case(scale: str, work: str, rounds: int) -> dict[str, Any]:
    """Times one case in both frameworks, in turn."""
    settings = settings_of(scale, work)
    shapes = settings.clip_shapes(settings.config.batch_size)
    config = settings.config.model.as_configdict().to_dict()
    context = multiprocessing.get_context("spawn")
    sides = {
        "ours": ("jax stf_jax.train", _ours, (scale, work)),
        "theirs": ("torch experiments.bench.torch_network", _theirs, (shapes, config, work)),
    }
    pipes, processes = {}, []
    for name, arguments in sides.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        process.start()
        processes.append(process)
        assert pipes[name].recv() == "ready"
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            pipes[name].send("run")
            seconds[name].append(pipes[name].recv())
    peaks, losses = {}, {}
    for name in sides:
        pipes[name].send("end")
        peaks[name], losses[name] = pipes[name].recv()
    for process in processes:
        process.join()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spreads = {name: (max(v) - min(v)) / 2 for name, v in seconds.items()}
    macs = multiply_adds(settings, work)
    return {
        "case": f"{scale}: {work}",
        "ours_s": round(medians["ours"], 4),
        "theirs_s": round(medians["theirs"], 4),
        "ratio": round(medians["ours"] / medians["theirs"], 3),
        "ours_peak_mb": round(peaks["ours"]),
        "theirs_peak_mb": round(peaks["theirs"]),
        "loss": "" if losses["ours"] is None else round(losses["ours"], 4),
        "gflops_per_s": round(2 * macs / medians["ours"] / 1e9, 1),
        "ours_spread_s": round(spreads["ours"], 4),
        "theirs_spread_s": round(spreads["theirs"], 4),
        "rounds": rounds,
    }


def time_matrix_product(rounds: int, side: int = 4096) -> dict[str, Any]:
    """The machine's rate at one large float32 matrix product, in both frameworks."""
    import jax
    import jax.numpy as jnp
    import torch

    ours = jnp.ones((side, side))
    theirs = torch.ones(side, side)
    product = jax.jit(jnp.dot)

    def timed(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    seconds = [
        (timed(lambda: product(ours, ours).block_until_ready()), timed(lambda: theirs @ theirs))
        for _ in range(max(3, rounds) + 1)
    ][1:]
    a, b = zip(*seconds, strict=True)
    return {
        "case": f"matrix product {side}",
        "ours_s": round(statistics.median(a), 4),
        "theirs_s": round(statistics.median(b), 4),
        "ratio": round(statistics.median(a) / statistics.median(b), 3),
        "ours_peak_mb": "",
        "theirs_peak_mb": "",
        "loss": "",
        "gflops_per_s": round(2 * side**3 / statistics.median(a) / 1e9, 1),
        "ours_spread_s": round((max(a) - min(a)) / 2, 4),
        "theirs_spread_s": round((max(b) - min(b)) / 2, 4),
        "rounds": len(seconds),
    }


def _origin() -> dict[str, str]:
    import importlib.metadata

    from stf_jax.main import environment

    facts = environment()
    return {
        "commit": facts["commit"],
        "jax": facts["jax"],
        "torch": importlib.metadata.version("torch"),
        "machine": f"{facts['machine']}, {processor()}",
    }


def main(argv: Sequence[str]) -> None:
    """Times every case and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("error: PyTorch is missing: make install EXTRAS=bench")
    origin = _origin()
    rounds = _ROUNDS.value
    cases = [functools.partial(time_matrix_product, rounds)]
    for scale in _SCALES.value:
        cases += [functools.partial(time_case, scale, work, rounds) for work in _WORK.value]
    for make in cases:
        row = make() | origin
        print(", ".join(f"{k} {v}" for k, v in row.items() if k not in origin), flush=True)
        write_rows(Path(_OUT.value), [row])


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main)
