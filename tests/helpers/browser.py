"""Pages in a headless Chromium, without a network but this machine's own addresses."""

import contextlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.running import ROOT

QUIET = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def chromium():
    """A browser; skips where playwright or Debian's chromium is not installed."""
    library = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or pytest.skip("chromium is not installed")
    with library.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(program: str, *flags):
    """(process, address) of a program of evaluation/ that serves a page; killed afterwards."""
    pytest.importorskip("gradio")
    words = [sys.executable, "-u", ROOT / "evaluation" / program, *flags, "--port", "0"]
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    try:
        told = []
        for line in process.stdout:
            told.append(line)
            if found := re.search(r"serving on (\S+)", line):
                break
        else:
            raise AssertionError("".join(told))
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def opened(browser, address: str, width: int = 1440, scheme: str = "light", **more):
    """A page at `address`, and what it asked of other machines and complained of."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **more
    )
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url),
    )
    page.goto(address)
    yield page, wrong
    context.close()
