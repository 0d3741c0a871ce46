"""The check that users run passes for every tiny model, in whatever way its pipeline is split."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.devices import select_device
from deployments.messages import STAGES
from deployments.model import ModelArgs
from deployments.verify.asked import Asked
from deployments.verify.check import verify
from env_config.variables import EnvConfig
from tests.support.tiny_models import TINY_MODELS, checkpoint, tiny_patches

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

PROCESSES = tuple((stage,) for stage in STAGES)
MODELS = [name for name, model in TINY_MODELS.items() if model.after_load is None]


@pytest.mark.parametrize("name", MODELS)
def test_the_check_passes(name: str, checkpoints_root: Path) -> None:
    tiny_patches()
    env = EnvConfig.from_environ({"SGLANG_USE_RUNAI_MODEL_STREAMER": "false"})
    model = ModelArgs(path=str(checkpoint(name, checkpoints_root)), name=name)
    report = verify(model, PROCESSES, Asked(), env, select_device("cpu"))
    assert report.passed, "\n".join(report.lines())
