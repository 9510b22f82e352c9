import os
from collections import Counter
from pathlib import Path

import pytest

from stf_jax import demo
from stf_jax.datasets import (
    check_duplicates,
    demo_set,
    folder,
    hold_out_validation,
    load_index,
    ucf101,
)

CLASSES = ("Archery", "Biking", "Diving")
TRAIN = {f"{c}/v_{c}_g{g:02}_c0{n}.avi" for c in CLASSES for g in (8, 9, 10) for n in (1, 2)}
TEST = {f"{c}/v_{c}_g{g:02}_c0{n}.avi" for c in CLASSES for g in (1, 2) for n in (1, 2)}


@pytest.fixture
def ucf(tmp_path) -> Path:
    """UCF101's layout with three classes; the files are empty, for an index opens none."""
    for clip in TRAIN | TEST:
        _touch(tmp_path / "UCF-101" / clip)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(CLASSES, 1)))
    rows = (f"{clip} {CLASSES.index(clip.split('/')[0]) + 1}" for clip in sorted(TRAIN))
    (lists / "trainlist01.txt").write_text("\r\n".join(rows) + "\r\n")
    (lists / "testlist01.txt").write_text("\n".join(sorted(TEST)))
    return tmp_path


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _files(root: Path, *names: str) -> Path:
    for name in names:
        _touch(root / name)
    return root


# --- UCF101 ----------------------------------------------------------------------------------


def test_ucf101_is_read_by_its_lists(ucf):
    index = ucf101(ucf, split=1)
    assert index.class_names == CLASSES
    for subset, clips in (("train", TRAIN), ("test", TEST)):
        assert {e.video_id for e in index.subset(subset)} == {f"UCF-101/{c}" for c in clips}
    for entry in index.entries:
        assert index.class_names[entry.label] == entry.video_id.split("/")[1]
        assert index.path(entry).is_file()
    # Group 8 of two classes are two sources.
    assert len({e.group for e in index.entries}) == 3 * 5
    assert (index.leaky, index.overlap, index.missing) == (False, 0.0, 0)
    assert index.protocol == "official split 1" and index.notes == ()


def test_a_partial_copy_says_what_is_missing(ucf):
    for path in (ucf / "UCF-101" / "Biking").iterdir():
        path.unlink()
    (ucf / "UCF-101" / "Diving" / "v_Diving_g01_c01.avi").unlink()
    index = ucf101(ucf, split=1)
    assert index.class_names == ("Archery", "Diving")  # official order, labels without a gap
    assert {e.label for e in index.entries} == {0, 1}
    assert index.missing == 11
    assert index.protocol == "official split 1, clips present"
    for said in ("2 of 3 classes (Archery, Diving)", "19 of 30 listed clips", "11 of the list",
                 "1 of them of these classes"):  # fmt: skip
        assert said in index.summary()


