"""load_component equals from_pretrained bit for bit, or names what is wrong."""

import os

os.environ["MKL_CBWR"] = "AUTO,STRICT"  # bits do not depend on where a tensor lies in memory
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from deployments.errors import CheckpointError
from deployments.stage_pipeline.roles import component_class
from deployments.weights import load, stream
from deployments.weights.converted import converted_component
from deployments.weights.files import TRANSFORMERS_FILES, weight_files
from deployments.weights.load import load_component, read_tensors, stored_dtype
from tests.support.further import all_but, further
from tests.support.tiny_models import (
    autoencoders,
    bria_fibo,
    cogview,
    easyanimate,
    flux2,
    hidream,
    hunyuan,
    ltx,
    prx,
    qwen_image,
    text_encoders,
    wan,
)
from tests.support.tiny_models.flux import flux


@dataclass(frozen=True)
class Case:
    build: Callable[[], torch.nn.Module]
    forward: Callable[[Any], torch.Tensor]


def ids(vocabulary: int = 200) -> torch.Tensor:
    return torch.randint(5, vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))


def noise(*shape: int, like: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)


def run_text_encoder(model: Any) -> torch.Tensor:
    return model(ids(), output_hidden_states=True).hidden_states[-1]


def run_image_autoencoder(model: Any) -> torch.Tensor:
    return model.decode(model.encode(noise(1, 3, 16, 16, like=model)).latent_dist.mean).sample


def run_video_autoencoder(model: Any) -> torch.Tensor:
    return model.decode(model.encode(noise(1, 3, 5, 32, 32, like=model)).latent_dist.mean).sample


def run_flux(model: Any) -> torch.Tensor:
    return model(
        hidden_states=noise(1, 16, model.config.in_channels, like=model),
        encoder_hidden_states=noise(1, 8, model.config.joint_attention_dim, like=model),
        pooled_projections=noise(1, model.config.pooled_projection_dim, like=model),
        timestep=torch.tensor([0.5], dtype=model.dtype),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
    ).sample


def run_wan(model: Any) -> torch.Tensor:
    return model(
        hidden_states=noise(1, model.config.in_channels, 2, 4, 4, like=model),
        timestep=torch.tensor([500]),
        encoder_hidden_states=noise(1, 8, model.config.text_dim, like=model),
    ).sample


def component(pipeline: Callable[[], Any], name: str) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(pipeline()[0], name)


CASES = {
    "clip": Case(component(flux, "text_encoder"), run_text_encoder),
    "t5": Case(component(flux, "text_encoder_2"), run_text_encoder),
    "umt5": Case(component(wan.wan21, "text_encoder"), run_text_encoder),
    "qwen2.5-vl": Case(component(qwen_image.qwenimage, "text_encoder"), run_text_encoder),
    "flux transformer": Case(component(flux, "transformer"), run_flux),
    "wan transformer": Case(component(wan.wan21, "transformer"), run_wan),
    "autoencoder kl": Case(autoencoders.kl_autoencoder, run_image_autoencoder),
    "autoencoder with batch norm": Case(component(flux2.klein, "vae"), run_image_autoencoder),
    "video autoencoder with statistics": Case(component(ltx.ltx, "vae"), run_video_autoencoder),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[type, Path]]:
    """Saves a case's model once in a form; answers its class and folder."""
    root, made = tmp_path_factory.mktemp("components"), {}

    def save(name: str, **options: Any) -> tuple[type, Path]:
        key = (name, *options.values())
        if key not in made:
            folder = root / "-".join(str(part) for part in key)
            model = CASES[name].build()
            model.save_pretrained(folder, **options)
            made[key] = (type(model), folder)
        return made[key]

    return save


