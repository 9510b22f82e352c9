"""One device against eight simulated ones: the same numbers, with the collectives one expects."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stf_jax.parallel import (
    check_batch,
    divided_ahead,
    gather,
    make_mesh,
    part_of_batch,
    shardings,
)

# Runs in a process of its own: the number of devices is fixed when JAX starts.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh
from stf_jax.augment import AugmentSettings
from stf_jax.inputs import Batch, InputSettings
from stf_jax.evaluate import score_batch
from stf_jax.model import build_model
from stf_jax.optim import OptimizerSettings
from stf_jax.parallel import divide, make_mesh, place
from stf_jax.train import initial_state, train_step

config = json.loads(sys.argv[1])
model = build_model(config, 5)
chance = np.random.default_rng(0)
clip = (8, 8, 32, 32)
batch = Batch(
    rgb=chance.integers(0, 256, (*clip, 3), np.uint8),
    flow=chance.integers(0, 256, (*clip[:2], 4, *clip[2:]), np.uint8),
    label=chance.integers(0, 5, 8).astype(np.int32),
    mask=np.array([True] * 7 + [False]),
    entry=np.arange(8, dtype=np.int32),
    seed=np.zeros((8, 2), np.uint32),
)
inputs = InputSettings(32, "minus1_1", "none", "uv", "const128", 1 / 32)
augment = AugmentSettings("centre", (), (0.1, 1.0), (0.5, 2.0), False, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0)
optimizer = OptimizerSettings("sgdm", 0.0, 5.0, 1, 0.0)
rates = ((".*", 1.0),)
zeros = jnp.zeros((1, 8, 32, 32, 3)), jnp.zeros((1, 8, 32, 32, 4))
params = jax.jit(lambda key: model.init(key, *zeros, train=False)["params"])(jax.random.key(0))
params = jax.tree.map(np.asarray, params)
found = {}
for name, mesh in {
    "one": Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model")),
    "data": make_mesh(),
    "model": make_mesh(2),
}.items():
    state = place(initial_state(params, optimizer, rates), mesh)
    static = dict(model=model, inputs=inputs, augment=augment, mesh=mesh)
    static |= dict(optimizer=optimizer, rates=rates)
    call = (state, divide(batch, mesh), jax.random.key(1), np.float32(0.1))
    step = train_step.lower(*call, **static).compile()
    text = step.as_text()
    scores = score_batch(state.params, divide(batch, mesh), model=model, inputs=inputs)
    losses = []
    for _ in range(2):
        state, record = step(state, *call[1:])  # refuses a state that lies differently
        losses.append(float(record.loss))
        norms = [record.gradient_norms, record.update_norms]
    kernel = state.params["recurrent"]["forward"]["input"]["kernel"]
    leaves = jax.tree.leaves(jax.tree.map(np.asarray, state.params))
    found[name] = dict(
        losses=losses,
        norms=jax.tree.map(float, norms),
        scores=np.asarray(scores).tolist(),
        params=[float(np.abs(leaf).sum()) for leaf in leaves],
        rows=[kernel.shape[0], kernel.addressable_shards[0].data.shape[0]],
        reduces=text.count(" all-reduce("),
        gathers=text.count(" all-gather("),
        clips_of_a_device=int(call[1].rgb.addressable_shards[0].data.shape[0]),
    )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tiny_model_settings):
    config = tiny_model_settings
    config["drop"] = {"input": 0.0, "output": 0.0, "semantics": "drop"}
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["data", "model"])
def test_eight_devices_compute_what_one_does(runs, name):
    one, many = runs["one"], runs[name]
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert many["params"] == pytest.approx(one["params"], rel=1e-4)
    for norms, expected in zip(many["norms"], one["norms"], strict=True):
        assert norms == pytest.approx(expected, rel=1e-4) and min(norms.values()) > 0
    for row, expected in zip(many["scores"], one["scores"], strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    assert one["losses"][1] != one["losses"][0]


def test_clips_and_matrices_are_divided(runs):
    assert [runs[name]["clips_of_a_device"] for name in ("one", "data", "model")] == [8, 1, 2]
    assert runs["data"]["rows"][0] == runs["data"]["rows"][1]
    assert runs["model"]["rows"][0] == 2 * runs["model"]["rows"][1]


def test_the_step_has_the_collectives_of_data_parallelism(runs):
    assert runs["one"]["reduces"] == runs["one"]["gathers"] == 0
    # Gradients are summed over devices; weights are never sent around.
    assert runs["data"]["reduces"] > 0 and runs["data"]["gathers"] == 0
    assert runs["model"]["reduces"] > 0


def test_impossible_divisions_are_named():
    with pytest.raises(ValueError, match=r"model_devices: got 3, .*number of devices \(1\)"):
        make_mesh(3)
    eight = jax.sharding.AbstractMesh((8, 1), ("data", "model"))
    check_batch(16, 2, eight)
    with pytest.raises(ValueError, match=r"batch_size: got 12, allowed: multiples of the 8"):
        check_batch(12, 1, eight)
    with pytest.raises(ValueError, match="optimizer.accumulate=4 parts on 8 devices"):
        check_batch(16, 4, eight)


def _devices_of(processes):
    """What a mesh holds, 'data' down and 'model' across, in these processes."""
    return np.array([[SimpleNamespace(process_index=p) for p in row] for row in processes])


@pytest.mark.parametrize(
    ("processes", "parts"),
    [
        ([[0]], {0: (0, 1)}),
        ([[0], [0], [1], [1]], {0: (0, 2), 1: (1, 2)}),
        ([[0, 0], [1, 1], [2, 2], [3, 3]], {0: (0, 4), 3: (3, 4)}),
        # 'model' spans two processes: both work on the same clips.
        ([[0, 1], [2, 3]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
    ],
)
def test_each_process_reads_what_its_devices_work_on(processes, parts):
    for process, part in parts.items():
        assert part_of_batch(_devices_of(processes), process) == part


def test_processes_that_lie_scattered_are_refused():
    with pytest.raises(ValueError, match=r"process 0 has places \[0, 2\] of 4 on the axis 'data'"):
        part_of_batch(_devices_of([[0], [1], [0], [1]]), 0)


def test_batches_are_divided_one_ahead_and_gathered_whole():
    read = []

    def stream():
        for number in range(3):
            read.append(number)
            yield {"rows": np.full(2, number)}

    for number, (batch, divided) in enumerate(divided_ahead(stream(), make_mesh())):
        assert read == list(range(min(3, number + 2)))
        whole = gather(divided)
        assert isinstance(whole["rows"], np.ndarray)
        assert whole["rows"].tolist() == batch["rows"].tolist() == [number] * 2


def test_only_the_input_matrices_are_divided():
    tree = {
        "recurrent": {"forward": {"input": {"kernel": jnp.zeros((4, 2))}, "cell": jnp.zeros(3)}},
        "head": jnp.zeros((4, 2)),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings(tree, make_mesh(1)))
    assert set(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))) == {
        PartitionSpec()
    }
