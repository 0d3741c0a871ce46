"""build_stage: the part of a model that a process of some stages holds, and what cannot be built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import select_device
from deployments.errors import CheckpointError
from deployments.messages import STAGES
from deployments.model import ModelArgs
from deployments.stages.build import build_stage, float32_warning, stage_modules
from env_config.variables import EnvConfig

CPU = select_device("cpu")


def args(folder: Path, **fields: Any) -> ModelArgs:
    return ModelArgs(path=str(folder), name="flux", **fields)


@pytest.mark.parametrize(
    ("stages", "held"),
    [
        (("denoiser",), {"transformer"}),
        (("vae",), {"vae"}),
        (("encoder", "vae"), {"text_encoder", "text_encoder_2", "vae"}),
    ],
)
def test_a_process_holds_what_its_stages_need(stages: Any, held: set[str], flux_checkpoint: Path) -> None:
    stage = build_stage(args(flux_checkpoint), stages, EnvConfig(), CPU)
    assert stage.stages == stages
    assert set(stage.components) == held
    assert all(stage.weight_bytes()[name] > 0 for name in held)


def test_the_weights_have_the_dtype_that_was_asked_for_but_for_the_exceptions(flux_checkpoint: Path) -> None:
    model = args(flux_checkpoint, dtype="bfloat16", component_dtypes={"vae": "float32"})
    stage = build_stage(model, STAGES, EnvConfig(), CPU)
    dtypes = {name: next(module.parameters()).dtype for name, module in stage.components.items()}
    assert dtypes.pop("vae") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_weights_that_are_stored_in_float32_and_go_to_an_accelerator_are_warned_of(flux_checkpoint: Path) -> None:
    stage = build_stage(args(flux_checkpoint), STAGES, EnvConfig(), CPU)
    assert float32_warning(stage) is None
    on_gpu = dataclasses.replace(stage, device=torch.device("cuda"))
    warning = float32_warning(on_gpu)
    assert warning is not None
    assert warning.startswith("dtype: auto puts text_encoder (0.0 GB), text_encoder_2 (0.0 GB), transformer (0.0 GB)")
    assert "dtype: bfloat16 takes half of the memory" in warning
    assert "vae" not in warning  # kept in float32 on purpose in many checkpoints
    half = build_stage(args(flux_checkpoint, dtype="bfloat16"), STAGES, EnvConfig(), CPU)
    assert float32_warning(dataclasses.replace(half, device=torch.device("cuda"))) is None


def test_accelerations_find_the_denoisers_and_autoencoders_by_name(flux_checkpoint: Path) -> None:
    modules = stage_modules(build_stage(args(flux_checkpoint), STAGES, EnvConfig(), CPU), CPU)
    assert (modules.denoisers, modules.autoencoders) == (("transformer",), ("vae",))


def test_kernels_of_accelerations_go_through_the_given_wrapper(flux_checkpoint: Path) -> None:
    wrapped: list[str] = []

    def wrap(name: str, kernel: Any) -> Any:
        wrapped.append(name)
        return kernel

    env = EnvConfig.from_environ({"SGLANG_DIFFUSION_ATTENTION_BACKEND": "_native_math"})
    build_stage(args(flux_checkpoint), ("denoiser",), env, CPU, wrap)
    assert wrapped
    assert all(name.startswith("attention.") for name in wrapped)


def test_a_default_that_the_pipeline_does_not_take_is_refused_by_name(flux_checkpoint: Path) -> None:
    model = args(flux_checkpoint, default_arguments={"num_frames": 5, "height": 32})
    with pytest.raises(CheckpointError, match="default_arguments names num_frames, which FluxPipeline does not take"):
        build_stage(model, ("vae",), EnvConfig(), CPU)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        build_stage(args(tmp_path), ("vae",), EnvConfig(), CPU)


def test_a_variant_that_no_component_has_is_refused_by_name(flux_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="are of the variant 'fp16': leave `variant:` out"):
        build_stage(args(flux_checkpoint, variant="fp16"), ("vae",), EnvConfig(), CPU)