def from_pretrained(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    return cls.from_pretrained(str(folder), torch_dtype=dtype)


def assert_same_model(ours: Any, theirs: Any, forward: Callable[[Any], torch.Tensor] | None) -> None:
    assert_same_tensors(ours, theirs)
    assert dict(ours.config.to_dict() if hasattr(ours.config, "to_dict") else ours.config) == dict(
        theirs.config.to_dict() if hasattr(theirs.config, "to_dict") else theirs.config
    )
    assert generation(ours) == generation(theirs)
    if forward is not None:
        with torch.no_grad():
            assert torch.equal(forward(ours), forward(theirs))


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):  # buffers that no file holds included
        mine, other = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (ours, theirs))
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].device == tensor.device, name
            assert mine[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(mine[name].nan_to_num(), tensor.nan_to_num()), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert shared_weights(ours) == shared_weights(theirs)
    assert ours.training == theirs.training


def generation(model: Any) -> dict[str, Any] | None:
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_dict()


def shared_weights(model: torch.nn.Module) -> set[frozenset[str]]:
    """The groups of names that are one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "mapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_component_is_the_one_from_pretrained_returns(saved, name, dtype, use_streamer):
    cls, folder = saved(name)
    ours = load_component(cls, folder, dtype, "cpu", use_streamer)
    assert_same_model(ours, from_pretrained(cls, folder, dtype), CASES[name].forward)


@dataclass(frozen=True)
class Encoder:
    """A transformers class of the pipelines of diffusers, as a published checkpoint holds it."""

    build: Callable[[], Any]  # a model, or a pipeline that has one
    component: str | None = "text_encoder"
    after_save: Callable[[Path, Any], None] | None = None


ENCODERS = {
    "CLIPTextModelWithProjection": Encoder(text_encoders.clip_text_encoder_with_projection, None),
    "CLIPVisionModel": Encoder(text_encoders.clip_image_encoder, None),
    "CLIPVisionModelWithProjection": Encoder(lambda: text_encoders.clip_image_encoder_with_projection(32, 16), None),
    "Gemma2Model": Encoder(text_encoders.gemma2_encoder, None),
    "Gemma3ForConditionalGeneration": Encoder(ltx._gemma3, None),
    "GlmModel": Encoder(cogview.cogview4),
    "LlamaForCausalLM": Encoder(hidream.hidream, "text_encoder_4"),
    "LlamaModel": Encoder(text_encoders.llama_encoder, None),
    "LlavaForConditionalGeneration": Encoder(hunyuan.hunyuanvideo_i2v),
    "Mistral3ForConditionalGeneration": Encoder(flux2.flux2_dev),
    "Qwen2VLForConditionalGeneration": Encoder(easyanimate.easyanimate),
    "Qwen2_5_VLTextModel": Encoder(text_encoders.qwen2_5_text_encoder, None),
    "Qwen3ForCausalLM": Encoder(text_encoders.qwen3_language_model, None),
    "Qwen3Model": Encoder(text_encoders.qwen3_encoder, None),
    "SiglipVisionModel": Encoder(text_encoders.siglip_image_encoder, None),
    "SmolLM3ForCausalLM": Encoder(bria_fibo.bria_fibo),
    "T5GemmaEncoder": Encoder(prx.prx, after_save=prx.save_whole_t5gemma_config),
}


# Of words, of pictures, of a language model, of words and pictures.
ENCODERS_SHOWN = (
    "CLIPTextModelWithProjection",
    "SiglipVisionModel",
    "Qwen3ForCausalLM",
    "Gemma3ForConditionalGeneration",
)


@pytest.mark.filterwarnings("ignore:`LoraLoaderMixin`:FutureWarning")  # by the PRX pipeline of diffusers
@pytest.mark.parametrize("name", all_but(ENCODERS_SHOWN, ENCODERS))
def test_every_text_and_image_encoder_is_streamed_as_it_is_read_from_files(name, tmp_path):
    case = ENCODERS[name]
    built = case.build()
    model = getattr(built[0], case.component) if case.component else built
    folder = tmp_path / (case.component or "")
    model.save_pretrained(folder)
    if case.after_save:
        case.after_save(tmp_path, built[0])
    cls = component_class("transformers", name)
    for dtype in (torch.bfloat16, None):
        streamed = load_component(cls, folder, dtype, "cpu", use_streamer=True)
        assert_same_model(streamed, from_pretrained(cls, folder, dtype), None)


@pytest.mark.parametrize("name", ["t5", further("qwen2.5-vl"), further("flux transformer")])
def test_a_component_in_shards_is_streamed_whole(saved, name):
    cls, folder = saved(name, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = load_component(cls, folder, torch.bfloat16, "cpu", use_streamer=True)
    assert_same_model(ours, from_pretrained(cls, folder, torch.bfloat16), CASES[name].forward)


FORMS: dict[str, dict[str, Any]] = {
    "variant": {"variant": "fp16"},
    "variant in shards": {"variant": "bf16", "max_shard_size": "50KB"},
}
PICKLED = {"clip": "pytorch_model.bin", "autoencoder kl": "diffusion_pytorch_model.bin"}


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "mapped"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PICKLED)
def test_files_of_a_variant_alone_are_read(saved, name, form, use_streamer):
    cls, folder = saved(name, **FORMS[form])
    assert all(FORMS[form]["variant"] in path.name for path in folder.iterdir() if path.name != "config.json")
    ours = load_component(cls, folder, torch.float32, "cpu", use_streamer)
    assert_same_tensors(ours, from_pretrained(cls, saved(name)[1], torch.float32))


@pytest.fixture
def pickled(saved, tmp_path: Path) -> Callable[..., tuple[type, Path]]:
    """A component's folder with the file of torch.save alone."""

    def write(name: str, **options: Any) -> tuple[type, Path]:
        cls, folder = saved(name)
        copied = tmp_path / "pickled"
        copied.mkdir()
        shutil.copy(folder / "config.json", copied)
        torch.save(load_file(next(folder.glob("*.safetensors"))), copied / PICKLED[name], **options)
        return cls, copied

    return write


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "mapped"])
@pytest.mark.parametrize("name", PICKLED)
def test_what_torch_save_wrote_is_converted_once_and_read_as_safetensors(
    saved, pickled, tmp_path, name, use_streamer, zipped
):
    cls, folder = pickled(name, _use_new_zipfile_serialization=zipped)
    converted = converted_component(folder, tmp_path)
    ours = load_component(cls, converted, torch.float32, "cpu", use_streamer)
    assert_same_tensors(ours, from_pretrained(cls, saved(name)[1], torch.float32))
    assert stored_dtype(cls, converted) == torch.float32
    made = {path: path.lstat().st_mtime_ns for path in converted.iterdir()}
    assert converted_component(folder, tmp_path) == converted
    assert {path: path.lstat().st_mtime_ns for path in converted.iterdir()} == made
    os.utime(folder / PICKLED[name])
    assert converted_component(folder, tmp_path) != converted, "the file was written again"
    assert converted_component(saved(name)[1], tmp_path) == saved(name)[1], "safetensors are left where they are"


