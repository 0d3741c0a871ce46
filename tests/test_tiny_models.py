"""The tiny checkpoints are what they claim: whole, reproducible, and sensitive to what is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import TINY_MODELS, checkpoint, request_arguments, run_unsplit

REPOSITORY = Path(__file__).parent.parent
COMPARED = ("flux", "ltx2", "wan21_i2v")

# A process of its own, because MKL_CBWR must be set before torch starts.
COMPARE_WITH_RELOADED = """
import sys
from pathlib import Path
import torch
from tests.tiny_models import TINY_MODELS, checkpoint, run_unsplit
from tests.tiny_models.checkpoints import call

torch.set_num_threads(1)
for name in sys.argv[2:]:
    pipeline, request = TINY_MODELS[name].build()
    in_memory = call(pipeline, request, seed=0)
    reloaded = run_unsplit(checkpoint(name, Path(sys.argv[1])), request, seed=0)
    assert in_memory and len(in_memory) == len(reloaded), name
    assert all(torch.equal(a, b) for a, b in zip(in_memory, reloaded)), name
    print(name)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_a_reloaded_checkpoint_gives_the_same_bytes_as_the_pipeline_in_memory(root: Path) -> None:
    result = _python(COMPARE_WITH_RELOADED, str(root), *COMPARED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(COMPARED)


@pytest.mark.parametrize("name", COMPARED)
def test_the_output_depends_on_prompt_and_seed_and_is_no_constant(name: str, root: Path) -> None:
    folder = checkpoint(name, root)
    request = request_arguments(name)
    output = run_unsplit(folder, request, seed=0)[0]
    assert torch.isfinite(output).all()
    assert output.std() > 0.01
    assert not torch.equal(output, run_unsplit(folder, request | {"prompt": "a red sun"}, seed=0)[0])
    assert not torch.equal(output, run_unsplit(folder, request, seed=1)[0])


def test_two_processes_that_ask_for_one_checkpoint_get_the_same_whole_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tiny_models", str(tmp_path), "zimage"]
    builders = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    assert [builder.wait() for builder in builders] == [0, 0]
    for builder in builders:
        builder.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["zimage"]
    assert torch.isfinite(run_unsplit(tmp_path / "zimage", request_arguments("zimage"), seed=0)[0]).all()


def test_an_adapter_is_loaded_only_into_the_components_that_are_real(root: Path) -> None:
    from diffusers import DiffusionPipeline, FluxTransformer2DModel

    folder = checkpoint("flux_lora", root)
    with torch.device("meta"):
        config = FluxTransformer2DModel.load_config(folder / "transformer")
        skeleton = FluxTransformer2DModel.from_config(config)
    pipeline = DiffusionPipeline.from_pretrained(folder, transformer=skeleton, vae=None, text_encoder_2=None)
    TINY_MODELS["flux_lora"].after_load(pipeline)
    assert pipeline.text_encoder.active_adapters() == ["tiny"]
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


def test_an_adapter_changes_the_picture(root: Path) -> None:
    request = request_arguments("flux")
    plain = run_unsplit(checkpoint("flux", root), request, seed=0)[0]
    adapted = run_unsplit(checkpoint("flux_lora", root), request, seed=0)[0]
    assert (plain - adapted).abs().max() > 1e-3


def test_an_unknown_name_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tiny_models", str(tmp_path), "flux9"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no tiny model is called flux9" in result.stderr
    assert "zimage" in result.stderr


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MKL_CBWR": "AUTO,STRICT", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
