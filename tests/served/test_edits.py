"""Edits, streams and guards of the served application, as the OpenAI client and an impatient crowd meet them."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serve_app.api_keys import new_key
from tests.support.served_application import PLAIN, ServedApplication, application, error_of
from tests.support.tiny_models import checkpoint
from tests.support.unsplit import unsplit_picture

pytestmark = pytest.mark.timeout(600)

PROMPT = "a small cat"
KEY, KEY_LINE = new_key("anna")
ORIGIN = "https://pages.example"


@pytest.fixture(scope="module")
def inpaint_checkpoint(checkpoints_root: Path) -> Path:
    return checkpoint("flux_inpaint", checkpoints_root)


@pytest.fixture(scope="module")
def guarded(served: ServedApplication, inpaint_checkpoint: Path) -> Iterator[ServedApplication]:
    """A model that edits, beside the first; it asks for keys and has a short queue."""
    keys = served.folder / "api_keys"
    keys.write_text(KEY_LINE, encoding="utf-8")
    beside = application(
        "edits",
        inpaint_checkpoint,
        ("Pipeline",),
        served.folder,
        placement="one_stage",
        api_keys_file=str(keys),
        cors_origins=[ORIGIN],
        admission={"max_queue_s": 20, "first_guess_s": 5},
    )
    beside["runtime_env"] |= PLAIN  # in every run one replica of the stages imports what it needs by itself
    with served.beside(beside):
        served.wait_until_healthy("/edits")
        yield served


@pytest.fixture(scope="module", autouse=True)
def stopped_body(served: ServedApplication) -> Iterator[Future[bytes]]:
    """What answers a request whose body stops; it takes a while, during which the other tests run."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(send_half_a_body, served.url)


def send_half_a_body(url: str) -> bytes:
    address = urlsplit(url)
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {address.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=100) as connection:
        connection.sendall(head.encode() + b'{"prompt": "')
        return connection.recv(10_000)


@pytest.fixture
def client(guarded: ServedApplication) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/edits/v1", api_key=KEY, max_retries=0) as client:
        yield client


def pictures() -> tuple[Image.Image, Image.Image]:
    """A picture, and a mask that has its right half repainted."""
    numbers = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, 16:] = 255
    return Image.fromarray(numbers), Image.fromarray(mask)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def test_the_openai_client_gets_the_edit_of_the_unsplit_pipeline(
    client: openai.OpenAI, inpaint_checkpoint: Path
) -> None:
    image, mask = pictures()
    answer = client.images.edit(
        image=png(image), mask=png(mask), prompt=PROMPT, extra_body={"seed": 5, "strength": 0.9}
    )
    truth = unsplit_picture(inpaint_checkpoint, 5, prompt=PROMPT, image=image, mask_image=mask, strength=0.9)
    assert answer.data
    assert np.array_equal(np.asarray(opened(answer.data[0].b64_json)), np.asarray(truth))


def test_a_mask_of_openais_and_the_pictures_own_alpha_repaint_what_is_transparent(
    client: openai.OpenAI, inpaint_checkpoint: Path
) -> None:
    image, mask = pictures()
    holed = image.convert("RGBA")
    holed.putalpha(Image.eval(mask.convert("L"), lambda level: 255 - level))
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), holed).convert("RGB")
    asked = {"seed": 5, "strength": 0.9}
    by_mask = client.images.edit(image=png(image), mask=png(holed), prompt=PROMPT, extra_body=asked)
    by_picture = client.images.edit(image=png(holed), prompt=PROMPT, extra_body=asked)
    for answer, source in ((by_mask, image), (by_picture, on_white)):
        truth = unsplit_picture(inpaint_checkpoint, 5, prompt=PROMPT, image=source, mask_image=mask, strength=0.9)
        assert answer.data
        assert np.array_equal(np.asarray(opened(answer.data[0].b64_json)), np.asarray(truth))
        assert answer.usage
        assert answer.usage.input_tokens_details.text_tokens > 0
        assert answer.usage.output_tokens > 0
    with pytest.raises(openai.BadRequestError, match="no pixel of it is transparent"):
        client.images.edit(image=png(image), mask=png(image.convert("RGBA")), prompt=PROMPT)


