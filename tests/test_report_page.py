"""The report in a real browser: every control is used, and what it changes is looked at."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_report import (
    NASTY,
    make_results,
    metric,
    metrics,
    scored_videos,
    write_sample,
    write_scores,
)

from stf_jax import report

CLASSES = ["red ball", "slides left", NASTY]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, and that of two."""
    root = tmp_path_factory.mktemp("pages")
    one, two = root / "one", root / "two"
    for folder, seed in ((one, 17), (two, 23)):
        folder.mkdir()
        results = make_results(seed=seed, leaky=True, overlap=0.5)
        (folder / "results.json").write_text(json.dumps(results))
        rows = [*metrics(), *(metric("join", "train", epoch, 0.1) for epoch in range(3, 11))]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        config = {"seed": seed, "stages": {"look": {"rate": 0.1}}, "levels": [1, 2, 4]}
        (folder / "config.json").write_text(json.dumps(config))
        write_scores(folder, scored_videos())
        write_sample(folder, "0.npz", f"{NASTY}/200.avi")
        write_sample(folder, "1.npz", "red ball/000.avi")
    both = report.write_report(one, two, out=root / "both.html")
    return SimpleNamespace(one=report.write_report(one), both=both)


class Reader:
    """Somebody who looks at a page: how it is asked, pointed at and typed into."""

    def __init__(self, driver, pages):
        self.driver, self._pages = driver, pages

    def open(self, name="one", *, width=1200, media="screen", **features):
        """Shows a page anew; `features` are what the reader prefers, such as the dark."""
        told = [{"name": f"prefers-{k.replace('_', '-')}", "value": v} for k, v in features.items()]
        self.command("Emulation.setEmulatedMedia", media=media, features=told)
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.driver.get(getattr(self._pages, name).as_uri())
        return self

    def command(self, name, **parameters):
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector, number=0):
        return self.driver.find_elements("css selector", selector)[number]

    def texts(self, selector):
        script = """return [...document.querySelectorAll(arguments[0])].map(
          e => e.innerText ?? e.textContent)"""
        return [" ".join(text.split()) for text in self.run(script, selector)]

    def shown(self, selector):
        """Whether each element can be seen, as far as styles tell."""
        script = """return [...document.querySelectorAll(arguments[0])].map(
          e => e.checkVisibility({visibilityProperty: true}) &&
            getComputedStyle(e).display !== 'none')"""
        return self.run(script, selector)

    def click(self, selector, number=0):
        element = self.find(selector, number)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()
        return element

    def press(self, *keys):
        """Types keys by name: 'Tab', 'ArrowLeft', '+'."""
        from selenium.webdriver import ActionChains, Keys

        chain = ActionChains(self.driver, duration=0)
        for key in keys:
            named = {"ArrowLeft": Keys.ARROW_LEFT, "ArrowRight": Keys.ARROW_RIGHT,
                     "ArrowUp": Keys.ARROW_UP, "ArrowDown": Keys.ARROW_DOWN, "Tab": Keys.TAB,
                     "Enter": Keys.ENTER, "Space": Keys.SPACE, "Home": Keys.HOME, "End": Keys.END,
                     "Backspace": Keys.BACKSPACE,
                     "PageUp": Keys.PAGE_UP, "PageDown": Keys.PAGE_DOWN, "Escape": Keys.ESCAPE,
                     }  # fmt: skip
            chain.send_keys(named[key] if key in named else key)
        chain.perform()

    def focus(self, selector, number=0):
        self.run("arguments[0].focus()", self.find(selector, number))

    def place(self, selector, x=0.5, y=0.5):
        """The point of the window that lies so far into an element, which is scrolled there."""
        script = """const e = document.querySelector(arguments[0]);
          e.scrollIntoView({block: 'center', behavior: 'instant'});
          const b = e.getBoundingClientRect();
          return [b.left + arguments[1] * b.width, b.top + arguments[2] * b.height]"""
        return [round(v) for v in self.run(script, selector, x, y)]

    def drag(self, selector, start, stop, *, key=None, touch=False):
        """Drags from one point of an element to another, with the mouse or a finger."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        points = [self.place(selector, *point) for point in (start, stop)]
        pointer = PointerInput("touch" if touch else "mouse", "finger" if touch else "hand")
        actions = ActionBuilder(self.driver, mouse=pointer, duration=0)
        if key:
            actions.key_action.key_down(key)
            actions.pointer_action.pause()
        actions.pointer_action.move_to_location(*points[0]).pointer_down()
        if key:
            actions.key_action.pause().pause()
        actions.pointer_action.move_to_location(*points[1]).pointer_up()
        actions.perform()
        if key:
            actions.clear_actions()

    def wheel(self, selector, x, y, amount):
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        left, top = self.place(selector, x, y)
        actions = ActionBuilder(self.driver, duration=0)
        actions.wheel_action.scroll(left, top, 0, amount, duration=0)
        actions.perform()

    def hover(self, selector, number=0):
        from selenium.webdriver import ActionChains

        element = self.find(selector, number)
        # A page that is still scrolling takes its tip away.
        self.run(
            """arguments[0].scrollIntoView({block: 'center', behavior: 'instant'});
          return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))""",
            element,
        )
        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def wait(self, condition):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 5, poll_frequency=0.02).until(lambda _: condition())

    @property
    def tip(self):
        (text,) = self.texts("#tip")
        return text if self.shown("#tip") == [True] else None


@pytest.fixture
def reader(browser, pages):
    """A reader of the pages; fails whatever asks the network or complains on the console."""
    reader = Reader(browser, pages)
    yield reader
    reader.command("Emulation.setScriptExecutionDisabled", value=False)
    asked = {
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    }
    outside = {url for url in asked if not url.startswith("data:")}
    assert outside <= {page.as_uri() for page in vars(pages).values()}
    assert browser.get_log("browser") == []


FIRST = ".plot:first-of-type "
TOLD = ".plot .told"


def dots(reader):
    """Where the dots of the first plot are drawn, as [x, y]."""
    script = """return [...document.querySelector('.plot').querySelectorAll('circle[r="3"]')].map(
      c => [Number(c.getAttribute('cx')), Number(c.getAttribute('cy'))])"""
    return reader.run(script)


def view(reader):
    """What the first plot shows: first and last epoch, lowest and highest loss."""
    words = reader.texts(TOLD)[0].removesuffix(".")
    return [float(number) for number in re.findall(r"[\d.]+", words)]


def test_buttons_zoom_and_move_the_curves(reader):
    reader.open()
    before = dots(reader)
    assert reader.texts(TOLD) == ["All is shown."] * 2
    reader.click('.plot [data-act="in"]')
    # Half as much is shown: 14 epochs, losses to 2, about the middle.
    assert reader.texts(TOLD) == ["Shown: epochs 3.5 to 10.5, 0.5 to 1.5.", "All is shown."]
    for (x, y), (old_x, old_y) in zip(dots(reader), before, strict=True):
        assert x == pytest.approx(279 + 2 * (old_x - 279), abs=0.02)
        assert y == pytest.approx(143 + 2 * (old_y - 143), abs=0.02)
    reader.click('.plot [data-act="left"]')
    assert reader.texts(TOLD)[0].startswith("Shown: epochs 1.8 to 8.8")
    for _ in range(3):
        reader.click('.plot [data-act="right"]')
    assert reader.texts(TOLD)[0].startswith("Shown: epochs 7.0 to 14.0"), "stops at the border"
    assert reader.texts('.plot [data-act="reset"]')[0] == "Reset"
    reader.click('.plot [data-act="out"]')
    assert reader.texts(TOLD)[0] == "All is shown." and dots(reader) == before
    for _ in range(9):
        reader.click('.plot [data-act="in"]')
    assert reader.find('.plot [data-act="in"]').get_attribute("aria-disabled") == "true"
    reader.click('.plot [data-act="reset"]')
    assert reader.texts(TOLD)[0] == "All is shown." and dots(reader) == before


def test_axes_follow_the_zoom(reader):
    reader.open()
    labels = reader.texts(".plot:first-of-type .marks text")
    assert [text for text in labels if text] == ["0", "0.5", "1", "1.5", "2", "0", "5", "10"]
    reader.click('.plot [data-act="in"]')
    labels = reader.texts(".plot:first-of-type .marks text")
    assert labels == ["0.6", "0.8", "1", "1.2", "1.4", "4", "6", "8", "10"]


def test_keys_zoom_and_move_the_curves(reader):
    reader.open()
    reader.focus(".plot .picture")
    reader.press("+")
    assert reader.texts(TOLD)[0] == "Shown: epochs 3.5 to 10.5, 0.5 to 1.5."
    reader.press("ArrowRight")
    assert reader.texts(TOLD)[0] == "Shown: epochs 5.3 to 12.3, 0.5 to 1.5."
    reader.press("ArrowUp")
    assert reader.texts(TOLD)[0] == "Shown: epochs 5.3 to 12.3, 0.75 to 1.75."
    reader.press("ArrowLeft", "ArrowDown", "-")
    assert reader.texts(TOLD)[0] == "All is shown."
    for key in ("0", "Home"):
        reader.press("+", key)
        assert reader.texts(TOLD)[0] == "All is shown."


def test_the_wheel_zooms_a_plot_only_once_it_is_chosen(reader):
    reader.open()
    reader.run("document.documentElement.style.scrollBehavior = 'auto'")
    reader.wheel(".plot .frame", 0.25, 0.5, -100)
    assert reader.texts(TOLD)[0] == "All is shown.", "the page scrolls"
    reader.focus(".plot .picture")
    reader.wheel(".plot .frame", 0.25, 0.5, -100)
    # What lies under the pointer, epoch 3.5 and loss 1, stays there.
    reader.wait(lambda: reader.texts(TOLD)[0] == "Shown: epochs 0.7 to 11.9, 0.2 to 1.8.")
    reader.wheel(".plot .frame", 0.25, 0.5, 100)
    reader.wait(lambda: reader.texts(TOLD)[0] == "All is shown.")


def test_a_drag_looks_into_a_part_and_moves_it(reader):
    from selenium.webdriver import ActionChains, Keys

    reader.open()
    reader.drag(".plot .frame", (0.5, 0.5), (0.75, 1.0))
    # To a pixel: the right half of the width but for its last quarter, the lower half.
    assert view(reader) == pytest.approx([7, 10.5, 0, 1], abs=0.06)
    reader.drag(".plot .frame", (0.6, 0.5), (0.1, 0.5), key=Keys.SHIFT)
    assert view(reader) == pytest.approx([8.75, 12.25, 0, 1], abs=0.06)
    ActionChains(reader.driver, duration=0).double_click(reader.find(".plot .picture")).perform()
    assert reader.texts(TOLD)[0] == "All is shown."
    # A finger scrolls the page until there is something to move.
    reader.drag(".plot .frame", (0.25, 0.5), (0.75, 0.5), touch=True)
    assert reader.texts(TOLD)[0] == "All is shown."
    reader.click('.plot [data-act="in"]')
    reader.drag(".plot .frame", (0.25, 0.5), (0.75, 0.5), touch=True)
    assert view(reader) == pytest.approx([0, 7, 0.5, 1.5], abs=0.06)


def test_dots_tell_their_numbers(reader):
    reader.open().hover('.plot circle[r="3"]')
    assert reader.tip.startswith("look, epoch 1, train: loss 1.750, top-1 56.2 % of 36 videos")
    reader.press("Escape")
    assert reader.tip is None


def test_boxes_hide_curves(reader):
    reader.open("both")
    lines = ".plot:first-of-type [data-run]"
    kinds = reader.run(
        "return [...document.querySelectorAll(arguments[0])].map(g => [g.dataset.run, "
        "g.dataset.kind])", lines
    )  # fmt: skip
    assert len(kinds) == 8 and reader.shown(lines) == [True] * 8
    reader.click('[data-toggle="train"]')
    assert reader.shown(lines) == [kind != "train" for _, kind in kinds]
    reader.click('[data-toggle="run-2"]')
    assert reader.shown(lines) == [(run, kind) == ("run-1", "validation") for run, kind in kinds]
    for name in ("train", "run-2", "validation", "run-1"):
        reader.click(f'[data-toggle="{name}"]')
    assert reader.shown(lines) == [(run, kind) == ("run-2", "train") for run, kind in kinds]


def test_confusion_cells_tell_counts_and_shares(reader):
    reader.open().hover(".matrix td", 2)
    assert reader.tip == f"red ball, called {NASTY}: 1 of 4 (25.0 %)"
    assert reader.texts(".matrix tr.here th") == ["red ball"]
    assert reader.texts(".matrix thead .here") == [NASTY]
    reader.hover("h1")
    assert reader.tip is None and reader.texts(".matrix .here") == []


def test_confusion_cells_by_keyboard(reader):
    reader.open().focus(".matrix td")
    assert reader.tip == "red ball, rightly called red ball: 3 of 4 (75.0 %)"
    expected = {
        "ArrowRight": "red ball, called slides left: 0 of 4 (0.0 %)",
        "ArrowDown": "slides left, rightly called slides left: 4 of 4 (100.0 %)",
        "End": f"slides left, called {NASTY}: 0 of 4 (0.0 %)",
        "PageDown": f"{NASTY}, rightly called {NASTY}: 2 of 4 (50.0 %)",
        "Home": f"{NASTY}, called red ball: 2 of 4 (50.0 %)",
        "ArrowUp": "slides left, called red ball: 0 of 4 (0.0 %)",
        "PageUp": "red ball, rightly called red ball: 3 of 4 (75.0 %)",
        "ArrowLeft": "red ball, rightly called red ball: 3 of 4 (75.0 %)",
    }
    for key, text in expected.items():
        reader.press(key)
        assert reader.tip == text, key
        assert reader.texts(".matrix tr.here th") == [text.split(",")[0]]
    label = reader.run("return document.activeElement.getAttribute('aria-label')")
    assert label.replace("\N{NO-BREAK SPACE}", " ") == reader.tip
    assert len(reader.driver.find_elements("css selector", ".matrix td[tabindex='0']")) == 1
    reader.press("Escape")
    assert reader.tip is None
    reader.click(".matrix td", 4)
    assert reader.tip == expected["ArrowDown"]


def column(reader, number):
    return reader.texts(f"#class-table tbody tr > :nth-child({number})")


def test_class_table_sorts_by_click_and_key(reader):
    reader.open()
    sorts = "return [...document.querySelectorAll('#class-table th')].map(h => h.ariaSort)"
    assert column(reader, 1) == CLASSES
    reader.click("#class-table .sort", 2)  # recall: 75, 100, 50 %
    assert column(reader, 3) == ["100.0 %", "75.0 %", "50.0 %"]
    assert reader.run(sorts)[:5] == [None, None, "descending", None, None]
    reader.press("Enter")
    assert column(reader, 3) == ["50.0 %", "75.0 %", "100.0 %"]
    assert reader.run(sorts)[2] == "ascending"
    reader.press("Space")
    assert column(reader, 1) == CLASSES and reader.run(sorts)[2] is None
    reader.click("#class-table .sort", 0)
    assert column(reader, 1) == sorted(CLASSES, key=str.lower)
    assert reader.run(sorts)[0] == "ascending"
    reader.click("#class-table .sort", 4)
    assert column(reader, 5) == [f"{NASTY} (1)", "never mistaken", "red ball (2)"]
    assert reader.run(sorts)[0] is None


def test_every_sortable_column_sorts(reader):
    reader.open("both")
    reader.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    for table in reader.driver.find_elements("css selector", "table.sortable"):
        for head in table.find_elements("css selector", "thead th"):
            button = head.find_element("css selector", "button.sort")
            reader.run(
                "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", button
            )
            assert head.get_attribute("aria-sort") in ("ascending", "descending")


def screens(reader, clip=1):
    script = """return [...document.querySelectorAll(`#clip-${arguments[0]} .screen img`)].map(
      i => [i.alt, i.src, i.complete && i.naturalWidth])"""
    return reader.run(script, clip)


def test_clips_play_pause_and_scrub(reader):
    reader.open()
    moment = lambda: reader.texts("#clip-1 .moment")[0]  # noqa: E731
    (frame, flow), play = screens(reader), "#clip-1 .play"
    assert (frame[0], flow[0], moment()) == ("Frame 1", "Flow at frame 1", "1 of 24")
    assert frame[2] == 20 and flow[2] == 20, "the pictures are whole"
    button = reader.click(play)
    assert button.get_attribute("aria-pressed") == "true" and reader.texts(play) == ["Pause clip 1"]
    reader.wait(lambda: moment() == "3 of 24")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert reader.texts(play) == ["Play clip 1"]
    rest = screens(reader)
    assert rest[0][1] != frame[1] and rest[0][0] == f"Frame {moment().split()[0]}"
    slider = reader.find("#clip-1 .scrub")
    reader.focus("#clip-1 .scrub")
    reader.press("End")
    assert moment() == "24 of 24" and screens(reader)[0][0] == "Frame 24"
    reader.press("ArrowLeft", "ArrowLeft")
    assert moment() == "22 of 24" and slider.get_attribute("aria-valuetext") == "Frame 22 of 24"
    reader.drag("#clip-1 .scrub", (0.02, 0.5), (0.98, 0.5))
    assert int(moment().split()[0]) > 22
    # A hand on the slider stops the clip.
    reader.click(play)
    reader.focus("#clip-1 .scrub")
    reader.press("Home")
    assert reader.find(play).get_attribute("aria-pressed") == "false" and moment() == "1 of 24"


def test_all_clips_play_at_once(reader):
    reader.open()
    pressed = "return [...document.querySelectorAll('.play')].map(b => b.ariaPressed)"
    reader.click("#play-all")
    assert reader.run(pressed) == ["true"] * 2 and reader.texts("#play-all") == ["Pause all clips"]
    reader.wait(lambda: reader.texts(".moment")[1] == "2 of 24")
    reader.click(".play", 0)
    assert reader.texts("#play-all") == ["Pause all clips"], "one still plays"
    reader.click("#play-all")
    assert reader.run(pressed) == ["false"] * 2 and reader.texts("#play-all") == ["Play all clips"]


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_mistake_leads_to_its_clip(reader, motion):
    reader.open(reduced_motion=motion)
    reader.run("document.documentElement.style.scrollBehavior = 'auto'")
    link = reader.click("#mistakes .to-clip")
    assert link.text == "see clip 1"
    assert reader.run("return document.activeElement.id") == "clip-1"
    box = reader.run("return document.getElementById('clip-1').getBoundingClientRect().top")
    assert -1 <= box < 400
    # It moves by itself only for those who did not ask for calm, who may still start it.
    pressed = reader.find("#clip-1 .play").get_attribute("aria-pressed")
    assert pressed == ("true" if motion == "no-preference" else "false")
    if motion == "reduce":
        reader.click("#clip-1 .play")
        reader.wait(lambda: reader.texts("#clip-1 .moment")[0] == "2 of 24")
    reader.open(reduced_motion=motion)
    reader.click("#confusion .to-clip")
    assert reader.run("return document.activeElement.id") == "clip-1"


def test_configuration_is_filtered(reader):
    reader.open()
    reader.focus("#config summary")
    reader.press("Enter")
    rows = "#config-table tbody tr"
    assert reader.shown(rows) == [True] * 3 and reader.texts(".filter output") == ["3 of 3 shown"]
    reader.click(".filter input[type=search]")
    reader.press(*"Look rate")
    assert reader.shown(rows) == [False, True, False]
    assert reader.texts(".filter output") == ["1 of 3 shown"]
    reader.press(*["Backspace"] * len("look rate"))
    assert reader.shown(rows) == [True] * 3
    reader.press(*"nothing so")
    assert reader.texts(".filter output") == ["0 of 3 shown"]


def test_runs_show_what_differs_and_all(reader):
    reader.open("both")
    assert reader.shown("#config-table tbody tr") == [True, False, False]
    reader.click("#config .filter input[type=checkbox]")
    assert reader.shown("#config-table tbody tr") == [True] * 3
    reader.click("#config .filter input[type=checkbox]")
    assert reader.texts("#config .filter output") == ["1 of 3 shown"]
    assert reader.texts("#environment p") == ["The same for all runs."]


def test_links_of_the_contents_lead_to_their_sections(reader):
    reader.open(reduced_motion="reduce")
    for link in reader.driver.find_elements("css selector", "nav a"):
        target = link.get_attribute("href").partition("#")[2]
        reader.run("scrollTo(0, 0)")
        link.click()
        top = f"return document.getElementById('{target}').getBoundingClientRect().top"
        # The last sections cannot come to the top of a window that is higher than them.
        assert -1 <= reader.run(top) < 800, target


def test_everything_is_reached_by_keyboard_and_seen(reader):
    reader.open()
    reader.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    wanted = reader.run("""
      const all = [...document.querySelectorAll(
        'a[href], button, input, summary, [tabindex="0"]')];
      all.forEach((e, i) => e.dataset.stop = i);
      return all.filter(e => e.checkVisibility()).map(e => e.dataset.stop)""")
    seen, bare = [], []
    script = """const e = document.activeElement, s = getComputedStyle(e);
      const outlined = s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2;
      return [e.dataset.stop ?? null, outlined]"""
    for _ in range(len(wanted) + 1):
        reader.press("Tab")
        stop, outlined = reader.run(script)
        if stop is None:
            break
        seen.append(stop)
        if not outlined:
            bare.append(stop)
    assert set(wanted) <= set(seen) and not bare


@pytest.mark.parametrize("name", ["one", "both"])
def test_a_phone_does_not_scroll_sideways(reader, name):
    reader.open(name, width=360)
    reader.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    sizes = "return [document.documentElement.scrollWidth, innerWidth]"
    assert reader.run(sizes) == [360, 360]
    # Wide tables scroll in boxes of their own, within the page.
    boxes = reader.run("""return [...document.querySelectorAll('.scroll')].map(
      b => [b.scrollWidth > b.clientWidth, b.getBoundingClientRect().right <= 360,
            getComputedStyle(b).overflowX])""")
    assert any(wide for wide, _, _ in boxes)
    assert all(inside and overflow == "auto" for _, inside, overflow in boxes)
    small = reader.run("""return [...document.querySelectorAll('button:not(.sort), .scrub')]
      .filter(b => b.checkVisibility()).map(b => b.getBoundingClientRect().height)
      .filter(h => h < 32)""")
    assert small == [], "fingers are not that thin"


# The colours of all text and what lies behind them, as the browser mixes them; returns what is
# harder to read than WCAG 2.1 AA allows (4.5 to 1, and 3 to 1 for large text).
FAINT = """
const rgba = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const behind = (e) => {
  const layers = [];
  for (; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255, 1]);
};
const light = (c) => {
  const [r, g, b] = c.map((v) => v / 255).map(
    (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const faint = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !e.checkVisibility()) continue;
  if (e.closest('script, [aria-disabled=true]')) continue;
  const style = getComputedStyle(e);
  const ground = behind(e);
  const ink = over(rgba(e.closest('svg') ? style.fill : style.color), ground);
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
  const ratio = (a + .05) / (b + .05);
  if (ratio < (large ? 3 : 4.5)) faint.push([e.outerHTML.slice(0, 80), ratio.toFixed(2)]);
}
return [faint, light(behind(document.body))];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "both"])
def test_text_stands_out_from_its_ground(reader, name, scheme):
    reader.open(name, color_scheme=scheme)
    reader.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    # Every strength of a cell's colour, not only those of this run.
    reader.run("""document.querySelectorAll('.matrix').forEach(m => {
      for (let a = 12; a <= 100; a += 4) for (const right of ['', ' diagonal']) {
        const cell = m.tBodies[0].rows[0].insertCell();
        cell.className = 'hit' + right + (right && a > 80 ? ' strong' : '');
        cell.style.setProperty('--a', a / 100);
        cell.innerHTML = '<b>7</b><small>50 %</small>';
      }})""")
    faint, ground = reader.run(FAINT)
    assert faint == []
    assert ground > 0.8 if scheme == "light" else ground < 0.05


