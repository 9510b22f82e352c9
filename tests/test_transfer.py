"""Where the weights of a stage come from: nothing is taken, left or made anew in silence."""

import json

import jax
import numpy as np
import pytest

from stf_jax.optim import by_path
from stf_jax.transfer import (
    HAND_OFF,
    TransferSettings,
    Weights,
    count_fates,
    plan_transfer,
    starting_params,
    write_fates,
)

TREE = {
    "spatial": {"conv": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}},
    "head": {"bias": np.ones(2, np.float32)},
}
SOURCE = {
    "spatial/conv/kernel": np.full((2, 3), 7, np.float32),
    "head/bias": np.full(2, 8, np.float32),
}


def _rules(**changes):
    base = {"source": "runs/a", "rename": (), "fresh": (), "unused": ()}
    return TransferSettings(**{**base, **changes})


def _start(source=None, rules=HAND_OFF, vgg="none", expected=TREE):
    return starting_params(
        lambda: expected,
        expected=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected),
        source=source,
        rules=rules,
        vgg=vgg,
        temporal_init="he",
        conv1_init="random",
    )


def _told(fates):
    return {path: fate.fate for path, fate in fates.items()}


def test_scratch_says_so_for_every_tensor():
    params, fates = _start()
    assert params is TREE
    assert _told(fates) == {
        "spatial/conv/kernel": "initialised at random",
        "head/bias": "initialised at random",
    }


def test_hand_off_copies_everything_and_prevails_over_vgg(tmp_path):
    source = Weights("stage 'first'", SOURCE, other_classes=False)
    params, fates = _start(source, vgg=str(tmp_path / "no-such-file.h5"))
    for path, leaf in by_path(params).items():
        np.testing.assert_array_equal(leaf, SOURCE[path])
    assert set(_told(fates).values()) == {"copied from stage 'first'"}
    assert count_fates(fates) == "2 tensors copied"


def test_other_classes_get_a_fresh_head_and_keep_the_rest():
    """Even with as many classes as before: the rows of a head mean its classes."""
    source = Weights("runs/a", SOURCE, other_classes=True)
    params, fates = _start(source, _rules(fresh=("head/.*",)))
    np.testing.assert_array_equal(params["head"]["bias"], TREE["head"]["bias"])
    np.testing.assert_array_equal(params["spatial"]["conv"]["kernel"], 7)
    assert _told(fates) == {
        "spatial/conv/kernel": "copied from runs/a",
        "head/bias": "initialised at random (for other classes)",
        "runs/a: head/bias": "unused",
    }
    told = count_fates(fates)
    assert told == "1 tensors copied, 1 tensors initialised at random, 1 tensors unused"
    same = Weights("runs/a", SOURCE, other_classes=False)
    assert _told(_start(same, _rules(fresh=("head/.*",)))[1])["head/bias"] == "copied from runs/a"


def test_what_is_named_may_be_missing_misshapen_extra_or_renamed():
    source = Weights(
        "runs/a",
        {
            "rgb/conv/kernel": SOURCE["spatial/conv/kernel"],
            "head/bias": np.zeros(5, np.float32),
            "old/scale": np.zeros(1, np.float32),
        },
        other_classes=False,
    )
    rules = _rules(rename=((r"rgb/(.*)", r"spatial/\1"),), fresh=("head/.*",), unused=("old/.*",))
    params, fates = _start(source, rules)
    np.testing.assert_array_equal(params["spatial"]["conv"]["kernel"], 7)
    assert _told(fates) == {
        "spatial/conv/kernel": "renamed from rgb/conv/kernel, copied from runs/a",
        "head/bias": "initialised at random (mismatched)",
        "runs/a: head/bias": "unused",
        "runs/a: old/scale": "unused",
    }
    assert fates["runs/a: head/bias"].shape == (5,)


def test_everything_that_is_not_named_is_listed_and_refused():
    source = Weights(
        "runs/a",
        {"head/bias": np.zeros(5, np.float32), "old/scale": np.zeros(1, np.float32)},
        other_classes=False,
    )
    with pytest.raises(ValueError) as error:
        plan_transfer(by_path(TREE), source, _rules())
    for said in (
        "missing: spatial/conv/kernel (2, 3)",
        "mismatched: head/bias is (5,), expected (2,)",
        "extra: old/scale (1,)",
        "--config.transfer.fresh",
    ):
        assert said in str(error.value)
    other_type = Weights("runs/a", {**SOURCE, "head/bias": np.ones(2, np.float16)}, False)
    with pytest.raises(ValueError, match="head/bias is float16, expected float32"):
        plan_transfer(by_path(TREE), other_type, _rules())


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        ((("rgb/.*", "spatial"),), "rgb.* match no tensor of runs/a"),
        (((".*", "one"),), "both spatial/conv/kernel and head/bias of runs/a become one"),
    ],
)
def test_renaming_must_hit_and_keep_tensors_apart(rename, said):
    source = Weights("runs/a", SOURCE, other_classes=False)
    with pytest.raises(ValueError, match=said):
        plan_transfer(by_path(TREE), source, _rules(rename=rename))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fresh": ("(",)}, "no regular expression"),
        ({"fresh": "head/.*"}, "transfer.fresh: got 'head/"),
        ({"rename": ("a", "b")}, "allowed: pairs"),
    ],
)
def test_impossible_rules_are_named(changes, said, annotations_off):
    with pytest.raises(ValueError, match=said):
        _rules(**changes)


def test_fates_are_written_with_shapes(tmp_path):
    _, fates = _start(Weights("runs/a", SOURCE, other_classes=False))
    write_fates(tmp_path / "weights.json", fates)
    rows = json.loads((tmp_path / "weights.json").read_text())
    assert rows["head/bias"] == {"shape": [2], "fate": "copied from runs/a"}