def test_files_on_no_list_are_said_and_not_used(ucf):
    _files(ucf / "UCF-101", "Diving/v_Diving_g07_c01.avi")
    index = ucf101(ucf, split=1)
    assert len(index.entries) == 30
    assert "1 files are on no list and not used: Diving/v_Diving_g07_c01.avi" in index.notes


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("classInd.txt", "1 Archery\n3 Biking\n", "classInd.txt, row 2: expected '2 "),
        ("classInd.txt", "1 Archery\n2 Archery\n", "classInd.txt, row 2: expected '2 "),
        ("trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\n", "row 1: Archery is class 1"),
        ("trainlist01.txt", "Archery/v_Archery_c01.avi 1\n", "row 1: expected"),
        ("testlist01.txt", "\nRowing/v_Rowing_g01_c01.avi\n", "testlist01.txt, row 2: expected"),
        ("testlist01.txt", "Diving/v_Diving_g01_c01.avi\n" * 2, "row 2: .* listed twice"),
        ("testlist01.txt", "Diving/v_Diving_g08_c03.avi\n", "share the groups Diving/g08"),
    ],
)
def test_a_contradictory_list_names_file_and_row(ucf, file, text, said):
    (ucf / "ucfTrainTestlist" / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        ucf101(ucf, split=1)


def test_what_is_not_there_is_named(ucf, tmp_path):
    with pytest.raises(FileNotFoundError, match="trainlist02.txt is missing"):
        ucf101(ucf, split=2)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--config\.data\.root"):
        ucf101(tmp_path / "nowhere", split=1)
    with pytest.raises(FileNotFoundError, match="UCF-101 is not there.*ucfTrainTestlist"):
        (ucf / "UCF-101").rename(ucf / "videos")
        ucf101(ucf, split=1)


def test_official_lists_share_no_group():
    if "STF_DATA" not in os.environ:
        pytest.skip(reason="STF_DATA does not name the folder of real clips")
    root = Path(os.environ["STF_DATA"], "ucf101_8")
    counts = []
    for split in (1, 2, 3):
        index = ucf101(root, split=split)  # raises if they do
        counts.append((len(index.subset("train")), len(index.subset("test"))))
        assert len(index.class_names) == 8 and index.missing == 13_320 - len(index.entries)
    assert counts[0] == (288, 64)  # as the data's own manifest counts


# --- a folder per class ----------------------------------------------------------------------


def _people(root: Path) -> Path:
    names = [f"{c}/{who}_{c}_{n}.mov" for c in ("walk", "run") for who in "abcdefgh" for n in "12"]
    return _files(root, *names)


def test_groups_of_a_folder_are_held_out_whole_across_classes(tmp_path):
    index = folder(_people(tmp_path), group_regex="^([a-z])_", test_fraction=0.25, seed=0)
    assert index.class_names == ("run", "walk")
    tested = {e.group for e in index.subset("test")}
    assert len(tested) == 2 and not tested & {e.group for e in index.subset("train")}
    assert Counter(e.label for e in index.subset("test")) == {0: 4, 1: 4}
    assert not index.leaky and index.overlap == 0.0
    assert index.protocol.startswith("group-held-out: 25% of the clips in 2 groups")


def test_a_hold_out_depends_on_its_seed_only(tmp_path):
    root = _people(tmp_path)
    draws = [
        {e.group for e in folder(root, group_regex="^.", test_fraction=0.25, seed=s).subset("test")}
        for s in (0, 0, 1, 2, 3, 4)
    ]
    assert draws[0] == draws[1] and any(draw != draws[0] for draw in draws)


def test_without_groups_the_result_may_flatter_and_says_so(tmp_path):
    index = folder(_people(tmp_path), group_regex="", test_fraction=0.25, seed=0)
    assert index.leaky and index.overlap is None
    assert "groups unknown" in index.protocol and "flatters" in index.summary()
    assert Counter(e.label for e in index.subset("test")) == {0: 4, 1: 4}


def test_files_are_videos_unless_their_names_say_otherwise(tmp_path):
    root = _files(
        tmp_path, "a/ü ber, \"all\".avi", "a/deep/er/x", "a/-y.webm", "b/z.mkv", "b/w.mp4",
        "b/notes.txt", "b/.hidden.mp4", "readme.mp4", "empty/thumbs.db",
    )  # fmt: skip
    index = folder(root, group_regex="", test_fraction=0.5, seed=0)
    assert {e.video_id for e in index.entries} == {
        "a/ü ber, \"all\".avi", "a/deep/er/x", "a/-y.webm", "b/z.mkv", "b/w.mp4",
    }  # fmt: skip
    told = index.summary()
    assert "class folder empty/ holds no video" in told
    assert "3 files are no videos by their names" in told and "b/notes.txt" in told


def test_small_classes_are_said(tmp_path):
    root = _files(tmp_path, "one/a.mp4", *(f"two/{n}.mp4" for n in range(8)))
    index = folder(root, group_regex="", test_fraction=0.25, seed=0)
    # A class is never trained away.
    assert [e.subset for e in index.entries if e.label == 0] == ["train"]
    assert "class one has one video only" in index.notes
    assert "class one has no test video: mean class accuracy is over the others" in index.notes


def test_a_name_without_a_group_is_an_error(tmp_path):
    root = _files(tmp_path, "a/p1_x.mp4", "a/p2_x.mp4", "b/p1_x.mp4", "b/other.mp4")
    with pytest.raises(ValueError, match=r"finds no group in the name 'other\.mp4' \(b/other"):
        folder(root, group_regex="^p[0-9]", test_fraction=0.5, seed=0)


def test_one_class_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="at least two class folders with videos, got a"):
        folder(_files(tmp_path, "a/x.mp4"), group_regex="", test_fraction=0.5, seed=0)


