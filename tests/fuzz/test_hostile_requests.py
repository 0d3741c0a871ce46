"""Two thousand hostile requests against each of seven families, in every placement: no answer blames the server."""

from pathlib import Path

import pytest

from tests.support.hostile_requests import attack
from tests.support.model_in_process import model_served
from tests.support.tiny_models import checkpoint

# What diffusers, torch and numpy warn of in each other's code, and what they say of arguments without sense.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(14_400)]

CASES = 2_000  # of each family
FAMILIES = {
    "flux": "three_stage",
    "sdxl_inpaint": "two_stage",
    "sd3_img2img": "one_stage",
    "qwenimage_edit": "three_stage",
    "wan21_i2v": "three_stage",
    "qwen_layered": "two_stage",
    "stable_audio": "one_stage",
}


@pytest.mark.parametrize(("name", "placement"), FAMILIES.items())
def test_no_request_is_answered_with_a_server_error(
    name: str, placement: str, checkpoints_root: Path, tmp_path: Path
) -> None:
    with model_served(checkpoint(name, checkpoints_root), tmp_path / "outputs", placement) as server:
        found = attack(server, CASES)
    print(f"{name}, {placement}: {sum(found.statuses.values())} requests, {dict(sorted(found.statuses.items()))}")
    assert found.is_clean, "\n".join([*found.server_errors, *found.unclear])
