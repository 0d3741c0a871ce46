"""What check_config says of LoRAs and of places for them, and what an application makes of both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.app import AppArgs, located_place, model_args
from serve_app.service import ServiceArgs
from serve_app.tools.check_config import check_config


def problems_of(tmp_path: Path, **args: Any) -> list[str]:
    application = {"name": "a", "import_path": "serve_app.app:build_app", "args": {"model": "owner/flux", **args}}
    application["runtime_env"] = {"env_vars": {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    return [problem.removeprefix(f"{file}: applications[a].args") for problem in check_config(file)]


def test_loras_and_places_that_are_there_or_elsewhere_have_no_problem(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    adapters = {
        "a": str(tmp_path / "a.safetensors"),
        "folder": {"path": str(tmp_path), "weight_name": "a.safetensors", "preload": True},
        "hub": {"path": "owner/lora", "scale": {"transformer": 0.5}},
        "s3": "s3://bucket/lora.safetensors",
        "of-another-machine": "/no/such/machine/a.safetensors",
    }
    assert problems_of(tmp_path, adapters=adapters, adapter_places=[str(tmp_path), "owner", "s3://bucket"]) == []


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"adapters": {"a": "{here}/none.safetensors"}}, ".adapters.a.path: there is no file or folder"),
        ({"adapters": {"a": "no/such/file.safetensors"}}, ".adapters.a.path: there is no file or folder"),
        ({"adapters": {"a": "./none"}}, ".adapters.a.path: there is no file or folder"),
        ({"adapters": {"a": {"path": "o/r", "scal": 1}}}, ".adapters.a.scal: unknown key; did you mean 'scale'?"),
        ({"adapters": {"a": {"path": "o/r", "weight_name": "../a.safetensors"}}}, ".adapters.a.weight_name: "),
        ({"adapters": {"a:b": "o/r"}}, ".adapters.a:b"),
        ({"adapters": {"ѕketch": "o/r"}}, ".adapters.ѕketch"),
        ({"adapters": {"x" * 65: "o/r"}}, ".adapters.xxx"),
        ({"adapters": {"alias": "o/r"}, "model_aliases": ["alias"]}, ": adapters: 'alias' is taken"),
        ({"adapters": {"a": "o/r"}, "model_name": "flux", "model_aliases": ["flux:a"]}, ": adapters: 'a' is taken"),
        ({"adapters": {"a": {"path": "o/r", "scale": 11}}}, ": adapters: the scale of 'a' must be between -10 and 10"),
        ({"adapters": {"a": {"path": "o/r", "scale": float("nan")}}}, ": adapters: the scale of 'a' must be between"),
        ({"adapter_places": ["/"]}, ".adapter_places.0: '/' is too wide"),
        ({"adapter_places": ["{here}", "/etc"]}, ".adapter_places.1: '/etc' is too wide"),
        ({"adapter_places": ["{here}/none"]}, ".adapter_places: there is no file or folder"),
        ({"adapter_places": ["./no/such/folder"]}, ".adapter_places: there is no file or folder"),
        ({"adapter_keys": ["ops"]}, ": adapter_keys is of no effect"),
        (
            {"default_arguments": {"joint_attention_kwargs": {"scale": 0.5}}},
            ": default_arguments.joint_attention_kwargs.scale: give each LoRA its own",
        ),
    ],
)
def test_a_mistake_is_told_by_its_place(tmp_path: Path, args: dict[str, Any], problem: str) -> None:
    here = yaml.safe_load(yaml.safe_dump(args).replace("{here}", str(tmp_path)))
    [found] = problems_of(tmp_path, **here)
    assert problem in found


def test_the_ingress_and_the_stages_are_told_the_same_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    args = AppArgs(
        model="m", adapters={"a": "loras/a.safetensors", "b": "loras", "c": "owner/lora"}, adapter_places=("./loras",)
    )
    paths = {name: each.path for name, each in model_args(args).adapters.items()}
    loras = os.path.join(os.path.realpath(tmp_path), "loras")
    assert paths == {"a": f"{loras}/a.safetensors", "b": loras, "c": "owner/lora"}
    assert [located_place(each) for each in (*args.adapter_places, "owner")] == [loras, "owner"]


def test_a_weight_name_or_scale_of_the_wrong_kind_is_refused() -> None:
    for wrong in ({"scale": "high"}, {"scale": {"transformer": "high"}}, {"weight_name": "a.bin"}, {"path": ""}):
        with pytest.raises(ValidationError, match="adapters"):
            ServiceArgs.model_validate({"adapters": {"a": {"path": "o/r"} | wrong}})
