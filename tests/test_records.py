import dataclasses
import functools
import hashlib
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import tensorflow as tf

from configs import folder
from stf_jax import prepare, records
from stf_jax.datasets import ClipEntry, VideoIndex, load_index
from stf_jax.prepare import RecordSettings, encode_video
from stf_jax.records import open_records, prepare_records, verify_records
from stf_jax.shards import VideoRecords


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


def _contents(made):
    parsed = {}
    for video_id, row in made.rows.items():
        if row.usable:
            example = made.parse(tf.constant(made.read(row.record)))
            assert example["video_id"].numpy().decode() == video_id
            parsed[video_id] = example["frames"].numpy().tolist(), example["flow"].numpy().tolist()
    return parsed


def test_what_is_read_is_what_was_encoded(tiny_records):
    index, stored_records = tiny_records
    stored = _contents(stored_records)
    assert list(stored) == [entry.video_id for entry in index.entries]
    for entry in index.entries[::5]:
        encoded = encode_video(index.path(entry), stored_records.settings)
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
    found = prepare_records(whole, settings)
    assert found.rows["left/text ü.avi"].reason == "not a video: text"
    assert found.rows["left/empty.mp4"].reason == "empty file"
    assert {k for k, row in found.rows.items() if row.usable} == {e.video_id for e in entries}
    # The manifest on disk says the same.
    assert prepare.read_manifest(found.folder / "manifest.csv") == found.rows


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


@pytest.mark.parametrize(
    "moment", ["staging", "finishing", pytest.param("packing", marks=pytest.mark.slow)]
)
def test_killed_preparation_ends_the_same(index, settings, tiny_records, monkeypatch, moment):
    """SIGKILL at a known moment, then the same call again."""
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 6)
    child = multiprocessing.get_context("spawn").Process(
        target=_prepare_and_die, args=(index, settings, moment)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (unfinished,) = (p for p in (index.root.parent / "records").iterdir())
    assert not (unfinished / "manifest.csv").exists()
    _wait_for_orphans(unfinished)
    done = {p: p.stat().st_mtime_ns for p in unfinished.rglob("*.array_record*")}
    if moment == "finishing":
        assert len(done) == 3
    finished = prepare_records(index, settings)
    assert _contents(finished) == _contents(tiny_records[1])
    names = {p.name for p in finished.folder.iterdir()}
    assert names == {".lock", "settings.json", "manifest.csv", "shards", "video_records"}
    assert not list(finished.folder.rglob("*.part"))
    noted = moment == "finishing"  # before its note is written, a shard counts for nothing
    assert all((p.stat().st_mtime_ns == when) == noted for p, when in done.items())
    undisturbed = prepare_records(index, dataclasses.replace(settings, root=settings.root + "2"))
    assert _digests(finished.folder) == _digests(undisturbed.folder)


def _digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _prepare_and_die(index, settings, moment):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    records._SHARD_VIDEOS = 6
    if moment == "packing":
        records.ShardNote.of = die  # the first shard is in its place, its note is not
    elif moment == "finishing":
        records._manifest = die
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


# --- checking and mending --------------------------------------------------------------------


def _shards(made):
    return sorted(made.folder.rglob("*.array_record*"))


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _other_record(path):
    shutil.copy(sorted(path.parent.glob("*.array_record*"))[0], path)


_DAMAGE = {
    "flipped bit": (_flip_a_bit, "not what was written"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "cut": (_cut, "it was written with"),
    "another shard": (_other_record, "written"),
}


@pytest.mark.parametrize("kind", _DAMAGE)
def test_a_damaged_shard_is_found_and_made_again(index, settings, monkeypatch, kind):
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 6)
    made = prepare_records(index, settings)
    before = _digests(made.folder)
    stamps = {p: p.stat().st_mtime_ns for p in _shards(made)}
    assert len(stamps) == 3
    assert verify_records(index, settings).damage == ()
    damage, said = _DAMAGE[kind]
    victim = _shards(made)[1]
    damage(victim)
    if kind != "flipped bit":  # which only reading everything can find
        with pytest.raises(RuntimeError, match=r"shard 00001 .* damaged.*--verify"):
            prepare_records(index, settings)
    checked = verify_records(index, settings)
    assert len(checked.damage) == 1 and said in checked.damage[0]
    assert victim.name in checked.damage[0]
    assert _digests(made.folder) == before
    untouched = [p for p in stamps if p != victim]
    assert all(p.stat().st_mtime_ns == stamps[p] for p in untouched)
    assert verify_records(index, settings).damage == ()


def test_a_source_that_changed_is_found_and_prepared_again(index, settings, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 6)
    made = prepare_records(index, settings)
    entry = index.entries[8]
    content = bytearray(index.path(entry).read_bytes())
    content[-1] ^= 1  # the same size: the same set
    index.path(entry).write_bytes(content)
    stamps = [p.stat().st_mtime_ns for p in _shards(made)]
    checked = verify_records(index, settings)
    assert len(checked.damage) == 1 and entry.video_id in checked.damage[0]
    assert checked.records.rows[entry.video_id].sha256 == hashlib.sha256(content).hexdigest()
    again = [p.stat().st_mtime_ns for p in _shards(made)]
    assert [a == b for a, b in zip(stamps, again, strict=True)] == [True, False, True]


@pytest.mark.parametrize("name", ["manifest.csv", "features.json", "00001.json"])
def test_what_lies_beside_the_shards_is_checked_too(index, settings, monkeypatch, name):
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 6)
    made = prepare_records(index, settings)
    before = _digests(made.folder)
    (path,) = made.folder.rglob(name)
    if name == "features.json":
        path.unlink()
    else:
        _flip_a_bit(path)
    checked = verify_records(index, settings)
    assert len(checked.damage) == 1 and name in checked.damage[0]
    assert _digests(made.folder) == before


