"""The other modular pipelines through three processes, and through the engine."""

from pathlib import Path

import pytest

from tests.support.engine_parity import check_engine
from tests.support.resuming_process import ResumingProcess
from tests.support.stage_parity import check_bfloat16, check_stages
from tests.support.stage_processes import StageProcesses
from tests.support.tiny_models import MODULAR_MODELS

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", MODULAR_MODELS)
def test_three_stages_make_the_bytes_of_the_unsplit_modular_pipeline(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_stages(name, stages, checkpoints_root)


@pytest.mark.parametrize("name", MODULAR_MODELS)
def test_the_engine_changes_no_bit_alone_little_merged_and_none_by_a_resume_elsewhere(
    name: str, checkpoints_root: Path, other_process: ResumingProcess
) -> None:
    check_engine(name, checkpoints_root, other_process)


def test_three_stages_make_the_bytes_of_the_unsplit_modular_pipeline_in_bfloat16(
    stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_bfloat16("modular_qwenimage", stages, checkpoints_root)
