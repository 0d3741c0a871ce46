"""Each scheme of `precision` leaves what diffusers' and transformers' own quantisers leave, or is refused by name."""

import os

os.environ["MKL_CBWR"] = "AUTO,STRICT"  # bits do not depend on where a tensor lies in memory
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import T5EncoderModel

from deployments.denoising.fingerprint import model_fingerprint
from deployments.errors import CheckpointError
from deployments.model import Scheme as SchemeName
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.tensors.parts import plain_parts
from deployments.weights.load import load_component
from deployments.weights.precision import chosen, table
from deployments.weights.precision.chosen import Precision, find_gguf
from deployments.weights.precision.table import GGUF, PLAIN, SCHEMES, scheme_named
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import tiny_patches

CPU = torch.device("cpu")
LOADERS = pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "mapped"])


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def folder(flux_checkpoint: Path) -> Path:
    tiny_patches()
    return flux_checkpoint


def load(folder: Path, scheme: str, use_streamer: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
    precision = Precision(scheme_named(scheme))
    return load_component(FluxTransformer2DModel, folder / "transformer", dtype, CPU, use_streamer, None, precision)


def parts_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {f"{name}{place}": part for name, tensor in tensors for place, part in plain_parts(tensor)}


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    found, expected = parts_of(ours), parts_of(theirs)
    assert found.keys() == expected.keys()
    for name, part in found.items():
        assert part.dtype == expected[name].dtype, name
        assert torch.equal(part.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_every_word_that_the_arguments_take_is_a_row() -> None:
    assert {*PLAIN, *(scheme.name for scheme in SCHEMES)} == set(get_args(SchemeName))


@LOADERS
def test_layerwise_casting_is_what_diffusers_makes_of_the_loaded_model(folder, use_streamer) -> None:
    theirs = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    theirs.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    ours = load(folder, "layerwise", use_streamer)
    assert_same(ours, theirs)
    assert ours.dtype == torch.bfloat16
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in ours.parameters()}


@needs("torchao")
@LOADERS
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_torchao_is_what_diffusers_makes_with_its_own_quantiser(folder, scheme, use_streamer) -> None:
    from deployments.weights.precision.torchao_weights import for_diffusers

    config = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[scheme]
    theirs = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.bfloat16, quantization_config=for_diffusers(config, CPU)
    )
    assert_same(load(folder, scheme, use_streamer), theirs)


@needs("torchao")
@LOADERS
def test_a_text_encoder_is_what_transformers_makes_with_its_own_quantiser(folder, use_streamer) -> None:
    from deployments.weights.precision.torchao_weights import for_transformers

    encoder = folder / "text_encoder_2"
    config = for_transformers("Int8WeightOnlyConfig", CPU)
    theirs = T5EncoderModel.from_pretrained(encoder, dtype=torch.bfloat16, quantization_config=config)
    precision = Precision(scheme_named("int8"))
    ours = load_component(T5EncoderModel, encoder, torch.bfloat16, CPU, use_streamer, None, precision)
    assert_same(ours, theirs)
    assert any(name.endswith(".qdata") for name in parts_of(ours))


