"""A run on disk: its folder, its configuration, its data and its trained network."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from stf_jax import prepare
from stf_jax.augment import AugmentSettings
from stf_jax.checkpoint import Checkpoints, Params
from stf_jax.datasets import ClipEntry, VideoIndex
from stf_jax.inputs import InputSettings
from stf_jax.model import Network, build_model
from stf_jax.optim import OptimizerSettings, StageSettings
from stf_jax.parallel import make_mesh
from stf_jax.pipeline import SamplingSettings
from stf_jax.prepare import RecordSettings
from stf_jax.records import Records

# Settings that say where things are or how fast they go, never what comes out: a run may be
# continued with others.
_FREE = (
    "data.root",
    "records.root",
    "records.workers",
    "records.timeout",
    "allow_cpu",
    "model_devices",
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

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Settings":
        """Builds the settings of every part from a configuration."""
        config = ml_collections.FrozenConfigDict(config)
        unknown = set(config.stage_order) ^ set(config.stages)
        if unknown or not config.stage_order:
            raise ValueError(
                f"stage_order {tuple(config.stage_order)} must name each of stages "
                f"{tuple(config.stages)} once; they differ in {sorted(unknown)}"
            )
        build_model(config.model, num_classes=2)
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
        augment = AugmentSettings(**config.augment)
        if augment.mixup and config.batch_size < 2:
            raise ValueError(
                f"augment.mixup={augment.mixup} mixes the clips of a batch: batch_size must be at "
                f"least 2, got {config.batch_size}"
            )
        return cls(
            config=config,
            records=RecordSettings(**config.records),
            sampling=sampling,
            inputs=inputs,
            augment=augment,
            optimizer=OptimizerSettings(**config.optimizer),
            stages={name: StageSettings(**config.stages[name]) for name in config.stage_order},
        )

    @property
    def mesh(self) -> Mesh:
        """The devices, and how work is divided among them."""
        return make_mesh(self.config.model_devices)

    @property
    def evaluated_stage(self) -> str:
        """The stage whose best weights are the run's result: the last."""
        return self.config.stage_order[-1]

    def model(self, num_classes: int) -> Network:
        """The network for a number of classes."""
        return build_model(self.config.model, num_classes)

    def clip_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the network's two inputs: rgb `b t h w 3` and flow `b t h w c`."""
        shape = (batch, self.sampling.num_frames, self.inputs.crop_size, self.inputs.crop_size)
        return (*shape, 3), (*shape, self.inputs.channels(self.sampling.flow_frames))

    def initial_params(self, model: Network) -> Params:
        """Random parameters, from the run's seed."""
        rgb, flow = self.clip_shapes(1)
        return _compiled_init(jax.random.key(self.config.seed), model=model, rgb=rgb, flow=flow)

    def abstract_params(self, num_classes: int) -> Params:
        """The shapes and dtypes of the parameters; costs no memory."""
        rgb, flow = self.clip_shapes(1)
        init = functools.partial(_init, model=self.model(num_classes), rgb=rgb, flow=flow)
        return jax.eval_shape(init, jax.random.key(0))


def _init(key: jax.Array, *, model: Network, rgb: tuple[int, ...], flow: tuple[int, ...]) -> Params:
    return model.init({"params": key}, jnp.zeros(rgb), jnp.zeros(flow), train=False)["params"]


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
        """The best weights of a stage."""
        return Checkpoints(self.workdir / "stages" / stage / "best", keep=1)

    def last(self, stage: str) -> Checkpoints:
        """What a stage continues from."""
        return Checkpoints(self.workdir / "stages" / stage / "last", keep=2)

    def stage_file(self, stage: str, name: str) -> Path:
        """A file of a stage, such as 'done.json'."""
        return self.workdir / "stages" / stage / name

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file whole or not at all."""
        path = self.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        prepare.write_aside(path, (text + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run.

        Raises:
          FileNotFoundError: it is not there (says what makes it).
        """
        path = self.workdir / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {self.workdir} is not the folder of a run that got that far. "
                "Runs are made by `python -m stf_jax.main --config=... --workdir=...`."
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def settings(self) -> Settings:
        """The settings that the run was started with."""
        return Settings.of(ml_collections.ConfigDict(self.read_json("config.json")))

    def claim(self, config: ml_collections.ConfigDict) -> None:
        """Stores the configuration, or checks that it is the stored one.

        Raises:
          ValueError: the folder holds a run with another configuration (lists the keys).
        """
        new = json.loads(config.to_json_best_effort())
        if (self.workdir / "config.json").exists():
            old = self.read_json("config.json")
            a, b = _flat(old), _flat(new)
            differ = sorted(k for k in {*a, *b} - set(_FREE) if a.get(k) != b.get(k))
            if differ:
                lines = "\n  ".join(f"{k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in differ)
                raise ValueError(
                    f"{self.workdir} holds a run with another configuration:\n  {lines}\n"
                    "Choose another --workdir, or repeat the settings that it was started with."
                )
        self.write_json("config.json", new)


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
