"""Messages to and from a simulated device with streams, as test_copies.py asks in a process of its own."""

import json
from typing import Any

import torch

from deployments.tensors.copies import beside_forwards, queued_so_far
from deployments.tensors.packing import pack, unpack
from tests.support import simulated_accelerator as simulated

DEVICE = "npu"


def main() -> None:
    simulated.install(DEVICE)
    simulated.install_streams(DEVICE)
    device = torch.device(DEVICE)
    numbers = [torch.arange(60.0).reshape(3, 4, 5), torch.arange(7), torch.ones(2, 8, 4, dtype=torch.bfloat16)]
    given = [each.to(device) for each in numbers]
    message = [given[0].permute(2, 0, 1), given[1], {"again": given[1], "here": numbers[0]}, given[2][:, ::2]]
    moment = queued_so_far(device)

    outward = observed(lambda: pack(message))
    inward = observed(lambda: unpack(outward["made"], device))
    back = inward["made"]
    expected = [numbers[0].permute(2, 0, 1), numbers[1], numbers[2][:, ::2]]
    with beside_forwards(device, moment):
        beside = observed(lambda: bool(torch.isnan(given[0]).any()))
    print(
        json.dumps(
            {
                "same": all(
                    torch.equal(a.inner, b) for a, b in zip((back[0], back[1], back[3]), expected, strict=True)
                ),
                "strides": list(back[0].stride()) == list(given[0].permute(2, 0, 1).stride()),
                "once": back[2]["again"] is back[1],
                "on_the_cpu": type(back[2]["here"]) is torch.Tensor,
                "read_on": sorted(set(simulated.kept_for)),
                "outward": outward["seen"],
                "inward": inward["seen"],
                "beside": beside["seen"],
            }
        )
    )


def observed(work: Any) -> dict[str, Any]:
    simulated.crossings.clear()
    simulated.waits.clear()
    made = work()
    seen = {
        "copies": [[each.to, each.num_bytes, bool(each.stream), each.is_blocking] for each in simulated.crossings],
        "waits": [
            [each.reason.split(".")[-2] if "." in each.reason else each.reason, bool(each.stream)]
            for each in simulated.waits
        ],
    }
    return {"made": made, "seen": seen}


if __name__ == "__main__":
    main()
