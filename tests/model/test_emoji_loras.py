"""The embedded styles: small files in diffusers' own format, which change how a thing looks and not what it is."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from safetensors.torch import load_file

from checkpoints.train.evaluate import generate, held_out_prompts
from checkpoints.train.pictures import Scene, render
from checkpoints.train.styles.evaluate import judge_style, load, use
from checkpoints.train.styles.measure import has_style
from checkpoints.train.styles.pictures import STYLES, styled

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
LORAS = CHECKPOINTS / "emoji-flux-loras"
PROMPTS, STEPS, TEXT_TOKENS = 4, 8, 32


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return load(CHECKPOINTS / "emoji-flux", LORAS)


@pytest.mark.parametrize("style", STYLES)
def test_held_out_prompts_come_out_in_the_style_and_with_their_noun(pipeline: FluxPipeline, style: str) -> None:
    wanted = held_out_prompts(PROMPTS)
    use(pipeline, {style: 1.0})
    made = generate(pipeline, [prompt for _, prompt in wanted], STEPS, TEXT_TOKENS)
    pictures = [np.asarray(picture) for picture in made]
    nouns = [judge_style(picture, style)[0] for picture in pictures]
    assert sum(noun == scene.noun for noun, (scene, _) in zip(nouns, wanted, strict=True)) >= PROMPTS - 1
    assert sum(has_style(picture, style) for picture in pictures) >= PROMPTS - 1


def test_no_style_is_seen_where_none_is_used(pipeline: FluxPipeline) -> None:
    use(pipeline, {})
    [picture] = generate(pipeline, ["a big fox on an orange background"], STEPS, TEXT_TOKENS)
    assert not any(has_style(np.asarray(picture), style) for style in STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_a_file_is_small_and_says_its_rank_and_alpha(pipeline: FluxPipeline, style: str) -> None:
    file = LORAS / f"{style}.safetensors"
    assert file.stat().st_size < 2_000_000
    _, metadata = FluxPipeline.lora_state_dict(file, return_lora_metadata=True)
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == pipeline.transformer.peft_config[style].r
    assert all(name.startswith("transformer.") for name in load_file(file))


@pytest.mark.parametrize("style", STYLES)
def test_the_judge_and_the_measure_know_a_drawn_picture(style: str) -> None:
    [other] = set(STYLES) - {style}
    assert judge_style(styled("snail", "big", style), style) == ("snail", "big")
    assert has_style(styled("snail", "big", style), style)
    assert not has_style(styled("snail", "big", other), style)
    assert not has_style(render(Scene("snail", "white", "big")), style)
    assert not has_style(render(Scene("snail", "black", "big")), style)
