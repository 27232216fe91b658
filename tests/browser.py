"""A browser for tests of pages: Debian's or the user's own Chromium, without a window, through playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOCAL = ("127.0.0.1", "localhost", "")  # data:, blob: and about: have no host


@dataclass
class Visit:
    """What a page did besides showing itself.

    Attributes:
        errors: what it wrote to the console as an error, and exceptions that nobody caught.
        foreign: addresses on other machines that it asked for; none is let through.
    """

    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@contextmanager
def open_browser() -> Iterator:
    """The machine's own Chromium: no pip package brings one, so the test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"this machine has no browser ({', '.join(NAMES)})")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser, width=1200, height=900, dark=False) -> Iterator[tuple]:
    """A fresh visitor's page of a size and a colour scheme, and its `Visit`."""
    visit = Visit()
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
    )

    def pass_on(route) -> None:
        if urlsplit(route.request.url).hostname in (*LOCAL, None):
            route.continue_()
        else:
            visit.foreign.append(route.request.url)
            route.abort()

    context.route("**/*", pass_on)
    page = context.new_page()
    page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    try:
        yield page, visit
    finally:
        context.close()