@needs("bitsandbytes")
def test_nf4_is_what_bitsandbytes_makes_of_each_linear_layer(folder, monkeypatch) -> None:
    """On the CPU, which bitsandbytes has and diffusers' check refuses."""
    import bitsandbytes
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    ours, plain = load(folder, "nf4"), FluxTransformer2DModel.from_pretrained(folder / "transformer")
    layers = [name for name, module in ours.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers == [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    weight = ours.get_submodule(layers[0]).weight
    numbers = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    original = plain.get_submodule(layers[0]).weight
    assert 0 < (numbers - original).norm() / original.norm() < 0.2
    assert any("quant_state" in name for name in parts_of(ours)), "a fingerprint has the scales too"


@needs("gguf")
@pytest.mark.parametrize(("kind", "others"), [("Q8_0", "F32"), ("Q4_0", "BF16")])
def test_a_gguf_file_is_read_in_place_of_the_components_own_weights(folder, tmp_path, kind, others) -> None:
    file = write_gguf(folder / "transformer", tmp_path / "flux.gguf", kind, others)
    copied = shutil.copytree(folder / "transformer", tmp_path / "transformer")
    for weights in copied.glob("*.safetensors"):
        weights.unlink()
    precision = Precision(GGUF, str(file))
    ours = load_component(FluxTransformer2DModel, copied, torch.float32, CPU, True, None, precision)
    from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor

    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    quantised = [name for name, module in ours.named_modules() if isinstance(module, GGUFLinear)]
    assert quantised
    for name, parameter in plain.state_dict().items():
        got = ours.get_parameter(name).detach()
        numbers = dequantize_gguf_tensor(got) if name.removesuffix(".weight") in quantised else got
        assert numbers.shape == parameter.shape, name
        assert torch.allclose(numbers.float(), parameter, atol=0.2 * float(parameter.abs().max()) + 1e-6), name
    assert parts_of(ours)


STAGE_SCHEMES = ["layerwise", pytest.param("int8", marks=needs("torchao"))]


@pytest.mark.parametrize("scheme", STAGE_SCHEMES)
def test_a_stage_holds_its_denoiser_so_and_the_others_see_the_dtype_that_it_computes_in(folder, scheme) -> None:
    denoiser = load_stage(folder, ("denoiser",), dtype=torch.bfloat16, precision=scheme)
    encoder = load_stage(folder, ("encoder",), dtype=torch.bfloat16, precision=scheme)
    whole = load_stage(folder, ("denoiser",), dtype=torch.bfloat16)
    assert denoiser.weight_bytes()["transformer"] < 0.8 * whole.weight_bytes()["transformer"]
    assert denoiser.pipeline.transformer.dtype == encoder.pipeline.transformer.dtype == torch.bfloat16
    assert denoiser.precisions == {"transformer": f"{scheme} in bfloat16"}


def test_precisions_matter_to_a_fingerprint(folder) -> None:
    stages: list[StagePipeline] = [
        load_stage(folder, ("denoiser",), dtype=dtype, precision=scheme)
        for scheme, dtype in (
            (None, torch.bfloat16),
            ("layerwise", torch.bfloat16),
            ("layerwise", torch.float16),
            ("bf16", None),
        )
    ]
    prints = [model_fingerprint(stage) for stage in stages]
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3
    again = load_stage(folder, ("denoiser",), dtype=torch.bfloat16, precision={"transformer": "layerwise"})
    assert model_fingerprint(again) == prints[1]


@needs("torchao")
def test_the_same_weights_multiplied_otherwise_have_another_fingerprint(folder) -> None:
    schemes = ("int8", "int8_dynamic")
    assert len({model_fingerprint(load_stage(folder, ("denoiser",), precision=scheme)) for scheme in schemes}) == 2


@needs("torchao")
@pytest.mark.parametrize("scheme", ["int8_dynamic", "fp8_dynamic"])
def test_inputs_are_scaled_row_by_row_whatever_requests_share_a_batch(scheme) -> None:
    from torchao.quantization import PerRow, quantize_

    from deployments.weights.precision.torchao_weights import MULTIPLIES_INTEGERS, config_of

    if scheme == "fp8_dynamic":  # cannot run here
        config = config_of("Float8DynamicActivationFloat8WeightConfig", CPU)
        assert [type(each) for each in config.granularity] == [PerRow, PerRow]
        return
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantize_(layer, config_of(MULTIPLIES_INTEGERS, CPU))
    small, large = torch.randn(1, 8, 64), 1000 * torch.randn(1, 8, 64)
    with torch.no_grad():
        assert torch.equal(layer(torch.cat([small, large]))[:1], layer(small))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a component that is none": (
        {"precision": {"transformr": "layerwise"}},
        r"precision names transformr; the models are text_encoder, .*transformer, vae",
    ),
    "two dtypes for one": (
        {"precision": {"vae": "bf16"}, "component_dtypes": {"vae": torch.float32}},
        r"precision: vae is to be in bf16, and component_dtypes says float32: leave one out",
    ),
    "a dtype that it cannot compute in": (
        {"precision": "fp8_dynamic", "dtype": torch.float32},
        r"precision: transformer in fp8_dynamic computes in bfloat16, not in float32: say `dtype: bfloat16`",
    ),
    "a library that cannot": (
        {"precision": {"text_encoder": "layerwise"}},
        r"precision: text_encoder cannot be in layerwise: CLIPTextModel is a model of transformers",
    ),
    "a gpu that is not there": (
        {"precision": "nf4"},
        r"precision: transformer cannot be in nf4: it needs (a GPU \(cuda, xpu, mps\)|bitsandbytes)",
    ),
    "float8 units that are not there": (
        {"precision": "fp8_dynamic", "dtype": torch.bfloat16},
        r"precision: transformer cannot be in fp8_dynamic: (torchao cannot run it on cpu: .*8\.9|it needs torchao)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_by_component_and_scheme(folder, case) -> None:
    asked, sentence = REFUSALS[case]
    with pytest.raises(CheckpointError, match=sentence):
        load_stage(folder, **asked)


def test_a_missing_package_is_refused_with_the_line_to_type(folder, monkeypatch) -> None:
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    sentence = r"transformer cannot be in int8: it needs torchao, .* pip install 'triptych\[precision\]'"
    with pytest.raises(CheckpointError, match=sentence):
        load_stage(folder, ("denoiser",), precision="int8")


def test_a_component_that_is_quantised_already_is_refused(folder, tmp_path) -> None:
    copied = shutil.copytree(folder, tmp_path / "flux")
    config = copied / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "nvfp4"}}))
    with pytest.raises(CheckpointError, match=r"transformer is quantised already \(nvfp4\): leave out its precision"):
        load_stage(copied, ("denoiser",), precision="layerwise")


