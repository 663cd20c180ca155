"""Chromium through playwright: a page that keeps its console errors, with or without a network, and screenshots for people to look at."""
import importlib.util
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = Path(os.environ.get("HPL_SCREENSHOTS", ROOT/"_screenshots"))
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


def missing():
    "Why there is no browser, or nothing."
    if not importlib.util.find_spec("playwright"): return "playwright is not installed; run `python tests/install_browser.py`"
    return "" if shutil.which("chromium") else "there is no chromium; run `python tests/install_browser.py`"


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "there is one")


@contextmanager
def chromium():
    "A running browser."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        try: yield browser
        finally: browser.close()


@contextmanager
def open_page(browser, offline=False, dark=False, viewport=DESK):
    "A page and the list of what its console calls an error; `offline` lets only files of this machine through."
    context = browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    if offline: context.route(lambda address: not address.startswith(("file:", "data:", "blob:")), lambda route: route.abort())
    try: yield page, errors
    finally: context.close()


def screenshot(page, name, **options):
    "A picture of the page in the folder of screenshots."
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS/f"{name}.png", **options)
