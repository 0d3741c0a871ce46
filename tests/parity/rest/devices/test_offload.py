"""Components that come to a device by turns, on a device that lets no tensors of two devices mix."""

import json
import subprocess
from pathlib import Path

from tests.support.forking.command import python_with_libraries
from tests.support.tiny_models import checkpoint

ROOT = Path(__file__).parents[4]
ALL = ("text_encoder", "text_encoder_2", "transformer", "vae")


def test_on_a_simulated_device_only_the_component_that_is_called_is_there(checkpoints_root: Path) -> None:
    """Tensors of two devices cannot mix there: a weight that stayed on the host would raise."""
    folder = checkpoint("flux", checkpoints_root)
    command = [*python_with_libraries(), "-m", "tests.support.offload_on_simulated_device", "npu", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["moves"] == ["text_encoder", "text_encoder_2", "transformer", "vae"] * 2
    assert report["at_rest"] == {name: ["cpu"] for name in ALL}
    assert report["during_forwards"] == {"transformer": ["npu"], "text_encoder_2": ["cpu"]}
    assert report["same_as_on_the_device"]
