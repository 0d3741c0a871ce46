"""The VAE stage of every tiny model is warmed up by drawn latents; a few families compile what their requests show."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.accelerations import compile as compile_row
from deployments.devices import select_device
from deployments.messages import STAGES, GenerationRequest
from deployments.model import DenoisingArgs, ModelArgs
from deployments.needed_inputs import OUTPUTS
from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.outputs import media_kind
from deployments.stages.build import build_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.stages.warm_up import warm_vae
from deployments.tensors.packing import unpack
from deployments.tensors.values import tensors
from env_config.variables import EnvConfig
from tests.support.compiled_denoiser import assert_compiles_under_fibers
from tests.support.tiny_models import TINY_MODELS, checkpoint, request_arguments, tiny_patches

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

# Their decoded pictures flow back into the loop: remote calls make them there, and a played loop ends before.
NOT_PLAYED: set[str] = set()
# Of different blocks: joint attention, a U-Net, lists of samples, two experts.
COMPILED = ("flux", "sd15", "zimage", "wan22")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_vae_stage_decodes_what_it_was_not_handed(name: str, checkpoints_root: Path) -> None:
    tiny_patches()
    folder = checkpoint(name, checkpoints_root)
    encoder, vae = load_stage(folder, ("encoder",)), load_stage(folder, ("vae",))
    output = OUTPUTS[media_kind(type(vae.pipeline))]
    request = GenerationRequest("warm-up-1", name, request_arguments(name), 0, output)
    decoded = warm_vae(vae, request, encode(encoder, request))
    assert (decoded is None) == (name in NOT_PLAYED)
    if decoded is not None:
        assert decoded.num_bytes > 0


@pytest.mark.parametrize("mode", ["regional", "whole"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_denoiser_makes_the_same_alone_and_merged(
    name: str, mode: Any, checkpoints_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_patches()
    monkeypatch.setattr(compile_row, "BACKEND", "eager")  # the graphs of Dynamo, computed as they are
    model = ModelArgs(path=str(checkpoint(name, checkpoints_root)), name=name, compile=mode)
    stage = build_stage(model, STAGES, EnvConfig(), select_device("cpu"))
    denoiser = DenoiserStage(stage, DenoisingArgs(max_wait_s=0.5), encode=lambda request: encode(stage, request))

    def numbers(index: int, deterministic: bool = False) -> list[torch.Tensor]:
        output = OUTPUTS[media_kind(type(stage.pipeline))]
        request = GenerationRequest(f"r{index}", name, request_arguments(name), 0, output, deterministic=deterministic)
        inputs, _ = denoiser.denoise(request, encode(stage, request))
        return [each for each in tensors(unpack(inputs.content, stage.device)) if each.is_floating_point()]

    try:
        truth = numbers(0, deterministic=True)
        numbers(1)
        assert denoiser.compiled.compilation_s == 0
        alone = numbers(2)
        assert denoiser.compiled.compilation_s > 0
        with ThreadPoolExecutor(3) as threads:
            merged = list(threads.map(numbers, (3, 4, 5)))
        assert not denoiser.compiled._refused
        for made in (alone, *merged):
            torch.testing.assert_close(made, truth, rtol=1e-4, atol=1e-5)
    finally:
        denoiser.engine.close()
        torch.compiler.reset()


def test_inductor_compiles_in_the_engines_thread_while_fibers_fail_at_any_depth() -> None:
    assert_compiles_under_fibers("inductor")


def test_a_cached_request_computes_compiled_blocks(checkpoints_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_patches()
    variables = {"SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_WARMUP": "2", "SGLANG_CACHE_DIT_RDT": "0.9"}
    env, made, graphs = EnvConfig.from_environ(variables), {}, [0]

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return graph.forward

    monkeypatch.setattr(compile_row, "BACKEND", compiler)
    for mode in ("off", "regional"):
        model = ModelArgs.model_validate(
            {"path": str(checkpoint("flux", checkpoints_root)), "name": "flux", "compile": mode}
        )
        stage = build_stage(model, STAGES, env, select_device("cpu"))
        denoiser = DenoiserStage(stage, DenoisingArgs(max_batch_size=1), env=env)
        arguments = request_arguments("flux") | {"num_inference_steps": 8}
        request = GenerationRequest("r", "flux", arguments, 0, OUTPUTS["image"])
        before = graphs[0]  # of the check that there is a compiler
        with denoiser.compiled.warming_up():
            inputs, _ = denoiser.denoise(request, encode(stage, request))
        made[mode] = [each for each in tensors(unpack(inputs.content, stage.device)) if each.is_floating_point()]
        summary = denoiser.recent_summaries["cache_dit"][-1]["transformer"]
        assert summary["reused_steps"] > 0
        assert (graphs[0] > before) == (mode == "regional")
        assert not denoiser.compiled._refused
        denoiser.engine.close()
    torch.compiler.reset()
    torch.testing.assert_close(made["regional"], made["off"], rtol=1e-4, atol=1e-5)
