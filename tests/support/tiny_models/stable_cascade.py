"""Stable Cascade: two denoising loops in nested pipelines, the second with a text encoder of its own."""

import json
from pathlib import Path

from diffusers import (
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import clip_text_encoder_with_projection
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer

PLAIN = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
WITH_ATTENTION = (*PLAIN, "SDCascadeAttnBlock")


def stable_cascade() -> PipelineAndRequest:
    prior = diffusers_model(
        StableCascadeUNet,
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=32,
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=32,
        switch_level=(False,),
        dropout=(0.0, 0.0),
    )
    decoder = diffusers_model(
        StableCascadeUNet,
        seed=1,
        in_channels=4,
        out_channels=4,
        conditioning_dim=32,
        block_out_channels=(16, 16, 32, 32),
        num_attention_heads=(-1, -1, 1, 2),
        down_num_layers_per_block=(1, 1, 1, 1),
        up_num_layers_per_block=(1, 1, 1, 1),
        down_blocks_repeat_mappers=(1, 1, 1, 1),
        up_blocks_repeat_mappers=(3, 3, 2, 2),
        block_types_per_layer=(PLAIN, PLAIN, WITH_ATTENTION, WITH_ATTENTION),
        switch_level=None,
        clip_text_pooled_in_channels=32,
        dropout=(0.0, 0.0, 0.0, 0.0),
    )
    pipeline = StableCascadeCombinedPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=clip_text_encoder_with_projection(seed=11),
        decoder=decoder,
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=diffusers_model(PaellaVQModel, seed=5, bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16),
        prior_prior=prior,
        prior_text_encoder=clip_text_encoder_with_projection(seed=12),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=DDPMWuerstchenScheduler(),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 128,
        "width": 128,
        "prior_num_inference_steps": 4,
        "num_inference_steps": 4,
        "prior_guidance_scale": 4.0,
        "decoder_guidance_scale": 2.0,
    }
    return pipeline, request


def name_the_decoder_module(folder: Path, pipeline: DiffusionPipeline) -> None:
    """diffusers writes a library name for the VQ-GAN under which it no longer finds the class."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["vqgan"] = [PaellaVQModel.__module__, PaellaVQModel.__name__]
    path.write_text(json.dumps(index, indent=2))


MODELS = (TinyModel("stable_cascade", stable_cascade, after_save=name_the_decoder_module),)
