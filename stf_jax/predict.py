"""A trained network on any video file or frames."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from stf_jax.checkpoint import Params, digest_of, misfits, unfitting
from stf_jax.evaluate import score_batch
from stf_jax.inputs import Batch, compute_flow
from stf_jax.model import Network, fold_pyramid
from stf_jax.optim import by_path
from stf_jax.pipeline import SamplingSettings, clip_indices, decode_clip
from stf_jax.prepare import EncodedVideo, RecordSettings, encode_frames, encode_video
from stf_jax.run import Run, Settings, allowed_mismatches, best_params, check_config_keys

if TYPE_CHECKING:
    import tensorflow as tf
else:
    from stf_jax.records import tf

# The keys of what an exported file says about itself: JSON, but for the last.
FILE_FACTS = ("config", "data", "signature", "card")


@functools.lru_cache(maxsize=8)
def _clip_program(sampling: SamplingSettings, stored: RecordSettings) -> Callable[..., Any]:
    """`decode_clip` of the evaluation's clip, once for videos of all lengths."""
    strings = tf.TensorSpec([None], tf.string)

    @tf.function(input_signature=[strings, strings], autograph=False)
    def clip(frames: tf.Tensor, flow: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        wanted = clip_indices(tf.size(frames), sampling, seed=None)
        return decode_clip(frames, flow, wanted, sampling, stored)

    return clip


def clip_of(
    frames: tuple[bytes, ...],
    flow: tuple[bytes, ...],
    sampling: SamplingSettings,
    stored: RecordSettings,
) -> Batch:
    """The one deterministic clip of a video (SPEC 1.8) as a batch of one.

    Frames and fields that `pipeline.evaluation_reads` does not name may be empty.
    """
    # A one-frame video has no flow; tf.constant cannot tell the type of an empty tuple.
    fields = tf.constant(list(flow), tf.string, shape=[len(flow)])
    rgb, stacks = _clip_program(sampling, stored)(tf.constant(list(frames)), fields)
    return Batch(
        rgb=rgb.numpy()[None],
        flow=stacks.numpy()[None],
        label=jnp.zeros(1, jnp.int32),
        mask=jnp.ones(1, bool),
        entry=jnp.zeros(1, jnp.int32),
        seed=jnp.zeros((1, 2), jnp.uint32),
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network makes of a video.

    Attributes:
      class_names: its classes.
      probabilities: float32 `k`, one for each class, in that order; their sum is 1.
    """

    class_names: tuple[str, ...]
    probabilities: np.ndarray

    def top(self, k: int = 5) -> tuple[tuple[str, float], ...]:
        """The k most probable classes and their probabilities, the most probable first.

        Example:
          >>> Prediction(("run", "walk", "sit"), np.array([0.25, 0.5, 0.25])).top(2)
          (('walk', 0.5), ('run', 0.25))
        """
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return tuple((self.class_names[i], float(self.probabilities[i])) for i in order)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has learnt, as its checkpoint or an exported file holds it.

    Args:
      settings: the run's settings.
      class_names: its classes.
      params: the weights as they were trained.
      data: what must be known of the videos: 'protocol', 'leaky'.
    """

    settings: Settings
    class_names: tuple[str, ...]
    params: Params
    data: Mapping[str, Any]

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> Trained:
        """Reads the folder of a finished run, or an exported file.

        Raises:
          FileNotFoundError, ValueError, ModuleNotFoundError: as `stf_jax.load`.
        """
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: name the folder of a run, such as runs/demo, or a "
                "model.safetensors that experiments/export.py made of one"
            )
        return cls._of_file(path) if path.is_file() else cls._of_run(path)

    @classmethod
    def _of_run(cls, workdir: Path) -> Trained:
        run = Run(workdir)
        settings = run.settings()
        data = run.read_json("data.json", "class_names", "stamp", "protocol", "leaky")
        last = settings.evaluated_stage
        if not run.stage_file(last, "done.json").exists():
            raise FileNotFoundError(
                f"{workdir} is an unfinished run: its stage {last!r} has not ended. The command "
                "that began it goes on from where it stopped."
            )
        class_names = tuple(data["class_names"])
        # The flow that files will get is that of the configuration beside the weights.
        stamp = {**data["stamp"], "classes": list(class_names)}
        stamp["flow"] = json.loads(json.dumps(settings.records.stamp()))
        allow = allowed_mismatches(settings.config.allow_mismatch)
        params = best_params(run, settings, last, stamp, allow)
        facts = {key: data[key] for key in ("protocol", "leaky")}
        return cls(settings, class_names, params, facts)

    @classmethod
    def _of_file(cls, path: Path) -> Trained:
        tensors, facts = read_weights(path)
        try:
            config, data = json.loads(facts["config"]), json.loads(facts["data"])
            check_config_keys(config, path, json.loads(facts["signature"])["run"]["commit"])
            settings = Settings.of(ml_collections.ConfigDict(config))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: what it says about its network does not suit this version of stf_jax "
                f"({error}); export the run again"
            ) from error
        class_names = tuple(data.pop("class_names"))
        faults = misfits(tensors, by_path(settings.abstract_params(len(class_names))))
        if faults:
            raise unfitting(str(path), faults, "That configuration is its own: export it again.")
        return cls(settings, class_names, traverse_util.unflatten_dict(tensors, sep="/"), data)

    @functools.cached_property
    def digest(self) -> str:
        """That of the weights; see `checkpoint.digest_of`."""
        return digest_of(self.params)


