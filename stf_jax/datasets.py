"""A configuration's `data` part -> an index: find or fetch the files, read their layout, divide."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from stf_jax import archives, demo, layouts
from stf_jax.archives import Source
from stf_jax.index import ClipEntry, VideoIndex, check_duplicates
from stf_jax.protocols import Layout, Protocol, divide

__all__ = ["ClipEntry", "DataSettings", "VideoIndex", "check_duplicates", "load_index"]

NAMES = ("ucf101", "ucf11", "ucf_sports", "folder", "demo")

# Where the data sets are published. Only a file whose size and digest are known here is fetched:
# those of UCF101 are in tensorflow_datasets' url_checksums; for the others no trustworthy record
# was found.
SOURCES = {
    "ucf101": Source(
        url="https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",
        bytes=6_960_400_115,
        sha256="dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d",
    ),
    "ucf11": Source(url="https://www.crcv.ucf.edu/data/UCF11_updated_mpg.rar"),
    "ucf_sports": Source(url="https://www.crcv.ucf.edu/data/ucf_sports_actions.zip"),
}


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The `data` part of a configuration.

    Args:
      name: 'ucf101', 'ucf11', 'ucf_sports', 'folder' (one sub-folder per class, or `list`) or
        'demo' (generated at `root` if it is not there).
      root: the folder of the videos.
      archive: file that is unpacked into `root` once; '' for none.
      download: fetch the archive from where the data set is published, if `root` is not there.
      list: CSV list of the videos, 'folder' only; '' for none. See `layouts.listed`.
      protocol: who is trained and who is tested on; this and the rest: see `protocols.Protocol`.
      split: official list, where there are several ('ucf101': 1 to 3).
      folds: number of folds.
      fold: the fold to test on.
      group_regex: searched in each file's name; its first parenthesis (or the whole match) names
        the source that the clip was cut from. '' means unknown. For 'folder' and 'ucf_sports'.
      test_fraction: share of the clips to test on.
      validation_fraction: share of the training clips that the stop rule watches.
      seed: of everything random in the split, and of the demo videos.

    Raises:
      ValueError: an impossible value or combination (names it).
    """

    name: str
    root: str
    archive: str
    download: bool
    list: str
    protocol: str
    split: int
    folds: int
    fold: int
    group_regex: str
    test_fraction: float
    validation_fraction: float
    seed: int

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.name not in NAMES:
            raise ValueError(f"data.name: got {self.name!r}, one of {NAMES}")
        if self.split not in (1, 2, 3) or (self.split != 1 and self.name != "ucf101"):
            raise ValueError(
                f"data.split: got {self.split!r}, one of 1, 2, 3 for 'ucf101' and 1 for others"
            )
        try:
            re.compile(self.group_regex)
        except re.error as error:
            raise ValueError(f"data.group_regex {self.group_regex!r}: {error}") from None
        only = {
            "list": ("folder",),
            "group_regex": ("folder", "ucf_sports"),
            "archive": NAMES[:-1],
            "download": tuple(SOURCES),
        }
        for key, names in only.items():
            if getattr(self, key) and self.name not in names:
                raise ValueError(f"data.{key} is for {' and '.join(names)}, not for {self.name!r}")
        if self.archive and self.download:
            raise ValueError("data.archive and data.download: set one; both name the archive")
        self.divided()

    def divided(self) -> Protocol:
        """The part that says who is trained and who is tested on."""
        return Protocol(
            name=self.protocol,
            split=self.split,
            folds=self.folds,
            fold=self.fold,
            test_fraction=self.test_fraction,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
        )


def load_index(settings: Any) -> VideoIndex:
    """Indexes the data set that the `data` part of a configuration names.

    Raises:
      ValueError, TypeError: an impossible or unknown setting, or files that contradict each other.
      FileNotFoundError: the folder or its lists are not there (says what was expected).
      OSError, RuntimeError: the archive cannot be fetched or unpacked (says why).
    """
    data = DataSettings(**settings)
    root = Path(data.root)
    if data.download:
        archives.fetch_into(root, SOURCES[data.name])
    elif data.archive:
        archives.unpack_into(root, Path(data.archive))
    return divide(_layout(data, root), data.divided())


def _layout(data: DataSettings, root: Path) -> Layout:
    if data.name == "ucf101":
        return layouts.ucf101(root, split=data.split)
    if data.name == "ucf11":
        return layouts.ucf11(root)
    if data.name == "ucf_sports":
        return layouts.ucf_sports(root, group_regex=data.group_regex)
    if data.name == "demo":
        return demo_set(root, seed=data.seed)
    if data.list:
        return layouts.listed(root, Path(data.list), group_regex=data.group_regex)
    return layouts.folder(root, group_regex=data.group_regex)


def demo_set(root: Path, *, seed: int) -> Layout:
    """Finds the demo videos; generates them first if they are not there.

    Raises:
      ValueError: `root` holds something else.
    """
    demo.generate(root, seed=seed)
    clips = demo.clips()
    return Layout(
        name="demo",
        root=root,
        class_names=demo.CLASS_NAMES,
        clips=tuple(
            ClipEntry(c.video_id, demo.CLASS_NAMES.index(c.class_name), f"g{c.group:02}", "")
            for c in clips
        ),
        official={c.video_id: "test" if c.group <= demo.TEST_GROUPS else "train" for c in clips},
        official_name=f"group-held-out: groups 1 to {demo.TEST_GROUPS} unseen in training",
        notes=(f"generated videos (seed {seed}): figures say nothing about real ones",),
    )