def test_the_dtype_is_never_replaced_by_another() -> None:
    dynamic, layerwise = Precision(scheme_named("fp8_dynamic")), Precision(scheme_named("layerwise"))
    assert chosen.compute_dtype("t", layerwise, torch.float16) == torch.float16
    assert chosen.compute_dtype("t", dynamic, None) == torch.bfloat16
    with pytest.raises(CheckpointError, match="not in float32: say `dtype: bfloat16`"):
        chosen.compute_dtype("t", dynamic, torch.float32)


ADDRESSES = {
    "s3://bucket/models/a.gguf": ("s3://bucket/models", ("a.gguf",)),
    "city96/FLUX.1-dev-gguf/flux1-dev-Q4_0.gguf": ("city96/FLUX.1-dev-gguf", ("flux1-dev-Q4_0.gguf",)),
    "owner/repository/deep/er.gguf": ("owner/repository", ("deep/er.gguf",)),
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_gguf_file_is_found_here_in_s3_or_on_the_hub(address, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "deployments.weights.precision.gguf_files.resolve_files",
        lambda folder, names, cache_root, use_streamer: [asked.append((folder, names)) or tmp_path],
    )
    assert find_gguf(address, tmp_path) == tmp_path
    assert asked == [ADDRESSES[address]]


def test_a_gguf_file_that_is_nowhere_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="neither a file here, nor s3://bucket/key, nor owner/repository/file"):
        find_gguf(str(tmp_path / "no.gguf"), tmp_path)


def test_a_file_alone_is_refused_for_a_pipeline_of_two_denoisers() -> None:
    with pytest.raises(CheckpointError, match="a file is for one model, and this pipeline has a and b"):
        chosen.by_component("x.gguf", ("a", "b", "vae"), ("a", "b"))
    assert chosen.by_component("fp8", ("a", "b", "vae"), ("a", "b")) == {"a": "fp8", "b": "fp8"}
