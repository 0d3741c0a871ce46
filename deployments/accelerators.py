"""What a replica must be given of Ray's accelerators: a share of one, or one; Ray itself hides none from an actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VARIABLE = "SGLANG_DIFFUSION_TARGET_DEVICE"
MOST = 1.0  # a replica computes on one device


@dataclass(frozen=True)
class Accelerator:
    """How Ray counts a kind of device, and where Serve's options ask for it."""

    resource: str
    field: str

    def asked(self, ray_actor_options: Mapping[str, Any]) -> Any:
        """What the options of a deployment ask for: a number, where they are as Ray wants them."""
        value: Any = ray_actor_options
        for key in self.field.split(".")[1:]:
            value = value.get(key) if isinstance(value, Mapping) else None
        return 0 if value is None else value


GPU = Accelerator("GPU", "ray_actor_options.num_gpus")
NPU = Accelerator("NPU", "ray_actor_options.resources.NPU")

# By the device's documented name. Ray counts no Metal device that an actor must ask for, and a CPU otherwise.
ACCELERATORS: dict[str, Accelerator] = {"cuda": GPU, "rocm": GPU, "xpu": GPU, "npu": NPU, "musa": GPU}


def assigned_share(target_device: str, assigned: Mapping[str, float]) -> float | None:
    """Of the resources that Ray assigned to this process: the share of a device; None where Ray counts none."""
    accelerator = ACCELERATORS.get(target_device)
    return None if accelerator is None else float(assigned.get(accelerator.resource, 0.0))


def share_problem(target_device: str, share: float) -> str | None:
    """What is wrong with a replica on that device having `share` of it, as a sentence that names the field.

    Without any, the replicas of a node would all compute on its first device: Ray hides devices only from actors that
    have some. Above one, the others would be reserved and left idle.
    """
    accelerator = ACCELERATORS.get(target_device)
    if accelerator is None or 0 < share <= MOST:
        return None
    without = f", and without a {accelerator.resource} another {VARIABLE}, such as cpu" if share <= 0 else ""
    return (
        f"{accelerator.field} is {share:g}: with {VARIABLE}={target_device} a replica computes on one "
        f"{accelerator.resource}, so it must be above 0 and at most 1 (below 1 where replicas share one){without}"
    )


def bundles_problem(
    target_device: str, bundles: Sequence[Mapping[str, Any]], num_ranks: int, setting: str = "parallel"
) -> str | None:
    """What is wrong with the bundles of a replica of so many ranks, as a sentence that names the field. `setting`: what
    asks for the ranks."""
    accelerator = ACCELERATORS.get(target_device)
    needed = {"CPU": 1, **({accelerator.resource: 1} if accelerator else {})}
    if len(bundles) != num_ranks:
        return (
            f"placement_group_bundles has {len(bundles)} bundles, and `{setting}` asks for {num_ranks} ranks: write "
            f"one for each, such as {[needed] * num_ranks}"
        )
    for index, bundle in enumerate(bundles):
        share = bundle.get(accelerator.resource, 0) if accelerator else MOST
        if not isinstance(share, int | float) or not 0 < share <= MOST:
            return (
                f"placement_group_bundles[{index}] has {share} {accelerator.resource if accelerator else ''}: with "
                f"{VARIABLE}={target_device} a rank computes on one, so it must be above 0 and at most 1"
            )
    return None
