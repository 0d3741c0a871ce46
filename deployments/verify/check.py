"""The check of a checkpoint: the whole pipeline is loaded, asked, and held against its split."""

from __future__ import annotations

from dataclasses import replace

import torch

from deployments.devices import Device
from deployments.errors import TriptychError
from deployments.messages import GenerationRequest
from deployments.model import ModelArgs
from deployments.stage_pipeline.loading import StagePipeline
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.values import leaves
from deployments.verify.asked import Asked
from deployments.verify.checks import check_split
from deployments.verify.differences import as_tensor
from deployments.verify.request import in_words, small_requests
from deployments.verify.split import Split
from deployments.verify.unsplit import Unsplit, call_unsplit
from deployments.verify.verdict import Report
from deployments.verify.whole import Processes, Whole, load_whole
from env_config.variables import EnvConfig


class NoRequestError(TriptychError):
    """There is no small request that the unsplit pipeline answers."""


def verify(model: ModelArgs, processes: Processes, asked: Asked, env: EnvConfig, device: Device) -> Report:
    """Raises what loading raises, and a lack of memory where the whole pipeline does not fit on the device."""
    return check(load_whole(model, processes, env, device), model, asked, env, device)


def check(whole: Whole, model: ModelArgs, asked: Asked, env: EnvConfig, device: Device) -> Report:
    pipeline, dtype = whole.unsplit.pipeline, str(whole.unsplit.dtype or "as stored").removeprefix("torch.")
    report = Report(model.name, type(pipeline).__name__, device.name, dtype)
    try:
        request, truth = first_answered(whole.unsplit, model, asked)
    except TriptychError as error:
        return replace(report, problem=str(error))
    report = replace(report, request=in_words(request.arguments))
    return replace(report, verdicts=tuple(check_split(Split(whole, device, env), model.denoising, request, truth)))


def first_answered(whole: StagePipeline, model: ModelArgs, asked: Asked) -> tuple[GenerationRequest, Unsplit]:
    """The smallest request that the unsplit pipeline answers with numbers. Raises NoRequestError."""
    errors = []
    for request in small_requests(whole, model, asked):
        try:
            truth = call_unsplit(whole, request)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # (it may want other inputs, or another size)
            if is_out_of_memory(error):
                raise
            errors.append(f"{type(error).__name__}: {error}")
            continue
        if is_finite(truth):
            return request, truth
        errors.append("it makes NaN, infinite values or nothing")
    told = "; ".join(dict.fromkeys(error.splitlines()[0] for error in errors))
    raise NoRequestError(
        f"the unsplit {type(whole.pipeline).__name__} answers none of {len(errors)} small requests ({told}). "
        "Name what its call needs: --argument NAME=VALUE, or `default_arguments`"
    )


def is_finite(truth: Unsplit) -> bool:
    numbers = [tensor for leaf in leaves(truth.output) if (tensor := as_tensor(leaf)) is not None]
    return bool(numbers) and all(bool(tensor.isfinite().all()) for tensor in numbers)
