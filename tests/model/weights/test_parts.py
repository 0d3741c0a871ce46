"""Parts named in the arguments land in their stages, and make the bytes of the pipeline that loads the same parts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from deployments.devices import select_device
from deployments.errors import CheckpointError
from deployments.messages import STAGES
from deployments.model import ComponentsArgs, ModelArgs
from deployments.stages.build import build_stage
from deployments.weights.parts.compose import resolve_model
from env_config.variables import EnvConfig
from tests.support.ip_adapters import save_adapter, unet_adapter
from tests.support.stage_parity import SEED, assert_same
from tests.support.stages_in_process import StagesInProcess
from tests.support.tiny_models import checkpoint, request_arguments
from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.checkpoints import call
from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.stable_diffusion import animatediff, sd15_controlnet

CPU = select_device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers deprecates its own


@pytest.fixture(scope="module")
def sd15(checkpoints_root: Path) -> Path:
    return checkpoint("sd15", checkpoints_root)


@pytest.fixture(scope="module")
def controlnets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets as they are published: each a folder of its own."""
    folders = []
    for number in range(2):
        net: Any = sd15_controlnet()[0].controlnet
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1 + number)
        folders.append(tmp_path_factory.mktemp("controlnet") / f"net-{number}")
        net.save_pretrained(folders[-1])
    return folders


def args(folder: Path, **fields: Any) -> ModelArgs:
    components = ComponentsArgs.model_validate(fields.pop("components", {}))
    return ModelArgs(path=str(folder), name="parts", components=components, **fields)


def quiet(pipeline: Any) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def split(model: ModelArgs, cache_root: Path, **options: Any) -> Iterator[StagesInProcess]:
    stages = StagesInProcess(model, cache_root, **options)
    try:
        yield stages
    finally:
        stages.close()


@pytest.mark.rest
def test_several_controlnets_beside_a_checkpoint_control_it(
    sd15: Path, controlnets: list[Path], tmp_path: Path
) -> None:
    nets = [ControlNetModel.from_pretrained(folder) for folder in controlnets]
    whole = quiet(StableDiffusionControlNetPipeline.from_pretrained(sd15, controlnet=nets))
    arguments = request_arguments("sd15") | {"image": [noise_image(32, seed=seed) for seed in range(2)]}
    with split(args(sd15, components={"controlnet": [str(folder) for folder in controlnets]}), tmp_path) as stages:
        assert stages.held("denoiser") == {"unet", "controlnet"}
        assert_same(stages.generate(arguments), call(whole, arguments, SEED))


@pytest.mark.rest
def test_two_ip_adapters_of_which_torch_save_wrote_one_are_loaded_in_order(sd15: Path, tmp_path: Path) -> None:
    whole: Any = quiet(StableDiffusionPipeline.from_pretrained(sd15))
    names = ["one.bin", "two.safetensors"]
    for seed, name in enumerate(names):
        save_adapter(unet_adapter(whole.unet, seed), tmp_path / "models", name)
    whole.load_ip_adapter(str(tmp_path), subfolder="models", weight_name=names)
    whole.set_ip_adapter_scale([0.5, 1.5])
    arguments = request_arguments("sd15") | {"ip_adapter_image": [noise_image(32), noise_image(32, seed=7)]}
    adapter = {"path": str(tmp_path), "subfolder": "models", "weight_name": names, "scale": [0.5, 1.5]}
    with split(args(sd15, components={"ip_adapter": adapter}), tmp_path / "cache", use_streamer=True) as stages:
        assert stages.held("encoder") == {"text_encoder", "image_encoder", "vae"}
        assert stages.held("denoiser") == {"unet"}
        truth = call(whole, arguments, SEED)
        assert_same(stages.generate(arguments), truth)
    arguments["ip_adapter_image"] = [noise_image(32), Image.new("RGB", (32, 32), "red")]
    assert not torch.equal(truth[0], call(whole, arguments, SEED)[0]), "the second picture matters"


def test_a_part_replaces_the_checkpoints_own_and_null_leaves_it_out(sd15: Path, tmp_path: Path) -> None:
    vae = kl_autoencoder(4, scaling_factor=0.5)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(0.9)
    vae.save_pretrained(tmp_path / "other" / "vae")
    whole = quiet(StableDiffusionPipeline.from_pretrained(sd15, vae=vae))
    arguments = request_arguments("sd15")
    components = {"vae": {"path": str(tmp_path / "other"), "subfolder": "vae"}, "safety_checker": None}
    with split(args(sd15, components=components), tmp_path / "cache") as stages:
        assert_same(stages.generate(arguments), call(whole, arguments, SEED))


