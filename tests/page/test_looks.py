"""How the page looks and reads: the cluster as it happens, both schemes, a phone, what axe-core finds, what is sent."""

from __future__ import annotations

from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.support.browser import PHONE, SHOWN, OpenPage, generate
from tests.support.played_page import ServedPage


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
    assert serious_findings(page) == []
    server.pace.is_held = False
    expect(request).to_have_count(0)
    page.get_by_role("link", name="Make").click()
    expect(page.locator(SHOWN)).to_have_count(1)
    page.wait_for_timeout(1500)
    looks = server.denoiser.looks
    page.wait_for_timeout(1500)
    assert server.denoiser.looks == looks


def test_it_is_readable_by_everybody_in_light_in_dark_and_on_a_phone(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path
) -> None:
    page = open_page(pictures_server, color_scheme="light").page
    generate(page, "a red fox in the snow")
    expect(page.locator(SHOWN)).to_have_count(1)
    page.screenshot(path=shots / "light.png")
    page.get_by_text("More settings").click()
    assert serious_findings(page) == []
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=shots / "dark.png")
    assert serious_findings(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    page.screenshot(path=shots / "phone.png")
    page.get_by_role("button", name="Copy as code").click()
    assert serious_findings(page) == []


def serious_findings(page: Page) -> list[str]:
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
    visit = open_page(pictures_server)
    page = visit.page
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
