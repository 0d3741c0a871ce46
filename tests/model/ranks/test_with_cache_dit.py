"""Models that only cache-dit has a plan for: on two ranks close to one process, and the same bytes each time.

The last file of its folder by name: once a process has loaded the plans, diffusers' attention is cache-dit's, and its
collectives are no longer those of a rank that has not loaded them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HunyuanImageTransformer2DModel

from deployments.engine.batching.closeness import is_same
from deployments.modules import AccelerationError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.splits import check_splits
from tests.support.engine_parity import Stages, assert_same_bits, deviation
from tests.support.further import all_but
from tests.support.ranks import modules_on_ranks, stages_on_ranks
from tests.support.split_modules import Arguments, noise, padded
from tests.support.tiny_models import checkpoint
from tests.support.tiny_models.random_weights import diffusers_model

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

DEVIATION = 2e-5  # of the largest value, in float32, after all steps
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A tiny model; `arguments` in place of its own, of other lengths."""

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = {
    "hunyuanvideo": Case("hunyuanvideo"),
    "hunyuan_image": Case("hunyuan_image"),
    "cogvideox": Case("cogvideox"),
    "cogview4": Case("cogview4"),
    "kandinsky5_t2i": Case("kandinsky5_t2i"),
    "skyreels_v2, 3 tokens": Case("skyreels_v2"),
    "skyreels_v2, 12 tokens": Case("skyreels_v2", {"height": 32, "width": 32}),
}


@pytest.mark.parametrize("case", all_but(["cogview4"], CASES))
def test_two_ranks_make_what_one_process_makes(case: str, checkpoints_root: Path) -> None:
    folder = checkpoint(CASES[case].model, checkpoints_root)
    before = Stages(folder)
    request = before.request(0, deterministic=True, steps=STEPS)
    request.arguments.update(CASES[case].arguments)
    truth = before.plain(request)
    before.close()
    with stages_on_ranks(folder, {"ulysses": 2}) as stages:
        numbers, _ = stages.alone(request)
        print(f"{case}: {deviation(numbers, truth):.1e}")
        again, _ = stages.alone(request)
        executor: Any = stages.denoiser.engine.executor
        assert any(way is not None for way in executor._ways.values()), "rank 0 made all forwards alone"
        assert deviation(numbers, truth) <= DEVIATION
        assert_same_bits(again, numbers)


@pytest.mark.rest
@torch.no_grad()
def test_four_ranks_cut_a_mask_as_what_it_masks(caplog: pytest.LogCaptureFixture) -> None:
    """Of 10 tokens of text cache-dit's plan gives the ranks 3, 3, 3 and 1 of the mask, the last 3 padding; of 9
    three ranks have all."""
    with modules_on_ranks({"image": hunyuan_image}, None, ulysses=4) as (group, executor):
        module: Any = executor._modules["image"]
        split = group.met.splits["image"]
        for text, by_ranks in ((10, True), (9, False)):
            arguments = of_hunyuan_image(text)
            made = [executor.run("image", module, None, arguments) for _ in range(2)]
            with split.whole():
                alone = module(**arguments)
            apart = float((made[0][0] - alone[0]).abs().max() / alone[0].abs().max())
            print(f"{text} tokens of text: {apart:.1e}")
            assert apart <= DEVIATION
            assert is_same(*made)
            told = "rank 0 computes forwards of image alone: of such sizes the ranks cannot make them"
            assert (told in caplog.text) is not by_ranks
        assert group.lost is None


def hunyuan_image() -> torch.nn.Module:
    return diffusers_model(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=16,
        rope_axes_dim=(4, 4),
    )


def of_hunyuan_image(text: int) -> Arguments:
    """14 tokens of a picture."""
    return {
        "hidden_states": noise(1, 4, 2, 7),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, text, 16, seed=1),
        "encoder_attention_mask": padded(text),
        "return_dict": False,
    }


def test_a_plan_of_cache_dit_that_is_for_another_model_is_refused_and_leaves_nothing() -> None:
    """Plans are found by the names of classes."""
    module = type("HunyuanVideoTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(AccelerationError, match="cache-dit is not for HunyuanVideoTransformer3DModel as it is here"):
        check_splits({"transformer": module}, ParallelArgs(ulysses=2), torch.device("cpu"))
    assert not hasattr(module, "_cp_config")


def test_beside_another_attention_a_plan_of_cache_dit_is_refused() -> None:
    module = type("CogVideoXTransformer3DModel", (torch.nn.Module,), {})()
    module.processor = SimpleNamespace(_attention_backend="flash")
    with pytest.raises(AccelerationError, match="its attention is 'flash', and cache-dit's plan"):
        check_splits({"transformer": module}, ParallelArgs(ulysses=2), torch.device("cpu"))
