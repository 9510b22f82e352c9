"""What of a video is scored: which clips, which windows of each, and their mirror images."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

# Where windows lie, top and left in halves of the room that they have; 1 is the middle.
_CENTRE = ((1, 1),)
_CORNERS = ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2))


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """How videos are scored: views = clips x crops x mirror images, probabilities averaged.

    Args:
      subset: whose videos give a run's figures: 'test', or 'validation', the held-out training
        groups, to choose settings by. The test videos are then not scored at all.
      num_clips: clips per video, spread evenly over it, always the same ones (SPEC 1.8).
      num_crops: windows of `inputs.crop_size` per clip: 1, the centre; 3, along the longer side of
        the video; 5, the corners and the centre.
      flip: each window also mirrored, u negated; wrong where left and right are different classes.
      repeats: more than 1: so many clips per video instead, drawn as in training (SPEC 1.11).
      min_per_class: more than 0: instead, as many drawn clips of each video as it takes to
        classify at least so many clips of every class (SPEC 10.8; the paper's Table 3: 1000).
      each_stream: also score a network of both streams without the map of each, an ablation.
      calibration_bins: bins of equal width for the calibration error.

    Raises:
      ValueError: an impossible value or combination (names it).
    """

    subset: str
    num_clips: int
    num_crops: int
    flip: bool
    repeats: int
    min_per_class: int
    each_stream: bool
    calibration_bins: int

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.subset not in ("test", "validation"):
            raise ValueError(f"eval.subset: got {self.subset!r}, one of test, validation")
        for name, low in (
            ("num_clips", 1),
            ("repeats", 1),
            ("min_per_class", 0),
            ("calibration_bins", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"eval.{name} must be at least {low}, got {getattr(self, name)}")
        if self.num_crops not in (1, 3, 5):
            raise ValueError(f"eval.num_crops: got {self.num_crops}, one of 1, 3, 5")
        asked = {"num_clips": 1, "repeats": 1, "min_per_class": 0}
        several = [name for name, one in asked.items() if getattr(self, name) != one]
        if len(several) > 1:
            told = " and ".join(f"eval.{name}={getattr(self, name)}" for name in several)
            raise ValueError(f"{told}: each says how many clips a video has; set one of them")

    @property
    def random(self) -> bool:
        """Whether clips are drawn."""
        return self.repeats > 1 or self.min_per_class > 0

    def summary(self) -> str:
        """How videos are viewed, for people."""
        if self.min_per_class:
            told = f"drawn clips, at least {self.min_per_class} of each class"
        elif self.random:
            told = f"{self.repeats} drawn clips per video"
        else:
            told = f"{self.num_clips} clip{'s' * (self.num_clips > 1)} per video"
        if self.num_crops > 1:
            told += f", {self.num_crops} crops"
        return told + ", mirrored too" * self.flip

    def check_room(self, size: int, resize: str, crop_size: int) -> None:
        """Makes sure that several windows are not all the same.

        Raises:
          ValueError: they are (says what leaves no room).
        """
        if self.num_crops > 1 and resize == "squash" and size == crop_size:
            raise ValueError(
                f"eval.num_crops={self.num_crops}: stored frames of {size}x{size} px leave windows "
                f"of inputs.crop_size={crop_size} px no room, so that all would be the same. Use "
                "1, or prepare larger frames (records.size, or records.resize='short_side')"
            )


def parse_views(told: str) -> dict[str, Any]:
    """Reads 'CLIPS[xCROPS][xflip]' as settings.

    Raises:
      ValueError: it is something else (says what is expected).

    Example:
      >>> parse_views("10x3xflip")
      {'num_clips': 10, 'num_crops': 3, 'flip': True}
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?(xflip)?", told)
    if not match:
        raise ValueError(
            f"views: got {told!r}, expected CLIPS, CLIPSxCROPS or CLIPSxCROPSxflip, such as "
            "10x3xflip"
        )
    clips, crops, flip = match.groups()
    return {"num_clips": int(clips), "num_crops": int(crops or 1), "flip": bool(flip)}


def one_view(settings: EvalSettings) -> EvalSettings:
    """The same settings for one deterministic view of each video."""
    return dataclasses.replace(
        settings,
        num_clips=1,
        num_crops=1,
        flip=False,
        repeats=1,
        min_per_class=0,
        each_stream=False,
    )


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """The clips to score, n of them, and w windows of each, in the order of scoring.

    Args:
      entry: position of each clip's video.
      clip: its number among the clips of its video.
      num_clips: into how many a video is divided.
      random: whether clips are drawn at random, by their numbers, or lie evenly.
      along: where the square lies that is cut from frames that kept their aspect, in halves of the
        room along the longer side.
      windows: top and left of each window in that square, in halves of its room.
      crop: number of each window among those of its clip.
      mirrored: whether windows are mirrored, in turn.
    """

    entry: Int[np.ndarray, " n"]
    clip: Int[np.ndarray, " n"]
    num_clips: int
    random: bool
    along: Int[np.ndarray, " n"]
    windows: Int[np.ndarray, "n w 2"]
    crop: Int[np.ndarray, "n w"]
    mirrored: tuple[bool, ...]

    def __len__(self) -> int:
        """Clips."""
        return len(self.entry)

    def windows_of(self, clips: Int[np.ndarray, " b"]) -> list[np.ndarray | None]:
        """Each window of some clips, int32 `b 2`; None if all clips are seen at the centre only."""
        if self.windows.shape[1] == 1 and (self.windows == 1).all():
            return [None]
        return list(self.windows[np.maximum(clips, 0)].swapaxes(0, 1))


def plan_clips(
    labels: Sequence[int],
    upright: Bool[np.ndarray, " n"],
    settings: EvalSettings,
    *,
    aspect_kept: bool,
) -> ClipPlan:
    """Lists what there is to score.

    Every video's first clip comes before any second one, so that one clip per video is scored in
    the order of the videos.

    Args:
      labels: class of each video.
      upright: which videos are higher than wide.
      settings: see there.
      aspect_kept: whether stored frames are longer than the square that is cut from them. Windows
        at different places then need different squares, and are clips of their own.
    """
    rounds = _rounds(np.asarray(labels), settings)
    turns = [np.flatnonzero(rounds > turn) for turn in range(rounds.max())]
    entry = np.concatenate(turns)
    clip = np.repeat(np.arange(len(turns)), [len(turn) for turn in turns])
    windows = np.stack([_windows(settings.num_crops, bool(high)) for high in upright])[entry]
    crop = np.tile(np.arange(settings.num_crops), (len(entry), 1))
    along = np.ones(len(entry), int)
    if aspect_kept:
        entry, clip = (np.repeat(x, settings.num_crops) for x in (entry, clip))
        windows, crop = windows.reshape(-1, 1, 2), crop.reshape(-1, 1)
        along = np.where(upright[entry], *windows[:, 0].T)
    return ClipPlan(
        entry=entry.astype(np.int32),
        clip=clip.astype(np.int32),
        num_clips=1 if settings.random else settings.num_clips,
        random=settings.random,
        along=along.astype(np.int32),
        windows=windows.astype(np.int32),
        crop=crop.astype(np.int32),
        mirrored=(False, True) if settings.flip else (False,),
    )


def _rounds(labels: np.ndarray, settings: EvalSettings) -> np.ndarray:
    """Clips of each video."""
    if not settings.min_per_class:
        return np.full(len(labels), max(settings.num_clips, settings.repeats))
    videos = np.bincount(labels)[labels]
    return -(-settings.min_per_class // videos)


def _windows(num_crops: int, upright: bool) -> np.ndarray:
    """Top and left of a clip's windows, int `num_crops 2`."""
    if num_crops == 3:
        return np.array([(place, 1) if upright else (1, place) for place in range(3)])
    return np.array(_CENTRE if num_crops == 1 else _CORNERS)


def is_upright(widths: Sequence[int], heights: Sequence[int]) -> Bool[np.ndarray, " n"]:
    """Which pictures are higher than wide; squares are not."""
    return np.asarray(heights) > np.asarray(widths)
