"""What runs in a stage's process: the plain classes of the stages, without Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deployments.devices import select_device
from deployments.media.outputs import files_to_write
from deployments.messages import (
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    OutputFormat,
    StageName,
)
from deployments.model import DType, ModelArgs
from deployments.stage_pipeline.outputs import media_kind
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output, making_of
from deployments.stages.denoise import AskStage, DenoiserStage
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from tests.support.tiny_models import TINY_MODELS, tiny_patches

OUTPUTS = {
    "image": OutputFormat("image", "png"),
    "video": OutputFormat("video", "mp4"),
    "audio": OutputFormat("audio", "wav"),
    "tensors": OutputFormat("tensors", "safetensors"),
}


READS_FILES = EnvConfig.from_environ({"SGLANG_USE_RUNAI_MODEL_STREAMER": "false"})  # streaming has tests of its own


class StageWorker:
    """One stage of one pipeline at a time."""

    def __init__(self, stage: StageName, ask_stage: AskStage) -> None:
        self.name = stage
        self.ask_stage = ask_stage
        tiny_patches()
        for library in (diffusers_logging, transformers_logging):
            library.set_verbosity_error()
            library.disable_progress_bar()

    def load(self, folder: Path, dtype: DType) -> dict[str, int]:
        return self._build(ModelArgs(path=str(folder), name=folder.name, dtype=dtype), READS_FILES)

    def build(self, args: ModelArgs, cache_root: Path, use_streamer: bool) -> dict[str, int]:
        runtime = {"cache_root": cache_root, "use_runai_model_streamer": use_streamer}
        return self._build(args, EnvConfig.model_validate({"runtime": runtime}))

    def _build(self, args: ModelArgs, env: EnvConfig) -> dict[str, int]:
        self.stage = build_stage(args, (self.name,), env, select_device("cpu"))
        model = TINY_MODELS.get(args.name)
        if model is not None and model.after_load is not None:
            model.after_load(self.stage.pipeline)
        if self.name == "denoiser":
            self.denoiser = DenoiserStage(self.stage, ask_stage=self.ask_stage)
        return self.stage.weight_bytes()

    def encode(self, request: GenerationRequest) -> Conditioning:
        return encode(self.stage, request)

    def denoise(self, request: GenerationRequest, conditioning: Conditioning, envelope: Envelope) -> DecodeInputs:
        return self.denoiser.denoise(request, conditioning, envelope=envelope)[0]

    def decode(self, request: GenerationRequest, inputs: DecodeInputs) -> list[Any]:
        """The numbers of the output, of which the files that a served request ends in can be made."""
        output = decode_output(self.stage, request, inputs)
        request = dataclasses.replace(request, output=OUTPUTS[media_kind(type(self.stage.pipeline))])
        assert files_to_write(output, request, making_of(self.stage, {}))
        return torch.utils._pytree.tree_leaves(dict(output))

    def call_component(self, call: ComponentCall) -> ComponentAnswer:
        return answer_call(self.stage, call)
