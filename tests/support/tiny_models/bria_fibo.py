"""Bria Fibo: every layer of the language model steers the transformer; prompts are structured texts."""

from diffusers import BriaFiboPipeline, BriaFiboTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests.support.tiny_models.autoencoders import wan22_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import QWEN_VOCABULARY
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import qwen2_tokenizer


def bria_fibo() -> PipelineAndRequest:
    tokenizer = qwen2_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    text_config = SmolLM3Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=QWEN_VOCABULARY,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformer = diffusers_model(
        BriaFiboTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        text_encoder_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    pipeline = BriaFiboPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=wan22_autoencoder(16),
        text_encoder=transformers_model(SmolLM3ForCausalLM, text_config, seed=3),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    request = {
        "prompt": "{'text': 'a small cat'}",
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": 128,
    }
    return pipeline, request


MODELS = (TinyModel("bria_fibo", bria_fibo),)
