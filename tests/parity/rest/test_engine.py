"""All other models through the engine and on in another process."""

from pathlib import Path

import pytest

from tests.support.engine_parity import check_cached_resume, check_engine
from tests.support.parity_models import CACHED_REST, ENGINE_REST
from tests.support.resuming_process import ResumingProcess

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", ENGINE_REST)
def test_the_engine_changes_no_bit_alone_little_merged_and_none_by_a_resume_elsewhere(
    name: str, checkpoints_root: Path, other_process: ResumingProcess
) -> None:
    check_engine(name, checkpoints_root, other_process)


@pytest.mark.parametrize(("name", "settings"), CACHED_REST)
def test_a_cached_request_resumes_elsewhere_with_the_same_bits_whatever_runs_beside_it(
    name: str, settings: str, checkpoints_root: Path, other_process: ResumingProcess
) -> None:
    check_cached_resume(name, settings, checkpoints_root, other_process)
