"""Construct a whole replica on a simulated npu or musa, as test_runtime.py asks in a process of its own."""

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import ray
from ray import serve

from tests.support import simulated_accelerator
from tests.support.tiny_models import tiny_patches


def main(name: str, checkpoint: Path, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    simulated_accelerator.install(name)
    tiny_patches()
    os.environ["SGLANG_DIFFUSION_TARGET_DEVICE"] = name
    os.environ["SGLANG_DIFFUSION_CACHE_ROOT"] = str(folder)
    os.environ["SGLANG_DIFFUSION_LOGGING_LEVEL"] = "ERROR"
    serve.get_replica_context = lambda: SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    ray.get_runtime_context = lambda: SimpleNamespace(
        get_node_id=lambda: "node", get_assigned_resources=lambda: {"CPU": 1.0}
    )

    from tests.support.whole_replica import WholeReplica

    whole = WholeReplica(checkpoint)
    simulated_accelerator.dispatched.clear()
    whole.generate(2)
    report = {
        "device": whole.replica.description.device,
        "devices_of_parameters": {
            component: sorted({parameter.device.type for parameter in module.parameters()})
            for component, module in whole.replica.stage.components.items()
        },
        "operations": len(simulated_accelerator.dispatched),
    }
    print(json.dumps(report))
    whole.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
