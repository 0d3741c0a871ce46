"""How the page looks and reads: the cluster as it happens, both schemes, a phone, what axe-core finds, what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.page.conftest import OpenPage
from tests.page.test_making import SHOWN, generate
from tests.support.played_page import ServedPage

PHONE = {"width": 390, "height": 844}


def test_the_cluster_is_shown_as_it_happens_and_only_while_somebody_watches(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path
) -> None:
    page, server = open_page(pictures_server).page, pictures_server.server
    server.pace.is_held = True
    generate(page, "a fox to be watched")
    expect(page.locator(".run .state")).to_contain_text("Started")
    page.get_by_role("link", name="Cluster").click()
    expect(page.get_by_text("Live.")).to_be_visible()
    expect(page.get_by_role("heading", name="Denoiser: 2 replicas")).to_be_visible()
    request = page.locator(".requests li")
    expect(request).to_have_count(1)
    expect(request).to_have_class("running own")
    expect(request).to_contain_text("step 0 of 8")
    expect(page.locator("#stages meter")).to_have_count(6)
    expect(page.get_by_text("Batches just now").first).to_be_visible()
    page.screenshot(path=shots / "cluster.png")
    server.pace.is_held = False
    expect(request).to_have_count(0)
    page.get_by_role("link", name="Make").click()
    expect(page.locator(SHOWN)).to_have_count(1)
    page.wait_for_timeout(1500)
    looks = server.denoiser.looks
    page.wait_for_timeout(1500)
    assert server.denoiser.looks == looks


@pytest.mark.parametrize(
    ("scheme", "viewport"), [("light", None), ("dark", None), ("light", PHONE)], ids=["light", "dark", "phone"]
)
def test_it_is_readable_by_everybody(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path, scheme: str, viewport: dict[str, int] | None
) -> None:
    visit = open_page(pictures_server, color_scheme=scheme)
    page = visit.page
    if viewport:
        page.set_viewport_size(viewport)
    generate(page, "a red fox in the snow")
    expect(page.locator(SHOWN)).to_have_count(1)
    page.screenshot(path=shots / f"{'phone' if viewport else scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    assert serious_findings(page) == []
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Copy as code").click()
    assert serious_findings(page) == []
    page.keyboard.press("Escape")
    page.goto(f"{pictures_server.url}#cluster")
    expect(page.get_by_text("Live.")).to_be_visible()
    assert serious_findings(page) == []


def serious_findings(page: object) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]


def test_the_theme_is_switched_and_kept(pictures_server: ServedPage, open_page: OpenPage) -> None:
    page = open_page(pictures_server, color_scheme="light").page
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    for name in ("Theme: system", "Theme: light"):
        page.get_by_role("button", name=name).click()
    dark = page.evaluate(colour)
    assert light != dark
    page.reload()
    assert page.evaluate(colour) == dark


def test_a_second_visit_loads_no_file_again(pictures_server: ServedPage, open_page: OpenPage) -> None:
    page = open_page(pictures_server).page
    first = page.evaluate(SIZES)
    page.reload()
    page.wait_for_selector("#generate:enabled")
    again = page.evaluate(SIZES)
    assert first["files"] == again["files"] > 10
    assert again["bytes"] < first["bytes"] / 4
    print(f"first paint {first['paint']:.0f} ms, {first['files']} files, {first['bytes']} bytes; then {again['bytes']}")


SIZES = """() => {
  const files = performance.getEntriesByType("resource").filter(each => each.name.includes("/ui/"));
  const paint = performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? 0;
  return { files: files.length, bytes: files.reduce((sum, each) => sum + each.transferSize, 0), paint };
}"""
