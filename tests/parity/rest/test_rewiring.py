"""The other pipelines that rewire their denoiser for a request, and those whose forwards cannot share a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.errors import CannotResumeError
from tests.support.rewired import OpenStages, check_bytes, check_resume, opened_stages, request, truth
from tests.support.stage_parity import assert_same
from tests.support.three_stages import ThreeStages
from tests.support.tiny_models import checkpoint

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def stages_of(checkpoints_root: Path) -> Iterator[OpenStages]:
    with opened_stages(checkpoints_root) as open_stages:
        yield open_stages


@pytest.mark.parametrize("name", ["pixart_pag", "sd15_attend", "zero_sdxl"])
def test_it_makes_the_bytes_of_the_unsplit_pipeline_and_leaves_the_denoiser_as_it_was(
    name: str, stages_of: OpenStages, checkpoints_root: Path
) -> None:
    check_bytes(name, stages_of(name), checkpoints_root)


@pytest.mark.parametrize("name", ["pixart_pag", "zero_sdxl"])
def test_it_resumes_elsewhere_with_the_same_bytes(name: str, stages_of: OpenStages, checkpoints_root: Path) -> None:
    check_resume(name, stages_of(name), checkpoints_root)


def test_what_needs_the_state_of_forwards_that_are_skipped_starts_again(
    stages_of: OpenStages, checkpoints_root: Path
) -> None:
    asked = request("sd15_attend")
    _, checkpoints = stages_of("sd15_attend").make_and_save(asked)
    elsewhere = ThreeStages(checkpoint("sd15_attend", checkpoints_root))
    with pytest.raises(CannotResumeError):
        elsewhere.make(asked, checkpoints[len(checkpoints) // 2])
    elsewhere.close()


def test_what_mixes_the_samples_of_a_batch_never_shares_one(stages_of: OpenStages, checkpoints_root: Path) -> None:
    stages = stages_of("zero_sdxl")
    asked = [request("zero_sdxl", 0), request("zero_sdxl", 1, prompt="a red sun")]
    truths = [truth(each, checkpoints_root) for each in asked]
    merging = [replace(each, deterministic=False) for each in asked]
    for _ in range(2):
        for made, true in zip(stages.make_together(merging), truths, strict=True):
            assert_same(made, true)
    assert stages.denoiser.engine.statistics.refused_structures > 0
