"""From a configuration to a result: prepare, train every stage, evaluate, report.

    python -m stf_jax.main --config=configs/demo.py --workdir=runs/demo

The same command continues a run that was interrupted, and says so when all is done. Nothing heavy
is imported before the flags are understood: a typo answers at once, and the worker processes of
the preparation, which import this module, start quickly.
"""

import contextlib
import difflib
import importlib.metadata
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from stf_jax import host, native_errors, startup

if TYPE_CHECKING:
    from stf_jax.index import VideoIndex
    from stf_jax.records import Records
    from stf_jax.run import Run, Settings

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Experiment card, such as configs/ucf101.py or configs/ucf101.py:laptop."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/<name of the card>[-<preset>]."
)

_PROFILE = flags.DEFINE_integer(
    "profile",
    0,
    "Trace so many training steps, after the first ones of this start, which compile; the trace "
    "goes to tensorboard/<stage>/plugins/profile in the run's folder.",
    lower_bound=0,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Several processes train one run: host:port of process 0, the same for all. With --processes "
    "and --process.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes train this run.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this one of them, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Take these three from SLURM, Open MPI or Kubernetes."
)

_INSPECT = flags.DEFINE_bool(
    "inspect",
    False,
    "Print the layers with their cost, the memory of a training step and the origin of every "
    "weight; needs no data and does no work.",
)


def run_experiment(
    config: ConfigDict,
    workdir: Path,
    config_file: str,
    changes: Mapping[str, Any],
    profile_steps: int = 0,
) -> dict[str, Any]:
    """Does whatever of an experiment is not done yet.

    Args:
      config: the resolved configuration.
      workdir: the run's folder.
      config_file: what --config said, for the record.
      changes: what the command line changed in it, for the record.
      profile_steps: how many training steps to trace.

    Returns:
      The results, as in `results.json`.
    """
    from stf_jax import hosts, prepare, progress
    from stf_jax.parallel import check_batch
    from stf_jax.run import Run, Settings

    settings = Settings.of(config)
    _check_devices(config.allow_cpu)
    check_batch(config.batch_size, config.optimizer.accumulate, settings.mesh)
    hosts.check_same("model_devices", lambda: config.model_devices)
    run = Run(workdir)
    # Of several processes, process 0 holds the folder for all of them.
    with prepare.locked(workdir) if hosts.leads() else contextlib.nullcontext():
        hosts.after_first(lambda: run.claim(config))
        hosts.check_same(f"the folder {workdir}", lambda: _holder(workdir))
        ends = [workdir / "results.json", workdir / "report" / "index.html"]
        if hosts.from_first(lambda: all(end.exists() for end in ends)):
            results = run.read_json("results.json")
            progress.say(f"all is done already in {workdir}")
        else:
            origin = {"config_file": config_file, "changes": dict(changes)}
            results = _work(run, settings, origin, profile_steps)
    progress.say(_headline(results))
    progress.say(f"report: {workdir / 'report' / 'index.html'}")
    return results


def _holder(workdir: Path) -> str:
    """Who holds a folder, as its lock says: the same words wherever it is the same folder."""
    lock = workdir / ".lock"
    return lock.read_text(encoding="utf-8") if lock.exists() else "no lock"


