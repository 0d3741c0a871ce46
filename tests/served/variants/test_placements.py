"""The first application's model in two stages and in one; the two store in S3."""

import base64
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.s3_server import S3Server
from tests.support.served_application import ONE_STAGE, TWO_STAGE, ServedApplication, error_of, picture_of
from tests.support.served_fixtures import BUCKET
from tests.support.unsplit import unsplit_picture

pytestmark = [pytest.mark.timeout(600), pytest.mark.rest]

PROMPT = "a small cat"


@pytest.mark.parametrize("placement", ["two_stage", "one_stage"])
def test_every_placement_makes_the_picture_of_the_unsplit_pipeline(
    placement: str, variants: ServedApplication, flux_checkpoint: Path
) -> None:
    [item] = variants.pictures(f"/{placement}", prompt=PROMPT, seed=21)
    truth = unsplit_picture(flux_checkpoint, 21, prompt=PROMPT)
    assert np.array_equal(np.asarray(picture_of(item)), np.asarray(truth))


def test_every_placement_makes_the_same_file(variants: ServedApplication) -> None:
    three, two, one = (
        variants.pictures(prefix, prompt=PROMPT, seed=22)[0]["b64_json"] for prefix in ("", "/two_stage", "/one_stage")
    )
    assert three == two == one


@pytest.mark.parametrize("placement", ["two_stage", "one_stage"])
@pytest.mark.parametrize(("argument", "value"), [("sigmas", []), ("prompt_2", ["a", "b"])])
def test_every_placement_refuses_what_the_pipeline_cannot_use(
    argument: str, value: list[str], placement: str, variants: ServedApplication
) -> None:
    answer = variants.generate(f"/{placement}", prompt=PROMPT, extra_args={argument: value})
    assert (answer.status_code, error_of(answer)["param"]) == (400, argument)


@pytest.mark.parametrize(("placement", "deployments"), [("two_stage", TWO_STAGE), ("one_stage", ONE_STAGE)])
def test_a_placement_has_a_process_for_each_of_its_deployments(
    placement: str, deployments: tuple[str, ...], variants: ServedApplication
) -> None:
    stages = variants.health(f"/{placement}").json()["stages"]
    assert {name: stage["process_id"] for name, stage in stages.items()} == {
        name: variants.process_of(name, placement).pid for name in deployments
    }


# --- S3 ---


def test_a_picture_in_s3_is_the_one_that_was_made(variants: ServedApplication, s3: S3Server) -> None:
    [item] = variants.pictures("/two_stage", prompt=PROMPT, seed=23, response_format="url")
    [made] = variants.pictures(prompt=PROMPT, seed=23)
    data = base64.b64decode(made["b64_json"])
    key = item["url"].partition(f"/{BUCKET}/")[2].partition("?")[0]

    with closing(s3.client()) as client:
        stored = client.get_object(Bucket=BUCKET, Key=key)
        with closing(stored["Body"]) as body:
            assert body.read() == data
    assert stored["ContentType"] == "image/png"
    assert stored["Metadata"]["seed"] == "23"

    signed, unsigned = httpx.get(item["url"]), httpx.get(item["url"].partition("?")[0])
    assert (signed.status_code, signed.content) == (200, data)
    assert unsigned.status_code == 403, "the bucket is not public: it is the signature that opens it"


def test_a_picture_in_s3_can_be_read_through_the_ingress(variants: ServedApplication, s3: S3Server) -> None:
    [item] = variants.pictures("/two_stage", prompt=PROMPT, seed=24)
    key = item["url"].partition(f"/{BUCKET}/")[2].partition("?")[0]
    file = httpx.get(f"{variants.url}/two_stage/v1/files/{key}")
    assert (file.headers["content-type"], file.content) == ("image/png", base64.b64decode(item["b64_json"]))