def test_shards_and_variants_of_torch_save_keep_their_names_and_weights_that_share_memory(tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    shards = {"a": "pytorch_model.fp16-00001-of-00002.bin", "b": "pytorch_model.fp16-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    whole = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": whole.T}, folder / shards["a"])
    torch.save({"b": whole, "tied": whole}, folder / shards["b"])
    (folder / "config.json").write_text("{}")
    converted = converted_component(folder, tmp_path / "cache", "fp16")
    assert {path.name for path in converted.iterdir()} == {
        "config.json",
        "model.safetensors.index.fp16.json",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
    }
    found = weight_files(TRANSFORMERS_FILES, converted)
    assert sorted(found.names) == ["a", "b", "tied"]
    assert torch.equal(load_file(found.files[0].location)["a"], whole.T)
    assert torch.equal(load_file(found.files[1].location)["tied"], whole)


class Code:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 100), "is not a whole file of torch.save|is not whole"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(b"no pickle at all"), "is not whole, or it holds more than tensors"),
        (lambda file: torch.save({"a": Code()}, file), "could run code when it is read"),
        (lambda file: torch.save([1], file), "does not hold tensors by name"),
    ],
)
def test_a_file_of_torch_save_that_is_no_weights_is_refused_by_its_name(
    pickled, monkeypatch, tmp_path, damage, sentence
):
    monkeypatch.chdir(tmp_path)
    cls, folder = pickled("clip")
    damage(folder / PICKLED["clip"])
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        converted_component(folder, tmp_path / "cache")
    assert str(folder / PICKLED["clip"]) in str(refusal.value)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    with pytest.raises(CheckpointError, match="was not converted"):
        load_component(cls, folder, torch.float32, "cpu", use_streamer=False)


def test_clip_under_the_names_of_published_checkpoints_is_streamed(saved, tmp_path):
    cls, folder = saved("clip")
    published = shutil.copytree(folder, tmp_path / "clip")
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    ours = load_component(cls, published, torch.float32, "cpu", use_streamer=True)
    assert_same_model(ours, from_pretrained(cls, published, torch.float32), run_text_encoder)
    assert torch.equal(run_text_encoder(ours), run_text_encoder(from_pretrained(cls, folder, torch.float32)))


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def test_an_autoencoder_with_the_old_names_of_attention_is_streamed(saved, tmp_path):
    cls, folder = saved("autoencoder kl")
    old = shutil.copytree(folder, tmp_path / "vae")
    file = old / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if any(new in name for new in OLD_NAMES)]:
        (new,) = (new for new in OLD_NAMES if new in name)
        tensors[name.replace(new, OLD_NAMES[new])] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    ours = load_component(cls, old, torch.float32, "cpu", use_streamer=True)
    assert_same_model(ours, from_pretrained(cls, old, torch.float32), run_image_autoencoder)
    expected = run_image_autoencoder(from_pretrained(cls, folder, torch.float32))
    assert torch.equal(run_image_autoencoder(ours), expected)


