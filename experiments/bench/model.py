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

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

# Cards and the PyTorch network are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.in_turn import (  # noqa: E402
    CLASSES,
    Side,
    our_side,
    settings_of,
    time_in_turn,
)
from experiments.bench.table import processor, write_rows  # noqa: E402
from stf_jax import host  # noqa: E402

_SCALES = flags.DEFINE_list("scales", ["laptop", "paper"], "Which of laptop, paper.")
_WORK = flags.DEFINE_list("work", ["forward", "step", "step frozen"], "Which of the kinds of work.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each case is timed.")
_OUT = flags.DEFINE_string("out", "experiments/results/bench_model.csv", "The table.")


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


def time_case(scale: str, work: str, rounds: int) -> dict[str, Any]:
    """Times one case in both frameworks, in turn."""
    settings = settings_of(scale, work)
    shapes = settings.clip_shapes(settings.config.batch_size)
    config = settings.config.model.as_configdict().to_dict()
    theirs = Side("torch experiments.bench.torch_network", _theirs, (shapes, config, work))
    found = time_in_turn({"ours": our_side(scale, work), "theirs": theirs}, rounds)
    one, other = found["ours"], found["theirs"]
    macs = multiply_adds(settings, work)
    return {
        "case": f"{scale}: {work}",
        "ours_s": round(one.median, 4),
        "theirs_s": round(other.median, 4),
        "ratio": round(one.median / other.median, 3),
        "ours_peak_mb": round(one.peak_mb),
        "theirs_peak_mb": round(other.peak_mb),
        "loss": "" if one.loss is None else round(one.loss, 4),
        "gflops_per_s": round(2 * macs / one.median / 1e9, 1),
        "ours_spread_s": round(one.spread, 4),
        "theirs_spread_s": round(other.spread, 4),
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
