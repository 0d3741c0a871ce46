"""A ControlNet and an IP-Adapter that the arguments name, through three processes."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from deployments.messages import GenerationRequest
from deployments.model import ComponentsArgs, ModelArgs
from deployments.weights.parts.compose import resolve_model
from tests.support.ip_adapters import save_adapter, unet_adapter
from tests.support.stage_parity import ANY_OUTPUT, SEED, assert_same
from tests.support.stage_processes import StageProcesses
from tests.support.tiny_models import checkpoint, request_arguments
from tests.support.tiny_models.checkpoints import call
from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.stable_diffusion import sd15_controlnet

pytestmark = pytest.mark.filterwarnings("default")


def check(
    whole: Any, components: dict[str, Any], arguments: dict[str, Any], folder: Path, cache: Path, stages: StageProcesses
) -> None:
    """Three processes make what the whole pipeline makes."""
    model = ModelArgs(path=str(folder), name="parts", components=ComponentsArgs.model_validate(components))
    stages.load(resolve_model(model, cache, None, use_streamer=False))
    made = stages.generate(GenerationRequest("parity", "parts", arguments, SEED, ANY_OUTPUT))
    whole.set_progress_bar_config(disable=True)
    assert_same(made, call(whole, arguments, SEED))


def test_a_controlnet_beside_a_checkpoint(stages: StageProcesses, checkpoints_root: Path, tmp_path: Path) -> None:
    folder = checkpoint("sd15", checkpoints_root)
    net: Any = sd15_controlnet()[0].controlnet
    net.save_pretrained(tmp_path / "net")
    net = ControlNetModel.from_pretrained(tmp_path / "net")
    whole = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=net)
    arguments = request_arguments("sd15") | {"image": noise_image(32), "controlnet_conditioning_scale": 0.8}
    check(whole, {"controlnet": str(tmp_path / "net")}, arguments, folder, tmp_path / "cache", stages)


def test_an_ip_adapter_beside_a_checkpoint(stages: StageProcesses, checkpoints_root: Path, tmp_path: Path) -> None:
    folder = checkpoint("sd15", checkpoints_root)
    whole: Any = StableDiffusionPipeline.from_pretrained(folder)
    save_adapter(unet_adapter(whole.unet), tmp_path / "adapter")
    whole.load_ip_adapter(str(tmp_path / "adapter"), subfolder="", weight_name="adapter.safetensors")
    adapter = {"path": str(tmp_path / "adapter"), "weight_name": "adapter.safetensors"}
    arguments = request_arguments("sd15") | {"ip_adapter_image": noise_image(32)}
    check(whole, {"ip_adapter": adapter}, arguments, folder, tmp_path / "cache", stages)
