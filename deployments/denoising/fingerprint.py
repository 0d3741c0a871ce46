"""Fingerprints of a denoiser and of a request on it: equal where a checkpoint's steps would have the same numbers.

A node may hold other files of the same model (weights of the other stages, another precision's), or none where the
weights were streamed. Only what the denoising loop computes with is asked, where it lies: in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance

from deployments.denoising.checkpoint import FORMAT, digest
from deployments.messages import GenerationRequest, InputFile
from deployments.stage_pipeline.loading import StagePipeline
from deployments.tensors.packing import pack
from deployments.tensors.parts import plain_parts
from deployments.tensors.values import map_values, without_opaque

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def request_fingerprint(model_fingerprint: str, request: GenerationRequest) -> str:
    """Equal for the same request on the same model; settings that change the numbers are part of it."""
    arguments = map_values(_file_content, dict(sorted(request.arguments.items())))
    settings = pack(without_opaque([arguments, request.seed, dict(sorted(request.features.items()))]))
    return hashlib.sha256(f"{model_fingerprint}|{digest(settings)}".encode()).hexdigest()


def model_fingerprint(stage: StagePipeline, settings: str = "") -> str:
    """Of the denoisers' weights, the scales of adapters, the configurations of the loop, device type, precision and the
    versions of the code.

    `settings` are those of features and accelerations that change the numbers.
    """
    precision = torch.get_float32_matmul_precision()
    versions = f"{FORMAT}|{diffusers.__version__}|{torch.__version__}"
    sha = hashlib.sha256(f"{versions}|{stage.device.type}|{precision}|{settings}".encode())
    adapters = stage.layout.ip_adapters
    sha.update(f"{_configuration(stage.pipeline)}|{adapters and adapters.scale}".encode())
    for name in sorted(_of_the_loop(stage)):
        sha.update(f"{name}|{_configuration(getattr(stage.pipeline, name))}".encode())
    for name in stage.layout.denoisers:
        sha.update(f"{name}|{stage.precisions.get(name)}\n".encode())
        for line in _weights(stage.components[name]):
            sha.update(f"{name}.{line}\n".encode())
    return sha.hexdigest()


def _of_the_loop(stage: StagePipeline) -> list[str]:
    """Components whose configurations the loop reads: those of the encoders and their tokenizers are none of them."""
    layout = stage.layout
    return [
        name
        for name, component in stage.pipeline.components.items()
        if name in (*layout.denoisers, *layout.autoencoders) or isinstance(component, SchedulerMixin | BaseGuidance)
    ]


def _configuration(owner: Any) -> str:
    """Without names of classes of other components, folders and versions, which begin with an underscore."""
    if getattr(owner, "config", None) is None:  # a model made of others, which have theirs
        parts = [part for part in owner.modules() if part is not owner and hasattr(part, "config")]
        return json.dumps([type(owner).__name__, *map(_configuration, parts)])
    config = {name: value for name, value in dict(owner.config).items() if not name.startswith("_")}
    return json.dumps([type(owner).__name__, config], sort_keys=True, default=repr)


def _weights(module: torch.nn.Module) -> Iterator[str]:
    """A line for each tensor: its name, dtype, shape and the sum of its bits as integers, exact in any order."""
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        for part, plain in plain_parts(tensor):
            yield f"{name}{part} {plain.dtype} {tuple(plain.shape)} {_sum_of_bits(plain)}"


def _sum_of_bits(tensor: torch.Tensor) -> int:
    if not tensor.numel() or tensor.device.type == "meta":
        return 0
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return int(real.contiguous().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64))


def _file_content(value: Any) -> Any:
    return value.data if isinstance(value, InputFile) else value
