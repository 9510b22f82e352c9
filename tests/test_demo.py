import hashlib
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from stf_jax import demo
from stf_jax.flow import make_flow, to_grey
from stf_jax.video import read_video


@pytest.fixture(scope="module")
def small():
    """Two groups instead of twenty: the rest is drawn by the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "GROUPS", 2)
        yield demo.clips()


@pytest.fixture(scope="module")
def root(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "videos"
    demo.generate(root, seed=3)
    return root


def _digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*.*")
    }


def test_every_video_is_a_real_encoded_file(small, root):
    formats = Counter()
    for clip in small:
        video = read_video(root / clip.video_id)
        assert video.frames.shape[1:] == (demo.SIDE, demo.SIDE, 3) and video.info.fps == 25
        assert 52 <= len(video.frames) <= 72 and not video.info.truncated
        formats[video.info.codec, video.info.container.split(",")[0]] += 1
    assert formats == {("h264", "mov"): len(small) // 2, ("mpeg4", "avi"): len(small) // 2}


def test_format_shape_and_light_do_not_tell_the_class():
    half = demo.GROUPS * demo.CLIPS_PER_GROUP // 2
    for cue, values in (
        ("suffix", (".mp4", ".avi")),
        ("actor", ("ball", "star")),
        ("night", (False, True)),
    ):
        counts = defaultdict(Counter)
        for clip in demo.clips():
            counts[clip.class_name][getattr(clip, cue)] += 1
        for name in demo.CLASS_NAMES:
            if cue == "night" and name.startswith("bobs_"):
                assert counts[name] == {name == "bobs_by_night": 2 * half}
            else:
                assert counts[name] == dict.fromkeys(values, half)


def test_night_is_in_the_picture_and_not_in_the_flow(small, root):
    """Of the same group and number, nights are darker, and the actor moves alike."""
    for day in _of(small, "bobs_by_day"):
        night = demo.DemoClip("bobs_by_night", day.group, day.number)
        light = [read_video(root / clip.video_id).frames.mean() for clip in (day, night)]
        assert light[1] < 0.6 * light[0]
        assert max(_speed(root / clip.video_id) for clip in (day, night)) < 2


def test_same_seed_same_bytes_another_seed_not(root, tmp_path, small):
    demo.generate(tmp_path / "again", seed=3)
    demo.generate(tmp_path / "other", seed=4)
    first, again, other = (_digests(p) for p in (root, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert len(set(first.values()) & set(other.values())) == 0


def test_it_is_made_once_and_again_if_a_video_is_lost(tmp_path, small):
    root = tmp_path / "videos"
    demo.generate(root, seed=3)
    before = _digests(root)
    lost = root / small[3].video_id
    kept = root / small[4].video_id
    stamp = kept.stat().st_mtime_ns
    demo.generate(root, seed=3)
    assert kept.stat().st_mtime_ns == stamp
    lost.unlink()
    demo.generate(root, seed=3)
    assert _digests(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ["videos"]


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "film.mp4").write_bytes(b"film")
    with pytest.raises(ValueError, match="is no demo set"):
        demo.generate(tmp_path / "mine", seed=0)
    (tmp_path / "mine" / "demo.json").write_text(json.dumps({"format": demo._FORMAT, "seed": 7}))
    with pytest.raises(ValueError, match="'seed': 7.*expected.*'seed': 0"):
        demo.generate(tmp_path / "mine", seed=0)
    assert (tmp_path / "mine" / "film.mp4").read_bytes() == b"film"


def _actor_motion(path):
    """Mean flow where anything moves faster than the camera, px per frame, over the video."""
    compute = make_flow("dis")
    greys = [to_grey(frame) for frame in read_video(path).frames]
    means = []
    for before, after in zip(greys[:-1], greys[1:], strict=True):
        flow = compute(before, after)
        fast = np.hypot(flow[..., 0], flow[..., 1]) > 0.8
        means.append(flow[fast].mean(axis=0) if fast.sum() > 20 else np.zeros(2))
    return np.array(means)


def _speed(path):
    return np.median(np.linalg.norm(_actor_motion(path), axis=1))


def _of(small, name):
    return [clip for clip in small if clip.class_name == name]


def test_direction_and_speed_are_in_the_flow(small, root):
    for clip in _of(small, "glides_left"):
        assert np.median(_actor_motion(root / clip.video_id)[:, 0]) < -0.4
    for clip in _of(small, "glides_right"):
        assert np.median(_actor_motion(root / clip.video_id)[:, 0]) > 0.4
    speeds = {
        name: [_speed(root / clip.video_id) for clip in _of(small, name)]
        for name in ("circles_slowly", "circles_fast")
    }
    assert max(speeds["circles_slowly"]) * 1.3 < min(speeds["circles_fast"])


def test_order_is_only_in_the_whole(small, root):
    for name, hops_first in (("hops_then_sways", True), ("sways_then_hops", False)):
        for clip in _of(small, name):
            motion = np.abs(_actor_motion(root / clip.video_id))
            third = len(motion) // 3
            halves = motion[:third].mean(axis=0), motion[-third:].mean(axis=0)
            first, last = (up > across for across, up in halves)
            assert (first, last) == (hops_first, not hops_first)


def test_pairs_differ_only_in_what_they_say():
    """With the same random draws the two classes of a pair are mirror images of each other."""
    t = np.arange(60.0)
    draws = lambda: np.random.default_rng(1)  # noqa: E731
    left, right = (demo._motion(n, 60, draws())(t) for n in ("glides_left", "glides_right"))
    np.testing.assert_allclose(left[1], right[1])
    np.testing.assert_allclose(np.diff(left[0])[:5], -np.diff(right[0])[:5])
    day, night = (demo._motion(n, 60, draws())(t) for n in ("bobs_by_day", "bobs_by_night"))
    np.testing.assert_array_equal(day, night)


@pytest.mark.parametrize("sways", demo._SWAYS)
def test_the_ordered_pair_shows_the_same_in_another_order(sways):
    """Places, steps and stacks of four steps: the same ones in both classes, as often."""
    count = 3 * demo._REST + demo._HOPS + sways
    t = np.arange(float(count))
    seen = []
    for name in ("hops_then_sways", "sways_then_hops"):
        x, y = demo._motion(name, count, np.random.default_rng(1))(t)
        places = np.round(np.stack([x, y], 1), 6) + 0.0
        steps = np.round(np.diff(places, axis=0), 5) + 0.0
        stacks = np.lib.stride_tricks.sliding_window_view(steps, 4, axis=0).reshape(-1, 8)
        seen.append([Counter(map(tuple, part.tolist())) for part in (places, steps, stacks)])
        assert np.abs(steps).max() > 2 and len(seen[-1][2]) > 20
    assert seen[0] == seen[1]


def test_the_length_of_a_clip_says_nothing_within_a_pair():
    for pair in zip(demo.CLASS_NAMES[::2], demo.CLASS_NAMES[1::2], strict=True):
        lengths = [demo._num_frames(name, np.random.default_rng(5)) for name in pair]
        assert lengths[0] == lengths[1]
