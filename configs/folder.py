"""Your own videos: one folder per class, any format, any depth below it.

    python -m stf_jax.main --config=configs/folder.py:laptop --config.data.root=my_videos

    my_videos/dance/ann_1.mp4   my_videos/dance/bob_1.mov   my_videos/walk/ann_1.avi   ...

Give every clip cut from one recording, or every person, a common part in its file name and name
it with a regular expression, so that the test meets neither in training:

    --config.data.group_regex='^([^_]+)_'          ann, bob

Without it the hold-out is by file, and the results say that it may flatter.

Presets: laptop (a 2-core CPU; see configs/ucf101.py). Cost and accuracy depend on the videos.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(presets: str = "") -> ConfigDict:
    """Returns the card: that of UCF101, on another folder."""
    config = _ucf101(presets)
    config.data.update(name="folder", root="data/videos", test_fraction=0.25)
    return config


def _ucf101(presets: str) -> ConfigDict:
    # Cards are read as single files, so a neighbour is not importable by name.
    path = Path(__file__).with_name("ucf101.py")
    spec = importlib.util.spec_from_file_location("stf_ucf101_card", path)
    assert spec is not None and spec.loader is not None
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    return card.get_config(presets)
