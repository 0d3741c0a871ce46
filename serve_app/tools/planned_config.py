"""The Serve config of a plan, as YAML with the plan as its comment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from deployments.plan.choose import Plan
from deployments.plan.measured import Measured
from serve_app.app import PLACEMENTS, AppArgs

SCALING = {"upscale_delay_s": 0, "downscale_delay_s": 0}  # the policy waits by itself
COOLDOWN_S = 600  # loading the weights again costs more than ten idle minutes


def serve_config(
    args: AppArgs, measured: Measured, plan: Plan, lines: Sequence[str], host: str = "127.0.0.1", port: int = 8000
) -> str:
    """`args` are those that were asked for; the plan's come on top. `lines` become the comment at its head."""
    application = {
        "args": planned_args(args, measured, plan),
        **autoscaling(plan),
        "deployments": [deployment(name, share, plan) for name, share in plan.num_gpus.items()],
    }
    return written(application, "cuda", lines, host, port)


def cpu_config(args: AppArgs, lines: Sequence[str], host: str = "127.0.0.1", port: int = 8000) -> str:
    """Without a plan: on a CPU the memory is the machine's, and each stage computes where it finds a core."""
    own = args.model_dump(mode="json", exclude_unset=True)
    shares = [
        {"name": name, "ray_actor_options": {"num_cpus": 0.5}} for name in dict.fromkeys(PLACEMENTS[args.placement])
    ]
    return written({"args": own, "deployments": shares}, "cpu", lines, host, port)


def written(application: Mapping[str, Any], device: str, lines: Sequence[str], host: str, port: int) -> str:
    """As YAML, below the lines as its comment."""
    config = {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": "triptych",
                "route_prefix": "/",
                "import_path": "serve_app.app:build_app",
                "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": device}},
                **application,
            }
        ],
    }
    comment = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return comment + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)


def planned_args(args: AppArgs, measured: Measured, plan: Plan) -> dict[str, Any]:
    own: dict[str, Any] = args.model_dump(mode="json", exclude_unset=True)
    known = {"width": measured.width, "height": measured.height, "num_frames": measured.num_frames}
    sizes = {name: value for name, value in known.items() if name in measured.request}
    limits = {**own.get("limits", {}), "max_pixels": measured.width * measured.height}
    limits |= {"max_frames": measured.num_frames} if measured.num_frames > 1 else {}
    given = {"default_arguments": sizes} if sizes else {}
    return merged(own, {**plan.args, **given, "limits": limits})


def merged(own: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within are merged too."""
    result = dict(own)
    for name, value in over.items():
        before = result.get(name)
        result[name] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return result


def autoscaling(plan: Plan) -> dict[str, Any]:
    if plan.num_cards == 1:
        return {}
    policy = {"policy_function": "serve_app.autoscaling:ReplicaRatio", "policy_kwargs": {"cooldown_s": COOLDOWN_S}}
    return {"autoscaling_policy": policy}


def deployment(name: str, share: float, plan: Plan) -> dict[str, Any]:
    written: dict[str, Any] = {"name": name, "ray_actor_options": {"num_gpus": share}}
    if plan.num_cards > 1:
        [stages] = [demand.stages for demand in plan.demands if demand.name == name]
        taken = 1 if plan.choice is not None and plan.choice.apart else 0  # a card that others share
        num_ranks = plan.choice.num_ranks if plan.choice is not None else 1
        most = (plan.num_cards - taken) // num_ranks if "denoiser" in stages else 1
        if num_ranks > 1 and "denoiser" in stages:
            written["placement_group_bundles"] = [{"CPU": 1, "GPU": share} for _ in range(num_ranks)]
            written["placement_group_strategy"] = "STRICT_PACK"
        written["autoscaling_config"] = {"min_replicas": 1, "max_replicas": most, **SCALING}
    return written
