"""Run whole pipelines on a simulated device with strict generators, as test_draws.py asks in a process of its own."""

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, Result
from deployments.tensors.values import leaves
from tests.support import simulated_accelerator
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

DEVICE = "npu"
SEED = 4


def output_on(device: str, folder: Path) -> torch.Tensor:
    """The numbers of the picture or video."""
    stage = load_stage(folder, device=torch.device(device))
    outcome = DenoiseSession(stage, request_arguments(folder.name), SEED, None).run()
    assert isinstance(outcome, Result)
    given: Any = outcome.output
    [output] = [leaf for leaf in leaves(dict(given)) if isinstance(leaf, torch.Tensor)]
    return output.to("cpu")


def difference(folder: Path) -> float | str:
    """The largest between the device and the CPU; what the device refuses."""
    try:
        return float((output_on(DEVICE, folder) - output_on("cpu", folder)).abs().max())
    except Exception:  # noqa: BLE001
        return traceback.format_exc()[-2000:]


def main(root: Path, names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tiny_patches()
    simulated_accelerator.install(DEVICE)
    print(json.dumps({name: difference(checkpoint(name, root)) for name in names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
