"""A modular pipeline through three processes, the engine and on in another process."""

from pathlib import Path

import pytest

from tests.support.engine_parity import check_engine
from tests.support.resuming_process import ResumingProcess
from tests.support.stage_parity import check_stages
from tests.support.stage_processes import StageProcesses

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

NAME = "modular_zimage"


def test_three_stages_make_the_bytes_of_the_unsplit_modular_pipeline(
    stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_stages(NAME, stages, checkpoints_root)


@pytest.mark.rest
def test_the_engine_changes_no_bit_alone_little_merged_and_none_by_a_resume_elsewhere(
    checkpoints_root: Path, other_process: ResumingProcess
) -> None:
    check_engine(NAME, checkpoints_root, other_process)
