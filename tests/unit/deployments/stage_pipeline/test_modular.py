"""A modular pipeline is read from its index and its blocks: its call, what it makes, and which stage needs what."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)

from deployments.errors import CheckpointError
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.modular.blocks import leaves, order_of_use, private_blocks
from deployments.stage_pipeline.modular.pipeline import called_class
from deployments.stage_pipeline.outputs import media_kind
from deployments.stage_pipeline.roles import read_layout
from deployments.stage_pipeline.tasks import tasks_of

HINTS = {
    "text_encoder": ("transformers", "Qwen3Model"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}


def entry(name: str, **changed: Any) -> list[Any]:
    said = {"type_hint": HINTS[name], "pretrained_model_name_or_path": "org/model", "subfolder": name}
    return [*HINTS[name], said | changed]


def write_index(folder: Path, **changed: Any) -> Path:
    named = {"_class_name": "ZImageModularPipeline", "_blocks_class_name": "ZImageAutoBlocks"}
    entries = named | {name: entry(name) for name in HINTS} | changed
    (folder / "modular_model_index.json").write_text(json.dumps(entries))
    return folder


def test_the_stages_of_a_modular_pipeline_are_told_from_its_blocks(tmp_path: Path) -> None:
    layout = read_layout(write_index(tmp_path))
    assert layout.pipeline_class.__name__ == "ZImageModularPipeline"
    assert set(layout.classes) == set(HINTS)
    assert layout.stages_of == {"text_encoder": {"encoder"}, "transformer": {"denoiser"}, "vae": {"encoder", "vae"}}


def test_its_call_takes_the_inputs_of_its_blocks_and_the_settings_of_its_guider(tmp_path: Path) -> None:
    pipeline_class = read_layout(write_index(tmp_path)).pipeline_class
    parameters, required = call_parameters(pipeline_class)
    assert {"prompt", "image", "strength", "num_inference_steps", "guidance_scale", "enabled"} <= set(parameters)
    assert required == (), "what an earlier block makes is no input that must be given"
    assert (parameters["num_images_per_prompt"], parameters["guidance_scale"]) == (1, 5.0)
    assert "Args:" in (inspect.getdoc(pipeline_class.__call__) or "")


def test_what_it_makes_and_can_be_asked_is_told_as_of_other_pipelines(tmp_path: Path) -> None:
    pipeline_class = read_layout(write_index(tmp_path)).pipeline_class
    assert media_kind(pipeline_class) == "image"
    assert tasks_of(pipeline_class, "image") == ("text_to_image", "image_to_image")


def test_a_mask_that_some_workflows_do_without_may_be_left_out() -> None:
    unloaded = diffusers.QwenImageModularPipeline()
    pipeline_class = called_class(unloaded, {}, {}, {})
    assert tasks_of(pipeline_class, "image") == ("text_to_image", "image_to_image", "inpainting")
    assert call_parameters(pipeline_class)[1] == ("prompt",)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"_class_name": "NoSuchModularPipeline"}, "names the modular pipeline 'NoSuchModularPipeline', which"),
        ({"_class_name": "ModularPipeline"}, "names the modular pipeline 'ModularPipeline'"),
        ({"_class_name": "FluxPipeline"}, "names the modular pipeline 'FluxPipeline'"),
        ({"_blocks_class_name": "MyBlocks"}, r"blocks of its own \(MyBlocks\)"),
        ({"vae": entry("vae", type_hint=("diffusers", "NoSuchModel"))}, r"cannot be read"),
        ({"vae": entry("vae", type_hint=("json", "JSONDecoder"))}, "names no class for vae that loads it"),
        ({"vae": [None, None, {}]}, "cannot be read"),
        ({"transformer": entry("transformer", pretrained_model_name_or_path=None)}, "has no denoising model"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read_layout(write_index(tmp_path, **changed))


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "modular_config.json").write_text('{"auto_map": {"ModularPipelineBlocks": "block.MyBlock"}}')
    (tmp_path / "block.py").write_text("raise AssertionError('it was run')")
    with pytest.raises(CheckpointError, match="is not run"):
        read_layout(write_index(tmp_path))


class Block(ModularPipelineBlocks):
    """Uses a component; adds a text to the state."""

    uses: tuple[str, ...] = ()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name) for name in self.uses]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("prompt")]

    def __call__(self, pipeline: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        state.set("read", state.get("prompt") + "!", "embeds")
        return pipeline, state


def block(*uses: str) -> type[Block]:
    return type("Uses", (Block,), {"uses": uses})


class Loop(LoopSequentialPipelineBlocks):
    block_classes, block_names = (block("transformer", "scheduler"),), ("denoiser",)


class Whole(SequentialPipelineBlocks):
    block_classes = (block("encoder", "checker"), block("transformer"), Loop, block("vocoder", "checker"))
    block_names = ("text", "prepare", "denoise", "decode")


def test_what_both_ends_use_is_left_out_of_the_order_and_the_loop_stands_after_all_before_it() -> None:
    assert order_of_use(Whole()) == "encoder-transformer-scheduler-vocoder"


def test_a_block_that_only_encodes_is_run_by_the_pipeline_and_its_outputs_join_the_state() -> None:
    asked: list[tuple[str, Any]] = []

    class Pipeline:
        def encode_block(self, path: str, values: dict[str, Any]) -> Any:
            asked.append((path, values))
            return [["read", "elsewhere", "embeds"]]

    stages = {"encoder": {"encoder"}, "checker": {"encoder"}, "transformer": {"denoiser"}}
    copied = dict(leaves(private_blocks(Whole(), stages)))
    _, state = copied["/text"](Pipeline(), PipelineState({"prompt": "a fox"}))
    assert asked == [("/text", {"prompt": "a fox"})]
    assert state.get_by_kwargs("embeds") == {"read": "elsewhere"}
    copied["/prepare"](Pipeline(), state)
    assert state.get("read") == "a fox!"
    assert len(asked) == 1
