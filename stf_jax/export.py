"""A trained network as files for other programs, each of which is checked before it gets its name.

All hold the same function: uint8 frames and quantised flow of clips -> class probabilities, with
crop and normalisation inside. What has to happen to a video before is said by `signature`.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Float, UInt8

from stf_jax.datasets import load_index
from stf_jax.evaluate import score_batch
from stf_jax.flow import ZERO_FLOW
from stf_jax.inputs import Batch, network_input
from stf_jax.optim import by_path
from stf_jax.pipeline import SamplingSettings
from stf_jax.predict import Predictor, Trained
from stf_jax.prepare import RecordSettings, write_aside
from stf_jax.run import Run
from stf_jax.wording import scored_videos

# Largest difference of a probability from the one that JAX computes.
LIMIT = 1e-4

# The devices that StableHLO is made for.
PLATFORMS = ("cpu", "cuda")

# (rgb, flow) -> probabilities: a program that was read back.
Runner: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Refused(Exception):
    """An export that does not compute what JAX computes; its file is gone."""


# --- the function and what is said of it --------------------------------------------------------


def inference_function(predictor: Predictor) -> Callable[..., jax.Array]:
    """(params, rgb, flow) -> probabilities, on batches of any size.

    The function that `Predictor` applies, from uint8 `b t h w 3` and uint8 `b t c h w` (see
    `stf_jax.inputs.Batch`) to float32 `b k`: dropout off, the pyramid folded.

    Raises:
      ValueError: the scores of a clip would depend on which clips it shares a batch with.
    """
    if predictor.settings.config.model.lstm.ln_axis == "batch":
        raise ValueError(
            "model.lstm.ln_axis='batch' normalises over the clips of a batch: scores depend on "
            "what a clip is batched with, so no program gives the run's. Train with 'units'."
        )

    def probabilities(
        params: Any, rgb: UInt8[Array, "b t h w 3"], flow: UInt8[Array, "b t c h w"]
    ) -> Float[Array, "b k"]:
        clips = rgb.shape[0]
        nothing = jnp.zeros(clips, jnp.int32)
        batch = Batch(
            rgb, flow, nothing, jnp.ones(clips, bool), nothing, jnp.zeros((clips, 2), jnp.uint32)
        )
        x, y = network_input(batch, predictor.settings.inputs, augment=None)
        logits, _ = predictor.model.apply({"params": params}, x, y, train=False)
        return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    return probabilities


def input_specs(predictor: Predictor, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and types of the inputs for a number of clips, perhaps symbolic."""
    settings = predictor.settings
    side, frames = settings.records.size, settings.sampling.num_frames
    channels = 2 * settings.sampling.flow_frames
    return {
        "rgb": jax.ShapeDtypeStruct((batch, frames, side, side, 3), jnp.uint8),
        "flow": jax.ShapeDtypeStruct((batch, frames, channels, side, side), jnp.uint8),
    }


_RULES = {
    "frac": "frame k of the clip is frame floor(k N / T) of the video",
    "int": "frame k of the clip is frame k floor(N / T) of the video",
    "int_centred": (
        "frame k of the clip is frame s + k floor(N / T) of the video, "
        "s = floor((N - 1 - (T - 1) floor(N / T)) / 2)"
    ),
}


def signature(trained: Trained, results: Mapping[str, Any]) -> dict[str, Any]:
    """What must be known to feed an exported program: `signature.json`.

    Args:
      trained: what is exported.
      results: the `results.json` of its run.
    """
    settings = trained.settings
    specs = input_specs(Predictor.of(trained), "batch")
    count = len(trained.class_names)
    leaves = by_path(trained.params)
    meanings = {
        "rgb": {"axes": "b t h w c", "unit": "0 to 255; channels red, green, blue"},
        "flow": {
            "axes": "b t c h w",
            "unit": "quantised px per frame, see outside.flow",
            "channels": "u (right) of field 1, v (down) of field 1, u of field 2, ...",
        },
    }
    return {
        "signature": 1,
        "inputs": [
            {"name": name, "dtype": "uint8", "shape": list(spec.shape), **meanings[name]}
            for name, spec in specs.items()
        ],
        "outputs": [
            {
                "name": "probabilities",
                "dtype": "float32",
                "shape": ["batch", count],
                "axes": "b k",
                "unit": "probability; k in the order of class_names",
            }
        ],
        "class_names": list(trained.class_names),
        "inside": {
            "crop": f"the central {settings.inputs.crop_size}x{settings.inputs.crop_size} px",
            "inputs": settings.config.inputs.to_dict(),
        },
        "outside": _outside(trained),
        "weights": {
            "sha256": trained.digest,
            "tensors": len(leaves),
            "parameters": sum(int(np.prod(leaf.shape)) for leaf in leaves.values()),
        },
        "run": {
            "commit": results["environment"]["commit"],
            **{key: results[key] for key in ("config_file", "seed", "protocol", "leaky")},
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("stf_jax", "jax", "flax")},
            **{name: version for name in _OPTIONAL if (version := _version(name))},
        },
    }


