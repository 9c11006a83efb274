"""A headless Chromium, driven by selenium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.site import pages

ASKED = bool(os.environ.get("LIGHTNING_OPTIM_BROWSER_TESTS"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not ASKED and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="`make browser` shows the built pages to Chromium"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser without a window. Fails where there is none: whoever asks for these tests wants them run."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail("Chromium or its driver is missing: `apt-get install chromium chromium-driver`", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Chromium refuses to sandbox root, whom containers run as, and /dev/shm is small there.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.set_page_load_timeout(30)
    yield opened
    opened.quit()


@pytest.fixture
def look(browser: Any) -> Any:
    """Sets the width of the window and the colors that its user prefers: ``look(390, "dark")``."""

    def set_to(width: int, scheme: str = "light") -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    return set_to


@pytest.fixture
def show(browser: Any, look: Any) -> Any:
    """Opens a page of the site: ``show("search", "?q=muon")``."""

    def opened(page: str, rest: str = "", width: int = 1280) -> Any:
        (path,) = (path for path in pages() if path.as_uri().endswith(f"/docs/_build/{page}.html"))
        look(width)
        # A page that differs in what follows # only would not be loaded again.
        browser.get("about:blank")
        browser.get(path.as_uri() + rest)
        return browser

    return opened
