import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from stf_jax import layouts
from stf_jax.layouts import folder, listed, ucf11, ucf101, ucf101_lists, ucf_sports


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _files(root: Path, *names: str) -> Path:
    """Empty files: a layout opens none."""
    for name in names:
        _touch(root / name)
    return root


def _subset(layout, name):
    return {clip for clip, subset in layout.official.items() if subset == name}


# --- UCF101 ----------------------------------------------------------------------------------

CLASSES = ("Archery", "Biking", "HandstandPushups")


def _official(classes=CLASSES, groups=(1, 2, 8, 9)) -> list[str]:
    rows = ucf101_lists()["trainlist01.txt"] + ucf101_lists()["testlist01.txt"]
    clips = [row.split()[0] for row in rows.decode().splitlines()]
    wanted = tuple(f"_g{g:02}_" for g in groups)
    return [c for c in clips if c.split("/")[0] in classes and any(w in c for w in wanted)]


@pytest.fixture
def ucf(tmp_path) -> Path:
    """UCF101's layout with three classes and four groups, without lists."""
    return _files(tmp_path / "ucf", *(f"UCF-101/{clip}" for clip in _official()))


def test_the_official_lists_come_with_the_package():
    lists = ucf101_lists()
    assert {k: hashlib.sha256(v).hexdigest() for k, v in lists.items()} == layouts.UCF101_SHA256
    counts = {name: data.count(b"\n") for name, data in lists.items()}
    assert counts == {
        "classInd.txt": 101, "trainlist01.txt": 9537, "testlist01.txt": 3783,
        "trainlist02.txt": 9586, "testlist02.txt": 3734, "trainlist03.txt": 9624,
        "testlist03.txt": 3696,
    }  # fmt: skip


def test_the_official_lists_are_those_that_were_published():
    if "STF_DATA" not in os.environ:
        pytest.skip(reason="STF_DATA does not name the folder of real clips")
    folder = Path(os.environ["STF_DATA"], "ucf101_8", "ucfTrainTestlist")
    for name, data in ucf101_lists().items():
        assert (folder / name).read_bytes() == data, name


def test_a_damaged_table_of_lists_is_noticed(monkeypatch):
    monkeypatch.setitem(layouts.UCF101_SHA256, "testlist02.txt", "0" * 64)
    ucf101_lists.cache_clear()
    with pytest.raises(RuntimeError, match="another testlist02.txt than the official"):
        ucf101_lists()
    ucf101_lists.cache_clear()


@pytest.mark.parametrize("split", [1, 2])
def test_ucf101_is_read_by_its_lists(ucf, split):
    layout = ucf101(ucf, split=split)
    assert layout.class_names == CLASSES  # in the official order
    assert {c.video_id for c in layout.clips} == {f"UCF-101/{c}" for c in _official()}
    for clip in layout.clips:
        assert layout.class_names[clip.label] == clip.video_id.split("/")[1]
        assert (ucf / clip.video_id).is_file()
    # Group 8 of two classes are two sources.
    assert len({c.group for c in layout.clips}) == 3 * 4
    tested = {1: ("g01", "g02"), 2: ("g08", "g09")}[split]
    assert {c.video_id for c in layout.clips if c.group[-3:] in tested} == _subset(layout, "test")
    assert layout.official_name == f"official split {split}, clips present"


@pytest.mark.parametrize("shape", ["rar", "classes", "flat", "deep"])
def test_ucf101_is_found_in_every_layout(tmp_path, shape):
    place = {
        "rar": lambda clip: f"UCF-101/{clip}",
        "classes": lambda clip: clip,
        # As in UCF101_videos.zip: one folder, and another spelling of one class.
        "flat": lambda clip: "UCF101/" + clip.split("/")[1].replace("HandStand", "Handstand"),
        "deep": lambda clip: f"download/ucf101/videos/{clip}",
    }[shape]
    root = _files(tmp_path, *map(place, _official()))
    layout = ucf101(root, split=1)
    assert layout.class_names == CLASSES
    assert {c.video_id for c in layout.clips} == set(map(place, _official()))
    assert Counter(c.label for c in layout.clips) == Counter(
        CLASSES.index(c.split("/")[0]) for c in _official()
    )


