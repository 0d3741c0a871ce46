"""LoRAs of requests on a tiny FLUX: alone the bytes of diffusers' set_adapters, any of them in one batch."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.adapters.use import AdapterUse
from deployments.engine.fiber import CancelledStage
from deployments.errors import CannotResumeError, InvalidRequestError
from deployments.messages import Checkpoint, DecodeInputs, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower
from deployments.stages.encode import encode
from deployments.tensors.packing import unpack
from deployments.tensors.values import tensors
from tests.support.adapters import AdaptersHere, lora_for
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

pytestmark = pytest.mark.filterwarnings("default")

STEPS = 3
NAMES = ("a", "b", "c")
Scales = dict[str, float]


class Denoising:
    """A tiny FLUX with the LoRAs a, b and c; its engine, and its pipeline as diffusers has it."""

    def __init__(self, folder: Path) -> None:
        tiny_patches()
        self.folder = folder
        self.encoder = load_stage(folder, ("encoder",))
        self.stage = load_stage(folder, ("denoiser",))
        transformer = self.stage.components["transformer"]
        files = {name: {"transformer": lora_for(transformer, seed)} for seed, name in enumerate(NAMES)}
        self.adapters = AdaptersHere(self.stage.components, files)
        args = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, merging="always")
        self.denoiser = DenoiserStage(self.stage, args, adapters=self.adapters)

    def request(self, scales: Scales | None = None, seed: int = 0, **settings: Any) -> GenerationRequest:
        arguments = request_arguments("flux") | {"num_inference_steps": STEPS}
        features = {"loras": [AdapterUse(name, name, scale=scale).plain() for name, scale in (scales or {}).items()]}
        return GenerationRequest(
            f"r{seed}", "flux", arguments, seed, OutputFormat("image", "png"), features=features, **settings
        )

    def run(self, request: GenerationRequest, resume_from: Checkpoint | None = None, **follower: Any) -> torch.Tensor:
        conditioning = encode(self.encoder, request)
        inputs, _ = self.denoiser.denoise(request, conditioning, resume_from, follower=DenoisingFollower(**follower))
        return latents(inputs)

    def run_together(self, requests: Sequence[GenerationRequest]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self.run, requests))

    def close(self) -> None:
        self.denoiser.engine.close()
        assert self.adapters.num_holding == 0


class Diffusers:
    """The same pipeline with the adapters as diffusers' `set_adapters` has them; nothing of ours is in its layers."""

    def __init__(self, denoising: Denoising) -> None:
        self.denoising = denoising
        self.stage = load_stage(denoising.folder, ("denoiser",))
        self.transformer = self.stage.components["transformer"]
        for name in NAMES:
            weights = dict(denoising.adapters.files[name]["transformer"])
            self.transformer.load_lora_adapter(weights, prefix=None, adapter_name=name)
        self.denoiser = DenoiserStage(self.stage, DenoisingArgs(deterministic=True))

    def run(self, scales: Scales, seed: int = 0, features: dict[str, Any] | None = None) -> torch.Tensor:
        self.transformer.enable_adapters() if scales else self.transformer.disable_adapters()
        self.transformer.set_adapters(list(scales), list(scales.values()))
        request = replace(self.denoising.request(seed=seed), features=features or {})
        return latents(self.denoiser.denoise(request, encode(self.denoising.encoder, request))[0])


def latents(inputs: DecodeInputs) -> torch.Tensor:
    floating = [each for each in tensors(unpack(inputs.content, torch.device("cpu"))) if each.is_floating_point()]
    return max(floating, key=torch.Tensor.numel)


@pytest.fixture(scope="module")
def denoising(checkpoints_root: Path) -> Iterator[Denoising]:
    made = Denoising(checkpoint("flux", checkpoints_root))
    yield made
    made.close()


@pytest.fixture(scope="module")
def diffusers(denoising: Denoising) -> Iterator[Diffusers]:
    made = Diffusers(denoising)
    yield made
    made.denoiser.engine.close()


@pytest.mark.parametrize("scales", [{"c": -0.6}, {"a": 0.5, "b": -0.25, "c": 1.5}], ids=repr)
def test_a_request_alone_has_the_bytes_of_the_pipeline_with_its_adapters(
    denoising: Denoising, diffusers: Diffusers, scales: Scales
) -> None:
    made = denoising.run(denoising.request(scales))
    assert torch.equal(made, diffusers.run(scales))
    assert not torch.allclose(made, diffusers.run({}), atol=1e-2)


def test_a_scale_of_zero_and_none_beside_loaded_adapters_give_the_bytes_of_none(
    denoising: Denoising, diffusers: Diffusers
) -> None:
    without = diffusers.run({})
    denoising.run(denoising.request({"a": 1.0}))
    assert torch.equal(denoising.run(denoising.request({"a": 0.0})), without)
    assert torch.equal(denoising.run(denoising.request()), without)


MIXED: list[Scales] = [{}, {"a": 1.0}, {"b": 0.8, "c": 0.3}, {"a": -0.5}]


