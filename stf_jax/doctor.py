"""Checks an installation, part by part, and names the command that mends what is wrong.

    python -m stf_jax.doctor [--workdir=runs] [--records=records] [--json]

A line for each check: 'ok', 'warn' (works, but look at it) or 'FAIL', what was found, and the fix.
The exit code is 1 if anything failed. Only the standard library is imported at first: whatever is
missing is told like any other fault.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stf_jax import host

ROOT = Path(__file__).parent.parent
# Distributions that put other files in the place of ours, and whose place it is.
RIVALS = {
    "tensorflow": "tensorflow-cpu",
    "tensorflow-gpu": "tensorflow-cpu",
    "tf-nightly": "tensorflow-cpu",
    "opencv-python": "opencv-contrib-python-headless",
    "opencv-contrib-python": "opencv-contrib-python-headless",
    "opencv-python-headless": "opencv-contrib-python-headless",
}
# Free space, GiB: without the first nothing runs; both stages of a run at the paper's size keep
# checkpoints of less than the second.
NEEDED, WANTED = 1, 20
# The demo's network, made so small that its training step is compiled in seconds.
TINY = {
    "batch_size": 4,
    "records.size": 36,
    "sampling.num_frames": 8,
    "sampling.flow_frames": 2,
    "model.width": 4,
    "model.mst.width": 32,
    "model.conv3d.width": 32,
    "model.fusion.width": 32,
    "model.tpn.window": 4,
    "model.tpn.stride": 4,
    "model.lstm.hidden": 8,
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
      check: what was looked at.
      level: 'ok', 'warn' or 'FAIL'.
      told: what was found.
      fix: the command, or what else to do; '' where nothing is to be done.
    """

    check: str
    level: str
    told: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"\n{'':20}fix: {self.fix}" if self.fix else ""
        return f"{self.level:5} {self.check:13} {self.told}{fix}"


Findings = Iterator[Finding]


def examine(workdir: Path, records: Path) -> Findings:
    """Makes all checks, from the ground up.

    Args:
      workdir: folder of the runs, which need not be there yet.
      records: folder of the prepared videos, likewise.

    Yields:
      What each found. A check that breaks is a finding too.
    """
    checks: Mapping[str, Callable[[], Findings]] = {
        "python": check_python,
        "libraries": check_libraries,
        "rivals": check_rivals,
        "devices": check_devices,
        "folders": lambda: check_folders({"--workdir": workdir, "--records": records}),
        "decoder": check_decoder,
        "flow": check_flow,
        "training step": check_training_step,
        "compiled": check_compilation_cache,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # the doctor is for whatever may be wrong
            told = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            yield Finding(name, "FAIL", told, _install("--force-reinstall", *_missing(error)))


def _missing(error: Exception) -> list[str]:
    """The requirements to install again after a failed import; all of them if it is not one."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    owners = importlib.metadata.packages_distributions().get(module, [module])
    named = [r for r in _project()["dependencies"] if _name(r) in {_plain(o) for o in owners}]
    return named or ["--editable", str(ROOT)]


def _install(*arguments: str) -> str:
    constraints = ROOT / "constraints.txt"
    exact = ["--constraint", str(constraints)] if constraints.exists() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *exact, *arguments])


def _project() -> dict[str, Any]:
    """What the package requires: as pyproject.toml says, or what was installed in its absence."""
    path = ROOT / "pyproject.toml"
    if path.exists():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return {key: project[key] for key in ("requires-python", "dependencies")}
    told = importlib.metadata.metadata("stf_jax")
    requires = importlib.metadata.requires("stf_jax") or []
    dependencies = [line for line in requires if "extra ==" not in line]
    return {"requires-python": told["Requires-Python"], "dependencies": dependencies}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _name(requirement: str) -> str:
    # Not by `packaging`: this is needed to say that it is missing, too.
    return _plain(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


def check_python() -> Findings:
    """The interpreter's version."""
    from packaging.specifiers import SpecifierSet

    wanted, version = _project()["requires-python"], platform.python_version()
    told = f"{version} at {sys.executable}, wanted {wanted}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("python", "ok", told)
    else:
        yield Finding("python", "FAIL", told, "rm -rf .venv && make install PYTHON=python3.11")


def check_libraries() -> Findings:
    """Every library that pyproject.toml names, in the range that it names."""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in _project()["dependencies"]]
    faults = 0
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if version and requirement.specifier.contains(version, prereleases=True):
            continue
        faults += 1
        told = f"{requirement.name} {version or 'is missing'}, wanted {requirement.specifier}"
        yield Finding("libraries", "FAIL", told, _install(str(requirement)))
    if not faults:
        yield Finding("libraries", "ok", f"all {len(requirements)} in the wanted ranges")


