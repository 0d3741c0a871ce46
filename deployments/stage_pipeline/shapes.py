"""The shapes of what a component of another stage would return, found on the meta device once per input shape."""

from __future__ import annotations

import threading
from typing import Any

import torch

from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.component import function_of
from deployments.tensors.values import describe, shape_key, to_meta

_walking = threading.Lock()  # a twin has the dtypes and switches of one request at a time


def output_description(
    stage: StagePipeline,
    skeleton: Any,
    component: str,
    method: str,
    args: Any,
    kwargs: Any,
    own: torch.nn.Module | None = None,
) -> Any:
    """A description (deployments.tensors.values.describe) of the call's output.

    `own`: the component with the dtypes and switches that the request has given it; None: with those of all.
    """
    dtypes = sorted({str(parameter.dtype) for parameter in own.parameters()}) if own is not None else None
    key = (component, method, shape_key((args, kwargs, dtypes)))
    if key not in stage.decoder_shapes:
        with _walking:
            try:
                description = _run_on_meta(skeleton.meta_twin(False, own), method, args, kwargs)
            except Exception:  # noqa: BLE001  (whatever a model without its switches raises)
                # Some inputs work only with the run-time switches (tiling), which make this much slower.
                description = _run_on_meta(skeleton.meta_twin(True, own), method, args, kwargs)
        stage.decoder_shapes[key] = description
    return stage.decoder_shapes[key]


@torch.no_grad()
def _run_on_meta(twin: Any, method: str, args: Any, kwargs: Any) -> Any:
    function = function_of(twin, method)
    with torch.device("meta"):
        return describe(function(*to_meta(args), **to_meta(kwargs)))
