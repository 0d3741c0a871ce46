"""Z-Image: text to image and image to image; its transformer takes lists of pictures and of ragged texts."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import qwen3_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import qwen2_tokenizer


def zimage() -> PipelineAndRequest:
    transformer = diffusers_model(
        ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen2_tokenizer(),
        transformer=transformer,
        vae=kl_autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "max_sequence_length": 64,
    }
    return pipeline, request


def zimage_img2img() -> PipelineAndRequest:
    pipeline, request = zimage()
    request |= {"image": noise_image(32), "strength": 0.8, "num_inference_steps": 6}
    return ZImageImg2ImgPipeline(**pipeline.components), request


MODELS = (
    TinyModel("zimage", zimage),
    TinyModel("zimage_img2img", zimage_img2img),
)