def test_a_partial_copy_says_what_is_missing(ucf):
    for path in (ucf / "UCF-101" / "Biking").iterdir():
        path.unlink()
    layout = ucf101(ucf, split=1)
    left = [c for c in _official() if not c.startswith("Biking")]
    assert layout.class_names == ("Archery", "HandstandPushups")  # labels without a gap
    assert {c.label for c in layout.clips} == {0, 1}
    assert layout.missing == 13_320 - len(left)
    (note,) = layout.notes
    for said in ("2 of 101 classes (Archery, HandstandPushups)", f"{len(left)} of 13320 listed"):
        assert said in note


def test_files_on_no_list_are_said_and_not_used(ucf):
    _files(ucf / "UCF-101", "Archery/v_Archery_g26_c01.avi", "Archery/readme.txt")
    layout = ucf101(ucf, split=1)
    assert len(layout.clips) == len(_official())
    assert "1 files are on no list and not used: UCF-101/Archery/v_Archery_g26_c01.avi" in (
        layout.notes
    )


def test_a_clip_in_two_places_or_in_another_class_is_an_error(ucf):
    _touch(ucf / "Archery" / "v_Archery_g01_c01.avi")
    with pytest.raises(ValueError, match="v_Archery_g01_c01.avi twice: .*; remove one"):
        ucf101(ucf, split=1)
    (ucf / "Archery" / "v_Archery_g01_c01.avi").unlink()
    moved = ucf / "UCF-101" / "Biking" / "v_Archery_g01_c01.avi"
    (ucf / "UCF-101" / "Archery" / "v_Archery_g01_c01.avi").rename(moved)
    with pytest.raises(ValueError, match="Biking/v_Archery_g01_c01.avi lies in the folder of anot"):
        ucf101(ucf, split=1)


def _write_lists(root: Path, **changes: bytes) -> None:
    (root / "ucfTrainTestlist").mkdir()
    for name, data in (ucf101_lists() | changes).items():
        (root / "ucfTrainTestlist" / name).write_bytes(data)


def test_lists_beside_the_videos_must_agree_or_it_is_said(ucf):
    unix = ucf101_lists()["testlist01.txt"].replace(b"\r\n", b"\n") + b"\n"
    _write_lists(ucf, **{"testlist01.txt": unix})  # only the line ends differ
    assert not any("differ" in note for note in ucf101(ucf, split=1).notes)
    shorter = unix.replace(b"Archery/v_Archery_g01_c01.avi\n", b"")
    (ucf / "ucfTrainTestlist" / "testlist01.txt").write_bytes(shorter)
    layout = ucf101(ucf, split=1)
    assert any("testlist01.txt differ from the official" in note for note in layout.notes)
    assert layout.official_name.startswith("split 1 of other lists")
    assert len(layout.clips) == len(_official()) - 1


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("classInd.txt", "1 Archery\n3 Biking\n", "classInd.txt, row 2: expected '2 "),
        ("classInd.txt", "1 Archery\n2 Archery\n", "classInd.txt, row 2: expected '2 "),
        ("trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2\n", "row 1: Archery is class 3"),
        ("trainlist01.txt", "Archery/v_Archery_c01.avi 3\n", "row 1: expected"),
        ("testlist01.txt", "\nRowling/v_Rowling_g01_c01.avi\n", "testlist01.txt, row 2: expected"),
        ("testlist01.txt", "Diving/v_Diving_g01_c01.avi\n" * 2, "row 2: .* listed twice"),
        ("testlist01.txt", "Diving/v_Diving_g08_c01.avi\n", "share the groups Diving/g08"),
        ("testlist01.txt", "\n", "testlist01.txt names no clip"),
        ("testlist01.txt", "\udcff", "testlist01.txt is no text"),
        ("testlist01.txt", None, "testlist01.txt is missing; .* come with this program"),
    ],
)
def test_a_contradictory_list_names_file_and_row(ucf, file, text, said):
    _write_lists(ucf)
    path = ucf / "ucfTrainTestlist" / file
    path.unlink() if text is None else path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        ucf101(ucf, split=1)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--config\.data\.root"):
        ucf101(tmp_path / "nowhere", split=1)
    _files(tmp_path, "film.avi")
    with pytest.raises(FileNotFoundError, match="none of the 13320 clips .* got film.avi"):
        ucf101(tmp_path, split=1)


def test_the_real_clips_are_found():
    if "STF_DATA" not in os.environ:
        pytest.skip(reason="STF_DATA does not name the folder of real clips")
    layout = ucf101(Path(os.environ["STF_DATA"], "ucf101_8"), split=1)
    # As the data's own manifest counts.
    assert (len(_subset(layout, "train")), len(_subset(layout, "test"))) == (288, 64)
    assert len(layout.class_names) == 8 and layout.missing == 13_320 - 352


