"""The few models that show every mechanism of the split, through three processes, and what the stages hold."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from deployments.messages import STAGES, GenerationRequest
from deployments.stage_pipeline.loading import load_stage, stored_dtypes
from deployments.stage_pipeline.roles import read_layout
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, Result
from tests.support.further import further
from tests.support.parity_models import SPLIT_CORE
from tests.support.stage_parity import ANY_OUTPUT, SEED, assert_same, check_bfloat16, check_stages
from tests.support.stage_processes import StageProcesses
from tests.support.tiny_models import TINY_MODELS, checkpoint, request_arguments
from tests.support.tiny_models.checkpoints import call, load_unsplit

# What diffusers, torch and numpy deprecate in each other's code, pipeline by pipeline, is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", SPLIT_CORE)
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_stages(name, stages, checkpoints_root)


@pytest.mark.parametrize("name", ["flux", further("wan22")])
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline_in_bfloat16(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_bfloat16(name, stages, checkpoints_root)


def test_without_a_dtype_each_component_has_the_one_in_which_it_is_stored(
    stages: StageProcesses, checkpoints_root: Path, tmp_path: Path
) -> None:
    whole = load_unsplit(checkpoint("wan22", checkpoints_root), torch.bfloat16)
    whole.vae.float()
    whole.save_pretrained(tmp_path)
    arguments = request_arguments("wan22")
    held = stages.load(tmp_path)
    made = stages.generate(GenerationRequest("parity", "wan22", arguments, SEED, ANY_OUTPUT))
    assert_same(made, call(whole, arguments, SEED))
    assert held["denoiser"]["transformer"] <= sum(f.stat().st_size for f in (tmp_path / "transformer").glob("*.safe*"))
    stored = {"text_encoder": torch.bfloat16, "transformer": torch.bfloat16, "vae": torch.float32}
    for stage in STAGES:  # also where another process holds the weights
        pipeline = load_stage(tmp_path, (stage,)).pipeline
        assert {name: getattr(pipeline, name).dtype for name in stored} == stored


def test_a_component_whose_files_another_process_has_takes_the_dtype_of_its_configuration_or_of_the_others(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    load_unsplit(checkpoint("flux", checkpoints_root), torch.bfloat16).save_pretrained(tmp_path)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float16"))
    layout = read_layout(tmp_path)
    assert stored_dtypes(tmp_path, layout) == {
        "text_encoder": torch.float16,
        "text_encoder_2": torch.bfloat16,
        "transformer": torch.bfloat16,
        "vae": torch.bfloat16,
    }


def test_a_component_of_another_dtype_gives_what_diffusers_gives(checkpoints_root: Path) -> None:
    folder = checkpoint("wan22", checkpoints_root)
    arguments = request_arguments("wan22")
    whole = DiffusionPipeline.from_pretrained(folder, dtype={"default": torch.bfloat16, "vae": torch.float32})
    whole.set_progress_bar_config(disable=True)
    stage = load_stage(folder, dtype=torch.bfloat16, component_dtypes={"vae": torch.float32})
    made = DenoiseSession(stage, arguments, SEED, None).run()
    assert isinstance(made, Result)
    assert_same(torch.utils._pytree.tree_leaves(dict(made.output)), call(whole, arguments, SEED))


@pytest.mark.parametrize("name", ["flux", further("wan22")])
def test_the_stages_hold_the_whole_and_only_the_autoencoder_twice_at_most(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    folder = checkpoint(name, checkpoints_root)
    held = stages.load(folder)
    whole = load_stage(folder)
    autoencoder = sum(whole.weight_bytes()[name] for name in whole.layout.autoencoders)
    assert sum(whole.weight_bytes().values()) <= total(held) <= sum(whole.weight_bytes().values()) + autoencoder
    halves = held["encoder"]["vae"] + held["vae"]["vae"]
    assert halves < 1.1 * autoencoder, "each end holds its half of the autoencoder"


def test_no_code_of_the_split_or_the_engine_names_a_model() -> None:
    families = {word for name in TINY_MODELS for word in name.split("_") if len(word) > 3 and not word.isdigit()}
    families -= {"edit", "control", "controlnet", "pixel", "caption", "sample", "layered", "video", "image", "alpha"}
    families -= {"audio"}  # a medium
    families |= {"flux", "wan2", "qwen", "sdxl", "sana", "pixart", "hunyuan", "cogvideo"}
    families -= {"inpaint", "img2img", "safety", "ancestral", "condition", "plus", "video", "lora", "fill", "stable"}
    folders = [Path("deployments/stage_pipeline"), Path("deployments/denoising"), Path("deployments/engine")]
    code = {file: file.read_text() for folder in folders for file in folder.rglob("*.py")}
    del code[Path("deployments/stage_pipeline/tasks.py")]  # data for the routes, by name; the split does not ask it
    del code[
        Path("deployments/stage_pipeline/modular/output_classes.py")
    ]  # outputs by their fields, whoever makes them
    assert len(code) > 15
    some_family = re.compile("|".join(families), re.IGNORECASE)
    spoken_of = {file: without_comments(text).lower() for file, text in code.items() if some_family.search(text)}
    # A comment may say for which family a rule was needed; a string or a name in the code may not.
    assert [(file.name, family) for file, text in spoken_of.items() for family in families if family in text] == []


def without_comments(text: str) -> str:
    """The code without docstrings and comments."""
    return ast.unparse(WithoutDocstrings().visit(ast.parse(text)))


class WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else node


def total(held: dict[Any, dict[str, int]]) -> int:
    return sum(sum(components.values()) for components in held.values())
