"""Two models in float16, twice: what one request casts or switches, the next one does not find.

All others are in tests/parity/rest/test_twice.py.
"""

from pathlib import Path

import pytest
import torch

from tests.support.further import further
from tests.support.twice import check_twice

pytestmark = pytest.mark.filterwarnings("default")


# SDXL casts its VAE up before it decodes, and img2img before it encodes too; float16 is the usual dtype of both.
@pytest.mark.parametrize("name", ["sdxl", further("sdxl_img2img")])
def test_three_stages_make_the_bytes_of_the_unsplit_pipeline_twice(name: str, checkpoints_root: Path) -> None:
    check_twice(name, torch.float16, checkpoints_root)
