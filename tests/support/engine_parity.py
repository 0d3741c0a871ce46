"""Requests through the engine against the plain loop: the same bytes alone, close when merged, and the same bytes
again when another process goes on from a checkpoint."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from deployments.messages import Checkpoint, Conditioning, DecodeInputs, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs
from deployments.ranks.group import RankGroup
from deployments.stage_pipeline.hand_off import pack_outcome, unpack_outcome
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, HandOff
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import call_arguments, encode, unpack_conditioning
from deployments.tensors.values import tensors
from env_config.variables import EnvConfig
from tests.support.resuming_process import ResumingProcess, load_denoiser
from tests.support.tiny_models import checkpoint, request_arguments, tiny_model, tiny_patches

ANY_OUTPUT = OutputFormat("image", "png")
PROMPTS = (None, "a red sun bright", "dance monkey dance")  # None: the model's own
MORE_STEPS = (0, 2, 1)
MERGED_DEVIATION = 5e-6  # of the largest value, in float32

# Models whose forwards never share a batch, and why.
NEVER_MERGED = {
    "klein_kv": "its key-value cache belongs to one request",
    "bria_fibo": "its layers' text embeddings come as a list with no batch axis of its own",
}

CACHE_DIT = {
    "SGLANG_CACHE_DIT_ENABLED": "true",
    "SGLANG_CACHE_DIT_WARMUP": "2",
    "SGLANG_CACHE_DIT_RDT": "0.5",
    "SGLANG_CACHE_DIT_MC": "2",
}
CACHE_SETTINGS: dict[str, dict[str, str]] = {
    "threshold": CACHE_DIT,
    "taylorseer": CACHE_DIT | {"SGLANG_CACHE_DIT_TAYLORSEER": "true", "SGLANG_CACHE_DIT_TS_ORDER": "1"},
    "static_mask": CACHE_DIT
    | {
        "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "3,1,1,1",
        "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "1,2,2,2",
        "SGLANG_CACHE_DIT_SCM_POLICY": "static",
    },
}
CACHED_STEPS = 12


def check_engine(name: str, checkpoints_root: Path, other_process: ResumingProcess) -> None:
    """The engine changes no bit alone, little when it merges, and none by a resume elsewhere."""
    folder = checkpoint(name, checkpoints_root)
    stages = Stages(folder)
    requests = [stages.request(index, deterministic=True) for index in range(3)]
    truths = [stages.plain(request) for request in requests]

    checkpoints: list[list[Checkpoint]] = []
    for request, truth in zip(requests, truths, strict=True):
        numbers, made = stages.alone(request)
        assert_same_bits(numbers, truth)
        checkpoints.append(made)

    merging = [stages.request(index, deterministic=False) for index in range(3)]
    stages.together(merging)  # the first merges are checked against lone forwards, and those are handed out
    stages.denoiser.engine.statistics.batch_sizes.clear()
    for numbers, truth in zip(stages.together(merging), truths, strict=True):
        assert deviation(numbers, truth) <= MERGED_DEVIATION
    shared = any(size > 1 for size in stages.denoiser.engine.statistics.batch_sizes)
    assert shared == (name not in NEVER_MERGED), stages.denoiser.engine.statistics

    assert_resumes_elsewhere(stages, folder, requests[0], truths[0], checkpoints[0], other_process)
    stages.close()


def check_cached_resume(name: str, settings: str, checkpoints_root: Path, other_process: ResumingProcess) -> None:
    """A cached request resumes elsewhere with the same bits, whatever runs beside it."""
    folder, variables = checkpoint(name, checkpoints_root), CACHE_SETTINGS[settings]
    stages = Stages(folder, variables)
    requests = [stages.request(index, deterministic=True, steps=CACHED_STEPS) for index in range(3)]
    alone = [stages.alone(request) for request in requests]
    summaries = [s for s in stages.denoiser.recent_summaries["cache_dit"][0].values() if isinstance(s, dict)]
    assert len(summaries) == (2 if name == "wan22" else 1), "one for each transformer"
    assert sum(summary["reused_steps"] for summary in summaries) > 0, "something was reused"
    assert any(not same_bits(numbers, stages.plain(request)) for request, (numbers, _) in zip(requests, alone))  # noqa: B905

    for numbers, (truth, _) in zip(stages.together(requests), alone, strict=True):
        assert_same_bits(numbers, truth)

    truth, checkpoints = alone[0]
    assert_resumes_elsewhere(stages, folder, requests[0], truth, checkpoints, other_process, variables)
    stages.close()


class Stages:
    """Encoder and denoiser of one model in this process."""

    def __init__(
        self,
        folder: Path,
        variables: dict[str, str] | None = None,
        checkpoint_every: int = 1,
        precision: str | None = None,
        ranks: RankGroup | None = None,
        **args: Any,
    ) -> None:
        tiny_patches()
        self.name = folder.name
        self.encoder = load_stage(folder, ("encoder",))
        after_load = tiny_model(self.name).after_load
        if after_load is not None:
            after_load(self.encoder.pipeline)
        self.stage = load_denoiser(folder, precision)
        self.denoiser = DenoiserStage(
            self.stage,
            DenoisingArgs(max_wait_s=1.0, checkpoint_every=checkpoint_every, **{"merging": "always", **args}),
            encode=self.encode,
            env=EnvConfig.from_environ(variables or {}),
            ranks=ranks,
        )

    def request(self, index: int, deterministic: bool, steps: int | None = None) -> GenerationRequest:
        """One of three requests that differ in seed, prompt and number of steps."""
        arguments = request_arguments(self.name)
        arguments["num_inference_steps"] = steps or arguments["num_inference_steps"] + MORE_STEPS[index]
        if index and isinstance(arguments.get("prompt"), str):
            arguments["prompt"] = PROMPTS[index]
        return GenerationRequest(f"r{index}", self.name, arguments, index, ANY_OUTPUT, deterministic=deterministic)

    def encode(self, request: GenerationRequest) -> Conditioning:
        return encode(self.encoder, request)

    def plain(self, request: GenerationRequest) -> list[torch.Tensor]:
        """What the loop makes without an engine."""
        calls = unpack_conditioning(self.encode(request), self.stage)
        session = DenoiseSession(self.stage, call_arguments(self.stage, request), request.seed, calls)
        return self.numbers(pack_outcome(session.run(), session.device))

    def alone(self, request: GenerationRequest) -> tuple[list[torch.Tensor], list[Checkpoint]]:
        checkpoints: list[Checkpoint] = []
        inputs, _ = self.denoiser.denoise(
            request, self.encode(request), follower=DenoisingFollower(checkpoint=checkpoints.append)
        )
        return self.numbers(inputs), checkpoints

    def together(self, requests: list[GenerationRequest]) -> list[list[torch.Tensor]]:
        conditionings = [self.encode(request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as threads:
            made = list(threads.map(self.denoiser.denoise, requests, conditionings))
        return [self.numbers(inputs) for inputs, _ in made]

    def numbers(self, inputs: DecodeInputs) -> list[torch.Tensor]:
        return handed_over(inputs, self.stage)

    def close(self) -> None:
        self.denoiser.engine.close()


def handed_over(inputs: DecodeInputs, stage: StagePipeline) -> list[torch.Tensor]:
    """All that the VAE stage gets."""
    outcome = unpack_outcome(inputs, stage)
    if isinstance(outcome, HandOff):
        return tensors([[call.args, call.kwargs] for call in outcome.decoder_calls])
    return tensors(outcome.output)


def assert_resumes_elsewhere(
    stages: Stages,
    folder: Path,
    request: GenerationRequest,
    truth: list[torch.Tensor],
    checkpoints: list[Checkpoint],
    other_process: ResumingProcess,
    variables: dict[str, str] | None = None,
) -> None:
    """From the checkpoint at half of the steps, which travels as bytes."""
    half = checkpoints[len(checkpoints) // 2]
    total = checkpoints[-1].step + 1
    conditioning = stages.encode(request)
    inputs, steps = other_process.resume(folder, request, conditioning, pickle.dumps(half), variables)
    assert_same_bits(stages.numbers(inputs), truth)
    assert steps >= total - half.step > 0
    assert steps < total, "what was done before the checkpoint is not done again"


def assert_same_bits(numbers: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    assert same_bits(numbers, truth), f"they differ by {deviation(numbers, truth):.1e}"


def same_bits(numbers: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    assert truth
    assert all(bool(t.isfinite().all()) for t in truth)
    return len(numbers) == len(truth) and all(map(torch.equal, numbers, truth))


def deviation(numbers: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest difference relative to the largest value of its tensor."""
    assert len(numbers) == len(truth) > 0
    pairs = zip(numbers, truth, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12)) for a, b in pairs)
