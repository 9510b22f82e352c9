from collections import Counter
from pathlib import Path

import pytest

from configs import demo as demo_card
from configs import folder, ucf11, ucf101, ucf_sports
from stf_jax import archives, datasets, demo, layouts
from stf_jax.datasets import DataSettings, load_index


def _settings(card=folder, **changes):
    return {**card.get_config().data.to_dict(), "root": "x", **changes}


@pytest.mark.parametrize(
    ("card", "changes", "said"),
    [
        (folder, {"name": "ucf102"}, "data.name: got 'ucf102'"),
        (ucf101, {"split": 4}, "data.split: got 4"),
        (ucf11, {"split": 2}, "data.split: got 2, one of 1, 2, 3 for 'ucf101'"),
        (folder, {"test_fraction": 1.0}, r"data.test_fraction must be in \[0, 1\), got 1.0"),
        (folder, {"group_regex": "(["}, r"data.group_regex '\(\['"),
        (ucf101, {"group_regex": "g"}, "data.group_regex is for folder and ucf_sports, not for"),
        (ucf101, {"list": "x.csv"}, "data.list is for folder, not for 'ucf101'"),
        (demo_card, {"archive": "x.zip"}, "data.archive is for .*, not for 'demo'"),
        (folder, {"download": True}, "data.download is for .*, not for 'folder'"),
        (ucf101, {"download": True, "archive": "x.zip"}, "data.archive and data.download: set one"),
        (folder, {"sead": 1}, "sead"),
    ],
)
def test_impossible_settings_are_named(card, changes, said):
    with pytest.raises((ValueError, TypeError), match=said):
        load_index(_settings(card, **changes))


def test_every_card_names_a_protocol_that_its_data_set_has(tmp_path):
    for name, (word, _) in layouts.UCF11_CLASSES.items():
        for group in range(1, 6):
            path = tmp_path / "ucf11" / name / f"v_{word}_0{group}" / f"v_{word}_0{group}_01.mpg"
            path.parent.mkdir(parents=True)
            path.touch()
    index = load_index(_settings(ucf11, root=str(tmp_path / "ucf11")))
    assert index.protocol == "5-fold by groups, fold 1" and len(index.subset("test")) == 11
    for name, (_, count) in layouts.UCF_SPORTS_FOLDERS.items():
        (tmp_path / "sports" / name).mkdir(parents=True)
        for number in range(1, count + 1):
            (tmp_path / "sports" / name / f"{number:03}.avi").touch()
    sports = load_index(_settings(ucf_sports, root=str(tmp_path / "sports")))
    assert len(sports.subset("test")) == 47 and not sports.leaky and sports.overlap is None
    assert "was not checked" in sports.summary()
    settings = _settings(ucf_sports, root=str(tmp_path / "sports"), protocol="leave_one_out",
                         fold=150)  # fmt: skip
    alone = load_index(settings)
    assert [e.video_id for e in alone.subset("test")] == ["Walk-Front/022.avi"] and alone.leaky


def test_an_archive_becomes_the_root(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for name in ("a/p1.avi", "a/p2.avi", "b/p1.avi", "b/p2.avi", "b/p3.avi"):
            archive.writestr(name, name)
    settings = _settings(root=str(tmp_path / "root"), archive=str(tmp_path / "mine.zip"))
    index = load_index(settings)
    assert index.path(index.entries[0]).read_text() == "a/p1.avi"
    assert load_index(settings) == index  # once


def test_a_data_set_without_a_known_digest_is_not_downloaded(tmp_path):
    for card in (ucf11, ucf_sports):
        with pytest.raises(ValueError, match="download https://www.crcv.* --config.data.archive="):
            load_index(_settings(card, root=str(tmp_path / "root"), download=True))
    source = datasets.SOURCES["ucf101"]
    assert isinstance(source, archives.Source) and len(source.sha256) == 64
    assert DataSettings(**_settings(ucf101, download=True)).download


def test_demo_groups_are_unseen_and_every_group_plays_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "generate", lambda root, *, seed: None)  # test_demo generates
    index = load_index(_settings(demo_card, root=str(Path(tmp_path))))
    assert len(index.entries) == len(demo.clips()) and not index.leaky
    plays = Counter((e.group, e.label) for e in index.entries)
    assert set(plays.values()) == {demo.CLIPS_PER_GROUP}
    assert len(plays) == demo.GROUPS * len(demo.CLASS_NAMES)
    assert {e.group for e in index.subset("test")} == {f"g0{g}" for g in range(1, 5)}
    assert "say nothing about real ones" in index.summary()
