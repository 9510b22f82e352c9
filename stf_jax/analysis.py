"""All that is shown of one video: its classes, their course, the frames that mattered, the flow."""

import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stf_jax.explain import Explainer, Explanation, clip_pictures, explain, with_heat
from stf_jax.inputs import Batch
from stf_jax.pipeline import evaluation_frames
from stf_jax.predict import Prediction
from stf_jax.prepare import Encoder
from stf_jax.report import flow_key, picture_uri
from stf_jax.timeline import mean_probabilities, pieces
from stf_jax.video import VideoFault, VideoReader
from stf_jax.watch import (
    STAGES,
    WHOLE_FRAMES,
    Scored,
    Taken,
    Watcher,
    Windows,
    WindowSettings,
    span,
    take,
)

# Classes that are shown of a video and of its course.
_SHOWN = 5

# A short video is divided into so many windows that do not overlap, if the network's clip allows.
_PARTS = 4

# What an analysis holds is made of dicts, lists, strings and numbers: it leaves as JSON.
Analysis = dict[str, Any]


class Analyst:
    """A trained network that says all it can of a video.

    Args:
      explainer: the network.
      max_seconds: of a video.
    """

    def __init__(self, explainer: Explainer, max_seconds: float) -> None:
        self.explainer = explainer
        self.predictor = explainer.predictor
        self._sampling = self.predictor.settings.sampling
        records = self.predictor.settings.records
        self._limits = dataclasses.replace(records.limits(), max_seconds=max_seconds)
        self._usual = dataclasses.replace(WindowSettings.parse("", "", self._sampling), whole=0)
        self._watcher = Watcher(self.predictor, self._usual)

    @classmethod
    def load(cls, source: str | os.PathLike[str], max_seconds: float) -> "Analyst":
        """Reads a run's folder or an exported file; see `stf_jax.load`."""
        return cls(Explainer.load(Path(source)), max_seconds)

    def start_up(self) -> None:
        """Compiles everything: the first video would wait for it otherwise."""
        self._watcher.start_up()
        black = np.zeros((25, 240, 320, 3), np.uint8)
        self._explained(self.predictor.clip(black))

    def analyse(self, file: Path, name: str, *, why: bool) -> Analysis:
        """Reads a video and says what the network makes of it.

        Args:
          file: where it lies.
          name: what it is called.
          why: also explain it.

        Returns:
          'name', 'frames', 'seconds', 'notes' (what was wrong with it), 'classes' (pairs, the most
          probable first), 'whole' (whether these are of one clip, not a mean over time), 'windows',
          'course' and 'took' (seconds by stage); with `why` also 'why', a list with one entry for
          each network, 'why_span' and 'flow_key'.

        Raises:
          VideoFault: it is not a usable video, or too long (says why, under its name).
        """
        reader = VideoReader(file, self._limits, threads=os.cpu_count() or 1)
        encoder = Encoder(self.predictor.settings.records, name)
        took = dict.fromkeys((*STAGES, "why"), 0.0)
        try:
            whole, scored, surest = self._score(reader, encoder, took)
        except VideoFault as fault:
            raise VideoFault(name, fault.reason, fault.advice) from None
        course = pieces(scored)
        if whole:
            mean, _ = self._scored(whole, encoder, took)
        else:
            mean = Prediction(self.predictor.class_names, mean_probabilities(course))
        info = reader.info
        found: Analysis = {
            "name": name,
            "frames": info.num_frames,
            "seconds": round(scored[-1].end, 3),
            "notes": list(info.notes),
            "classes": mean.top(_SHOWN),
            "whole": bool(whole),
            "windows": len(scored),
            "course": self._course(course, mean),
        }
        if why:
            begun = time.perf_counter()
            found |= self._why(whole or surest, encoder)
            took["why"] = time.perf_counter() - begun
        return {**found, "took": {stage: round(seconds, 4) for stage, seconds in took.items()}}

    def _score(
        self, reader: VideoReader, encoder: Encoder, took: dict[str, float]
    ) -> tuple[Sequence[Taken], list[Scored], Sequence[Taken]]:
        """All frames of a video that is one clip (none of a longer one), its windows, the surest.

        Of a longer video no more than a window's frames are held beside the first ones.
        """
        frames = take(reader, encoder, keep=False, timer=time.perf_counter)
        whole = list(itertools.islice(frames, WHOLE_FRAMES + 1))
        rest: Iterable[Taken] = itertools.chain(whole, frames)
        if len(whole) > WHOLE_FRAMES:
            windows, whole = Windows(self._usual), []
        else:
            windows = Windows(self._shortened(len(whole)))
        scored: list[Scored] = []
        surest: tuple[float, Sequence[Taken]] = (0.0, ())
        for frame in rest:
            took["decode"] += frame.cost
            for window in windows.add(frame):
                scored.append(self._scored(window, encoder, took)[1])
                surest = max(surest, (_height(scored[-1]), window), key=lambda pair: pair[0])
        for window in windows.finish():
            scored.append(self._scored(window, encoder, took)[1])
            surest = max(surest, (_height(scored[-1]), window), key=lambda pair: pair[0])
        return whole, scored, surest[1]

    def _shortened(self, frames: int) -> WindowSettings:
        """Windows of a short video: some, so that there is a course to see."""
        length = min(
            self._usual.length, float(max(self._sampling.num_frames, -(-frames // _PARTS)))
        )
        return dataclasses.replace(self._usual, length=length, hop=max(1.0, length // 2))

    def _scored(
        self, window: Sequence[Taken], encoder: Encoder, took: dict[str, float]
    ) -> tuple[Prediction, Scored]:
        prediction, times = self._watcher.score(window, encoder)
        for stage, seconds in zip(STAGES[1:], times, strict=True):
            took[stage] += seconds
        return prediction, Scored(*span(window), len(window), prediction, {}, 0.0)

    def _course(self, course: Sequence[Any], mean: Prediction) -> Analysis:
        """The classes that are the most probable at any time or of the whole, and their course."""
        peaks = np.max([piece.probabilities for piece in course], axis=0)
        names = self.predictor.class_names
        shown = [names.index(name) for name, _ in mean.top(3)]
        shown = list(dict.fromkeys([*shown, *np.argsort(-peaks, kind="stable").tolist()]))[:_SHOWN]
        return {
            "names": [names[k] for k in shown],
            "spans": [
                {
                    "start": round(piece.start, 3),
                    "end": round(piece.end, 3),
                    "label": names[int(piece.probabilities.argmax())],
                    "probability": round(float(piece.probabilities.max()), 6),
                    "probabilities": [round(float(piece.probabilities[k]), 6) for k in shown],
                }
                for piece in course
            ],
        }

    # --- why -------------------------------------------------------------------------------------

    def _explained(self, clip: Batch) -> dict[str, Explanation]:
        settings = self.predictor.settings
        network, params = self.explainer.network, self.explainer.params
        return explain(network, params, clip, settings.inputs, settings.records)

    def _why(self, window: Sequence[Taken], encoder: Encoder) -> Analysis:
        clip, _ = self._watcher.clip(window, encoder)
        read = evaluation_frames(len(window), self._sampling)
        times = [round(window[k].seconds, 3) for k in read]
        told, fastest = [], 1.0
        for part, explained in self._explained(clip).items():
            one, fastest = self._part(explained, clip, times)
            told.append({"network": part, **one})
        start, end = span(window)
        key = {"picture": flow_key(fastest), "speed": round(fastest, 2)}
        return {"why": told, "why_span": [round(start, 3), round(end, 3)], "flow_key": key}

    def _part(
        self, explained: Explanation, clip: Batch, times: Sequence[float]
    ) -> tuple[Analysis, float]:
        """What one network's score rests on, and the speed of flow's full colour."""
        names, settings = self.predictor.class_names, self.predictor.settings
        pictures, fastest = clip_pictures(explained, clip, settings.records)
        streams = [
            {
                "stream": stream,
                "gain": round(explained.stream_gain[stream], 4),
                "frames": [
                    {
                        "seconds": times[k],
                        "weight": round(weight, 4),
                        "picture": picture_uri(picture),
                        "heat": picture_uri(with_heat(picture, explained.heat[stream][k])),
                    }
                    for k, (picture, weight) in enumerate(
                        zip(shown, _weights(explained.heat[stream]), strict=True)
                    )
                ],
            }
            for stream, shown in pictures.items()
        ]
        own = Prediction(names, explained.probabilities)
        window, stride = self._steps()
        steps = [
            {
                "start": times[step * stride],
                "end": times[step * stride + window - 1],
                "probability": round(float(probabilities[explained.label]), 6),
                "classes": Prediction(names, probabilities).top(1),
            }
            for step, probabilities in enumerate(explained.step_probabilities)
        ]
        told = {
            "label": names[explained.label],
            "probability": round(float(explained.probabilities[explained.label]), 6),
            "classes": own.top(_SHOWN),
            "streams": streams,
            "steps": steps,
        }
        return told, fastest

    def _steps(self) -> tuple[int, int]:
        """Frames that a recurrent step sees, and from one step to the next."""
        card = self.predictor.settings.config.model.tpn
        return card.window, card.stride


def _height(scored: Scored) -> float:
    return float(scored.prediction.probabilities.max())


def _weights(heat: np.ndarray) -> list[float]:
    """How much each frame's heat is, as a share of the largest; all zero where there is none."""
    totals = heat.mean(axis=(1, 2))
    return (totals / max(float(totals.max()), 1e-12)).tolist()
