"""A text longer than its encoder reads is told as a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.messages import GenerationRequest, OutputFormat
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.encode import encode
from tests.support.tiny_models import checkpoint, request_arguments

LONG = "a very small red fox under a tree " * 60


def warned(name: str, root: Path, **changes: Any) -> list[tuple[str, str | None]]:
    stage = load_stage(checkpoint(name, root), ("encoder",))
    arguments = request_arguments(name) | changes
    request = GenerationRequest("r", "m", arguments, 1, OutputFormat("image", "png"))
    return [(warning.code, warning.param) for warning in encode(stage, request).warnings]


@pytest.mark.parametrize(
    ("name", "arguments", "cut"),
    [
        ("sd15", {}, []),
        ("sd15", {"prompt": LONG}, ["prompt"]),
        ("sd15", {"prompt": "a fox", "negative_prompt": LONG}, ["negative_prompt"]),
        ("flux", {"prompt": "a fox " * 30, "max_sequence_length": 16}, ["prompt"]),
        ("qwenimage", {"prompt": LONG}, ["prompt"]),
        ("qwenimage", {"prompt": "a fox"}, []),
        ("sd3", {"prompt": LONG}, ["prompt"]),
    ],
)
def test_a_text_that_is_cut_is_named(
    name: str, arguments: dict[str, Any], cut: list[str], checkpoints_root: Path
) -> None:
    assert warned(name, checkpoints_root, **arguments) == [("text_cut", param) for param in cut]
