"""The studies: what is asked, and which settings answer it. `ablate.py` runs them.

A row is a name, the settings in which it differs from the card, and what that means. To add a
study, add one here; `python experiments/ablate.py --list` shows them all.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs import ucf101


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a study.

    Args:
      name: lower-case letters, digits and '_'; part of the run folders' names.
      what: what it is, in a few words, for tables and figures.
      changes: settings by their dotted names that differ from the card's.
    """

    name: str
    what: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it: every row with every seed.

    Args:
      name: lower-case letters, digits and '_'; part of file names.
      card: with its presets, as `--config` takes it.
      question: in a sentence.
      rows: in the order of the figure.
      seeds: of each row.
      reference: the row that the others are compared with; '' if they are not.
      common: changes of the card for all rows.
      seed_keys: the settings that the seed goes into; only 'data.fold': the "seeds" are folds.
      pooled: '' or, where rows are folds of one set, what their videos are together: the summary
        then ends with a line of that name over all of them.
      cues: classes by what has to be seen to tell them; gives the figure of rows and cues.

    Raises:
      ValueError: names that are impossible, or come twice, or are none of the rows'.
    """

    name: str
    card: str
    question: str
    rows: Sequence[Row]
    seeds: Sequence[int] = (0, 1, 2)
    reference: str = ""
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed_keys: Sequence[str] = ("seed",)
    pooled: str = ""
    cues: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the names."""
        names = [row.name for row in self.rows]
        for name in (self.name, *names):
            if not re.fullmatch("[a-z0-9_]+", name):
                raise ValueError(f"study {self.name!r}: {name!r} is no name of a-z, 0-9 and _")
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"study {self.name!r}: rows need names, each once: got {names}")
        if self.reference and self.reference not in names:
            raise ValueError(f"study {self.name!r}: no row is called {self.reference!r}")
        if self.pooled and "all" in names:
            raise ValueError(f"study {self.name!r}: 'all' is the line of all rows together")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"study {self.name!r}: seeds {tuple(self.seeds)}, each once")

    @property
    def repeat(self) -> str:
        """What the runs of a row differ in: their 'seed', or their 'fold' of the videos."""
        return "fold" if tuple(self.seed_keys) == ("data.fold",) else "seed"

    def changes(self, row: Row, seed: int) -> dict[str, Any]:
        """What a run changes of the card."""
        return {**self.common, **row.changes, **dict.fromkeys(self.seed_keys, seed)}


_REAL = "configs/ucf101.py:laptop,study"
_PAPER = "configs/ucf101.py"

_RGB = Row("rgb", "colour only", {"model.streams": "rgb"})
_FLOW = Row("flow", "flow only", {"model.streams": "flow"})
# The laptop's choices when most of these studies were begun: kept, so that their rows go together.
_BEFORE = {
    "model.norm_groups": 8,
    "model.fusion.loss_without": (),
    "model.fusion.drop_rgb": 0.6,
}
_AS_BEGUN = {"model.temporal.init": "he", **_BEFORE}
# A network of one stream has none to do without.
_ALONE = {"eval.each_stream": False}


def _longer(epochs: int) -> dict[str, Any]:
    """A first stage of so many epochs."""
    return {"stages.first.max_epochs": epochs, "stages.first.patience": epochs}


def _parts(name: str, card: str) -> Study:
    """What each part of the network is worth, at the size of a card of UCF101."""
    config = ucf101.get_config(card.partition(":")[2])
    stages, usual = config.stages, config.records.flow_algorithm
    epochs = stages.first.max_epochs + stages.second.max_epochs
    names = {"dis": "DIS", "tvl1": "TV-L1"}
    (other,) = names.keys() - {usual}
    return Study(
        name=name,
        card=card,
        question="What is each part of the paper's network worth, on real clips from people that "
        "training has not met?",
        reference="full",
        common={"eval.each_stream": True},
        rows=(
            Row("full", "all parts: fusion by 3-D convolution"),
            Row("rgb", "colour only", {"model.streams": "rgb", **_ALONE}),
            Row("flow", "flow only", {"model.streams": "flow", **_ALONE}),
            Row(
                "late",
                "late fusion: two networks, mean of probabilities",
                {"model.streams": "late"},
            ),
            Row("levels_4", "pyramid [4]", {"model.tpn.levels": (4,)}),
            Row("levels_1", "pyramid [1]: a mean", {"model.tpn.levels": (1,)}),
            Row("forward", "LSTM forwards only", {"model.lstm.bidirectional": False}),
            Row("no_lstm", "no LSTM: mean of the steps", {"model.lstm.cell": "mean"}),
            Row("ln_none", "LSTM without layer norm", {"model.lstm.ln": "none"}),
            Row("ln_ifo", "layer norm of the sigmoid gates", {"model.lstm.ln": "ifo"}),
            Row("ln_ifgo", "layer norm of all gates", {"model.lstm.ln": "ifgo"}),
            Row("ln_ba2016", "layer norm of Ba et al.", {"model.lstm.ln": "ba2016"}),
            Row("spatial_3", "3-D kernels 3x3 in space only", {"model.mst.spatial": (3, 3, 3)}),
            Row("spatial_357", "3-D kernels 3, 5, 7 in space", {"model.mst.spatial": (3, 5, 7)}),
            Row(
                "one_scale",
                "3-D kernels of one size, 3x3x3",
                {"model.mst.spatial": (3, 3, 3), "model.mst.temporal": (3, 3, 3)},
            ),
            Row("one_stage", "without the second stage", {"stage_order": ("first",)}),
            Row(
                "one_stage_longer",
                "its epochs given to the first stage",
                {"stage_order": ("first",), **_longer(epochs)},
            ),
            Row(
                other,
                f"{names[other]} flow instead of {names[usual]}",
                {"records.flow_algorithm": other},
            ),
        ),
    )


