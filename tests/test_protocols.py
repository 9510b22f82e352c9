import csv
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from experiments import leak
from experiments.leak import ucf101_layout
from stf_jax.index import ClipEntry, check_duplicates
from stf_jax.protocols import Layout, Protocol, after_epochs, divide, resplit, scored_on

BASE = Protocol("hold_out", split=1, folds=5, fold=1, test_fraction=0.25, validation_fraction=0.0,
                seed=0)  # fmt: skip


def _protocol(name, **changes):
    return dataclasses.replace(BASE, name=name, **changes)


def _layout(classes=3, groups=10, clips=4, **changes):
    """Sources that show one class each, as in UCF11 and UCF101."""
    entries = [
        ClipEntry(f"{c}/g{g:02}_{n}.avi", c, f"{c}/g{g:02}", "")
        for c in range(classes)
        for g in range(1, groups + 1)
        for n in range(clips)
    ]
    names = tuple(map(str, range(classes)))
    return Layout("some", Path("root"), names, tuple(entries), numbered=True, **changes)


def _groups(index, subset):
    return {e.group for e in index.subset(subset)}


# --- honest protocols ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hold_out", "group_kfold", "leave_one_group_out"])
@pytest.mark.parametrize("fold", [1, 3])
def test_honest_protocols_keep_every_source_on_one_side(name, fold):
    fold = fold if name != "hold_out" else 1
    index = divide(_layout(), _protocol(name, fold=fold, validation_fraction=0.2))
    sides = [_groups(index, s) for s in ("train", "validation", "test")]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides)) == 30
    assert (index.leaky, index.overlap) == (False, 0.0) and index.leak() == ""
    assert {e.label for e in index.subset("test")} == {0, 1, 2}


def test_the_folds_of_a_protocol_test_every_clip_once():
    layout = _layout(groups=25)
    for name, folds in (("group_kfold", 5), ("leave_one_group_out", 25)):
        tested = Counter(
            entry.video_id
            for fold in range(1, folds + 1)
            for entry in divide(layout, _protocol(name, fold=fold, folds=max(fold, 5))).subset(
                "test"
            )
        )
        assert len(tested) == len(layout.clips) and set(tested.values()) == {1}, name


def test_a_fold_is_a_group_number_of_every_class():
    index = divide(_layout(groups=25), _protocol("leave_one_group_out", fold=3))
    assert _groups(index, "test") == {"0/g03", "1/g03", "2/g03"}
    assert index.protocol == "leave-one-group-out, fold 3 of 25 (group g03)"


def test_groups_that_play_several_classes_are_left_out_whole():
    clips = [ClipEntry(f"{c}/{who}", c, who, "") for c in (0, 1) for who in "abcdef"]
    layout = Layout("people", Path("root"), ("x", "y"), tuple(clips))
    index = divide(layout, _protocol("leave_one_group_out", fold=2))
    assert [e.video_id for e in index.subset("test")] == ["0/b", "1/b"]


def test_a_hold_out_takes_its_share_in_whole_groups_and_depends_on_its_seed_only():
    draws = []
    for seed in (0, 0, 1, 2, 3):
        index = divide(_layout(), _protocol("hold_out", seed=seed, test_fraction=0.2))
        assert Counter(e.label for e in index.subset("test")) == {0: 8, 1: 8, 2: 8}
        draws.append(_groups(index, "test"))
    assert draws[0] == draws[1] and any(draw != draws[0] for draw in draws)
    assert index.protocol.startswith("group-held-out: 20% of the clips in 6 groups")


def test_validation_takes_training_groups_and_leaves_the_test_alone():
    whole = divide(_layout(), _protocol("leave_one_group_out"))
    index = divide(_layout(), _protocol("leave_one_group_out", validation_fraction=0.3))
    assert index.subset("test") == whole.subset("test")
    held = index.subset("validation")
    assert Counter(e.label for e in held) == {0: 12, 1: 12, 2: 12}  # 3 groups of 9 per class
    assert not _groups(index, "validation") & _groups(index, "train")


def test_figures_of_held_out_training_groups_are_never_called_a_test():
    index = divide(_layout(), _protocol("leave_one_group_out", validation_fraction=0.3))
    assert scored_on(index, "test") is index
    held = scored_on(index, "validation")
    assert held.entries == index.entries and held.scored == "validation"
    assert held.protocol.startswith("held-out training groups, not a test") and not held.leaky
    # Of a random split they are as known from training as its test videos are.
    index = divide(_layout(clips=2), _protocol("random_fixed", validation_fraction=0.3))
    held = scored_on(index, "validation")
    trained = {e.group for e in index.subset("train")}
    videos = index.subset("validation")
    by_hand = sum(e.group in trained for e in videos) / len(videos)
    assert held.leaky and held.overlap == by_hand != index.overlap
    assert held.protocol.startswith("held-out training videos, not a test")
    assert f"{by_hand:.1%} of the validation videos share" in held.leak()
    with pytest.raises(ValueError, match="paper_resplit"):
        scored_on(divide(_layout(), _protocol("paper_resplit")), "validation")


