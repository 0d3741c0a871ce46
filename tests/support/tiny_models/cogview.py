"""CogView 4."""

from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from tests.support.tiny_models.autoencoders import FLUX_LATENTS, kl_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import LLAMA_VOCABULARY
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import llama_tokenizer


def cogview4() -> PipelineAndRequest:
    text_config = GlmConfig(
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=LLAMA_VOCABULARY,
        pad_token_id=3,
        eos_token_id=2,
    )
    transformer = diffusers_model(
        CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(32, 32),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    pipeline = CogView4Pipeline(
        tokenizer=llama_tokenizer(),
        text_encoder=transformers_model(GlmModel, text_config, seed=3),
        vae=kl_autoencoder(4, **FLUX_LATENTS),
        transformer=transformer,
        scheduler=scheduler,
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": 16,
    }
    return pipeline, request


MODELS = (TinyModel("cogview4", cogview4),)
