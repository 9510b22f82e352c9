"""A real browser for the tests of pages: Debian's Chromium, driven by Selenium."""

import shutil

import pytest

# No start page, no updates, no reports home: what goes out is what the page under test asks for.
_SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--hide-scrollbars", "--force-color-profile=srgb",
    # A click misses what scrolls smoothly past it, where cores are slow.
    "--force-prefers-reduced-motion",
    # A camera that shows a moving disc, and nobody who has to allow it.
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip


def find(name: str) -> str | None:
    """Where a program lies."""
    return shutil.which(name)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, one for all tests: its start takes a second.

    Its logs of the console and of the network are kept, for `get_log`.
    """
    chromium = find("chromium") or find("chromium-browser") or find("google-chrome")
    driver = find("chromedriver")
    if chromium is None or driver is None:
        missing = "Chromium" if chromium is None else "chromedriver"
        pytest.skip(reason=f"{missing} is not there; `make browser` installs it")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for switch in _SWITCHES:
        options.add_argument(switch)
    # The driver's place is given, so that Selenium does not look for one on the network.
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()
