"""Makes the runs of a study: each a process of its own, several at once where there are devices.

A run is `python -m stf_jax.main --config=CARD --config.KEY=VALUE ... --workdir=FOLDER`, which goes
on by itself where it was stopped. What is done already is not started.
"""

import contextlib
import dataclasses
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import results_page, study_results
from experiments.studies import Row, Study
from experiments.study_results import Key, Tables, digest
from stf_jax import host
from stf_jax.wording import duration

ROOT = Path(__file__).resolve().parent.parent
# What a run is, and what prepares the videos of several at once.
_TRAIN = (sys.executable, "-m", "stf_jax.main")
_PREPARE = (sys.executable, str(ROOT / "experiments" / "prepare.py"))
_UNUSABLE_VIDEOS = 2  # prepare.py's exit code when all is done but some videos are left out


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a study.

    Args:
      study: the study.
      row: of it.
      seed: of the run.
      overrides: what the run changes of the card, from the study and from the command line.
      config: the card with these.
      workdir: its folder.
    """

    study: Study
    row: Row
    seed: int
    overrides: Mapping[str, str]
    config: ConfigDict
    workdir: Path

    @property
    def name(self) -> str:
        """For people: 'row, seed 1', or 'row, fold 1'."""
        return f"{self.row.name}, {self.study.repeat} {self.seed}"

    @property
    def log(self) -> Path:
        """What the run says."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    @property
    def told(self) -> dict[str, str]:
        """The overrides that decide what comes out: where things lie is nobody else's business."""
        from stf_jax.run import deciding

        return {k: v for k, v in self.overrides.items() if k in deciding(self.config)}

    @property
    def arguments(self) -> list[str]:
        """The card and its changes as flags."""
        changes = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return [f"--config={self.study.card}", *changes]

    @property
    def command(self) -> list[str]:
        """What is started."""
        return [*_TRAIN, *self.arguments, f"--workdir={self.workdir}"]

    def done(self) -> bool:
        """Whether the run is finished.

        Raises:
          ValueError: its folder holds a run with other settings (lists the keys).
        """
        from stf_jax.run import Run

        if not (self.workdir / "config.json").exists():
            return False
        try:
            Run(self.workdir).check_config(self.config)
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {error}\nOf a study: choose another --out, or remove that folder."
            ) from None
        ends = self.workdir / "results.json", self.workdir / "report" / "index.html"
        return all(end.exists() for end in ends)


def plan(
    study: Study,
    out: Path,
    *,
    rows: Sequence[str],
    seeds: Sequence[int],
    changes: Mapping[str, str],
) -> list[Job]:
    """Lists the runs of a study: all rows with the first seed, then all with the second, and so on.

    Args:
      study: the study.
      out: the run folders' folder.
      rows: names of its rows.
      seeds: which.
      changes: settings that the command line changes in all of them.

    Raises:
      ValueError: there is no such row, or the settings of one are impossible (names it).
    """
    known = {row.name: row for row in study.rows}
    for name in rows:
        if name not in known:
            raise ValueError(f"study {study.name!r} has no row {name!r}, but {', '.join(known)}")
    chosen = [row for row in study.rows if row.name in rows]
    return [_job(study, row, seed, out, changes) for seed in seeds for row in chosen]


def _job(study: Study, row: Row, seed: int, out: Path, changes: Mapping[str, str]) -> Job:
    own = {key: _flag_text(value) for key, value in study.changes(row, seed).items()}
    for key in changes:
        if key in own and changes[key] != own[key]:
            raise ValueError(
                f"--config.{key}={changes[key]}: row {row.name!r} of study {study.name!r} sets it "
                f"to {own[key]}"
            )
    overrides = {**own, **changes}
    config = _card(study.card, overrides, row.name)
    return Job(study, row, seed, overrides, config, out / f"{row.name}-seed{seed}")


def _flag_text(value: Any) -> str:
    """A setting as a flag takes it: a tuple as Python writes it, everything else bare."""
    return repr(value) if isinstance(value, tuple) else str(value)


