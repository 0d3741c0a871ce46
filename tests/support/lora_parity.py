"""Requests with LoRAs through the stages against diffusers' own `load_lora_weights` and `set_adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.adapters.args import AdapterCacheArgs
from deployments.adapters.use import FEATURE, AdapterUse
from deployments.messages import GenerationRequest
from tests.support.engine_parity import MERGED_DEVIATION, NEVER_MERGED, deviation, handed_over
from tests.support.stage_parity import ANY_OUTPUT, SEED, assert_same
from tests.support.three_stages import ThreeStages
from tests.support.tiny_loras import TINY_LORAS, Scale, loadable_parts, unsplit_with_loras, write_lora
from tests.support.tiny_models import checkpoint, request_arguments, tiny_model
from tests.support.tiny_models.checkpoints import call

Used = Sequence[tuple[str, Scale]]  # of one request: the name of each LoRA, and its scale
KEEPS_NONE = AdapterCacheArgs(max_device_bytes=0, max_host_bytes=0)

# By family, the tiny models whose pipeline class loads LoRAs. The first of each goes through every check.
FAMILIES: dict[str, tuple[str, ...]] = {
    "FLUX": (
        "flux",
        "flux_truecfg",
        "flux_kontext",
        "flux_img2img",
        "flux_inpaint",
        "flux_fill",
        "flux_control",
        "flux_controlnet",
    ),
    "Chroma": ("chroma", "chroma_img2img"),
    "FLUX.2": ("klein", "klein_edit", "klein_kv", "flux2_dev", "flux2_dev_edit"),
    "Stable Diffusion 1.5": (
        "sd15",
        "sd15_safety",
        "sd15_img2img",
        "sd15_inpaint",
        "sd15_controlnet",
        "sd15_lcm",
        "animatediff",
    ),
    "SDXL": ("sdxl", "sdxl_ancestral", "sdxl_img2img", "sdxl_inpaint", "sdxl_controlnet"),
    "SD3": ("sd3", "sd3_img2img", "sd3_inpaint", "sd3_controlnet"),
    "Qwen-Image": (
        "qwenimage",
        "qwen_img2img",
        "qwen_inpaint",
        "qwen_controlnet",
        "qwenimage_edit",
        "qwen_edit_plus",
        "qwen_layered",
        "qwen_layered_caption",
        "qwen_layered_sample",
    ),
    "Z-Image": ("zimage", "zimage_img2img"),
    "Sana": ("sana", "sana_sprint", "sana_video"),
    "HiDream": ("hidream",),
    "Bria FIBO": ("bria_fibo",),
    "CogView4": ("cogview4",),
    "Lumina 2": ("lumina2",),
    "AuraFlow": ("auraflow",),
    "Kandinsky 5": ("kandinsky5_t2i",),
    "Wan": ("wan22", "wan21", "wan22_5b", "wan21_i2v", "wan21_flf2v", "wan22_i2v", "wan_vace", "wan_v2v"),
    "SkyReels": ("skyreels_v2", "skyreels_df", "skyreels_df_v2v"),
    "LTX": ("ltx", "ltx_tcond", "ltx_i2v", "ltx_condition"),
    "LTX-2": ("ltx2", "ltx2_i2v"),
    "HunyuanVideo": ("hunyuanvideo", "hunyuanvideo_i2v", "framepack"),
    "CogVideoX": ("cogvideox", "cogvideox_dpm", "cogvideox_i2v"),
    "Mochi": ("mochi",),
}
# Its loop feeds decoded frames back: `ThreeStages` knows the shortest hand-off alone.
NOT_TRIED = ("helios",)
LORA_MODELS = [name for names in FAMILIES.values() for name in names]


class LoraModel:
    """A tiny model with its files, served and unsplit."""

    def __init__(self, name: str, checkpoints_root: Path, folder: Path) -> None:
        self.name = name
        self.checkpoint = checkpoint(name, checkpoints_root)
        self.arguments = request_arguments(name)
        pipeline, _ = tiny_model(name).build()
        self.parts = loadable_parts(pipeline)
        self.files = {lora.name: write_lora(pipeline, lora, folder) for lora in TINY_LORAS}
        self._stages: dict[bool, ThreeStages] = {}

    def stages(self, in_one: bool = False) -> ThreeStages:
        """Three processes' worth of stages, or one that holds all."""
        if in_one not in self._stages:
            self._stages[in_one] = self.new_stages(in_one=in_one)
        return self._stages[in_one]

    def new_stages(self, **settings: Any) -> ThreeStages:
        stages = ThreeStages(self.checkpoint, **settings)
        after_load = tiny_model(self.name).after_load
        for stage in {id(each): each for each in stages.held.values()}.values() if after_load else ():
            after_load(stage.pipeline)
        return stages

    def request(self, used: Used, seed: int = SEED) -> GenerationRequest:
        uses = [
            AdapterUse(file.name, str(file.path), scale=scale, component=file.component).plain()
            for name, scale in used
            for file in self.files[name]
        ]
        return GenerationRequest(
            f"{'+'.join(name for name, _ in used) or 'none'}-{seed}",
            self.name,
            dict(self.arguments),
            seed,
            ANY_OUTPUT,
            features={FEATURE: uses} if uses else {},
        )

    def truth(self, used: Used) -> list[Any]:
        files = [(file, scale) for name, scale in used for file in self.files[name]]
        pipeline = unsplit_with_loras(self.checkpoint, files)
        return call(pipeline, dict(self.arguments), SEED)

    def scales(self, scale: float) -> dict[str, float]:
        """Another one for each component."""
        return {name: scale / (1 + index) for index, name in enumerate(self.parts)}

    def close(self) -> None:
        for stages in self._stages.values():
            stages.close()


