"""The generated demo set: real encoded videos whose classes need every part of the network.

    make demo
    python -m stf_jax.main --config=configs/demo.py --workdir=runs/demo

Two classes differ only in appearance, two only in direction, two only in speed, two only in the
order of two movements. The videos are made on the first start, from the seed in `data`.

Cost and expected accuracy: see the results table in README.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the card."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 4
    config.checkpoint_every_steps = 40  # besides the end of every epoch
    config.log_every_steps = 10  # in steps.jsonl and TensorBoard
    config.allow_cpu = True  # small enough for any CPU
    # 'classes', 'split', 'flow', with commas: weights that were trained with others are used.
    config.allow_mismatch = ""
    # Devices share the clips of a batch; of these, so many also share the largest matrices.
    config.model_devices = 1
    config.pretrained = "none"  # VGG's weights do not fit one eighth of its width
    # Or from a trained run's best weights, for other classes too.
    config.transfer = {
        "source": "",  # its folder
        "rename": (),  # (expression, replacement) pairs that turn its paths into this network's
        "fresh": ("(.*/)?head/.*",),  # starts anew if classes are others, or none there fits
        "unused": (),  # expressions: what may be left out
    }

    config.data = {
        "name": "demo",
        "root": "data/demo",  # generated here
        "archive": "",  # file that is unpacked into root once
        "download": False,  # True: fetch it from where it is published
        "list": "",  # for 'folder': CSV with path,label[,group][,subset]
        "protocol": "official",  # see protocols.Protocol
        "split": 1,  # for 'ucf101'
        "folds": 5,  # of 'group_kfold'
        "fold": 1,  # to test on, of the protocols that have folds
        "group_regex": "",  # for 'folder'
        "test_fraction": 0.25,  # of the clips, in whole groups; for 'hold_out'
        "validation_fraction": 0.17,  # of the training groups, held out for the stop rule
        "seed": 0,  # of the hold-out
    }
    config.records = {
        "root": "records",
        "size": 40,
        "resize": "squash",  # short_side: keeps the aspect (SPEC 3.2)
        "flow_size": 96,  # px, the size of the videos
        "flow_source": "stored",  # online: records hold frames only, flow is computed in training
        "flow_algorithm": "dis",
        "tvl1": {
            "attachment": 0.1,  # to the images, against smoothness
            "step": 0.2,
            "warps": 3,  # per size of the pyramid
            "iterations": 20,  # per warp
            "median": 5,  # px
            "coarsest": 16,  # px
        },
        "flow_bound": 4.0,  # px per frame, of 40
        "jpeg_quality": 95,
        "min_truncated_frames": 24,
        "max_pixels": 4096 * 2304,
        "max_frames": 20_000,
        "max_seconds": 1200.0,
        "timeout": 120.0,
        "workers": 0,  # one per core
    }
    config.sampling = {
        "num_frames": 24,
        "frame_stride": (2, 10),
        "flow_frames": 4,
        "stride_per": "clip",  # frame: every gap has its own (SPEC 1.5)
        "short_policy": "clip_tau",  # redraw, interval (SPEC 1.6)
        "train": "tau",  # interval, mix (SPEC 1.9)
        "eval": "frac",  # int, int_centred (SPEC 1.8)
        "flow_edge": "clamp",  # inset (SPEC 2.6)
        "flow_pad": "zero",  # repeat_last (SPEC 2.7)
        "flow_step": "frame",  # stride: between the frames of the clip (SPEC 2.5)
    }
    config.inputs = {
        "crop_size": 32,
        "rgb_preprocess": "minus1_1",
        "rgb_mean": "none",  # clip: its mean frame is subtracted
        "flow_channels": "uv",  # uv_half, mag, gray, u (SPEC 2.3)
        "flow_mean": "const128",  # per_field, none (SPEC 2.10)
        "flow_scale": 1 / 32,
    }
    config.augment = {  # training only; the paper has none
        "crop": "random",  # centre, corners, resized
        "scales": (),  # of the window, rescaled: (1.0, 0.875, 0.75, 0.66)
        "area": (0.08, 1.0),  # of 'resized', share of the frame
        "aspect": (0.75, 4 / 3),  # of 'resized', width over height
        "flip": False,  # left and right are different classes
        "brightness": 0.0,  # shares, such as 0.2
        "contrast": 0.0,
        "saturation": 0.0,
        "hue": 0.0,  # of the circle, at most 0.5
        "mixup": 0.0,  # alpha of its Beta distribution, such as 0.2
        "label_smoothing": 0.0,  # share of the target spread over all classes, such as 0.1
    }
    config.model = {
        # 'c3d', 'cnn_lstm': what ours is compared with; of the rest they read streams ('rgb' or
        # 'flow'), precision, remat, norm, drop and their own part.
        "architecture": "stf",
        "width": 8,
        "streams": "both",  # 'rgb', 'flow', 'late' (two networks, mean of their probabilities)
        "precision": "float32",  # 'bfloat16': half the memory, for GPUs
        "remat": {"spatial": "none", "temporal": "none"},  # convolutions, blocks, all
        "norm": "none",
        "norm_groups": 8,
        "mst": {"spatial": (1, 3, 5), "temporal": (3, 3, 5), "width": 64},
        "conv3d": {
            "factorised": True,
            "order": "spatial_first",
            "mid_relu": True,
            "mid": "out",
            "width": 64,
            "temporal": 3,  # frames of the kernels of 3DCNN
        },
        "temporal": {"pool4": "after_mst1", "init": "he", "conv1_init": "random"},
        "fusion": {
            "kernel": (3, 3, 3),
            "width": 64,
            "relu": True,
            "pool5": "after",
            "init": "feichtenhofer",
            "drop_rgb": 0.0,  # share of training clips fused without colour
            "loss_without": (),  # or ("rgb",): a second loss, for flow by itself
        },
        "tpn": {"window": 8, "stride": 8, "levels": (1, 2, 4), "psi": "mean"},
        "lstm": {
            "cell": "lstm",  # mean: none, the steps are averaged
            "hidden": 101,
            "ln": "tf",
            "ln_axis": "units",
            "forget_bias": 1.0,
            "bidirectional": True,
        },
        "head": {"combine": "project", "pool": "mean_logits"},
        "drop": {"input": 0.0, "output": 0.0, "semantics": "drop"},  # no time to wait for it
        "c3d": {"width": 8, "dense": 64},
        "cnn_lstm": {"width": 8, "hidden": 32},
    }
    config.optimizer = {
        "name": "adam",  # sgdm, rmsprop, muon
        "weight_decay": 0.05,
        "clip": 5.0,  # norm of the gradient; 0: none
        "accumulate": 1,  # parts that a batch is worked through in: less memory, the same update
        "ema": 0.0,  # decay of averaged weights, such as 0.999; 0: none
    }
    stage = {
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "boundaries": (),
        "factors": (),
        "warmup_epochs": 1.0,
        "max_epochs": 12,
        "patience": 12,
        "min_delta": 0.001,  # 0.1 points
        # Factors of the rate by parameter path, the first that matches; 0 freezes.
        "rates": ((".*", 1.0),),
        # k: on clips of 1/k of the frames, k times as many of them (model.tpn must fit).
        "divide_clips": 1,
    }
    config.stages = {"first": stage, "second": {**stage, "learning_rate": 1e-4, "max_epochs": 2}}
    config.stage_order = ("first", "second")
    # How videos are scored at the end; the probabilities of a video's views are averaged.
    config.eval = {
        "subset": "test",  # validation: held-out training groups, to choose settings by
        "num_clips": 1,  # per video, evenly spread (SPEC 1.8)
        "num_crops": 1,  # 3: along the longer side; 5: corners and centre
        "flip": False,  # mirror images too; wrong where left and right are different classes
        "repeats": 1,  # more: so many clips instead, drawn as in training (SPEC 1.11)
        "min_per_class": 0,  # or as many as it takes; the paper's Table 3: 1000
        "each_stream": False,  # also without either stream
        "calibration_bins": 15,
    }

    return config