def test_four_requests_of_four_mixtures_share_their_batches_and_each_has_its_own(denoising: Denoising) -> None:
    requests = [denoising.request(scales, seed) for seed, scales in enumerate(MIXED)]
    alone = [denoising.run(replace(request, deterministic=True)) for request in requests]
    for _ in range(3):
        denoising.run_together(requests)  # each kind is tried once
    statistics = denoising.denoiser.engine.statistics
    statistics.batch_sizes.clear()
    for mixed, own in zip(denoising.run_together(requests), alone, strict=True):
        torch.testing.assert_close(mixed, own, rtol=1e-4, atol=1e-5)
    assert statistics.batch_sizes.get(len(requests), 0) > 0  # a thread that comes late misses the first step
    assert statistics.refused_structures == 0


def test_a_request_that_is_cancelled_beside_others_lets_go_of_its_adapters(
    denoising: Denoising, diffusers: Diffusers
) -> None:
    begun = threading.Event()

    def cancel(run: DenoiseRun) -> None:
        begun.set()
        denoising.denoiser.engine.cancel(run.fiber)

    cancelled, other = denoising.request({"a": 1.0}, seed=1), denoising.request({"b": 1.0}, seed=2)
    with ThreadPoolExecutor(2) as threads:
        outcome = threads.submit(denoising.run, cancelled, started=cancel)
        made = threads.submit(denoising.run, other)
        with pytest.raises(CancelledStage):
            outcome.result()
        assert begun.is_set()
        torch.testing.assert_close(made.result(), diffusers.run({"b": 1.0}, seed=2), rtol=1e-4, atol=1e-5)
    assert denoising.adapters.num_holding == 0


def test_a_request_goes_on_elsewhere_with_the_same_contents_and_not_with_others(
    denoising: Denoising, checkpoints_root: Path
) -> None:
    request, made = denoising.request({"a": 1.0, "b": 0.5}), list[Checkpoint]()
    whole = denoising.run(request, checkpoint=made.append)
    elsewhere = Denoising(checkpoint("flux", checkpoints_root))
    try:
        assert torch.equal(elsewhere.run(request, made[0]), whole)
        elsewhere.adapters.files["b"] = {"transformer": lora_for(elsewhere.stage.components["transformer"], 77)}
        with pytest.raises(CannotResumeError, match="another model, version or request"):
            elsewhere.run(request, made[0])
    finally:
        elsewhere.close()


def test_what_cannot_be_fetched_ends_the_request_before_anything_runs(denoising: Denoising) -> None:
    before = denoising.denoiser.engine.statistics.forwards
    with pytest.raises(InvalidRequestError, match="there is no d"):
        denoising.run(denoising.request({"d": 1.0}))
    assert denoising.denoiser.engine.statistics.forwards == before


CACHED = {"cache_dit": {"enable": True, "max_warmup_steps": 1, "residual_diff_threshold": 0.5}}


def test_with_cache_dit_it_gives_what_cache_dit_gives_with_the_adapters_set(
    denoising: Denoising, diffusers: Diffusers
) -> None:
    request = denoising.request({"a": 0.7, "c": -0.3})
    both = replace(request, features={**request.features, **CACHED})
    truth = diffusers.run({"a": 0.7, "c": -0.3}, features=CACHED)
    assert torch.equal(denoising.run(both), truth)
    assert not torch.equal(truth, denoising.run(request)), "it has reused steps"


class SwapsSamples(torch.nn.Module):
    """The base layer's rows in another order inside of the module: [B, T] as T-major."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.to_q = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.to_q(x.transpose(0, 1).flatten(0, 1))
        return made.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def test_a_model_whose_layers_order_their_rows_otherwise_runs_mixtures_alone_and_never_wrong(
    checkpoints_root: Path,
) -> None:
    denoising = Denoising(checkpoint("flux", checkpoints_root))
    transformer = denoising.stage.components["transformer"]
    attention = transformer.transformer_blocks[0].attn
    attention.to_k = SwapsSamples(attention.to_k)
    denoising.adapters.files["a"] = {"transformer": lora_for(transformer, 5, targets=("to_k.to_q",))}
    requests = [denoising.request(scales, seed) for seed, scales in enumerate([{}, {"a": 1.0}, {"a": 1.0}, {}])]
    alone = [denoising.run(replace(request, deterministic=True)) for request in requests]
    for mixed, own in zip(denoising.run_together(requests), alone, strict=True):
        torch.testing.assert_close(mixed, own, rtol=1e-4, atol=1e-5)
    statistics = denoising.denoiser.engine.statistics
    statistics.batch_sizes.clear()
    for mixed, own in zip(denoising.run_together(requests), alone, strict=True):
        torch.testing.assert_close(mixed, own, rtol=1e-4, atol=1e-5)
    assert statistics.batch_sizes == {2: 2 * STEPS}, "equal ones share, others do not"
    assert statistics.refused_structures == 1
    denoising.close()