def test_paper_shows_all_and_no_controls(reader):
    reader.open("both", media="print")
    assert not any(reader.shown(".js-only")) and not any(reader.shown("button:not(.sort)"))
    assert all(reader.shown("#config-table tbody tr")), "the filter is for the screen"
    assert all(reader.shown("details td")) and len(reader.shown("details td")) > 20
    strips = reader.shown("#clip-1 .film li")
    assert len(strips) == 24 and sum(strips) == 8
    assert not any(reader.shown("nav"))
    paper = reader.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"


def test_printing_leaves_the_page_as_it_was(reader):
    reader.open()
    reader.run("""window.during = [];
      addEventListener('beforeprint', () => during.push(
        [...document.querySelectorAll('details')].every(d => d.open)));""")
    reader.click("#clip-1 .play")
    reader.driver.print_page()
    assert reader.run("return during") == [True]
    assert not any(reader.run("return [...document.querySelectorAll('details')].map(d => d.open)"))
    assert reader.find("#clip-1 .play").get_attribute("aria-pressed") == "false"


def test_all_can_be_read_without_scripts(reader):
    reader.command("Emulation.setScriptExecutionDisabled", value=True)
    reader.open("both")
    assert not any(reader.shown(".js-only")) and reader.shown("button:not(.js-only *)") == []
    assert sum(reader.shown("#clip-1 .film li")) == 8
    assert all(reader.shown("#config-table tbody tr"))
    assert reader.texts(".plot:first-of-type .marks text")[:5] == ["0", "0.5", "1", "1.5", "2"]
    title = reader.find(".matrix td", 2).get_attribute("title")
    assert title.replace("\N{NO-BREAK SPACE}", " ") == f"red ball, called {NASTY}: 1 of 4 (25.0 %)"


