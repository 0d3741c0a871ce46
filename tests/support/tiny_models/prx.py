"""PRX: in latent space, and in pixel space without any autoencoder."""

from pathlib import Path

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
)
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig, T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import GEMMA_VOCABULARY, qwen3_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import gemma_tokenizer, qwen2_tokenizer

TRANSFORMER = {"hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": [4, 4]}
REQUEST = {
    "prompt": "a small cat",
    "negative_prompt": "bad",
    "height": 32,
    "width": 32,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "use_resolution_binning": False,
}


def prx() -> PipelineAndRequest:
    text_config = T5GemmaModuleConfig(
        vocab_size=GEMMA_VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
        query_pre_attn_scalar=4,
        dropout_rate=0.0,
    )
    pipeline = PRXPipeline(
        transformer=diffusers_model(
            PRXTransformer2DModel, **TRANSFORMER, patch_size=1, in_channels=4, context_in_dim=8
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=transformers_model(T5GemmaEncoder, text_config, seed=3),
        tokenizer=gemma_tokenizer(model_max_length=64),
        vae=kl_autoencoder(4, scaling_factor=0.9, shift_factor=0.1),
        default_sample_size=32,
    )
    return pipeline, dict(REQUEST)


def save_whole_t5gemma_config(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Published checkpoints keep the config of encoder and decoder beside the encoder's weights."""
    encoder = pipeline.text_encoder.config.to_dict()
    T5GemmaConfig(encoder=encoder, is_encoder_decoder=False).save_pretrained(folder / "text_encoder")


def prx_pixel() -> PipelineAndRequest:
    transformer = diffusers_model(
        PRXTransformer2DModel,
        **TRANSFORMER,
        patch_size=4,
        in_channels=3,
        context_in_dim=16,
        bottleneck_size=8,
        resolution_embeds=True,
    )
    pipeline = PRXPixelPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen2_tokenizer(),
        prompt_max_tokens=16,
    )
    return pipeline, dict(REQUEST)


MODELS = (
    TinyModel("prx", prx, after_save=save_whole_t5gemma_config),
    TinyModel("prx_pixel", prx_pixel),
)
