"""Load a transformer and an encoder to a simulated npu, streamed and mapped, in a process of its own.

It reports, of each load, the dtypes that the weights have on the device, and the casts that the host made.
"""

import json
import os
import sys
import warnings

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # in this thread, where the casts are counted
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.weights.load import load_component
from tests.support import simulated_accelerator
from tests.support.tiny_models.flux import flux


class HostCasts(TorchDispatchMode):
    """Counts the elements of floating tensors of the host that are given another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and args[0].is_floating_point():
            self.elements += args[0].numel() if kwargs.get("dtype") not in (None, args[0].dtype) else 0
        return func(*args, **kwargs)


def main(root: Path) -> None:
    warnings.filterwarnings("ignore")
    pipeline = flux()[0]
    simulated_accelerator.install("npu")
    report: dict[str, Any] = {}
    for name in ("transformer", "text_encoder_2"):
        model = getattr(pipeline, name)
        model.save_pretrained(root / name)
        for use_streamer in (True, False):
            with HostCasts() as casts:
                loaded = load_component(type(model), root / name, torch.bfloat16, "npu", use_streamer)
            weights = [*loaded.parameters()]
            report[f"{name} {'streamed' if use_streamer else 'mapped'}"] = {
                "devices": sorted({p.device.type for p in weights}),
                "dtypes": sorted({str(p.dtype) for p in weights}),
                "cast_on_host": casts.elements,
                "elements": sum(p.numel() for p in weights),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