def check_rivals() -> Findings:
    """Libraries that overwrite the files of ours, whichever was installed last."""
    found = []
    for rival, ours in RIVALS.items():
        try:
            version = importlib.metadata.version(rival)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(rival)
        (wanted,) = [r for r in _project()["dependencies"] if _name(r) == ours]
        yield Finding(
            "rivals",
            "FAIL",
            f"{rival} {version} is installed into the same folder as {ours}",
            f"{shlex.join([sys.executable, '-m', 'pip', 'uninstall', '--yes', rival])} && "
            + _install("--force-reinstall", "--no-deps", wanted),
        )
    if not found:
        yield Finding("rivals", "ok", "no other TensorFlow or OpenCV in the way of ours")


def check_devices() -> Findings:
    """What JAX computes on, and whether that leaves a GPU unused."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    told = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    told = f"{told} ({jax.default_backend()}), {host.cores()}"
    if not host.leaves_gpu_unused(jax.default_backend()):
        yield Finding("devices", "ok", told)
        return
    # Asked for, or for want of the GPU build: each has its own remedy.
    forced = os.environ.get("JAX_PLATFORMS") == "cpu"
    fix = "unset JAX_PLATFORMS" if forced else "make install EXTRAS=cuda12"
    why = "because JAX_PLATFORMS=cpu says so" if forced else "for it is the CPU build"
    yield Finding(
        "devices", "FAIL", f"{told}: there is an NVIDIA GPU that JAX does not use, {why}", fix
    )


def check_folders(folders: Mapping[str, Path]) -> Findings:
    """Whether folders, or the nearest one above where they will be, take files; free space."""
    for flag, folder in folders.items():
        place = folder.absolute()
        while not os.path.exists(place):  # as Path.exists, but False where it may not be known
            place = place.parent
        where = str(folder) if place == folder.absolute() else f"{folder} (in {place})"
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
        except OSError as error:
            yield Finding("folders", "FAIL", f"{where}: {error.strerror}", _mend(flag, place))
            continue
        yield Finding("folders", "ok", f"{where} can be written to")
        free = shutil.disk_usage(place).free / 2**30
        level = "FAIL" if free < NEEDED else "warn" if free < WANTED else "ok"
        told = f"{free:.1f} GiB free in {where}"
        if level == "ok":
            yield Finding("space", level, told)
            continue
        wanted = f"wanted {WANTED} for a run at the paper's size, {NEEDED} at the least"
        fix = f"du -xh {shlex.quote(str(place))} | sort -h | tail, or choose another {flag}"
        yield Finding("space", level, f"{told}, {wanted}", fix)


def _mend(flag: str, place: Path) -> str:
    if not place.is_dir():
        return f"{place} is a file: choose another {flag}"
    if place.stat().st_uid == os.geteuid():
        return f"chmod u+rwx {shlex.quote(str(place))}"
    return f"sudo chown $(id -un) {shlex.quote(str(place))}, or choose another {flag}"


def check_decoder() -> Findings:
    """Encodes a clip in both formats of the demo and decodes it again."""
    import numpy as np

    from stf_jax import demo
    from stf_jax.video import VideoReader

    ground = np.add.outer(np.arange(demo.SIDE), np.arange(demo.SIDE))[..., None]
    ground = (40 + ground + [0, 10, 20]).astype(np.uint8)
    frames = [np.roll(ground, 2 * number, axis=1) for number in range(12)]
    version = importlib.metadata.version("av")
    for suffix in (".mp4", ".avi"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"clip{suffix}"
            demo.encode(path, frames)
            decoded = list(VideoReader(path))
        error = np.inf
        if len(decoded) == len(frames):
            error = float(np.abs(np.array(decoded, np.float32) - np.array(frames)).mean())
        told = f"{suffix}: {len(decoded)} of {len(frames)} frames, {error:.1f} grey levels off"
        if error > 8:
            yield Finding("decoder", "FAIL", told, _reinstall("av"))
        else:
            yield Finding("decoder", "ok", f"{told} (PyAV {version})")


def _reinstall(name: str) -> str:
    (wanted,) = [r for r in _project()["dependencies"] if _name(r) == name]
    return _install("--force-reinstall", "--no-deps", wanted)


def check_flow() -> Findings:
    """Computes the flow of a texture that has moved by a known shift, with OpenCV's algorithms."""
    import numpy as np

    from stf_jax.flow import OPENCV_ALGORITHMS, make_flow

    shift = np.array([1.5, -1.0])
    y, x = np.mgrid[:64, :64].astype(np.float64)

    def picture(dx: float, dy: float) -> np.ndarray:
        waves = [np.sin(a * (x - dx) + b * (y - dy)) for a, b in ((0.5, 0.1), (-0.2, 0.4), (1, 1))]
        return (128 + 30 * np.sum(waves, axis=0)).astype(np.uint8)

    off = {}
    for algorithm in OPENCV_ALGORITHMS:
        field = make_flow(algorithm)(picture(0.0, 0.0), picture(*shift.tolist()))
        off[algorithm] = float(np.abs(np.median(field[8:-8, 8:-8], axis=(0, 1)) - shift).max())
    told = ", ".join(f"{name} {error:.2f}" for name, error in off.items())
    told = f"px off a known shift: {told}"
    if max(off.values()) > 0.25:
        yield Finding("flow", "FAIL", told, _reinstall("opencv-contrib-python-headless"))
    else:
        yield Finding("flow", "ok", told)