def read_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a `model.safetensors` of ours.

    Returns:
      The tensors by their names in the parameter tree, and what the file says about itself:
      `FILE_FACTS`.

    Raises:
      ModuleNotFoundError: the library is not installed.
      ValueError: the file is of another kind, damaged, or not of this library.
    """
    try:
        import safetensors
    except ImportError:
        raise ModuleNotFoundError(
            f"reading {path} needs the library safetensors: make install EXTRAS=export"
        ) from None
    advice = (
        "expected the folder of a run, or a model.safetensors that experiments/export.py made of "
        "one"
    )
    try:
        with safetensors.safe_open(path, "np") as file:
            facts = file.metadata() or {}
            missing = [key for key in FILE_FACTS if key not in facts]
            if missing:
                raise ValueError(
                    f"{path} is a safetensors file that says nothing of {missing[0]!r}, so it was "
                    f"not made by stf_jax: {advice}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): {advice}") from error


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The best weights of a finished run, ready for videos.

    Args:
      settings: the run's settings.
      class_names: its classes.
      model: its network.
      params: its weights.
      warning: what to know about its figures; '' if nothing.
    """

    settings: Settings
    class_names: tuple[str, ...]
    model: Network
    params: Params
    warning: str = ""

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Predictor:
        """Reads a run's folder or an exported file; see `stf_jax.load`."""
        return cls.of(Trained.read(source))

    @classmethod
    def of(cls, trained: Trained) -> Predictor:
        """Folds what a run has learnt for inference."""
        model = trained.settings.model(len(trained.class_names))
        warning = ""
        if trained.data["leaky"]:
            warning = (
                f"trained under a leaky protocol ({trained.data['protocol']}): its accuracy on new "
                "videos was not measured"
            )
        folded = fold_pyramid(model, trained.params)
        return cls(trained.settings, trained.class_names, *folded, warning)

    def predict(self, video: str | os.PathLike[str] | np.ndarray) -> Prediction:
        """Classifies a video.

        It goes through the bytes that preparation would store, so a test video gets the scores
        that the evaluation gave it, and its decoded frames the same.

        Args:
          video: path of a file (or of a folder of pictures), or all frames of a video, uint8
            `t h w 3`, RGB, at their own size. The network takes its frames at the same share of
            any video, so their rate does not matter.

        Raises:
          VideoFault: the file is not a usable video (says why).
          TypeError: frames are not uint8.
          ValueError: frames have another shape.

        Example:
          prediction = stf_jax.load("runs/demo").predict("video.mp4")
          for name, probability in prediction.top(3): ...
        """
        return Prediction(self.class_names, self.score_clip(self.clip(video)))

    def clip(self, video: str | os.PathLike[str] | np.ndarray) -> Batch:
        """What the network sees of a video, before the crop, as a batch of one; see `predict`."""
        if isinstance(video, np.ndarray):
            _check_frames(video)
            encoded = encode_frames(video, self.settings.records, "frames")
        else:
            whole = encode_video(Path(video), self.settings.records)
            encoded = whole.frames, whole.flow
        return self.pack(*encoded)

    def score(self, video: EncodedVideo) -> np.ndarray:
        """Class probabilities of an encoded video, float32 `k`."""
        return self.score_clip(self.pack(video.frames, video.flow))

    def pack(self, frames: tuple[bytes, ...], flow: tuple[bytes, ...]) -> Batch:
        """The clip of a stored video; of frames and fields that it does not read b'' will do."""
        clip = clip_of(frames, flow, self.settings.sampling, self.settings.records)
        return compute_flow(clip, self.settings.records)

    def score_clip(self, clip: Batch) -> np.ndarray:
        """Class probabilities of a clip by `clip` or `pack`, float32 `k`."""
        probabilities = score_batch(
            self.params, clip, model=self.model, inputs=self.settings.inputs
        )
        return np.asarray(probabilities)[0]


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8:
        raise TypeError(
            f"frames must be uint8, 0 to 255, got {frames.dtype}: scale them to that and round"
        )
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            "frames must be all frames of one video, `t h w 3` with red, green, blue last, got "
            f"shape {frames.shape}"
        )
