"""All other models through three processes that hold one stage each."""

from pathlib import Path

import pytest

from tests.support.parity_models import SPLIT_REST
from tests.support.stage_parity import check_bfloat16, check_stages
from tests.support.stage_processes import StageProcesses

# What diffusers, torch and numpy deprecate in each other's code, pipeline by pipeline, is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", SPLIT_REST)
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_stages(name, stages, checkpoints_root)


@pytest.mark.parametrize("name", ["sdxl", "qwenimage"])
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline_in_bfloat16(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_bfloat16(name, stages, checkpoints_root)
