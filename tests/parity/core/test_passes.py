"""Guidance passes as one batch, for two families."""

from pathlib import Path

import pytest

from tests.support.passes_parity import CORE, check_passes

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", CORE)
def test_passes_of_a_step_share_a_batch_deviate_little_and_resume_from_any_step_with_the_same_bytes(
    name: str, checkpoints_root: Path
) -> None:
    check_passes(name, checkpoints_root)
