"""Every tiny model in half precision, twice: what one request casts or switches, the next one does not find."""

from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import MODULAR_MODELS, TINY_MODELS
from tests.support.twice import check_twice

# What diffusers, torch and numpy deprecate in each other's code, pipeline by pipeline, is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*TINY_MODELS, *MODULAR_MODELS, "sd15_pag", "pixart_pag", "sd15_sag"])
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline_twice(
    name: str, dtype: torch.dtype, checkpoints_root: Path
) -> None:
    check_twice(name, dtype, checkpoints_root)
