"""LTX-Video and LTX-2 (video with sound)."""

from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.support.tiny_models.autoencoders import set_latent_statistics
from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import GEMMA_VOCABULARY, t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import gemma_tokenizer, t5_tokenizer


def ltx() -> PipelineAndRequest:
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=ltx_autoencoder(timestep_conditioning=False),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers_model(
            LTXVideoTransformer3DModel,
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
    }
    return pipeline, request


def ltx_tcond() -> PipelineAndRequest:
    """From 0.9.1 on the VAE takes a time step, and noise is added to the latents after the loop."""
    pipeline, request = ltx()
    components = pipeline.components | {"vae": ltx_autoencoder(timestep_conditioning=True)}
    return LTXPipeline(**components), {**request, "decode_timestep": 0.05, "decode_noise_scale": 0.025}


def ltx_i2v() -> PipelineAndRequest:
    pipeline, request = ltx()
    return LTXImageToVideoPipeline(**pipeline.components), {**request, "image": noise_image(32)}


def ltx_condition() -> PipelineAndRequest:
    pipeline, request = ltx()
    components = pipeline.components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    conditions = [LTXVideoCondition(image=noise_image(32), frame_index=0)]
    return LTXConditionPipeline(**components), {**request, "conditions": conditions}


def ltx2() -> PipelineAndRequest:
    """Video and sound: two autoencoders, connectors after the text encoder, a vocoder at the end."""
    pipeline = LTX2Pipeline(
        transformer=_ltx2_transformer(),
        vae=_ltx2_autoencoder(),
        audio_vae=_ltx2_audio_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_gemma3(),
        tokenizer=gemma_tokenizer(),
        connectors=_ltx2_connectors(),
        vocoder=_ltx2_vocoder(),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_scale": 3.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "audio_guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": None,
        "use_cross_timestep": False,
        "max_sequence_length": 16,
    }
    return pipeline, request


def ltx2_i2v() -> PipelineAndRequest:
    pipeline, request = ltx2()
    return LTX2ImageToVideoPipeline(**pipeline.components), {**request, "image": noise_image(32)}


def ltx_autoencoder(*, timestep_conditioning: bool) -> AutoencoderKLLTXVideo:
    vae = diffusers_model(
        AutoencoderKLLTXVideo,
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    set_latent_statistics(vae)
    return vae


def _ltx2_transformer() -> LTX2VideoTransformer3DModel:
    return diffusers_model(
        LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=32,
        rope_double_precision=False,
        rope_type="split",
    )


def _ltx2_connectors() -> LTX2TextConnectors:
    return diffusers_model(
        LTX2TextConnectors,
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )


def _ltx2_autoencoder() -> AutoencoderKLLTX2Video:
    vae = diffusers_model(
        AutoencoderKLLTX2Video,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    set_latent_statistics(vae)
    return vae


def _ltx2_audio_autoencoder() -> AutoencoderKLLTX2Audio:
    audio_vae = diffusers_model(
        AutoencoderKLLTX2Audio,
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    set_latent_statistics(audio_vae)
    return audio_vae


def _ltx2_vocoder() -> LTX2Vocoder:
    return diffusers_model(
        LTX2Vocoder,
        in_channels=2 * 8,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    )


def _gemma3() -> Gemma3ForConditionalGeneration:
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": GEMMA_VOCABULARY,
        "sliding_window": 64,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers_model(Gemma3ForConditionalGeneration, config)


MODELS = (
    TinyModel("ltx", ltx),
    TinyModel("ltx_tcond", ltx_tcond),
    TinyModel("ltx_i2v", ltx_i2v),
    TinyModel("ltx_condition", ltx_condition),
    TinyModel("ltx2", ltx2),
    TinyModel("ltx2_i2v", ltx2_i2v),
)
