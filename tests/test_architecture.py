"""The shape of the code itself: import order, import weight, configs that build and are read."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from stf_jax.run import Settings, check_config_keys

ROOT = Path(__file__).parent.parent
# The walk: a module imports only modules that come before it.
WALK = (
    "laptop "
    "host native_errors progress startup archives index protocols layouts demo video flow tvl1 "
    "datasets prepare shards records augment inputs views pipeline convolution vgg streams fusion "
    "recurrent baselines model metrics scores charts optim parallel hosts checkpoint transfer run "
    "evaluate monitor train cost predict watch timeline explain onnx_graph wording export curves "
    "report analysis app doctor main"
).split()
MODULES = {path.stem: path for path in (ROOT / "stf_jax").glob("*.py") if path.stem != "__init__"}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_walk_names_every_module():
    assert sorted(MODULES) == sorted(WALK)


@pytest.mark.parametrize("name", WALK)
def test_modules_import_only_what_comes_before(name):
    importlib.import_module(f"stf_jax.{name}")
    used = {i.split(".")[1] for i in _imports(MODULES[name]) if i.startswith("stf_jax.")}
    later = [other for other in used & set(WALK) if WALK.index(other) >= WALK.index(name)]
    assert not later, f"{name} imports {later}"


def test_heavy_libraries_stay_in_their_modules():
    homes = {
        "tensorflow": {"shards", "records", "pipeline", "predict", "export"},
        "onnx": {"onnx_graph", "export"},
        "onnxruntime": {"export"},
        "safetensors": {"predict", "export"},
        "cv2": {"flow", "prepare", "demo", "timeline", "report"},
        "av": {"video", "demo", "timeline"},
        "orbax": {"checkpoint"},
    }
    for library, home in homes.items():
        users = {
            name
            for name, path in MODULES.items()
            if any(i.split(".")[0] == library for i in _imports(path))
        }
        assert users <= home, f"{library} is imported by {users - home}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("stf_jax.model", ["tensorflow", "cv2", "av"]),
        ("stf_jax.main", ["tensorflow", "cv2", "av", "jax", "flax"]),
        ("stf_jax.prepare", ["tensorflow", "jax"]),
        ("stf_jax.train", ["tensorflow", "tensorflow_datasets", "orbax", "matplotlib"]),
    ],
)
def test_importing_does_not_drag_in(module, absent):
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _load(path: Path, preset: str = "") -> ConfigDict:
    module = importlib.import_module(f"configs.{path.stem}")
    return module.get_config(preset) if preset else module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_a_network(path):
    settings = Settings.of(_load(path))
    assert settings.abstract_params(5)["head"]


def test_presets_and_their_errors():
    card = ROOT / "configs" / "ucf101.py"
    laptop = _load(card, "laptop,split=3")
    assert laptop.data.split == 3 and laptop.model.width == 8
    assert Settings.of(laptop).abstract_params(8)
    literal = Settings.of(_load(card, "paper_literal"))
    assert literal.clip_shapes(1)[1][-1] == 4  # "equal to the number of stacked optical images"
    cell = literal.abstract_params(101)["recurrent"]["forward"]["cell"]
    assert {name for name in cell if name.startswith("ln_")} == {"ln_i", "ln_f", "ln_o"}
    assert literal.config.data.protocol == "paper_resplit"
    assert (literal.config.batch_size, literal.optimizer.clip) == (1, 0.0)
    ucf11, sports = ROOT / "configs" / "ucf11.py", ROOT / "configs" / "ucf_sports.py"
    assert _load(ucf11, "fold=3").data.fold == 3
    for path, preset, protocol in (
        (ucf11, "laptop,logo=7", "leave_one_group_out"),
        (sports, "laptop,loo=7", "leave_one_out"),
    ):
        config = _load(path, preset)
        assert (config.data.protocol, config.data.fold, config.model.width) == (protocol, 7, 8)
    for path in (card, ucf11, sports):
        with pytest.raises(ValueError, match="lapptop"):
            _load(path, "lapptop")


def test_cards_share_their_keys():
    """A key added to one card and forgotten in another would fail only when that one is used."""

    def keys(config, prefix=""):
        for key, value in config.items():
            if isinstance(value, ConfigDict):
                yield from keys(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    first, *rest = [set(keys(_load(path))) for path in CONFIGS]
    assert all(other == first for other in rest)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_stored_configurations_are_held_to_the_keys_of_the_cards(path):
    config = _load(path)
    check_config_keys(json.loads(config.to_json_best_effort()), path, "")
    del config.records.tvl1.warps
    with pytest.raises(ValueError, match="missing: records.tvl1.warps"):
        check_config_keys(json.loads(config.to_json_best_effort()), path, "")


def test_every_top_level_key_is_read():
    config = _load(ROOT / "configs" / "ucf101.py")
    code = "".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    unread = [key for key in config if not re.search(rf"config\.{key}\b", code)]
    assert not unread


def test_an_unknown_key_in_a_part_fails_by_its_name():
    config = _load(ROOT / "configs" / "ucf101.py")
    config.sampling.num_frame = 8
    with pytest.raises(TypeError, match="num_frame"):
        Settings.of(config)


def test_stage_order_must_name_the_stages():
    config = _load(ROOT / "configs" / "ucf101.py")
    config.stage_order = ("first", "secnd")
    with pytest.raises(ValueError, match="secnd"):
        Settings.of(config)
    config.stage_order = ("first", "first")
    with pytest.raises(ValueError, match="each once"):
        Settings.of(config)
    config.stage_order = ("first",)
    assert Settings.of(config).evaluated_stage == "first"


@pytest.mark.parametrize("place", ["stf_jax", "experiments", "configs", "tests"])
def test_the_linter_finds_undefined_names(place):
    """Shape strings once had this rule switched off, for the package and for the type checker."""
    code = "import numpy as np\nfrom jaxtyping import Float\n\n\n"
    code += 'def f(x: Float[np.ndarray, "b k"]) -> int:\n    """One."""\n    return absent\n'
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "-n", f"--stdin-filename={place}/x.py", "-"],
        cwd=ROOT, input=code, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "F821 Undefined name `absent`" in done.stdout
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert "disable_error_code" not in settings


def test_no_test_hides_behind_a_bare_skip():
    for path in (ROOT / "tests").glob("test_*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"pytest\.(mark\.)?skip(if)?\(", line) and "reason" not in line:
                following = path.read_text(encoding="utf-8").split(line, 1)[1][:200]
                assert "reason" in following, f"{path.name}: {line.strip()}"
