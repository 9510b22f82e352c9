"""A run on disk: its folder, its configuration, its data and its trained network."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from stf_jax import hosts, prepare, protocols
from stf_jax.augment import AugmentSettings
from stf_jax.baselines import volumes_left
from stf_jax.checkpoint import Checkpoints, Params
from stf_jax.datasets import DataSettings
from stf_jax.flow import TvL1Settings
from stf_jax.index import ClipEntry, VideoIndex, some
from stf_jax.inputs import Batch, InputSettings
from stf_jax.model import PAPER_MODEL, Network, build_model, unread
from stf_jax.optim import OptimizerSettings, StageSettings
from stf_jax.parallel import make_mesh
from stf_jax.pipeline import SamplingSettings
from stf_jax.prepare import RecordSettings
from stf_jax.records import Records
from stf_jax.transfer import TransferSettings, Weights
from stf_jax.views import EvalSettings

# Settings that say where things are or how fast they go, never what comes out: a run may be
# continued with others.
_FREE = (
    "data.root",
    "data.archive",
    "data.download",
    "records.root",
    "records.workers",
    "records.timeout",
    "allow_cpu",
    "allow_mismatch",
    "model_devices",
    "log_every_steps",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A configuration turned into the settings of each part, checked before any work begins.

    Raises:
      ValueError, TypeError: from the constructor that a sub-dict goes to, naming the key.
    """

    config: ml_collections.FrozenConfigDict
    records: RecordSettings
    sampling: SamplingSettings
    inputs: InputSettings
    augment: AugmentSettings
    optimizer: OptimizerSettings
    stages: Mapping[str, StageSettings]
    transfer: TransferSettings
    eval: EvalSettings

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Settings":
        """Builds the settings of every part from a configuration."""
        config = ml_collections.FrozenConfigDict(config)
        order = tuple(config.stage_order)
        unknown = set(order) - set(config.stages)
        if unknown or not order or len(set(order)) < len(order):
            raise ValueError(
                f"stage_order {order} must name some of stages {tuple(config.stages)}, each once; "
                f"unknown: {sorted(unknown) or 'none'}"
            )
        allowed_mismatches(config.allow_mismatch)
        if config.log_every_steps < 1:
            raise ValueError(f"log_every_steps must be at least 1, got {config.log_every_steps}")
        build_model(config.model, num_classes=2)
        _check_pretrained(config)
        if config.inputs.crop_size > config.records.size:
            raise ValueError(
                f"inputs.crop_size is {config.inputs.crop_size} px but records.size is only "
                f"{config.records.size} px: lower the first or raise the second"
            )
        if config.sampling.flow_step == "stride" and config.records.size < 32:
            raise ValueError(
                "sampling.flow_step='stride' computes flow on the stored frames: records.size must "
                f"be at least 32 px, got {config.records.size}"
            )
        sampling, inputs = SamplingSettings(**config.sampling), InputSettings(**config.inputs)
        inputs.channels(sampling.flow_frames)
        views = EvalSettings(**config.eval)
        if views.subset != "test" and config.data.protocol == "paper_resplit":
            raise ValueError(
                f"eval.subset={views.subset!r} means nothing with data.protocol='paper_resplit', "
                "which holds nothing out; use 'test'"
            )
        views.check_room(config.records.size, config.records.resize, config.inputs.crop_size)
        augment = AugmentSettings(**config.augment)
        if augment.mixup and config.batch_size < 2:
            raise ValueError(
                f"augment.mixup={augment.mixup} mixes the clips of a batch: batch_size must be at "
                f"least 2, got {config.batch_size}"
            )
        settings = cls(
            config=config,
            records=RecordSettings.of(config.records),
            sampling=sampling,
            inputs=inputs,
            augment=augment,
            optimizer=OptimizerSettings(**config.optimizer),
            stages={name: StageSettings(**config.stages[name]) for name in config.stage_order},
            transfer=TransferSettings(**config.transfer),
            eval=views,
        )
        for name in settings.stages:
            settings._check_division(name)
        return settings

    @property
    def mesh(self) -> Mesh:
        """The devices, and how work is divided among them."""
        return make_mesh(self.config.model_devices)

    @property
    def evaluated_stage(self) -> str:
        """The stage whose best weights are the run's result: the last."""
        return self.config.stage_order[-1]

    def in_stage(self, name: str) -> "Settings":
        """The settings that a stage's training steps follow: those of its divided clips, if any.

        With `divide_clips` k the clips have T / k frames and the batches k times as many clips. A
        window of the temporal pyramid is at most a clip. The weights have the same shapes: T is
        long where they are validated, handed on and used.

        Source: the short clips of multigrid training (Wu et al., A Multigrid Method for Efficiently
          Training Video Models, CVPR 2020), without its changes of the picture's size.
        """
        parts = self.stages[name].divide_clips
        if parts == 1:
            return self
        config = ml_collections.ConfigDict(self.config).unlock()
        frames = self.sampling.num_frames // parts
        config.sampling.num_frames = frames
        config.batch_size *= parts
        tpn = config.model.tpn
        tpn.window, tpn.stride = min(tpn.window, frames), min(tpn.stride, frames)
        return dataclasses.replace(
            self,
            config=ml_collections.FrozenConfigDict(config),
            sampling=dataclasses.replace(self.sampling, num_frames=frames),
        )

    def _check_division(self, name: str) -> None:
        """Makes sure that a stage's `divide_clips` leaves clips that the network can read.

        Raises:
          ValueError: it does not (names what would).
        """
        parts, total = self.stages[name].divide_clips, self.sampling.num_frames
        fitting = [n for n in range(1, total // 2 + 1) if self._divides(n)]
        if parts != 1 and parts not in fitting:
            raise ValueError(
                f"stages.{name}.divide_clips: got {parts}, allowed: {', '.join(map(str, fitting))} "
                f"(sampling.num_frames={total} in clips that model.tpn's windows and levels, or "
                "the first fully connected layer of model.architecture='c3d', fit; 1: whole clips)"
            )

    def _divides(self, parts: int) -> bool:
        frames, odd = divmod(self.sampling.num_frames, parts)
        if odd or parts == 1:
            return parts == 1
        model = self.config.model
        if model.architecture == "c3d":
            return volumes_left(frames) == volumes_left(self.sampling.num_frames)
        if model.architecture == "cnn_lstm":
            return True
        window, stride = min(model.tpn.window, frames), min(model.tpn.stride, frames)
        whole = (frames - window) % stride == 0
        return whole and all(window % bins == 0 for bins in model.tpn.levels)

    def model(self, num_classes: int) -> Network:
        """The network for a number of classes."""
        return build_model(self.config.model, num_classes)

    def clip_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the network's two inputs: rgb `b t h w 3` and flow `b t h w c`."""
        shape = (batch, self.sampling.num_frames, self.inputs.crop_size, self.inputs.crop_size)
        return (*shape, 3), (*shape, self.inputs.channels(self.sampling.flow_frames))

    def stored_batch(self) -> Batch:
        """The shapes and dtypes of a training batch of all processes together."""
        size, side = self.config.batch_size, self.records.size
        clip = (size, self.sampling.num_frames)
        shape: Any = jax.ShapeDtypeStruct
        return Batch(
            rgb=shape((*clip, side, side, 3), jnp.uint8),
            flow=shape((*clip, 2 * self.sampling.flow_frames, side, side), jnp.uint8),
            label=shape((size,), jnp.int32),
            mask=shape((size,), jnp.bool_),
            entry=shape((size,), jnp.int32),
            seed=shape((size, 2), jnp.uint32),
        )

    def initial_params(self, model: Network) -> Params:
        """Random parameters, from the run's seed."""
        rgb, flow = self.clip_shapes(1)
        return _compiled_init(jax.random.key(self.config.seed), model=model, rgb=rgb, flow=flow)

    def compile_initial_params(self, model: Network) -> None:
        """Compiles what `initial_params` calls."""
        rgb, flow = self.clip_shapes(1)
        _compiled_init.lower(jax.random.key(0), model=model, rgb=rgb, flow=flow).compile()

    def abstract_params(self, num_classes: int) -> Params:
        """The shapes and dtypes of the parameters; costs no memory."""
        return _abstract_params(self.model(num_classes), *self.clip_shapes(1))


def _check_pretrained(config: ml_collections.FrozenConfigDict) -> None:
    """ImageNet weights are VGG-16's: there are none for 3-D convolutions, nor for flow alone."""
    name, stream = config.model.architecture, config.model.streams
    fits = name == "stf" or (name == "cnn_lstm" and stream == "rgb")
    if not fits and config.pretrained != "none" and not config.transfer.source:
        raise ValueError(
            f"pretrained: got {config.pretrained!r}, allowed: 'none' with model.architecture="
            f"{name!r} and model.streams={stream!r}, which VGG-16's ImageNet weights do not fit"
        )


def _init(key: jax.Array, *, model: Network, rgb: tuple[int, ...], flow: tuple[int, ...]) -> Params:
    return model.init({"params": key}, jnp.zeros(rgb), jnp.zeros(flow), train=False)["params"]


@functools.lru_cache(maxsize=8)  # a start asks five times, for a third of a second each
def _abstract_params(model: Network, rgb: tuple[int, ...], flow: tuple[int, ...]) -> Params:
    init = functools.partial(_init, model=model, rgb=rgb, flow=flow)
    return jax.eval_shape(init, jax.random.key(0))


# Runs once, on zeros: what counts is the time to compile, which is a third of the usual this way.
_compiled_init = jax.jit(
    _init,
    static_argnames=("model", "rgb", "flow"),
    compiler_options={"xla_backend_optimization_level": 0},
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run; every path inside is relative to it, so it can be moved."""

    workdir: Path

    def best(self, stage: str) -> Checkpoints:
        """The best weights of a stage; stored twice, for no other step can stand in for them."""
        return Checkpoints(self.workdir / "stages" / stage / "best", keep=1, copies=2)

    def last(self, stage: str) -> Checkpoints:
        """What a stage continues from."""
        return Checkpoints(self.workdir / "stages" / stage / "last", keep=2)

    def stage_file(self, stage: str, name: str) -> Path:
        """A file of a stage, such as 'done.json'."""
        return self.workdir / "stages" / stage / name

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file whole or not at all; of several processes, process 0 does."""
        if not hosts.leads():
            return
        path = self.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        prepare.write_aside(path, (text + "\n").encode())

    def read_json(self, name: str, *needed: str) -> Any:
        """Reads a JSON file of the run.

        Args:
          name: of the file.
          *needed: keys that it must have.

        Raises:
          FileNotFoundError: it is not there (says what makes it).
          ValueError: it is no JSON, or a key is missing (names them).
        """
        path = self.workdir / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {self.workdir} is not the folder of a run that got that far. "
                "Runs are made by `python -m stf_jax.main --config=... --workdir=...`."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}): restore it from a backup"
            ) from error
        missing = [key for key in needed if key not in content]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: {_other_version(self._made_by())}"
            )
        return content

    def settings(self) -> Settings:
        """The settings that the run was started with.

        Raises:
          FileNotFoundError: there is no configuration.
          ValueError: it is of another version of this library (names the keys).
        """
        config = self.read_json("config.json")
        check_config_keys(config, self.workdir / "config.json", self._made_by())
        return Settings.of(ml_collections.ConfigDict(config))

    def _made_by(self) -> str:
        """The commit that a finished run was made with, or ''."""
        path = self.workdir / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = "environment" in results and "commit" in results["environment"]
        return results["environment"]["commit"] if known else ""

    def claim(self, config: ml_collections.ConfigDict) -> None:
        """Stores the configuration, or checks that it is the stored one.

        Raises:
          ValueError: the folder holds a run with another configuration (lists the keys).
        """
        if (self.workdir / "config.json").exists():
            self.check_config(config)
        self.write_json("config.json", json.loads(config.to_json_best_effort()))

    def check_config(self, config: ml_collections.ConfigDict) -> None:
        """Checks that a configuration is that of the run.

        Raises:
          FileNotFoundError: the folder holds no run.
          ValueError: it holds a run with another configuration, or of another version of this
            library (lists the keys).
        """
        old = self.read_json("config.json")
        check_config_keys(old, self.workdir / "config.json", self._made_by())
        a, b = deciding(old), deciding(config)
        if a != b:
            differ = sorted(k for k in {*a, *b} if a.get(k) != b.get(k))
            lines = "\n  ".join(f"{k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in differ)
            raise ValueError(
                f"{self.workdir} holds a run with another configuration:\n  {lines}\n"
                "Choose another --workdir, or repeat the settings that it was started with."
            )


def deciding(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings that decide what comes out, by their dotted names, as JSON would hold them.

    Without those of parts that the network does not have: a card may change them, and a run of
    another network is still the same run.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = json.loads(config.to_json_best_effort())
    flat = _flat(config)
    idle: tuple[str, ...] = ()
    if {"model.architecture", "model.streams"} <= flat.keys():
        idle = unread(flat["model.architecture"], flat["model.streams"])
    return {
        key: value
        for key, value in flat.items()
        if key not in _FREE and not (key.startswith("model.") and key.split(".")[1] in idle)
    }


# The keys of a configuration that belong to no part of it.
_OWN_KEYS = (
    "seed",
    "batch_size",
    "checkpoint_every_steps",
    "log_every_steps",
    "allow_cpu",
    "allow_mismatch",
    "model_devices",
    "pretrained",
    "stage_order",
)
_PARTS: dict[str, Any] = {
    "data": DataSettings,
    "records": RecordSettings,
    "records.tvl1": TvL1Settings,
    "sampling": SamplingSettings,
    "inputs": InputSettings,
    "augment": AugmentSettings,
    "optimizer": OptimizerSettings,
    "transfer": TransferSettings,
    "eval": EvalSettings,
}


def config_keys(stages: Iterable[str]) -> set[str]:
    """The dotted keys of a whole configuration with these stages."""
    parts = {**_PARTS, **{f"stages.{name}": StageSettings for name in stages}}
    keys = {f"{part}.{f.name}" for part, made in parts.items() for f in dataclasses.fields(made)}
    return (keys - {*parts}) | {*_OWN_KEYS, *_flat(PAPER_MODEL, "model.")}


def check_config_keys(config: Mapping[str, Any], where: Path, made_by: str) -> None:
    """Makes sure that a stored configuration says what this version asks, no less and no more.

    What a key that is missing would have to be is not guessed: every default is in the cards, and
    today's need not be what the program did when the key was not there.

    Args:
      config: the content of a `config.json`.
      where: the file.
      made_by: the commit that wrote it; '' if that is not known.

    Raises:
      ValueError: keys are missing or unknown (names them, the file, and what to do).
    """
    stages = config["stages"] if "stages" in config else {}
    there, expected = {*_flat(config)}, config_keys(stages)
    lines = [f"missing: {key}" for key in sorted(expected - there)]
    lines += [f"unknown: {key}" for key in sorted(there - expected)]
    if lines:
        told = "\n  ".join(lines)
        raise ValueError(
            f"{where} has not the keys that this version's cards have:\n  {told}\n"
            f"So {_other_version(made_by)} Or edit the file, in a copy of its folder: give a "
            "missing key the value that does what was done without it (the cards in configs/ say "
            "what each means), and take an unknown one out."
        )


def _other_version(commit: str) -> str:
    commit = commit.removesuffix("-dirty")
    known = f" (git checkout {commit})" if re.fullmatch(r"[\w.-]+", commit) else ""
    return (
        "it was written by another version of stf_jax. Nothing of the run is lost: that version "
        f"reads it{known}."
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def usable_entries(index: VideoIndex, records: Records, subset: str) -> list[ClipEntry]:
    """The clips of a subset that can be read; the others are listed in the manifest."""
    return [entry for entry in index.subset(subset) if records.rows[entry.video_id].usable]


# --- what a checkpoint is for ----------------------------------------------------------------

_MISMATCHES = {
    "classes": "other classes, or in another order",
    "split": "another split or protocol, or other videos",
    "flow": "other stored frames or optical flow",
}


def allowed_mismatches(told: str) -> tuple[str, ...]:
    """Reads `allow_mismatch`: names of what may differ, separated by commas.

    Raises:
      ValueError: an unknown name.
    """
    names = tuple(filter(None, told.split(",")))
    for name in names:
        if name not in (*_MISMATCHES, "trained"):
            raise ValueError(f"allow_mismatch: got {name!r}, of {', '.join(_MISMATCHES)}, trained")
    return names


def stamp_of(index: VideoIndex, settings: Settings) -> dict[str, Any]:
    """What every checkpoint of a run carries: classes, split and how frames and flow are made."""
    stamp = {
        "classes": list(index.class_names),
        "split": index.stamp(),
        "flow": settings.records.stamp(),
    }
    return json.loads(json.dumps(stamp))


def check_stamp(
    stored: Mapping[str, Any], now: Mapping[str, Any], where: Path, allow: Collection[str]
) -> None:
    """Refuses a checkpoint that was trained for something else.

    Raises:
      ValueError: it was (says in what, and how to use it all the same).
    """
    differ = [name for name in _MISMATCHES if stored.get(name) != now[name] and name not in allow]
    if not differ:
        return
    lines = [f"{name} ({_MISMATCHES[name]}): {_change(stored, now, name)}" for name in differ]
    raise ValueError(
        f"{where} was trained with something else than is here now:\n  "
        + "\n  ".join(lines)
        + "\nBring back what it was trained with, or use it all the same with "
        f"--config.allow_mismatch={','.join(differ)} (training) or --allow={','.join(differ)} "
        "(experiments/evaluate.py)."
    )


def _change(stored: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    if name not in stored:
        return "the checkpoint does not say"
    if name == "classes":
        return f"{stored[name]} there, {now[name]} now"
    a, b = _flat(stored[name]), _flat(now[name])
    changed = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return ", ".join(f"{k} {a.get(k)!r} there, {b.get(k)!r} now" for k in changed)


def best_params(
    run: Run, settings: Settings, stage: str, stamp: Mapping[str, Any], allow: Collection[str]
) -> Params:
    """The best weights of a stage, if they were trained for what the stamp says.

    Raises:
      FileNotFoundError: there are none.
      ValueError: they were trained for something else.
    """
    return stage_params(run, settings, stage, "best", stamp, allow)


def stage_params(
    run: Run,
    settings: Settings,
    stage: str,
    checkpoint: str,
    stamp: Mapping[str, Any],
    allow: Collection[str],
) -> Params:
    """Weights of a stage, if they were trained for what the stamp says.

    Args:
      run: the run.
      settings: its settings.
      stage: one of its stages.
      checkpoint: 'best'; 'last', where the stage stands; or the number of a step that is stored.
        With `optimizer.ema` they are the averaged ones.
      stamp: what they must have been trained with.
      allow: in what they may differ from it.

    Raises:
      FileNotFoundError: there are none.
      ValueError: there is no such stage, or they were trained for something else.
    """
    if stage not in settings.stages:
        raise ValueError(f"stage: got {stage!r}, one of {', '.join(settings.stages)}")
    if checkpoint not in ("best", "last") and not checkpoint.isdecimal():
        raise ValueError(f"checkpoint: got {checkpoint!r}, 'best', 'last' or the number of a step")
    step = int(checkpoint) if checkpoint.isdecimal() else None
    like = settings.abstract_params(len(stamp["classes"]))
    kinds = [checkpoint] if step is None else ["best", "last"]
    stored: list[int] = []
    for kind in kinds:
        with contextlib.closing(getattr(run, kind)(stage)) as checkpoints:
            stored += checkpoints.steps()
            if step is not None and step not in stored:
                continue
            # The last ones hold all that training goes on from.
            part = "average" if settings.optimizer.ema else "params"
            part = part if kind == "last" else ""
            _, params, record = checkpoints.restore(like, step=step, part=part)
        told = record["stamp"] if "stamp" in record else {}
        check_stamp(told, stamp, run.workdir / "stages" / stage / kind, allow)
        return params
    raise FileNotFoundError(
        f"{run.workdir}: stage '{stage}' holds no step {step}, but "
        f"{', '.join(map(str, sorted({*stored}))) or 'none at all'}"
    )


def source_weights(settings: Settings, stamp: Mapping[str, Any]) -> Weights | None:
    """The best weights of the run that `transfer.source` names, or None if it names none.

    Raises:
      FileNotFoundError: it is not the folder of a finished run.
      ValueError: it was trained with another flow.
    """
    if not settings.transfer.source:
        return None
    source = Run(Path(settings.transfer.source))
    stage = source.read_json("config.json", "stage_order")["stage_order"][-1]
    source.read_json(f"stages/{stage}/done.json")
    checkpoints = source.best(stage)
    try:
        _, arrays, record = checkpoints.restore(None)
    finally:
        checkpoints.close()
    told = record["stamp"]
    allow = {*allowed_mismatches(settings.config.allow_mismatch), "classes", "split"}
    check_stamp(told, stamp, source.workdir, allow)
    label = f"{source.workdir}, stage '{stage}'"
    return Weights(label, arrays, other_classes=told["classes"] != stamp["classes"])


def of_known_classes(index: VideoIndex, classes: Sequence[str], *, leave_out: bool) -> VideoIndex:
    """Gives other videos the labels of a run's classes.

    Args:
      index: the videos.
      classes: of the run.
      leave_out: drop the videos of other classes.

    Raises:
      ValueError: there are other classes (names them).
    """
    unknown = sorted(set(index.class_names) - set(classes))
    if unknown and not leave_out:
        raise ValueError(
            f"{index.root} has {len(unknown)} classes that the run does not know: {some(unknown)}; "
            f"it knows {some(list(classes))}. Say --allow=classes to score the others."
        )
    entries = [
        dataclasses.replace(entry, label=classes.index(index.class_names[entry.label]))
        for entry in index.entries
        if index.class_names[entry.label] in classes
    ]
    return dataclasses.replace(index, entries=tuple(entries), class_names=tuple(classes))


# --- which videos a number is about ----------------------------------------------------------


def epoch_index(index: VideoIndex, records: Records, stage: int, epoch: int) -> VideoIndex:
    """The index as one epoch of a stage sees it, both from 0: another one in 'paper_resplit'."""
    if index.resplit_seed is None:
        return index
    return protocols.resplit(_usable(index, records), stage, epoch)


def described(index: VideoIndex, settings: Settings) -> VideoIndex:
    """The index as the figures of a run describe it: those of its test, or of what it held out."""
    return protocols.scored_on(index, settings.eval.subset)


def scored_index(run: Run, settings: Settings, index: VideoIndex, records: Records) -> VideoIndex:
    """The index whose test videos give a finished run's result."""
    if index.resplit_seed is None:
        return index
    done = [run.read_json(f"stages/{name}/done.json") for name in settings.config.stage_order]
    return protocols.after_epochs(_usable(index, records), [stage["epochs"] for stage in done])


def _usable(index: VideoIndex, records: Records) -> VideoIndex:
    usable = tuple(entry for entry in index.entries if records.rows[entry.video_id].usable)
    return dataclasses.replace(index, entries=usable)


_VIDEO_COLUMNS = ("video_id", "class", "group", "subset", "sha256")


def write_videos(run: Run, index: VideoIndex, records: Records) -> None:
    """Writes which videos the run uses for what, unusable ones left out: `videos.csv`."""
    if not hosts.leads():
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_VIDEO_COLUMNS)
    for e in _usable(index, records).entries:
        digest = records.rows[e.video_id].sha256
        writer.writerow([e.video_id, index.class_names[e.label], e.group, e.subset, digest])
    prepare.write_aside(run.workdir / "videos.csv", text.getvalue().encode())


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What a run has learnt from: what its stop rule watched and what its source knew included.

    Args:
      rows: of every video the name of its data set, id, source video and digest of its bytes.
    """

    rows: frozenset[tuple[str, str, str, str]]

    @classmethod
    def of(cls, run: Run) -> "TrainedOn":
        """Reads a run's folder."""
        data = run.read_json("data.json", "name", "stamp")
        rows = _read_table(run.workdir / "videos.csv")
        if data["stamp"]["split"]["protocol"] != "paper_resplit":  # that one takes turns with all
            rows = [row for row in rows if row["subset"] != "test"]
        own = {(data["name"], row["video_id"], row["group"], row["sha256"]) for row in rows}
        return cls(frozenset(own) | (cls.before(run) or cls(frozenset())).rows)

    @classmethod
    def before(cls, run: Run) -> "TrainedOn | None":
        """What a run's weights knew before it began (`transferred.csv`), or None if nothing."""
        path = run.workdir / _TRANSFERRED
        if not path.exists():
            return None
        return cls(frozenset(tuple(r[c] for c in _TRAINED_COLUMNS) for r in _read_table(path)))  # type: ignore[misc]

    def known(
        self, entries: Iterable[ClipEntry], index: VideoIndex, records: Records
    ) -> list[ClipEntry]:
        """Those of some videos that the run has learnt from, by their bytes or by their ids."""
        digests = {digest for *_, digest in self.rows}
        ids = {(name, video_id) for name, video_id, *_ in self.rows}
        return [
            entry
            for entry in entries
            if records.rows[entry.video_id].sha256 in digests or (index.name, entry.video_id) in ids
        ]

    def related(self, entries: Iterable[ClipEntry], index: VideoIndex) -> float | None:
        """Share of some videos whose source it has learnt from; None if sources are not known."""
        entries = list(entries)
        if index.overlap is None:
            return None
        groups = {(name, group) for name, _, group, _ in self.rows}
        return sum((index.name, e.group) in groups for e in entries) / max(1, len(entries))


_TRANSFERRED = "transferred.csv"
_TRAINED_COLUMNS = ("data", "video_id", "group", "sha256")


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: what the run was trained on is unknown")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_source(run: Run, settings: Settings, index: VideoIndex, records: Records) -> VideoIndex:
    """The index with what the run that weights come from knew of its test videos.

    Stores what that run was trained on (`transferred.csv`), so that it may go.

    Raises:
      FileNotFoundError: `transfer.source` is not the folder of a run.
      ValueError: it was trained on videos that are to be tested on.
    """
    if not settings.transfer.source:
        return index
    trained = TrainedOn.before(run)
    if trained is None:
        trained = TrainedOn.of(Run(Path(settings.transfer.source)))
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_TRAINED_COLUMNS)
        writer.writerows(sorted(trained.rows))
        prepare.write_aside(run.workdir / _TRANSFERRED, text.getvalue().encode())
    tested = _usable(index, records).entries
    if index.resplit_seed is None:  # else every video is tested on in some epoch
        tested = tuple(entry for entry in tested if entry.subset == index.scored)
    known = trained.known(tested, index, records)
    if known and "trained" not in allowed_mismatches(settings.config.allow_mismatch):
        raise ValueError(
            f"transfer.source: {settings.transfer.source} was trained on {len(known)} of the "
            f"{len(tested)} {index.scored} videos, such as {known[0].video_id}: their score would "
            "say nothing about new videos. Choose a split that it has not seen, or say "
            "--config.allow_mismatch=trained to have it all the same, labelled as leaky."
        )
    related = trained.related(tested, index)
    if not known and not related:
        return index
    share = max(len(known) / len(tested), related or 0.0)
    note = (
        f"the weights to start from have seen {share:.1%} of the {index.scored} videos or their "
        "sources"
    )
    overlap = None if index.overlap is None else max(index.overlap, share)
    return dataclasses.replace(index, leaky=True, overlap=overlap, notes=(*index.notes, note))
