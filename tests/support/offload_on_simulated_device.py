"""Make pictures on a simulated npu with components that come by turns, as test_offloaded_stages.py asks."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from deployments.devices import select_device
from deployments.messages import STAGES, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs, ModelArgs
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from tests.support import simulated_accelerator
from tests.support.tiny_models import request_arguments, tiny_patches

COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")


def main(name: str, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    simulated_accelerator.install(name)
    tiny_patches()
    plain, offloaded = (built(name, folder, kinds) for kinds in ({}, dict.fromkeys(COMPONENTS, "model")))
    during: dict[str, set[str]] = {"transformer": set(), "text_encoder_2": set()}

    def note(*_: Any) -> None:
        for component, seen in during.items():
            seen.update(devices(offloaded.components[component]))

    truth = made(plain)
    offloaded.components["transformer"].transformer_blocks[0].register_forward_pre_hook(note)
    pictures = [made(offloaded) for _ in range(2)]
    waiting: Any = offloaded.memory._waiting
    report = {
        "moves": waiting.moves,
        "at_rest": {component: sorted(devices(offloaded.components[component])) for component in COMPONENTS},
        "during_forwards": {component: sorted(seen) for component, seen in during.items()},
        "same_as_on_the_device": all(torch.equal(picture, truth) for picture in pictures),
    }
    print(json.dumps(report))


def built(device: str, folder: Path, offload: dict[str, str]) -> Any:
    model = ModelArgs.model_validate({"path": str(folder), "name": "flux", "offload": offload})
    return build_stage(model, STAGES, EnvConfig(), select_device(device))


def made(stage: Any) -> torch.Tensor:
    arguments = request_arguments("flux") | {"num_inference_steps": 2}
    request = GenerationRequest("r", "flux", arguments, 0, OutputFormat("image", "png"), True)
    denoiser = DenoiserStage(stage, DenoisingArgs())
    inputs, _ = denoiser.denoise(request, encode(stage, request))
    denoiser.engine.close()
    picture: torch.Tensor = torch.as_tensor(dict(decode_output(stage, request, inputs))["images"]).cpu()
    return picture


def devices(module: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
