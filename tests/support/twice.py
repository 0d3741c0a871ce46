"""A tiny model's three stages make a request twice in this process: the second time finds what the first one found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deployments.errors import HandOffError, HandOffIncompleteError, NotNumbersError, TriptychError
from deployments.messages import STAGES, ComponentAnswer, ComponentCall, Envelope, GenerationRequest, StageName
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from tests.support.stage_parity import ANY_OUTPUT, SEED, assert_same
from tests.support.tiny_models import checkpoint, request_arguments, run_unsplit, tiny_model, tiny_patches

PLAIN = (bool, int, float, str, tuple, type(None))


def check_twice(name: str, dtype: torch.dtype, checkpoints_root: Path) -> None:
    """Both times the stages make the bytes of the unsplit pipeline, and leave their models as they were loaded."""
    folder = checkpoint(name, checkpoints_root)
    arguments = request_arguments(name)
    try:
        truth: Any = run_unsplit(folder, arguments, SEED, dtype)
        if any(isinstance(t, torch.Tensor) and not torch.isfinite(t).all() for t in truth):
            truth = NotNumbersError
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        truth = error  # random weights overflow in float16, or the CPU has no such kernel
    stages = HeldStages(name, folder, dtype)
    before = stages.state()
    request = GenerationRequest("twice", name, arguments, SEED, ANY_OUTPUT)
    try:
        for _ in range(2):
            outcome = stages.outcome(request)
            if isinstance(truth, list):
                assert isinstance(outcome, list), f"it fails: {outcome!r}"
                assert_same(outcome, truth)
            else:
                assert isinstance(outcome, BaseException), f"the unsplit pipeline fails: {truth!r}"
            after = stages.state()
            changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
            assert changed == {}, f"left behind: {changed}"
    finally:
        stages.denoiser.engine.close()


class HeldStages:
    """The three stages, each with its own part of the model."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype) -> None:
        tiny_patches()
        self.held: dict[StageName, StagePipeline] = {
            stage: load_stage(folder, (stage,), dtype=dtype) for stage in STAGES
        }
        after_load = tiny_model(name).after_load
        for stage in self.held.values() if after_load is not None else ():
            after_load(stage.pipeline)  # type: ignore[misc]
        self.denoiser = DenoiserStage(self.held["denoiser"], DenoisingArgs(max_batch_size=1), ask_stage=self._ask)

    def outcome(self, request: GenerationRequest, envelope: Envelope = Envelope()) -> list[Any] | Exception:  # noqa: B008
        """The leaves of the output, made as the application makes it: on a longer way where the shortest fails."""
        try:
            conditioning = encode(self.held["encoder"], request)
            inputs, _ = self.denoiser.denoise(request, conditioning, envelope=envelope)
            return torch.utils._pytree.tree_leaves(dict(decode_output(self.held["vae"], request, inputs)))
        except HandOffError as error:
            if envelope.remote_calls:
                return error
            complete = isinstance(error, HandOffIncompleteError) and not envelope.complete_hand_off
            return self.outcome(request, Envelope(complete_hand_off=complete, remote_calls=not complete))
        except (TriptychError, RuntimeError) as error:
            return error

    def state(self) -> dict[tuple[str, ...], Any]:
        """The dtypes, modes and switches of every module of every stage."""
        found: dict[tuple[str, ...], Any] = {}
        for stage, held in self.held.items():
            for component in held.layout.stages_of:
                for path, module in getattr(held.pipeline, component).named_modules():
                    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                    key = stage, component, path
                    found[*key, "dtypes"] = [(name, tensor.dtype, tensor.stride()) for name, tensor in tensors]
                    if not type(module).__module__.startswith("transformers."):  # they keep hooks of their own
                        found[*key, "hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks)
                    found[*key, "processor"] = id(vars(module).get("processor"))
                    found |= {(*key, n): v for n, v in vars(module).items() if n[0] != "_" and isinstance(v, PLAIN)}
        return found

    def _ask(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        return answer_call(self.held[stage], call)
