"""NVFP4 layers: the real loading and arithmetic on the CPU, FlashInfer's calls on a stand-in with its signatures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from deployments.accelerations.fp4_gemm import FP4_GEMM, default_backend
from deployments.devices import Device
from deployments.modules import AccelerationError
from deployments.weights.quantization.convert_to_nvfp4 import convert_checkpoint, main, quantizable_layers
from deployments.weights.quantization.nvfp4 import NVFP4Linear, quantized_tensors, register
from env_config.variables import EnvConfig
from tests.support.flashinfer_stand_in import StandInFlashInfer, interleave
from tests.support.stage_modules import KernelWatcher, denoiser_stage, env
from tests.support.tiny_models.flux import TRANSFORMER, flux
from tests.support.tiny_models.random_weights import diffusers_model

CUDA = Device("cuda", torch.device("cpu"))  # tensors stay on the CPU; the replica believes it has a GPU
VARIABLE = "DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    """These tests call from_pretrained themselves."""
    register()


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """from_pretrained leaves the process in the model's dtype when it fails."""
    yield
    torch.set_default_dtype(torch.float32)


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NVFP4Linear:
    layer = NVFP4Linear(weight.shape[1], weight.shape[0], bias is not None)
    for name, tensor in quantized_tensors(weight).items():
        getattr(layer, name).data = tensor
    if bias is not None:
        layer.bias.data = bias
    return layer


def relative_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    return ((output.float() - truth.float()).norm() / truth.float().norm()).item()


# --- the numbers ---


def test_nvfp4_stores_two_codes_a_byte_with_the_even_column_in_the_low_nibble() -> None:
    """One row by hand: its largest value is 6 * 448 * weight_scale_2, so that its scale is 448."""
    row = torch.tensor([[6.0, -3.0, 0.5, 0.0, 1.5, 4.0, -2.0, 1.0, 6.0, 6.0, 0.0, 0.0, -6.0, 2.0, 3.0, -0.5]])
    tensors = quantized_tensors(row)
    assert tensors["weight"].tolist() == [[0xD7, 0x01, 0x63, 0x2C, 0x77, 0x00, 0x4F, 0x95]]
    assert tensors["weight_scale"].float().tolist() == [[448.0]]
    assert tensors["weight_scale_2"].item() == pytest.approx(6.0 / (6.0 * 448.0))
    torch.testing.assert_close(layer_of(row).dequantized_weight(), row)


def test_nvfp4_weight_error_is_that_of_the_format() -> None:
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = layer_of(weight)
    assert 0.08 < relative_error(layer.dequantized_weight(), weight) < 0.105
    again = layer_of(layer.dequantized_weight())
    assert torch.equal(again.dequantized_weight(), layer.dequantized_weight())


def test_nvfp4_takes_nine_32nds_of_the_bytes_of_bf16() -> None:
    weight = torch.randn(128, 256)
    stored = sum(tensor.nbytes for tensor in quantized_tensors(weight).values())
    assert stored == weight.numel() * 2 * 9 // 32 + 8


def test_nvfp4_layer_off_cuda_multiplies_with_the_dequantised_weight() -> None:
    weight, bias, inputs = torch.randn(24, 32), torch.randn(24), torch.randn(2, 5, 32)
    layer = layer_of(weight, bias)
    torch.testing.assert_close(layer(inputs), F.linear(inputs, layer.dequantized_weight(), bias))
    assert relative_error(layer(inputs), F.linear(inputs, weight, bias)) < 0.12
    assert layer(inputs.bfloat16()).dtype == torch.bfloat16


def test_nvfp4_layer_keeps_its_codes_when_a_module_is_cast() -> None:
    layer = layer_of(torch.randn(16, 32), torch.randn(16))
    expected = layer.dequantized_weight()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    torch.nn.Sequential(layer).to(torch.float16)
    assert layer.bias.dtype == torch.float16
    for name in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        assert layer.state_dict()[name].dtype == before[name].dtype
    assert torch.equal(layer.dequantized_weight(), expected)


