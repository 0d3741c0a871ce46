"""Pipelines that hand the request's generator to torch with their device: torch refuses that on accelerators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.sessions import session
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, Result
from deployments.tensors.values import leaves
from tests.support.tiny_models import checkpoint, drawing, request_arguments, tiny_patches

ACCELERATOR = torch.device("cpu", 0)  # tells itself from the generator's device, which is the CPU without a number
SEED = 4
NAMES = [model.name for model in drawing.MODELS]

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


class Strict(TorchFunctionMode):
    """As CUDA: what is drawn on the accelerator is drawn with a generator of its own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None and kwargs.get("device") == ACCELERATOR:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return func(*args, **kwargs)


def output_on(device: torch.device, folder: Path) -> list[torch.Tensor]:
    stage = load_stage(folder, device=device)
    with Strict():
        outcome = DenoiseSession(stage, request_arguments(folder.name), SEED, None).run()
    assert isinstance(outcome, Result)
    output: Any = outcome.output
    return [leaf for leaf in leaves(dict(output)) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_that_draws_by_itself_makes_the_same_on_an_accelerator(
    name: str, checkpoints_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_patches()
    folder = checkpoint(name, checkpoints_root)
    on_cpu = output_on(torch.device("cpu"), folder)
    assert on_cpu
    assert all(torch.equal(a, b) for a, b in zip(output_on(ACCELERATOR, folder), on_cpu, strict=True))
    monkeypatch.setattr(session, "draws_for", lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="device type for generator"):
        output_on(ACCELERATOR, folder)
