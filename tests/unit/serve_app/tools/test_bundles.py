"""The bundles of a config are those of the ranks that its `parallel` asks for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.tools.check_config import check_config

BUNDLE = {"CPU": 1}
GPU_BUNDLE = {"CPU": 1, "GPU": 1}


def problems_of(
    tmp_path: Path, parallel: dict[str, Any] | None, bundles: list[Any] | None, device: str = "cpu"
) -> list[str]:
    args = {"model": "owner/model"} | ({"parallel": parallel} if parallel is not None else {})
    denoiser: dict[str, Any] = {"name": "Denoiser"}
    if bundles is not None:
        denoiser["placement_group_bundles"] = bundles
    options = {"ray_actor_options": {"num_gpus": 1}} if device == "cuda" else {}
    others = [{"name": name, **options} for name in ("Encoder", "VAE")]
    config = {
        "http_options": {"host": "127.0.0.1"},
        "applications": [
            {
                "name": "app",
                "import_path": "serve_app.app:build_app",
                "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": device}},
                "args": args,
                "deployments": [denoiser | options, *others],
            }
        ],
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return check_config(file)


@pytest.mark.parametrize(
    ("parallel", "bundles", "device"),
    [
        (None, None, "cpu"),
        ({"ulysses": 2}, [BUNDLE] * 2, "cpu"),
        ({"ulysses": 2, "batch": 2}, [GPU_BUNDLE] * 4, "cuda"),
    ],
)
def test_a_bundle_for_each_rank_is_right(tmp_path: Path, parallel: Any, bundles: Any, device: str) -> None:
    assert problems_of(tmp_path, parallel, bundles, device) == []


@pytest.mark.parametrize(
    ("parallel", "bundles", "device", "problem"),
    [
        ({"ulysses": 2}, None, "cpu", "has 0 bundles, and `parallel` asks for 2 ranks"),
        ({"ulysses": 2}, [BUNDLE] * 3, "cpu", "has 3 bundles, and `parallel` asks for 2 ranks"),
        ({"batch": 2}, [GPU_BUNDLE, BUNDLE], "cuda", "placement_group_bundles[1] has 0 GPU"),
        (None, [BUNDLE] * 2, "cpu", "without `parallel` a replica uses one: leave them out"),
        ({"cfg": 2}, [BUNDLE] * 2, "cpu", "cfg"),
        ({"ulysses": 2, "tensor": 2}, [BUNDLE] * 4, "cpu", "tensor: 2 is not possible with ulysses or ring"),
    ],
)
def test_other_bundles_are_refused_by_name(
    tmp_path: Path, parallel: Any, bundles: Any, device: str, problem: str
) -> None:
    found = problems_of(tmp_path, parallel, bundles, device)
    assert len(found) == 1
    assert problem in found[0]
