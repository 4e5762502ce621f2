"""Debian's chromium, driven by Playwright: a page that reports its own errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = (1280, 900), (390, 844)


def chromium() -> str:
    """Where the browser is; without one the test is skipped, or fails where it is required."""
    path = shutil.which("chromium")
    if path is None:
        told = "no chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("DSEQJEPA_REQUIRE_BROWSER") == "1":
            pytest.fail(told)
        pytest.skip(told)
    return path


@contextmanager
def running() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser,
    file: Path,
    *,
    size: tuple[int, int] = DESKTOP,
    scheme: str = "light",
    scale: float = 1,
) -> Iterator[tuple[Page, list[str]]]:
    """The page of a file from the disk, and what it did wrong so far."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=scheme,  # type: ignore[arg-type]
        device_scale_factor=scale,
        has_touch=size == PHONE,
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith("data:") or request.url == file.as_uri()
            else wrong.append(f"request: {request.url[:200]}")
        ),
    )
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page, wrong
    context.close()
