"""Pipelines that hand the request's generator to torch by themselves, together with their device."""

from diffusers import LTXImageToVideoPipeline

from tests.support.tiny_models.ltx import ltx_autoencoder, ltx_i2v
from tests.support.tiny_models.pictures import noise_image, noise_video
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.wan import helios


def ltx_i2v_tcond() -> PipelineAndRequest:
    """The noise that goes to a decoder with time steps."""
    pipeline, request = ltx_i2v()
    components = pipeline.components | {"vae": ltx_autoencoder(timestep_conditioning=True)}
    changes = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    return LTXImageToVideoPipeline(**components), {**request, **changes}


def helios_i2v() -> PipelineAndRequest:
    """How much noise the given picture gets."""
    pipeline, request = helios()
    return pipeline, {**request, "image": noise_image(16)}


def helios_v2v() -> PipelineAndRequest:
    """How much noise each given frame gets."""
    pipeline, request = helios()
    return pipeline, {**request, "video": noise_video(18)}


MODELS = (
    TinyModel("ltx_i2v_tcond", ltx_i2v_tcond),
    TinyModel("helios_i2v", helios_i2v),
    TinyModel("helios_v2v", helios_v2v),
)