_RIVALS = tuple(
    Row(
        f"{name}_{stream}",
        f"baseline: small {what}, {seen}",
        {"model.architecture": name, "model.streams": stream, **changes, **_ALONE},
    )
    for name, what, changes in (
        # Its first fully connected layer takes clips of one length only.
        ("c3d", "C3D, whole clips", {"stages.first.divide_clips": 1}),
        ("cnn_lstm", "CNN with an LSTM", {}),
    )
    for stream, seen in (("rgb", "colour"), ("flow", "flow"))
)

_parts_here = _parts("parts", _REAL)
_PARTS = dataclasses.replace(
    _parts_here,
    common={**_parts_here.common, **_AS_BEGUN},
    rows=(*_parts_here.rows, *_RIVALS),
)
# For GPUs. Without the rivals: at the paper's rates and without ImageNet they would learn nothing.
_PARTS_PAPER = _parts("parts_paper", _PAPER)

_FUSION = Study(
    name="fusion",
    card="configs/ucf101.py:laptop",
    question="Does fusing pay when training goes on to the end? (The network of the README's "
    "table, each stream alone, and the strongest rival.)",
    reference="both",
    rows=(Row("both", "both streams, fused"), _RGB, _FLOW, _RIVALS[-1]),
)

_FUSION_FOLDS = dataclasses.replace(
    _FUSION,
    name="fusion_folds",
    card=_REAL,
    question="And on more videos than a test set of them has? (Every video is tested once, by a "
    "network that met no other of its group; the recipe was chosen on some of these groups.)",
    seeds=(1, 2, 3),
    seed_keys=("data.fold",),
    # Two thirds of the videos to train on, so a little longer than in the study of parts.
    common={"data.protocol": "group_kfold", "data.folds": 3, **_longer(7)},
)

_OTHER_LIGHT = {
    "augment.brightness": 0.2,
    "augment.contrast": 0.4,
    "augment.saturation": 0.8,
    "augment.hue": 0.1,
}

_RECIPE = Study(
    name="recipe",
    card=_REAL,
    question="What does each part of the laptop's recipe do for learning from few videos? Chosen "
    "by this, so run it with --select.",
    reference="all",
    seeds=(0, 1),
    common={
        "data.validation_fraction": 1 / 3,
        # With a third of the clips held out, as many steps again as in the study of parts.
        **_longer(8),
    },
    rows=(
        Row("all", "the recipe"),
        _FLOW,
        _RGB,
        Row(
            "adam",
            "Adam, at 1e-3 and 1e-4, instead of Muon",
            {
                "optimizer.name": "adam",
                "stages.first.learning_rate": 1e-3,
                "stages.second.learning_rate": 1e-4,
            },
        ),
        Row("whole_clips", "whole clips in both stages", {"stages.first.divide_clips": 1}),
        Row("clips_of_8", "clips of 8 frames in the first stage", {"stages.first.divide_clips": 3}),
        Row(
            "windows_of_4",
            "pyramids of 4 frames, as many as clips of the first stage have",
            {"model.tpn.window": 4, "model.tpn.stride": 4},
        ),
        Row("loss_per_step", "a loss for every step", {"model.head.pool": "per_step_loss"}),
        Row("colour_as_it_is", "colour with the clip's mean frame", {"inputs.rgb_mean": "none"}),
        Row("one_loss", "no loss for flow by itself", {"model.fusion.loss_without": ()}),
        Row(
            "loss_of_each",
            "a loss for colour by itself, too",
            {"model.fusion.loss_without": ("rgb", "flow")},
        ),
        Row(
            "drop_rgb",
            "instead of a second loss, 60 % of the clips without colour",
            {"model.fusion.loss_without": (), "model.fusion.drop_rgb": 0.6},
        ),
        Row(
            "plain_fusion",
            "colour as it is, no loss for flow by itself",
            {"inputs.rgb_mean": "none", "model.fusion.loss_without": ()},
        ),
        Row("eight_groups", "normalisation in eight groups", {"model.norm_groups": 8}),
        Row(
            "flow_eight_groups",
            "flow only, normalisation in eight groups",
            {"model.streams": "flow", "model.norm_groups": 8},
        ),
        Row("before", "the recipe before: eight groups, and colour left out", _BEFORE),
        Row("other_light", "training clips in other light and colours", _OTHER_LIGHT),
        Row(
            "rgb_other_light",
            "colour only, in other light and colours",
            {"model.streams": "rgb", **_OTHER_LIGHT},
        ),
        Row("windows_of_one_size", "random windows of one size", {"augment.crop": "random"}),
        Row("as_begun", "the recipe before that: 3-D layers start He-normal", _AS_BEGUN),
        Row("flow_as_begun", "flow only, as then", {"model.streams": "flow", **_AS_BEGUN}),
        Row("he_fusion", "fusion starts He-normal", {"model.fusion.init": "he"}),
        Row("flow_mean", "mean flow subtracted", {"inputs.flow_mean": "per_field"}),
        Row("flow_scale", "flow twice as large", {"inputs.flow_scale": 1 / 16}),
    ),
)

