"""Kandinsky 5 (transformer) and 2.2 (a prior, then a UNet: two denoising loops in nested pipelines)."""

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)

from tests.support.tiny_models.autoencoders import FLUX_LATENTS, kl_autoencoder
from tests.support.tiny_models.processors import qwen2_processor
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import (
    clip_image_encoder_with_projection,
    clip_image_processor,
    clip_text_encoder,
    clip_text_encoder_with_projection,
    qwen2_5_vl,
)
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer, qwen2_tokenizer


def kandinsky5_t2i() -> PipelineAndRequest:
    tokenizer = qwen2_tokenizer()
    transformer = diffusers_model(
        Kandinsky5Transformer3DModel,
        in_visual_dim=16,
        in_text_dim=32,
        in_text_dim2=32,
        time_dim=16,
        out_visual_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        visual_cond=False,
        attention_type="regular",
    )
    pipeline = Kandinsky5T2IPipeline(
        transformer=transformer,
        vae=kl_autoencoder(16, (8, 8, 8, 16), **FLUX_LATENTS),
        text_encoder=qwen2_5_vl(tokenizer, width=32),
        tokenizer=qwen2_processor(tokenizer),
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "max_sequence_length": 16,
    }
    return pipeline, request


def allow_a_tiny_size(pipeline: DiffusionPipeline) -> None:
    """Without this the pipeline goes to the nearest of its sizes, all about 1024^2."""
    pipeline.resolutions = [(64, 64)]


def kandinsky22() -> PipelineAndRequest:
    unet = diffusers_model(
        UNet2DConditionModel,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers_model(
        VQModel,
        seed=5,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    prior_scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
    )
    pipeline = KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        movq=movq,
        prior_prior=diffusers_model(
            PriorTransformer, num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1
        ),
        prior_image_encoder=clip_image_encoder_with_projection(image_size=224, patch_size=56),
        prior_text_encoder=clip_text_encoder_with_projection(),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=prior_scheduler,
        prior_image_processor=clip_image_processor(224),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 64,
        "width": 64,
        "prior_num_inference_steps": 4,
        "num_inference_steps": 4,
        "prior_guidance_scale": 2.0,
        "guidance_scale": 4.0,
    }
    return pipeline, request


MODELS = (
    TinyModel("kandinsky5_t2i", kandinsky5_t2i, after_load=allow_a_tiny_size),
    TinyModel("kandinsky22", kandinsky22),
)