# --- checkpoints ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in bf16 with the transformer in several shards, and its NVFP4 form."""
    root = tmp_path_factory.mktemp("nvfp4")
    pipeline, _ = flux()
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(root / "bf16")
    pipeline.transformer.save_pretrained(root / "bf16" / "transformer", max_shard_size="60KB")
    (root / "bf16" / "transformer" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    main([str(root / "bf16"), str(root / "nvfp4")])
    return root / "bf16", root / "nvfp4"


def test_a_converted_checkpoint_loads_as_any_other(folders: tuple[Path, Path]) -> None:
    bf16, nvfp4 = folders
    assert len(list((nvfp4 / "transformer").glob("*.safetensors"))) > 1
    original = FluxTransformer2DModel.from_pretrained(bf16 / "transformer", dtype=torch.bfloat16)
    pipeline = DiffusionPipeline.from_pretrained(nvfp4, dtype=torch.bfloat16)
    converted = pipeline.transformer
    names = {name for name, module in converted.named_modules() if isinstance(module, NVFP4Linear)}
    assert names == quantizable_layers(dict(original.config))
    assert len(names) > 20
    assert not any(parameter.is_meta for parameter in converted.parameters())
    for name in names:
        weight = original.get_submodule(name).weight
        assert relative_error(converted.get_submodule(name).dequantized_weight(), weight) < 0.12
    rest = {n: p for n, p in original.named_parameters() if n.removesuffix(".weight") not in names}
    for name, parameter in rest.items():
        assert torch.equal(converted.get_parameter(name), parameter)
    with torch.no_grad():
        output, truth = (run(model) for model in (converted, original))
    assert 0.001 < relative_error(output, truth) < 0.25
    sizes = [sum(f.stat().st_size for f in (folder / "transformer").glob("*.safetensors")) for folder in folders]
    assert sizes[1] < sizes[0]


def run(transformer: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return transformer(
        hidden_states=torch.randn(1, 16, 16, generator=generator).bfloat16(),
        encoder_hidden_states=torch.randn(1, 8, 32, generator=generator).bfloat16(),
        pooled_projections=torch.randn(1, 32, generator=generator).bfloat16(),
        timestep=torch.tensor([0.5]).bfloat16(),
        guidance=torch.tensor([3.5]).bfloat16(),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]


def test_a_checkpoint_that_already_has_modelopts_tensors_keeps_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, nvfp4 = folders
    counts = convert_checkpoint(nvfp4, tmp_path / "again")
    for file in (nvfp4 / "transformer").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / "transformer" / file.name).read_bytes()
    assert counts["transformer"] > 20


@pytest.mark.rest
def test_the_converter_is_a_command_that_says_what_it_did(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16, _ = folders
    main([str(bf16), str(tmp_path / "out")])
    layers = quantizable_layers(json.loads((bf16 / "transformer" / "config.json").read_text()))
    assert capsys.readouterr().out.splitlines()[-1] == f"transformer: {len(layers)} linear layers in NVFP4"


def test_a_folder_without_a_transformer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no transformer\*/config\.json"):
        convert_checkpoint(tmp_path, tmp_path / "out")


def test_an_nvfp4_tensor_of_a_wrong_shape_is_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, nvfp4 = folders
    counts = convert_checkpoint(nvfp4, tmp_path / "broken")
    assert counts
    file = next((tmp_path / "broken" / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".weight_scale"))
    save_file(tensors | {name: tensors[name].float()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} must be torch\.float8_e4m3fn of shape .*got torch\.float32"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "broken" / "transformer")


# --- FlashInfer ---


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandInFlashInfer:
    module = StandInFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    return module


@pytest.mark.parametrize(
    ("value", "backend"),
    [("cutlass", "cutlass"), ("flashinfer_cudnn", "cudnn"), ("TRTLLM", "trtllm"), ("auto", "auto"), (None, "trtllm")],
)
def test_flashinfer_fp4_gemm_backend_is_handed_to_mm_fp4(
    value: str | None, backend: str, stand_in: StandInFlashInfer
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(200, 96, generator=generator), torch.randn(200, generator=generator)
    inputs = torch.randn(2, 7, 96, generator=generator).bfloat16()
    layer = layer_of(weight, bias)
    without_fp4_activations = layer(inputs)
    watcher = KernelWatcher()
    config = EnvConfig.from_environ({}) if value is None else env(**{VARIABLE: value})
    assert FP4_GEMM.is_on(config)
    stage = denoiser_stage(device=CUDA, wrap_kernel=watcher, transformer=torch.nn.Sequential(layer))
    line = FP4_GEMM.install(stage, config)
    assert line == f"fp4_gemm: FlashInfer's {backend} multiplies in 1 NVFP4 layers"
    stand_in.calls.clear()
    output = layer(inputs)
    assert stand_in.calls == [backend]
    assert watcher.calls[f"fp4_gemm.transformer.{backend}"] == 2  # the check at the start, and this call
    assert output.shape == (2, 7, 200)
    assert output.dtype == torch.bfloat16
    assert 0.03 < relative_error(output, without_fp4_activations) < 0.15
    assert relative_error(output, F.linear(inputs.float(), weight, bias)) < 0.16


def test_flashinfer_fp4_gemm_backend_defaults_to_auto_where_trtllm_has_no_kernels() -> None:
    assert [default_backend(c) for c in ((10, 0), (10, 3), (12, 0), (12, 1))] == ["trtllm", "trtllm", "auto", "auto"]


def stage_with_a_layer(device: Device) -> Any:
    layer = layer_of(torch.randn(32, 32))
    return denoiser_stage(device=device, transformer=torch.nn.Sequential(layer))


def test_flashinfer_fp4_gemm_backend_is_inert_off_cuda() -> None:
    cpu = Device("cpu", torch.device("cpu"))
    line = FP4_GEMM.install(stage_with_a_layer(cpu), env(**{VARIABLE: "cutlass"}))
    assert line == (
        "fp4_gemm: 1 NVFP4 layers dequantise in torch, SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND is for "
        "cuda and this replica runs on cpu"
    )


def test_flashinfer_fp4_gemm_backend_is_inert_without_nvfp4_layers() -> None:
    transformer = diffusers_model(FluxTransformer2DModel, **TRANSFORMER)
    assert "inert" in FP4_GEMM.install(denoiser_stage(transformer=transformer), env(**{VARIABLE: "cutlass"}))
    assert FP4_GEMM.install(denoiser_stage(transformer=transformer), env()) == ""


def test_flashinfer_fp4_gemm_backend_on_a_gpu_without_fp4_units_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(AccelerationError, match=r"BACKEND=cutlass needs compute capability 10\.0, .* is 9\.0"):
        FP4_GEMM.install(stage_with_a_layer(CUDA), env(**{VARIABLE: "cutlass"}))
    line = FP4_GEMM.install(stage_with_a_layer(CUDA), env())
    assert line == "fp4_gemm: 1 NVFP4 layers dequantise in torch, this GPU's compute capability is 9.0"


def test_flashinfer_fp4_gemm_backend_without_flashinfer_is_refused(
    stand_in: StandInFlashInfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(AccelerationError, match="pip install flashinfer-python"):
        FP4_GEMM.install(stage_with_a_layer(CUDA), env())


def test_flashinfer_that_gives_wrong_numbers_is_refused_at_start(
    stand_in: StandInFlashInfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "block_scale_interleave", lambda scale: interleave(scale ^ 0x10))
    with pytest.raises(AccelerationError, match="gives wrong numbers, off by"):
        FP4_GEMM.install(stage_with_a_layer(CUDA), env(**{VARIABLE: "cutlass"}))


def test_flashinfer_that_does_not_run_is_refused_at_start(
    stand_in: StandInFlashInfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(stand_in, "mm_fp4", fail)
    with pytest.raises(AccelerationError, match="BACKEND=cudnn: FlashInfer does not run here: no kernel image"):
        FP4_GEMM.install(stage_with_a_layer(CUDA), env(**{VARIABLE: "cudnn"}))
