"""The page in a real browser: things are made, cancelled, refused, waited for; painted, played, compared, copied."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from deployments.errors import GenerationFailedError
from deployments.messages import GenerationRequest, Media
from serve_app.api_keys import hash_of
from tests.support.browser import SHOWN, OpenPage, generate
from tests.support.in_process import make_at_once, picture
from tests.support.played_page import INPAINTING, ServedPage, served_page
from tests.support.videos import video_file

PLAY = """async video => {
  await video.play();
  await new Promise(end => video.ontimeupdate = () => video.currentTime > 0.1 && end());
  return video.duration;
}"""
GIVEN: dict[str, Any] = {"name": "fox.png", "mimeType": "image/png", "buffer": picture(64, 48)}
STEP = {"progress": 50, "step": 4, "num_steps": 8, "eta_s": 1}
MASK: dict[str, Any] = {"name": "mask.png", "mimeType": "image/png", "buffer": picture(64, 48, colour=(255, 255, 255))}


def last(served: ServedPage) -> GenerationRequest:
    """What came as far as the stages."""
    return served.server.encoder.requests[-1]


def test_a_picture_is_made_with_its_queue_its_steps_and_its_previews_seen(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path
) -> None:
    page = open_page(pictures_server).page
    pace = pictures_server.server.pace
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Width").fill("64")
    page.get_by_label("Height").fill("48")
    page.get_by_label("Steps").fill("8")
    pace.is_held = True
    generate(page, "a red fox")
    expect(page.locator(".run .state")).to_contain_text("Started")
    pace.is_held = False
    pace.step_s = 0.2
    expect(page.locator(".run .state")).to_contain_text("of 8, about")
    expect(page.get_by_role("img", name="Preview at step")).to_be_visible()
    assert 0 < float(page.get_by_role("progressbar").get_attribute("value") or 0) < 100
    page.screenshot(path=shots / "progress.png")
    pace.step_s = 0.02
    expect(page.locator(SHOWN)).to_have_count(1)
    expect(page.locator(f"{SHOWN} .facts").first).to_contain_text("seed 7 · 64x48")
    assert page.locator(f"{SHOWN} img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 48]
    expect(page.get_by_text("Nothing is being made.")).to_be_visible()
    assert last(pictures_server).arguments == {
        "prompt": "a red fox", "width": 64, "height": 48, "num_inference_steps": 8,
    }  # fmt: skip
    page.reload()
    expect(page.locator(SHOWN)).to_have_count(1)


@pytest.mark.rest
def test_the_form_shows_what_counts_where_nothing_is_given_and_follows_the_level_of_quality(
    open_page: OpenPage, tmp_path: Path
) -> None:
    args: dict[str, Any] = {
        "default_arguments": {"width": 128, "num_inference_steps": 20, "sigmas": [1.0, 0.5], "mode": "fine"},
        "quality": {"auto": {"guidance_scale": 2.5}, "low": {"num_inference_steps": 2, "height": 64}},
    }
    with served_page(tmp_path, describing=INPAINTING, **args) as served:
        page = open_page(served).page

        def usual(*names: str) -> list[str | None]:
            return [page.get_by_label(name, exact=True).get_attribute("placeholder") for name in names]

        page.get_by_text("More settings").click()
        names = ("Width", "Height", "Steps", "Guidance", "Sigmas")
        assert usual(*names) == ["128", "32", "20", "2.5", "[1,0.5]"]
        expect(page.get_by_label("Mode", exact=True).locator("option").first).to_have_text("usual (fine)")
        page.get_by_label("Quality", exact=True).select_option("low")
        assert usual(*names) == ["128", "64", "2", "3.5", "[1,0.5]"]
        page.get_by_label("Width").fill("96")
        generate(page, "a fox")
        expect(page.locator(SHOWN)).to_have_count(1)
        made = last(served).arguments
        assert (made["width"], made["height"], made["num_inference_steps"], made["mode"]) == (96, 64, 2, "fine")


def test_what_is_cancelled_ends_in_the_server_too(pictures_server: ServedPage, open_page: OpenPage) -> None:
    page = open_page(pictures_server).page
    pictures_server.server.pace.is_held = True
    generate(page, "a fox that nobody wants")
    expect(page.locator(".run .state")).to_contain_text("Started")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".run")).to_have_count(0)
    pictures_server.server.pace.is_held = False
    jobs = page.evaluate("fetch('v1/jobs?limit=1').then(answer => answer.json())")
    assert jobs["data"][0]["status"] == "cancelled"
    expect(page.locator(SHOWN)).to_have_count(0)


def test_a_failure_is_told_in_words_and_what_is_refused_at_its_field(
    pictures_server: ServedPage, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = open_page(pictures_server)
    page, server = visit.page, pictures_server.server

    async def fail(request: GenerationRequest) -> Media:
        raise GenerationFailedError("the replica that worked on it died 3 times while it was tried alone")

    monkeypatch.setattr(server, "make", fail)
    generate(page, "a fox")
    expect(page.get_by_role("alert").filter(has_text="died 3 times")).to_be_visible()
    monkeypatch.setattr(server, "make", make_at_once)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(SHOWN)).to_have_count(1)

    page.get_by_label("Steps").fill("many")
    generate(page, "a fox")
    expect(page.locator("#field-num_inference_steps-error")).to_have_text("Steps must be a whole number, got many.")
    expect(page.get_by_label("Steps")).to_be_focused()
    visit.expected = ("400 (Bad Request)",)
    page.get_by_label("Steps").fill("100")
    page.get_by_text("More settings").click()
    page.get_by_label("Sigmas").fill("[1, 2")
    generate(page, "a fox")
    expect(page.locator("#field-sigmas-error")).to_contain_text("no JSON")
    page.get_by_label("Sigmas").fill('"words"')
    generate(page, "a fox")
    expect(page.locator("#field-sigmas-error")).to_contain_text("sigmas")
    expect(page.get_by_role("alert").filter(has_text="sigmas").first).to_be_visible()
    page.get_by_role("button", name="Dismiss").click()


def test_a_full_server_is_waited_for_and_the_page_says_so(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path
) -> None:
    visit = open_page(pictures_server)
    visit.expected = ("429", "503")
    page = visit.page
    pictures_server.server.refusals[:] = [(429, 1), (503, 1)]
    generate(page, "a patient fox")
    expect(page.locator(".run .state")).to_contain_text("The server is full. Trying again in")
    expect(page.locator(".run")).to_contain_text("too many requests are waiting")
    page.screenshot(path=shots / "full.png")
    expect(page.locator(".run .state")).to_contain_text("A part of the server is not available.")
    expect(page.locator(SHOWN)).to_have_count(1)
    pictures_server.server.refusals[:] = [(429, 600)]
    generate(page, "an impatient fox")
    expect(page.locator(".run .state")).to_contain_text("min.")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".run")).to_have_count(0)


def test_what_is_under_way_is_taken_up_again_when_the_page_is_loaded_again_or_the_line_is_lost(
    pictures_server: ServedPage, open_page: OpenPage
) -> None:
    visit = open_page(pictures_server)
    visit.expected = ("ERR_INTERNET_DISCONNECTED",)
    page, pace = visit.page, pictures_server.server.pace
    pace.is_held = True
    generate(page, "a fox of two lives")
    expect(page.locator(".run .state")).to_contain_text("Started")
    page.reload()
    expect(page.locator(".run .state")).to_contain_text("Started")
    pace.is_held = False
    expect(page.locator(SHOWN)).to_have_count(1)

    page.context.set_offline(True)
    generate(page, "a fox off line")
    expect(page.locator(".run .state")).to_contain_text("The server cannot be reached.")
    page.context.set_offline(False)
    expect(page.locator(SHOWN)).to_have_count(2)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([("in_progress", {})], r"^Started\. No step is done yet; asked for \d+ s ago\.$"),
        (
            [("in_progress", {}), ("step", STEP), ("in_progress", {"taken_over": True})],
            r"^Taken over by another replica\.$",
        ),
        pytest.param(
            [("step", STEP), ("begun", {"request": 1})],
            r"^Its turn has come\.$",
            marks=pytest.mark.rest,
        ),
    ],
    ids=["no step", "taken over", "the second of two"],
)
def test_after_a_lost_line_the_last_words_stand_there_and_no_step_is_missed_that_was_made(
    events: list[tuple[str, dict[str, Any]]], words: str, pictures_server: ServedPage, open_page: OpenPage
) -> None:
    visit = open_page(pictures_server)
    visit.expected = ("ERR_FAILED",)
    page = visit.page
    page.evaluate("() => { const real = setInterval; setInterval = (tick, ms) => real(tick, ms / 50); }")
    said = "".join(
        f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for number, (name, data) in enumerate(events, 1)
    )
    answers = iter(
        [lambda route: route.fulfill(body=said, content_type="text/event-stream"), lambda route: route.abort()]
    )
    page.route("**/v1/jobs/*/events", lambda route: next(answers, lambda _: None)(route))  # the third has no end
    generate(page, "a fox of two lives")
    state = page.locator(".run .state")
    expect(state).to_contain_text("The server cannot be reached.")
    expect(state).to_have_text(re.compile(words))
    page.wait_for_timeout(300)  # three ticks
    expect(state).to_have_text(re.compile(words))


def test_a_mask_is_painted_by_pointer_and_by_keyboard_and_is_white_where_it_was_painted(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path
) -> None:
    page = open_page(pictures_server).page
    page.get_by_role("button", name="Paint a mask").click()
    expect(page.get_by_text("Give the picture first")).to_be_visible()
    page.get_by_label("Image", exact=True).set_input_files(GIVEN)

    canvas = page.locator("#mask-dialog canvas")
    page.get_by_role("button", name="Paint a mask").click()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 3 * box["width"] / 4, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.screenshot(path=shots / "mask.png")
    page.get_by_role("button", name="Use this mask").click()
    assert_middle_is_painted(page, pictures_server)

    page.get_by_role("button", name="Paint a mask").click()
    expect(canvas).to_be_focused()
    for key in ("+", "Shift+ArrowRight", "Space", "Delete", "Shift+ArrowLeft", "Space"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Use this mask").click()
    assert_middle_is_painted(page, pictures_server)


def assert_middle_is_painted(page: Page, served: ServedPage) -> None:
    before = page.locator(SHOWN).count()
    generate(page, "a hat")
    expect(page.locator(SHOWN)).to_have_count(before + 1)
    mask = Image.open(io.BytesIO(last(served).arguments["mask_image"].data)).convert("L")
    assert mask.size == (64, 48)
    assert (mask.getpixel((32, 24)), mask.getpixel((2, 2))) == (255, 0)


def test_a_video_is_made_under_a_prefix_and_plays(videos_server: ServedPage, open_page: OpenPage, shots: Path) -> None:
    page = open_page(videos_server).page
    page.get_by_label("Frames").fill("5")
    generate(page, "a fox moving left")
    video = page.locator(f"{SHOWN} video")
    expect(video).to_have_count(1)
    seconds = video.evaluate(PLAY)
    assert seconds > 0.2
    page.screenshot(path=shots / "video.png")


def test_videos_and_sounds_can_be_sent_along_and_are_played_before(
    pictures_server: ServedPage, open_page: OpenPage
) -> None:
    page = open_page(pictures_server).page
    page.get_by_label("Control video").set_input_files(
        {"name": "a.mp4", "mimeType": "video/mp4", "buffer": video_file(5)}
    )
    expect(page.locator(".given video")).to_have_count(1)
    page.get_by_label("Voice").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"words"})
    expect(page.get_by_text("not a sound")).to_be_visible()
    generate(page, "like this")
    expect(page.locator(SHOWN)).to_have_count(1)
    assert "control_video" in last(pictures_server).arguments


def test_all_of_it_is_done_by_keyboard_alone(pictures_server: ServedPage, open_page: OpenPage) -> None:
    page = open_page(pictures_server).page

    def tab_to(name: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            text = page.evaluate(
                "(document.activeElement.labels?.[0] ?? document.activeElement).textContent.trim()"
                " || document.activeElement.getAttribute('aria-label')"
            )
            if text == name:
                return
        raise AssertionError(f"{name!r} is not reached")

    tab_to("Skip to the content")
    page.keyboard.press("Enter")
    tab_to("Prompt")
    page.keyboard.type("a fox without a mouse")
    page.keyboard.press("Control+Enter")
    expect(page.locator(SHOWN)).to_have_count(1)
    tab_to("Again")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    assert page.get_by_label("Seed").input_value()
    tab_to("Copy as code")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_two_are_compared_and_one_is_made_again_with_the_same_settings(
    pictures_server: ServedPage, open_page: OpenPage, shots: Path
) -> None:
    page = open_page(pictures_server).page
    page.get_by_label("Image", exact=True).set_input_files(GIVEN)
    page.get_by_label("Mask image").set_input_files(MASK)
    page.get_by_label("Number").fill("2")
    page.get_by_label("Seed").fill("40")
    generate(page, "two foxes")
    expect(page.locator(SHOWN)).to_have_count(2)
    for box in page.get_by_role("checkbox", name="Compare").all():
        box.check()
    page.get_by_role("button", name="Compare two").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("tr.differs th").first).to_have_text("seed")
    expect(dialog.locator("img")).to_have_count(2)
    page.screenshot(path=shots / "compare.png")
    dialog.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Clear the form").click()
    page.locator(f"{SHOWN} .again").first.click()
    assert page.get_by_label("Seed").input_value() == "41"
    expect(page.locator(".given img")).to_have_count(2)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(SHOWN)).to_have_count(3)
    assert (last(pictures_server).seed, "image" in last(pictures_server).arguments) == (41, True)


def test_the_copied_code_makes_the_same(
    pictures_server: ServedPage, videos_server: ServedPage, open_page: OpenPage, in_folder: Path
) -> None:
    for served, ending in ((pictures_server, "png"), (videos_server, "mp4")):
        page = open_page(served).page
        page.get_by_label("Seed").fill("5")
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        if ending == "png":
            for name, file in (("Image", GIVEN), ("Mask image", MASK)):
                page.get_by_label(name, exact=True).set_input_files(file)
                (in_folder / f"{name.lower().replace(' ', '_')}.png").write_bytes(file["buffer"])
        page.get_by_role("button", name="Copy as code").click()
        for language, run in RUN.items():
            before = len(served.server.encoder.requests)
            run(page.locator(f"[data-language={language}]").inner_text())
            made_file = in_folder / f"made-0.{ending}"
            assert made_file.read_bytes()
            made_file.unlink()
            made = served.server.encoder.requests[before:]
            assert [(each.seed, each.arguments["prompt"]) for each in made] == [(5, PROMPT)], language
            assert ("image" in made[0].arguments) == (ending == "png")


PROMPT = 'it\'s "a" $fox'


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the code runs that is copied."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(code: str) -> None:
    """In this process, which is quicker: the import of OpenAI's client takes seconds."""
    exec(compile(code, "copied.py", "exec"), {})