def _card(card: str, overrides: Mapping[str, str], row: str) -> ConfigDict:
    """The card with its changes, read exactly as `stf_jax.main` reads it, and checked."""
    from stf_jax.run import Settings

    values = flags.FlagValues()
    changes = [f"--config.{key}={value}" for key, value in overrides.items()]
    told = ["ablate", f"--config={card}", *changes]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=told)
    try:
        values(told)
        config = values["config"].value
        Settings.of(config)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        lines = str(error).strip().splitlines()
        said = lines[-1] if "Traceback" in str(error) else " ".join(str(error).split())
        raise ValueError(f"row {row!r}, {card}: {said}") from None
    return config


# --- devices ---------------------------------------------------------------------------------


def shares(count: int) -> list[dict[str, Any]]:
    """What each of so many runs at once gets: a GPU of its own, or its part of the cores.

    Returns:
      For each the variables of its environment ('environment') and the cores it may use ('cores').

    Raises:
      ValueError: there are fewer GPUs, or cores, than runs.
    """
    cores = host.usable_cores()
    gpus = _gpus()
    if gpus:
        if count > len(gpus):
            raise ValueError(f"--jobs={count}: there are {len(gpus)} GPUs, one for each run")
        return [{"environment": {"CUDA_VISIBLE_DEVICES": g}, "cores": cores} for g in gpus[:count]]
    if count > len(cores):
        raise ValueError(f"--jobs={count}: there are {len(cores)} cores, at least one for each run")
    return [{"environment": {}, "cores": cores[number::count]} for number in range(count)]


