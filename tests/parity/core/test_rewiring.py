"""Pipelines that rewire their denoiser or have none, through three processes."""

from pathlib import Path

import pytest

from tests.support.engine_parity import check_engine
from tests.support.further import further
from tests.support.resuming_process import ResumingProcess
from tests.support.stage_parity import check_stages
from tests.support.stage_processes import StageProcesses

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", ["sd15_pag", further("sd15_sag"), "ltx_upsample"])
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline(
    name: str, stages: StageProcesses, checkpoints_root: Path
) -> None:
    check_stages(name, stages, checkpoints_root)


@pytest.mark.rest
def test_forwards_that_are_rewired_alike_change_no_bit_alone_little_merged_and_none_by_a_resume_elsewhere(
    checkpoints_root: Path, other_process: ResumingProcess
) -> None:
    check_engine("sd15_pag", checkpoints_root, other_process)
