"""The report: every number on the page, nothing from outside it, and what it says of gaps."""

import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stf_jax import curves, report

SCRIPT = Path(report.__file__).parent / "templates" / "report.js"
NASTY = "<script>alert('x')</script> & \"böse\""
NAMES = ["red ball", "slides left", NASTY]
# Rows are the truth. Of class 0, 3 of 4 are right and one is called class 2, and so on.
CONFUSION = [[3, 0, 1], [0, 4, 0], [2, 0, 2]]
VOID = {"meta", "link", "br", "img", "input"}
# Elements that a reader sees apart from what follows them.
APART = {"td", "th", "dt", "dd", "li", "p", "h2", "h3", "b", "span", "data", "summary"}


class Page(HTMLParser):
    """A parsed page: its elements with their text, and a check that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(text)
        assert not self._open, f"never closed: {[e['tag'] for e in self._open]}"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        assert self._open and self._open[-1]["tag"] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()
        if tag in APART:
            self.handle_data(" ")

    def handle_data(self, data):
        if self._open and self._open[-1]["tag"] == "script":
            self._open[-1]["text"] += data
            return
        for element in self._open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        return [
            e
            for e in self.elements
            if e["tag"] == tag
            and all(value in (e["attrs"].get(key) or "").split() for key, value in attrs.items())
        ]

    def text(self, section: str | None = None) -> str:
        (element,) = self.all("section", id=section) if section else self.all("body")
        return plain(element["text"])


def plain(text: str) -> str:
    """Text as it is read: runs of any white space, no-break spaces too, are one space."""
    return re.sub(r"\s+", " ", text.replace("\N{NO-BREAK SPACE}", " ")).strip()


def make_results(**changes: Any) -> dict[str, Any]:
    return {
        "top1": 0.75,
        "top5": 1.0,
        "mean_class_accuracy": 0.7512,
        "loss": 0.6931,
        "num_videos": 12,
        "interval95": [0.4677, 0.9111],
        "protocol": "official split 1",
        "leaky": False,
        "overlap": 0.0,
        "excluded": [
            {"video_id": "a/empty.avi", "subset": "test", "reason": "the file is empty"},
            {"video_id": f"a/{NASTY}.avi", "subset": "train", "reason": "no video stream"},
        ],
        "faults": [
            {"video_id": "fährt/x 1.mp4", "subset": "train", "reason": "cut short", "used": True}
        ],
        "notes": ["weights: none"],
        "class_names": NAMES,
        "confusion": CONFUSION,
        "seconds": {"prepare": 20.0, "look": 150.0, "join": 75.0, "evaluate": 5.0},
        "data": {
            "name": "demo",
            "root": "runs/demo/videos",
            "counts": {"train": 1288, "validation": 36, "test": 12},
        },
        "stages": [make_stage("look", 1e-3, 4, 3), make_stage("join", 1e-4, 2, 1)],
        "environment": {"commit": "abc1234", "jax": "0.10.0"},
        "config_file": "configs/demo.py:small",
        "seed": 17,
        "parameters": 1234567,
        "chance": 1 / 3,
        **changes,
    }


def make_stage(name: str, rate: float, epochs: int, best: int) -> dict[str, Any]:
    return {
        "name": name,
        "learning_rate": rate,
        "epochs": epochs,
        "steps": 9 * epochs,
        "best_epoch": best,
        "best_top1": None if name == "join" else 0.625,
        "stopped": "no rise for 2 epochs",
    }


def metric(stage: str, kind: str, epoch: int, loss: float, **changes: Any) -> str:
    row = {
        "stage": stage,
        "kind": kind,
        "epoch": epoch,
        "step": 9 * epoch,
        "loss": loss,
        "top1": 1 - loss / 4,
        "learning_rate": 1e-3 if stage == "look" else 1e-4,
        "num_videos": 36,
        "seconds": 10.0 * epoch,
    }
    return json.dumps(row | changes)


def metrics() -> list[str]:
    """Four epochs of the first stage and two of the second, losses falling steadily."""
    epochs = [("look", e, 2.0 - 0.25 * e) for e in (1, 2, 3, 4)]
    epochs += [("join", e, 0.5 - 0.125 * e) for e in (1, 2)]
    return [
        metric(stage, kind, epoch, loss + 0.25 * (kind == "validation"))
        for stage, epoch, loss in epochs
        for kind in ("train", "validation")
    ]


def scored_videos() -> list[list[Any]]:
    """Twelve videos with the confusion matrix above; the two mistakes of class 2 differ in size."""
    rows = []
    for truth, counts in enumerate(CONFUSION):
        for called, count in enumerate(counts):
            for i in range(count):
                best = 0.9 - 0.1 * i
                p = [(1 - best) / 2] * 3
                p[called] = best
                video_id = f"{NAMES[truth]}/{truth}{called}{i}.avi"
                right = int(truth == called)
                rows.append([video_id, NAMES[truth], NAMES[called], right, *p])
    return rows


def write_scores(workdir: Path, rows: list[list[Any]], names: list[str] = NAMES) -> None:
    with (workdir / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "label", "prediction", "correct", *names])
        writer.writerows(rows)


def write_sample(workdir: Path, name: str, video_id: str) -> None:
    """Twenty-four frames that brighten, and a motion of 2 px to the right everywhere."""
    (workdir / "samples").mkdir(exist_ok=True)
    frames = np.broadcast_to(
        np.arange(24, dtype=np.uint8)[:, None, None, None] * 10, (24, 16, 20, 3)
    )
    flow = np.zeros((24, 16, 20, 2), np.float32)
    flow[..., 0] = 2.0
    np.savez(workdir / "samples" / name, video_id=video_id, frames=frames, flow=flow)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(make_results()))
    (folder / "metrics.jsonl").write_text("\n".join(metrics()) + "\n")
    (folder / "config.json").write_text(json.dumps({"seed": 17, "model": {"levels": [1, 2, 4]}}))
    write_scores(folder, scored_videos())
    write_sample(folder, "0.npz", f"{NASTY}/200.avi")
    write_sample(folder, "1.npz", "red ball/000.avi")
    return folder


def render(workdir: Path, **changes: Any) -> Page:
    if changes:
        (workdir / "results.json").write_text(json.dumps(make_results(**changes)))
    return Page(report.write_report(workdir).read_text(encoding="utf-8"))


def circles(page: Page, panel: int) -> list[tuple[float, float]]:
    """Coordinates of the dots of one plot, in document order (legend and rings left out)."""
    start = [i for i, e in enumerate(page.elements) if e["tag"] == "svg"]
    plots = [i for i in start if page.elements[i]["attrs"].get("role") == "img"]
    end = next((i for i in plots if i > plots[panel]), len(page.elements))
    return [
        (float(e["attrs"]["cx"]), float(e["attrs"]["cy"]))
        for e in page.elements[plots[panel] : end]
        if e["tag"] == "circle" and e["attrs"].get("r") == "3"
    ]


def test_headline_and_facts(workdir):
    page = render(workdir)
    summary = page.text("summary")
    assert "75.0 %" in summary and "46.8 % to 91.1 %" in summary
    assert "12 videos of 3 classes" in summary and "official split 1" in summary
    assert "chance 33.3 %" in summary and "75.1 %" in summary and "0.693 nats" in summary
    assert "1,234,567" in summary and "weights: none" in summary
    assert "0.75" in [e["attrs"]["value"] for e in page.all("data")]
    assert page.all("title")[0]["text"] == "demo: 75.0\N{NO-BREAK SPACE}% top-1"
    data = page.text("data")
    assert "1,288" in data and "a/empty.avi test the file is empty" in data
    assert "fährt/x 1.mp4 train cut short yes" in data
    assert "No test video shares its source" in data


def test_stages_time_configuration_environment_commands(workdir):
    page = render(workdir)
    assert "look 0.001 4 36 3 62.5 % no rise for 2 epochs" in page.text("stages")
    assert "join 0.0001 2 18 1 n/a no rise" in page.text("stages")
    # 150 of 250 seconds.
    assert "look 2 min 30 s 60.0 %" in page.text("time")
    assert "all 4 min 10 s" in page.text("time")
    assert "model.levels [1, 2, 4]" in page.text("config")
    assert "commit abc1234" in page.text("environment")
    command = f"python -m stf_jax.main --config=configs/demo.py:small --workdir={workdir}"
    assert command in page.text("commands")
    assert f"python experiments/report.py --workdir={workdir}" in page.text("commands")


def test_hostile_names_are_text_everywhere(workdir):
    text = report.write_report(workdir).read_text(encoding="utf-8")
    assert text.count("<script") == 1
    page = Page(text)
    (script,) = page.all("script")
    assert script["text"] == SCRIPT.read_text(encoding="utf-8")
    for section in ("data", "confusion", "classes", "clips", "mistakes"):
        assert NASTY in page.text(section), section
    titles = [e["attrs"].get("title") or "" for e in page.all("td")]
    assert f"{NASTY}, called red ball: 2 of 4 (50.0 %)" in [plain(title) for title in titles]


def test_nothing_comes_from_outside_the_page(workdir):
    page = render(workdir)
    for element in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            target = element["attrs"].get(name)
            assert target is None or target.startswith(("data:", "#")), element
    assert page.all("img") and not page.all("iframe")
    assert not any("src" in e["attrs"] for e in page.all("script"))
    assert "url(" not in page.all("style")[0]["text"]
    assert "@import" not in page.all("style")[0]["text"]
    policies = [e["attrs"]["content"] for e in page.all("meta") if "http-equiv" in e["attrs"]]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.read_bytes()).digest()).decode()
    assert policies == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    ]
    ids = {e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]}
    links = [e["attrs"]["href"] for e in page.all("a")]
    assert len(links) > 5 and {link.removeprefix("#") for link in links} <= ids


def test_same_files_same_bytes(workdir):
    first = report.write_report(workdir).read_bytes()
    assert report.write_report(workdir).read_bytes() == first
    assert [path.name for path in (workdir / "report").iterdir()] == ["index.html"]


def test_confusion_matrix_counts_shares_and_hover(workdir):
    page = render(workdir)
    cells = [e for e in page.all("td") if "--a:" in (e["attrs"].get("style") or "")]
    assert [plain(e["text"]) for e in cells] == [
        "3 75 %", "1 25 %", "4 100 %", "2 50 %", "2 50 %",
    ]  # fmt: skip
    assert [("diagonal" in e["attrs"]["class"]) for e in cells] == [True, False, True, False, True]
    assert plain(cells[1]["attrs"]["title"]) == f"red ball, called {NASTY}: 1 of 4 (25.0 %)"
    # Strength of colour: 0.12 + 0.88 * share.
    assert [e["attrs"]["style"] for e in cells] == [
        "--a:0.78", "--a:0.34", "--a:1.0", "--a:0.56", "--a:0.56",
    ]  # fmt: skip
    first = f"{NASTY} called red ball: 2 of 4 (50.0 %) see clip 1"
    assert f"{first} red ball called {NASTY}: 1 of 4 (25.0 %)" in page.text("confusion")


def test_class_table(workdir):
    text = render(workdir).text("classes")
    # Class 0 is called five times, three times rightly; class 2 three times, twice rightly.
    assert f"red ball 4 75.0 % 60.0 % {NASTY} (1)" in text
    assert "slides left 4 100.0 % 100.0 % never mistaken" in text
    assert f"{NASTY} 4 50.0 % 66.7 % red ball (2)" in text


def test_class_without_videos_or_predictions_has_no_figure(workdir):
    text = render(workdir, confusion=[[4, 0, 0], [4, 0, 0], [0, 0, 0]]).text("classes")
    assert "slides left 4 0.0 % n/a red ball (4)" in text
    assert f"{NASTY} 0 n/a n/a never mistaken" in text


def test_101_classes(workdir):
    rng = np.random.default_rng(0)
    names = [f"Class{i:03d}" for i in range(101)]
    confusion = rng.multinomial(36, [0.01 / 100] * 100 + [0.99], size=101)
    for i, row in enumerate(confusion):
        row[[i, -1]] = row[[-1, i]]
    (workdir / "scores.csv").unlink()
    page = render(workdir, class_names=names, confusion=confusion.tolist(), num_videos=36 * 101)
    (table,) = page.all("table", **{"class": "dense"})
    assert table is not None
    heads = [e for e in page.all("th", scope="col") if plain(e["text"]) in names]
    assert [plain(e["text"]) for e in heads] == names
    coloured = [e for e in page.all("td") if "--a:" in (e["attrs"].get("style") or "")]
    assert len(coloured) == np.count_nonzero(confusion)
    right = [e for e in coloured if "diagonal" in e["attrs"]["class"]]
    assert len(right) == 101
    total = sum(int(re.search(r": (\d+) of 36", e["attrs"]["title"])[1]) for e in coloured)
    assert total == 36 * 101


def test_curves_lie_where_the_numbers_are(workdir):
    page = render(workdir)
    loss, top1 = circles(page, 0), circles(page, 1)
    assert len(loss) == len(top1) == 12
    # Six epochs span 50 to 508: epoch e of stage 1 lies at 50 + 458 e / 6, stage 2 starts at 4.
    train = [50 + 458 * e / 6 for e in (1, 2, 3, 4)]
    assert [x for x, _ in loss] == pytest.approx([*train, *train, *[431.7, 508] * 2], abs=0.06)
    # The largest loss is 2.0 (stage 1, validation, epoch 1), the axis ends there: 260 to 26.
    expected = [260 - 234 * v / 2 for v in (1.75, 1.5, 1.25, 1.0, 2.0, 1.75, 1.5, 1.25)]
    expected += [260 - 234 * v / 2 for v in (0.375, 0.25, 0.625, 0.5)]
    assert [y for _, y in loss] == pytest.approx(expected, abs=0.06)
    # Accuracy is 1 - loss / 4, so a smaller loss must lie higher: smaller y.
    values = [1.75, 1.5, 1.25, 1.0, 2.0, 1.75, 1.5, 1.25, 0.375, 0.25, 0.625, 0.5]
    assert [y for _, y in top1] == pytest.approx(
        [260 - 234 * (1 - v / 4) for v in values], abs=0.06
    )


def test_stage_boundary_learning_rates_and_kept_weights(workdir):
    page = render(workdir)
    boundaries = [e["attrs"]["x1"] for e in page.all("line", **{"class": "boundary"})]
    assert [float(x) for x in boundaries] == pytest.approx([50 + 458 * 4 / 6] * 2, abs=0.06)
    text = page.text("curves")
    assert "Stage 1, look: 4 epochs, learning rate 0.001" in text
    assert "Stage 2, join: 2 epochs, learning rate 0.0001" in text
    rings = page.all("circle", **{"class": "best"})
    # Epoch 3 of stage 1 and epoch 1 of stage 2, in both panels; one more ring is the legend's.
    xs = sorted({float(e["attrs"]["cx"]) for e in rings if e["attrs"]["r"] == "7"})
    assert xs == pytest.approx([50 + 458 * 3 / 6, 50 + 458 * 5 / 6], abs=0.06)


def test_one_epoch_has_a_curve_and_no_broken_epochs_on_the_axis(workdir):
    lines = [metric("look", kind, 1, 1.5) for kind in ("train", "validation")]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = render(workdir)
    assert [x for x, _ in circles(page, 0)] == [508, 508]
    middle = {"text-anchor": "middle"}
    assert [e["text"] for e in page.all("text", **middle)] == ["0", "1"] * 2


def test_axis_holds_the_largest_value():
    for high in (0.003, 0.07, 0.1, 0.95, 1.0, 2.1, 4.7, 99.0, 1234.5):
        ticks = curves.nice_ticks(0.0, high, 5)
        steps = np.diff(ticks)
        assert ticks[0] == 0.0 and ticks[-1] >= high > ticks[-2]
        assert np.allclose(steps, steps[0]) and 3 <= len(ticks) <= 7


def test_rewritten_rows_the_last_one_counts(workdir):
    lines = metrics()
    lines += [metric("look", "validation", 4, 1.0), metric("look", "validation", 4, 1.5)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    loss = circles(render(workdir), 0)
    assert len(loss) == 12
    assert loss[7] == pytest.approx((50 + 458 * 4 / 6, 260 - 234 * 1.5 / 2), abs=0.06)


def test_half_lines_are_left_out_and_said(workdir):
    lines = metrics()
    whole = "\n".join(lines)
    (workdir / "metrics.jsonl").write_text(whole + "\n" + lines[0][:40])
    page = render(workdir)
    assert len(circles(page, 0)) == 12
    assert "metrics.jsonl, line 13: an incomplete row" in page.text("summary")
    # A resumed run may go on in the very line where the killed one stopped.
    glued = [*lines[:3], lines[3][:30] + lines[3], *lines[4:]]
    (workdir / "metrics.jsonl").write_text("\n".join(glued) + "\n")
    page = render(workdir)
    assert len(circles(page, 0)) == 12
    assert "metrics.jsonl, line 4: an incomplete row" in page.text("summary")


def test_rows_of_steps_are_no_epochs_and_no_fault(workdir):
    step = json.dumps({"kind": "step", "stage": "look", "step": 3, "norms": {"rgb": 0.5}})
    (workdir / "metrics.jsonl").write_text("\n".join([step, *metrics(), step]) + "\n")
    page = render(workdir)
    assert len(circles(page, 0)) == 12
    assert "metrics.jsonl" not in page.text("summary")


def test_loss_that_is_not_finite_leaves_a_gap(workdir):
    lines = [*metrics(), metric("join", "train", 3, float("nan"), top1=0.5)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = render(workdir)
    assert len(circles(page, 0)) == 12 and len(circles(page, 1)) == 13
    assert "1 epochs have a loss that is not a finite number" in page.text("summary")


def test_what_is_no_test_is_not_called_one(workdir):
    assert "Not a test" not in render(workdir).text()
    assert "Top-1 accuracy on test videos" in render(workdir).text("summary")
    page = render(workdir, subset="validation", overlap=0.0)
    summary = page.text("summary")
    assert "Not a test. The figures are those of held-out training videos" in summary
    assert "Top-1 accuracy on held-out training videos" in summary
    assert "Top-1 accuracy on test videos" not in summary and "Held-out training videos" in summary
    assert "No held-out training video shares its source" in page.text("data")


def test_leaky_protocol_warns_wherever_an_accuracy_stands(workdir):
    calm = render(workdir)
    assert (
        not calm.all("strong", **{"class": "leak"}) and "leaky protocol" not in calm.text().lower()
    )
    page = render(workdir, leaky=True, overlap=0.989)
    (warning,) = page.all("p", **{"class": "warning"})
    assert "98.9 % of the test videos share their source" in plain(warning["text"])
    figure = page.all("p", **{"class": "figure"})[0]
    assert plain(figure["text"]) == "75.0 % leaky protocol"
    for section in ("data", "curves", "confusion", "classes", "clips", "mistakes", "stages"):
        assert "leaky protocol" in page.text(section), section
    captions = [plain(e["text"]) for e in page.all("figcaption")]
    assert captions[:2] == ["Loss (nats)", "Top-1 accuracy leaky protocol"]
    assert "leaky protocol" in page.all("title")[0]["text"]


def test_clips_show_frames_flow_and_guesses(workdir):
    page = render(workdir)
    text = page.text("clips")
    assert "✗ wrong called red ball" in text and "✓ right" in text
    # The first sample is video 0 of class 2 called class 0: 0.9 against twice 0.05.
    assert f"red ball 90.0 % slides left 5.0 % {NASTY} 5.0 %" in text
    assert "24 of 24" in text and "full at 2.0 px per frame" in text
    pictures = page.all("img")
    # All frames and flows of two clips, and the colour wheel; eight of each are printed.
    assert len(pictures) == 2 * 48 + 1
    moments = [e for e in page.all("li") if re.fullmatch(r"\d+( of 24)?", plain(e["text"]))]
    assert [int(plain(e["text"]).split()[0]) for e in moments] == [*range(1, 25)] * 2
    kept = [e for e in moments if "class" not in e["attrs"]]
    assert [int(plain(e["text"]).split()[0]) for e in kept] == [1, 4, 8, 11, 14, 17, 21, 24] * 2
    assert [e["attrs"]["alt"] for e in pictures[1:4:2]] == ["Frame 1", "Frame 2"]
    assert pictures[1]["attrs"]["src"].startswith("data:image/jpeg;base64,/9j/")
    assert pictures[1]["attrs"]["src"] != pictures[3]["attrs"]["src"]
    assert pictures[2]["attrs"]["src"] == pictures[4]["attrs"]["src"], "the motion is constant"


def test_picture_keeps_its_colours_and_is_shrunk():
    import io

    from PIL import Image

    image = np.zeros((320, 640, 3), np.uint8)
    image[:, :320] = (250, 20, 20)
    image[:, 320:] = (20, 20, 250)
    uri = report.picture_uri(image)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.size == (160, 80)
    assert np.allclose(picture.getpixel((20, 40)), (250, 20, 20), atol=12)
    assert np.allclose(picture.getpixel((140, 40)), (20, 20, 250), atol=12)


def test_mistakes_most_confident_first(workdir):
    page = render(workdir)
    rows = [plain(e["text"]) for e in page.all("code") if e["text"].endswith(".avi")]
    # 0.9 (class 0 called 2), 0.9 and 0.8 (class 2 called 0); ties keep the file's order.
    assert rows[-3:] == ["red ball/020.avi", f"{NASTY}/200.avi", f"{NASTY}/201.avi"]
    right = [row for row in scored_videos() if row[3]]
    write_scores(workdir, right)
    assert f"None: all {len(right)} test videos are right" in render(workdir).text("mistakes")


def test_mistakes_lead_to_their_clips(workdir):
    page = render(workdir)
    rows = [plain(e["text"]) for e in page.all("tr") if ".avi" in e["text"]]
    # Of the three mistakes one has a clip: it was called class 0, which is the first pair too.
    assert [row.endswith("not kept") for row in rows[-3:]] == [True, False, True]
    links = [e["attrs"]["href"] for e in page.all("a", **{"class": "to-clip"})]
    assert links == ["#clip-1", "#clip-1"]
    (clip,) = page.all("li", id="clip-1")
    assert f"{NASTY}/200.avi" in clip["text"]


def test_long_clip_shows_its_ends_and_at_most_so_many_pictures(workdir):
    frames = np.zeros((100, 8, 8, 3), np.uint8)
    flow = np.zeros((100, 8, 8, 2), np.float32)
    np.savez(workdir / "samples" / "0.npz", video_id="long.avi", frames=frames, flow=flow)
    (clip,) = render(workdir).all("li", id="clip-1")
    numbers = [int(n) for n in re.findall(r"\b\d+\b", plain(clip["text"]).partition("flow")[2])]
    assert report.MAX_FRAMES <= numbers.index(100) + 1 <= report.MAX_FRAMES + 8
    assert "100 of 100" in plain(clip["text"])


def test_further_figures_are_shown_where_there_are_any(workdir):
    plain_summary = render(workdir).text("summary")
    assert "Calibration" not in plain_summary and "Other scores" not in plain_summary
    scores = {"top1": 0.5, "top5": 1.0, "mean_class_accuracy": 0.625, "loss": 1.0}
    page = render(
        workdir,
        calibration_error=0.0875,
        calibration=[
            {"low": 0.5, "high": 0.75, "count": 0, "confidence": None, "accuracy": None},
            {"low": 0.75, "high": 1.0, "count": 12, "confidence": 0.85, "accuracy": 0.75},
        ],
        mean_class_interval95=[0.61, 0.89],
        recall_interval95=[[0.301, 0.954], None, [0.15, 0.85]],
        clip_level={"num_clips": 120, "top1": 0.7},
        streams={"without_flow": {"what": "shown no motion", **scores}},
    )
    summary = page.text("summary")
    assert "Calibration error 8.8 %" in summary
    assert "75.1 % 95 % interval 61.0 % to 89.0 %" in summary
    assert "Single clips: top-1 70.0 % of 120 clips" in summary
    assert "without_flow (shown no motion): top-1 50.0 % , top-5 100.0 %" in summary
    text = page.text("classes")
    assert "red ball 4 75.0 % 30.1 % to 95.4 % 60.0 %" in text
    assert "slides left 4 100.0 % n/a 100.0 %" in text
    assert "75 % to 100 % 12 85.0 % 75.0 %" in text and "50 % to 75 %" not in text


# --- Several runs --------------------------------------------------------------------------------


@pytest.fixture
def other(workdir: Path) -> Path:
    """A second run: one mistake of class 2 less, a setting changed, one stage, one more clip."""
    folder = workdir.parent / "other"
    folder.mkdir()
    stages = [make_stage("look", 3e-4, 4, 2)]
    results = make_results(
        top1=10 / 12, confusion=[[3, 0, 1], [0, 4, 0], [1, 0, 3]], seed=23, stages=stages,
        environment={"commit": "fff0000", "jax": "0.10.0", "gpu": "H100"},
    )  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("\n".join(metrics()[:8]) + "\n")
    (folder / "config.json").write_text(json.dumps({"seed": 23, "model": {"levels": [1, 2, 4]}}))
    rows = scored_videos()
    # The less certain of the two mistakes of class 2 is none here.
    wrong = next(row for row in rows if row[0] == f"{NASTY}/201.avi")
    wrong[2:] = [NASTY, 1, 0.1, 0.1, 0.8]
    write_scores(folder, rows)
    write_sample(folder, "0.npz", "red ball/000.avi")
    write_sample(folder, "1.npz", "slides left/110.avi")
    return folder


def compare(*workdirs: Path) -> Page:
    out = workdirs[0].parent / "compare.html"
    assert report.write_report(*workdirs, out=out) == out
    return Page(out.read_text(encoding="utf-8"))


def test_runs_stand_side_by_side(workdir, other):
    page = compare(workdir, other)
    assert page.all("title")[0]["text"].replace("\xa0", " ") == "2 runs: run 75.0 %, other 83.3 %"
    summary = page.text("summary")
    assert "Figure run other Top-1 accuracy 75.0 % 83.3 %" in summary
    assert "Seed 17 23" in summary
    # 9 videos are right in both, one only in the other.
    assert "Of the 12 videos that every run scored, 9 are right in all and 2 in none" in summary
    assert "0 only in run ; 1 only in other" in summary
    assert "train 1,288 1,288" in page.text("data")
    assert len(page.all("table", **{"class": "matrix"})) == 2
    assert f"{NASTY} 4 50.0 % 75.0 % +25.0 points 66.7 % 75.0 %" in page.text("classes")
    assert "other look 0.0003 4 36 2" in page.text("stages")
    time = page.text("time")
    assert "look 2 min 30 s 2 min 30 s" in time and "all 4 min 10 s 4 min 10 s" in time
    command = f"--workdir={workdir} --workdir={other} --out={workdir.parent / 'compare.html'}"
    assert command in page.text("commands")


def test_settings_that_differ_are_marked(workdir, other):
    page = compare(workdir, other)
    rows = {plain(e["text"]): e["attrs"].get("class") for e in page.all("tr") if e["text"].strip()}
    assert rows["seed 17 23"] == "differs" and rows["model.levels [1, 2, 4] [1, 2, 4]"] is None
    assert rows["commit abc1234 fff0000"] == "differs" and rows["jax 0.10.0 0.10.0"] is None
    assert rows["gpu not there H100"] == "differs"


def test_curves_of_runs_share_their_axes(workdir, other):
    page = compare(workdir, other)
    lines = [e["attrs"] for e in page.all("g") if "data-run" in e["attrs"]]
    per_panel = [("run-1", "train"), ("run-1", "validation")] * 2
    per_panel += [("run-2", "train"), ("run-2", "validation")]
    assert [(a["data-run"], a["data-kind"]) for a in lines] == per_panel * 2
    loss = circles(page, 0)
    assert len(loss) == 12 + 8 and loss[12:] == loss[:8], "the same numbers lie in the same place"
    # They were not trained in the same stages, so no boundary holds for both.
    assert not page.all("line", **{"class": "boundary"})
    text = page.text("curves")
    assert "run: stage 2, join: 2 epochs" in text.replace(" :", ":")
    titles = [e["text"] for e in page.all("title")]
    assert any(title.startswith("other, look, epoch 1, train") for title in titles)


def test_a_clip_is_shown_once_with_what_each_run_says(workdir, other):
    page = compare(workdir, other)
    clips = [plain(e["text"]) for e in page.all("li") if "clip-" in (e["attrs"].get("id") or "")]
    assert [re.search(r"\S*( \S+)?\.avi", clip)[0].split("/")[-1] for clip in clips] == [
        "200.avi", "000.avi", "110.avi",
    ]  # fmt: skip
    assert "as run saw it" in clips[0] and "as other saw it" in clips[1]
    assert clips[0].count("✗ wrong") == 2 and clips[1].count("✓ right") == 2


def test_runs_on_other_videos_are_said(workdir, other):
    write_scores(other, scored_videos()[:6])
    assert "Only 6 were scored by every run, 6 by some" in compare(workdir, other).text("summary")
    names = ["red ball", "slides left", "else"]
    results = json.loads((other / "results.json").read_text()) | {"class_names": names}
    (other / "results.json").write_text(json.dumps(results))
    rows = [[f"o/{i}.avi", "else", "else", 1, 0.0, 0.0, 1.0] for i in range(3)]
    write_scores(other, rows, names)
    page = compare(workdir, other)
    assert "No video was scored by every run" in page.text("summary")
    assert "else 4 n/a 75.0 % n/a n/a 75.0 %" in page.text("classes")


def test_runs_are_told_apart_and_counted(workdir, other, tmp_path):
    twin = tmp_path / "deep" / "run"
    twin.parent.mkdir()
    other.rename(twin)
    assert f"Figure {tmp_path.name}/run deep/run" in compare(workdir, twin).text("summary")
    with pytest.raises(ValueError, match="a run is given twice"):
        report.write_report(workdir, workdir, out=tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"Add --out=compare\.html"):
        report.write_report(workdir, twin)
    many = [tmp_path / str(i) for i in range(9)]
    with pytest.raises(ValueError, match="9 runs; a page has room for 8"):
        report.write_report(*many, out=tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_missing_optional_files_are_said(workdir):
    for name in ("metrics.jsonl", "scores.csv", "config.json"):
        (workdir / name).unlink()
    for path in (workdir / "samples").iterdir():
        path.unlink()
    (workdir / "samples").rmdir()
    page = render(workdir)
    assert "No curves" in page.text("curves") and "metrics.jsonl" in page.text("curves")
    assert "scores.csv is missing" in page.text("mistakes")
    assert "config.json is missing" in page.text("config")
    assert "No clips" in page.text("clips")
    assert "75.0 %" in page.text("summary")


def test_damaged_sample_is_said_and_the_others_shown(workdir):
    whole = (workdir / "samples" / "0.npz").read_bytes()
    (workdir / "samples" / "0.npz").write_bytes(whole[: len(whole) // 2])
    page = render(workdir)
    assert "samples/0.npz cannot be read" in page.text("summary")
    assert len(page.all("img")) == 48 + 1


def test_sample_without_scores_is_shown_without_guesses(workdir):
    write_sample(workdir, "1.npz", "elsewhere.avi")
    text = render(workdir).text("clips")
    assert "Class not known elsewhere.avi" in text and "has no row for this clip" in text


def test_file_name_that_is_no_text_still_makes_a_page(workdir):
    page = render(workdir, excluded=[{"video_id": "f\udce4", "subset": "test", "reason": "odd"}])
    assert "f\\udce4 test odd" in page.text("data")


def test_missing_results_name_the_file_and_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json is missing") as error:
        report.write_report(tmp_path)
    assert f"python -m stf_jax.main --config=... --workdir={tmp_path}" in str(error.value)


def test_wrong_files_are_named(workdir):
    rows = scored_videos()
    rows[3][1] = "no such class"
    write_scores(workdir, rows)
    with pytest.raises(ValueError, match=r"scores\.csv, row 5: 'no such class' is not in list"):
        report.write_report(workdir)
    write_scores(workdir, [row[:6] for row in scored_videos()])
    with pytest.raises(ValueError, match=r"row 2: 2 probabilities for 3 classes"):
        report.write_report(workdir)
    write_scores(workdir, scored_videos(), [*NAMES[:2], "other"])
    with pytest.raises(ValueError, match=r"scores\.csv: the header should be"):
        report.write_report(workdir)
    (workdir / "results.json").write_text('{"top1": 0.5')
    with pytest.raises(ValueError, match=r"results\.json is not valid JSON"):
        report.write_report(workdir)
    (workdir / "results.json").write_text('{"top1": 0.5}')
    with pytest.raises(ValueError, match=r"results\.json lacks top5, mean_class_accuracy"):
        report.write_report(workdir)
    results = make_results(confusion=[[1, 2], [3, 4]])
    (workdir / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"'confusion' should be 3 x 3"):
        report.write_report(workdir)


def test_script_prints_the_path_or_what_is_missing(workdir, tmp_path):
    script = Path(__file__).parents[1] / "experiments" / "report.py"
    (workdir / "samples" / "0.npz").unlink()
    (workdir / "samples" / "1.npz").unlink()

    def call(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), f"--workdir={folder}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = call(workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(workdir / "report" / "index.html")
    assert Path(done.stdout.strip()).stat().st_size > 10_000
    page = tmp_path / "pages" / "one.html"
    elsewhere = [sys.executable, str(script), f"--workdir={workdir}", f"--out={page}"]
    assert subprocess.run(elsewhere, capture_output=True, text=True, check=True).stdout.strip() == (
        str(page)
    )
    assert page.read_bytes() == Path(done.stdout.strip()).read_bytes()
    failed = call(tmp_path)
    assert failed.returncode == 1
    assert "results.json is missing" in failed.stderr and "Traceback" not in failed.stderr
