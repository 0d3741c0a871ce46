"""Every tiny model whose pipeline class loads LoRAs, served with some: against diffusers, and mixed in a batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lora_parity import (
    FAMILIES,
    LORA_MODELS,
    NOT_TRIED,
    LoraModel,
    check_alone,
    check_evicted,
    check_mixed,
    check_scale_zero,
    check_three,
)
from tests.support.tiny_loras import loadable_parts
from tests.support.tiny_models import TINY_MODELS

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module", params=LORA_MODELS)
def model(
    request: pytest.FixtureRequest, checkpoints_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoraModel]:
    made = LoraModel(request.param, checkpoints_root, tmp_path_factory.mktemp(f"loras-{request.param}"))
    yield made
    made.close()


def test_a_request_with_a_lora_has_the_bytes_of_diffusers_at_one_scale_and_at_one_for_each_component(
    model: LoraModel,
) -> None:
    check_alone(model)


def test_a_request_with_three_loras_has_the_bytes_of_diffusers(model: LoraModel) -> None:
    check_three(model)


def test_a_lora_at_scale_zero_changes_no_bit(model: LoraModel) -> None:
    check_scale_zero(model)


def test_requests_of_different_loras_share_batches_and_stay_close_to_lone_ones(model: LoraModel) -> None:
    check_mixed(model)


def test_loras_that_were_loaded_and_evicted_leave_no_trace(model: LoraModel) -> None:
    check_evicted(model)


def test_the_table_has_every_tiny_model_whose_class_loads_loras() -> None:
    loading = {name for name, each in TINY_MODELS.items() if loadable_parts(each.build()[0])}
    assert loading - {"flux_lora", *NOT_TRIED} == set(LORA_MODELS)  # it has one of its own, put in when it is loaded
    assert len(FAMILIES) >= 12