def _outside(trained: Trained) -> dict[str, Any]:
    """What a video goes through before the program sees it."""
    stored, sampling = trained.settings.records, trained.settings.sampling
    square = "squashed to a square"
    if stored.resize == "short_side":
        square = "the shorter side brought to this size, then the central square"
    return {
        "decoding": "all frames of the video, upright, RGB, 8 bit",
        "frames": {
            "T": sampling.num_frames,
            "rule": _sampling_rule(sampling),
            "settings": trained.settings.config.sampling.to_dict(),
            "clips_per_video_in_the_run": trained.settings.config.eval.repeats,
        },
        "resizing": {
            "px": stored.size,
            "how": f"{square}; area averaging when smaller, else bicubic",
            "jpeg_quality": stored.jpeg_quality,
            "jpeg": "frames and fields were coded as JPEG and decoded in training; leaving this "
            "out changes probabilities a little",
        },
        "flow": _flow_facts(stored, sampling),
    }


def _sampling_rule(sampling: SamplingSettings) -> str:
    rule = f"{_RULES[sampling.eval]}, N its frames, k from 0; if N < T, it is frame k"
    if sampling.flow_edge == "inset":
        half = sampling.flow_frames // 2
        rule += f"; if N - {2 * half} >= T, N is less by {2 * half} and {half} is added to each"
    still = "does not move" if sampling.flow_pad == "zero" else "keeps the fields of the last frame"
    return f"{rule}; past the end the last frame is repeated and {still}"


def _flow_facts(stored: RecordSettings, sampling: SamplingSettings) -> dict[str, Any]:
    bound, half = stored.flow_bound, sampling.flow_frames // 2
    between, side = "consecutive frames of the video", stored.flow_size
    if sampling.flow_step == "stride":
        between, side = "consecutive frames of the clip, as resized", stored.size
    return {
        "algorithm": stored.flow_algorithm,
        "tvl1": dataclasses.asdict(stored.tvl1) if stored.flow_algorithm == "tvl1" else None,
        "between": f"{between}: field n is the motion from frame n to frame n + 1",
        "grey": "0.299 R + 0.587 G + 0.114 B",
        "computed_at_px": side,
        "then": "fields are resized as frames are (bilinear when larger), u and v times the ratio",
        "fields_per_frame": sampling.flow_frames,
        "window": f"frame c reads fields c - {half} to c + {half - 1}, held inside the video",
        "bound_px_per_frame": bound,
        "quantisation": f"floor(clip(v, -{bound}, {bound}) * 127.5 / {bound} + 128), at most 255",
        "no_motion": ZERO_FLOW,
    }


def model_card(
    trained: Trained,
    results: Mapping[str, Any],
    signature: Mapping[str, Any],
    formats: Sequence[str],
) -> str:
    """A Markdown page about the network, from its run's files.

    Args:
      trained: what is exported.
      results: the `results.json` of its run.
      signature: what `signature` made.
      formats: that are exported.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stf_jax"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["scored"] = scored_videos
    return environment.get_template("model_card.md.jinja").render(
        # Before it could be another, the subset was not written down.
        results={"subset": "test", **results},
        signature=signature,
        formats={name: FORMATS[name].file for name in formats},
        config=json.dumps(shared_config(trained), indent=2),
        changes={k: v for k, v in results["changes"].items() if k not in _PLACES},
        limit=LIMIT,
    )


# Where things lie on a machine is nobody else's business.
_PLACES = ("data.root", "data.archive", "data.list", "records.root", "transfer.source")


def shared_config(trained: Trained) -> dict[str, Any]:
    """The run's configuration without where things lay on its machine."""
    config = json.loads(trained.settings.config.to_json_best_effort())
    for place in _PLACES:
        part, key = place.split(".")
        config[part][key] = ""
    return config


# --- formats ------------------------------------------------------------------------------------


def _with_weights(predictor: Predictor) -> Callable[[Any, Any], jax.Array]:
    """`inference_function` with its weights as constants."""
    params = jax.tree.map(jnp.asarray, predictor.params)
    return functools.partial(inference_function(predictor), params)


def _write_stablehlo(trained: Trained, facts: Mapping[str, str], path: Path) -> None:
    predictor = Predictor.of(trained)
    specs = input_specs(predictor, jax_export.symbolic_shape("batch")[0])
    closed = jax.jit(_with_weights(predictor))
    program = jax_export.export(closed, platforms=PLATFORMS)(*specs.values())
    path.write_bytes(program.serialize())


