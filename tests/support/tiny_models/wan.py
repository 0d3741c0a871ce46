"""Wan 2.1 and 2.2 and what is built on them: image to video, VACE, video to video, SkyReels V2, Helios."""

from typing import Any

from diffusers import (
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)

from tests.support.tiny_models.autoencoders import wan22_autoencoder, wan_autoencoder
from tests.support.tiny_models.pictures import center_mask, noise_image, noise_video
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import clip_image_encoder, clip_image_processor, umt5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
# Wan 2.1's image to video: 16 latents, 16 of the first picture, 4 of the mask.
IMAGE_TO_VIDEO_CHANNELS = {"in_channels": 36, "out_channels": 16}
REQUEST = {
    "prompt": "a small cat",
    "negative_prompt": "bad",
    "height": 16,
    "width": 16,
    "num_frames": 9,
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "max_sequence_length": 32,
}


def wan21() -> PipelineAndRequest:
    return WanPipeline(**_text_and_vae(), transformer=_transformer()), dict(REQUEST)


def wan22() -> PipelineAndRequest:
    """Two transformers: one for the noisy steps, one for the rest."""
    pipeline = WanPipeline(
        **_text_and_vae(),
        transformer=_transformer(),
        transformer_2=_transformer(seed=7),
        boundary_ratio=0.875,
    )
    return pipeline, {**REQUEST, "guidance_scale_2": 3.0, "num_inference_steps": 8}


def wan22_5b() -> PipelineAndRequest:
    """A time step per token, and an autoencoder 16 times smaller in space."""
    vae = wan22_autoencoder(48, latents_mean=[0.1] * 48, latents_std=[1.1] * 48)
    pipeline = WanPipeline(
        **_text_and_vae(vae=vae),
        transformer=_transformer(in_channels=48, out_channels=48),
        expand_timesteps=True,
    )
    return pipeline, {**REQUEST, "height": 32, "width": 32}


def wan21_i2v() -> PipelineAndRequest:
    """The picture is seen by CLIP and by the VAE."""
    pipeline = WanImageToVideoPipeline(
        **_text_and_vae(),
        transformer=_transformer(**IMAGE_TO_VIDEO_CHANNELS, image_dim=4),
        image_encoder=clip_image_encoder(),
        image_processor=clip_image_processor(32),
    )
    return pipeline, {**REQUEST, "image": noise_image(16)}


def wan21_flf2v() -> PipelineAndRequest:
    """First and last frame are given."""
    pipeline, request = wan21_i2v()
    transformer = _transformer(**IMAGE_TO_VIDEO_CHANNELS, image_dim=4, pos_embed_seq_len=2 * 65)
    components = pipeline.components | {"transformer": transformer}
    return WanImageToVideoPipeline(**components), {**request, "last_image": noise_image(16, seed=1)}


def wan22_i2v() -> PipelineAndRequest:
    """Two transformers and no image encoder."""
    pipeline = WanImageToVideoPipeline(
        **_text_and_vae(),
        transformer=_transformer(**IMAGE_TO_VIDEO_CHANNELS),
        transformer_2=_transformer(**IMAGE_TO_VIDEO_CHANNELS, seed=7),
        image_encoder=None,
        image_processor=None,
        boundary_ratio=0.9,
    )
    return pipeline, {**REQUEST, "image": noise_image(16)}


def wan_vace() -> PipelineAndRequest:
    """A video, a mask and a reference picture steer every layer."""
    transformer = diffusers_model(WanVACETransformer3DModel, **TRANSFORMER, vace_layers=[0, 2], vace_in_channels=96)
    pipeline = WanVACEPipeline(**_text_and_vae(), transformer=transformer)
    request = {
        **REQUEST,
        "video": noise_video(9),
        "mask": [center_mask(16)] * 9,
        "reference_images": [noise_image(16)],
    }
    return pipeline, request


