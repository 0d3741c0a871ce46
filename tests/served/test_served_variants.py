"""Other applications beside the first: placements, storage in S3, video, and those that cannot start."""

import base64
import io
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import av
import httpx
import numpy as np
import numpy.typing as npt
import pytest

from tests.support.s3_server import S3Server, s3_server
from tests.support.served_application import ServedApplication, application, picture_of
from tests.support.tiny_models import checkpoint
from tests.support.unsplit import unsplit_picture, unsplit_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "a small cat"
TWO_STAGE = ("EncoderVAE", "Denoiser")
ONE_STAGE = ("Pipeline",)
BUCKET = "pictures"
BT709_LUMA = (0.2126, 0.7152, 0.0722)  # of R, G, B: ITU-R BT.709


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def placements(served: ServedApplication, flux_checkpoint: Path, s3: S3Server) -> Iterator[ServedApplication]:
    """The first application's model again: in two stages, and in one stage that stores in S3."""
    two_stage = application("two_stage", flux_checkpoint, TWO_STAGE, served.folder, placement="two_stage")
    variables = s3_variables(s3, BUCKET)
    one_stage = application("one_stage", flux_checkpoint, ONE_STAGE, served.folder, variables, placement="one_stage")
    with served.beside(two_stage, one_stage):
        served.wait_until_healthy("/two_stage")
        served.wait_until_healthy("/one_stage")
        yield served


@pytest.mark.parametrize("placement", ["two_stage", "one_stage"])
def test_every_placement_makes_the_picture_of_the_unsplit_pipeline(
    placement: str, placements: ServedApplication, flux_checkpoint: Path
) -> None:
    [item] = placements.pictures(f"/{placement}", prompt=PROMPT, seed=21)
    truth = unsplit_picture(flux_checkpoint, 21, prompt=PROMPT)
    assert np.array_equal(np.asarray(picture_of(item)), np.asarray(truth))


def test_every_placement_makes_the_same_file(placements: ServedApplication) -> None:
    three, two, one = (
        placements.pictures(prefix, prompt=PROMPT, seed=22)[0]["b64_json"]
        for prefix in ("", "/two_stage", "/one_stage")
    )
    assert three == two == one


@pytest.mark.parametrize(("placement", "deployments"), [("two_stage", TWO_STAGE), ("one_stage", ONE_STAGE)])
def test_a_placement_has_a_process_for_each_of_its_deployments(
    placement: str, deployments: tuple[str, ...], placements: ServedApplication
) -> None:
    stages = placements.health(f"/{placement}").json()["stages"]
    assert {name: stage["process_id"] for name, stage in stages.items()} == {
        name: placements.process_of(name, placement).pid for name in deployments
    }


# --- S3 ---


def test_a_picture_in_s3_is_the_one_that_was_made(placements: ServedApplication, s3: S3Server) -> None:
    [item] = placements.pictures("/one_stage", prompt=PROMPT, seed=23, response_format="url")
    [made] = placements.pictures(prompt=PROMPT, seed=23)
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


def test_a_picture_in_s3_can_be_read_through_the_ingress(placements: ServedApplication, s3: S3Server) -> None:
    [item] = placements.pictures("/one_stage", prompt=PROMPT, seed=24)
    key = item["url"].partition(f"/{BUCKET}/")[2].partition("?")[0]
    file = httpx.get(f"{placements.url}/one_stage/v1/files/{key}")
    assert (file.headers["content-type"], file.content) == ("image/png", base64.b64decode(item["b64_json"]))


# --- video, and applications that cannot start ---


