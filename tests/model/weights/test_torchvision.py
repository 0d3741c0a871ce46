"""Without torchvision, a processor that needs it is named with the line to type."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from deployments.errors import CheckpointError
from deployments.stage_pipeline.loading import load_stage
from deployments.weights.vision import lack_of_torchvision
from tests.support.tiny_models import checkpoint
from tests.support.tiny_models.tokenizers import qwen2_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"),
]


@pytest.fixture
def processor(tmp_path: Path) -> Path:
    """A processor's folder as published ones are; the parts that its class makes of it need torchvision."""
    folder = tmp_path / "processor"
    qwen2_tokenizer().save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "PixtralProcessor"])
def test_a_processor_that_needs_torchvision_is_named_with_the_line_to_type(name: str, processor: Path) -> None:
    sentence = lack_of_torchvision(processor.parent, {"processor": getattr(transformers, name)})
    assert sentence is not None
    assert f"{name} in {processor} needs torchvision" in sentence
    assert "pip install 'triptych[vision]'" in sentence


def test_what_loads_or_fails_for_another_reason_needs_none(processor: Path) -> None:
    classes: dict[str, Any] = {"processor": transformers.CLIPImageProcessor, "tokenizer": transformers.CLIPTokenizer}
    assert lack_of_torchvision(processor.parent, classes) is None
    shutil.rmtree(processor)
    assert lack_of_torchvision(processor.parent, classes) is None


def test_a_checkpoint_with_such_a_processor_does_not_start(processor: Path, checkpoints_root: Path) -> None:
    folder = shutil.copytree(checkpoint("qwenimage_edit", checkpoints_root), processor.parent / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"QwenImageEditPipeline in .* Qwen2VLProcessor in .*pip install 'trip"):
        load_stage(folder, ("vae",))
