"""Applications that cannot start say why, and leave the others alone."""

import time

import pytest

from serve_app.tools.launch import LaunchError, deployment_messages
from tests.support.served_application import ServedApplication

pytestmark = [pytest.mark.timeout(600), pytest.mark.rest]


@pytest.mark.parametrize(
    ("name", "deployment", "sentence"),
    [
        ("no_bucket", "Ingress", "there is no bucket SGLANG_S3_BUCKET_NAME='no-such-bucket'"),
        ("no_device", "Pipeline", "SGLANG_DIFFUSION_TARGET_DEVICE=npu cannot be used"),
    ],
)
def test_serve_status_says_why_an_application_cannot_start(
    name: str, deployment: str, sentence: str, variants: ServedApplication
) -> None:
    give_up = time.monotonic() + 180
    while (status := variants.status()[name])["status"] != "DEPLOY_FAILED":
        assert time.monotonic() < give_up, status
        time.sleep(0.5)
    assert sentence in status["deployments"][deployment]["message"]
    with pytest.raises(LaunchError, match=f"application '{name}' failed to deploy") as error:
        deployment_messages({name: status})
    assert f"{deployment}: " in str(error.value)
    assert sentence in str(error.value)


def test_the_first_application_serves_on(variants: ServedApplication) -> None:
    assert variants.pictures(prompt="a small cat")
