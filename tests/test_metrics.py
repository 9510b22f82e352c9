import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.metrics import Sums, cross_entropy, summarise, wilson


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
