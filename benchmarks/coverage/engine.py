"""Two requests through the step engine: each alone, both merged, and the first resumed in another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.processes import Failure, RemoteError, Worker
from benchmarks.coverage.rows import EngineFound
from benchmarks.coverage.stages import build, request_of
from benchmarks.coverage.unsplit import SEED
from deployments.messages import Checkpoint, Conditioning, DecodeInputs, Envelope, GenerationRequest, StageName
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.hand_off import pack_outcome, unpack_outcome
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, HandOff
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import call_arguments, encode, unpack_conditioning
from deployments.tensors.values import tensors

Numbers = list[torch.Tensor]
OTHER_PROMPT = "a red sun bright"
MOST_DEVIATION = 1e-4  # of merged forwards from lone ones, relative to the largest value, in float32
EVERY_STEP = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, merging="always")


@dataclass(frozen=True)
class Alone:
    """The first request, run alone: what a resume of it begins with and has to end in."""

    request: GenerationRequest
    conditioning: Conditioning
    numbers: Numbers
    checkpoints: list[Checkpoint]


class EngineProcesses:
    """Two processes that hold all stages of one pipeline each."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = Worker(EngineWorker, folder), Worker(EngineWorker, folder)

    def judge(self, arguments: dict[str, Any]) -> EngineFound:
        requests = [request_of(arguments), request_of(arguments, SEED + 1, "other")]
        if "prompt" in arguments:
            requests[1].arguments["prompt"] = _other_prompt(arguments["prompt"])
        try:
            found, alone = self.first.ask("run", requests)
        except RemoteError as error:
            return EngineFound((f"the engine fails: {error.failure.sentence()}",), trace=error.failure.trace)
        return _resumed(found, alone, self.second)

    def stop(self) -> None:
        self.first.stop()
        self.second.stop()