def _open_stablehlo(path: Path) -> Runner:
    call = jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)
    return lambda rgb, flow: np.asarray(call(rgb, flow))


def _write_savedmodel(trained: Trained, facts: Mapping[str, str], path: Path) -> None:
    import tensorflow as tf
    from jax.experimental import jax2tf

    predictor = Predictor.of(trained)
    converted = jax2tf.convert(
        inference_function(predictor),
        polymorphic_shapes=(None, "batch, ...", "batch, ..."),
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module = tf.Module()
    # Variables, not constants: a graph may not exceed 2 GB.
    module.params = jax.tree.map(
        lambda leaf: tf.Variable(np.asarray(leaf), trainable=False), predictor.params
    )
    specs = input_specs(predictor, None)

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec(spec.shape, tf.uint8, name=name) for name, spec in specs.items()
        ],
    )
    def classify(rgb: tf.Tensor, flow: tf.Tensor) -> dict[str, tf.Tensor]:
        params = tf.nest.map_structure(tf.convert_to_tensor, module.params)
        return {"probabilities": converted(params, rgb, flow)}

    module.classify = classify
    tf.saved_model.save(module, str(path), signatures={"serving_default": classify})
    assets = path / "assets.extra"  # what TensorFlow keeps beside a model and does not read
    assets.mkdir()
    (assets / "signature.json").write_text(facts["signature"], encoding="utf-8")


def _open_savedmodel(path: Path) -> Runner:
    import tensorflow as tf

    module = tf.saved_model.load(str(path))
    call = module.signatures["serving_default"]

    # The module is named here because what it loaded is gone when nothing holds it.
    def run(rgb: np.ndarray, flow: np.ndarray, module: Any = module) -> np.ndarray:
        return call(rgb=tf.constant(rgb), flow=tf.constant(flow))["probabilities"].numpy()

    return run


def _write_onnx(trained: Trained, facts: Mapping[str, str], path: Path) -> None:
    _need("onnx", "onnxruntime")
    import onnx

    from stf_jax.onnx_graph import onnx_model

    predictor = Predictor.of(trained)
    specs = input_specs(predictor, jax_export.symbolic_shape("batch")[0])
    about = {key: facts[key] for key in ("signature", "card")}
    model = onnx_model(_with_weights(predictor), specs, "probabilities", about)
    onnx.save(model, path)


def _open_onnx(path: Path) -> Runner:
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda rgb, flow: session.run(["probabilities"], {"rgb": rgb, "flow": flow})[0]


def _write_safetensors(trained: Trained, facts: Mapping[str, str], path: Path) -> None:
    _need("safetensors")
    from safetensors.numpy import save

    # The weights as trained: they may be trained on, and fold when they are loaded.
    leaves = by_path(trained.params)
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    # Its own way of writing makes a file that only its owner may read.
    path.write_bytes(save(tensors, {"format": "flax", **facts}))


def _open_safetensors(path: Path) -> Runner:
    return jax_runner(Predictor.load(path))


