"""Fingerprints are equal where the denoising makes the same numbers, whatever else a node has of the model."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.denoising.fingerprint import model_fingerprint
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stages.denoise import DenoiserStage
from deployments.weights.parts.ip_adapter import IPAdapters
from env_config.variables import EnvConfig
from tests.support.tiny_models import checkpoint, tiny_patches


@pytest.fixture(scope="module")
def folder(checkpoints_root: Path) -> Path:
    tiny_patches()
    return checkpoint("flux", checkpoints_root)


@pytest.fixture(scope="module")
def original(folder: Path) -> str:
    return model_fingerprint(load(folder))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "another name"
    shutil.copytree(folder, copied)
    return copied


def load(folder: Path, dtype: torch.dtype | None = None) -> StagePipeline:
    return load_stage(folder, ("denoiser",), dtype=dtype)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=7))


def scale_weights(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def change_one_number(folder: Path) -> None:
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    largest = max(tensors.values(), key=torch.Tensor.numel)
    largest.view(-1)[largest.numel() // 3] += 0.5
    save_file(tensors, file, {"format": "pt"})


def only_what_a_denoiser_reads(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        if file.parent.name not in ("transformer", "vae"):
            file.unlink()


def with_files_of_another_precision(folder: Path) -> None:
    [file] = (folder / "transformer").glob("*.safetensors")
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "flux.safetensors").write_bytes(b"x" * 10_000)


def in_several_files(folder: Path) -> None:
    [file] = (folder / "transformer").glob("*.safetensors")
    load(folder).components["transformer"].save_pretrained(folder / "transformer", max_shard_size="100KB")
    file.unlink(missing_ok=True)


SAME: dict[str, Callable[[Path], None]] = {
    "the same files elsewhere": lambda folder: None,
    "without the weights of the other stages": only_what_a_denoiser_reads,
    "with other files of the same hub model": with_files_of_another_precision,
    "with other weights of an encoder": lambda folder: scale_weights(folder / "text_encoder"),
    "with another configuration of an encoder": lambda f: edit(f / "text_encoder" / "config.json", note="x"),
    "with a configuration written by another version": lambda f: edit(
        f / "transformer" / "config.json", _diffusers_version="0.1", _name_or_path="elsewhere"
    ),
    "in several files": in_several_files,
}
DIFFERENT: dict[str, Callable[[Path], None]] = {
    "other weights": lambda folder: scale_weights(folder / "transformer"),
    "one other number": lambda folder: change_one_number(folder / "transformer"),
    "another scheduler configuration": lambda f: edit(f / "scheduler" / "scheduler_config.json", shift=2.5),
}


@pytest.mark.parametrize("change", SAME)
def test_what_the_loop_does_not_compute_with_does_not_matter(change: str, copy: Path, original: str) -> None:
    SAME[change](copy)
    assert model_fingerprint(load(copy)) == original


@pytest.mark.parametrize("change", DIFFERENT)
def test_what_changes_the_numbers_matters(change: str, copy: Path, original: str) -> None:
    DIFFERENT[change](copy)
    assert model_fingerprint(load(copy)) != original


def test_the_scales_of_adapters_matter(folder: Path) -> None:
    stage = load(folder)
    adapters = [IPAdapters(("a.safetensors",), scale, False, None) for scale in ((0.5,), (1.0,), None)]
    layouts = [dataclasses.replace(stage.layout, ip_adapters=each) for each in adapters]
    assert len({model_fingerprint(dataclasses.replace(stage, layout=layout)) for layout in layouts}) == 3


def test_device_and_precision_matter(folder: Path, original: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_fingerprint(load(folder, torch.bfloat16)) != original
    assert model_fingerprint(dataclasses.replace(load(folder), device=torch.device("cuda"))) != original
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert model_fingerprint(load(folder)) != original


def test_the_model_of_the_device_and_its_capability_matter(
    folder: Path, original: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9000")
    assert model_fingerprint(load(folder)) != original
    told = {"name": "NVIDIA H100 80GB HBM3", "capability": (9, 0)}
    gpu = SimpleNamespace(
        is_available=lambda: True,
        get_device_name=lambda device: told["name"],
        get_device_capability=lambda device: told["capability"],
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    on_gpu = dataclasses.replace(load(folder), device=torch.device("cuda"))
    prints = [model_fingerprint(on_gpu)]
    for change in ({"name": "NVIDIA L40S"}, {"capability": (8, 9)}):
        told |= change
        prints.append(model_fingerprint(on_gpu))
    assert len(set(prints)) == 3


class Quantised(torch.nn.Parameter):
    """As a weight of bitsandbytes: the same bytes, read by its settings."""

    def __new__(cls, data: torch.Tensor, quant_type: str) -> "Quantised":
        made: Quantised = torch.Tensor._make_subclass(cls, data)
        made.quant_type = quant_type
        return made


def quantise(module: torch.nn.Module, quant_type: str) -> None:
    module.weight = Quantised(module.weight.detach(), quant_type)  # type: ignore[arg-type]


COMPUTED_OTHERWISE: dict[str, Callable[[Any], Any]] = {
    "quantised": lambda transformer: quantise(transformer.x_embedder, "nf4"),
    "quantised in another way": lambda transformer: quantise(transformer.x_embedder, "fp4"),
    "compiled": lambda transformer: setattr(transformer.x_embedder, "_compiled_call_impl", print),
    "cast by layers": lambda transformer: transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16),
    "cast by layers to another": lambda transformer: transformer.enable_layerwise_casting(
        torch.float8_e4m3fn, torch.float16
    ),
}


def test_how_the_weights_are_computed_with_matters(folder: Path, original: str) -> None:
    prints = {original}
    for change in COMPUTED_OTHERWISE.values():
        stage = load(folder)
        change(stage.components["transformer"])
        prints.add(model_fingerprint(stage))
    assert len(prints) == 1 + len(COMPUTED_OTHERWISE)


VARIABLES: dict[str, tuple[dict[str, str], bool]] = {
    "attention": ({"SGLANG_DIFFUSION_ATTENTION_BACKEND": "torch_sdpa"}, False),
    "caching": ({"SGLANG_CACHE_DIT_ENABLED": "true"}, False),
    "log": ({"SGLANG_DIFFUSION_LOGGING_LEVEL": "DEBUG"}, True),
    "kernel log": ({"SGLANG_KERNEL_API_LOGLEVEL": "1"}, True),
    "stage logging": ({"SGLANG_DIFFUSION_STAGE_LOGGING": "true"}, True),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_variables_that_change_the_numbers_matter_and_no_others(variable: str, folder: Path) -> None:
    variables, is_same = VARIABLES[variable]
    stage = load(folder)
    prints = []
    for each in ({}, variables):
        denoiser = DenoiserStage(stage, env=EnvConfig.from_environ(each))
        denoiser.engine.close()
        prints.append(denoiser.fingerprint)
    assert (prints[0] == prints[1]) is is_same
