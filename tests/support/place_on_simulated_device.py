"""Run a diffusers pipeline on a simulated npu or musa, as test_devices.py asks in a process of its own."""

import json
import sys
import warnings

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from deployments.devices import available_devices, memory_allocated, select_device, synchronize
from tests.support import simulated_accelerator


def main(name: str) -> None:
    warnings.filterwarnings("ignore")
    simulated_accelerator.install(name)
    pipeline = tiny_pipeline()
    on_cpu = generate(pipeline)
    device = select_device(name)
    pipeline.to(device.torch_device)
    simulated_accelerator.dispatched.clear()
    on_device = generate(pipeline)
    synchronize(device)
    mixing = ""
    try:
        pipeline.transformer(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.tensor([1]))
    except RuntimeError as error:
        mixing = str(error)
    report = {
        "device": device.name,
        "torch_device": str(device.torch_device),
        "available": available_devices(),
        "parameters": sorted({p.device.type for p in pipeline.transformer.parameters()}),
        "operations": len(simulated_accelerator.dispatched),
        "largest_difference": float(abs(on_cpu - on_device).max()),
        "spread": float(on_cpu.std()),
        "mixing": mixing,
        "memory": memory_allocated(device),
        "weight_bytes": sum(
            p.numel() * p.element_size()
            for component in (pipeline.transformer, pipeline.vae)
            for p in component.parameters()
        ),
        "synchronized": len(simulated_accelerator.synchronized),
    }
    print(json.dumps(report))


def tiny_pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
    )
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: DiTPipeline):
    generator = torch.Generator().manual_seed(1)
    return pipeline(class_labels=[1, 2], num_inference_steps=3, generator=generator, output_type="np").images


if __name__ == "__main__":
    main(sys.argv[1])
