"""The served application over HTTP: the unsplit pipeline's pictures, refusals by name, and replicas that die."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml
from PIL import Image

from tests.support.further import all_but
from tests.support.served_application import ServedApplication, error_of, picture_of
from tests.support.unsplit import unsplit_picture

pytestmark = pytest.mark.timeout(600)  # the first test starts Ray

PROMPT = "a small cat"


@pytest.fixture
def client(served: ServedApplication) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def same_pixels(picture: Image.Image, other: Image.Image) -> bool:
    return picture.mode == other.mode and np.array_equal(np.asarray(picture), np.asarray(other))


# --- pictures ---


def test_the_openai_client_gets_the_picture_of_the_unsplit_pipeline(
    client: openai.OpenAI, flux_checkpoint: Path
) -> None:
    answer = client.images.generate(
        model="flux",
        prompt=PROMPT,
        size="48x32",  # type: ignore[arg-type]
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5},
    )
    assert answer.data
    picture = picture_of(answer.data[0].model_dump())
    truth = unsplit_picture(
        flux_checkpoint, 7, prompt=PROMPT, width=48, height=32, num_inference_steps=3, guidance_scale=2.5
    )
    assert picture.format == "PNG"
    assert picture.size == (48, 32)
    assert same_pixels(picture, truth)


def test_the_seeds_of_n_pictures_count_up(served: ServedApplication, flux_checkpoint: Path) -> None:
    items = served.pictures(prompt=PROMPT, n=3, seed=5)
    assert [item["seed"] for item in items] == [5, 6, 7]
    for item in items:
        assert same_pixels(picture_of(item), unsplit_picture(flux_checkpoint, item["seed"], prompt=PROMPT))


def test_a_seed_that_was_chosen_is_told_and_makes_the_picture_again(served: ServedApplication) -> None:
    [chosen] = served.pictures(prompt=PROMPT)
    [again] = served.pictures(prompt=PROMPT, seed=chosen["seed"])
    assert again == chosen


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_file_has_the_format_that_was_asked_for(output_format: str, served: ServedApplication) -> None:
    answer = served.generate(prompt=PROMPT, output_format=output_format).json()
    assert picture_of(answer["data"][0]).format == output_format.upper()
    assert answer["output_format"] == output_format


def test_the_file_says_how_it_was_made(served: ServedApplication) -> None:
    [item] = served.pictures(prompt=PROMPT, seed=3, num_inference_steps=2, size="32x48")
    metadata = yaml.safe_load(picture_of(item).info["parameters"])
    assert {name: metadata[name] for name in ("model", "seed", "prompt", "steps", "size")} == {
        "model": "flux",
        "seed": 3,
        "prompt": PROMPT,
        "steps": 2,
        "size": "32x48",
    }


def test_a_url_leads_to_the_same_picture(served: ServedApplication) -> None:
    [stored] = served.pictures(prompt=PROMPT, seed=1, response_format="url")
    [sent] = served.pictures(prompt=PROMPT, seed=1)
    file = httpx.get(stored["url"])
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    assert stored["b64_json"] is None
    picture = served.folder / "fetched.png"
    picture.write_bytes(file.content)
    with Image.open(picture) as fetched:
        assert same_pixels(fetched, picture_of(sent))


def test_requests_at_the_same_time_each_get_their_own_picture(served: ServedApplication, flux_checkpoint: Path) -> None:
    def ask(seed: int) -> Any:
        body = {"prompt": f"cat number {seed}", "seed": seed, "num_inference_steps": 2 + seed}
        return served.pictures(**body)[0]

    with ThreadPoolExecutor(6) as threads:
        items = list(threads.map(ask, range(6)))
    for seed, item in enumerate(items):
        truth = unsplit_picture(flux_checkpoint, seed, prompt=f"cat number {seed}", num_inference_steps=2 + seed)
        assert same_pixels(picture_of(item), truth), f"seed {seed}"


# --- processes ---


def test_three_processes_hold_one_stage_each(served: ServedApplication) -> None:
    answer = served.health()
    stages = answer.json()["stages"]
    assert answer.status_code == 200
    assert set(stages) == {"Encoder", "Denoiser", "VAE"}
    assert len({stage["process_id"] for stage in stages.values()}) == 3
    for name, stage in stages.items():
        assert stage["process_id"] == served.process_of(name).pid
    assert {name: set(stage["weight_bytes"]) for name, stage in stages.items()} == {
        "Encoder": {"text_encoder", "text_encoder_2", "vae"},
        "Denoiser": {"transformer"},
        "VAE": {"vae"},
    }


def test_the_ingress_has_no_torch(served: ServedApplication) -> None:
    assert has_torch(served.process_of("Encoder")), "or this test would see torch nowhere"
    assert not has_torch(served.process_of("Ingress"))


def has_torch(process: psutil.Process) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


# --- what is asked beside pictures ---


def test_the_served_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["flux"]
    assert client.models.retrieve("flux").owned_by == "triptych"
    with pytest.raises(openai.NotFoundError, match="'dall-e-3' is not served here"):
        client.models.retrieve("dall-e-3")


def test_the_routes_are_documented(served: ServedApplication) -> None:
    page = httpx.get(f"{served.url}/docs")
    assert page.status_code == 200
    assert "swagger" in page.text
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/models", "/health"} <= set(paths)


def test_serve_status_tells_of_every_deployment(served: ServedApplication) -> None:
    status = yaml.safe_load(served.cli("status"))["applications"]["triptych"]
    assert status["status"] == "RUNNING"
    assert {name: deployment["status"] for name, deployment in status["deployments"].items()} == dict.fromkeys(
        ("Ingress", "Encoder", "Denoiser", "VAE"), "HEALTHY"
    )


def test_serve_config_prints_what_is_served(served: ServedApplication) -> None:
    [application] = served.config["applications"]
    assert yaml.safe_load(served.cli("config")) == application


# --- refusals ---

REFUSED: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "wrong size": ({"size": "33x32"}, 400, "size"),
    "size that is too large": ({"size": "99999x32"}, 400, "size"),
    "size that is no size": ({"size": "large"}, 400, "size"),
    "unknown model": ({"model": "dall-e-3"}, 404, "model"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "blank prompt": ({"prompt": " \n"}, 400, "prompt"),
    "prompt that is no text": ({"prompt": 5}, 400, "prompt"),
    "prompt of 10 MB": ({"prompt": "a" * 10_000_000}, 400, "prompt"),
    "steps 0": ({"num_inference_steps": 0}, 400, "num_inference_steps"),
    "too many steps": ({"num_inference_steps": 1001}, 400, "num_inference_steps"),
    "n 0": ({"n": 0}, 400, "n"),
    "n too large": ({"n": 11}, 400, "n"),
    "negative seed": ({"seed": -1}, 400, "seed"),
    "unknown field": ({"stepz": 3}, 400, "stepz"),
    "field of another pipeline": ({"strength": 0.5}, 400, "strength"),
    "unknown argument": ({"extra_args": {"stepz": 3}}, 400, "extra_args.stepz"),
    "argument of the wrong type": ({"extra_args": {"sigmas": ["x"]}}, 400, "extra_args.sigmas"),
    "no step, seen by the encoder": ({"extra_args": {"sigmas": []}}, 400, "sigmas"),
    "two texts for one picture, seen by the denoiser": ({"extra_args": {"prompt_2": ["a", "b"]}}, 400, "prompt_2"),
    "deadline that nothing meets": ({"deadline_s": 1e-9}, 400, "deadline_s"),
    "unknown format": ({"output_format": "gif"}, 400, "output_format"),
    "body of 30 MB": ({"prompt": "a" * 30_000_000}, 413, None),
}


# Each place that refuses: the ingress by type, by the model's description and by size, then the stages. tests/unit has
# the others without Ray.
ALWAYS = (
    "wrong size",
    "unknown model",
    "prompt of 10 MB",
    "argument of the wrong type",
    "no step, seen by the encoder",
    "two texts for one picture, seen by the denoiser",
    "deadline that nothing meets",
    "body of 30 MB",
)


@pytest.mark.parametrize("reason", all_but(ALWAYS, REFUSED))
def test_a_bad_request_is_refused_by_the_name_of_its_field_and_the_next_one_works(
    reason: str, served: ServedApplication
) -> None:
    body, status, field = REFUSED[reason]
    answer = served.generate(**{"prompt": PROMPT, **body})
    error = error_of(answer)
    assert answer.status_code == status
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field is None or field.rpartition(".")[2] in error["message"]
    assert len(error["message"]) < 1000, "a long value is not repeated"
    assert served.pictures(prompt=PROMPT)


@pytest.mark.parametrize("content", all_but([b"{bad"], [b"{bad", b"\xff\xfe", b"[1]", b"null", b""]))
def test_a_body_that_is_no_json_object_is_refused_and_the_next_request_works(
    content: bytes, served: ServedApplication
) -> None:
    answer = httpx.post(
        f"{served.url}/v1/images/generations", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "JSON" in error_of(answer)["message"]
    assert served.pictures(prompt=PROMPT)


def test_a_video_is_refused_by_a_model_that_makes_pictures(served: ServedApplication) -> None:
    answer = httpx.post(f"{served.url}/v1/videos/generations", json={"prompt": PROMPT})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "model")
    assert "makes images" in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/files/images/2026/01/01/none-0.png", "/v1/files/%2e%2e/secret"])
def test_what_is_not_there_is_a_404_in_openais_shape(path: str, served: ServedApplication) -> None:
    answer = httpx.get(f"{served.url}{path}")
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "invalid_request_error"


# --- replicas that die ---


@pytest.mark.rest
def test_a_request_after_the_death_of_both_ends_is_answered_with_the_same_picture(
    served: ServedApplication, flux_checkpoint: Path
) -> None:
    dead = {deployment: served.process_of(deployment) for deployment in ("Encoder", "VAE")}
    for process in dead.values():
        process.kill()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(served.pictures, prompt=PROMPT, seed=11)
        wait_until(lambda: set(served.health().json()["missing"]) == set(dead))
        [item] = asked.result()
    assert same_pixels(picture_of(item), unsplit_picture(flux_checkpoint, 11, prompt=PROMPT))
    served.wait_until_healthy()
    for deployment, process in dead.items():
        assert served.process_of(deployment).pid != process.pid


@pytest.mark.rest
def test_a_replica_that_dies_while_it_denoises_costs_no_request(
    served: ServedApplication, flux_checkpoint: Path
) -> None:
    arguments = {"prompt": PROMPT, "num_inference_steps": 400}
    dead = served.process_of("Denoiser")
    used_before_s = dead.cpu_times().user
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(served.pictures, seed=12, **arguments)
        wait_until(lambda: dead.cpu_times().user > used_before_s + 0.7)  # of the two seconds or more that it takes
        assert not asked.done()
        dead.kill()
        wait_until(lambda: served.health().status_code == 503)
        [item] = asked.result()
    assert same_pixels(picture_of(item), unsplit_picture(flux_checkpoint, 12, **arguments))
    served.wait_until_healthy()
    assert served.process_of("Denoiser").pid != dead.pid


def wait_until(happened: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.05)
