"""Several models in one process: what is equal of their weights is there once, and every byte is as without sharing."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.devices import select_device
from deployments.errors import CheckpointError, NotSupportedError
from deployments.memory.args import VAEArgs
from deployments.messages import (
    ComponentCall,
    Conditioning,
    DecodeInputs,
    GenerationRequest,
    OutputFormat,
    Packed,
    StageName,
)
from deployments.model import ModelArgs
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stages.build import build_stage, build_stages
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.weights.files import TRANSFORMERS_FILES
from deployments.weights.shared.pool import AskedComponent, ComponentPool, Settings
from deployments.weights.shared.same_files import Stored
from env_config.variables import EnvConfig
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches
from tests.support.whole_replica import MakeReplica, make_replica

__all__ = ["make_replica"]

pytestmark = pytest.mark.filterwarnings("default")  # diffusers' own, of Chroma and SDXL

CPU = select_device("cpu")
OF_THE_ENCODER = ("text_encoder", "text_encoder_2", "vae")  # it encodes pictures too
PNG = OutputFormat("image", "png")
Copy = Callable[..., Path]


@pytest.fixture
def copy(flux_checkpoint: Path, tmp_path: Path) -> Copy:
    """Another folder of a tiny model, with one number of these components changed."""
    tiny_patches()

    def made(name: str, *changed: str, of: Path = flux_checkpoint) -> Path:
        folder = tmp_path / name
        shutil.copytree(of, folder)
        for component in changed:
            [file] = (folder / component).glob("*.safetensors")
            tensors = load_file(file)
            first = min(tensors)
            tensors[first].view(-1)[0] += 1
            save_file(tensors, file, {"format": "pt"})
        return folder

    return made


def build(*folders: Path, stages: tuple[StageName, ...] = ("encoder",), **settings: Any) -> dict[str, StagePipeline]:
    models = [ModelArgs(path=str(each), name=each.name, **settings.get(each.name, {})) for each in folders]
    return build_stages(models, stages, EnvConfig(), CPU)


def alone(folder: Path, stages: tuple[StageName, ...] = ("encoder",), **settings: Any) -> StagePipeline:
    return build_stage(ModelArgs(path=str(folder), name=folder.name, **settings), stages, EnvConfig(), CPU)


def asked(folder: Path, name: str = "flux", **changes: Any) -> GenerationRequest:
    arguments = request_arguments(name) | {"num_inference_steps": 2} | changes
    return GenerationRequest("r", folder.name, arguments, 0, PNG, deterministic=True)


def content(message: Conditioning | DecodeInputs) -> tuple[Any, list[bytes]]:
    packed = message.calls if isinstance(message, Conditioning) else message.content
    return packed.tree, [buffer.tobytes() for buffer in packed.buffers]


def one_module(stages: dict[str, StagePipeline], *places: str) -> bool:
    modules = {id(getattr(stages[model].pipeline, name)) for model, name in (place.split(".") for place in places)}
    return len(modules) == 1


def test_a_fine_tune_of_the_denoiser_has_the_encoders_of_its_base(flux_checkpoint: Path, copy: Copy) -> None:
    tuned = copy("flux.1", "transformer")
    stages = build(flux_checkpoint, tuned)
    assert stages["flux"].borrowed == frozenset()
    assert stages["flux.1"].shared == {name: f"flux.{name}" for name in OF_THE_ENCODER}
    assert stages["flux"].shared == {name: f"flux.1.{name}" for name in OF_THE_ENCODER}
    assert stages["flux.1"].weight_bytes() == stages["flux"].weight_bytes()
    assert not stages["flux.1"].own_components
    for folder, prompt in ((tuned, "a dog"), (flux_checkpoint, "a small cat"), (tuned, "a small cat")):
        request = asked(folder, prompt=prompt)
        assert content(encode(stages[folder.name], request)) == content(encode(alone(folder), request))


def test_a_component_is_found_under_another_name_in_another_pipeline(
    flux_checkpoint: Path, checkpoints_root: Path
) -> None:
    chroma = checkpoint("chroma", checkpoints_root)
    stages = build(flux_checkpoint, chroma)
    assert stages["chroma"].shared["text_encoder"] == "flux.text_encoder_2"
    assert one_module(stages, "chroma.text_encoder", "flux.text_encoder_2")
    for folder in (chroma, flux_checkpoint):
        request = asked(folder, folder.name)
        assert content(encode(stages[folder.name], request)) == content(encode(alone(folder), request))


def test_a_picture_through_shared_stages_has_the_same_bytes(flux_checkpoint: Path, copy: Copy) -> None:
    tuned = copy("tuned", "transformer")
    shared = build(flux_checkpoint, tuned, stages=("encoder", "vae"))
    assert one_module(shared, "tuned.vae", "flux.vae")
    pictures = {}
    for folder in (flux_checkpoint, tuned):
        denoiser = DenoiserStage(load_stage(folder, ("denoiser",)))
        request, made = asked(folder), []
        for both in (shared[folder.name], alone(folder, ("encoder", "vae"))):
            inputs, _ = denoiser.denoise(request, encode(both, request))
            made.append(pixels(both, request, inputs))
        denoiser.engine.close()
        assert made[0] == made[1]
        pictures[folder.name] = made[0]
    assert pictures["flux"] != pictures["tuned"]


@pytest.mark.rest
def test_what_a_pipeline_casts_for_a_call_is_not_seen_by_the_other_model(checkpoints_root: Path, copy: Copy) -> None:
    base = checkpoint("sdxl", checkpoints_root)
    tuned, half = copy("tuned", "unet", of=base), {"dtype": "float16"}
    stages = build(base, tuned, stages=("vae",), sdxl=half, tuned=half)
    assert one_module(stages, "sdxl.vae", "tuned.vae")
    whole = alone(base, ("encoder", "denoiser"), **half)
    denoiser = DenoiserStage(whole)
    inputs, _ = denoiser.denoise(asked(base, "sdxl"), encode(whole, asked(base, "sdxl")))
    denoiser.engine.close()
    truth = pixels(alone(base, ("vae",), **half), asked(base, "sdxl"), inputs)
    for folder in (base, tuned, tuned, base):  # its pipeline casts the VAE to float32
        assert pixels(stages[folder.name], asked(folder, "sdxl"), inputs) == truth
        assert next(stages["sdxl"].pipeline.vae.decoder.parameters()).dtype == torch.float16


def pixels(stage: StagePipeline, request: GenerationRequest, inputs: DecodeInputs) -> list[bytes]:
    leaves = torch.utils._pytree.tree_leaves(dict(decode_output(stage, request, inputs)))
    return [leaf.numpy().tobytes() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    ("changed", "settings", "why"),
    [
        (("text_encoder",), {}, "has other numbers"),
        ((), {"component_dtypes": {"text_encoder": "bfloat16"}}, "it has another dtype"),
        ((), {"offload": {"text_encoder": "model"}}, "it has another offload"),
        ((), {"takes_new_adapters": True}, "LoRAs may be put into it"),
    ],
)
def test_what_differs_is_a_models_own_and_the_log_says_why(
    flux_checkpoint: Path, copy: Copy, caplog: Any, changed: tuple[str, ...], settings: dict[str, Any], why: str
) -> None:
    with caplog.at_level(logging.INFO, "deployments.stages.build"):
        stages = build(flux_checkpoint, copy("other", *changed), other=settings)
    assert set(stages["other"].shared) == {"text_encoder_2", "vae"}
    assert set(stages["other"].own_components) == {"text_encoder"}
    [said] = [line for line in caplog.messages if "other.text_encoder is" in line]
    assert said.startswith("share: other.text_encoder is another than flux.text_encoder: ")
    assert why in said


@pytest.mark.rest
def test_autoencoders_that_are_called_otherwise_are_two(flux_checkpoint: Path, copy: Copy, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "deployments.stages.build"):
        tiled = {"vae": {"tiling": "on"}}
        stages = build(flux_checkpoint, copy("tiled", "transformer"), stages=("vae",), tiled=tiled)
    assert not one_module(stages, "flux.vae", "tiled.vae")
    assert any("tiled has nothing in common with the other models of this process, flux" in m for m in caplog.messages)


def test_a_shared_component_takes_no_lora(flux_checkpoint: Path, copy: Copy) -> None:
    stages = build(flux_checkpoint, copy("tuned", "transformer"))
    for stage, other in ((stages["flux"], "tuned"), (stages["tuned"], "flux")):
        with pytest.raises(NotSupportedError, match=f"text_encoder, which takes none: it is {other}.text_encoder too"):
            stage.adapters._refuse_obstacles(type("Use", (), {"name": "a"}), ["text_encoder"])


def test_a_constructor_that_changes_a_component_of_another_model_is_found_out(flux_checkpoint: Path) -> None:
    pool, module = ComponentPool(), torch.nn.Linear(2, 2)
    stored = Stored(flux_checkpoint / "text_encoder", TRANSFORMERS_FILES)
    asked = AskedComponent("text_encoder", torch.nn.Linear, None, None, is_autoencoder=False, takes_adapters=False)
    first, second, third = (pool.of_model(name, Settings({}, VAEArgs(), gets_adapters=False)) for name in "abc")
    assert first.component(asked, stored, lambda: module) is module
    first.check_unchanged()
    assert second.component(asked, stored, lambda: torch.nn.Linear(2, 2)) is module
    second.check_unchanged()
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(CheckpointError, match=r"the constructor of b's pipeline changes .* a\.text_encoder"):
        second.check_unchanged()
    first.check_unchanged()  # what its own pipeline has changed is nobody else's
    assert third.component(asked, stored, lambda: torch.nn.Linear(2, 2)) is not module


def test_a_replica_of_several_models_does_the_work_of_the_one_that_a_request_names(
    make_replica: MakeReplica, flux_checkpoint: Path, checkpoints_root: Path
) -> None:
    chroma = checkpoint("chroma", checkpoints_root)
    replica = make_replica(flux_checkpoint, stages=("encoder",), also=[chroma]).replica
    description = asyncio.run(replica.describe())
    held = replica.stages["flux"].weight_bytes()
    assert (
        held.items()
        <= {name.removeprefix("flux."): num_bytes for name, num_bytes in description.weight_bytes.items()}.items()
    )
    assert "chroma.text_encoder" not in description.weight_bytes
    assert description.shared["chroma.text_encoder"] == "flux.text_encoder_2"
    assert description.shared["flux.text_encoder_2"] == "chroma.text_encoder"
    assert description.pipeline_class == "FluxPipeline and ChromaPipeline"
    assert description.of("chroma").pipeline_class == "ChromaPipeline"
    assert description.of("chroma").weight_bytes["text_encoder"] == held["text_encoder_2"]
    for folder in (chroma, flux_checkpoint):
        made = asyncio.run(replica.encode(asked(folder, folder.name)))
        assert content(made) == content(encode(build(folder)[folder.name], asked(folder, folder.name)))
    told = {each.name for each in asyncio.run(replica.arguments(("negative_prompt",), {}, "chroma"))}
    assert told == {"negative_prompt"}
    assert set((asyncio.run(replica.inspect()))["adapters"]) == {"flux", "chroma"}
    with pytest.raises(RuntimeError, match="this replica has flux and chroma, not 'sd3'"):
        asyncio.run(replica.encode(asked(Path("sd3"))))
    with pytest.raises(RuntimeError, match="this replica has flux and chroma, not 'sd3'"):
        asyncio.run(replica.call_component(ComponentCall("vae", "encode", Packed(None), making="other", model="sd3")))
