"""The web app: its server with made-up work, and the whole of it in a real browser."""

import asyncio
import base64
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from contextlib import closing, contextmanager
from pathlib import Path

import app_work
import pytest
from as_if_trained import as_if_trained
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from stf_jax import app
from stf_jax.datasets import load_index
from stf_jax.records import prepare_records
from stf_jax.run import Settings

ROOT = Path(__file__).parent.parent
CLIPS = os.environ.get("STF_DATA")


# --- the server --------------------------------------------------------------------------------


class Served:
    """A server that runs, and what asks it."""

    def __init__(self, port, folder):
        self.port, self.folder = port, folder

    def ask(self, path, body=None, headers=None, timeout=30):
        """The status and the lines of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as c:
            c.request("GET" if body is None else "POST", path, body=body, headers=headers or {})
            answer = c.getresponse()
            self.headers = dict(answer.getheaders())
            text = answer.read().decode()
        return answer.status, text

    def send(self, content, name="a.mp4", **options):
        """Sends a video; returns the status and what was said last."""
        path = "/videos?" + urllib.parse.urlencode({"name": name})
        status, text = self.ask(path, content, **options)
        return status, json.loads(text.splitlines()[-1])

    def left(self):
        """The files that are still there, given a moment to go."""
        for _ in range(50):
            if not (found := list(self.folder.iterdir())):
                break
            time.sleep(0.05)
        return found


@contextmanager
def _serving(folder, *, made_up=True, monkeypatch=None, **allowed):
    if made_up:
        monkeypatch.setattr(app, "_prepare", app_work.prepare)
        monkeypatch.setattr(app, "_analyse", app_work.analyse)
    limits = {"max_megabytes": 0.001, "max_seconds": 10.0, "timeout": 20.0, "max_waiting": 4}
    desk = app.Desk("a warning", app.Allowance(**(limits | allowed)))
    opened = app.listen("127.0.0.1", 0)
    site = app.Site(desk, folder).application("127.0.0.1")
    loop = asyncio.new_event_loop()
    task = loop.create_task(app.serve(desk, site, opened))

    def run():
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Served(opened.getsockname()[1], folder)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
        desk.close()
        opened.close()
        loop.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    with _serving(tmp_path, monkeypatch=monkeypatch) as server:
        yield server


def test_a_video_is_answered_and_its_file_is_gone(served):
    status, told = served.send(b"x" * 1000, name="../../etc/holiday.mp4")
    assert status == 200
    assert told == {"state": "done", "name": "holiday.mp4", "why": True, "bytes": 1000}
    assert served.left() == []


def test_no_handler_of_the_program_is_closed(tmp_path, monkeypatch):
    closed = []

    class Handler(logging.NullHandler):
        def close(self):
            closed.append(self)

    handler = Handler()
    with _serving(tmp_path, monkeypatch=monkeypatch) as served:
        assert served.ask("/about")[0] == 200
    assert closed == []
    handler.close()
    assert closed == [handler]  # it was there to be closed


def test_what_cannot_be_used_is_told_by_its_name_and_the_next_one_works(served):
    status, told = served.send(b"bad", name="notes.txt")
    assert (status, told["state"]) == (200, "failed")
    assert told["message"] == "'notes.txt': no video in it. Send another one."
    _, told = served.send(b"crash", name="broken.avi")
    assert told["state"] == "failed"
    assert "'broken.avi': the process that read it crashed (exit code 3)" in told["message"]
    assert served.send(b"fine")[1]["bytes"] == 4
    assert served.left() == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_file_is_refused_on_its_way(served, chunked):
    body = iter([b"x" * 600] * 2) if chunked else b"x" * 1001
    status, told = served.send(body, name="long.mp4")
    assert status == 413
    assert "'long.mp4': larger than 0.001 MB" in told["message"]
    assert "--max_megabytes" in told["message"]
    assert served.left() == []


def test_work_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    note, folder = tmp_path / "pid", tmp_path / "videos"
    folder.mkdir()
    with _serving(folder, monkeypatch=monkeypatch, timeout=1.0) as served:
        status, told = served.send(b"slow " + str(note).encode(), name="endless.mp4")
        assert told["state"] == "failed"
        assert "'endless.mp4': the work on it took longer than 1 s" in told["message"]
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text()), 0)
        assert served.send(b"fine")[1]["state"] == "done"
        assert served.left() == []


def test_one_video_at_a_time_and_the_line_has_an_end(tmp_path, monkeypatch):
    note, folder = tmp_path / "pid", tmp_path / "videos"
    folder.mkdir()
    with _serving(folder, monkeypatch=monkeypatch, timeout=3.0, max_waiting=1) as served:
        answers = {}

        def send(name, content):
            path = "/videos?" + urllib.parse.urlencode({"name": name})
            answers[name] = served.ask(path, content)

        first = threading.Thread(target=send, args=("first", b"slow " + str(note).encode()))
        first.start()
        for _ in range(200):
            if note.exists():
                break
            time.sleep(0.05)
        second = threading.Thread(target=send, args=("second", b"fine"))
        second.start()
        for _ in range(200):
            if len(list(folder.iterdir())) == 2:
                break
            time.sleep(0.05)
        status, told = served.send(b"fine", name="third")
        first.join()
        second.join()
    assert status == 503
    assert "2 videos are in the line already" in told["message"]
    states = [json.loads(line) for line in answers["second"][1].splitlines()]
    assert {"state": "waiting", "ahead": 1} in states
    assert states[-1]["state"] == "done"


def test_other_pages_and_names_are_refused(served):
    own = f"127.0.0.1:{served.port}"
    assert served.ask("/", headers={"Host": own})[0] == 200
    assert "default-src 'none'" in served.headers["content-security-policy"]
    assert served.ask("/", headers={"Host": f"localhost:{served.port}"})[0] == 200
    for host in ("rebound.example", f"10.0.0.1:{served.port}", ""):
        status, text = served.ask("/", headers={"Host": host})
        assert status == 403
        assert "use the address that it printed" in json.loads(text)["message"]
    status, told = served.send(b"fine", headers={"Host": own, "Origin": "https://evil.example"})
    assert status == 403
    assert "https://evil.example" in told["message"]
    assert served.send(b"fine", headers={"Host": own, "Origin": f"http://{own}"})[0] == 200
    assert served.ask("/nothing")[0] == 404
    assert served.ask("/videos")[0] == 405


def test_a_port_in_use_and_impossible_limits_are_told(capsys):
    with closing(app.listen("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
        assert app.main(["--workdir=x", f"--port={port}"]) == 1
    assert f"port {port} of 127.0.0.1 is in use" in (told := capsys.readouterr().err)
    assert f"--port={port + 1}" in told
    assert app.main(["--workdir=x", "--max_seconds=0"]) == 1
    assert "--max_seconds must be above 0, got 0" in capsys.readouterr().err
    assert app.main(["--workdir=x", "--host=no.such.host.example", "--port=0"]) == 1
    assert "is no address of this machine" in capsys.readouterr().err


# --- the whole app -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_card, tmp_path_factory):
    """The folder of a finished run, its weights those that it would begin with."""
    settings, index = Settings.of(tiny_card), load_index(tiny_card.data)
    records = prepare_records(index, settings.records)
    return as_if_trained(settings, index, records, tmp_path_factory.mktemp("app") / "run").workdir


def _start(workdir, folder, *words):
    folder.mkdir(exist_ok=True)
    # Where Ctrl-C was turned off for the tests, it would stay so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "stf_jax.app", f"--workdir={workdir}", "--port=0", *words],
            cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """Where the app answers; at the end Ctrl-C ends it, and it leaves nothing."""
    folder = tmp_path_factory.mktemp("app_files")
    process = _start(trained, folder, "--max_megabytes=3", "--max_seconds=30")
    line = process.stdout.readline()
    assert "(Ctrl-C ends it)" in line
    yield line.split()[0]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list(folder.glob("stf_jax_app_*"))


def test_what_is_no_run_is_told(tmp_path):
    process = _start(tmp_path / "nothing", tmp_path / "files")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: {tmp_path / 'nothing'} does not exist" in err
    assert "Traceback" not in err


class Page:
    """The app's page in a browser."""

    def __init__(self, browser, address):
        self.browser = browser
        self.resize(1200)
        browser.get_log("browser")
        browser.get(address)
        self.wait(lambda: self.text("about"))

    def resize(self, width):
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )

    def find(self, name):
        return self.browser.find_element(By.ID, name)

    def text(self, name):
        return self.find(name).text

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, until, seconds=60):
        WebDriverWait(self.browser, seconds, 0.05).until(lambda _: until())

    def answered(self):
        return self.find("result").is_displayed() or self.find("fault").is_displayed()

    def give(self, path):
        self.find("file").send_keys(str(path))
        self.wait(self.answered)

    def faults(self):
        """What went wrong in the page, and what it asked of others."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(browser, address):
    page = Page(browser, address)
    yield page
    page.resize(1200)
    assert page.faults() == []
    page.browser.get("about:blank")


def _probabilities(page):
    return [float(item.text.split()[-2]) for item in page.all("#classes li")]


def test_video_and_its_reasons_are_shown_and_follow_the_keyboard(page, make_video, tmp_path):
    page.give(make_video(tmp_path / "walk <b>.mp4", frames=40, size=(96, 128)))
    assert "walk <b>.mp4" in page.text("classes-head") + page.text("status")
    assert sum(_probabilities(page)) == pytest.approx(100, abs=0.2)
    rows = page.browser.execute_script(
        "return [...document.querySelectorAll('#course-table tbody tr')].map(r => r.innerText)"
    )
    assert len(rows) >= 3
    # Every frame of the clip in both streams, and the strongest are said to be so.
    assert len(page.all(".frames li")) == 2 * 8
    assert 1 <= len(page.all(".frames li.strong")) <= 6
    assert page.find("key").is_displayed()
    video = page.find("video")
    page.wait(lambda: page.browser.execute_script("return arguments[0].readyState", video) >= 2)
    before = page.text("moment-words")
    page.find("moment").send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.text("moment-words") != before, 5)
    chosen = page.all(".frames button")[2]
    chosen.send_keys(Keys.ENTER)
    assert chosen.get_attribute("aria-pressed") == "true"
    heat = page.all(".screens img")[0].get_attribute("src")
    page.all(".film-player input[type=checkbox]")[0].send_keys(Keys.SPACE)
    assert page.all(".screens img")[0].get_attribute("src") != heat


def test_dropped_video_is_shown_on_a_phone(page, make_video, tmp_path):
    path = make_video(tmp_path / "dropped.mp4", frames=30, size=(96, 128))
    page.resize(390)
    page.browser.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], "dropped.mp4", { type: "video/mp4" }));
        const options = { dataTransfer: files, bubbles: true, cancelable: true };
        for (const kind of ["dragenter", "dragover", "drop"])
          document.getElementById("drop").dispatchEvent(new DragEvent(kind, options));
        """,
        base64.b64encode(path.read_bytes()).decode(),
    )
    page.wait(page.answered)
    assert page.find("result").is_displayed(), page.text("fault")
    size = "return [document.documentElement.scrollWidth, innerWidth]"
    wide, room = page.browser.execute_script(size)
    assert wide <= room