def test_a_composed_folder_is_made_once_and_a_checkpoint_without_parts_is_left_as_it_is(
    sd15: Path, controlnets: list[Path], tmp_path: Path
) -> None:
    assert resolve_model(args(sd15), tmp_path, None, False) == sd15
    (tmp_path / "plain" / "assets").mkdir(parents=True)
    (tmp_path / "plain" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert resolve_model(args(tmp_path / "plain"), tmp_path, None, False) == tmp_path / "plain"
    model = args(sd15, components={"controlnet": str(controlnets[0])})
    folder = resolve_model(model, tmp_path, (), False)
    assert resolve_model(model, tmp_path, None, True) == folder
    assert (folder / "controlnet").resolve() == controlnets[0].resolve()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"components": {"vae": "NOWHERE"}}, r"components\.vae: 'NOWHERE' is neither a folder here"),
        ({"components": {"vae": "SD15"}}, r"components\.vae: .* is no component.*name that with `subfolder`"),
        ({"components": {"vae": {"path": "SD15", "subfolder": "vea"}}}, r"components\.vae: .*no folder 'vea'"),
        ({"components": {"vae": {"path": "SD15", "subfolder": "unet"}}}, "it is a UNet2DConditionModel, and .* takes"),
        ({"components": {"vae": None}}, r"components\.vae: StableDiffusionPipeline cannot go without it"),
        ({"components": {"vae": [{"path": "SD15", "subfolder": "vae"}] * 2}}, r"components\.vae: .* takes one, not a"),
        ({"components": {"nonsense": {"path": "SD15", "subfolder": "vae"}}}, "takes no nonsense"),
        ({"pipeline_class": "NoPipeline"}, "pipeline_class: diffusers .* has no pipeline 'NoPipeline'"),
        (
            {"components": {"ip_adapter": {"path": "SD15", "weight_name": "a.bin"}}},
            r"ip_adapter: .* has no file a\.bin",
        ),
    ],
)
def test_a_part_that_cannot_be_used_is_refused_by_its_name(
    fields: dict[str, Any], sentence: str, sd15: Path, tmp_path: Path
) -> None:
    fields = json.loads(json.dumps(fields).replace("SD15", str(sd15)))
    with pytest.raises(CheckpointError, match=sentence):
        resolve_model(args(sd15, **fields), tmp_path, (), False)


def test_a_pipeline_that_copies_weights_when_it_is_made_is_refused_with_what_to_serve(
    sd15: Path, tmp_path: Path
) -> None:
    adapter: Any = animatediff()[0].motion_adapter
    adapter.save_pretrained(tmp_path / "motion")
    components = {"motion_adapter": str(tmp_path / "motion")}
    model = args(sd15, components=components, pipeline_class="AnimateDiffPipeline")
    with pytest.raises(CheckpointError, match=r"copies weights .* serve the folder that its save_"):
        build_stage(model, ("vae",), EnvConfig.model_validate({"runtime": {"cache_root": tmp_path / "cache"}}), CPU)


def test_a_file_that_is_no_ip_adapter_is_refused_by_its_name(sd15: Path, tmp_path: Path) -> None:
    save_adapter({"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)}, tmp_path)
    adapter = {"path": str(tmp_path), "weight_name": "adapter.safetensors"}
    model = args(sd15, components={"ip_adapter": adapter})
    with pytest.raises(CheckpointError, match=r"components\.ip_adapter: .*adapter\.safetensors cannot be loaded"):
        build_stage(model, STAGES, EnvConfig.model_validate({"runtime": {"cache_root": tmp_path / "cache"}}), CPU)


class Code:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


def test_an_ip_adapter_that_holds_code_is_refused(sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter({}, tmp_path)
    torch.save({"image_proj": {"a": Code()}, "ip_adapter": {}}, tmp_path / "adapter.bin")
    adapter = {"path": str(tmp_path), "weight_name": "adapter.bin"}
    with pytest.raises(CheckpointError, match="could run code when it is read"):
        resolve_model(args(sd15, components={"ip_adapter": adapter}), tmp_path / "cache", (), False)
    assert not (tmp_path / "ran").exists()


def test_a_modular_pipeline_is_built_and_its_pickled_weights_are_converted(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("modular_zimage", checkpoints_root), folder)
    model = ModelArgs(path=str(folder), name="m")
    env = EnvConfig.model_validate({"runtime": {"cache_root": tmp_path / "cache"}})
    assert resolve_model(model, tmp_path, None, use_streamer=False) == folder
    stored = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(stored), stored.with_suffix(".bin"))
    stored.unlink()
    assert set(build_stage(model, ("vae",), env, CPU).components) == {"vae"}


def test_parts_for_a_modular_pipeline_are_refused_with_the_place_to_change(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    folder = str(checkpoint("modular_zimage", checkpoints_root))
    for setting, given in {"components": {"vae": folder}, "pipeline_class": "FluxPipeline"}.items():
        with pytest.raises(CheckpointError, match=f"{setting}: a modular pipeline"):
            resolve_model(ModelArgs(path=folder, name="m", **{setting: given}), tmp_path, (), use_streamer=False)