def jax_runner(predictor: Predictor) -> Runner:
    """What exports are compared with: the function that scores evaluations and predictions."""

    def run(rgb: np.ndarray, flow: np.ndarray) -> np.ndarray:
        clips = len(rgb)
        batch = Batch(
            rgb=rgb,  # type: ignore[arg-type]
            flow=flow,  # type: ignore[arg-type]
            label=jnp.zeros(clips, jnp.int32),
            mask=jnp.ones(clips, bool),
            entry=jnp.zeros(clips, jnp.int32),
            seed=jnp.zeros((clips, 2), jnp.uint32),
        )
        scores = score_batch(
            predictor.params, batch, model=predictor.model, inputs=predictor.settings.inputs
        )
        return np.asarray(scores)

    return run


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
      file: its name in the folder; a folder of its own for SavedModel.
      runtime: the distribution that runs it.
      write: (what was learnt, `predict.FILE_FACTS`, path): writes it.
      open: reads it back as another program would.
    """

    file: str
    runtime: str
    write: Callable[[Trained, Mapping[str, str], Path], None]
    open: Callable[[Path], Runner]


FORMATS = {
    "stablehlo": Format("model.stablehlo", "jax", _write_stablehlo, _open_stablehlo),
    "savedmodel": Format("savedmodel", "tensorflow-cpu", _write_savedmodel, _open_savedmodel),
    "onnx": Format("model.onnx", "onnxruntime", _write_onnx, _open_onnx),
    "safetensors": Format("model.safetensors", "jax", _write_safetensors, _open_safetensors),
}

# What the extra `export` brings.
_OPTIONAL = ("onnx", "onnxruntime", "safetensors")


def _version(name: str) -> str:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else ""


def _need(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"this format needs {' and '.join(missing)}: make install EXTRAS=export"
        )


# --- a folder of exports ------------------------------------------------------------------------


def export_run(
    trained: Trained,
    results: Mapping[str, Any],
    folder: Path,
    formats: Sequence[str],
    clips: Sequence[Batch],
) -> Iterator[dict[str, Any]]:
    """Writes a run's network in several formats, with signature, card and `parity.json`.

    A format that cannot be made, or does not compute what JAX does, leaves no file under its name;
    the others are made all the same.

    Args:
      trained: what to export.
      results: the `results.json` of its run.
      folder: made if absent; files of the same names are replaced.
      formats: of `FORMATS`.
      clips: real ones, each a batch of one, that every program is checked on.

    Yields:
      A row of `parity.json` per format, as soon as it is known: 'format', 'file', 'runtime',
      'clips', 'limit', 'error' ('' if all is well), and, if it could be run,
      'largest_difference' and 'same_class', the number of clips with the same first class.
    """
    check_formats(formats)
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever is there describes other weights from now on.
    for name in ("signature.json", "model_card.md", "parity.json"):
        (folder / name).unlink(missing_ok=True)
    told = signature(trained, results)
    card = model_card(trained, results, told, formats)
    facts = {
        "config": json.dumps(shared_config(trained)),
        "data": json.dumps({"class_names": list(trained.class_names), **trained.data}),
        "signature": json.dumps(told),
        "card": card,
    }
    rows = []
    for name in formats:
        rows.append(_export(name, trained, facts, folder, clips))
        yield rows[-1]
    for name, text in (
        ("signature.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n"),
        ("model_card.md", card),
        ("parity.json", json.dumps(rows, indent=2) + "\n"),
    ):
        write_aside(folder / name, text.encode())


def check_formats(formats: Sequence[str]) -> None:
    """Checks names of formats.

    Raises:
      ValueError: one is none of `FORMATS`, or there is none.
    """
    for name in formats or [""]:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}; choose of: {', '.join(FORMATS)}")


def _export(
    name: str, trained: Trained, facts: Mapping[str, str], folder: Path, clips: Sequence[Batch]
) -> dict[str, Any]:
    form = FORMATS[name]
    target, aside = folder / form.file, folder / f".{form.file}.unchecked"
    runtime = f"{form.runtime} {importlib.metadata.version(form.runtime)}"
    row: dict[str, Any] = {"format": name, "file": form.file, "runtime": runtime}
    row |= {"clips": len(clips), "limit": LIMIT, "error": ""}
    for path in (target, aside):
        _remove(path)
    try:
        form.write(trained, facts, aside)
        row |= compare(form.open(aside), jax_runner(Predictor.of(trained)), clips)
        if not row["largest_difference"] <= LIMIT:  # NaN is none of the two
            raise Refused(
                f"its probabilities differ from JAX's by up to {row['largest_difference']:.2g}, "
                f"allowed are {LIMIT:g}"
            )
        aside.rename(target)
    except Exception as error:  # each library has errors of its own; all are told
        row["error"] = str(error) or type(error).__name__
    finally:
        _remove(aside)
    return row


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def compare(program: Runner, reference: Runner, clips: Sequence[Batch]) -> dict[str, Any]:
    """Runs a program on clips, one by one and all in one batch.

    Returns:
      'largest_difference' from the reference of any probability (NaN if any is), and 'same_class':
      clips whose most probable class is the same.
    """
    inputs = [(np.asarray(clip.rgb), np.asarray(clip.flow)) for clip in clips]
    expected = np.concatenate([reference(*clip) for clip in inputs])
    one_by_one = np.concatenate([program(*clip) for clip in inputs])
    together = program(*(np.concatenate(arrays) for arrays in zip(*inputs, strict=True)))
    if not one_by_one.shape == together.shape == expected.shape:
        raise Refused(f"it returns shape {together.shape} instead of {expected.shape}")
    differences = np.abs(np.stack([one_by_one, together]) - expected[None])
    same = (one_by_one.argmax(1) == expected.argmax(1)) & (together.argmax(1) == expected.argmax(1))
    return {"largest_difference": float(differences.max()), "same_class": int(same.sum())}


def videos_to_check(run: Run, count: int) -> list[Path]:
    """Files of a run's test videos, evenly from the list of all.

    Raises:
      ValueError, OSError: the run's videos are not where they were (says so).
    """
    index = load_index(run.settings().config.data)
    entries = index.subset("test")
    if not entries:
        raise ValueError(f"{index.root} holds no test video")
    chosen = np.linspace(0, len(entries) - 1, min(count, len(entries))).round().astype(int)
    return [index.path(entries[i]) for i in chosen]
