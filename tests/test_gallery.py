"""The gallery: what it takes from a run, and that no frame is to be recognised."""

import numpy as np
import pytest

from experiments.gallery import _page, join, mosaic, read_tested, surest
from stf_jax.video import Limits, VideoReader


def test_the_surest_right_and_wrong_video_are_chosen(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(
        "video_id,label,prediction,correct,run,walk\n"
        "a,run,run,1,0.600000,0.400000\n"
        "b,walk,run,0,0.700000,0.300000\n"
        "c,walk,walk,1,0.100000,0.900000\n"
    )
    tested = read_tested(path)
    assert surest(tested, True).video_id == "c"
    assert surest(tested, False)[1:] == ("walk", "run", 0.7)
    with pytest.raises(ValueError, match="no test video was answered wrongly"):
        surest([tested[0]], False)


def test_the_page_says_what_was_run_and_not_where_it_lay():
    results = {
        "config_file": "configs/ucf101.py:laptop",
        "changes": {"data.root": "/home/ann/ucf101", "records.root": "/home/ann/r", "seed": 3},
        "environment": {"commit": "abc1234", "machine": "Linux x86_64"},
        "interval95": (0.5, 0.75), "top1": 0.625, "num_videos": 8, "protocol": "official",
        "seed": 3,
    }  # fmt: skip
    page = _page(results, [("report.png", "its report")])
    assert "a run of `configs/ucf101.py:laptop --config.seed=3` on real videos: 62.5% top-1" in page
    assert "ann" not in page and "![its report](report.png)" in page


def test_a_mosaic_has_so_few_colours_and_keeps_the_mean():
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    coarse = mosaic(frames, 8)
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) <= 2 * 8 * 8
    np.testing.assert_allclose(coarse.mean(), frames.mean(), atol=0.5)
    np.testing.assert_array_equal(coarse[0, 8:16, :8].std(axis=(0, 1)), 0)


def test_videos_are_joined_and_keep_their_time(make_video, tmp_path):
    first = make_video(tmp_path / "a.mp4", frames=30, fps=25)
    second = make_video(tmp_path / "b.avi", frames=30, fps=30, size=(96, 64))
    path = tmp_path / "joined.mp4"
    begins = join([first, second], path, seconds=0.8, size=(48, 64))
    assert begins == [0.0, 0.8, 1.6]
    limits = Limits(10**6, 1000, 60.0)
    reader = VideoReader(path, limits, threads=1)
    shapes = {frame.shape for frame in reader}
    assert shapes == {(48, 64, 3)}
    assert reader.info.num_frames == 40
