"""What every test runs under: the CPU, strict shapes, and annotations that are checked."""

import copy
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests, and the processes they start, compile the same programs: once a session is enough,
# also where its tests are divided among processes.
os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "PYTEST_XDIST_WORKER" in os.environ
    else tempfile.mkdtemp(prefix="stf_jax_compiled_")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Half of the time of a compilation: programs here run a few times, on tiny arrays.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    ).strip()

from pathlib import Path

import av
import jax
import jaxtyping
import numpy as np
import pytest
from browser import browser  # noqa: F401  (a fixture)
from ml_collections import ConfigDict

import stf_jax  # noqa: F401 - sets what TensorFlow reads when it is imported

# What is first imported under the hook below is looked for among byte code of the hook's own, and
# compiled anew where there is none: four thousand files of these.
import flax.linen  # isort: skip  # noqa: F401
import matplotlib.pyplot  # isort: skip  # noqa: F401
import optax  # isort: skip  # noqa: F401
import orbax.checkpoint  # isort: skip  # noqa: F401
import tensorflow_datasets  # isort: skip  # noqa: F401
import array_record.python.array_record_module  # isort: skip  # noqa: F401
import cv2  # isort: skip  # noqa: F401
import dm_pix  # isort: skip  # noqa: F401

# Checks every annotated shape and type of the package while tests run; must precede its import.
jaxtyping.install_import_hook("stf_jax", "beartype.beartype")

# [3] + [2, 3] is an error here: broadcasting that nobody wrote hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Begins with the files that take longest, so that two processes end at the same time."""
    longest = ("test_end_to_end", "test_train", "test_model", "test_parallel", "test_torch_oracle")
    items.sort(key=lambda item: item.path.stem not in longest)


def pytest_unconfigure():
    """Removes the compiled programs of this session."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def annotations_off():
    """Lets values of a wrong type through to the package's own checks, as outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny_model_config(tiny_model_settings) -> dict:
    """A fresh copy of `tiny_model_settings`, so a test may change it."""
    return copy.deepcopy(tiny_model_settings)


@pytest.fixture(scope="module")
def tiny_model_settings() -> dict:
    """The `model` part of a configuration, one sixteenth as wide as the paper's.

    Fits clips of 8 frames (2 windows of 4) at 32x32.
    """
    return {
        "architecture": "stf",
        "width": 4,
        "streams": "both",
        "precision": "float32",
        "remat": {"spatial": "none", "temporal": "none"},
        "norm": "none",
        "norm_groups": 8,
        "mst": {"spatial": (1, 3, 5), "temporal": (3, 3, 5), "width": 32},
        "conv3d": {
            "factorised": True,
            "order": "spatial_first",
            "mid_relu": True,
            "mid": "out",
            "width": 32,
            "temporal": 3,
        },
        "temporal": {"pool4": "after_mst1", "init": "he", "conv1_init": "random"},
        "fusion": {
            "kernel": (3, 3, 3),
            "width": 32,
            "relu": True,
            "pool5": "after",
            "init": "feichtenhofer",
            "drop_rgb": 0.0,
            "loss_without": (),
        },
        "tpn": {"window": 4, "stride": 4, "levels": (1, 2, 4), "psi": "mean"},
        "lstm": {
            "cell": "lstm",
            "hidden": 5,
            "ln": "tf",
            "ln_axis": "units",
            "forget_bias": 1.0,
            "bidirectional": True,
        },
        "head": {"combine": "project", "pool": "mean_logits"},
        "drop": {"input": 0.5, "output": 0.25, "semantics": "drop"},
        "c3d": {"width": 4, "dense": 16},
        "cnn_lstm": {"width": 4, "hidden": 6},
    }


