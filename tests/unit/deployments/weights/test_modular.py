"""The components of a modular pipeline are gathered under their names, wherever each of them lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import CheckpointError
from deployments.weights.locate import resolve_checkpoint, weights_to_fetch


def index(folder: Path, **components: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    entries = {name: ["diffusers", "Model", said] for name, said in components.items()}
    text = json.dumps({"_class_name": "AModularPipeline", "setting": [1, 2], **entries})
    (folder / "modular_model_index.json").write_text(text)
    return folder


def component(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    return folder


def at(address: Path | str | None, subfolder: str = "vae", **more: Any) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": address and str(address), "subfolder": subfolder, **more}


def test_a_folder_with_all_of_its_components_is_used_where_it_is(tmp_path: Path) -> None:
    folder = index(tmp_path / "moved", vae=at("/where/it/was/saved"), controlnet=at(None, "controlnet"))
    component(folder / "vae")
    assert resolve_checkpoint(str(folder), tmp_path / "cache") == folder


def test_components_of_other_folders_are_linked_under_their_names(tmp_path: Path) -> None:
    other = component(tmp_path / "other" / "parts" / "decoder", "a.safetensors").parents[1]
    alone = component(tmp_path / "alone")
    folder = index(tmp_path / "model", vae=at(other, "parts/decoder"), tower=at(alone, ""), own=at("org/x", "mine"))
    component(folder / "mine")
    gathered = resolve_checkpoint(str(folder), tmp_path / "cache")
    assert resolve_checkpoint(str(folder), tmp_path / "cache") == gathered, "the same folder for every process"
    assert gathered.is_relative_to(tmp_path / "cache")
    assert (gathered / "vae").resolve() == other / "parts" / "decoder"
    assert (gathered / "tower").resolve() == alone
    assert (gathered / "own").resolve() == folder / "mine"
    assert json.loads((gathered / "modular_model_index.json").read_text())["_class_name"] == "AModularPipeline"


def test_of_a_component_of_a_variant_only_its_weights_are_there(tmp_path: Path) -> None:
    files = [f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin")]
    folder = index(tmp_path / "model", vae=at(None, variant="fp16"))
    component(folder / "vae", *files)
    gathered = resolve_checkpoint(str(folder), tmp_path / "cache")
    assert {path.name for path in (gathered / "vae").iterdir()} == {"config.json", files[1]}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (at("/nowhere/at/all"), "takes vae from '/nowhere/at/all', which is neither a folder here nor a repository"),
        (at("https://host/a.safetensors"), "from the single file https://host/a.safetensors"),
        (at("/models/a.safetensors"), "from the single file"),
        (at("org/model", "../../etc"), "must be a folder below"),
        (at("org/model", "/etc"), "must be a folder below"),
        (at("org/model", subfolder=3), "says 3 as subfolder of vae"),  # type: ignore[arg-type]
        (at("/", "tmp-that-is-not-there"), "has no folder 'tmp-that-is-not-there' for vae"),
    ],
)
def test_a_component_that_is_nowhere_is_refused(said: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        resolve_checkpoint(str(index(tmp_path / "model", vae=said)), tmp_path / "cache")


def test_the_weights_of_a_repository_that_is_one_component_are_fetched(tmp_path: Path) -> None:
    paths = ["model.safetensors", "other/model.safetensors", "README.md"]
    assert list(weights_to_fetch(paths, tmp_path, ["."], None)) == ["model.safetensors"]
    assert list(weights_to_fetch(paths, tmp_path, None, None)) == ["other/model.safetensors"]