def test_the_streamed_t5_shares_its_embedding_and_the_wan_transformer_keeps_its_float32_modules(saved):
    t5 = load_component(*saved("t5"), torch.bfloat16, "cpu", use_streamer=True)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    transformer = load_component(*saved("wan transformer"), torch.bfloat16, "cpu", use_streamer=True)
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("autoencoder with batch norm", "bn.running_mean"),
        ("video autoencoder with statistics", "latents_mean"),
        ("clip", "embeddings.token_embedding.weight"),
    ],
)
def test_single_tensors_are_read_without_the_rest(saved, name, buffer):
    cls, folder = saved(name)
    tensors = read_tensors(cls, folder, {buffer, "no such name"})
    stored = load_file(next(folder.glob("*.safetensors")))[buffer]
    assert tensors.keys() == {buffer}
    assert torch.equal(tensors[buffer], stored)


@pytest.fixture
def broken(saved, tmp_path: Path) -> Path:
    """A copy of the CLIP text encoder's folder, to be damaged."""
    return shutil.copytree(saved("clip")[1], tmp_path / "clip")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def write_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight" * 100)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def name_a_missing_shard(folder: Path) -> None:
    remove_weights(folder)
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put_a_weight_in_two_shards(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    index = {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    remove_weights(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "its header declares"),
        (write_garbage, "is not a safetensors file: its header cannot have"),
        (remove_weights, r"holds none of model\.safetensors"),
        (name_a_missing_shard, "model-00001-of-00001.safetensors"),
        (put_a_weight_in_two_shards, "in more than one of its files"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read"),
    ],
)
@pytest.mark.parametrize("use_streamer", [True, False])
def test_a_damaged_component_is_refused_with_its_folder_and_the_cause(broken, damage, sentence, use_streamer):
    damage(broken)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        load_component(CLIPTextModel, broken, torch.float32, "cpu", use_streamer)
    assert str(broken) in str(refusal.value)


@pytest.mark.parametrize("use_streamer", [True, False])
def test_files_that_lack_a_weight_are_refused_by_its_name(saved, tmp_path, use_streamer):
    cls, folder = saved("autoencoder kl")
    lacking = shutil.copytree(folder, tmp_path / "vae")
    file = lacking / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 weights: decoder\.conv_in\.bias"):
        load_component(cls, lacking, torch.float32, "cpu", use_streamer)


def test_a_weight_of_another_shape_is_refused_by_its_name(saved, tmp_path):
    cls, folder = saved("autoencoder kl")
    other = shutil.copytree(folder, tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"decoder.conv_in.bias": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias has the shape \[3\]"):
        load_component(cls, other, torch.float32, "cpu", use_streamer=True)


def test_a_weight_that_the_model_does_not_know_is_reported(saved, tmp_path, caplog):
    cls, folder = saved("autoencoder kl")
    other = shutil.copytree(folder, tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"stranger": torch.zeros(3)}, file, metadata={"format": "pt"})
    load_component(cls, other, torch.float32, "cpu", use_streamer=True)
    assert "1 weights are not used: stranger" in caplog.text


def test_a_stream_that_loses_a_tensor_is_refused(saved, monkeypatch):
    from runai_model_streamer import SafetensorsStreamer

    whole = SafetensorsStreamer.get_tensors
    monkeypatch.setattr(SafetensorsStreamer, "get_tensors", lambda self: list(whole(self))[:-1])
    with pytest.raises(CheckpointError, match="lost 1 weights"):
        load_component(*saved("clip"), torch.float32, "cpu", use_streamer=True)


def test_without_the_streamers_package_the_refusal_says_how_to_install_it(saved, monkeypatch):
    monkeypatch.setattr(stream.importlib.util, "find_spec", lambda name: None)
    sentence = r"SGLANG_USE_RUNAI_MODEL_STREAMER=true .* pip install 'runai-model-streamer\[s3\]"
    with pytest.raises(CheckpointError, match=sentence):
        load_component(*saved("clip"), torch.float32, "cpu", use_streamer=True)
    load_component(*saved("clip"), torch.float32, "cpu", use_streamer=False)


def test_a_quantised_component_is_left_to_its_quantiser(broken, monkeypatch, caplog):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "new"}}))
    monkeypatch.setattr(load, "stream_tensors", lambda files, keep: pytest.fail("streamed"))
    with caplog.at_level("INFO"):
        load_component(CLIPTextModel, broken, torch.float32, "cpu", use_streamer=True)
    assert "is quantised: its quantiser reads the files, not the Run:ai streamer" in caplog.text


def test_a_model_of_neither_library_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Linear is neither a diffusers nor a transformers model"):
        load_component(torch.nn.Linear, tmp_path, torch.float32, "cpu", use_streamer=True)