def test_a_video_that_failed_by_chance_is_tried_again(index, settings):
    entry = index.entries[0]
    path = index.path(entry)
    size = path.stat().st_size
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path)  # cannot be opened, whoever asks
    assert size > 0
    made = prepare_records(index, settings)
    assert made.rows[entry.video_id].reason.startswith("cannot be read")
    checked = verify_records(index, settings)
    assert checked.damage == () and entry.video_id in checked.retried[0]
    assert not checked.records.rows[entry.video_id].usable


def test_an_unfinished_set_cannot_be_checked(index, settings):
    with pytest.raises(FileNotFoundError, match="leave out --verify"):
        verify_records(index, settings)


def test_every_record_is_decoded(index, settings):
    """A record that its digest vouches for but no decoder takes: the writer's fault."""
    made = prepare_records(index, settings)
    row = made.rows[index.entries[0].video_id]
    example = dict(made.parse(tf.constant(made.read(row.record))))
    check = functools.partial(records._check_record, row, settings=settings)
    assert check(example) == ""
    broken = [b"no picture", *example["frames"].numpy()[1:]]
    assert "cannot be decoded" in check(example | {"frames": tf.constant(broken)})
    assert "number" in check(example | {"flow": example["flow"][1:]})
    assert "another video's" in check(example | {"video_id": tf.constant("other")})


def test_a_shard_of_invalid_videos_holds_nothing_and_hinders_nobody(index, settings, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 2)
    for entry in index.entries[2:4]:
        index.path(entry).write_bytes(b"")
    made = prepare_records(index, settings)
    assert len(_contents(made)) == len(index.entries) - 2
    assert verify_records(index, settings).damage == ()


def test_the_tfds_builder_by_itself_makes_the_same_shards(index, settings, monkeypatch, tmp_path):
    """What Apache Beam runs; here tfds calls its shards one after the other."""
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 8)
    made = prepare_records(index, settings)
    shards = records.plan_shards({entry.video_id: index.path(entry) for entry in index.entries})
    builder = VideoRecords(shards, tmp_path / "s", settings, data_dir=tmp_path / "by_tfds")
    builder.download_and_prepare()
    by_tfds = _digests(tmp_path / "by_tfds" / "video_records")
    assert len(by_tfds) == 4  # two shards, and what describes them
    assert by_tfds == _digests(made.folder / "video_records")


def test_shards_are_cut_by_number_and_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_VIDEOS", 3)
    monkeypatch.setattr(records, "_SHARD_SOURCE_BYTES", 100)
    sizes = {"a": 10, "b": 10, "c": 10, "d": 60, "e": 50, "f": 150, "g": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    shards = records.plan_shards({name: tmp_path / name for name in [*sizes, "absent"]})
    assert [list(shard) for shard in shards] == [
        ["a", "b", "c"],
        ["d", "e"],
        ["f"],
        ["g", "absent"],
    ]
