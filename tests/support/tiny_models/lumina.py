"""Lumina 2."""

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.support.tiny_models.autoencoders import FLUX_LATENTS, kl_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import gemma2_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import gemma_tokenizer


def lumina2() -> PipelineAndRequest:
    transformer = diffusers_model(
        Lumina2Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[300, 32, 32],
        cap_feat_dim=16,
    )
    pipeline = Lumina2Pipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2_encoder(),
        vae=kl_autoencoder(4, (8, 8, 8, 16), **FLUX_LATENTS),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    request = {
        "prompt": "a small cat",
        "system_prompt": "draw",  # the long one would fill all the tokens
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": 64,
    }
    return pipeline, request


MODELS = (TinyModel("lumina2", lumina2),)
