"""A real browser before the page of a played cluster: one tab of Chromium for all tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import ConsoleMessage, Error, Page, Request, ViewportSize, expect, sync_playwright

from tests.support.played_page import INPAINTING, TEXT_TO_VIDEO, ServedPage, served_page
from tests.support.videos import make_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
PATIENCE_MS = 20_000.0
SHOWN = "#gallery .item"
SMALL: ViewportSize = {"width": 1000, "height": 700}
PHONE: ViewportSize = {"width": 390, "height": 844}


@dataclass
class Visit:
    """The page in the browser, with what it did besides: it must be nothing."""

    page: Page
    served: ServedPage
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()  # parts of errors that the test makes on purpose

    def hear_message(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.errors.append(said.text)

    def hear_error(self, error: Error) -> None:
        self.errors.append(str(error))

    def hear_request(self, request: Request) -> None:
        self.requests.append(request.url)

    @contextmanager
    def listening(self) -> Iterator[None]:
        heard = {"console": self.hear_message, "pageerror": self.hear_error, "request": self.hear_request}
        for name, hear in heard.items():
            self.page.on(name, hear)  # type: ignore[call-overload]
        try:
            yield
        finally:
            for name, hear in heard.items():
                self.page.remove_listener(name, hear)

    def check(self) -> None:
        """No error of a script or of the policy, and no request to another host."""
        here = urlsplit(self.served.url).netloc
        asked = [urlsplit(url) for url in self.requests]
        assert [each for each in asked if each.scheme not in ("blob", "data") and each.netloc != here] == []
        assert [each for each in self.errors if not any(part in each for part in self.expected)] == []


OpenPage = Callable[..., Visit]


@pytest.fixture(scope="session")
def tab() -> Iterator[Page]:
    """One for all tests: to open another takes the browser two seconds."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport=SMALL, reduced_motion="reduce")
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        yield page
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
def open_page(tab: Page) -> Iterator[OpenPage]:
    """Opens the page of a server as if the browser had never seen it; at the end each visit is checked."""
    with ExitStack() as visits:

        def open_it(
            served: ServedPage,
            *,
            wait: bool = True,
            color_scheme: Literal["light", "dark"] = "light",
        ) -> Visit:
            visits.close()  # those of the page before
            forget(tab, served.url)
            tab.emulate_media(color_scheme=color_scheme)
            tab.set_viewport_size(SMALL)
            visit = Visit(tab, served)
            visits.callback(visit.check)
            visits.enter_context(visit.listening())
            tab.goto(served.url)
            if wait:
                tab.wait_for_selector("#generate:enabled")
            return visit

        yield open_it


def forget(page: Page, url: str) -> None:
    """All that the browser has kept of this server, and what answers in its place."""
    page.unroute_all(behavior="ignoreErrors")
    if page.url != "about:blank":
        page.evaluate("sessionStorage.clear()")
    parts = urlsplit(url)
    session = page.context.new_cdp_session(page)
    session.send("Storage.clearDataForOrigin", {"origin": f"{parts.scheme}://{parts.netloc}", "storageTypes": "all"})
    session.send("Network.clearBrowserCache")
    session.detach()


def generate(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