def wan_animate() -> PipelineAndRequest:
    """The poses and the face of two videos move the person of a picture."""
    transformer = diffusers_model(
        WanAnimateTransformer3DModel,
        **{**TRANSFORMER, "num_layers": 2, **IMAGE_TO_VIDEO_CHANNELS},
        latent_channels=16,
        image_dim=4,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    pipeline = WanAnimatePipeline(
        **_text_and_vae(),
        transformer=transformer,
        image_encoder=clip_image_encoder(),
        image_processor=clip_image_processor(32),
    )
    request = {name: value for name, value in REQUEST.items() if name != "num_frames"}
    given = {"image": noise_image(16), "pose_video": noise_video(9), "face_video": noise_video(9)}
    return pipeline, {**request, **given, "segment_frame_length": 9, "num_inference_steps": 3}


def wan_v2v() -> PipelineAndRequest:
    pipeline = WanVideoToVideoPipeline(**_text_and_vae(), transformer=_transformer())
    request = {**REQUEST, "video": noise_video(9), "strength": 0.8, "num_inference_steps": 8}
    del request["num_frames"]
    return pipeline, request


def skyreels_v2() -> PipelineAndRequest:
    return SkyReelsV2Pipeline(**_skyreels_components()), dict(REQUEST)


def skyreels_df() -> PipelineAndRequest:
    """Asynchronous, longer than its window: several overlapping rounds, a scheduler per block of frames."""
    request = {
        **REQUEST,
        "num_frames": 17,
        "base_num_frames": 9,
        "overlap_history": 5,
        "ar_step": 1,
        "causal_block_size": 1,
        "num_inference_steps": 4,
    }
    return SkyReelsV2DiffusionForcingPipeline(**_skyreels_components()), request


def skyreels_df_v2v() -> PipelineAndRequest:
    request = {
        **REQUEST,
        "video": noise_video(9),
        "num_frames": 17,
        "base_num_frames": 9,
        "overlap_history": 5,
        "num_inference_steps": 4,
    }
    return SkyReelsV2DiffusionForcingVideoToVideoPipeline(**_skyreels_components()), request


def helios() -> PipelineAndRequest:
    """Chunk after chunk; the VAE decodes each one inside the loop."""
    config = {name: value for name, value in TRANSFORMER.items() if name != "rope_max_seq_len"}
    transformer = diffusers_model(
        HeliosTransformer3DModel,
        **{**config, "num_layers": 2},
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    scheduler = HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipeline = HeliosPipeline(**_text_and_vae(scheduler=scheduler), transformer=transformer)
    request = {
        **REQUEST,
        "num_frames": 18,
        "num_latent_frames_per_chunk": 3,
        "history_sizes": [4, 2, 1],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
    }
    return pipeline, request


def flow_unipc_scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def _text_and_vae(**changes: Any) -> dict[str, Any]:
    components = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(),
        "vae": wan_autoencoder(),
        "scheduler": flow_unipc_scheduler(),
    }
    return {**components, **changes}


def _transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    return diffusers_model(WanTransformer3DModel, seed=seed, **{**TRANSFORMER, **changes})


def _skyreels_components() -> dict[str, Any]:
    transformer = diffusers_model(SkyReelsV2Transformer3DModel, **{**TRANSFORMER, "num_layers": 2})
    return _text_and_vae(scheduler=flow_unipc_scheduler(8.0), transformer=transformer)


ANIMATE = TinyModel("wan_animate", wan_animate)
MODELS = (
    TinyModel("wan21", wan21),
    TinyModel("wan22", wan22),
    TinyModel("wan22_5b", wan22_5b),
    TinyModel("wan21_i2v", wan21_i2v),
    TinyModel("wan21_flf2v", wan21_flf2v),
    TinyModel("wan22_i2v", wan22_i2v),
    TinyModel("wan_vace", wan_vace),
    TinyModel("wan_v2v", wan_v2v),
    TinyModel("skyreels_v2", skyreels_v2),
    TinyModel("skyreels_df", skyreels_df),
    TinyModel("skyreels_df_v2v", skyreels_df_v2v),
    TinyModel("helios", helios),
)
