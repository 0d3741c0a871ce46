"""Pipelines that rewire the denoiser for a request: the bytes of the unsplit pipeline alone, with others, resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.errors import CannotResumeError
from deployments.messages import GenerationRequest, OutputFormat
from tests.support.stage_parity import assert_same
from tests.support.three_stages import ThreeStages
from tests.support.tiny_models import checkpoint, request_arguments, run_unsplit

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

REWIRING = ("sd15_pag", "pixart_pag", "sd15_sag", "sd15_attend", "zero_sdxl")
KEEPS_A_STATE = ("sd15_sag", "sd15_attend")


@pytest.fixture(scope="module")
def stages_of(checkpoints_root: Path) -> Iterator[Any]:
    opened: dict[str, ThreeStages] = {}

    def open_stages(name: str) -> ThreeStages:
        if name not in opened:
            opened[name] = ThreeStages(checkpoint(name, checkpoints_root))
        return opened[name]

    yield open_stages
    for stages in opened.values():
        stages.close()


def request(name: str, index: int = 0, **arguments: Any) -> GenerationRequest:
    changed = {**request_arguments(name), **arguments}
    return GenerationRequest(f"r{index}", name, changed, index, OutputFormat("image", "png"), deterministic=True)


def truth(asked: GenerationRequest, checkpoints_root: Path) -> list[Any]:
    return run_unsplit(checkpoint(asked.model, checkpoints_root), asked.arguments, asked.seed)


def wiring(module: torch.nn.Module) -> list[Any]:
    return [(part, vars(part).get("processor"), list(part._forward_hooks)) for part in module.modules()]


@pytest.mark.parametrize("name", REWIRING)
def test_it_makes_the_bytes_of_the_unsplit_pipeline_and_leaves_the_denoiser_as_it_was(
    name: str, stages_of: Any, checkpoints_root: Path
) -> None:
    stages = stages_of(name)
    [denoiser] = [stages.held["denoiser"].components[n] for n in stages.held["denoiser"].layout.denoisers]
    before = wiring(denoiser)
    asked = request(name)
    assert_same(stages.make(asked), truth(asked, checkpoints_root))
    assert wiring(denoiser) == before
    assert stages.denoiser.needs_remote_calls == (name in KEEPS_A_STATE)
    [summary] = list(stages.denoiser.recent_summaries["rewiring"])[-1:]
    assert min(value for key, value in summary.items() if key != "request_id") > 0


@pytest.mark.parametrize("name", [name for name in REWIRING if name not in KEEPS_A_STATE])
def test_it_resumes_elsewhere_with_the_same_bytes(name: str, stages_of: Any, checkpoints_root: Path) -> None:
    asked = request(name)
    made, checkpoints = stages_of(name).make_and_save(asked)
    elsewhere = ThreeStages(checkpoint(name, checkpoints_root))
    assert_same(elsewhere.make(asked, checkpoints[len(checkpoints) // 2]), made)
    elsewhere.close()


def test_in_one_process_nothing_is_asked_of_another_stage(checkpoints_root: Path) -> None:
    stages = ThreeStages(checkpoint("sd15_sag", checkpoints_root), in_one=True)
    asked = [request("sd15_sag", index) for index in range(2)]
    for made, each in zip(stages.make_together(asked), asked, strict=True):
        assert_same(made, truth(each, checkpoints_root))
    assert not stages.denoiser.needs_remote_calls
    stages.close()


@pytest.mark.parametrize("name", KEEPS_A_STATE)
def test_what_needs_the_state_of_forwards_that_are_skipped_starts_again(
    name: str, stages_of: Any, checkpoints_root: Path
) -> None:
    asked = request(name)
    _, checkpoints = stages_of(name).make_and_save(asked)
    elsewhere = ThreeStages(checkpoint(name, checkpoints_root))
    with pytest.raises(CannotResumeError):
        elsewhere.make(asked, checkpoints[len(checkpoints) // 2])
    elsewhere.close()


def test_forwards_that_are_rewired_alike_share_batches_and_plain_ones_are_beside_them(
    stages_of: Any, checkpoints_root: Path
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


def test_what_mixes_the_samples_of_a_batch_never_shares_one(stages_of: Any, checkpoints_root: Path) -> None:
    stages = stages_of("zero_sdxl")
    asked = [request("zero_sdxl", 0), request("zero_sdxl", 1, prompt="a red sun")]
    truths = [truth(each, checkpoints_root) for each in asked]
    merging = [replace(each, deterministic=False) for each in asked]
    for _ in range(2):
        for made, true in zip(stages.make_together(merging), truths, strict=True):
            assert_same(made, true)
    assert stages.denoiser.engine.statistics.refused_structures > 0


def test_a_pipeline_without_a_denoiser_is_split_at_what_works_on_its_latents(
    stages_of: Any, checkpoints_root: Path
) -> None:
    stages = stages_of("ltx_upsample")
    asked = request("ltx_upsample")
    assert_same(stages.make(asked), truth(asked, checkpoints_root))
    assert stages.held["denoiser"].layout.denoisers == ("latent_upsampler",)
    assert set(stages.held["denoiser"].components) == {"latent_upsampler"}
