"""LoRAs over HTTP: added while the server runs, asked for by OpenAI's client, mixed with requests that have none."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.support.served_application import DEFAULT_ARGUMENTS, LORAS, ServedApplication, picture_of
from tests.support.tiny_loras import TINY_LORAS, LoraFile, unsplit_with_loras, write_lora
from tests.support.tiny_models.checkpoints import load_unsplit
from tests.support.unsplit import unsplit_picture

pytestmark = pytest.mark.timeout(600)  # the first test starts Ray

PROMPT = "a small cat"
Loras = dict[str, LoraFile]


@pytest.fixture(scope="module")
def loras(served: ServedApplication, flux_checkpoint: Path) -> Iterator[Loras]:
    """Three files, added under their own names, deleted at the end."""
    unsplit = load_unsplit(flux_checkpoint)
    files = {lora.name: write_lora(unsplit, lora, served.folder / LORAS)[0] for lora in TINY_LORAS}
    for name, file in files.items():
        answer = httpx.post(f"{served.url}/v1/loras", json={"name": name, "path": file.path.name}, timeout=280)
        assert answer.is_success, answer.text
    yield files
    for name in files:
        httpx.delete(f"{served.url}/v1/loras/{name}", timeout=60).raise_for_status()


@pytest.fixture
def client(served: ServedApplication) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def unsplit_styled(checkpoint: Path, seed: int, *files: tuple[LoraFile, float]) -> Image.Image:
    """What `load_lora_weights` and `set_adapters` give."""
    pipeline = unsplit_with_loras(checkpoint, files)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        made: Any = pipeline(**DEFAULT_ARGUMENTS, prompt=PROMPT, generator=generator, output_type="pil")
    picture: Image.Image = made.images[0]
    return picture


def difference(picture: Image.Image, other: Image.Image) -> int:
    """The largest of any channel of any pixel, in levels of 255."""
    return int(np.abs(np.asarray(picture).astype(int) - np.asarray(other).astype(int)).max())


def test_the_openai_client_gets_the_picture_of_load_lora_weights(
    client: openai.OpenAI, loras: Loras, flux_checkpoint: Path
) -> None:
    answer = client.images.generate(
        model="flux",
        prompt=PROMPT,
        response_format="b64_json",
        extra_body={"seed": 3, "loras": [{"name": "a", "scale": 0.8}, {"name": "b", "scale": -0.5}]},
    )
    assert answer.data
    truth = unsplit_styled(flux_checkpoint, 3, (loras["a"], 0.8), (loras["b"], -0.5))
    assert difference(picture_of(answer.data[0].model_dump()), truth) == 0
    assert difference(truth, unsplit_picture(flux_checkpoint, 3, prompt=PROMPT)) > 0


def test_a_models_name_may_end_with_that_of_a_lora(client: openai.OpenAI, loras: Loras, flux_checkpoint: Path) -> None:
    assert {"flux:a", "flux:b", "flux:c"} <= {model.id for model in client.models.list()}
    answer = client.images.generate(model="flux:b", prompt=PROMPT, response_format="b64_json", extra_body={"seed": 4})
    assert answer.data
    assert (
        difference(picture_of(answer.data[0].model_dump()), unsplit_styled(flux_checkpoint, 4, (loras["b"], 1.0))) == 0
    )


def test_requests_of_different_loras_at_once_each_get_their_own(
    served: ServedApplication, loras: Loras, flux_checkpoint: Path
) -> None:
    """They may share batches, which round otherwise than a lone forward: by a level or two."""
    asked: list[str | None] = [None, "a", "b", "c", None, "b", "c", "a"]

    def made(name: str | None) -> Image.Image:
        given = {} if name is None else {"loras": [name]}
        return picture_of(served.pictures(prompt=PROMPT, seed=5, num_inference_steps=8, **given)[0])

    with ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(made, asked))
    alone = {name: made(name) for name in set(asked)}
    for name, picture in zip(asked, together, strict=True):
        assert difference(picture, alone[name]) <= 2
    assert all(difference(alone[None], alone[name]) > 2 for name in loras)


def test_a_lora_that_is_not_there_is_a_404_that_lists_those_that_are(served: ServedApplication, loras: Loras) -> None:
    answer = served.generate(prompt=PROMPT, loras=[{"name": "oil"}])
    assert answer.status_code == 404
    assert "a, b, c" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "s3://elsewhere/a.safetensors"])
def test_a_place_that_the_configuration_does_not_allow_is_refused(path: str, served: ServedApplication) -> None:
    answer = httpx.post(f"{served.url}/v1/loras", json={"name": "x", "path": path}, timeout=60)
    assert answer.status_code == 400
    assert "root" not in answer.text