def _gpus() -> list[str]:
    """The names of the GPUs that may be used, as CUDA takes them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()


def prepare_once(jobs: Sequence[Job], say: Callable[[str], None]) -> int:
    """Prepares the videos of runs that are going to be made at once: once for each kind.

    Returns:
      The signal that stopped it, or 0.

    Raises:
      RuntimeError: it failed (the reason was printed).
    """
    kinds = {str((job.config.records, job.config.data.root)): job for job in jobs}
    for number, job in enumerate(kinds.values(), start=1):
        say(
            f"preparing videos, {number} of {len(kinds)} kinds (as row {job.row.name!r} needs them)"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [*_PREPARE, *job.arguments]
        with _signals() as caught:
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            while process.poll() is None:
                time.sleep(0.2)
                if caught:
                    process.send_signal(signal.SIGINT)  # what is prepared stays
                    process.wait()
        if caught:
            return caught[0]
        if process.returncode not in (0, _UNUSABLE_VIDEOS):
            raise RuntimeError(f"preparing the videos of row {job.row.name!r} failed, see above")
    return 0


# --- running ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """How a sitting went.

    Args:
      failed: runs that ended with an error.
      left: runs that were not begun, because they would not have ended in time or it was stopped.
      stopped: the signal that stopped it, or 0.
    """

    failed: list[Job] = dataclasses.field(default_factory=list)
    left: list[Job] = dataclasses.field(default_factory=list)
    stopped: int = 0


class Expected:
    """How long runs take, learnt from those that are finished.

    Args:
      known: seconds of finished runs, with the names of their rows.
    """

    def __init__(self, known: Sequence[tuple[str, float]]) -> None:
        self._known = list(known)

    def add(self, row: str, seconds: float) -> None:
        """Learns from one more."""
        self._known.append((row, seconds))

    def of(self, row: str) -> float | None:
        """Seconds of a run: the mean of those of its row, else of all; None if there is none."""
        own = [seconds for name, seconds in self._known if name == row]
        found = own or [seconds for _, seconds in self._known]
        return sum(found) / len(found) if found else None

    def together(self, jobs: Sequence[Job], at_once: int) -> float | None:
        """Seconds until so many runs are made."""
        parts = [self.of(job.row.name) for job in jobs]
        if any(part is None for part in parts):
            return None
        total = math.fsum(part for part in parts if part is not None)
        return max(total / at_once, max((p for p in parts if p is not None), default=0.0))


def make_runs(
    jobs: Sequence[Job],
    *,
    at_once: int,
    budget: float,
    expected: Expected,
    finished: Callable[[Job], None],
    say: Callable[[str], None],
) -> Outcome:
    """Makes runs one after the other, or several at once, and goes on when one fails.

    The first SIGINT or SIGTERM goes to the runs, which save and end; no other is begun. A second
    one goes to them too, and stops them at once.

    Args:
      jobs: in the order in which they are begun; none of them done.
      at_once: how many at a time.
      budget: seconds; no run is begun that is not expected to end within.
      expected: how long they take.
      finished: called after each that ended well.
      say: prints a line.
    """
    outcome, waiting = Outcome(), list(jobs)
    free = shares(at_once)
    running: list[tuple[subprocess.Popen[bytes], Job, dict[str, Any], float]] = []
    began = time.monotonic()
    with _signals() as caught, _none_left_behind(running):
        passed_on = 0
        while waiting or running:
            while waiting and free and not caught:
                left = budget - (time.monotonic() - began)
                if (expected.of(waiting[0].row.name) or 0.0) > left or left <= 0:
                    break
                job, share = waiting.pop(0), free.pop(0)
                say(f"{job.name}: begins, {_ahead(expected, [job, *waiting], at_once)}")
                running.append((_start(job, share), job, share, time.monotonic()))
            if not running:
                break
            for number in caught[passed_on:]:
                say(f"passing signal {number} on to {len(running)} runs, which save and end")
                for process, *_ in running:
                    process.send_signal(number)
            passed_on = len(caught)
            time.sleep(0.2)
            for entry in [e for e in running if e[0].poll() is not None]:
                running.remove(entry)
                process, job, share, since = entry
                free.append(share)
                if process.returncode == 0:
                    took = time.monotonic() - since
                    expected.add(job.row.name, took)
                    say(f"{job.name}: done in {duration(took)}")
                    finished(job)
                elif caught:
                    outcome.left.append(job)
                else:
                    outcome.failed.append(job)
                    say(f"{job.name}: FAILED, exit code {process.returncode}; {job.log} ends with")
                    say(_last_words(job.log))
    outcome.left += waiting
    outcome.stopped = caught[0] if caught else 0
    return outcome


@contextlib.contextmanager
def _none_left_behind(
    running: Sequence[tuple[subprocess.Popen[bytes], Any, Any, Any]],
) -> Iterator[None]:
    """Stops the runs that are still there if something goes wrong here; they save first."""
    try:
        yield
    finally:
        for process, *_ in running:
            process.terminate()
        for process, *_ in running:
            process.wait()


def _start(job: Job, share: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    job.workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        # In a session of its own: Ctrl-C would reach it from the terminal and from here, and two
        # signals stop a run at once.
        process = subprocess.Popen(
            job.command,
            env={**os.environ, "PYTHONPATH": str(ROOT), **share["environment"]},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    # It may have ended already, with a mistake in its flags; and not every system keeps a process
    # to some of the cores.
    with contextlib.suppress(ProcessLookupError, AttributeError):
        os.sched_setaffinity(process.pid, share["cores"])
    return process


def _ahead(expected: Expected, jobs: Sequence[Job], at_once: int) -> str:
    """How much is left to do, for people."""
    seconds = expected.together(jobs, at_once)
    told = f"about {duration(seconds)}" if seconds is not None else "time not known yet"
    return f"{len(jobs)} to make, {told} left"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-4:])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying of them."""
    caught: list[int] = []
    old = {
        number: signal.signal(number, lambda got, frame: caught.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# --- a sitting -----------------------------------------------------------------------------


def label_of(study: Study, select: bool) -> str:
    """What the files of a study are called."""
    return f"study_{study.name}" + "_selection" * select


def wanted_settings(study: Study, tables: Tables, changes: Mapping[str, str]) -> dict[Key, str]:
    """Digests of the settings that every run of the study would have now, by row and seed."""
    from stf_jax.run import deciding

    seeds = {int(seed) for _, seed in tables.runs} | set(study.seeds)
    rows = [row.name for row in study.rows]
    jobs = plan(study, Path("none"), rows=rows, seeds=sorted(seeds), changes=changes)
    return {(job.row.name, str(job.seed)): digest(deciding(job.config)) for job in jobs}


def summarise(study: Study, tables: Tables, results: Path, label: str) -> None:
    """Writes the tables, and from them summary and figure."""
    tables.write(results, label)
    fresh = tables.fresh()
    for key in sorted(tables.runs.keys() - fresh.runs.keys()):
        print(
            f"  stale: row {key[0]!r} with {study.repeat} {key[1]} was made with other "
            "settings than the study has now; it stays in the table and is left out of the summary"
        )
    if not fresh.runs:
        # What they say is of runs that the study no longer has.
        for outdated in (f"{label}_summary.csv", f"{label}.png"):
            (results / outdated).unlink(missing_ok=True)
        print(f"no run to summarise yet; {results_page.write(results)}")
        return
    lines = study_results.summarise(study, fresh)
    study_results.write_summary(results, label, study, lines)
    study_results.draw(results / f"{label}.png", study, fresh, lines)
    for line in lines:
        gain = "" if line["difference"] is None else f", {100 * line['difference']:+.1f} points"
        print(f"  {line['row']}: {line['mean']:.1%} ({study.repeat}s {line['seeds']}){gain}")
    print(f"{results / label}.csv, _videos.csv, _summary.csv, .png; {results_page.write(results)}")


def sitting(
    jobs: Sequence[Job],
    tables: Tables,
    results: Path,
    *,
    changes: Mapping[str, str],
    label: str,
    at_once: int,
    budget: float,
    dry_run: bool,
) -> int:
    """Makes what is missing of a study, and keeps its tables up to date.

    Args:
      jobs: the runs that are wanted, of one study, from `plan`.
      tables: what is known of the study so far.
      results: the folder of its tables.
      changes: settings that the command line changes in all runs.
      label: what its files are called.
      at_once: how many runs at a time.
      budget: seconds; see `make_runs`.
      dry_run: only print what would be done.

    Returns:
      The exit code: 0, 1 if a run failed, or 128 + the number of a signal.

    Raises:
      ValueError: a run folder was made with other settings (names the run and the settings), or
        its results do not belong into the same tables.
    """
    from stf_jax.run import deciding

    study = jobs[0].study
    wanted = wanted_settings(study, tables, changes)
    # Their seeds may be others than the study's.
    wanted |= {(j.row.name, str(j.seed)): digest(deciding(j.config)) for j in jobs}
    tables = tables.marked(wanted)

    def add(job: Job) -> None:
        nonlocal tables
        found = study_results.collect(job.workdir, study, job.row, job.seed, job.told)
        tables = tables.merged(*found).marked(wanted)
        tables.write(results, label)

    unknown = [job for job in jobs if not _recorded(job, tables)]
    done = [job for job in unknown if job.done()]  # all are looked at before anything begins
    missing = [job for job in unknown if job not in done]
    print(f"{study.name}: {len(jobs) - len(missing)} of {len(jobs)} runs are done")
    if dry_run:
        for job in missing:
            print(f"{job.name}:\n  {shlex.join(job.command)}")
        return 0
    for job in done:
        add(job)
    known = [(row, float(run["run_seconds"])) for (row, _), run in tables.fresh().runs.items()]
    if missing and at_once > 1 and (stopped := prepare_once(missing, print)):
        return 128 + stopped
    outcome = make_runs(
        missing,
        at_once=at_once,
        budget=budget,
        expected=Expected(known),
        finished=add,
        say=lambda line: print(line, flush=True),
    )
    summarise(study, tables, results, label)
    if outcome.left:
        print(f"{len(outcome.left)} runs are left: the same command makes them")
    for job in outcome.failed:
        print(f"FAILED: {job.name}, see {job.log}", file=sys.stderr)
    return 128 + outcome.stopped if outcome.stopped else int(bool(outcome.failed))


def _recorded(job: Job, tables: Tables) -> bool:
    """Whether another sitting or machine has made the run: its folder need not be here."""
    key = job.row.name, str(job.seed)
    return key in tables.runs and not tables.runs[key]["stale"]


def seconds_of(told: str) -> float:
    """Reads '2h', '90m', '1h30m', '45s'; '' is no limit.

    Raises:
      ValueError: it is something else.

    Example:
      >>> seconds_of("1h30m")
      5400.0
    """
    if not told:
        return math.inf
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", told)
    if not match:
        raise ValueError(f"budget: got {told!r}, expected hours, minutes or seconds, such as 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds
