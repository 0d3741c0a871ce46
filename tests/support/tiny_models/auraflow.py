"""AuraFlow."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import umt5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer


def auraflow() -> PipelineAndRequest:
    transformer = diffusers_model(
        AuraFlowTransformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    pipeline = AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=kl_autoencoder(4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "max_sequence_length": 32,
    }
    return pipeline, request


MODELS = (TinyModel("auraflow", auraflow),)