def check_alone(model: LoraModel, placements: Sequence[bool] = (False, True)) -> None:
    """The bytes of diffusers, at a scale that is not 1 and with one for each component, in three processes' stages and
    in one's.
    """
    for used in ([("a", 0.7)], [("b", model.scales(0.8))]):
        truth = model.truth(used)
        for in_one in placements:
            assert_same(model.stages(in_one).make(model.request(used)), truth)


def check_three(model: LoraModel) -> None:
    """Three LoRAs of one request, whose ranks and layers differ, as diffusers adds them up."""
    used = [("a", 0.7), ("b", 0.5), ("c", -0.4)]
    assert_same(model.stages().make(model.request(used)), model.truth(used))


def check_scale_zero(model: LoraModel) -> None:
    """It changes no bit, as in diffusers."""
    none = model.stages().make(model.request([]))
    assert_same(none, model.truth([]))
    assert_same(model.stages().make(model.request([("b", 0.0)])), none)


def check_evicted(model: LoraModel) -> None:
    """With no budget at all: what a request used is gone when another one comes, and nobody sees that it was there."""
    stages = model.new_stages(adapter_cache=KEEPS_NONE)
    try:
        before = stages.make(model.request([]))
        with_a = stages.make(model.request([("a", 1.0)]))
        stages.make(model.request([("b", 1.0)]))
        assert stages.held["denoiser"].adapters.describe()["evictions"]["device"] > 0
        assert_same(stages.make(model.request([])), before)
        assert_same(stages.make(model.request([("a", 1.0)])), with_a)
    finally:
        stages.close()


def check_mixed(model: LoraModel) -> None:
    """Four requests of which no two neighbours have the same LoRAs share batches, and stay close to lone ones."""
    each: list[Used] = [[], [("a", 0.7)], [("b", 0.8)], [("a", 0.7)]]
    requests = [model.request(used, seed) for seed, used in enumerate(each)]
    stages = model.stages()
    alone = [handed_over(stages.hand_off(request), stages.held["denoiser"]) for request in requests]
    assert deviation(alone[1], alone[2]) > 100 * MERGED_DEVIATION, "the LoRAs show"
    stages.hand_off_together(requests)  # the first merges are checked against lone forwards, and those are handed out
    sizes = stages.denoiser.engine.statistics.batch_sizes
    sizes.clear()
    together = stages.hand_off_together(requests)
    for inputs, truth in zip(together, alone, strict=True):
        assert deviation(handed_over(inputs, stages.held["denoiser"]), truth) <= MERGED_DEVIATION
    are_mixed = max(sizes, default=1) > 2  # of four requests only two have the same LoRA
    assert are_mixed or model.name in NEVER_MERGED, sizes
