import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.metrics import (
    Sums,
    bootstrap,
    calibration,
    cross_entropy,
    per_class,
    summarise,
    wilson,
)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    loss = cross_entropy([logits], jnp.array([0, 2]))
    np.testing.assert_allclose(loss, [-np.log(0.5), -np.log(0.7)], rtol=1e-6)


def test_every_step_averages_the_losses_not_the_scores():
    steps = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]]))
    loss = cross_entropy([steps], jnp.array([0]))
    np.testing.assert_allclose(loss, [-(np.log(0.5) + np.log(0.9)) / 2], rtol=1e-6)


def test_smoothed_targets_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    loss = cross_entropy([logits], jnp.array([0]), 0.3)
    expected = -(0.8 * np.log(0.5) + 0.2 * np.log(0.25))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def _sums(rows):
    loss, logits, label, mask = (jnp.asarray(x) for x in zip(*rows, strict=True))
    return Sums.of(loss, logits, label, mask)


def test_any_batching_gives_the_same_means():
    rng = np.random.default_rng(0)
    rows = [
        (
            np.float32(rng.uniform()),
            rng.normal(size=4).astype(np.float32),
            int(rng.integers(4)),
            True,
        )
        for _ in range(12)
    ]
    padding = (np.float32(99.0), np.ones(4, np.float32), 0, False)
    whole = _sums(rows).means()
    for size in (1, 5, 7):
        parts = [rows[i : i + size] for i in range(0, 12, size)]
        total = Sums.zero()
        for part in parts:
            total = total + _sums(part + [padding] * (size - len(part)))
        assert total.means() == pytest.approx(whole, rel=1e-6)


def test_means_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no clip"):
        Sums.zero().means()


def test_summary_of_a_hand_made_table():
    # Classes 0 and 1 occur, class 2 never does; video 2 is wrong.
    scores = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.3, 0.2, 0.5], [0.1, 0.8, 0.1]])
    figures = summarise(scores, np.array([0, 0, 0, 1]))
    assert figures.confusion == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert figures.top1 == 0.75
    assert figures.mean_class_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert figures.top5 == 1.0
    assert figures.num_videos == 4
    assert figures.loss == pytest.approx(-np.log([0.8, 0.6, 0.3, 0.8]).mean())


def test_top5_counts_strictly_better_classes():
    scores = np.tile(np.array([0.3, 0.2, 0.15, 0.12, 0.11, 0.07, 0.05]), (2, 1))
    assert summarise(scores, np.array([4, 5])).top5 == 0.5


def test_wilson_against_the_quadratic_it_solves():
    # The bounds p solve (x/n - p)^2 = z^2 p (1 - p) / n.
    for x, n in ((469, 480), (44, 45), (0, 10), (32, 64)):
        for p in wilson(x, n):
            if 0 < p < 1:
                assert (x / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-5)


def test_an_empty_subset_is_refused():
    with pytest.raises(ValueError, match="no video"):
        summarise(np.zeros((0, 3)), np.zeros(0, int))


# Three classes and ten rows, worked by hand. Class 2 is never predicted rightly; the confusion is
#   0: 3 of 4 right, 1 taken for 1;  1: 4 of 4 right;  2: 0 of 2 right, 1 for 0 and 1 for 1.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
TABLE = np.array(
    [
        [0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0],
        [0.0, 1.0, 0.0], [0.3, 0.4, 0.3], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.3, 0.4, 0.3],
    ]
)  # fmt: skip


def test_precision_and_recall_by_hand():
    figures = per_class(summarise(TABLE, LABELS).confusion)
    assert figures.counts == [4, 4, 2] and figures.predicted == [4, 6, 0]
    assert figures.precision == [3 / 4, 4 / 6, None]
    assert figures.recall == [3 / 4, 1.0, 0.0]
    # A class that has no row and is taken for nothing.
    figures = per_class([[2, 0], [0, 0]])
    assert figures.precision == [1.0, None] and figures.recall == [1.0, None]


def test_calibration_by_hand():
    error, curve = calibration(TABLE, LABELS, bins=2)
    # (0, 0.5]: 0.5 right, 0.4 right, 0.4 wrong; (0.5, 1]: 0.9, 0.8, 0.9, 1.0, 0.8 right, 0.7 and
    # 0.6 wrong.
    low, high = curve
    assert (low.low, low.high, low.count) == (0.0, 0.5, 3)
    assert low.confidence == pytest.approx(1.3 / 3) and low.accuracy == pytest.approx(2 / 3)
    assert high.count == 7 and high.confidence == pytest.approx(5.7 / 7)
    assert high.accuracy == pytest.approx(5 / 7)
    assert error == pytest.approx((0.7 + 0.7) / 10)
    error, curve = calibration(np.array([[1.0, 0.0]]), np.array([0]), bins=10)
    assert error == 0 and curve[9].count == 1 and curve[0].confidence is None


def test_calibration_against_a_row_by_row_sum():
    rng = np.random.default_rng(3)
    rows = rng.dirichlet(np.full(5, 0.3), 400)
    labels = rng.integers(0, 5, 400)
    error, curve = calibration(rows, labels, bins=15)
    total = 0.0
    for number in range(15):
        inside = [i for i in range(400) if number / 15 < rows[i].max() <= (number + 1) / 15]
        gap = sum(float(rows[i].argmax() == labels[i]) - rows[i].max() for i in inside)
        total += abs(gap)
    assert error == pytest.approx(total / 400)
    assert sum(bin_.count for bin_ in curve) == 400


def test_resampling_agrees_with_resampling_row_by_row():
    """Sources drawn one by one with another generator; classes that are lost do not count."""
    right = TABLE.argmax(axis=1) == LABELS
    sources = np.array([0, 0, 1, 2, 2, 3, 3, 4, 0, 5])
    got = bootstrap(right, LABELS, sources, 3, seed=1, draws=4000)
    rng = np.random.default_rng(7)
    top1, means = [], []
    for _ in range(4000):
        chosen = [i for s in rng.integers(0, 6, 6) for i in np.flatnonzero(sources == s)]
        top1.append(right[chosen].mean())
        classes = [[i for i in chosen if LABELS[i] == k] for k in range(3)]
        means.append(np.mean([right[rows].mean() for rows in classes if rows]))
    np.testing.assert_allclose(got.top1, np.percentile(top1, (2.5, 97.5)), atol=0.03)
    np.testing.assert_allclose(
        got.mean_class_accuracy, np.percentile(means, (2.5, 97.5)), atol=0.03
    )
    assert got.recall[2] == (0.0, 0.0) and got.recall[1] == (1.0, 1.0)
    assert bootstrap(right, LABELS, sources, 3, seed=1, draws=4000) == got
    few = [bootstrap(right, LABELS, sources, 3, seed=seed, draws=10) for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


def test_one_source_leaves_nothing_to_resample():
    got = bootstrap(np.array([True, False]), np.array([0, 0]), np.array([0, 0]), 2, seed=0)
    assert got.top1 is None and got.mean_class_accuracy is None and got.recall == [None, None]
    # Two sources, but only one of them has class 1.
    got = bootstrap(np.array([True, False, True]), np.array([0, 0, 1]), np.array([0, 1, 1]), 2,
                    seed=0)  # fmt: skip
    assert got.recall[1] is None and got.recall[0] == (0.0, 1.0)