def test_a_page_of_many_classes(reader, tmp_path):
    """A hundred and one classes: a dense matrix that still tells every cell."""
    names = [f"Class{i:03d}" for i in range(101)]
    confusion = [[36 if i == k else int(k == 0) for k in range(101)] for i in range(101)]
    (tmp_path / "results.json").write_text(
        json.dumps(make_results(class_names=names, confusion=confusion, num_videos=37 * 101))
    )
    reader._pages.many = report.write_report(tmp_path)
    reader.open("many")
    reader.focus(".matrix td")
    reader.press("PageDown", "End")
    assert reader.tip == "Class100, rightly called Class100: 36 of 37 (97.3 %)"
    reader.press("Home")
    assert reader.tip == "Class100, called Class000: 1 of 37 (2.7 %)"
    reader.click("#class-table .sort", 0)
    reader.press("Enter")
    assert column(reader, 1)[0] == "Class100"


def test_without_a_browser_the_reason_names_the_command(tmp_path):
    test = tmp_path / "test_page.py"
    test.write_text("def test_page(browser):\n    assert browser\n")
    conftest = Path(__file__).parent / "browser.py"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import browser, pytest\n"
        "browser.find = lambda name: None\n"
        "sys.exit(pytest.main(['-q', '-rs', '-p', 'no:cacheprovider', sys.argv[2]], [browser]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(conftest.parent), str(test)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "1 skipped" in done.stdout, done.stdout + done.stderr
    assert "`make browser` installs it" in done.stdout
