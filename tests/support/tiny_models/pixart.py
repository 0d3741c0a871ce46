"""PixArt: sigma and alpha."""

from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer


def pixart() -> PipelineAndRequest:
    transformer = diffusers_model(
        PixArtTransformer2DModel,
        sample_size=16,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=kl_autoencoder(4, scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "guidance_scale": 4.5,
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 32,
    }
    return pipeline, request


def pixart_alpha() -> PipelineAndRequest:
    pipeline, request = pixart()
    return PixArtAlphaPipeline(**pipeline.components | {"scheduler": DEISMultistepScheduler()}), request


MODELS = (
    TinyModel("pixart", pixart),
    TinyModel("pixart_alpha", pixart_alpha),
)