@pytest.fixture(scope="module")
def others(
    served: ServedApplication, flux_checkpoint: Path, checkpoints_root: Path, s3: S3Server
) -> Iterator[ServedApplication]:
    """One that makes videos, and two that have a mistake in their environment."""
    wan22 = checkpoint("wan22", checkpoints_root)
    wan = application("wan", wan22, TWO_STAGE, served.folder, placement="two_stage", public_url=f"{served.url}/wan")
    no_bucket, no_device = (
        application(name, flux_checkpoint, ONE_STAGE, served.folder, variables, placement="one_stage")
        for name, variables in (
            ("no_bucket", s3_variables(s3, "no-such-bucket")),
            ("no_device", {"SGLANG_DIFFUSION_TARGET_DEVICE": "npu"}),
        )
    )
    for each in (no_bucket, no_device):
        each["deployments"] = [
            {**deployment, "max_constructor_retry_count": 1}
            for deployment in ({"name": "Ingress"}, *each["deployments"])
        ]
    with served.beside(wan, no_bucket, no_device):
        served.wait_until_healthy("/wan")
        yield served


def test_a_video_model_makes_a_video_that_plays(others: ServedApplication, checkpoints_root: Path) -> None:
    body = {"prompt": PROMPT, "seed": 31, "size": "48x32", "num_frames": 9, "response_format": "b64_json"}
    answer = httpx.post(f"{others.url}/wan/v1/videos/generations", json=body, timeout=120).json()
    [item] = answer["data"]
    frames, rate = decoded(base64.b64decode(item["b64_json"]))
    assert frames.shape == (9, 32, 48)
    assert rate == answer["fps"] == 16
    assert (answer["num_frames"], answer["size"]) == (9, "48x32")

    def truth(seed: int) -> npt.NDArray[np.float64]:
        made = unsplit_video(checkpoints_root / "wan22", seed, prompt=PROMPT, width=48, height=32, num_frames=9)
        return np.stack([np.asarray(frame) for frame in made]) @ BT709_LUMA

    # H.264 loses a little of this noise, whichever video it is held against: the right one must be the nearest.
    right = truth(31)
    others_of_its_kind = {"another seed": truth(32), "backwards": right[::-1], "mirrored": right[:, :, ::-1]}
    lost = np.abs(frames - right).mean()
    assert lost < 8, "of 255"
    for name, other in others_of_its_kind.items():
        assert lost < np.abs(frames - other).mean(), name


def test_a_url_below_the_public_one_leads_to_the_video(others: ServedApplication) -> None:
    body = {"prompt": PROMPT, "seed": 31, "size": "48x32", "num_frames": 5}
    [item] = httpx.post(f"{others.url}/wan/v1/videos/generations", json=body, timeout=120).json()["data"]
    file = httpx.get(item["url"])
    assert file.headers["content-type"] == "video/mp4"
    assert len(decoded(file.content)[0]) == 5


def test_a_picture_is_refused_by_a_model_that_makes_videos(others: ServedApplication) -> None:
    answer = others.generate("/wan", prompt=PROMPT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("name", "deployment", "sentence"),
    [
        ("no_bucket", "Ingress", "there is no bucket SGLANG_S3_BUCKET_NAME='no-such-bucket'"),
        ("no_device", "Pipeline", "SGLANG_DIFFUSION_TARGET_DEVICE=npu cannot be used"),
    ],
)
def test_serve_status_says_why_an_application_cannot_start(
    name: str, deployment: str, sentence: str, others: ServedApplication
) -> None:
    give_up = time.monotonic() + 180
    while (status := others.status()[name])["status"] != "DEPLOY_FAILED":
        assert time.monotonic() < give_up, status
    assert sentence in status["deployments"][deployment]["message"]


def test_the_first_application_serves_on(others: ServedApplication) -> None:
    assert others.pictures(prompt=PROMPT)


def decoded(data: bytes) -> tuple[npt.NDArray[np.float64], float]:
    """The luma [F, H, W] of the frames in 0..255, and how many frames a second has."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert rate is not None
    return (np.stack(frames).astype(np.float64) - 16) * 255 / 219, float(rate)  # black is 16, white 235


def s3_variables(server: S3Server, bucket: str) -> dict[str, str]:
    return {
        "SGLANG_CLOUD_STORAGE_TYPE": "s3",
        "SGLANG_S3_BUCKET_NAME": bucket,
        "SGLANG_S3_ENDPOINT_URL": server.endpoint,
        "SGLANG_S3_ACCESS_KEY_ID": server.access_key,
        "SGLANG_S3_SECRET_ACCESS_KEY": server.secret_key,
    }
