"""What leaves a run: exported files that compute what it does, and the way back into Python."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from as_if_trained import STAGE, as_if_trained

import stf_jax
from stf_jax import export
from stf_jax.checkpoint import count_parameters
from stf_jax.datasets import load_index
from stf_jax.evaluate import evaluate_subset
from stf_jax.main import environment
from stf_jax.predict import Predictor, Trained
from stf_jax.records import prepare_records
from stf_jax.run import Settings
from stf_jax.scores import write_scores
from stf_jax.video import Limits, VideoReader

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def run(tiny_card, tmp_path_factory):
    """The folder of a run as training leaves it, but that its weights are where it would begin."""
    settings, index = Settings.of(tiny_card), load_index(tiny_card.data)
    records = prepare_records(index, settings.records)
    folder = tmp_path_factory.mktemp("export") / "run"
    run = as_if_trained(settings, index, records, folder)
    params = settings.initial_params(settings.model(2))
    scores = evaluate_subset(settings, params, index, records, "test")
    write_scores(run.workdir / "scores.csv", scores, index.class_names)
    results = {
        **dataclasses.asdict(scores.figures()),
        **{key: run.read_json("data.json")[key] for key in ("protocol", "leaky", "excluded")},
        "overlap": index.overlap,
        "seen": None,
        "notes": list(index.notes),
        "chance": 0.5,
        "data": {"name": index.name, "counts": {"train": 8, "validation": 4, "test": 4}},
        "stages": [STAGE],
        "environment": environment(),
        "config_file": "configs/folder.py",
        "changes": {"data.root": "here", "seed": 0},
        "seed": 0,
        "parameters": count_parameters(params),
    }
    run.write_json("results.json", results)
    return run


@pytest.fixture(scope="module")
def exported(run):
    """The folder of all formats, and what was said of each."""
    folder = run.workdir.parent / "exported"
    trained = Trained.read(run.workdir)
    clips = [Predictor.of(trained).clip(path) for path in export.videos_to_check(run, 2)]
    results = run.read_json("results.json")
    rows = list(export.export_run(trained, results, folder, list(export.FORMATS), clips))
    return folder, {row["format"]: row for row in rows}


def test_every_format_is_there_and_was_compared(exported):
    folder, rows = exported
    assert rows.keys() == {"stablehlo", "savedmodel", "onnx", "safetensors"}
    for row in rows.values():
        assert not row["error"]
        assert (row["error"], row["clips"], row["same_class"]) == ("", 2, 2)
        assert 0 <= row["largest_difference"] < 1e-5 and (folder / row["file"]).exists()
    assert json.loads((folder / "parity.json").read_text()) == list(rows.values())
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_cards_code_gives_the_runs_scores(run, exported, monkeypatch):
    """Every block of the model card is run as it stands, in the folder of the files."""
    folder, rows = exported
    path = export.videos_to_check(run, 1)[0]
    shutil.copy(path, folder / "video.mp4")
    monkeypatch.chdir(folder)
    lines = (run.workdir / "scores.csv").read_text().splitlines()
    (scored,) = [line.split(",") for line in lines if line.startswith(f"{_id(path)},")]
    expected = np.array(scored[4:], float)
    names: dict = {}
    blocks = _BLOCK.findall((folder / "model_card.md").read_text())
    assert len(blocks) == len(rows)
    for block in blocks:
        exec(block, names)
        given = names.pop("probabilities", None)  # the first block makes clips, not these
        if given is None:
            given = names["network"].predict("video.mp4").probabilities[None]
        np.testing.assert_allclose(np.asarray(given)[0], expected, atol=1e-5)


def _id(path: Path) -> str:
    return "/".join(path.parts[-2:])


def test_signature_and_card_say_what_the_run_says(run, exported):
    folder, _ = exported
    told = json.loads((folder / "signature.json").read_text())
    by_name = {spec["name"]: spec for spec in (*told["inputs"], *told["outputs"])}
    assert by_name["rgb"]["shape"] == ["batch", 8, 36, 36, 3]
    assert by_name["flow"]["shape"] == ["batch", 8, 8, 36, 36]
    assert by_name["probabilities"]["shape"] == ["batch", 2]
    assert told["class_names"] == ["left", "right"]
    flow = told["outside"]["flow"]
    assert (flow["algorithm"], flow["bound_px_per_frame"], flow["computed_at_px"]) == ("dis", 4, 48)
    results = run.read_json("results.json")
    assert told["run"]["commit"] == results["environment"]["commit"]
    assert told["weights"]["parameters"] == results["parameters"]
    card = (folder / "model_card.md").read_text()
    low, high = results["interval95"]
    for shown in (f"{100 * results['top1']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %",
                  results["protocol"], "`left`, `right`", "licence", told["weights"]["sha256"],
                  "with `seed=0`.", "no test video shares a source"):  # fmt: skip
        assert shown in card, shown
    # Nothing tells where things lay.
    for name in ("model_card.md", "signature.json", "model.safetensors", "model.onnx"):
        assert str(run.workdir.parent).encode() not in (folder / name).read_bytes()


def test_a_card_says_that_a_protocol_leaks(run):
    trained = Trained.read(run.workdir)
    results = run.read_json("results.json") | {"leaky": True, "overlap": 0.25, "seen": 0.5}
    told = export.signature(trained, results)
    card = export.model_card(trained, results, told, ["onnx"])
    assert "**LEAKY PROTOCOL**: 25.0 % of the test videos share a source" in card
    assert "50.0 % had been trained on before" in card and "not measured" in card
    assert len(_BLOCK.findall(card)) == 1


def test_a_file_is_as_good_as_its_run(run, exported):
    folder, _ = exported
    ours, theirs = Trained.read(run.workdir), Trained.read(folder / "model.safetensors")
    assert ours.digest == theirs.digest and ours.class_names == theirs.class_names
    other = dataclasses.replace(ours, params={**ours.params, "head": {}})
    assert other.digest != ours.digest
    path = export.videos_to_check(run, 1)[0]
    one, two = (stf_jax.load(p).predict(path) for p in (run.workdir, folder / "model.safetensors"))
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
    leaky = dataclasses.replace(ours, data={"protocol": "random", "leaky": True})
    assert "leaky protocol (random)" in Predictor.of(leaky).warning


def test_frames_are_as_good_as_their_file(run):
    network = stf_jax.load(str(run.workdir))
    path = export.videos_to_check(run, 1)[0]
    frames = np.stack(list(VideoReader(path, Limits())))
    one, two = network.predict(path), network.predict(frames)
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
    assert one.probabilities.dtype == np.float32 and one.class_names == ("left", "right")
    first, second = one.top()
    assert first[1] == one.probabilities.max() and first[1] + second[1] == pytest.approx(1)
    assert network.predict(frames[:1]).probabilities.sum() == pytest.approx(1)
    for bad, error, told in (
        (frames / 255, TypeError, "uint8, 0 to 255, got float64"),
        (frames[0], ValueError, r"`t h w 3` .*got shape \(48, 64, 3\)"),
        (frames[:, None], ValueError, "got shape"),
        (frames[..., :1], ValueError, r"got shape \(\d+, 48, 64, 1\)"),
        (frames[:0], ValueError, r"got shape \(0, 48, 64, 3\)"),
    ):
        with pytest.raises(error, match=told):
            network.predict(bad)


def test_what_cannot_be_loaded_says_why(run, exported, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="nowhere does not exist: name the folder of a run"):
        stf_jax.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        stf_jax.load(tmp_path)
    shutil.copytree(run.workdir, tmp_path / "run")
    (tmp_path / "run/stages/second/done.json").unlink()
    with pytest.raises(FileNotFoundError, match="unfinished run: its stage 'second' has not ended"):
        stf_jax.load(tmp_path / "run")
    (tmp_path / "x.onnx").write_bytes(b"1234" * 100)
    with pytest.raises(ValueError, match="x.onnx is no whole safetensors file .*expected the fold"):
        stf_jax.load(tmp_path / "x.onnx")
    whole = (exported[0] / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        stf_jax.load(tmp_path / "cut.safetensors")
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="says nothing of 'config', so it was not made by stf_jax"):
        stf_jax.load(tmp_path / "other.safetensors")
    trained = Trained.read(run.workdir)
    fewer = dataclasses.replace(trained, params={**trained.params, "head": {}})
    facts = {"config": json.dumps(export.shared_config(trained)), "card": ""}
    facts["signature"] = json.dumps({"run": {"commit": "a1b2c3d"}})
    facts["data"] = json.dumps({"class_names": ["left", "right"], **trained.data})
    export._write_safetensors(fewer, facts, tmp_path / "fewer.safetensors")
    with pytest.raises(
        ValueError,
        match=r"(?s)not those of the network.*missing: head/project/bias \(2,\).*export it again",
    ):
        stf_jax.load(tmp_path / "fewer.safetensors")
    facts["config"] = facts["config"].replace('"crop_size"', '"crop"')
    export._write_safetensors(trained, facts, tmp_path / "newer.safetensors")
    with pytest.raises(
        ValueError, match=r"(?s)newer.*missing: inputs.crop_size\n  unknown: inputs.crop\n"
    ):
        stf_jax.load(tmp_path / "newer.safetensors")


def test_a_program_that_computes_something_else_is_refused(run, exported, tmp_path, monkeypatch):
    trained = Trained.read(run.workdir)
    clips = [Predictor.of(trained).clip(path) for path in export.videos_to_check(run, 2)]
    results = run.read_json("results.json")

    def spoilt(trained, facts, path):
        head = {"project": {k: 1.1 * v for k, v in trained.params["head"]["project"].items()}}
        params = {**trained.params, "head": head}
        export._write_safetensors(dataclasses.replace(trained, params=params), facts, path)

    form = dataclasses.replace(export.FORMATS["safetensors"], write=spoilt)
    monkeypatch.setitem(export.FORMATS, "safetensors", form)
    # What an earlier export left there is of other weights.
    (tmp_path / "model.safetensors").touch()
    (row,) = export.export_run(trained, results, tmp_path, ["safetensors"], clips)
    assert "differ from JAX's by up to" in row["error"] and row["largest_difference"] > 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {
        "signature.json", "model_card.md", "parity.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "parity.json").read_text())[0]["error"] == row["error"]
    nan = lambda rgb, flow: np.full((len(rgb), 2), np.nan, np.float32)  # noqa: E731
    assert np.isnan(export.compare(nan, nan, clips)["largest_difference"])
    with pytest.raises(export.Refused, match="returns shape"):
        export.compare(lambda rgb, flow: nan(rgb, flow)[:, :1], nan, clips)


def test_a_missing_library_is_named_with_its_command(run, exported, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    trained = Trained.read(run.workdir)
    clips = [Predictor.of(trained).clip(export.videos_to_check(run, 1)[0])]
    results = run.read_json("results.json")
    rows = list(export.export_run(trained, results, tmp_path, ["onnx", "safetensors"], clips))
    assert rows[0]["error"] == "this format needs onnxruntime: make install EXTRAS=export"
    assert rows[1]["error"] == "" and not (tmp_path / "model.onnx").exists()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="needs the library safetensors: make install EX"):
        stf_jax.load(exported[0] / "model.safetensors")


def test_what_no_program_can_give_is_refused(run):
    trained = Trained.read(run.workdir)
    config = trained.settings.config.as_configdict().copy_and_resolve_references()
    config.model.lstm.ln_axis = "batch"
    other = dataclasses.replace(trained, settings=Settings.of(config))
    with pytest.raises(ValueError, match="ln_axis='batch' normalises over the clips"):
        export.inference_function(Predictor.of(other))
    with pytest.raises(ValueError, match="unknown format 'onxn'; choose of: stablehlo, savedmodel"):
        export.check_formats(["onxn"])
    with pytest.raises(ValueError, match="unknown format ''"):
        export.check_formats([])


def test_the_readmes_example_runs(run, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = _BLOCK.findall(text.partition("## Use it from Python")[2].partition("\n## ")[0])
    (video,) = set(re.findall(r'"(data/demo/.*?)"', block))
    (tmp_path / video).parent.mkdir(parents=True)
    shutil.copy(export.videos_to_check(run, 1)[0], tmp_path / video)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run.workdir)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines) == ["left", "right"]
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.2)


def test_importing_the_package_is_light():
    code = (
        "import sys, stf_jax; assert callable(stf_jax.load);"
        "print([m for m in ('jax', 'numpy', 'tensorflow', 'cv2', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_script_tells_parity(run, tmp_path):
    """A user's command."""
    command = [
        sys.executable, "experiments/export.py", f"--workdir={run.workdir}",
        f"--out={tmp_path / 'out'}", "--formats=safetensors", "--clips=2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"safetensors: model\.safetensors, largest difference \S+e-\d+ \(limit 0\.0001\), same "
        r"class 2 of 2 clips, jax \S+\n",
        done.stdout,
    )
