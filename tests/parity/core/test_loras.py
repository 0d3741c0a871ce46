"""Requests with LoRAs, one model for each mechanism: against diffusers, and mixed in a batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lora_parity import LoraModel, check_alone, check_evicted, check_mixed

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

# A transformer, a U-Net with text encoders, two experts.
MODELS = ("flux", "sdxl", "wan22")


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, checkpoints_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoraModel]:
    made = LoraModel(request.param, checkpoints_root, tmp_path_factory.mktemp(f"loras-{request.param}"))
    yield made
    made.close()


def test_a_request_with_a_lora_has_the_bytes_of_diffusers_at_one_scale_and_at_one_for_each_component(
    model: LoraModel,
) -> None:
    check_alone(model, placements=(False,))


def test_requests_of_different_loras_share_batches_and_stay_close_to_lone_ones(model: LoraModel) -> None:
    check_mixed(model)


def test_loras_that_were_loaded_and_evicted_leave_no_trace(checkpoints_root: Path, tmp_path: Path) -> None:
    check_evicted(LoraModel("flux", checkpoints_root, tmp_path))