# --- UCF11 -----------------------------------------------------------------------------------


def _ucf11_names(classes=layouts.UCF11_CLASSES, groups=range(1, 4), clips=2):
    for name in classes:
        word = layouts.UCF11_CLASSES[name][0]
        for g in groups:
            for c in range(1, clips + 1):
                yield name, f"v_{word}_{g:02}", f"v_{word}_{g:02}_{c:02}"


@pytest.mark.parametrize("shape", ["mpg", "annotated", "flat"])
def test_ucf11_is_found_in_every_layout(tmp_path, shape):
    for name, group, clip in _ucf11_names():
        if shape == "mpg":
            _files(tmp_path / "UCF11_updated_mpg" / name, f"{group}/{clip}.mpg",
                   f"Annotation/{clip}.xgtf")  # fmt: skip
        elif shape == "annotated":
            _files(tmp_path / "action_youtube_naudio" / name, f"{group}/{clip}.avi",
                   f"Annotation/{clip}.xgtf", "Annotation/readme")  # fmt: skip
        else:
            _files(tmp_path, f"{clip}.mpg", f"{clip}.xgtf", "Excluded Videos.txt")
    layout = ucf11(tmp_path)
    assert layout.class_names == tuple(layouts.UCF11_CLASSES)
    assert len(layout.clips) == 11 * 3 * 2 and layout.missing == 1600 - 66
    assert len({c.group for c in layout.clips}) == 33 and layout.numbered
    dog = [c for c in layout.clips if "walk_dog_02" in c.video_id]
    assert {(layout.class_names[c.label], c.group) for c in dog} == {("walking", "walking/g02")}
    assert any("66 of 1600 clips: basketball 6 of 141" in note for note in layout.notes)
    assert layout.official is None


def test_the_counts_of_ucf11_are_those_of_the_specification():
    counts = [count for _, count in layouts.UCF11_CLASSES.values()]
    assert counts == [141, 145, 156, 142, 198, 156, 137, 167, 119, 116, 123]
    assert sum(counts) == 1600


def test_clips_of_ucf11_twice_or_in_another_class_are_errors(tmp_path):
    root = _files(tmp_path, "diving/v_diving_01/v_diving_01_01.mpg",
                  "swing/v_swing_01/v_swing_01_01.mpg", "swing/stray.mpg")  # fmt: skip
    assert any("1 files are no clips of UCF11" in note for note in ucf11(root).notes)
    _files(root, "copy/v_diving_01_01.avi")
    with pytest.raises(ValueError, match="v_diving_01_01 twice"):
        ucf11(root)
    (root / "copy" / "v_diving_01_01.avi").rename(root / "swing" / "v_diving_01_02.avi")
    with pytest.raises(ValueError, match="swing/v_diving_01_02.avi lies in the folder of another"):
        ucf11(root)
    with pytest.raises(FileNotFoundError, match="no clip of UCF11; .*v_shooting_01_01.mpg"):
        ucf11(_files(tmp_path / "other", "x.mpg"))


# --- UCF Sports ------------------------------------------------------------------------------


def _sports(root: Path, *, videos: bool) -> Path:
    """The complete set as ucf_sports_actions.zip holds it; the files are empty."""
    for name, (_, count) in layouts.UCF_SPORTS_FOLDERS.items():
        for number in range(1, count + 1):
            place = f"ucf_sports_actions/ucf action/{name}/{number:03}"
            _files(root, f"{place}/gt/gt.txt", f"{place}/gt/1.tif", f"{place}/Thumbs.db",
                   f"{place}/jpeg/f_00{number}.jpg")  # fmt: skip
            if videos:
                _files(root, f"{place}/RF1-13207_7015.avi", f"{place}/2_0001.jpg")
    return root


@pytest.mark.parametrize("videos", [True, False])
def test_ucf_sports_is_split_as_usual(tmp_path, videos):
    layout = ucf_sports(_sports(tmp_path, videos=videos), group_regex="")
    assert len(layout.clips) == 150 and not layout.notes and layout.missing == 0
    by_class = Counter(layout.class_names[c.label] for c in layout.clips)
    assert list(by_class.values()) == [14, 18, 20, 6, 12, 13, 12, 20, 13, 22]
    tested = Counter(
        layout.class_names[c.label] for c in layout.clips if c.video_id in _subset(layout, "test")
    )
    assert list(tested.values()) == [4, 6, 6, 2, 4, 4, 4, 6, 4, 7]
    assert (len(_subset(layout, "train")), len(_subset(layout, "test"))) == (103, 47)
    # The first third of golf is all of one view and the first of the next.
    golf = {c.split("/")[2] + c.split("/")[3] for c in _subset(layout, "test") if "Golf" in c}
    assert golf == {*(f"Golf-Swing-Back00{n}" for n in range(1, 6)), "Golf-Swing-Front001"}
    ends = {c.video_id.rpartition("/")[2] for c in layout.clips}
    assert ends == ({"RF1-13207_7015.avi"} if videos else {"jpeg"})
    assert not layout.groups_known