def test_bad_and_large_files_get_a_message(page, make_video, tmp_path):
    bad = tmp_path / "notes.mp4"
    bad.write_text("not a video")
    page.give(bad)
    assert "'notes.mp4'" in page.text("fault")
    assert not page.find("result").is_displayed()
    (tmp_path / "large.avi").write_bytes(bytes(3_100_000))
    page.give(tmp_path / "large.avi")
    page.wait(lambda: "'large.avi': larger than 3 MB" in page.text("fault"), 5)
    # The next one is none the worse for it.
    page.give(make_video(tmp_path / "fine.mp4", frames=12, size=(96, 128)))
    page.wait(lambda: page.find("result").is_displayed())
    assert not page.find("fault").is_displayed()


def test_long_video_is_refused_by_its_length(page, make_video, tmp_path):
    page.give(make_video(tmp_path / "long.mp4", frames=31 * 5, fps=5, size=(32, 48)))
    assert "'long.mp4'" in (told := page.text("fault"))
    assert "30" in told


def test_camera_is_recorded_and_watched_live(page):
    page.find("camera-on").click()
    page.wait(lambda: page.find("camera").is_displayed())
    page.browser.execute_script("document.getElementById('length').value = '2'")
    page.find("record").click()
    page.wait(page.answered)
    assert page.find("result").is_displayed(), page.text("fault")
    assert sum(_probabilities(page)) == pytest.approx(100, abs=0.2)
    page.find("live").click()
    page.wait(lambda: len(page.all("#live-list li")) >= 2, 20)
    page.find("live").click()
    page.find("camera-on").click()
    assert not page.find("camera").is_displayed()


@pytest.mark.skipif(CLIPS is None, reason="STF_DATA does not name the folder of real clips")
@pytest.mark.parametrize("folder", ["ucf101_8/UCF-101/JumpingJack", "weizmann/bend"])
def test_real_clip_is_shown(page, folder):
    page.give(sorted((Path(CLIPS) / folder).iterdir())[0])
    assert page.find("result").is_displayed(), page.text("fault")
    assert len(page.all(".frames li")) == 2 * 8
    assert sum(_probabilities(page)) == pytest.approx(100, abs=0.2)
    # This browser plays no AVI: it says so, and the frames are there.
    page.wait(lambda: page.find("unplayable").is_displayed(), 10)
