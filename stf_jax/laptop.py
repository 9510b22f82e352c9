"""The laptop preset of the cards: the paper's network, small enough for two cores."""

from ml_collections import ConfigDict


def laptop(config: ConfigDict, epochs: tuple[int, int] = (30, 4)) -> None:
    """Makes a card's layers one eighth as wide, and sets what it takes to train them from scratch.

    Deviations from the paper, because VGG's ImageNet weights do not fit one eighth of its width:
    group normalisation after each convolution (in two groups: in eight, the first eight channels
    would each be a group, and lose how large they are beside each other), 3-D layers that start as
    2-D ones, windows of random size, flips, less dropout, smaller batches, larger rates with
    warm-up and cosine, weight decay. Because few videos share their backgrounds with few others:
    colour without the clip's mean frame, and a second loss, of every training clip fused without
    colour. Because two cores are slow: Muon, and the first stage on clips of 4 frames, six times as
    many.
    experiments/studies.py:recipe asks what each is worth.

    No videos are held out for the stop rule, which a few dozen would mislead: training ends with
    its last epoch. Say --config.data.validation_fraction=0.33 when choosing settings. If a still
    scene or object tells the classes apart, say --config.inputs.rgb_mean=none.

    Args:
      config: the card, changed in place.
      epochs: of the first and of the second stage.
    """
    config.pretrained = "none"
    config.data.validation_fraction = 0.0
    config.checkpoint_every_steps = 32
    config.records.update(size=80, flow_size=160, flow_algorithm="dis", flow_bound=8.0)
    config.inputs.update(
        crop_size=64, rgb_preprocess="minus1_1", rgb_mean="clip", flow_scale=1 / 32
    )
    config.augment.update(crop="resized", area=(0.5, 1.0), aspect=(0.85, 1.18), flip=True)
    config.model.update(width=8, norm="group", norm_groups=2)
    config.model.mst.width = 64
    config.model.conv3d.width = 64
    config.model.temporal.init = "inflate"
    config.model.fusion.update(width=64, loss_without=("rgb",))
    config.model.drop.input = 0.25
    config.model.c3d.update(width=16, dense=128)
    config.model.cnn_lstm.update(width=12, hidden=64)
    config.batch_size = 4
    config.optimizer.update(name="muon", weight_decay=0.05)
    first = {"max_epochs": epochs[0], "patience": epochs[0], "warmup_epochs": 0.5}
    config.stages.first.update(learning_rate=4e-3, schedule="cosine", divide_clips=6, **first)
    second = {"max_epochs": epochs[1], "patience": epochs[1], "warmup_epochs": 0.25}
    config.stages.second.update(learning_rate=4e-4, schedule="cosine", **second)
    config.eval.update(num_clips=3, flip=True)