def test_a_streamed_edit_is_the_same_picture(client: openai.OpenAI) -> None:
    image, mask = (png(picture) for picture in pictures())
    extra = {"seed": 6}
    with client.images.edit(image=image, mask=mask, prompt=PROMPT, stream=True, extra_body=extra) as stream:
        [event] = stream
    answer = client.images.edit(image=image, mask=mask, prompt=PROMPT, extra_body=extra)
    assert event.type == "image_edit.completed"
    assert answer.data
    assert event.b64_json == answer.data[0].b64_json


def test_a_streamed_generation_is_the_picture_of_the_unsplit_pipeline(
    served: ServedApplication, flux_checkpoint: Path
) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
        client.images.generate(prompt=PROMPT, stream=True, extra_body={"seed": 9}) as stream,
    ):
        [event] = stream
    assert event.type == "image_generation.completed"
    truth = unsplit_picture(flux_checkpoint, 9, prompt=PROMPT)
    assert np.array_equal(np.asarray(opened(event.b64_json)), np.asarray(truth))


def test_generations_of_a_model_that_edits_are_sent_to_edits(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/images/edits"):
        client.images.generate(prompt=PROMPT)


def test_a_wrong_key_is_refused_and_health_is_open(guarded: ServedApplication) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/edits/v1", api_key="sk-wrong", max_retries=0).models.list()
    assert guarded.health("/edits").status_code == 200
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 200, "the other application asks for no key"


def test_a_web_page_of_an_allowed_origin_may_call(guarded: ServedApplication) -> None:
    headers = {"origin": ORIGIN, "access-control-request-method": "POST"}
    allowed = httpx.options(f"{guarded.url}/edits/v1/images/edits", headers=headers)
    other = httpx.options(f"{guarded.url}/v1/images/edits", headers=headers)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in other.headers


def test_an_answer_has_one_request_id_and_its_seconds(served: ServedApplication) -> None:
    answer = served.generate(prompt=PROMPT, seed=1)
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert 0 < float(answer.headers["x-compute-seconds"]) < answer.elapsed.total_seconds()
    assert 0 <= float(answer.headers["x-queue-seconds"]) < answer.elapsed.total_seconds()


def test_a_crowd_gets_pictures_or_429_while_health_stays_true(guarded: ServedApplication) -> None:
    image, mask = (base64.b64encode(png(picture)).decode() for picture in pictures())
    body = {"prompt": PROMPT, "image": image, "mask": mask, "n": 2, "num_inference_steps": 30, "strength": 1.0}
    headers = {"authorization": f"Bearer {KEY}"}
    done = threading.Event()
    healthy: list[int] = []

    def watch() -> None:
        while not done.wait(0.2):
            healthy.append(guarded.health("/edits").status_code)

    def ask(number: int) -> httpx.Response:
        url = f"{guarded.url}/edits/v1/images/edits"
        return httpx.post(url, json={**body, "seed": number}, headers=headers, timeout=300)

    # Not yet measured at this size and pace, a request counts as the first guess or as what it really takes.
    with ThreadPoolExecutor(41) as threads:
        watching = threads.submit(watch)
        answers = list(threads.map(ask, range(40)))
        done.set()
        watching.result()
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 429}
    assert 200 in statuses
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert error_of(answer)["code"] == "rate_limit_exceeded"
    assert set(healthy) == {200}
    assert httpx.post(
        f"{guarded.url}/edits/v1/images/edits", json={**body, "seed": 1}, headers=headers, timeout=300
    ).is_success


def test_a_body_that_stops_is_given_up_and_the_server_goes_on(
    stopped_body: Future[bytes], served: ServedApplication
) -> None:
    assert stopped_body.result().startswith(b"HTTP/1.1 408")
    assert served.generate(prompt=PROMPT).status_code == 200