def test_the_subsets_of_a_list_are_taken_as_they_are():
    layout = _layout(groups=3, clips=1)
    official = {c.video_id: {"1": "train", "2": "validation", "3": "test"}[c.group[-1]]
                for c in layout.clips}  # fmt: skip
    named = dataclasses.replace(layout, official=official, official_name="mine")
    index = divide(named, _protocol("official", validation_fraction=0.5))
    assert {e.video_id: e.subset for e in index.entries} == official
    assert index.protocol == "mine" and not index.leaky


def test_a_list_that_shares_sources_is_found_out():
    layout = _layout(groups=2, clips=2)
    official = {c.video_id: "test" if c.video_id.endswith("g01_0.avi") else "train"
                for c in layout.clips}  # fmt: skip
    index = divide(dataclasses.replace(layout, official=official), _protocol("official"))
    assert index.leaky and index.overlap == 1.0
    assert "LEAKY: 100.0% of the test videos share their source" in index.summary()


def test_small_classes_are_said():
    clips = [ClipEntry("a/x", 0, "a/x", ""), *(ClipEntry(f"b/{n}", 1, f"b/{n}", "") for n in "123")]
    layout = Layout("small", Path("root"), ("a", "b"), tuple(clips), groups_known=False)
    index = divide(layout, _protocol("hold_out"))
    # A class is never trained away.
    assert [e.subset for e in index.entries if e.label == 0] == ["train"]
    assert "class a has one video only" in index.notes
    assert "class a has no test video: mean class accuracy is over the others" in index.notes
    assert index.leaky and index.overlap is None and "groups unknown" in index.protocol
    assert "sources" in index.leak() or "source is not known" in index.leak()
    assert "flatters" in index.summary()


# --- leaky protocols -------------------------------------------------------------------------


def test_a_random_split_is_measured_and_labelled():
    index = divide(_layout(), _protocol("random_fixed", validation_fraction=0.1))
    assert len(index.subset("test")) == 36 and len(index.subset("validation")) == 8
    trained = Counter(e.group for e in index.entries if e.subset != "test")
    by_hand = sum(trained[e.group] > 0 for e in index.subset("test")) / 36
    assert index.leaky and index.overlap == by_hand > 0.9
    assert "LEAKY" in index.summary() and f"{by_hand:.1%}" in index.summary()


def test_leaving_one_out_leaks_its_source():
    index = divide(_layout(clips=2), _protocol("leave_one_out", fold=1))
    assert [e.video_id for e in index.subset("test")] == ["0/g01_0.avi"]
    assert index.leaky and index.overlap == 1.0
    alone = divide(_layout(clips=1), _protocol("leave_one_out", fold=30))
    assert [e.video_id for e in alone.subset("test")] == ["2/g10_0.avi"] and not alone.leaky


def test_resplitting_is_a_function_of_seed_stage_and_epoch():
    index = divide(_layout(), _protocol("paper_resplit"))
    assert index.leaky and not index.subset("validation")

    def tested(seed, stage, epoch):
        again = dataclasses.replace(index, resplit_seed=seed)
        return {e.video_id for e in resplit(again, stage, epoch).subset("test")}

    draws = [tested(*which) for which in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert all(len(draw) == 36 for draw in draws)
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])
    assert draws[0] == tested(0, 0, 0) == {e.video_id for e in index.subset("test")}


def test_what_earlier_epochs_have_seen_is_counted():
    index = divide(_layout(groups=100), _protocol("paper_resplit"))
    assert after_epochs(index, [1]).seen == 0.0
    last = after_epochs(index, [2, 1])
    assert last.entries == resplit(index, 1, 0).entries
    unseen = set.intersection(
        *({e.video_id for e in resplit(index, *which).subset("test")}
          for which in ((0, 0), (0, 1), (1, 0)))
    )  # fmt: skip
    assert last.seen == pytest.approx(1 - len(unseen) / len(last.subset("test")))
    assert last.seen == pytest.approx(1 - 0.3**2, abs=0.04)
    assert f"{last.seen:.1%} of them were trained on" in last.leak()


