"""Processes that really are several: they agree, and none waits for one that is gone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from stf_jax import hosts, native_errors, parallel
from stf_jax.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent

# The real command with another thing to do, for which it reads the code below.
SCRIPT = """
import json, sys
from stf_jax import main

job = json.loads(sys.argv[1])
def work(config, workdir, *_):
    exec(job["code"], globals())
    mesh = make_mesh(job["model_devices"])
    globals()[job["work"]](workdir / "last", mesh, **job["more"])

main.run_experiment = work
sys.argv = ["main", *sys.argv[2:]]
main.cli()
"""

# `train` has a few weights, each step of which needs all processes.
CODE = """
import contextlib, json, os, resource, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from stf_jax import hosts, progress
from stf_jax.checkpoint import Checkpoints
from stf_jax.parallel import divide, keep_placed, largest, make_mesh, part_of_batch, place

def train(folder, mesh, slowly=0.0, limit=None):
    like = {"recurrent": {"forward": {"input": {"kernel": np.ones((4, 3), np.float32)}}}}
    like["head"] = np.random.default_rng(0).normal(size=(300, 50)).astype(np.float32)
    agree(folder.parent / f"visits{time.time_ns() if hosts.leads() else 0}")

    @jax.jit
    def update(weights, rows):
        kernel = weights["recurrent"]["forward"]["input"]["kernel"]
        moved = rows.mean() + 0.1 * jnp.sin(kernel.sum())
        return keep_placed(jax.tree.map(lambda w: w * 0.9 + moved, weights), mesh), moved

    checkpoints = Checkpoints(folder, keep=2)
    with contextlib.closing(checkpoints):
        checkpoints.clean()
        checkpoints.check_space(like)
        step, weights = 0, like
        if hosts.from_first(checkpoints.latest_step) is not None:
            step, weights, _ = checkpoints.restore(like, set_aside=True)
            progress.say(f"continuing after step {step}")
        weights = place(weights, mesh)
        part, parts = part_of_batch(mesh.devices, jax.process_index())
        while step < 12:
            rows = np.random.default_rng(step).normal(size=8).astype(np.float32)
            rows = rows.reshape(parts, -1)[part]
            weights, moved = update(weights, divide(rows, mesh))
            float(moved)
            step += 1
            if limit == step and hosts.leads():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            checkpoints.save(step, weights, {"step": step})
            time.sleep(slowly)

def agree(folder):
    mine = jax.process_index()
    assert jax.process_count() == 2 and hosts.leads() == (mine == 0)
    folder = Path(hosts.from_first(lambda: str(folder)))
    assert largest(10 + mine) == 11
    def visit():
        there = sorted(folder.glob("*"))
        (folder / str(mine)).touch()
        return [path.name for path in there]
    folder.mkdir(parents=True, exist_ok=True)
    assert hosts.after_first(visit) == ["0"] * mine
    hosts.check_same("the weather", lambda: "fine")

def differ(folder, mesh):
    hosts.check_same("the number", jax.process_index)

def fail(folder, mesh):
    if job["victim"] == jax.process_index():
        raise KeyError("a mistake") if job["victim"] else ValueError("no video is usable")
    # One waits to be told something, one for a number.
    hosts.from_first(lambda: time.sleep(600)) if jax.process_index() else largest(1)

def stop(folder, mesh):
    if jax.process_index():
        folder.mkdir(parents=True)
    hosts.from_first(lambda: time.sleep(600))
