"""Fingerprints of a denoiser and of a request on it: equal where a checkpoint's steps would have the same numbers.

A node may hold other files of the same model (weights of the other stages, another precision's), or none where the
weights were streamed. Only what the denoising loop computes with is asked, where it lies: in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from operator import itemgetter
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

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def request_fingerprint(model_fingerprint: str, request: GenerationRequest) -> str:
    """Equal for the same request on the same model; settings that change the numbers are part of it."""
    arguments = map_values(_file_content, dict(sorted(request.arguments.items())))
    settings = pack(without_opaque([arguments, request.seed, dict(sorted(request.features.items()))]))
    return hashlib.sha256(f"{model_fingerprint}|{digest(settings)}".encode()).hexdigest()


def model_fingerprint(stage: StagePipeline, settings: str = "") -> str:
    """Of the denoisers' weights and how they compute with them, the scales of adapters, the configurations of the loop,
    the kind of device, precision and the versions of the code.

    `settings` are those of features and accelerations that change the numbers.
    """
    precision = torch.get_float32_matmul_precision()
    versions = f"{FORMAT}|{diffusers.__version__}|{torch.__version__}"
    sha = hashlib.sha256(f"{versions}|{device_kind(stage.device)}|{precision}|{settings}".encode())
    adapters = stage.layout.ip_adapters
    sha.update(f"{_configuration(stage.pipeline)}|{adapters and adapters.scale}".encode())
    for name in sorted(_of_the_loop(stage)):
        sha.update(f"{name}|{_configuration(getattr(stage.pipeline, name))}".encode())
    for name in stage.layout.denoisers:
        sha.update(f"{name}|{stage.precisions.get(name)}\n".encode())
        for line in (*_weights(stage.components[name]), *_computations(stage.components[name])):
            sha.update(f"{name}.{line}\n".encode())
    return sha.hexdigest()


def device_kind(device: torch.device) -> str:
    """Equal for devices whose kernels are the same: the type, the model, and what it is capable of."""
    if device.type == "cpu":
        return f"cpu|{torch.backends.cpu.get_cpu_capability()}"
    module = torch.get_device_module(device)
    asked = ("get_device_name", "get_device_capability")
    is_there = getattr(module, "is_available", lambda: False)()
    told = [str(getattr(module, name)(device)) for name in asked if is_there and hasattr(module, name)]
    return "|".join([device.type, *told])


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
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=itemgetter(0)):
        for part, plain in plain_parts(tensor):
            yield f"{name}{part} {plain.dtype} {tuple(plain.shape)} {_sum_of_bits(plain)}"


def _computations(module: torch.nn.Module) -> Iterator[str]:
    """A line for what computes otherwise than its configuration says: quantised, compiled, cast by hooks."""
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if type(parameter) is not torch.nn.Parameter:
                yield f"{path}.{name} {_quantisation(parameter)}"
        if part._compiled_call_impl is not None or hasattr(part, "_orig_mod"):
            yield f"{path} compiled"
        registry = getattr(part, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry is not None else ():
            if dtypes := {key: str(value) for key, value in vars(hook).items() if isinstance(value, torch.dtype)}:
                yield f"{path} {name} {dtypes}"


def _quantisation(parameter: torch.nn.Parameter) -> str:
    """Its class and its settings, which say how it is computed with, without addresses of objects."""
    settings = parameter.__tensor_flatten__()[1] if hasattr(parameter, "__tensor_flatten__") else None
    plain = {name: value for name, value in vars(parameter).items() if isinstance(value, bool | int | float | str)}
    return f"{type(parameter).__name__} {ADDRESS.sub('', repr(settings))} {sorted(plain.items())}"


def _sum_of_bits(tensor: torch.Tensor) -> int:
    if not tensor.numel() or tensor.device.type == "meta":
        return 0
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return int(real.contiguous().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64))


def _file_content(value: Any) -> Any:
    return value.data if isinstance(value, InputFile) else value
