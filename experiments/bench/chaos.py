"""The proof that a run survives a storm: struck by dozens of faults, it ends as if in peace.

    python experiments/bench/chaos.py [--faults=60] [--seed=0] [--full]

Trains the demo twice with one command, shrunk to a minute unless --full: once in peace, and once
through a storm. Before every start something on disk is damaged, and then something happens to the
process: faults of all kinds in an order, at places and at moments that the seed draws. The command
is simply repeated. In the end the parameters, the optimiser's state and the scores of both must be
the same to the last bit.

On disk, between two starts (`REST`): flipped bits, truncated and missing files in checkpoints,
their digests and records; what does not belong there; half-written temporaries; a torn line in the
log; damaged programs in the compiler's cache. In a process (`LIVE`): SIGKILL while it starts, works
or saves; SIGTERM, SIGINT, two of them in a row; writes that fail (RLIMIT_FSIZE, as a full disk
does), a folder that is gone and comes back, a file in the way of a save.

What no run survives is not tried: a checkpoint is damaged only while the same folder holds another
whole one (two steps of what a stage continues from, two copies of the best weights); records,
config.json, done.json and results.json are left alone (records: experiments/prepare.py --verify).

Prints every fault with what was seen of it. Writes experiments/results/chaos.csv, a row for each
kind: how often it struck, how the starts that it struck ended, and whether the end was the same.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_FAULTS = flags.DEFINE_integer("faults", 60, "How many, half on disk and half in a process.")
_SEED = flags.DEFINE_integer("seed", 0, "Of kinds, places and moments.")
_FULL = flags.DEFINE_bool("full", False, "The whole demo instead of the shrunk one.")
_OUT = flags.DEFINE_string("out", "experiments/results/chaos.csv", "The table.")
_SHOWN = flags.DEFINE_bool("show_output", False, "Show what the starts print.")

# The demo with every part smaller, on 48 of its videos, for 20 epochs.
SMALL = (
    "--config.data.name=folder",
    "--config.data.protocol=hold_out",
    r"--config.data.group_regex=_(g\d+)_",
    "--config.data.validation_fraction=0.3",
    "--config.records.size=36",
    "--config.records.flow_size=48",
    "--config.sampling.num_frames=8",
    "--config.model.width=4",
    "--config.model.mst.width=32",
    "--config.model.conv3d.width=32",
    "--config.model.fusion.width=32",
    "--config.model.tpn.window=4",
    "--config.model.tpn.stride=4",
    "--config.model.lstm.hidden=8",
    "--config.stages.first.max_epochs=12",
    "--config.stages.first.patience=99",
    "--config.stages.second.max_epochs=8",
    "--config.stages.second.patience=99",
    "--config.checkpoint_every_steps=2",
)
STAGES = ("first", "second")
# Seconds after which a start, or the wait for a moment in it, counts as hung.
HUNG = 600


class Start:
    """One start of the command, with all that it says."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]):
        self.lines: list[str] = []
        self.began = time.monotonic()
        # Pipes: what it says does not count as written to disk.
        self._process = subprocess.Popen(
            words, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if _SHOWN.value:
                print("    |", line, end="", flush=True)

    @property
    def pid(self) -> int:
        """Of the process; its group has the same number."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it is still there."""
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Sends a signal to it, SIGKILL to its workers too."""
        if self.alive():
            (os.killpg if number == signal.SIGKILL else os.kill)(self.pid, number)

    def until(self, seen: Callable[[], bool]) -> bool:
        """Waits for something; whether the process was still there when it came."""
        deadline = time.monotonic() + HUNG
        while self.alive() and not seen():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                sys.exit("error: a start hung:\n" + "\n".join(self.lines[-20:]))
            time.sleep(0.01)
        return self.alive()

    def end(self) -> int:
        """Waits for its end; returns the exit code."""
        self.until(lambda: False)
        self._reader.join()
        return self._process.wait()


@dataclasses.dataclass
class Storm:
    """A run in a folder, what may happen to it, and what chance has in store.

    Args:
      run: the run's folder.
      programs: the compiler's cache.
      chance: draws places and moments.
    """

    run: Path
    programs: Path
    chance: random.Random

    # --- what there is ---

    def step(self) -> int:
        """Steps that are saved, of both stages together."""
        done = 0
        for stage in STAGES:
            summary = self.run / "stages" / stage / "done.json"
            if not summary.exists():
                return done + max(self._steps(stage), default=0)
            done += json.loads(summary.read_text())["steps"]
        return done

    def _steps(self, stage: str) -> list[int]:
        folder = self.run / "stages" / stage / "last"
        if not folder.exists():
            return []
        return [int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]

    def folder(self) -> Path | None:
        """Where the stage that is at work saves what it continues from."""
        folders = [self.run / "stages" / stage / "last" for stage in STAGES]
        return next((f for f in reversed(folders) if f.exists()), None)

    def victim(self) -> Path | None:
        """The checkpoint that is read next, of a folder that can spare it."""
        # What is read: the last stage's own, and the best weights of each stage.
        folders = [self.folder(), *(self.run / "stages" / stage / "best" for stage in STAGES)]
        able = []
        for folder in folders:
            whole = [c for c in _copies(folder) if _whole(c)] if folder else []
            if len(whole) > 1:
                able.append(whole[0])
        # Mostly the first: the best weights are read only once.
        return self.chance.choice([*able[:1] * 3, *able]) if able else None

    def inside(self, checkpoint: Path, wanted: str) -> Path:
        """A file of a checkpoint."""
        files = [p for p in sorted(checkpoint.rglob(wanted)) if p.is_file() and p.stat().st_size]
        return self.chance.choice(files)

    # --- between two starts ---

    def flip(self, path: Path) -> str:
        """Turns over one bit of a file."""
        data = bytearray(path.read_bytes())
        place = self.chance.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        return f"bit {place} of {self._name(path)}"

    def cut(self, path: Path) -> str:
        """Leaves only the beginning of a file."""
        size = path.stat().st_size
        kept = self.chance.randrange(size)
        os.truncate(path, kept)
        return f"{kept} of {size} bytes of {self._name(path)}"

    def _name(self, path: Path) -> str:
        near = self.run if path.is_relative_to(self.run) else self.programs
        return path.relative_to(near).as_posix()

    def bit_in_arrays(self) -> str | None:
        """A flipped bit among the arrays of a checkpoint."""
        found = self.victim()
        return self.flip(self.inside(found, "tree/**/*")) if found else None

    def bit_in_digests(self) -> str | None:
        """A flipped bit in the digests of a checkpoint."""
        found = self.victim()
        return self.flip(found / "digests.json") if found else None

    def bit_in_record(self) -> str | None:
        """A flipped bit in the record of a checkpoint."""
        found = self.victim()
        return self.flip(found / "record.json") if found else None

    def truncated(self) -> str | None:
        """Any file of a checkpoint, cut."""
        found = self.victim()
        return self.cut(self.inside(found, "*")) if found else None

    def missing(self) -> str | None:
        """Any file of a checkpoint, gone."""
        found = self.victim()
        if found is None:
            return None
        path = self.inside(found, "*")
        path.unlink()
        return self._name(path)

    def stray(self) -> str | None:
        """Files and folders that do not belong among checkpoints, some named as if they did."""
        folder = self.folder()
        if folder is None:
            return None
        name = self.chance.choice(["notes.txt", "7 (copy)", "999999", "999998", ".hidden"])
        path = folder / name
        if path.exists():
            return None
        if self.chance.random() < 0.5:
            path.mkdir()
        else:
            path.write_text("not a checkpoint")
        return f"{self._name(path)}, {'a folder' if path.is_dir() else 'a file'}"

    def temporary(self) -> str | None:
        """What a save leaves that was killed: a folder, or what a copying tool made a file of."""
        folder = self.folder()
        if folder is None:
            return None
        path = folder / f".saving-{self.chance.randrange(200)}"
        if path.exists():
            return None
        if self.chance.random() < 0.3:
            path.write_text("half")
            return f"{self._name(path)}, a file"
        (path / "tree").mkdir(parents=True)
        (path / "tree" / "half").write_bytes(bytes(100))
        return f"{self._name(path)}, a folder"

    def torn_line(self) -> str | None:
        """The beginning of a line at the end of the log, as a kill leaves it."""
        log = self.run / "metrics.jsonl"
        if not log.exists():
            return None
        line = '{"stage": "first", "kind": "train", "epoch": 3'
        kept = line[: self.chance.randrange(1, len(line))]
        with open(log, "a", encoding="utf-8") as file:
            file.write(kept)
        return f"{len(kept)} letters in metrics.jsonl"

    def _program(self) -> Path | None:
        entries = sorted(self.programs.rglob("*-cache"))
        return self.chance.choice(entries) if entries else None

    def bit_in_program(self) -> str | None:
        """A flipped bit in a compiled program."""
        found = self._program()
        return self.flip(found) if found else None

    def truncated_program(self) -> str | None:
        """A compiled program, cut."""
        found = self._program()
        return self.cut(found) if found else None

    def half_written_program(self) -> str | None:
        """A compiled program as a kill leaves it: cut, and nothing noted of it."""
        found = self._program()
        if found is None:
            return None
        found.with_name(found.name + ".sha256").unlink(missing_ok=True)
        return self.cut(found)

    # --- in a process ---

    def _moment(self, start: Start, target: int) -> bool:
        """Waits for a step, and some more: the middle of the next ones, or of a save."""
        there = start.until(lambda: self.step() >= target)
        time.sleep(self.chance.uniform(0, 0.4))
        return there and start.alive()

    def kill_at_work(self, start: Start, target: int) -> str:
        """SIGKILL at any moment of the training."""
        self._moment(start, target)
        start.send(signal.SIGKILL)
        return f"after step {self.step()}"

    def kill_in_the_beginning(self, start: Start, target: int) -> str:
        """SIGKILL before or soon after the first step: imports, data, compiler, restoring."""
        wait = self.chance.uniform(0.05, 8)
        time.sleep(wait)
        start.send(signal.SIGKILL)
        return f"after {wait:.2f} s"

    def kill_in_a_save(self, start: Start, target: int) -> str:
        """SIGKILL while a checkpoint is being written."""

        def saving() -> bool:
            # Not those that a fault has left there: they are removed when the training begins.
            return any(p not in before for p in _existing(stages, ".saving-*"))

        stages = self.run / "stages"
        before = _existing(stages, ".saving-*")
        start.until(lambda: self.step() >= target and saving())
        time.sleep(self.chance.uniform(0, 0.3))
        start.send(signal.SIGKILL)
        left = [self._name(path) for path in _existing(stages, ".saving-*")]
        return f"left {', '.join(left) or 'nothing half-written'}"

    def terminate(self, start: Start, target: int) -> str:
        """SIGTERM, as a scheduler sends it."""
        self._moment(start, target)
        start.send(signal.SIGTERM)
        return f"after step {self.step()}"

    def interrupt(self, start: Start, target: int) -> str:
        """SIGINT, as Ctrl-C sends it."""
        self._moment(start, target)
        start.send(signal.SIGINT)
        return f"after step {self.step()}"

    def two_signals(self, start: Start, target: int) -> str:
        """Two in a row: the second acts at once."""
        self._moment(start, target)
        pair = [self.chance.choice([signal.SIGINT, signal.SIGTERM]) for _ in range(2)]
        wait = self.chance.uniform(0, 0.3)
        start.send(pair[0])
        time.sleep(wait)
        start.send(pair[1])
        return f"{pair[0].name}, {pair[1].name} after {wait:.2f} s"

    def no_room(self, start: Start, target: int) -> str:
        """From a moment on no file may grow beyond some bytes: what a full disk or a quota does."""
        self._moment(start, target)
        limit = self.chance.choice([0, 100, 4096, 100_000])
        if start.alive():
            resource.prlimit(start.pid, resource.RLIMIT_FSIZE, (limit, limit))
        return f"{limit} bytes at most"

    def folder_gone(self, start: Start, target: int) -> str:
        """The folder of the checkpoints is away until the process has ended."""
        self._moment(start, target)
        folder = self.folder()
        if folder is None or not start.alive():
            return "too early"
        away = folder.with_name("away")
        folder.rename(away)
        start.until(lambda: False)
        if folder.exists():  # made again by a save that had begun: what is whole is kept
            for path in folder.iterdir():
                if path.name.startswith(".saving-"):
                    shutil.rmtree(path)
                elif not (away / path.name).exists():
                    path.rename(away / path.name)
            shutil.rmtree(folder)
        away.rename(folder)
        return f"{self._name(folder)} away"

    def in_the_way(self, start: Start, target: int) -> str:
        """A file has the name that the next saves are going to use."""
        self._moment(start, target)
        folder = self.folder()
        if folder is None:
            return "too early"
        # Of checkpoints: another fault may have left strays that are named like one.
        newest = max((int(p.name.partition(".")[0]) for p in _copies(folder)), default=0)
        for step in range(newest + 1, newest + 9):
            path = folder / f".saving-{step}"
            if not path.exists():
                path.write_text("in the way")
        return f"steps {newest + 1} to {newest + 8} of {self._name(folder)}"


REST = (
    Storm.bit_in_arrays, Storm.bit_in_digests, Storm.bit_in_record, Storm.truncated, Storm.missing,
    Storm.stray, Storm.temporary, Storm.torn_line, Storm.bit_in_program, Storm.truncated_program,
    Storm.half_written_program,
)  # fmt: skip
LIVE = (
    Storm.kill_at_work, Storm.kill_in_the_beginning, Storm.kill_in_a_save, Storm.terminate,
    Storm.interrupt, Storm.two_signals, Storm.no_room, Storm.folder_gone, Storm.in_the_way,
)  # fmt: skip
# How a start may end that was struck: by the signal, having saved (128 + signal), with an error.
ENDS = {
    "kill_at_work": {-9},
    "kill_in_the_beginning": {-9},
    "kill_in_a_save": {-9},
    "terminate": {143, -15},  # negative: before the program could listen
    "interrupt": {130, -2},
    "two_signals": {130, 143, -15, -2},
    "no_room": {1},
    "folder_gone": {1},
    "in_the_way": {1},
}


def _existing(folder: Path, pattern: str) -> list[Path]:
    """Paths below a folder that is being changed."""
    return [path for path in folder.glob(f"*/last/{pattern}") if path.exists()]


def _copies(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order in which they are tried."""
    found = []
    for path in folder.glob("*") if folder.exists() else ():
        match = re.fullmatch(r"(\d+)(?:\.copy(\d+))?", path.name)
        if match and (path / "digests.json").is_file():
            found.append((-int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found)]


def _whole(checkpoint: Path) -> bool:
    """Whether every file is what was written: not asked of the program under test."""
    try:
        digests = json.loads((checkpoint / "digests.json").read_text())
        return all(
            hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest
            for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def command(place: Path, run: str) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a run in a folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    words = [
        sys.executable, "-m", "stf_jax.main", "--config=configs/demo.py",
        f"--config.data.root={place}/videos", f"--config.records.root={place}/records",
        f"--workdir={place / run}",
    ]  # fmt: skip
    return words + ([] if _FULL.value else list(SMALL)), environment


def in_peace(place: Path) -> int:
    """The run that nothing happens to, without kept programs; returns its steps."""
    if not _FULL.value:
        from stf_jax import demo

        demo.GROUPS, demo.CLIPS_PER_GROUP = 6, 1
        demo.generate(place / "videos", seed=0)
    words, environment = command(place, "peace")
    start = Start(words, environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    if start.end():
        sys.exit("error: the run failed without any fault:\n" + "\n".join(start.lines[-20:]))
    results = json.loads((place / "peace" / "results.json").read_text())
    return sum(stage["steps"] for stage in results["stages"])


def in_turn(kinds: Sequence[Callable], count: int, chance: random.Random) -> list[Callable]:
    """All kinds as often as each other, in any order."""
    order: list[Callable] = []
    while len(order) < count:
        order += chance.sample(kinds, len(kinds))
    return order[:count]


@dataclasses.dataclass(frozen=True)
class Struck:
    """A fault that was: its kind, where it struck, the exit code after it and what was said."""

    kind: str
    where: str
    code: int
    said: str


def through_a_storm(place: Path, steps: int, faults: int, seed: int) -> list[Struck]:
    """Strikes and starts again until all faults have been; then lets it end."""
    chance = random.Random(seed)
    storm = Storm(place / "storm", place / "cache", chance)
    words, environment = command(place, "storm")
    starts = -(-faults // 2)
    struck: list[Struck] = []
    waiting = in_turn(REST, starts, chance)
    for number, live in enumerate(in_turn(LIVE, starts, chance)):
        # The first of those that are waiting which finds something to damage.
        rest, where = next(((r, w) for r in waiting if (w := r(storm))), (None, None))
        start = Start(words, environment)
        there = live(storm, start, (number + 1) * steps // (starts + 1))
        code = start.end()
        said = _telling(start.lines)
        if rest is not None and where is not None:
            waiting.remove(rest)
            struck.append(Struck(rest.__name__, where, code, _met(start.lines)))
            _show(len(struck), struck[-1])
        struck.append(Struck(live.__name__, there, code, said))
        _show(len(struck), struck[-1])
        if code not in ENDS[live.__name__]:
            sys.exit(f"error: exit code {code}:\n" + "\n".join(start.lines[-30:]))
    for rest in waiting:
        if where := rest(storm):
            struck.append(Struck(rest.__name__, where, 0, "before the last start"))
            _show(len(struck), struck[-1])
    last = Start(words, environment)
    if last.end():
        sys.exit("error: the last start failed:\n" + "\n".join(last.lines[-30:]))
    return struck


def _show(number: int, fault: Struck) -> None:
    print(f"{number:3} {fault.kind:22} {fault.where}", flush=True)
    print(f"    exit code {fault.code}; {fault.said or 'nothing said of it'}", flush=True)


def _telling(lines: Sequence[str]) -> str:
    """The line in which a start says why it ends."""
    words = ("error:", "goes on from here", "could not be saved")
    return next((line for line in reversed(lines) if any(w in line for w in words)), "")[:300]


def _met(lines: Sequence[str]) -> str:
    """What a start says of damage that it meets."""
    words = ("set aside", "damaged program", "removed .saving", "not checkpoints of ours")
    return "; ".join(line for line in lines if any(word in line for word in words))[:300]


def digests(run: Path) -> dict[str, str]:
    """A digest of every array, and of every other thing that must not differ."""
    import jax
    import numpy as np

    from stf_jax.optim import parameter_path
    from stf_jax.run import Run
    from stf_jax.train import abstract_state

    folder = Run(run)
    classes = len(json.loads((run / "results.json").read_text())["class_names"])
    settings = folder.settings()
    found = {"scores.csv": hashlib.sha256((run / "scores.csv").read_bytes()).hexdigest()}
    for stage in STAGES:
        state = abstract_state(settings, classes, stage)
        for name, like in (("last", state), ("best", state.params)):
            checkpoints = getattr(folder, name)(stage)
            step, tree, _ = checkpoints.restore(like)
            checkpoints.close()
            found[f"{stage}/{name}/step"] = str(step)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                array = np.asarray(leaf)
                told = f"{array.dtype}{array.shape}".encode() + array.tobytes()
                key = f"{stage}/{name}/{parameter_path(path)}"
                found[key] = hashlib.sha256(told).hexdigest()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    return found | {"metrics.jsonl": json.dumps(timeless)}


def main(argv: Sequence[str]) -> None:
    """Runs both, compares them and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    place = Path(tempfile.mkdtemp(prefix="chaos_"))
    began = time.monotonic()
    steps = in_peace(place)
    print(f"in peace: {steps} steps, {time.monotonic() - began:.0f} s", flush=True)
    struck = through_a_storm(place, steps, _FAULTS.value, _SEED.value)
    seconds = time.monotonic() - began
    peace, stormy = digests(place / "peace"), digests(place / "storm")
    differ = sorted(k for k in peace.keys() | stormy.keys() if peace.get(k) != stormy.get(k))
    rows = table(struck, same=not differ)
    with open(_OUT.value, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['kind']:22} {row['struck']:3}  exit codes {row['exit_codes']}")
    if differ:
        sys.exit(f"error: {len(differ)} of {len(peace)} differ, such as {differ[:5]}; see {place}")
    print(f"{len(struck)} faults survived in {seconds:.0f} s: {len(peace)} digests are the same")
    shutil.rmtree(place)


def table(struck: Sequence[Struck], *, same: bool) -> list[dict[str, Any]]:
    """A row for every kind, and one for all."""
    from experiments.bench.table import processor
    from stf_jax.main import environment

    facts = environment()
    kinds = collections.defaultdict(list)
    for fault in struck:
        kinds[fault.kind].append(fault)
    kinds["all"] = list(struck)
    return [
        {
            "kind": kind,
            "struck": len(faults),
            "exit_codes": " ".join(f"{k}x{n}" for k, n in _counts(faults).items()),
            "identical": same,
            "setting": "demo" if _FULL.value else "shrunk",
            "seed": _SEED.value,
            "commit": facts["commit"],
            "machine": f"{facts['machine']}, {processor()}",
        }
        for kind, faults in kinds.items()
    ]


def _counts(faults: Sequence[Struck]) -> dict[int, int]:
    return dict(sorted(collections.Counter(fault.code for fault in faults).items()))


if __name__ == "__main__":
    app.run(main)
