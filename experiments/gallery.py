"""Makes the pictures of README's gallery from a finished run on real videos.

    python experiments/gallery.py --workdir=runs/laptop [--out=docs/gallery]

They are its report in a browser (Chromium and its driver, `make browser`), the timeline of a long
video that is joined from test videos of each class, and explanations of a right and of a wrong
answer. README.md beside them names what each shows.

The videos are other people's works: of their frames only a coarse mosaic is shown, in the report
too. The flow is computed here, and shown as it is. `predict.py`, `explain.py` and `report.py` make
the same pictures with the frames as they are.
"""

import csv
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stf_jax import host  # noqa: E402

# Mosaic: squares along the shorter side of a frame.
_CELLS = 8

# Sections of the report that are shown, in turn.
_SECTIONS = ("summary", "curves", "confusion")


class Tested(NamedTuple):
    """A test video and what the run made of it."""

    video_id: str
    label: str
    prediction: str
    probability: float


def main(argv: Sequence[str]) -> None:
    """Makes all pictures and says where they are."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    workdir, out = Path(flags.FLAGS.workdir), Path(flags.FLAGS.out)
    try:
        lines = make(workdir, out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))


def make(workdir: Path, out: Path) -> list[str]:
    """Makes the pictures of a run in a folder; returns what was made.

    Raises:
      FileNotFoundError: the run is not finished, its videos or the browser are not there.
      ValueError: no test video was answered wrongly, or none rightly: there is nothing to show.
    """
    from stf_jax.explain import Explainer
    from stf_jax.run import Run

    run = Run(workdir)
    results = run.read_json("results.json")
    tested = read_tested(workdir / "scores.csv")
    files = _files(workdir)
    out.mkdir(parents=True, exist_ok=True)
    made = [screenshot(workdir, out / "report.png")]
    explainer = Explainer.load(workdir)
    made.append(_timeline(explainer, tested, files, out / "timeline.png"))
    for name, chosen in (("right", surest(tested, True)), ("wrong", surest(tested, False))):
        path = out / f"explained_{name}.png"
        made.append(_explained(explainer, chosen, files[chosen.video_id], path))
    (out / "README.md").write_text(_page(results, made), encoding="utf-8")
    return [f"{out / name}: {told}" for name, told in made]


def read_tested(path: Path) -> list[Tested]:
    """The test videos of a run, in their order."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Tested(row["video_id"], row["label"], row["prediction"], float(row[row["prediction"]]))
        for row in rows
    ]


def surest(tested: Sequence[Tested], right: bool) -> Tested:
    """The video that was answered with the highest probability among the right or wrong ones.

    Raises:
      ValueError: there is none.

    Example:
      >>> a, b = Tested("a", "x", "x", 0.6), Tested("b", "x", "y", 0.5)
      >>> surest([a, b], True).video_id, surest([a, b], False).video_id
      ('a', 'b')
    """
    fitting = [one for one in tested if (one.label == one.prediction) == right]
    if not fitting:
        raise ValueError(f"no test video was answered {'rightly' if right else 'wrongly'}")
    return max(fitting, key=lambda one: one.probability)


def _files(workdir: Path) -> dict[str, Path]:
    """Where the videos of a run lie."""
    from stf_jax.datasets import load_index
    from stf_jax.run import Run

    index = load_index(Run(workdir).settings().config.data)
    return {entry.video_id: Path(index.root) / entry.video_id for entry in index.entries}


# --- the timeline ------------------------------------------------------------------------------


def join(
    videos: Sequence[Path], path: Path, *, seconds: float, size: tuple[int, int]
) -> list[float]:
    """Writes the beginnings of several videos one after the other into one, 25 frames per second.

    Args:
      videos: files.
      path: of the new one.
      seconds: of each, or all of a shorter one.
      size: height and width of the new one, px.

    Returns:
      When each begins, and when the last one ends, seconds.
    """
    import av

    rate, number, begins = 25, 0, [0.0]
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, rate)
        for video in videos:
            with av.open(str(video)) as source:
                own = float(source.streams.video[0].average_rate or rate)
                for count, frame in enumerate(source.decode(video=0)):
                    if count >= own * seconds:
                        break
                    # Frames keep their time: those of another rate are repeated or left out.
                    while number < round(rate * (begins[-1] + (count + 1) / own)):
                        picture = frame.reformat(width=size[1], height=size[0], format="yuv420p")
                        picture.pts, picture.time_base = number, Fraction(1, rate)
                        target.mux(stream.encode(picture))
                        number += 1
            begins.append(number / rate)
        target.mux(stream.encode(None))
    return begins


