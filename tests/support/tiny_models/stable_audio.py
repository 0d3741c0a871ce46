"""Stable Audio: sound instead of pictures, a projection model after the text encoder."""

from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer


def stable_audio() -> PipelineAndRequest:
    transformer = diffusers_model(
        StableAudioDiTModel,
        sample_size=16,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = diffusers_model(
        AutoencoderOobleck,
        seed=5,
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    # Published checkpoints use CosineDPMSolverMultistepScheduler, which needs torchsde.
    scheduler = EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    pipeline = StableAudioPipeline(
        vae=vae,
        text_encoder=t5_encoder(),
        projection_model=diffusers_model(
            StableAudioProjectionModel, text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
        ),
        tokenizer=t5_tokenizer(model_max_length=25),
        transformer=transformer,
        scheduler=scheduler,
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "num_inference_steps": 6,
        "guidance_scale": 6.0,
    }
    return pipeline, request


MODELS = (TinyModel("stable_audio", stable_audio),)
