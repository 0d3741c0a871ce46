"""A walk through a checkpoint without its weights: what it finds is what loading it would make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from deployments.errors import CheckpointError
from deployments.messages import STAGES, StageName
from deployments.plan.budget import Levers, weight
from deployments.plan.peak import peak_of
from deployments.plan.session import counted, peak_in_tiles
from deployments.stage_pipeline.loading import load_stage
from tests.support.published import write_published
from tests.support.tiny_models import checkpoint, tiny_patches
from tests.support.walked import component_of, peaks, walked

# Two experts, two decoders and connectors, a picture that is edited, a U-Net with its checker, a list of pictures.
KINDS = ("wan22", "ltx2", "qwenimage_edit", "sd15", "zimage")


@pytest.mark.parametrize("name", KINDS)
def test_any_pipeline_is_walked_through_by_its_own_call(name: str, checkpoints_root: Path) -> None:
    tiny_patches()
    measured = walked(checkpoint(name, checkpoints_root))
    assert measured.notes == ()
    called = {call.component for call in measured.calls}
    assert {each.name for each in measured.components if each.is_denoiser} <= called
    assert all(measured.peak(stage) > 0 for stage in STAGES)


@pytest.mark.parametrize("stages", [("encoder",), ("denoiser",), ("vae",), ("encoder", "vae"), STAGES])
def test_a_process_holds_the_bytes_that_were_counted(stages: tuple[StageName, ...], checkpoints_root: Path) -> None:
    """In the dtype that is asked for, halves of autoencoders that a lone stage drops among them."""
    folder = checkpoint("flux", checkpoints_root)
    loaded = load_stage(folder, stages, dtype=torch.bfloat16)
    measured = walked(folder, dtype="bfloat16")
    here = [each for each in measured.components if set(each.stages) & set(stages)]
    assert {each.name: weight(each, stages, Levers()) for each in here} == loaded.weight_bytes()


def test_files_tell_the_dtype_and_their_size(checkpoints_root: Path) -> None:
    measured = walked(checkpoint("flux", checkpoints_root))
    transformer = component_of(measured, "transformer")
    assert (transformer.dtype, transformer.stored_dtype) == ("float32", "F32")
    assert transformer.stored == transformer.loaded == transformer.weights["fp32"] == 2 * transformer.weights["bf16"]


def test_without_files_the_configuration_alone_is_counted_and_that_is_told(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    whole = checkpoint("flux", checkpoints_root)
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    measured = walked(bare, dtype="float32")
    [note] = measured.notes
    assert note.startswith("Counted from the configuration alone, without files: ")
    counted = [(each.name, each.loaded, each.weights) for each in measured.components]
    assert counted == [(each.name, each.loaded, each.weights) for each in walked(whole, dtype="float32").components]


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
    assert attended == 4 * 1000 * 16 * 2 + 4 * 1000 * 4  # not 1000 x 1000 of scores


def test_flux_is_counted_as_the_audit_counted_it(tmp_path: Path) -> None:
    """At 1024 x 1024: weights of 23.80, 9.52 and 0.17 GB; activations of 0.49, 0.10 and 1.61 GB."""
    measured = walked(write_published("FLUX.1-dev", tmp_path), 1024, 1024, dtype="bfloat16")
    loaded = {each.name: each.loaded / 1e9 for each in measured.components}
    assert loaded["transformer"] == pytest.approx(23.80, abs=0.01)
    assert loaded["text_encoder_2"] == pytest.approx(9.52, abs=0.01)
    assert loaded["vae"] == pytest.approx(0.17, abs=0.01)
    found = peaks(measured)
    assert found["transformer.forward"] == pytest.approx(0.49, abs=0.01)
    assert found["text_encoder_2.forward"] == pytest.approx(0.10, abs=0.015)
    assert found["vae.decode"] == pytest.approx(1.61, abs=0.01)


def test_the_peak_of_a_decoder_in_tiles_is_told_from_two_of_them() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[32] * 4,
            latent_channels=4,
            sample_size=128,
        ).eval()
        latents = torch.empty(1, 4, 64, 64)
    whole, output = counted(vae, "decode", (latents,), {})
    vae.enable_tiling()
    told = peak_in_tiles(vae, "decode", ((latents,), {}), output)
    in_tiles, _ = counted(vae, "decode", (latents,), {})
    assert in_tiles <= told <= 1.3 * in_tiles
    assert told < whole / 4
