"""The page of several models, as on a phone: what is typed stays with another model, and what is made is in sight."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from playwright.sync_api import expect

from tests.support.browser import PHONE, SHOWN, OpenPage
from tests.support.in_process import description, make_at_once
from tests.support.played_page import INPAINTING, TEXT_TO_VIDEO, served_page

VIDEOS = dataclasses.replace(TEXT_TO_VIDEO, argument_types={**INPAINTING.argument_types})
PICTURES = description("FluxPipeline", tasks=("text_to_image",), argument_types=INPAINTING.argument_types)


def test_another_model_keeps_the_words_and_is_kept_and_what_is_made_is_in_sight(
    tmp_path: Path, open_page: OpenPage, shots: Path
) -> None:
    with served_page(tmp_path / "outputs", several={"pictures": PICTURES, "videos": VIDEOS}) as served:
        served.server.make = make_at_once
        page = open_page(served).page
        page.set_viewport_size(PHONE)
        model, prompt = page.get_by_label("Model", exact=True), page.get_by_label("Prompt", exact=True)
        prompt.fill("a red apple")
        page.get_by_label("Steps").fill("3")
        model.select_option("videos")
        expect(page.get_by_label("Frames")).to_be_visible()
        expect(prompt).to_have_value("a red apple")
        expect(page.get_by_label("Steps")).to_have_value("")  # they mean another thing to another model
        page.reload()
        expect(model).to_have_value("videos")
        model.select_option("pictures")
        expect(page.get_by_label("Frames")).to_have_count(0)
        expect(page.locator("#generate")).to_be_enabled()
        prompt.fill("a red apple")
        served.server.pace.is_held = True
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_label("a red apple", exact=True).get_by_text("pictures")).to_be_visible()
        expect(page.locator(".run .state")).to_contain_text("No step is done yet; asked for")
        expect(page.get_by_role("button", name="Cancel")).to_be_in_viewport()
        page.screenshot(path=shots / "several.png")
        served.server.pace.is_held = False
        expect(page.locator(f"{SHOWN} img")).to_be_in_viewport(ratio=1)
        page.screenshot(path=shots / "several_made.png")
