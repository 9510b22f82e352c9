"""Which clips, windows and mirror images are scored."""

import dataclasses

import numpy as np
import pytest

from stf_jax.views import EvalSettings, parse_views, plan_clips

ONE = EvalSettings(
    subset="test", num_clips=1, num_crops=1, flip=False, repeats=1, min_per_class=0,
    each_stream=False, calibration_bins=15,
)  # fmt: skip
WIDE = np.zeros(3, bool)


def _plan(upright=WIDE, aspect_kept=False, labels=(0, 1, 1), **changes):
    settings = dataclasses.replace(ONE, **changes)
    return plan_clips(labels, upright, settings, aspect_kept=aspect_kept)


def test_by_default_every_video_has_one_clip_in_order():
    plan = _plan()
    assert plan.entry.tolist() == [0, 1, 2] and plan.clip.tolist() == [0, 0, 0]
    assert plan.windows_of(plan.entry) == [None] and plan.mirrored == (False,)
    assert not plan.random


def test_clips_come_in_turns():
    plan = _plan(num_clips=2, flip=True)
    assert plan.entry.tolist() == [0, 1, 2, 0, 1, 2] and plan.clip.tolist() == [0, 0, 0, 1, 1, 1]
    assert plan.num_clips == 2 and plan.mirrored == (False, True) and not plan.random


def test_three_crops_lie_along_the_longer_side():
    upright = np.array([False, True, False])
    plan = _plan(upright, num_crops=3)
    assert len(plan) == 3
    assert plan.windows[0].tolist() == [[1, 0], [1, 1], [1, 2]]
    assert plan.windows[1].tolist() == [[0, 1], [1, 1], [2, 1]]
    plan = _plan(upright, num_crops=3, aspect_kept=True)
    # Each window lies in a square of its own.
    assert plan.entry.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert plan.windows[:6, 0].tolist() == [[1, 0], [1, 1], [1, 2], [0, 1], [1, 1], [2, 1]]
    assert plan.along.tolist() == 3 * [0, 1, 2] and plan.crop[:, 0].tolist() == 3 * [0, 1, 2]


def test_five_crops_are_corners_and_centre():
    corners = [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2]]
    assert _plan(num_crops=5).windows[0].tolist() == corners
    plan = _plan(np.array([False, True, False]), num_crops=5, aspect_kept=True)
    assert plan.windows[:5, 0].tolist() == corners
    assert plan.along[:5].tolist() == [0, 2, 1, 0, 2]  # columns of a wide video
    assert plan.along[5:10].tolist() == [0, 0, 1, 2, 2]  # rows of a high one


def test_classes_of_fewer_videos_are_drawn_from_more_often():
    plan = _plan(min_per_class=5)
    assert plan.random and plan.num_clips == 1
    assert np.bincount(plan.entry).tolist() == [5, 3, 3]
    for video in range(3):
        clips = plan.clip[plan.entry == video]
        assert sorted(clips) == list(range(len(clips)))
    assert np.bincount(_plan(repeats=4).entry).tolist() == [4, 4, 4]


def test_a_class_without_a_video_asks_for_nothing():
    plan = _plan(labels=(0, 3, 3), min_per_class=4)
    assert np.bincount(plan.entry).tolist() == [4, 2, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_clips": 0}, "eval.num_clips must be at least 1, got 0"),
        ({"repeats": 0}, "eval.repeats must be at least 1, got 0"),
        ({"min_per_class": -1}, "eval.min_per_class must be at least 0, got -1"),
        ({"calibration_bins": 0}, "eval.calibration_bins must be at least 1"),
        ({"num_crops": 4}, "eval.num_crops: got 4, one of 1, 3, 5"),
        ({"num_clips": 2, "repeats": 3}, "eval.num_clips=2 and eval.repeats=3: .* set one"),
        ({"min_per_class": 9, "repeats": 3}, "eval.repeats=3 and eval.min_per_class=9"),
    ],
)
def test_impossible_settings_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(ONE, **changes)


def test_crops_that_would_all_be_the_same_are_refused():
    several = dataclasses.replace(ONE, num_crops=3)
    with pytest.raises(ValueError, match="eval.num_crops=3: .*no room"):
        several.check_room(224, "squash", 224)
    several.check_room(256, "squash", 224)
    several.check_room(224, "short_side", 224)
    ONE.check_room(224, "squash", 224)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "1 clip per video"),
        ({"num_clips": 10, "num_crops": 3}, "10 clips per video, 3 crops"),
        ({"num_clips": 2, "flip": True}, "2 clips per video, mirrored too"),
        ({"repeats": 4}, "4 drawn clips per video"),
        ({"min_per_class": 1000}, "drawn clips, at least 1000 of each class"),
    ],
)  # fmt: skip
def test_views_are_told(changes, told):
    assert dataclasses.replace(ONE, **changes).summary() == told


def test_views_are_read():
    for told, read in (
        ("4", {"num_clips": 4, "num_crops": 1, "flip": False}),
        ("1xflip", {"num_clips": 1, "num_crops": 1, "flip": True}),
        ("2x5", {"num_clips": 2, "num_crops": 5, "flip": False}),
    ):
        assert parse_views(told) == read
    for told in ("", "2y3", "2x", "-1", "2xflipx3", "2x3xflop"):
        with pytest.raises(ValueError, match="views: got .*expected CLIPS"):
            parse_views(told)