def test_a_partial_copy_of_ucf_sports_keeps_the_usual_split(tmp_path):
    # Videos right in the class folders; number 4 of 14 is the last test clip.
    root = _files(tmp_path, *(f"Diving-Side/{n:03}.avi" for n in (2, 4, 5)), "Lifting/003/a.avi",
                  "Lifting/002/x.txt", "Lifting/001/1.jpg")  # fmt: skip
    layout = ucf_sports(root, group_regex="")
    assert _subset(layout, "test") == {"Diving-Side/002.avi", "Diving-Side/004.avi", "Lifting/001"}
    assert _subset(layout, "train") == {"Diving-Side/005.avi", "Lifting/003/a.avi"}
    assert layout.official_name.endswith("clips present")
    assert "5 of 150 clips: Diving-Side 3 of 14" in layout.notes[0]


def test_odd_folders_of_ucf_sports_are_named(tmp_path):
    _files(tmp_path, "Lifting/001/a.avi", "Lifting/001/b.avi")
    with pytest.raises(ValueError, match="Lifting/001 holds 2 videos, expected one: "):
        ucf_sports(tmp_path, group_regex="")
    with pytest.raises(FileNotFoundError, match="no clip of UCF Sports; .*Diving-Side/001"):
        ucf_sports(_files(tmp_path / "other", "x.avi"), group_regex="")


# --- a folder per class ----------------------------------------------------------------------


def test_files_are_videos_unless_their_names_say_otherwise(tmp_path):
    odd = ['a/ü ber, "all".avi', "a/deep/er/x", "a/-y.webm", "a/new\nline.mp4", "b/z.mkv"]
    root = _files(tmp_path, *odd, "b/notes.txt", "b/.hidden.mp4", "readme.mp4", "empty/thumbs.db",
                  "b/cover.jpg")  # fmt: skip
    layout = folder(root, group_regex="")
    assert {c.video_id for c in layout.clips} == set(odd)
    assert "class folder empty/ holds no video and is left out" in layout.notes
    (note,) = (note for note in layout.notes if "no videos by their names" in note)
    assert note.startswith("4 files") and "b/notes.txt" in note and "b/cover.jpg" in note


def test_a_folder_of_pictures_is_a_video(tmp_path):
    root = _files(tmp_path, *(f"a/clip1/{n}.jpg" for n in range(3)), "a/clip2/deep/1.PNG",
                  "b/film/1.jpg", "b/film/film.avi")  # fmt: skip
    layout = folder(root, group_regex="")
    assert [c.video_id for c in layout.clips] == ["a/clip1", "a/clip2/deep", "b/film/film.avi"]
    assert "1 files are no videos by their names and not used: b/film/1.jpg" in layout.notes


def test_names_tell_groups_or_are_errors(tmp_path):
    root = _files(tmp_path, "a/p1_x.mp4", "a/p2_x.mp4", "b/p1_x.mp4")
    layout = folder(root, group_regex="^p([0-9])")
    assert [c.group for c in layout.clips] == ["1", "2", "1"] and layout.groups_known
    assert not folder(root, group_regex="").groups_known
    _files(root, "b/other.mp4")
    with pytest.raises(ValueError, match=r"finds no group in the name 'other\.mp4' \(b/other"):
        folder(root, group_regex="^p[0-9]")


def test_one_class_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="at least two class folders with videos, got a"):
        folder(_files(tmp_path, "a/x.mp4"), group_regex="")


def test_links_are_followed_once_and_never_out(tmp_path):
    root = _files(tmp_path / "root", "a/x.mp4", "a/y.mp4", "b/z.mp4")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "b" / "again").symlink_to(root / "b")
    (root / "b" / "w.mp4").symlink_to(root / "a" / "x.mp4")
    found = [c.video_id for c in folder(root, group_regex="").clips]
    assert found == ["a/x.mp4", "a/y.mp4", "b/w.mp4", "b/z.mp4"]
    (root / "b" / "out").symlink_to(_files(tmp_path / "other", "q.mp4"))
    with pytest.raises(ValueError, match="b/out is a link out of"):
        folder(root, group_regex="")