# --- impossible combinations -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "kfold"}, "data.protocol: got 'kfold'"),
        ({"test_fraction": 1.0}, r"data.test_fraction must be in \[0, 1\), got 1.0"),
        ({"name": "group_kfold", "fold": 6}, "data.fold counts from 1 to data.folds=5, got 6"),
        ({"name": "group_kfold", "fold": 0}, "data.fold counts from 1"),
        ({"name": "group_kfold", "folds": 1}, "data.folds must be at least 2"),
        ({"fold": 2}, "data.fold=2 means nothing with data.protocol='hold_out'"),
        ({"name": "random_fixed", "split": 2}, "data.split=2 means nothing"),
    ],
)
def test_impossible_values_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "layout", "said"),
    [
        ("official", {}, {}, "some comes without lists"),
        ("group_kfold", {"folds": 11}, {}, "data.folds=11 is more than the 10 groups"),
        ("group_kfold", {}, {"groups_known": False}, "set data.group_regex"),
        ("leave_one_group_out", {}, {"groups_known": False}, "needs to know which clips"),
        ("leave_one_group_out", {"fold": 11}, {}, "has only 10 groups to leave out"),
        ("leave_one_out", {"fold": 121}, {}, "has only 120 videos to leave out"),
        ("hold_out", {"test_fraction": 0.0}, {}, "tests on 0 of 120 videos"),
    ],
)
def test_a_layout_that_lacks_what_a_protocol_needs_is_named(name, changes, layout, said):
    with pytest.raises(ValueError, match=said):
        divide(_layout(**layout), _protocol(name, **changes))


# --- the index -------------------------------------------------------------------------------


def test_a_stamp_names_split_and_videos():
    one = divide(_layout(), _protocol("group_kfold", fold=1)).stamp()
    assert one == divide(_layout(), _protocol("group_kfold", fold=1)).stamp()
    assert one["protocol"] == "group_kfold" and one["fold"] == 1 and one["videos"] == 120
    others = [
        divide(_layout(), _protocol("group_kfold", fold=2)),
        divide(_layout(groups=11), _protocol("group_kfold", fold=1)),
        divide(_layout(), _protocol("group_kfold", fold=1, validation_fraction=0.2)),
    ]
    assert len({one["digest"], *(other.stamp()["digest"] for other in others)}) == 4


def test_the_same_bytes_in_training_and_test_are_an_error():
    index = divide(_layout(), _protocol("leave_one_group_out"))
    train, test = index.subset("train"), index.subset("test")
    digests = {entry.video_id: entry.video_id for entry in index.entries}
    assert check_duplicates(index, digests) == []
    (note,) = check_duplicates(index, digests | {train[0].video_id: train[1].video_id})
    assert train[0].video_id in note and train[1].video_id in note
    twice = digests | {train[0].video_id: test[0].video_id}
    with pytest.raises(ValueError, match="in training and in test") as error:
        check_duplicates(index, twice)
    assert train[0].video_id in str(error.value) and test[0].video_id in str(error.value)
    # Where every epoch draws anew, all are trained on and tested on in turn: it is said.
    (note,) = check_duplicates(divide(_layout(), _protocol("paper_resplit")), twice)
    assert test[0].video_id in note


def test_subset_names_are_checked():
    with pytest.raises(ValueError, match="got 'val'"):
        divide(_layout(), BASE).subset("val")


# --- the measured leak on all of UCF101 (SPEC section 10) ------------------------------------


def test_the_table_of_leaks_is_what_is_measured_and_what_the_specification_says():
    rows = list(leak.rows())
    with open(leak.TABLE, newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in r.items()} for r in rows]
    shares = {name: [float(r["share_source"]) for r in rows if r["protocol"] == name]
              for name in {r["protocol"] for r in rows}}  # fmt: skip
    for name in ("official", "group_kfold", "leave_one_group_out", "hold_out"):
        assert shares[name] and not any(shares[name])
    counts = [(r["train"], r["test"]) for r in rows if r["protocol"] == "official"]
    assert counts == [(9537, 3783), (9586, 3734), (9624, 3696)]
    # Two ways to the same number: drawn, and computed from the sizes of the groups.
    drawn = [*shares["random_fixed"], *shares["paper_resplit"]]
    expected = leak.expected_share(ucf101_layout(1), 0.3)
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.002)
    assert expected == pytest.approx(0.989, abs=0.001)  # SPEC 10.3
    # SPEC 10.2: unseen after 3, 5 and 10 epochs.
    never = {r["detail"]: r["never_trained"] for r in rows if r["protocol"] == "paper_resplit"}
    for epochs, unseen in ((3, 360), (5, 32), (10, 0.08)):
        assert abs(never[f"after {epochs} epochs"] - unseen) <= 3 * unseen**0.5
