"""Pipelines that rewire the denoiser for a request, that need gradients of it, and one that has no denoiser."""

from diffusers import (
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    DiffusionPipeline,
    LTXLatentUpsamplePipeline,
    PixArtSigmaPAGPipeline,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    TextToVideoZeroSDXLPipeline,
)
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

from tests.support.tiny_models import ltx, pixart, stable_diffusion
from tests.support.tiny_models.pictures import noise_video
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel


def sd15_pag() -> PipelineAndRequest:
    """Perturbed attention: the last third of a batch goes through processors without attention."""
    return StableDiffusionPAGPipeline(**_sd15(), pag_applied_layers="mid"), {**_request(), "pag_scale": 3.0}


def pixart_pag() -> PipelineAndRequest:
    pipeline, request = pixart.pixart()
    return PixArtSigmaPAGPipeline(**pipeline.components, pag_applied_layers="blocks.1"), {**request, "pag_scale": 3.0}


def sd15_sag() -> PipelineAndRequest:
    """Self-attention guidance: a processor keeps its map, and a hook notes the size."""
    components = _sd15() | {"scheduler": DDIMScheduler(clip_sample=False, **stable_diffusion.NOISE_SCHEDULE)}
    return StableDiffusionSAGPipeline(**components), {**_request(), "sag_scale": 0.75}


def sd15_attend() -> PipelineAndRequest:
    """Attend-and-excite: the latents are moved by gradients through the denoiser."""
    request = {name: value for name, value in _request().items() if name not in ("width", "height")}
    request |= {"width": 64, "height": 64, "token_indices": [2], "attn_res": [16, 16], "max_iter_to_alter": 2}
    components = {name: value for name, value in _sd15().items() if name != "image_encoder"}
    return StableDiffusionAttendAndExcitePipeline(**components), request


def zero_sdxl() -> PipelineAndRequest:
    """Every frame attends the first: the samples of a batch are not independent."""
    pipeline, request = stable_diffusion.sdxl()
    components = {name: value for name, value in pipeline.components.items() if value is not None}
    components["scheduler"] = DDIMScheduler(clip_sample=False, **stable_diffusion.NOISE_SCHEDULE)
    request |= {"num_inference_steps": 6, "video_length": 3, "t0": 2, "t1": 4}
    return TextToVideoZeroSDXLPipeline(**components, add_watermarker=False), request


def ltx_upsample() -> PipelineAndRequest:
    vae: AutoencoderKLLTXVideo = ltx.ltx()[0].vae
    upsampler = diffusers_model(
        LTXLatentUpsamplerModel, in_channels=8, mid_channels=32, num_blocks_per_stage=1, dims=3, spatial_upsample=True
    )
    request = {"video": noise_video(9, 32), "height": 32, "width": 32, "adain_factor": 0.5}
    return LTXLatentUpsamplePipeline(vae=vae, latent_upsampler=upsampler), request


def _sd15() -> dict[str, object]:
    pipeline: DiffusionPipeline = stable_diffusion.sd15()[0]
    return dict(pipeline.components) | {"requires_safety_checker": False}


def _request() -> dict[str, object]:
    return dict(stable_diffusion.REQUEST)


MODELS = (
    TinyModel("sd15_pag", sd15_pag),
    TinyModel("pixart_pag", pixart_pag),
    TinyModel("sd15_sag", sd15_sag),
    TinyModel("sd15_attend", sd15_attend),
    TinyModel("zero_sdxl", zero_sdxl),
    TinyModel("ltx_upsample", ltx_upsample),
)
