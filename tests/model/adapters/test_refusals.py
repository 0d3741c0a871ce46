"""Files that are no LoRA for the model are refused, each with a sentence that says why, and leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.adapters.args import AdapterCacheArgs
from deployments.adapters.library import AdapterLibrary
from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from tests.support.adapter_files import Tensors, lora_tensors, written
from tests.support.tiny_models import checkpoint

Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def stage(checkpoints_root: Path) -> StagePipeline:
    return load_stage(checkpoint("flux", checkpoints_root), ("denoiser",))


@pytest.fixture(scope="module")
def library(stage: StagePipeline, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    return AdapterLibrary(stage, AdapterCacheArgs(), tmp_path_factory.mktemp("cache"))


def good(stage: StagePipeline) -> Tensors:
    return lora_tensors(stage.components["transformer"], "transformer", ("to_q",))


def refused(library: AdapterLibrary, use: AdapterUse) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        library.fetched(use)
    assert caught.value.param == "loras"
    assert library.held() == ()
    return str(caught.value)


def layer(name: str, inputs: int = 32, outputs: int = 32, rank: int = 2) -> Tensors:
    return {f"{name}.lora_A.weight": torch.ones(rank, inputs), f"{name}.lora_B.weight": torch.ones(outputs, rank)}


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another model's names": (lambda _: layer("transformer.blocks.0.attn1.to_q"), "it was made for another model"),
    "another model's component": (lambda _: layer("unet.mid.to_q"), "no place in FluxPipeline"),
    "one layer too many": (lambda t: t | layer("transformer.transformer_blocks.77.attn.to_q"), "fit no layer of it"),
    "layers of T5": (lambda t: t | layer("text_encoder_2.encoder.block.0.q"), "2 of its tensors have no place"),
    "half a layer": (
        lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"},
        "it lacks 'transformer_blocks.0.attn.to_q.lora_B.weight'",
    ),
    "no LoRA": (lambda _: {"weight": torch.ones(2)}, "does not load it"),
    "DoRA": (lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "it is a DoRA"),
    "DoRA of kohya": (lambda t: t | {"lora_unet_x.dora_scale": torch.ones(32)}, "it is a DoRA"),
    "LoKr": (lambda _: {f"{Q}.lokr_w1": torch.ones(2, 2)}, "it is a LoKr"),
    "LoHa": (lambda _: {f"{Q}.hada_w1_a": torch.ones(2, 2)}, "it is a LoHa"),
    "Control LoRA": (
        lambda t: t | layer("transformer.x_embedder", 32),
        "it changes the shapes of layers of transformer",
    ),
    "norms": (lambda t: t | {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(16)}, "norm layers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(
    kind: str, stage: StagePipeline, library: AdapterLibrary, tmp_path: Path
) -> None:
    change, says = WRONG[kind]
    said = refused(library, written(tmp_path, "wrong", change(good(stage))))
    assert "the adapter 'wrong' cannot be used: " in said
    assert says in said
    use = written(tmp_path, "right", good(stage))
    assert library.fetched(use).components == {"transformer"}  # as before
    library.forget(library.fetched(use).digest)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
    "DoRA": ({"use_dora": True}, "it is a DoRA"),
    "whole modules": ({"modules_to_save": ["x_embedder"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias: 'all'"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_would_change_the_models_own_weights_are_refused(
    kind: str, stage: StagePipeline, library: AdapterLibrary, tmp_path: Path
) -> None:
    more, says = SETTINGS[kind]
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], **more}
    packed = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    save_file(good(stage), tmp_path / "x.safetensors", metadata={"format": "pt", "lora_adapter_metadata": packed})
    assert says in refused(library, AdapterUse("x", str(tmp_path / "x.safetensors")))


def test_a_file_that_is_cut_or_no_safetensors_file_is_refused(
    stage: StagePipeline, library: AdapterLibrary, tmp_path: Path
) -> None:
    use = written(tmp_path, "cut", good(stage))
    whole = Path(use.path).read_bytes()
    for data in (whole[:-7], whole[:50], b"", b"\x80\x04pickle"):
        Path(use.path).write_bytes(data)
        assert "cut short or is none" in refused(library, use)


def test_a_layer_of_another_size_is_refused(stage: StagePipeline, library: AdapterLibrary, tmp_path: Path) -> None:
    said = refused(library, written(tmp_path, "wide", layer(Q, 32, 64)))
    assert "FluxPipeline does not load it: Error(s) in loading state_dict for Linear: size mismatch" in said
    narrow = refused(library, written(tmp_path, "narrow", layer(Q, 32, 16)))
    assert "(16, 2), and the layer is of (32, 32): it was made for another model" in narrow


def test_a_component_that_the_loader_cannot_be_told_is_refused(
    stage: StagePipeline, library: AdapterLibrary, tmp_path: Path
) -> None:
    use = written(tmp_path, "style", good(stage), component="text_encoder")
    assert "cannot be put into text_encoder: its loader puts it into transformer" in refused(library, use)


def test_a_pipeline_whose_class_has_no_loader_takes_none(checkpoints_root: Path, tmp_path: Path) -> None:
    svd = load_stage(checkpoint("svd", checkpoints_root), ("denoiser",))
    library = AdapterLibrary(svd, AdapterCacheArgs(), tmp_path)
    assert not library.takes_adapters
    assert "takes no LoRA" in refused(library, written(tmp_path, "style", layer("unet.x")))
