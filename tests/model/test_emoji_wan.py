"""The embedded text-to-video model: what its training assumes, and that it draws what a prompt asks for."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch.testing import assert_close

from checkpoints.train.clip_judge import difference_from_target_clip, judge_clip
from checkpoints.train.clip_latents import clip_latents, clip_videos
from checkpoints.train.clip_prompts import plain_prompt, random_prompt, words
from checkpoints.train.clips import DIRECTIONS, Clip, all_clips, held_out_clips, render_clip, training_clips
from checkpoints.train.evaluate_video import generate, held_out_prompts
from checkpoints.train.train_wan_decoder import run_first_level
from checkpoints.train.train_wan_encoder import encode
from checkpoints.train.wan_decoder import first_blocks, set_decoder
from checkpoints.train.wan_parts import WanParts
from checkpoints.train.wan_vae import build_vae

MODEL = Path(__file__).resolve().parents[2] / "checkpoints" / "emoji-wan"


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    loaded = WanPipeline.from_pretrained(MODEL)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.rest
def test_it_draws_what_held_out_prompts_ask_for(pipeline: WanPipeline) -> None:
    wanted = held_out_prompts(6)
    videos = generate(pipeline, [prompt for _, prompt in wanted], steps=12, batch_size=6)
    seen = [judge_clip(frames) for frames in videos]
    right = sum(saw == clip for saw, (clip, _) in zip(seen, wanted, strict=True))
    assert right >= 5, [(saw, clip) for saw, (clip, _) in zip(seen, wanted, strict=True) if saw != clip]


@pytest.mark.rest
def test_it_has_wan22s_two_transformers_and_both_run(pipeline: WanPipeline) -> None:
    calls = []
    for name in ("transformer", "transformer_2"):
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    generate(pipeline, ["a cat moving left on a blue background"], steps=12)
    first_low = calls.index("transformer_2")
    assert 0 < first_low < 12
    assert calls == ["transformer"] * first_low + ["transformer_2"] * (12 - first_low)


def test_unknown_words_are_no_error(pipeline: WanPipeline) -> None:
    frames = generate(pipeline, ["Übermäßige Zärtlichkeit, 貓 🐈 at dawn; (sic!)"], steps=2)[0]
    assert frames.shape == (17, 64, 64, 3)


def test_capitals_change_nothing(pipeline: WanPipeline) -> None:
    small, capitals = "a fox moving up on a green background", "A FOX moving Up on a GREEN background"
    (embedded, _), (shouted, _) = (
        pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)
        for prompt in (small, capitals)
    )
    assert_close(embedded, shouted)


def test_nothing_held_out_is_trained_on() -> None:
    held_out, trained = held_out_clips(), training_clips()
    assert not set(held_out) & set(trained)
    assert len(held_out) + len(trained) == len(all_clips())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_judge_knows_a_rendered_clip(direction: str) -> None:
    clip = Clip("snail", direction, "pink")
    assert judge_clip(render_clip(clip)) == clip
    assert difference_from_target_clip(render_clip(clip), clip) == 0.0


def test_the_judge_is_not_fooled_by_a_clip_played_backwards() -> None:
    assert judge_clip(render_clip(Clip("car", "left", "red"))[::-1]) == Clip("car", "right", "red")


def test_every_word_of_a_prompt_is_one_token() -> None:
    parts = WanParts()
    assert len(parts.tokenizer(" ".join(words())).input_ids) == len(words()) + 1  # and the end


@pytest.mark.rest
def test_a_latent_frame_holds_the_cells_of_the_one_before_at_the_next_place() -> None:
    latents = clip_latents([Clip("robot", "down", "yellow")])[0, :12]
    for frame in range(4):
        assert_close(latents[:, frame + 1, 1:], latents[:, frame, :-1])


@pytest.mark.rest
@pytest.mark.parametrize("direction", ["left", "down"])
def test_the_decoder_that_was_worked_out_moves_the_emoji_without_any_training(direction: str) -> None:
    clip = Clip("robot", direction, "orange")
    vae = build_vae()
    set_decoder(vae)
    with torch.no_grad():
        decoded = vae.decode(clip_latents([clip])).sample[0]
    frames = ((decoded.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert judge_clip(frames) == clip
    assert difference_from_target_clip(frames, clip) < 0.06  # 12 of 192 principal components: soft


@pytest.mark.rest
def test_training_runs_the_decoders_first_level_as_the_vae_does() -> None:
    vae = build_vae()
    set_decoder(vae)
    for block in first_blocks(vae.decoder):
        torch.nn.init.normal_(block.conv2.weight[:20, :, -1], std=0.05)
    seen = []
    vae.decoder.up_blocks[0].upsamplers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    latents = clip_latents([Clip("bee", "up", "white")])
    with torch.no_grad():
        vae.decode(latents)
        assert_close(run_first_level(vae, latents[0].transpose(0, 1)), torch.cat(seen)[:, :, 0], atol=1e-3, rtol=1e-4)


@pytest.mark.rest
def test_training_encodes_as_the_vae_does() -> None:
    vae, video = build_vae(), clip_videos([Clip("bee", "up", "white")])
    with torch.no_grad():
        assert_close(encode(vae, video)[0], vae.encode(video).latent_dist.mean)


@pytest.mark.rest
def test_training_encodes_and_denoises_as_the_pipeline_does() -> None:
    """One padding token with a bias stands for all; attention in float32; the same numbers as WanPipeline's way."""
    torch.manual_seed(0)
    parts = WanParts().eval()
    pipeline = WanPipeline(
        parts.tokenizer, parts.text_encoder, build_vae(), None, parts.transformer, boundary_ratio=None
    )
    prompts = ["a cat moving left on a blue background", "fox"]
    noisy = torch.randn(2, 16, 5, 8, 8)
    with torch.no_grad():
        embedded, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        wanted = parts.transformer(noisy, torch.tensor([950.0, 400.0]), embedded, return_dict=False)[0]
        velocity = parts(noisy, torch.tensor([0.95, 0.4]), prompts, padded_length=512)
    assert_close(velocity, wanted, atol=1e-4, rtol=1e-4)


def test_a_paraphrase_says_the_same() -> None:
    clip = Clip("soccer ball", "up", "purple")
    assert plain_prompt(clip) == "a soccer ball moving up on a purple background"
    for seed in range(50):
        prompt = random_prompt(clip, random.Random(seed))
        assert "up" in prompt
        assert "ball" in prompt  # soccer ball, football
        assert "purple" in prompt or "violet" in prompt
