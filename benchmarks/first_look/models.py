"""Models of published sizes with random weights, made on the device, and a FLUX pipeline that the engine can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel as FluxTransformer

from benchmarks.first_look.part import Setting
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.messages import STAGES
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.roles import PipelineLayout
from deployments.stage_pipeline.sessions.denoise import DenoiseSession

SMALL_FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SPREAD = 0.02  # standard deviation of the weights
TEXT_TOKENS = 512


def random_model(cls: Any, setting: Setting, dtype: torch.dtype | None = None, **config: Any) -> Any:
    """On the device, without a copy in the host's memory; norms' scales are 1 and biases 0."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = cls(**config)
    generator = torch.Generator(setting.device).manual_seed(0)
    dtype = dtype or setting.dtype
    for owner in module.modules():
        for name, old in list(owner._parameters.items()):
            if old is not None:
                weight = torch.empty(old.shape, dtype=dtype, device=setting.device)
                if name == "bias":
                    weight.zero_()
                elif old.ndim == 1 or name == "gamma":
                    weight.fill_(1)
                else:
                    weight.normal_(0, SPREAD, generator=generator)
                owner._parameters[name] = torch.nn.Parameter(weight, False)
    return module.to(setting.device).eval()


def flux_transformer(setting: Setting, **more: Any) -> FluxTransformer:
    """FLUX.1-dev's: 12 billion weights."""
    config: dict[str, Any] = setting.pick({}, SMALL_FLUX)
    return random_model(FluxTransformer, setting, guidance_embeds=True, **{**config, **more})


def flux_vae(setting: Setting) -> AutoencoderKL:
    channels = setting.pick([128, 256, 512, 512], [32, 32, 64, 64])
    return random_model(AutoencoderKL, setting, block_out_channels=channels, layers_per_block=2, **FLUX_VAE)


def wan_vae(setting: Setting, dtype: torch.dtype) -> AutoencoderKLWan:
    return random_model(AutoencoderKLWan, setting, dtype, base_dim=setting.pick(96, 8))


def flux_inputs(setting: Setting, transformer: FluxTransformer, side: int, batch: int) -> dict[str, Any]:
    """Of one forward; `side` in pixels."""
    tokens, text, config = (side // 16) ** 2, setting.pick(TEXT_TOKENS, 16), transformer.config
    generator = torch.Generator(setting.device).manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)

    return {
        "hidden_states": drawn(batch, tokens, config.in_channels),
        "encoder_hidden_states": drawn(batch, text, config.joint_attention_dim),
        "pooled_projections": drawn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=setting.device, dtype=setting.dtype),
        "guidance": torch.full((batch,), 3.5, device=setting.device),
        "img_ids": drawn(tokens, 3),
        "txt_ids": drawn(text, 3),
        "return_dict": False,
    }


class Flux:
    """A pipeline whose prompts are embeddings, and the engine that makes its forwards."""

    def __init__(self, setting: Setting, transformer: FluxTransformer) -> None:
        with torch.device("meta"):
            vae = AutoencoderKL(block_out_channels=[32, 32, 32, 32], **FLUX_VAE)
        pipeline = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae,
            None,
            None,
            None,
            None,
            transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        models = {"transformer": type(transformer), "vae": AutoencoderKL}
        stages = {"transformer": frozenset({"denoiser"}), "vae": frozenset({"encoder", "vae"})}
        layout = PipelineLayout(Path(), FluxPipeline, dict(models), models, stages)  # type: ignore[arg-type]
        self.setting, self.pipeline = setting, pipeline
        self.stage = StagePipeline(pipeline, layout, STAGES, setting.device, setting.dtype)

    def arguments(self, side: int, steps: int, prompt: int = 0) -> dict[str, Any]:
        config = self.pipeline.transformer.config
        generator = torch.Generator(self.setting.device).manual_seed(100 + prompt)

        def drawn(*shape: int) -> torch.Tensor:
            noise = torch.randn(shape, generator=generator, device=self.setting.device)
            return noise.to(self.setting.dtype)

        return {
            "prompt_embeds": drawn(1, self.setting.pick(TEXT_TOKENS, 16), config.joint_attention_dim),
            "pooled_prompt_embeds": drawn(1, config.pooled_projection_dim),
            "height": side,
            "width": side,
            "num_inference_steps": steps,
            "output_type": "latent",
        }

    def plain(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Diffusers alone."""
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad():
            latents: torch.Tensor = self.pipeline(**arguments, generator=generator, return_dict=False)[0]
        return latents

    def by_engine(self, engine: Engine, arguments: dict[str, Any], name: str = "request") -> torch.Tensor:
        """The same call in the engine's thread, each forward by the engine."""
        fiber = Fiber(name)

        def forward(real: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
            return engine.run(fiber, real, component, context, args, kwargs)

        engine.begin(fiber)
        try:
            session = DenoiseSession(self.stage, arguments, 0, None, run_denoiser=forward)
            result: Any = engine.call(fiber, session.run)
        finally:
            engine.end(fiber)
        output = result.output
        latents: torch.Tensor = output[0] if isinstance(output, tuple) else output.images
        return latents