def test_a_name_that_is_no_text_is_an_error(tmp_path):
    _files(tmp_path, "a/x.mp4")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.mp4"))).touch()
    with pytest.raises(ValueError, match="is not UTF-8; rename the file"):
        folder(tmp_path, group_regex="")


# --- a list ----------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path) -> Path:
    names = ['a, "b".avi', "-c.mp4", "deep/ü.mkv", "d\ne.avi"]
    return _files(tmp_path / "videos", *names, "frames/1.jpg")


def _table(tmp_path, text: str | bytes) -> Path:
    path = tmp_path / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_list_names_path_label_group_and_subset(videos, tmp_path):
    text = (
        '\ufeffpath,label,group,subset\r\n"a, ""b"".avi",run,ann,train\r\n'
        '-c.mp4,walk,ann,test\r\n"d\ne.avi",run,bob,validation\r\nframes,walk,bob,train\r\n'
    )
    layout = listed(videos, _table(tmp_path, text), group_regex="")
    assert layout.class_names == ("run", "walk") and layout.groups_known
    assert [(c.video_id, c.label, c.group) for c in layout.clips] == [
        ('a, "b".avi', 0, "ann"), ("-c.mp4", 1, "ann"), ("d\ne.avi", 0, "bob"),
        ("frames", 1, "bob"),
    ]  # fmt: skip
    assert list(layout.official.values()) == ["train", "test", "validation", "train"]
    bare = listed(videos, _table(tmp_path, "label,path\n1,-c.mp4\n0,frames\n"), group_regex="")
    assert bare.class_names == ("0", "1") and bare.official is None and not bare.groups_known
    assert [c.label for c in bare.clips] == [1, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "row 1: expected the columns path, label"),
        ("path;label\n", "row 1: expected the columns"),
        ("path,label,weight\n-c.mp4,a,1\n", "row 1: expected the columns"),
        ("path,label\n", "lists no video"),
        ("path,label\n-c.mp4,a\nframes\n", "row 3: expected 2 values, got 1"),
        ("path,label\n-c.mp4,a,x\n", "row 2: expected 2 values, got 3"),
        ('path,label\n-c.mp4,a\n"frames,b\n', "row 3: bad CSV"),
        (b"path,label\n-c.mp4,\xff\n", "row 2: not UTF-8"),
        ("path,label\n-c.mp4,a\nno.avi,b\n", "row 3: .*no.avi is not there"),
        ("path,label\n-c.mp4,a\n-c.mp4,b\n", "row 3: -c.mp4 stands in row 2 already"),
        ("path,label\n-c.mp4,a\n./-c.mp4,b\n", "row 3: -c.mp4 stands in row 2 already"),
        ("path,label\n/etc/passwd,a\nframes,b\n", "row 2: '/etc/passwd' is no path below"),
        ("path,label\n../list.csv,a\nframes,b\n", "row 2: '../list.csv' is no path below"),
        ("path,label\nout.avi,a\nframes,b\n", "row 2: out.avi leads out of"),
        ("path,label\n,a\nframes,b\n", "row 2: '' is no path"),
        ("path,label\n-c.mp4,a\nframes, \n", "row 3: the label is empty"),
        ("path,label\n-c.mp4,a\nframes,a\n", "expected at least two classes, got a"),
        ("path,label\n-c.mp4,0\nframes,2\n", "row 3: label 2, but no video has label 1"),
        ("path,label\n-c.mp4,1\nframes,2\n", "row 2: label 1, but no video has label 0"),
        ("path,label\n-c.mp4,0\nframes,b\n", "row 3: the label 'b' is a name, but row 2"),
        ("path,label,group\n-c.mp4,a,x\nframes,b,\n", "row 3: the group is empty"),
        ("path,label,subset\n-c.mp4,a,test\nframes,b,dev\n", "row 3: subset 'dev' is none of"),
    ],
)
def test_a_bad_row_names_file_and_row(videos, tmp_path, text, said):
    (videos / "out.avi").symlink_to(_table(tmp_path, text))
    with pytest.raises(ValueError, match=rf"list\.csv(, | ).*{said}|list\.csv: {said}"):
        listed(videos, tmp_path / "list.csv", group_regex="")


def test_a_list_that_is_not_there_is_named(videos, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.list: .*none.csv is not there"):
        listed(videos, tmp_path / "none.csv", group_regex="")
