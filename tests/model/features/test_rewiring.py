"""Pipelines that rewire the denoiser for a request: the bytes of the unsplit pipeline alone, with others, resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deployments.errors import CannotResumeError
from tests.support.further import further
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


@pytest.mark.parametrize("name", ["sd15_pag", further("sd15_sag")])
def test_it_makes_the_bytes_of_the_unsplit_pipeline_and_leaves_the_denoiser_as_it_was(
    name: str, stages_of: OpenStages, checkpoints_root: Path
) -> None:
    check_bytes(name, stages_of(name), checkpoints_root)


def test_it_resumes_elsewhere_with_the_same_bytes(stages_of: OpenStages, checkpoints_root: Path) -> None:
    check_resume("sd15_pag", stages_of("sd15_pag"), checkpoints_root)


def test_in_one_process_nothing_is_asked_of_another_stage(checkpoints_root: Path) -> None:
    stages = ThreeStages(checkpoint("sd15_sag", checkpoints_root), in_one=True)
    asked = [request("sd15_sag", index) for index in range(2)]
    for made, each in zip(stages.make_together(asked), asked, strict=True):
        assert_same(made, truth(each, checkpoints_root))
    assert stages.asked == []
    stages.close()


def test_what_needs_the_state_of_forwards_that_are_skipped_starts_again(
    stages_of: OpenStages, checkpoints_root: Path
) -> None:
    asked = request("sd15_sag")
    _, checkpoints = stages_of("sd15_sag").make_and_save(asked)
    elsewhere = ThreeStages(checkpoint("sd15_sag", checkpoints_root))
    with pytest.raises(CannotResumeError):
        elsewhere.make(asked, checkpoints[len(checkpoints) // 2])
    elsewhere.close()


def test_forwards_that_are_rewired_alike_share_batches_and_plain_ones_are_beside_them(
    stages_of: OpenStages, checkpoints_root: Path
) -> None:
    stages = stages_of("sd15_pag")
    asked = [request("sd15_pag", 0), request("sd15_pag", 1, prompt="a red sun"), request("sd15_pag", 2, pag_scale=0.0)]
    truths = [truth(each, checkpoints_root) for each in asked]
    merging = [replace(each, deterministic=False) for each in asked]
    stages.make_together(merging)  # the first merges are checked
    statistics = stages.denoiser.engine.statistics
    merged, refused = statistics.merged, statistics.refused_structures
    for made, true in zip(stages.make_together(merging), truths, strict=True):
        torch.testing.assert_close(made, true, rtol=1e-4, atol=1e-5)
    assert statistics.merged > merged
    assert statistics.refused_structures == refused == 0


@pytest.mark.rest
def test_a_pipeline_without_a_denoiser_is_split_at_what_works_on_its_latents(
    stages_of: OpenStages, checkpoints_root: Path
) -> None:
    stages = stages_of("ltx_upsample")
    asked = request("ltx_upsample")
    assert_same(stages.make(asked), truth(asked, checkpoints_root))
    assert stages.held["denoiser"].layout.denoisers == ("latent_upsampler",)
    assert set(stages.held["denoiser"].components) == {"latent_upsampler"}