_LEAK = Study(
    name="leak",
    card=_REAL,
    question="How many points is the paper's protocol worth, which tests on what it trained on?",
    # It has about as many clips for training and for the test as the leaky ones.
    reference="groups",
    # What a protocol is worth does not hang on it.
    common=_AS_BEGUN,
    # All splits but the official one are drawn anew for each seed.
    seed_keys=("seed", "data.seed"),
    rows=(
        Row("official", "official split: groups apart"),
        Row(
            "groups",
            "a random 7:3 split of groups",
            {"data.protocol": "hold_out", "data.test_fraction": 0.3},
        ),
        Row("random_fixed", "a random 7:3 split of videos", {"data.protocol": "random_fixed"}),
        Row(
            "paper_resplit",
            "the paper's: a new 7:3 split every epoch",
            {"data.protocol": "paper_resplit"},
        ),
    ),
)
_LEAK_COLOUR = dataclasses.replace(
    _LEAK,
    name="leak_colour",
    question="And for a network that sees backgrounds: colour only, as it is, trained until it "
    "knows its training clips?",
    common={
        "model.streams": "rgb",
        "inputs.rgb_mean": "none",
        **_AS_BEGUN,
        **_longer(8),
    },
)
_LEAK_PAPER = dataclasses.replace(_LEAK, name="leak_paper", card=_PAPER, common={})

# Nothing that is left sees in which order the frames come: tests/test_model.py permutes them.
_ORDER_BLIND = {
    "model.lstm.cell": "mean",
    "model.tpn.levels": (1,),
    "model.mst.temporal": (1, 1, 1),
    "model.conv3d.temporal": 1,
    "model.fusion.kernel": (3, 3, 1),
}

_DEMO_PARTS = Study(
    name="demo_parts",
    card="configs/demo.py",
    question="Do the classes that need one cue fail when, and only when, the part that carries it "
    "is taken away? (Generated videos: see stf_jax/demo.py.)",
    reference="both",
    rows=(
        Row("both", "all parts"),
        _RGB,
        _FLOW,
        Row(
            "no_lstm",
            "no LSTM; 3-D kernels and pyramid still see order",
            {"model.lstm.cell": "mean"},
        ),  # fmt: skip
        Row("no_order", "order taken away everywhere", _ORDER_BLIND),
        Row(
            "rgb_no_order",
            "colour only, order taken away: single pictures",
            {"model.streams": "rgb", **_ORDER_BLIND},
        ),  # fmt: skip
        Row(
            "flow_no_order",
            "flow only, order taken away: short motions",
            {"model.streams": "flow", **_ORDER_BLIND},
        ),  # fmt: skip
    ),
    cues={
        "appearance": ("bobs_by_day", "bobs_by_night"),
        "direction": ("glides_left", "glides_right"),
        "speed": ("circles_slowly", "circles_fast"),
        "order": ("hops_then_sways", "sways_then_hops"),
    },
)

_PERSONS = 9
_WEIZMANN = Study(
    name="weizmann",
    card="configs/folder.py:laptop",
    question="Your own videos: how well are the actions of a person recognised whom training has "
    "not met?",
    seeds=(0,),
    common={
        "data.protocol": "leave_one_group_out",
        "data.group_regex": "^([^_]+)_",  # daria_bend.avi
        # By then 95 % of the training clips are known, and nine networks have to be trained.
        **_longer(12),
        # Clips that are all recognised leave another start nothing to show.
        **_AS_BEGUN,
    },
    rows=tuple(
        Row(f"person{fold}", f"person {fold} left out", {"data.fold": fold})
        for fold in range(1, _PERSONS + 1)
    ),
    pooled="each person left out once",
)

STUDIES = {
    study.name: study
    for study in (
        _PARTS,
        _FUSION,
        _FUSION_FOLDS,
        _RECIPE,
        _LEAK,
        _LEAK_COLOUR,
        _DEMO_PARTS,
        _WEIZMANN,
        _PARTS_PAPER,
        _LEAK_PAPER,
    )
}
