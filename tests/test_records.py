import dataclasses
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import tensorflow as tf

from configs import folder
from stf_jax import prepare
from stf_jax.datasets import ClipEntry, VideoIndex, load_index
from stf_jax.prepare import RecordSettings, encode_video
from stf_jax.records import open_records, prepare_records


@pytest.fixture
def index(tiny_videos, tmp_path) -> VideoIndex:
    """A copy of the tiny videos that a test may spoil."""
    shutil.copytree(tiny_videos, tmp_path / "videos")
    data = folder.get_config().data
    data.update(root=str(tmp_path / "videos"), group_regex=r"_(g\d)_", validation_fraction=0.0)
    return load_index(data)


@pytest.fixture
def settings(tmp_path, tiny_records) -> RecordSettings:
    return dataclasses.replace(tiny_records[1].settings, root=str(tmp_path / "records"))


def _contents(records):
    parsed = {}
    for video_id, row in records.rows.items():
        if row.usable:
            example = records.parse(tf.constant(records.read(row.record)))
            assert example["video_id"].numpy().decode() == video_id
            parsed[video_id] = example["frames"].numpy().tolist(), example["flow"].numpy().tolist()
    return parsed


def test_what_is_read_is_what_was_encoded(tiny_records):
    index, records = tiny_records
    stored = _contents(records)
    assert list(stored) == [entry.video_id for entry in index.entries]
    for entry in index.entries[::5]:
        encoded = encode_video(index.path(entry), records.settings)
        assert stored[entry.video_id] == (list(encoded.frames), list(encoded.flow))


def test_a_second_call_does_nothing(index, settings):
    first = prepare_records(index, settings)
    stamps = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*.array_record*")}
    assert stamps
    again = prepare_records(index, settings)
    assert again.digest == first.digest and again.rows == first.rows
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*.array_record*")} == stamps


def test_other_settings_and_other_files_never_share_a_folder(index, settings):
    first = prepare_records(index, settings)
    folders = {first.folder}
    for changes in ({"flow_algorithm": "farneback"}, {"flow_bound": 8.0}, {"size": 40}):
        folders.add(prepare_records(index, dataclasses.replace(settings, **changes)).folder)
    entry = index.entries[0]
    index.path(entry).write_bytes(index.path(index.entries[-1]).read_bytes() + b"\0")
    folders.add(prepare_records(index, settings).folder)
    assert len(folders) == 5
    faster = dataclasses.replace(settings, workers=1, timeout=99.0)
    assert prepare_records(index, faster).folder in folders


def test_bad_files_are_rows_and_change_nothing_else(index, settings):
    entries = index.entries
    (index.root / "left" / "text ü.avi").write_text("not a video")
    (index.root / "left" / "empty.mp4").touch()
    data = folder.get_config().data
    data.root = str(index.root)
    whole = load_index(data)
    records = prepare_records(whole, settings)
    assert records.rows["left/text ü.avi"].reason == "not a video: text"
    assert records.rows["left/empty.mp4"].reason == "empty file"
    assert {k for k, row in records.rows.items() if row.usable} == {e.video_id for e in entries}
    # The manifest on disk says the same.
    assert prepare.read_manifest(records.folder / "manifest.csv") == records.rows


def test_no_usable_video_is_an_error(tmp_path, settings):
    (tmp_path / "x.avi").touch()
    entry = ClipEntry("x.avi", 0, "g", "train")
    index = VideoIndex("none", tmp_path, ("a",), (entry,), "test", False, 0.0, (), 0)
    with pytest.raises(ValueError, match=r"None of the 1 files .* usable \(x.avi: empty file\)"):
        prepare_records(index, settings)


def test_the_same_bytes_in_training_and_test_are_found(index, settings):
    train, test = index.subset("train")[0], index.subset("test")[0]
    shutil.copy(index.path(train), index.path(test))
    with pytest.raises(ValueError, match="stands in training and in test"):
        prepare_records(index, settings)


def test_an_unfinished_folder_is_not_opened(tmp_path, settings):
    with pytest.raises(FileNotFoundError, match="no finished record set"):
        open_records(tmp_path, settings)


def test_a_second_writer_is_told_who_holds_the_set(index, settings):
    folder_of = prepare_records(index, settings).folder
    with prepare.locked(folder_of):
        with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on "):
            prepare_records(index, settings)


@pytest.mark.parametrize("moment", ["staging", "packing"])
def test_killed_preparation_ends_the_same(index, settings, tiny_records, moment):
    """SIGKILL at a known moment, then the same call again."""
    child = multiprocessing.get_context("spawn").Process(
        target=_prepare_and_die, args=(index, settings, moment)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (unfinished,) = (p for p in (index.root.parent / "records").iterdir())
    assert not (unfinished / "manifest.csv").exists()
    _wait_for_orphans(unfinished)
    records = prepare_records(index, settings)
    assert _contents(records) == _contents(tiny_records[1])
    names = {p.name for p in records.folder.iterdir()}
    assert names == {".lock", "settings.json", "manifest.csv", "video_records"}


def _prepare_and_die(index, settings, moment):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    from stf_jax import records

    if moment == "packing":
        records.VideoRecords.download_and_prepare = die
    else:
        # The third finished video is the last thing this process sees.
        real, seen = prepare._outcome, []

        def third(*args):
            seen.append(1)
            if len(seen) == 3:
                die()
            return real(*args)

        prepare._outcome = third
    prepare_records(index, settings)


def _wait_for_orphans(unfinished):
    """Workers that outlive their killed parent may still be writing: wait until they stop."""
    counts = [-1, -2]
    while counts[-1] != counts[-2]:
        time.sleep(0.5)
        counts.append(len(list((unfinished / "staged").glob("*"))))
