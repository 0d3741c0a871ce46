"""The bundles of a config are those of the ranks that its `parallel` and `vae.parallel` ask for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.tools.check_config import check_config

BUNDLE = {"CPU": 1}
GPU_BUNDLE = {"CPU": 1, "GPU": 1}


def problems_of(
    tmp_path: Path, args: dict[str, Any], bundles: dict[str, list[Any] | None], device: str = "cpu"
) -> list[str]:
    """`bundles`: of deployments, by their names."""
    options = {"ray_actor_options": {"num_gpus": 1}} if device == "cuda" else {}
    names = ["Pipeline"] if args.get("placement") == "one_stage" else ["Encoder", "Denoiser", "VAE"]
    given = {name: {"placement_group_bundles": each} for name, each in bundles.items() if each is not None}
    config = {
        "http_options": {"host": "127.0.0.1"},
        "applications": [
            {
                "name": "app",
                "import_path": "serve_app.app:build_app",
                "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": device}},
                "args": {"model": "owner/model", **args},
                "deployments": [{"name": name, **options, **given.get(name, {})} for name in names],
            }
        ],
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return check_config(file)


def parallel(**ways: int) -> dict[str, Any]:
    return {"parallel": ways}


def tiles(ranks: int) -> dict[str, Any]:
    return {"vae": {"tiling": True, "parallel": ranks}}


@pytest.mark.parametrize(
    ("args", "bundles", "device"),
    [
        ({}, {}, "cpu"),
        (parallel(ulysses=2), {"Denoiser": [BUNDLE] * 2}, "cpu"),
        (parallel(ulysses=2, batch=2), {"Denoiser": [GPU_BUNDLE] * 4}, "cuda"),
        (tiles(2), {"VAE": [GPU_BUNDLE] * 2}, "cuda"),
        (tiles(2) | parallel(batch=3), {"VAE": [BUNDLE] * 2, "Denoiser": [BUNDLE] * 3}, "cpu"),
        (tiles(2) | {"placement": "one_stage"}, {"Pipeline": [BUNDLE] * 2}, "cpu"),
    ],
)
def test_a_bundle_for_each_rank_is_right(tmp_path: Path, args: Any, bundles: Any, device: str) -> None:
    assert problems_of(tmp_path, args, bundles, device) == []


@pytest.mark.parametrize(
    ("args", "bundles", "device", "problem"),
    [
        (parallel(ulysses=2), {}, "cpu", "has 0 bundles, and `parallel` asks for 2 ranks"),
        (parallel(ulysses=2), {"Denoiser": [BUNDLE] * 3}, "cpu", "has 3 bundles, and `parallel` asks for 2 ranks"),
        (parallel(batch=2), {"Denoiser": [GPU_BUNDLE, BUNDLE]}, "cuda", "placement_group_bundles[1] has 0 GPU"),
        ({}, {"Denoiser": [BUNDLE] * 2}, "cpu", "without `parallel` a replica uses one: leave them out"),
        (parallel(cfg=2), {"Denoiser": [BUNDLE] * 2}, "cpu", "cfg"),
        (
            parallel(ulysses=2, tensor=2),
            {"Denoiser": [BUNDLE] * 4},
            "cpu",
            "tensor: 2 is not possible with ulysses or ring",
        ),
        (tiles(2), {}, "cpu", "deployments[VAE].placement_group_bundles has 0 bundles, and `vae.parallel` asks for 2"),
        ({}, {"VAE": [BUNDLE] * 2}, "cpu", "without `vae.parallel` a replica uses one"),
        ({}, {"Encoder": [BUNDLE] * 2}, "cpu", "only encodes uses one: leave them out: text encoders are not split"),
    ],
)
def test_other_bundles_are_refused_by_name(tmp_path: Path, args: Any, bundles: Any, device: str, problem: str) -> None:
    found = problems_of(tmp_path, args, bundles, device)
    assert len(found) == 1
    assert problem in found[0]
