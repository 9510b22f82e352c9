"""A trained run on any video file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from stf_jax.checkpoint import Params
from stf_jax.evaluate import score_batch
from stf_jax.inputs import Batch, compute_flow
from stf_jax.model import Network, fold_pyramid
from stf_jax.pipeline import SamplingSettings, clip_indices, decode_clip
from stf_jax.prepare import EncodedVideo, RecordSettings, encode_video
from stf_jax.run import Run, Settings, allowed_mismatches, best_params

if TYPE_CHECKING:
    import tensorflow as tf
else:
    from stf_jax.records import tf


def clip_of(
    frames: tuple[bytes, ...],
    flow: tuple[bytes, ...],
    sampling: SamplingSettings,
    stored: RecordSettings,
) -> Batch:
    """The one deterministic clip of a video (SPEC 1.8) as a batch of one."""
    wanted = clip_indices(tf.constant(len(frames), tf.int32), sampling, seed=None)
    # A one-frame video has no flow; tf.constant cannot tell the type of an empty tuple.
    fields = tf.constant(list(flow), tf.string, shape=[len(flow)])
    rgb, stacks = decode_clip(tf.constant(list(frames)), fields, wanted, sampling, stored)
    return Batch(
        rgb=rgb.numpy()[None],
        flow=stacks.numpy()[None],
        label=jnp.zeros(1, jnp.int32),
        mask=jnp.ones(1, bool),
        entry=jnp.zeros(1, jnp.int32),
        seed=jnp.zeros((1, 2), jnp.uint32),
    )


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
    def load(cls, workdir: Path) -> Predictor:
        """Reads a run's folder.

        Raises:
          FileNotFoundError: it is not the folder of a trained run.
          ValueError: its weights were trained for other classes, another split or other flow.
        """
        run = Run(workdir)
        settings = run.settings()
        data = run.read_json("data.json")
        class_names = tuple(data["class_names"])
        model = settings.model(len(class_names))
        # The flow that files will get is that of the configuration beside the weights.
        stamp = {**data["stamp"], "classes": list(class_names)}
        stamp["flow"] = json.loads(json.dumps(settings.records.stamp()))
        allow = allowed_mismatches(settings.config.allow_mismatch)
        params = best_params(run, settings, settings.evaluated_stage, stamp, allow)
        warning = ""
        if data["leaky"]:
            warning = (
                f"trained under a leaky protocol ({data['protocol']}): its accuracy on new videos "
                "was not measured"
            )
        return cls(settings, class_names, *fold_pyramid(model, params), warning)

    def predict(self, path: Path) -> np.ndarray:
        """Class probabilities of a video file, float32 `k`.

        The file goes through the bytes that preparation would store, so a test video gets the
        scores that the evaluation gave it.

        Raises:
          VideoFault: the file is not a usable video (says why).
        """
        return self.score(encode_video(path, self.settings.records))

    def score(self, video: EncodedVideo) -> np.ndarray:
        """Class probabilities of an encoded video, float32 `k`."""
        settings = self.settings
        clip = clip_of(video.frames, video.flow, settings.sampling, settings.records)
        clip = compute_flow(clip, settings.records)
        probabilities = score_batch(self.params, clip, model=self.model, inputs=settings.inputs)
        return np.asarray(probabilities)[0]