def _resumed(found: EngineFound, alone: Alone, other: Worker) -> EngineFound:
    if not alone.checkpoints:
        return found
    half = alone.checkpoints[len(alone.checkpoints) // 2]
    try:
        numbers = other.ask("resume", alone.request, alone.conditioning, half)
    except RemoteError as error:
        problems = (*found.problems, *_problem_of_resume(error.failure))
        return dataclasses.replace(found, resumable=False, problems=problems, trace=error.failure.trace)
    if _same(numbers, alone.numbers):
        return dataclasses.replace(found, resumable=True)
    wrong = f"a resumed request differs by {_deviation(numbers, alone.numbers):.3g}"
    return dataclasses.replace(found, resumable=False, problems=(*found.problems, wrong))


def _problem_of_resume(failure: Failure) -> tuple[str, ...]:
    """A checkpoint that is refused is no fault: the request starts again."""
    return () if failure.kind == "CannotResumeError" else (f"a resume fails: {failure.sentence()}",)


class EngineWorker:
    """All stages of one pipeline, the denoiser with its engine."""

    def __init__(self, folder: Path, ask_stage: Callable[..., Any]) -> None:
        self.folder = folder
        self.loaded: dict[StageName, StagePipeline] = {}

    def run(self, requests: list[GenerationRequest]) -> tuple[EngineFound, Alone]:
        denoiser = self._denoiser(learns_axes=True)
        alone = [self._alone(denoiser, dataclasses.replace(each, deterministic=True)) for each in requests]
        problems = [] if denoiser.needs_remote_calls(requests[0]) else self._differences_from_plain(alone)
        self._together(denoiser, requests)  # the first merges are checked against lone forwards, and those handed out
        denoiser.engine.statistics.batch_sizes.clear()
        merged = self._together(denoiser, requests)
        deviation = _largest([_deviation(a, b.numbers) for a, b in zip(merged, alone, strict=True)])
        if not deviation <= MOST_DEVIATION:
            problems.append(f"merged forwards differ by {deviation:.3g}")
        found = EngineFound(
            tuple(problems),
            batched=any(size > 1 for size in denoiser.engine.statistics.batch_sizes),
            merged_deviation=float(f"{deviation:.1e}"),
            previewed=self._shows_previews(denoiser, requests[0]),
        )
        denoiser.engine.close()
        return found, alone[0]

    def resume(self, request: GenerationRequest, conditioning: Conditioning, checkpoint: Checkpoint) -> Numbers:
        denoiser = self._denoiser(learns_axes=False)
        inputs, _ = denoiser.denoise(request, conditioning, checkpoint)
        denoiser.engine.close()
        return self._numbers(inputs)

    def _denoiser(self, learns_axes: bool) -> DenoiserStage:
        return DenoiserStage(
            self._stage("denoiser"),
            EVERY_STEP,
            encode=self._encode if learns_axes else None,
            ask_stage=lambda stage, call: answer_call(self._stage(stage), call),
        )

    def _stage(self, name: StageName) -> StagePipeline:
        if name not in self.loaded:
            self.loaded[name] = build(self.folder, (name,))
        return self.loaded[name]

    def _encode(self, request: GenerationRequest) -> Conditioning:
        return encode(self._stage("encoder"), request)

    def _alone(self, denoiser: DenoiserStage, request: GenerationRequest) -> Alone:
        checkpoints: list[Checkpoint] = []
        conditioning = self._encode(request)
        follower = DenoisingFollower(checkpoint=checkpoints.append)
        inputs, _ = denoiser.denoise(request, conditioning, follower=follower)
        return Alone(request, conditioning, self._numbers(inputs), checkpoints)

    def _differences_from_plain(self, alone: list[Alone]) -> list[str]:
        """A request that runs alone in the engine makes the bits of the loop without one."""
        differences = []
        for each in alone:
            calls = unpack_conditioning(each.conditioning, self._stage("denoiser"))
            arguments = call_arguments(self._stage("denoiser"), each.request)
            session = DenoiseSession(self._stage("denoiser"), arguments, each.request.seed, calls)
            plain = self._numbers(pack_outcome(session.run(), session.device))
            if not _same(each.numbers, plain):
                differences.append(f"alone in the engine a request differs by {_deviation(each.numbers, plain):.3g}")
        return differences

    def _together(self, denoiser: DenoiserStage, requests: list[GenerationRequest]) -> list[Numbers]:
        conditionings = [self._encode(request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as threads:
            made = list(threads.map(denoiser.denoise, requests, conditionings))
        return [self._numbers(inputs) for inputs, _ in made]

    def _shows_previews(self, denoiser: DenoiserStage, request: GenerationRequest) -> bool:
        shown: list[DecodeInputs] = []
        follower = DenoisingFollower(preview=lambda step, inputs: shown.append(inputs))
        denoiser.denoise(request, self._encode(request), envelope=Envelope(previews=1), follower=follower)
        return bool(shown)

    def _numbers(self, inputs: DecodeInputs) -> Numbers:
        """All that the VAE stage gets."""
        outcome = unpack_outcome(inputs, self._stage("denoiser"))
        if isinstance(outcome, HandOff):
            return tensors([[call.args, call.kwargs] for call in outcome.decoder_calls])
        return tensors(outcome.output)


def _other_prompt(value: Any) -> Any:
    if isinstance(value, list):
        return [_other_prompt(each) for each in value]
    is_text = isinstance(value, str) and not value.lstrip().startswith("{")  # JSON stays: the seeds differ
    return OTHER_PROMPT if is_text else value


def _same(numbers: Numbers, truth: Numbers) -> bool:
    return len(numbers) == len(truth) and all(map(torch.equal, numbers, truth))


def _deviation(numbers: Numbers, truth: Numbers) -> float:
    """The largest difference, relative to the largest value of its tensor; NaN where they cannot be compared."""
    if len(numbers) != len(truth) or not truth:
        return float("nan")
    return _largest(list(map(_deviation_of_tensor, numbers, truth)))


def _largest(deviations: list[float]) -> float:
    """NaN where one is."""
    return float(torch.tensor(deviations, dtype=torch.float64).max())


def _deviation_of_tensor(made: torch.Tensor, truth: torch.Tensor) -> float:
    if made.shape != truth.shape:
        return float("nan")
    if not made.numel():
        return 0.0
    return float((made.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-12))
