"""Which stage needs which component, told from what each does and from the order in which a pipeline offloads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    FluxTransformer2DModel,
    ModelMixin,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPVisionModelWithProjection, SpeechT5HifiGan, T5EncoderModel

from deployments.errors import CheckpointError
from deployments.stage_pipeline.roles import (
    assign_stages,
    component_class,
    denoising_models,
    is_autoencoder,
    is_denoiser,
    read_layout,
)

ENCODER, DENOISER, VAE = frozenset({"encoder"}), frozenset({"denoiser"}), frozenset({"vae"})
BOTH_ENDS = ENCODER | VAE


class Vocoder(ModelMixin):
    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        return spectrogram


@pytest.mark.parametrize(
    ("sequence", "models", "expected"),
    [
        (
            "text_encoder->text_encoder_2->transformer->vae",
            {
                "text_encoder": CLIPTextModel,
                "text_encoder_2": T5EncoderModel,
                "transformer": FluxTransformer2DModel,
                "vae": AutoencoderKL,
            },
            {"text_encoder": ENCODER, "text_encoder_2": ENCODER, "transformer": DENOISER, "vae": BOTH_ENDS},
        ),
        (
            "text_encoder->transformer->transformer_2->vae",
            {
                "text_encoder": T5EncoderModel,
                "transformer": WanTransformer3DModel,
                "transformer_2": WanTransformer3DModel,
                "vae": AutoencoderKLWan,
            },
            {"text_encoder": ENCODER, "transformer": DENOISER, "transformer_2": DENOISER, "vae": BOTH_ENDS},
        ),
        (
            "text_encoder->unet->vae",  # the ControlNet is missing, as diffusers has it
            {
                "text_encoder": CLIPTextModel,
                "unet": UNet2DConditionModel,
                "controlnet": ControlNetModel,
                "vae": AutoencoderKL,
            },
            {"text_encoder": ENCODER, "unet": DENOISER, "controlnet": DENOISER, "vae": BOTH_ENDS},
        ),
        (
            "text_encoder->unet->vocoder",
            {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vocoder": Vocoder},
            {"text_encoder": ENCODER, "unet": DENOISER, "vocoder": VAE},
        ),
        (
            None,
            {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel},
            {"text_encoder": ENCODER, "unet": DENOISER},
        ),
        (
            "unet->vocoder->image_encoder->text_encoder",  # as Kandinsky's combined pipelines have it
            {
                "text_encoder": CLIPTextModel,
                "image_encoder": CLIPVisionModelWithProjection,
                "unet": UNet2DConditionModel,
                "vocoder": SpeechT5HifiGan,
            },
            {"text_encoder": ENCODER, "image_encoder": ENCODER, "unet": DENOISER, "vocoder": VAE},
        ),
    ],
    ids=["flux", "two transformers", "controlnet", "after the denoiser", "no sequence", "encoders last"],
)
def test_components_are_given_to_the_stages_that_call_them(
    sequence: str | None, models: dict[str, type], expected: dict[str, Any]
) -> None:
    assert assign_stages(sequence, models) == expected


@pytest.mark.parametrize("separator", ["->", "-", "->>", "-->"])
def test_a_misspelt_arrow_in_the_sequence_means_the_same(separator: str) -> None:
    models = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vocoder": Vocoder}
    assert assign_stages(separator.join(models), models) == {"text_encoder": ENCODER, "unet": DENOISER, "vocoder": VAE}


NAMED = st.dictionaries(
    st.from_regex(r"[a-z]{1,6}(_[2-9])?", fullmatch=True),
    st.sampled_from([CLIPTextModel, FluxTransformer2DModel, AutoencoderKL, Vocoder]),
    max_size=6,
)


@given(NAMED, st.none() | st.text(alphabet="abc->_ 2", max_size=20))
def test_every_model_has_a_stage_and_denoisers_have_their_own_whatever_the_sequence_says(
    models: dict[str, type], sequence: str | None
) -> None:
    stages = assign_stages(sequence, models)
    assert stages.keys() == models.keys()
    assert all(stages.values())
    for name, needed in stages.items():
        assert ("denoiser" in needed) == (needed == DENOISER)
        assert (name in denoising_models(models)) == (needed == DENOISER)
        assert not is_autoencoder(models[name]) or needed == BOTH_ENDS


def test_models_without_a_time_step_denoise_only_by_their_name() -> None:
    assert not is_denoiser("vocoder", Vocoder)
    assert is_denoiser("transformer_2", Vocoder)
    assert not is_denoiser("transformer", T5EncoderModel)
    assert not is_denoiser("unet", AutoencoderKL)


def test_without_a_denoiser_what_else_works_on_latents_has_its_stage() -> None:
    models = {"vae": AutoencoderKL, "latent_upsampler": Vocoder, "text_encoder": CLIPTextModel}
    assert denoising_models(models) == ["latent_upsampler"]
    assert denoising_models(models | {"unet": UNet2DConditionModel}) == ["unet"]
    assert denoising_models({"vae": AutoencoderKL, "text_encoder": CLIPTextModel}) == []


def write_index(folder: Path, **entries: Any) -> Path:
    (folder / "model_index.json").write_text(json.dumps(entries))
    return folder


def test_a_layout_is_read_from_the_index_alone(tmp_path: Path) -> None:
    layout = read_layout(
        write_index(
            tmp_path,
            _class_name="FluxPipeline",
            _diffusers_version="0.42.1",
            scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
            text_encoder=["transformers", "CLIPTextModel"],
            text_encoder_2=["transformers", "T5EncoderModel"],
            tokenizer=["transformers", "CLIPTokenizer"],
            transformer=["diffusers", "FluxTransformer2DModel"],
            vae=["diffusers", "AutoencoderKL"],
            image_encoder=[None, None],
        )
    )
    assert layout.pipeline_class.__name__ == "FluxPipeline"
    assert set(layout.models) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert layout.denoisers == ("transformer",)
    assert layout.autoencoders == layout.decoders == ("vae",)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"_class_name": "NoSuchPipeline"}, "names the pipeline 'NoSuchPipeline', which diffusers .* lacks"),
        ({"_class_name": 3}, "names the pipeline 3"),
        ({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}, "has no denoising model among"),
        ({"_class_name": "FluxPipeline", "vae": ["nowhere", "Model"]}, r"needs nowhere\.Model, which cannot be"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(entries: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_layout(write_index(tmp_path, **entries))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "it is empty"),
        (b"{", "it is no JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"[]", "must hold a JSON object"),
        (b'"FluxPipeline"', "must hold a JSON object"),
        (b"{}", "names the pipeline None"),
        (b'{"_class_name": "AutoencoderKL"}', "names the pipeline 'AutoencoderKL'"),
        (b'{"_class_name": "__version__"}', "names the pipeline '__version__'"),
        (b'{"_class_name": ["pipeline", "MyPipeline"]}', "names the pipeline \\['pipeline', 'MyPipeline'\\]"),
        (b'{"_class_name": "FluxPipeline", "vae": ["diffusers", "NoSuchModel"]}', r"needs diffusers\.NoSuchModel"),
        (b'{"_class_name": "FluxPipeline", "vae": [".here", "Model"]}', r"needs \.here\.Model"),
        (b'{"_class_name": "FluxPipeline", "vae": ["diffusers"]}', r"says \['diffusers'\] of 'vae'"),
        (b'{"_class_name": "FluxPipeline", "vae": [null, "AutoencoderKL"]}', "says .* of 'vae'"),
        (b'{"_class_name": "FluxPipeline", "vae": ["", "AutoencoderKL"]}', "says .* of 'vae'"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused_by_its_name(text: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        read_layout(tmp_path)
    assert "model_index.json" in str(refusal.value)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        read_layout(tmp_path)


def test_a_class_of_a_pipelines_own_module_is_found() -> None:
    assert (
        component_class("stable_diffusion", "StableDiffusionSafetyChecker").__name__ == "StableDiffusionSafetyChecker"
    )
