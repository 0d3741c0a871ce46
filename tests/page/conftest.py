"""A real browser before the page of a played cluster: one Chromium for all tests, a fresh context for each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.support.played_page import INPAINTING, TEXT_TO_VIDEO, ServedPage, served_page
from tests.support.videos import make_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
PATIENCE_MS = 20_000.0
SMALL = {"width": 1000, "height": 700}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser nothing of the page is tested, and the report says so."""
    if CHROMIUM is None:
        reason = "NO BROWSER: install Debian's package chromium, the page is not tested without it"
        for item in items:
            if "tests/page/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Visit:
    """A page in the browser, with what it did besides: it must be nothing."""

    page: Page
    served: ServedPage
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()  # parts of errors that the test makes on purpose

    def watch(self) -> None:
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def check(self) -> None:
        """No error of a script or of the policy, and no request to another host."""
        here = urlsplit(self.served.url).netloc
        elsewhere = [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("blob", "data") and urlsplit(url).netloc != here
        ]
        assert elsewhere == []
        unexpected = [each for each in self.errors if not any(part in each for part in self.expected)]
        assert unexpected == []


OpenPage = Callable[..., Visit]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pictures_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPage]:
    with served_page(tmp_path_factory.mktemp("pictures"), describing=INPAINTING) as served:
        yield served


@pytest.fixture(scope="session")
def videos_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPage]:
    """Under a prefix, as several applications of one cluster are."""
    with served_page(
        tmp_path_factory.mktemp("videos"), prefix="/wan", describing=TEXT_TO_VIDEO, model_name="wan"
    ) as served:
        served.server.make = make_video
        yield served


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: a temporary folder of the run, which pytest keeps."""
    folder = tmp_path_factory.mktemp("screenshots")
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server in a context of its own; at the end each visit is checked."""
    contexts: list[BrowserContext] = []
    visits: list[Visit] = []

    def open_it(served: ServedPage, *, wait: bool = True, is_cached: bool = False, **options: Any) -> Visit:
        """`is_cached`: as browsers do; what answers in place of the server ends that."""
        context = browser.new_context(viewport=SMALL, reduced_motion="reduce", **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        visit = Visit(context.new_page(), served)
        visits.append(visit)
        visit.watch()
        if "/v1/loras" not in routes_of(served) and not is_cached:  # a 404 there, which browsers report as an error
            visit.page.route("**/v1/loras", lambda route: route.fulfill(json={"data": []}))
        visit.page.goto(served.url)
        if wait:
            visit.page.wait_for_selector("#generate:enabled")
        return visit

    yield open_it
    for visit in visits:
        visit.check()
    for context in contexts:
        context.close()


def routes_of(served: ServedPage) -> set[str]:
    app: Any = served.server._opened and served.server._opened[1]
    return {getattr(route, "path", "") for route in app.routes}
