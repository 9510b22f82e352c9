import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stf_jax.checkpoint import Checkpoints, count_parameters, starting_params, write_fates

TREE = {
    "spatial": {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
    "head": {"bias": jnp.array([1.5, -2.0])},
}


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def _store(folder, steps=(1, 2, 3), keep=2):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, TREE), {"epoch": step})
    return checkpoints


def test_newest_comes_back_and_old_ones_go(tmp_path):
    _store(tmp_path / "c").close()
    reopened = Checkpoints(tmp_path / "c", keep=2)
    step, tree, record = reopened.restore(TREE)
    reopened.close()
    assert step == 3 and record == {"epoch": 3}
    assert _same(tree, jax.tree.map(lambda x: x * 3, TREE))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]


def test_a_moved_folder_still_restores(tmp_path):
    _store(tmp_path / "c").close()
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    moved = Checkpoints(tmp_path / "elsewhere", keep=2)
    assert _same(moved.restore(TREE)[1], jax.tree.map(lambda x: x * 3, TREE))
    moved.close()


def test_saving_a_step_again_keeps_the_first(tmp_path):
    checkpoints = _store(tmp_path / "c", steps=(4,))
    checkpoints.save(4, jax.tree.map(jnp.zeros_like, TREE), {"epoch": 0})
    assert checkpoints.restore(TREE)[2] == {"epoch": 4}
    checkpoints.close()


def test_left_overs_of_a_killed_save_are_removed_and_not_restored(tmp_path):
    checkpoints = _store(tmp_path / "c")
    checkpoints.close()
    # What orbax leaves when it dies in mid-save: a folder under its temporary name.
    stale = tmp_path / "c" / "4.orbax-checkpoint-tmp"
    (stale / "tree").mkdir(parents=True)
    (stale / "tree" / "half").write_bytes(b"half")
    reopened = Checkpoints(tmp_path / "c", keep=2)
    assert reopened.restore(TREE)[0] == 3
    assert not stale.exists()
    reopened.close()


def test_an_empty_folder_says_that_there_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.restore(TREE)
    checkpoints.close()


def test_another_architecture_lists_every_leaf(tmp_path):
    _store(tmp_path / "c").close()
    like = {
        "spatial": {"conv": {"kernel": jnp.zeros((2, 4))}},
        "fusion": {"bias": jnp.zeros(2)},
    }
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(like)
    checkpoints.close()
    for said in (
        "missing: fusion/bias (2,)",
        "extra: head/bias (2,)",
        "mismatched: spatial/conv/kernel is (2, 3), expected (2, 4)",
    ):
        assert said in str(error.value)


def _start(previous=None, vgg="none"):
    return starting_params(
        lambda: TREE,
        expected=TREE,
        previous=previous,
        vgg=vgg,
        temporal_init="he",
        conv1_init="random",
    )


def test_scratch_says_so_for_every_tensor():
    params, fates = _start()
    assert _same(params, TREE)
    assert fates == {
        "spatial/conv/kernel": "initialised at random",
        "head/bias": "initialised at random",
    }


def test_hand_off_copies_everything_and_prevails_over_vgg(tmp_path):
    source = jax.tree.map(lambda x: x + 7, TREE)
    params, fates = _start(previous=("first", source), vgg=str(tmp_path / "no-such-file.h5"))
    assert _same(params, source) and not _same(source, TREE)
    assert set(fates.values()) == {"copied from stage 'first'"}


def test_hand_off_of_another_network_is_refused():
    with pytest.raises(ValueError, match="missing: head/bias"):
        _start(previous=("first", {"spatial": TREE["spatial"]}))


def test_fates_are_written_with_shapes(tmp_path):
    write_fates(tmp_path / "weights.json", {"head/bias": "copied"}, TREE)
    rows = json.loads((tmp_path / "weights.json").read_text())
    assert rows == {"head/bias": {"shape": [2], "fate": "copied"}}


def test_parameters_are_counted():
    assert count_parameters(TREE) == 8