@pytest.fixture
def drawn_texts(monkeypatch):
    """The texts that matplotlib has drawn in this test, and whether as a formula, in order."""
    from matplotlib.backends.backend_agg import RendererAgg

    texts: list[tuple[str, bool]] = []
    draw = RendererAgg.draw_text

    def noted(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        texts.append((s, bool(ismath)))
        draw(self, gc, x, y, s, prop, angle, ismath, mtext)

    monkeypatch.setattr(RendererAgg, "draw_text", noted)
    return texts


_CODECS = {".avi": "mpeg4", ".mp4": "libx264", ".mkv": "libx264", ".mpg": "mpeg1video"}


@pytest.fixture(scope="session")
def make_video():
    """Writes a real encoded video: a textured square on a textured ground, moving sideways."""

    def make(path, *, frames=30, size=(48, 64), fps=25, codec=None, speed=1.0, seed=0) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        codec = codec or _CODECS[path.suffix]
        chance = np.random.default_rng(seed)
        height, width = size
        ground = _texture(chance, height, width, 40, 160)
        side = max(2, min(height, width) // 3)
        square = _texture(chance, side, side, 120, 255)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            stream.codec_context.gop_size = 12  # bytes spread evenly, for files that are cut
            for number in range(frames):
                picture = ground.copy()
                left = round(width / 3 + speed * number) % max(1, width - side)
                top = height // 3
                picture[top : top + side, left : left + side] = square
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return make


def _texture(chance, height, width, low, high):
    # Grey cells under one tint: chroma is stored at half size, so coloured noise would not survive.
    cells = chance.uniform(low, high, (-(-height // 4), -(-width // 4), 1))
    cells = (cells * chance.uniform(0.6, 1.0, 3)).astype(np.uint8)
    return np.ascontiguousarray(cells.repeat(4, 0).repeat(4, 1)[:height, :width])


@pytest.fixture(scope="session")
def tiny_videos(make_video, tmp_path_factory):
    """A folder of real videos: two classes that differ in direction, four groups, two formats."""
    root = tmp_path_factory.mktemp("tiny") / "videos"
    for name, speed in (("left", -1.5), ("right", 1.5)):
        for group in range(4):
            for clip, suffix in enumerate((".mp4", ".avi")):
                make_video(
                    root / name / f"{name}_g{group}_c{clip}{suffix}",
                    frames=12 + 3 * group + clip,
                    speed=speed,
                    seed=group,
                )
    return root


@pytest.fixture
def tiny_config(tiny_card) -> ConfigDict:
    """A fresh copy of `tiny_card`, so a test may change it."""
    return tiny_card.copy_and_resolve_references()


@pytest.fixture(scope="module")
def tiny_card(tiny_videos, tiny_model_settings) -> ConfigDict:
    """A whole configuration, small enough to be run through in seconds."""
    from configs import folder

    config = folder.get_config()
    config.seed, config.batch_size, config.checkpoint_every_steps = 0, 4, 100
    config.log_every_steps = 1
    config.allow_cpu, config.pretrained = True, "none"
    config.data.update(root=str(tiny_videos), group_regex=r"_(g\d)_", validation_fraction=0.3)
    config.records.update(
        root=str(tiny_videos.parent / "records"), size=36, flow_size=48, flow_algorithm="dis",
        flow_bound=4.0, min_truncated_frames=8, timeout=60.0, workers=2,
    )  # fmt: skip
    config.sampling.update(num_frames=8, frame_stride=(1, 3))
    config.inputs.update(crop_size=32, rgb_preprocess="minus1_1", flow_scale=1 / 32)
    config.augment.update(crop="random", flip=False)
    with config.unlocked():
        config.model = ConfigDict(copy.deepcopy(tiny_model_settings))
    config.model.norm = "group"
    config.stages.first.update(learning_rate=1e-3, max_epochs=2)
    config.stages.second.update(learning_rate=1e-4, max_epochs=1)
    return config


@pytest.fixture(scope="session")
def tiny_records(tiny_videos):
    """The index and the prepared records of `tiny_videos`."""
    from configs import folder, ucf101
    from stf_jax.datasets import load_index
    from stf_jax.flow import TvL1Settings
    from stf_jax.prepare import RecordSettings
    from stf_jax.records import prepare_records

    data = folder.get_config().data
    data.update(root=str(tiny_videos), group_regex=r"_(g\d)_", validation_fraction=0.3)
    settings = RecordSettings(
        root=str(tiny_videos.parent / "records"), size=36, resize="squash", flow_size=48,
        flow_source="stored",
        tvl1=TvL1Settings(**ucf101.get_config().records.tvl1),
        flow_algorithm="dis", flow_bound=4.0, jpeg_quality=95, min_truncated_frames=8,
        max_pixels=10**7, max_frames=10_000, max_seconds=600.0, timeout=60.0, workers=2,
    )  # fmt: skip
    index = load_index(data)
    return index, prepare_records(index, settings)
