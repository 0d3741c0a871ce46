"""A walk through a checkpoint without its weights: what it finds is what loading it would make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from deployments.errors import CheckpointError
from deployments.memory.activations import peak_of
from deployments.messages import STAGES, StageName
from deployments.plan.budget import Levers, weight
from deployments.plan.measured import Measured
from deployments.plan.session import counted, peak_in_tiles
from deployments.stage_pipeline.loading import load_stage
from tests.support.further import all_but
from tests.support.tiny_models import checkpoint
from tests.support.walked import component_of, walked, walked_as_small

# Two decoders and connectors, a picture that is edited, a U-Net with its checker; all others: tests/parity/rest.
KINDS = ("ltx2", "qwenimage_edit", "sd15")


@pytest.fixture(scope="module")
def flux(checkpoints_root: Path) -> Measured:
    """In float32, as it is stored."""
    return walked(checkpoint("flux", checkpoints_root))


@pytest.mark.parametrize("name", all_but(["ltx2"], KINDS))
def test_any_pipeline_is_walked_through_by_its_own_call(name: str, checkpoints_root: Path) -> None:
    measured = walked_as_small(name, checkpoints_root)
    assert measured.notes == ()
    called = {call.component for call in measured.calls}
    assert {each.name for each in measured.components if each.is_denoiser} <= called
    assert all(measured.peak(stage) > 0 for stage in STAGES)


def test_processes_hold_the_bytes_that_were_counted(flux: Measured, checkpoints_root: Path) -> None:
    """Halves of autoencoders that a lone stage drops among them."""
    alone: tuple[tuple[StageName, ...], ...] = (("encoder",), ("denoiser",), ("vae",), ("encoder", "vae"), STAGES)
    for stages in alone:
        loaded = load_stage(checkpoint("flux", checkpoints_root), stages)
        here = [each for each in flux.components if set(each.stages) & set(stages)]
        assert {each.name: weight(each, stages, Levers()) for each in here} == loaded.weight_bytes()


def test_files_tell_the_dtype_and_their_size(flux: Measured) -> None:
    transformer = component_of(flux, "transformer")
    assert (transformer.dtype, transformer.stored_dtype) == ("float32", "F32")
    assert transformer.stored == transformer.loaded == transformer.weights["fp32"] == 2 * transformer.weights["bf16"]


def test_without_files_the_configuration_alone_is_counted_and_that_is_told(
    flux: Measured, checkpoints_root: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint("flux", checkpoints_root), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    measured = walked(bare, dtype="float32")
    [note] = measured.notes
    assert note.startswith("Counted from the configuration alone, without files: ")
    counted = [(each.name, each.loaded, each.weights) for each in measured.components]
    assert counted == [(each.name, each.loaded, each.weights) for each in flux.components]
    assert measured.calls == flux.calls


def test_files_that_are_not_what_the_configuration_says_are_told(checkpoints_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint("flux", checkpoints_root), folder)
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_single_layers": 3', '"num_single_layers": 9'))
    [note] = walked(folder).notes
    assert note.startswith("The files of transformer hold 0.00 GB")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        walked(tmp_path)


def test_memory_counts_while_a_tensor_is_held_and_attention_as_a_fused_kernel() -> None:
    half = torch.empty(1024, dtype=torch.bfloat16, device="meta")

    def call() -> torch.Tensor:
        first = half + 1
        second = first + 1  # beside the first
        del first
        return second.view(32, 32) + 1  # in the place of the first; a view takes nothing

    assert peak_of(call, [half])[0] == 2 * 2 * 1024
    query = torch.empty(1, 4, 1000, 16, dtype=torch.bfloat16, device="meta")
    attended, output = peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), [query])
    assert output.shape == query.shape
    assert attended == 4 * 1000 * 16 * 2  # not 1000 x 1000 of scores


def test_the_peak_of_a_decoder_in_tiles_is_told_from_two_of_them() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[32] * 4,
            latent_channels=4,
            sample_size=128,
        ).eval()
        latents = torch.empty(1, 4, 32, 32)
    whole, output = counted(vae, "decode", (latents,), {})
    vae.enable_tiling()
    told = peak_in_tiles(vae, "decode", ((latents,), {}), output)
    in_tiles, _ = counted(vae, "decode", (latents,), {})
    assert in_tiles <= told <= 1.3 * in_tiles
    assert told < whole / 2