def check_training_step() -> Findings:
    """Trains the demo's network, shrunk, on one batch: the loss must be finite and fall."""
    import jax
    import numpy as np

    from stf_jax.inputs import Batch
    from stf_jax.parallel import divide, place
    from stf_jax.run import Settings
    from stf_jax.train import initial_state, train_step

    card = ROOT / "configs" / "demo.py"
    if not card.exists():
        fix = "call it from a checkout of the repository, which holds the cards"
        yield Finding("training step", "warn", f"not tried: {card} is not there", fix)
        return
    config = runpy.run_path(str(card))["get_config"]()
    config.update_from_flattened_dict(TINY)
    settings = Settings.of(config)
    devices = settings.mesh.shape["data"]
    size, side, chance = devices * config.batch_size, config.records.size, np.random.default_rng(0)
    clip, fields = (size, config.sampling.num_frames), 2 * config.sampling.flow_frames
    arrays: dict[str, Any] = {
        "rgb": chance.integers(0, 256, (*clip, side, side, 3), np.uint8),
        "flow": chance.integers(0, 256, (*clip, fields, side, side), np.uint8),
        "label": (np.arange(size) % 2).astype(np.int32),
        "mask": np.ones(size, bool),
        "entry": np.arange(size, dtype=np.int32),
        "seed": np.zeros((size, 2), np.uint32),
    }
    model = settings.model(num_classes=2)
    rates = settings.stages[config.stage_order[0]].rates
    state = initial_state(settings.initial_params(model), settings.optimizer, rates)
    state, batch = place(state, settings.mesh), divide(Batch(**arrays), settings.mesh)
    losses = []
    for _ in range(6):
        state, record = train_step(
            state,
            batch,
            jax.random.key(0),
            np.float32(1e-3),
            model=model,
            inputs=settings.inputs,
            augment=settings.augment,
            optimizer=settings.optimizer,
            rates=rates,
            mesh=settings.mesh,
        )
        losses.append(float(record.loss))
    told = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    if np.isfinite(losses).all() and losses[-1] < losses[0]:
        yield Finding("training step", "ok", told)
    else:
        told = f"{told}, expected it finite and falling"
        yield Finding("training step", "FAIL", told, f"{_reinstall('jax')} jaxlib")


def check_compilation_cache() -> Findings:
    """The folder in which JAX keeps compiled programs, if one is set."""
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        yield Finding("compiled", "ok", "no folder for compiled programs is set")
        return
    for finding in check_folders({"JAX_COMPILATION_CACHE_DIR": Path(folder)}):
        # Without it programs are compiled anew at each start, no more.
        level = "warn" if finding.level == "FAIL" else finding.level
        yield dataclasses.replace(finding, check="compiled", level=level)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stf_jax.doctor", description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--records", type=Path, default=Path("records"), help="prepared videos")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    options = parser.parse_args(argv)
    findings = []
    for finding in examine(options.workdir, options.records):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    return int(any(finding.level == "FAIL" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
