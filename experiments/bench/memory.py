"""The memory that compiled programs need, as XLA plans it: what `remat` and the order save.

    python experiments/bench/memory.py [--table=FILE]

Compiles the scoring and the training step at paper scale (one clip) and laptop scale (four), runs
nothing, and writes experiments/results/bench_memory.csv: `kept_mb` is what the forward pass hands
to the backward pass, `work_space_mb` XLA's temporary memory (that, and maps and gradients in
passing), `arguments_mb` weights, state and the batch.
"""

import csv
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_OUT = flags.DEFINE_string("table", "experiments/results/bench_memory.csv", "The table.")

ORDERS = {
    "least memory": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "XLA's own": "CPU_SCHEDULER_TYPE_DEFAULT",
}
# Scale, work, remat, order of operations; without an order nothing is compiled.
CASES: list[tuple[str, str, str, str]] = [
    *(("laptop", "step", how, "least memory") for how in ("none", "convolutions", "blocks", "all")),
    *(("paper", "forward", "none", order) for order in ORDERS),
    *(("paper", "step", "none", order) for order in ORDERS),
    *(("paper", "step", how, "") for how in ("convolutions", "blocks")),
    ("paper", "step", "all", "least memory"),
]


def settings_with(scale: str, work: str, remat: str) -> Any:
    """The run's settings of a case."""
    from experiments.bench.model import settings_of
    from stf_jax.run import Settings

    config = settings_of(scale, work).config.as_configdict().copy_and_resolve_references()
    config.model.remat.update(spatial=remat, temporal=remat)
    return Settings.of(config)


def planned(settings: Any, work: str, order: str) -> tuple[int, int]:
    """Work space and arguments of a program, bytes."""
    import jax
    import jax.numpy as jnp

    from experiments.bench.model import CLASSES
    from stf_jax.evaluate import score_batch
    from stf_jax.inputs import Batch
    from stf_jax.train import abstract_state, train_step

    size, side = settings.config.batch_size, settings.records.size
    clip = (size, settings.sampling.num_frames, side, side)
    shape = jax.ShapeDtypeStruct
    arrays: dict[str, Any] = {
        "rgb": shape((*clip, 3), jnp.uint8),
        "flow": shape((*clip[:2], 2 * settings.sampling.flow_frames, *clip[2:]), jnp.uint8),
        "label": shape((size,), jnp.int32),
        "mask": shape((size,), jnp.bool_),
        "entry": shape((size,), jnp.int32),
        "seed": shape((size, 2), jnp.uint32),
    }
    batch = Batch(**arrays)
    static: dict[str, Any] = {"model": settings.model(CLASSES), "inputs": settings.inputs}
    if work == "forward":
        lower = functools.partial(score_batch.lower, settings.abstract_params(CLASSES), batch)
    else:
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = abstract_state(settings, CLASSES, "first")
        lower = functools.partial(train_step.lower, state, batch, key, shape((), jnp.float32))
        static |= {"optimizer": settings.optimizer, "mesh": settings.mesh}
        static |= {"augment": settings.augment, "rates": settings.stages["first"].rates}
    options: dict[str, str | bool] = {"xla_cpu_scheduler_type": ORDERS[order]}
    memory: Any = lower(**static).compile(compiler_options=options).memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes


def main(argv: Sequence[str]) -> None:
    """Compiles every case and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    from experiments.bench.model import CLASSES
    from stf_jax.cost import memory_plan
    from stf_jax.main import environment

    facts = environment()
    rows = []
    for scale, work, remat, order in CASES:
        settings = settings_with(scale, work, remat)
        plan = planned(settings, work, order) if order else None
        space, arguments = ("", "") if plan is None else [round(n / 2**20) for n in plan]
        kept = (
            "" if work == "forward" else round(memory_plan(settings, CLASSES).activations / 2**20)
        )
        rows.append(
            {
                "case": f"{scale}: {work}",
                "remat": remat,
                "order": order,
                "kept_mb": kept,
                "work_space_mb": space,
                "arguments_mb": arguments,
                "commit": facts["commit"],
                "jax": facts["jax"],
                "machine": facts["machine"],
            }
        )
        print(rows[-1], flush=True)
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    app.run(main)