def test_links_are_followed_once_and_never_out(tmp_path):
    root = _files(tmp_path / "root", "a/x.mp4", "a/y.mp4", "b/z.mp4")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "b" / "again").symlink_to(root / "b")
    (root / "b" / "w.mp4").symlink_to(root / "a" / "x.mp4")
    index = folder(root, group_regex="", test_fraction=0.4, seed=0)
    assert [e.video_id for e in index.entries] == ["a/x.mp4", "a/y.mp4", "b/w.mp4", "b/z.mp4"]
    (root / "b" / "out").symlink_to(_files(tmp_path / "other", "q.mp4"))
    with pytest.raises(ValueError, match="b/out is a link out of"):
        folder(root, group_regex="", test_fraction=0.4, seed=0)


# --- hold-out, duplicates, settings ----------------------------------------------------------


def test_validation_takes_training_groups_and_leaves_the_test_alone(ucf):
    whole = ucf101(ucf, split=1)
    index = hold_out_validation(whole, fraction=0.3, seed=0)
    assert index.subset("test") == whole.subset("test")
    held = index.subset("validation")
    assert Counter(e.label for e in held) == {0: 2, 1: 2, 2: 2}  # one group of three per class
    assert not {e.group for e in held} & {e.group for e in index.subset("train")}
    assert hold_out_validation(whole, fraction=0.0, seed=0) == whole


def test_the_same_bytes_in_training_and_test_are_an_error(ucf):
    index = ucf101(ucf, split=1)
    train, test = index.subset("train"), index.subset("test")
    digests = {entry.video_id: entry.video_id for entry in index.entries}
    assert check_duplicates(index, digests) == []
    (note,) = check_duplicates(index, digests | {train[0].video_id: train[1].video_id})
    assert train[0].video_id in note and train[1].video_id in note
    with pytest.raises(ValueError, match="in training and in test") as error:
        check_duplicates(index, digests | {train[0].video_id: test[0].video_id})
    assert train[0].video_id in str(error.value) and test[0].video_id in str(error.value)


def _settings(**changes):
    return {
        "name": "folder", "root": "x", "split": 1, "group_regex": "", "test_fraction": 0.25,
        "validation_fraction": 0.1, "seed": 0,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "ucf102"}, "data.name: got 'ucf102'"),
        ({"split": 4}, "data.split: got 4"),
        ({"test_fraction": 1.0}, r"data.test_fraction must be in \[0, 1\), got 1.0"),
        ({"group_regex": "(["}, r"data.group_regex '\(\['"),
        ({"sead": 1}, "sead"),
    ],
)
def test_impossible_settings_are_named(changes, said):
    with pytest.raises((ValueError, TypeError), match=said):
        load_index(_settings(**changes))


def test_subset_names_are_checked(ucf):
    with pytest.raises(ValueError, match="got 'val'"):
        ucf101(ucf, split=1).subset("val")


# --- the demo set ----------------------------------------------------------------------------


def test_demo_groups_are_unseen_and_every_group_plays_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "generate", lambda root, *, seed: None)  # test_demo generates
    index = demo_set(tmp_path, seed=0)
    assert len(index.entries) == len(demo.clips()) and not index.leaky
    plays = Counter((e.group, e.label) for e in index.entries)
    assert set(plays.values()) == {demo.CLIPS_PER_GROUP}
    assert len(plays) == demo.GROUPS * len(demo.CLASS_NAMES)
    assert {e.group for e in index.subset("test")} == {f"g0{g}" for g in range(1, 5)}
    assert "say nothing about real ones" in index.summary()