def _work(
    run: "Run", settings: "Settings", origin: dict[str, Any], profile_steps: int
) -> dict[str, Any]:
    from stf_jax import hosts, progress
    from stf_jax.checkpoint import count_parameters
    from stf_jax.datasets import load_index
    from stf_jax.evaluate import run_figures, score_run, write_samples
    from stf_jax.monitor import Profiler
    from stf_jax.progress import peak_memory_mb
    from stf_jax.records import open_records, prepare_records, record_folder
    from stf_jax.run import (
        allowed_mismatches,
        described,
        scored_index,
        stamp_of,
        with_source,
        write_videos,
    )
    from stf_jax.scores import write_scores
    from stf_jax.train import abstract_state, compile_ahead, train_stage

    startup.reached("imports")
    # A network that does not fit its clips fails here, not after hours of preparation.
    for name in settings.config.stage_order:
        abstract_state(settings, 2, name)
    index = hosts.after_first(lambda: described(load_index(settings.config.data), settings))
    progress.say(index.summary())
    order = settings.config.stage_order
    todo = [name for name in order if not run.stage_file(name, "done.json").exists()]
    fresh = todo == list(order) and not any(run.stage_file(order[0], "last").glob("[0-9]*"))
    ahead = None
    if todo:
        ahead = compile_ahead(settings, len(index.class_names), todo[0], fresh=fresh)
    startup.reached("tracing")
    began = time.monotonic()
    records = hosts.after_first(
        lambda: (
            prepare_records(index, settings.records)
            if hosts.leads()
            else open_records(record_folder(index, settings.records), settings.records)
        )
    )
    index = hosts.after_first(lambda: with_source(run, settings, index, records))
    data = _data_facts(run, index, records, round(time.monotonic() - began, 1))
    data["stamp"] = stamp_of(index, settings)
    hosts.check_same("the prepared data", lambda: [index.stamp(), records.digest])
    run.write_json("data.json", data)
    write_videos(run, index, records)
    startup.reached("data")
    profiler = Profiler(profile_steps)
    stages = [train_stage(run, settings, name, index, records, ahead, profiler) for name in order]
    profiler.conclude()
    startup.note_programs()
    began = time.monotonic()
    index = scored_index(run, settings, index, records)
    if index.seen is not None:
        progress.say(index.leak())
    allow = allowed_mismatches(settings.config.allow_mismatch)
    scores = score_run(
        run, settings, index, records, index.scored, stamp=data["stamp"], allow=allow
    )
    if hosts.leads():
        write_scores(run.workdir / "scores.csv", scores, index.class_names)
        write_samples(run.workdir / "samples", settings, records, scores)
    seconds = {"prepare": data["prepare_seconds"]}
    seconds |= {stage["name"]: stage["seconds"] for stage in stages}
    seconds["evaluate"] = round(time.monotonic() - began, 1)
    results = {
        **run_figures(settings, index, scores),
        **{key: data[key] for key in ("protocol", "leaky", "excluded", "faults")},
        "subset": index.scored,
        "overlap": index.overlap,
        "seen": index.seen,
        "notes": data["notes"],
        "class_names": list(index.class_names),
        "chance": 1 / len(index.class_names),
        "seconds": seconds,
        "start_up": startup.parts(),
        "data": {key: data[key] for key in ("name", "root", "counts")},
        "stages": stages,
        "environment": environment(),
        **origin,
        "seed": settings.config.seed,
        "peak_memory_mb": max([peak_memory_mb(), *(s["peak_memory_mb"] for s in stages)]),
        "parameters": count_parameters(settings.abstract_params(len(index.class_names))),
    }
    run.write_json("results.json", results)
    startup.note_programs()
    if hosts.leads():
        from stf_jax.report import write_report

        write_report(run.workdir)
    return results


def _data_facts(
    run: "Run", index: "VideoIndex", records: "Records", seconds: float
) -> dict[str, Any]:
    """What the run is trained and tested on, and what it had to leave out; says the latter."""
    from stf_jax import progress
    from stf_jax.run import usable_entries

    subsets = ("train", "validation", "test")
    counts = {name: len(usable_entries(index, records, name)) for name in subsets}
    rows = [(entry, records.rows[entry.video_id]) for entry in index.entries]
    damaged = [
        {"video_id": e.video_id, "subset": e.subset, "reason": row.reason, "used": row.usable}
        for e, row in rows
        if row.status != "ok"
    ]
    for fault in damaged:
        used = "used although it" if fault["used"] else "EXCLUDED:"
        progress.say(f"  {fault['subset']}: {fault['video_id']}: {used} {fault['reason']}")
    left_out = sum(not fault["used"] for fault in damaged)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    progress.say(f"videos: {told}; {left_out} of {len(rows)} excluded")
    if not counts["train"]:
        raise ValueError(f"{index.root}: no usable video to train on")
    if not counts[index.scored]:
        what = {"test": "test", "validation": "validate"}[index.scored]
        raise ValueError(f"{index.root}: no usable video to {what} on (eval.subset)")
    if (run.workdir / "data.json").exists():
        # A later start finds the preparation done; the first one's time is the one to report.
        seconds = max(seconds, run.read_json("data.json")["prepare_seconds"])
    return {
        "name": index.name,
        "root": str(index.root),
        "class_names": list(index.class_names),
        "protocol": index.protocol,
        "leaky": index.leaky,
        "overlap": index.overlap,
        "notes": list(index.notes),
        "counts": counts,
        "excluded": [fault for fault in damaged if not fault["used"]],
        "faults": [fault for fault in damaged if fault["used"]],
        "records": records.settings.stamp(),
        "manifest_digest": records.digest,
        "prepare_seconds": seconds,
    }


def environment() -> dict[str, str]:
    """What a result depends on beside the configuration: commit, versions, machine."""
    import jax

    names = (
        "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "av", "numpy",
        "opencv-contrib-python-headless",
    )  # fmt: skip
    return {
        "commit": host.commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "devices": ", ".join(device.device_kind for device in jax.devices()),
        "machine": host.machine(),
    }