def run_program(*command: str) -> Callable[[str], None]:
    def run(code: str) -> None:
        ran = subprocess.run([*command, code], capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, (code, ran.stderr)

    return run


RUN = {"curl": run_program("bash", "-c"), "Python": run_python}
if shutil.which("node"):
    RUN["JavaScript"] = run_program("node", "--input-type=module", "-e")


def test_adapters_that_the_server_knows_are_chosen_with_their_strength(
    pictures_server: ServedPage, open_page: OpenPage
) -> None:
    visit = open_page(pictures_server, wait=False)
    page = visit.page
    own = [{"name": "ink", "scale": 0.8, "parent": "flux"}, {"name": "pixel", "scale": 1.0, "parent": "flux"}]
    adapters = {"data": [*own, {"name": "of another model", "scale": 1.0, "parent": "wan"}]}
    page.unroute_all()
    page.route("**/v1/loras", lambda route: route.fulfill(json=adapters))
    sent: list[Any] = []
    page.route("**/v1/images/generations", lambda route: (sent.append(route.request.post_data_json), route.abort()))
    visit.expected = ("ERR_FAILED",)
    page.reload()
    page.get_by_role("checkbox", name="ink").check()
    page.get_by_label("Strength of ink").fill("0.5")
    page.get_by_role("checkbox", name="pixel").check()
    expect(page.get_by_role("checkbox", name="of another model")).to_have_count(0)
    generate(page, "a fox")
    expect(page.locator(".run .state")).to_contain_text("The server cannot be reached.")
    assert sent[0]["loras"] == [{"name": "ink", "scale": 0.5}, {"name": "pixel"}]
    page.get_by_role("button", name="Cancel").click()


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(tmp_path: Path, open_page: OpenPage) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hash_of('sk-right')}\n")
    with served_page(tmp_path / "out", describing=INPAINTING, api_keys_file=keys) as served:
        visit = open_page(served, wait=False)
        visit.expected = ("401",)
        page = visit.page
        for key in ("sk-wrong", "sk-right"):
            page.get_by_role("dialog").get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use it").click()
        page.wait_for_selector("#generate:enabled")
        generate(page, "a fox with a key")
        expect(page.locator(SHOWN)).to_have_count(1)
        assert not any("sk-" in url for url in visit.requests)
        kept = page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href].join()")
        assert "sk-" not in kept
        page.get_by_role("button", name="Copy as code").click()
        code = page.get_by_role("dialog").inner_text()
        assert "TRIPTYCH_API_KEY" in code
        assert "sk-right" not in code
        visit.check()


def test_nothing_that_the_server_says_becomes_a_part_of_the_page(
    pictures_server: ServedPage, open_page: OpenPage
) -> None:
    bad = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    visit = open_page(pictures_server, wait=False)
    page = visit.page
    page.unroute_all()
    page.route("**/v1/loras", lambda route: route.fulfill(json={"data": [{"name": bad, "scale": 1}]}))
    details = page.evaluate("fetch('v1/models/flux').then(answer => answer.json())")
    details["arguments"][0]["description"] = bad
    details["id"] = bad
    page.route("**/v1/models/*", lambda route: route.fulfill(body=json.dumps(details), content_type="application/json"))
    visit.expected = ("400",)
    page.reload()
    page.wait_for_selector("#generate:enabled")
    generate(page, bad)
    expect(page.locator(SHOWN)).to_have_count(1)
    assert page.title() != "taken"
    assert page.locator("main img[src=x], main script").count() == 0
    expect(page.locator(f"{SHOWN} .prompt")).to_have_text(bad)