def _timeline(
    explainer: Any, tested: Sequence[Tested], files: dict[str, Path], path: Path
) -> tuple[str, str]:
    """The labels over time of a video in which every class comes once."""
    from stf_jax.timeline import draw_timeline, pieces, segments
    from stf_jax.watch import Watcher, WindowSettings, open_input

    predictor = explainer.predictor
    settings, names = predictor.settings, predictor.class_names
    # The first test video of each class: not chosen by how well it went.
    shown = [next(one for one in tested if one.label == name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "joined.mp4"
        begins = join([files[one.video_id] for one in shown], video, seconds=5.0, size=(240, 320))
        watcher = Watcher(predictor, WindowSettings.parse("3s", "1s", settings.sampling))
        source = open_input(
            str(video), max_pixels=settings.records.max_pixels, live=False, timeout=10.0
        )
        made = pieces(list(watcher.watch(source)))
    truth = list(zip(names, begins[:-1], begins[1:], strict=True))
    title = "test videos of all classes, one after the other; framed: what they really show"
    draw_timeline(path, title, made, segments(made, names, 0.5), names, truth=truth)
    ids = ", ".join(one.video_id for one in shown)
    return path.name, f"the labels of a video joined from the first 5 s of {ids}"


# --- the explanations --------------------------------------------------------------------------


def mosaic(frames: np.ndarray, cells: int) -> np.ndarray:
    """Frames, uint8 `... h w 3`, as squares of their mean colours, `cells` along the shorter side.

    Example:
      >>> mosaic(np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, 2), 1)[..., 0].tolist()
      [[2, 2], [2, 2]]
    """
    height, width = frames.shape[-3:-1]
    side = -(-min(height, width) // cells)
    coarse = np.empty_like(frames)
    for top in range(0, height, side):
        for left in range(0, width, side):
            place = (..., slice(top, top + side), slice(left, left + side), slice(None))
            coarse[place] = np.rint(frames[place].mean(axis=(-3, -2), keepdims=True))
    return coarse


def _explained(explainer: Any, chosen: Tested, file: Path, path: Path) -> tuple[str, str]:
    from stf_jax.explain import draw, explain

    predictor = explainer.predictor
    settings, names = predictor.settings, predictor.class_names
    clip = predictor.clip(file)
    found = explain(explainer.network, explainer.params, clip, settings.inputs, settings.records)
    explained = list(found.values())[0]
    coarse = clip._replace(rgb=mosaic(np.asarray(clip.rgb), _CELLS))
    draw(explained, coarse, settings.records, names, path, truth=chosen.label)
    right = "rightly" if chosen.label == chosen.prediction else "wrongly"
    told = f"{chosen.video_id}, {right} taken for {chosen.prediction} ({chosen.probability:.1%})"
    return path.name, f"where the network looked in {told}"


# --- the report --------------------------------------------------------------------------------


def screenshot(workdir: Path, path: Path) -> tuple[str, str]:
    """The first sections of a run's report, in Chromium.

    Raises:
      FileNotFoundError: the report or the browser is not there.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    page = workdir / "report" / "index.html"
    if not page.exists():
        raise FileNotFoundError(f"{page} is missing: experiments/report.py writes it")
    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not found: `make browser` installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = str(places["chromium"])
    for switch in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(switch)
    with closing(_Browser(webdriver.Chrome(options, Service(places["chromedriver"])))) as browser:
        browser.open(page.resolve().as_uri(), 1000)
        browser.save(path)
    return path.name, "the first part of its report"


class _Browser:
    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, address: str, width: int) -> None:
        """Shows a page, of which only the chosen sections are left."""
        self._resize(width, 1000)
        self._driver.get(address)
        kept = ", ".join(f"#{name}" for name in _SECTIONS)
        height = self._driver.execute_script(
            """
            for (const part of document.querySelectorAll("section, nav"))
              if (!part.matches(arguments[0])) part.remove();
            for (const part of document.querySelectorAll("figure img, .film img"))
              part.style.filter = "blur(12px)";
            return document.documentElement.scrollHeight;
            """,
            kept,
        )
        self._resize(width, height)

    def _resize(self, width: int, height: int) -> None:
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)

    def save(self, path: Path) -> None:
        """Writes what is shown."""
        self._driver.save_screenshot(str(path))

    def close(self) -> None:
        """Ends the browser."""
        self._driver.quit()


def _page(results: dict[str, Any], made: Sequence[tuple[str, str]]) -> str:
    from stf_jax.run import deciding

    environment = results["environment"]
    settings = deciding(results["changes"])  # where things lay on a machine is nobody's business
    changes = "".join(f" --config.{key}={value}" for key, value in settings.items())
    low, high = results["interval95"]
    lines = [
        "# Gallery",
        "",
        f"Made by `experiments/gallery.py` from a run of `{results['config_file']}{changes}` on "
        f"real videos: {results['top1']:.1%} top-1 on {results['num_videos']} test videos "
        f"({low:.1%} to {high:.1%}), {results['protocol']}; commit {environment['commit']}, seed "
        f"{results['seed']}, {environment['machine']}. Frames are shown as mosaics, because the "
        "videos are other people's works; `experiments/explain.py` shows them as they are.",
        "",
    ]
    for name, told in made:
        lines += [f"![{told}]({name})", f"*{name}*: {told}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    # Only here: other programs that import this have flags of these names.
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("out", "docs/gallery", "Folder of the pictures.")
    host.use_huge_pages()
    app.run(main)