def _check_devices(allow_cpu: bool) -> None:
    """A GPU that JAX does not use is a mistake that costs days: stop unless it is meant.

    Raises:
      RuntimeError: there is a GPU and JAX runs on the CPU.
    """
    import jax

    if not allow_cpu and host.leaves_gpu_unused(jax.default_backend()):
        raise RuntimeError(
            "This machine has an NVIDIA GPU but JAX runs on the CPU. Install the GPU build with "
            "`make install EXTRAS=cuda12`, or pass --config.allow_cpu=true to go on without it."
        )


def _headline(results: dict[str, Any]) -> str:
    low, high = results["interval95"]
    leak = f" LEAKY PROTOCOL ({_leak(results)}):" if results["leaky"] else ""
    return (
        f"{results['subset']}:{leak} top-1 {results['top1']:.2%} "
        f"(95 % interval {low:.1%} to {high:.1%}), "
        f"top-5 {results['top5']:.2%}, mean class accuracy {results['mean_class_accuracy']:.2%}, "
        f"{results['num_videos']} videos ({len(results['excluded'])} excluded), "
        f"{results['views']['summary']}, {results['protocol']}"
    )


def _leak(results: dict[str, Any]) -> str:
    told = "sources unknown"
    if results["overlap"] is not None:
        told = f"{results['overlap']:.1%} share a source with training"
    if results["seen"] is not None:
        told += f", {results['seen']:.1%} trained on before"
    return told


def default_workdir(config_file: str) -> Path:
    """runs/<card> or runs/<card>-<preset>.

    Example:
      >>> str(default_workdir("configs/ucf101.py:laptop,split=2"))
      'runs/ucf101-laptop-split2'
    """
    card, _, preset = config_file.partition(":")
    parts = [Path(card).stem, *(part.replace("=", "") for part in preset.split(",") if part)]
    return Path("runs") / "-".join(parts)


def main(argv: Sequence[str]) -> None:
    """Runs the experiment; failures that a user can mend end in one message, without a trace."""
    if len(argv) > 1:
        raise SystemExit(f"Unknown argument {argv[1]!r}: settings look like --config.seed=1")
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(_WORKDIR.value or default_workdir(config_file))
    changes = config_flags.get_override_values(flags.FLAGS["config"])
    try:
        if _INSPECT.value:
            from stf_jax.cost import inspection

            print(inspection(_CONFIG.value))
            return
        if _COORDINATOR.value is not None or _DISTRIBUTED.value:
            native_errors.watch()
        else:
            host.divide_cores(_CONFIG.value.batch_size, _CONFIG.value.optimizer.accumulate)
        from stf_jax import hosts

        meeting = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DISTRIBUTED.value
        with hosts.joined(*meeting):
            run_experiment(_CONFIG.value, workdir, config_file, changes, _PROFILE.value)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except InterruptedError as stopped:
        print(f"{stopped}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + stopped.signum) from None  # type: ignore[attr-defined]
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("STF_DEBUG"):
            raise
        print(f"\nerror: {error}\n(STF_DEBUG=1 shows where.)", file=sys.stderr)
        raise SystemExit(1) from None


def _parse(argv: Sequence[str]) -> list[str]:
    """Absl's parser, with its failures turned into one line each."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise ValueError("--config is missing, such as --config=configs/demo.py")
        _ = _CONFIG.value.seed  # A card that failed to load says so when it is first touched.
        return rest
    except (flags.Error, AttributeError, KeyError, ValueError, OSError) as error:
        # What a card raises arrives with a whole traceback in its text; the last line says it.
        lines = str(error).strip().splitlines()
        told = lines[-1] if "Traceback" in str(error) else " ".join(" ".join(lines).split())
        if isinstance(error, KeyError):
            told = _nearest_keys(str(error.args[0]).strip("'\""), argv)
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(2) from None


def _nearest_keys(unknown: str, argv: Sequence[str]) -> str:
    """Says what the card has instead of a section that it has not."""
    # The flag holds no card once a change of it has failed: read the card without changes.
    (named,) = [a for a in argv if a.startswith("--config=")][-1:] or [""]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("card", flag_values=values)
    values([argv[0], named.replace("--config=", "--card=", 1)])
    card = values["card"].value

    def paths(part: ConfigDict, prefix: str) -> Iterator[str]:
        for key, value in part.items():
            yield prefix + key
            if isinstance(value, ConfigDict):
                yield from paths(value, f"{prefix}{key}.")

    known = list(paths(card, "")) if isinstance(card, ConfigDict) else []
    by_name = {path.rpartition(".")[2]: path for path in known}
    near = difflib.get_close_matches(unknown, by_name, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(by_name[name] for name in near)}?" if near else ""
    return f"the card has no section {unknown!r}{hint}"


def cli() -> None:
    """The entry point."""
    host.use_huge_pages()
    startup.keep_programs()
    startup.begin()
    startup.reached("process")
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    cli()