"""


def _port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start(workdir, work, *, devices=1, model_devices=1, victim=None, slurm=False, **more):
    """Two processes of one run, as a person starts them, or as SLURM would."""
    job = {"code": CODE, "work": work, "victim": victim, "more": more}
    job["model_devices"] = model_devices
    flags = ["--config=configs/demo.py", f"--workdir={workdir}"]
    port = _port()
    meeting = [f"--coordinator=localhost:{port}", "--processes=2"]
    told = {}
    if slurm:
        meeting = ["--distributed"]
        told = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        told |= {"JAX_COORDINATOR_PORT": str(port), "SLURM_LOCALID": "0"}
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(job), *flags, *meeting,
             *([] if slurm else [f"--process={process}"])],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | told | {"SLURM_PROCID": str(process)},
        )
        for process in range(2)
    ]  # fmt: skip


def _ends(processes):
    """Exit code, output and errors of each; kills what hangs."""
    try:
        texts = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
    for _, _, errors in found:
        assert "stack trace" not in errors and "coordination_service" not in errors, errors
    return found


def _until(seen, processes):
    deadline = time.monotonic() + 90
    while not seen() and all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline, "it did not get that far"
        time.sleep(0.02)


def _step(workdir):
    folder = workdir / "last"
    names = [p.name for p in folder.glob("*")] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def _weights(workdir):
    like = {"recurrent": {"forward": {"input": {"kernel": np.ones((4, 3), np.float32)}}}}
    checkpoints = Checkpoints(workdir / "last", keep=2)
    step, weights, record = checkpoints.restore(like | {"head": np.ones((300, 50), np.float32)})
    checkpoints.close()
    assert step == 12 and record == {"step": 12}
    return [weights["head"].tobytes(), weights["recurrent"]["forward"]["input"]["kernel"].tobytes()]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_dies_the_other_says_so_and_both_end_as_if_nothing_had_been(victim, tmp_path):
    more = {"devices": 2, "model_devices": 2}
    for code, _, errors in _ends(_start(tmp_path / "whole", "train", slurm=True, **more)):
        assert code == 0, errors
    run = tmp_path / "run"
    processes = _start(run, "train", slowly=0.2, **more)
    _until(lambda: _step(run) >= 3, processes)
    processes[victim].kill()
    code, _, errors = _ends(processes)[1 - victim]
    assert code not in (0, -signal.SIGKILL)
    assert "of this run has ended" in errors and "Start all of them again" in errors, errors
    assert "Traceback" not in errors
    step = _step(run)
    assert 3 <= step < 12
    (run / "last" / str(step) / "record.json").write_text("{}")  # and its newest step is damaged
    first, second = _ends(_start(run, "train", **more))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert f"continuing after step {step - 1}" in first[1] and f"{step}.damaged" in first[1]
    assert not re.sub(r"\[Gloo\].*\n", "", second[1])  # process 0 speaks for all
    assert _weights(run) == _weights(tmp_path / "whole")


def test_what_they_do_not_agree_on_ends_both_and_is_named(tmp_path):
    first, second = _ends(_start(tmp_path / "run", "differ"))
    assert first[0] == second[0] == 1
    assert "process 1 of this run ended: the number differs" in first[2], first[2]
    assert "error: the number differs between the processes" in second[2]
    assert "Process 0 has 0, this one has 1" in second[2]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "said"), [(0, "no video is usable"), (1, "a mistake")])
def test_an_error_in_one_ends_the_other_with_its_message(victim, said, tmp_path):
    ends = _ends(_start(tmp_path / "run", "fail", victim=victim))
    assert [code for code, *_ in ends] == [1, 1]
    assert said in ends[victim][2]
    told = ends[1 - victim][2]
    assert f"process {victim} of this run ended: " in told and said in told, told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_save_that_fails_ends_both_and_names_the_last_good_step(tmp_path):
    first, second = _ends(_start(tmp_path / "run", "train", limit=3))
    assert first[0] == second[0] == 1
    for _, _, errors in (first, second):
        failed = re.search(r"step (\d+) could not be saved", errors)
        assert failed, errors
        assert _step(tmp_path / "run") == int(failed[1]) - 1 > 0
        assert f"the last saved step is {_step(tmp_path / 'run')}" in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_a_waiting_process_ends_both_with_its_number(victim, tmp_path):
    processes = _start(tmp_path / "run", "stop")
    _until((tmp_path / "run" / "last").exists, processes)
    processes[victim].send_signal(signal.SIGTERM)
    ends = _ends(processes)
    assert [code for code, *_ in ends] == [128 + signal.SIGTERM] * 2
    assert f"process {victim} of this run ended: stopped by SIGTERM" in ends[1 - victim][2], ends
    assert "the same command goes on" in ends[victim][2]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_frozen_is_given_up(victim, tmp_path):
    """As a machine that vanishes: no connection is closed, only nothing comes any more."""
    processes = _start(tmp_path / "run", "train", slowly=0.1)
    _until(lambda: _step(tmp_path / "run") >= 2, processes)
    processes[victim].send_signal(signal.SIGSTOP)
    other = processes[1 - victim]
    try:
        _, errors = other.communicate(timeout=4 * hosts.SILENCE)
    finally:
        for process in processes:
            process.kill()
        processes[victim].communicate()
    assert other.returncode not in (0, -signal.SIGKILL)
    assert f"process {victim} of this run has ended, or cannot be reached" in errors, errors
    assert "stack trace" not in errors


DUMP = b"""\
E1124 16:26:25.247929   13314 coordination_service_agent.cc:289] Polled an error.
F1124 16:26:25.248066   13314 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: UNAVAILABLE: Tasks are unhealthy (stopped sending heartbeats):
3
7
The tasks have crashed.
*** Check failure stack trace: ***
    @     0x7f2a36120634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def _relayed(*texts):
    source, writing = os.pipe()
    reading, target = os.pipe()

    def write():
        for text in texts:
            os.write(writing, text)
        os.close(writing)

    threading.Thread(target=write).start()
    native_errors.relay(source, target)
    for end in (source, target):
        os.close(end)
    with os.fdopen(reading, "rb") as file:
        return file.read().decode()


def test_the_dump_of_a_lost_process_becomes_one_message():
    told = _relayed(b"W1124 something else\n" + DUMP[:300], DUMP[300:])
    assert told.startswith("W1124 something else\n")
    assert "error: process 3 7 of this run has ended" in told and told.count("\n") == 3
    lost = DUMP.replace(b"(stopped sending heartbeats)", b"")
    assert "error: process 0 of this run has ended" in _relayed(lost)
    late = b"F1124 the JAX distributed service detected fatal errors. absl::Status: too late\n"
    late += b"RPC: /xla.coordination.CoordinationService/RegisterTask\n"
    assert "error: not all processes of this run have met (too late)" in _relayed(late)


def test_other_errors_of_native_code_stay_as_they_are():
    other = [b"*** stack trace ***\n", b"E1124 coordination_service.cc:1 slow\n", b"the end\n"]
    assert _relayed(*other) == b"".join(other).decode()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a:1", 2, None, False), "given together"),
        ((None, None, 0, True), "given together"),
        (("a:1", 2, 2, False), "--process: got 2, allowed: 0 to 1"),
        (("a", 2, 1, False), "--coordinator: got 'a', expected host:port"),
    ],
)
def test_impossible_flags_are_named(arguments, said):
    with pytest.raises(ValueError, match=said), hosts.joined(*arguments):
        pass


def test_a_port_that_is_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"port {port} .* in use\). Choose another"):
            with hosts.joined(f"localhost:{port}", 2, 0, False):
                pass


def test_one_process_is_the_first_and_only_one():
    with hosts.joined(None, None, None, False), hosts.undisturbed():
        assert hosts.leads() and parallel.largest(3) == 3
        assert hosts.from_first(lambda: (1, "a")) == (1, "a")
        assert hosts.after_first(lambda: "once") == "once"
        hosts.check_same("all", lambda: 1)
