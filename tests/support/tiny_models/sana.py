"""Sana: text to image, Sprint, video."""

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SCMScheduler,
)

from tests.support.tiny_models.autoencoders import wan_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import gemma2_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import gemma_tokenizer

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 32,
}


def sana() -> PipelineAndRequest:
    pipeline = SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2_encoder(),
        vae=_deep_compression_autoencoder(),
        transformer=diffusers_model(SanaTransformer2DModel, **TRANSFORMER),
        scheduler=_flow_scheduler(3.0),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "guidance_scale": 4.5,
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "use_resolution_binning": False,
        "max_sequence_length": 32,
        "complex_human_instruction": None,
    }
    return pipeline, request


def sana_sprint() -> PipelineAndRequest:
    """Distilled to a few steps: guidance is embedded and every step draws new noise."""
    pipeline, request = sana()
    transformer = diffusers_model(
        SanaTransformer2DModel, **TRANSFORMER, qk_norm="rms_norm_across_heads", guidance_embeds=True
    )
    del request["negative_prompt"]
    components = pipeline.components | {"transformer": transformer, "scheduler": SCMScheduler()}
    return SanaSprintPipeline(**components), {
        **request,
        "num_inference_steps": 3,
        "intermediate_timesteps": None,
    }


def sana_video() -> PipelineAndRequest:
    transformer = diffusers_model(
        SanaVideoTransformer3DModel,
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        mlp_ratio=2.5,
        attention_bias=False,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    pipeline = SanaVideoPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2_encoder(),
        vae=wan_autoencoder(),
        transformer=transformer,
        scheduler=_flow_scheduler(8.0),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "frames": 9,
        "num_inference_steps": 5,
        "guidance_scale": 6.0,
        "max_sequence_length": 32,
        "complex_human_instruction": [],
        "use_resolution_binning": False,
    }
    return pipeline, request


def _flow_scheduler(flow_shift: float) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=flow_shift)


def _deep_compression_autoencoder() -> AutoencoderDC:
    return diffusers_model(
        AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


MODELS = (
    TinyModel("sana", sana),
    TinyModel("sana_sprint", sana_sprint),
    TinyModel("sana_video", sana_video),
)
