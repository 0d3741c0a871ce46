"""The run over all pipelines judges what a folder of tests has, and says of each other class why it does not."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.coverage.rows import read_rows

ROOT = Path(__file__).resolve().parents[4]
PAGE = "".join(
    f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("coverage", "families", "pipelines", "modular pipelines")
)
TESTS = """
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


class OwnStableDiffusionTests:
    pipeline_class = StableDiffusionPipeline

    def get_dummy_components(self):
        channels = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
        unet = UNet2DConditionModel(
            **channels, sample_size=32, cross_attention_dim=32, attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vae = AutoencoderKL(
            **channels, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        )
        text = CLIPTextConfig(
            hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, vocab_size=1000
        )
        return {
            "unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text), "scheduler": DDIMScheduler(),
            "tokenizer": CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip"),
            "safety_checker": None, "feature_extractor": None,
        }

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "a cat", "num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np",
            "generator": torch.Generator().manual_seed(seed),
        }


class OwnStableDiffusionCfgTests(OwnStableDiffusionTests):
    def get_dummy_inputs(self, device, seed=0):
        return super().get_dummy_inputs(device, seed) | {"guidance_scale": 0.0}


class OwnDDPMTests:
    pipeline_class = DDPMPipeline

    def get_dummy_components(self):
        raise OSError("there is no network at /a/place/of this machine")

    def get_dummy_inputs(self, device, seed=0):
        return {}
"""


def test_a_folder_of_tests_becomes_rows_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    (tmp_path / "docs/models.md").write_text(PAGE)
    folder = tmp_path / "diffusers/tests/pipelines/own"
    folder.mkdir(parents=True)
    for each in (folder, folder.parent, folder.parent.parent):
        (each / "__init__.py").touch()
    (folder / "test_own.py").write_text(TESTS)
    command = [sys.executable, "-m", "benchmarks.coverage", "--diffusers-tests", "diffusers", "--commit", "abc123"]
    command += ["--engine", "--only", "^(DDPM|StableDiffusion)Pipeline$"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = read_rows(tmp_path / "docs/benchmarks/coverage.jsonl")
    assert rows["FluxPipeline"].reason == "not tried yet", "it was not asked for"
    judged = rows["StableDiffusionPipeline"]
    assert (judged.verdict, judged.reason, judged.configurations, judged.makes) == ("hand_off", "", 2, "image")
    assert (judged.batched, judged.resumable, judged.previewed) == (True, True, True)
    assert "num_inference_steps" in judged.fields
    assert "diffusers' tests of abc123" in judged.run
    not_built = rows["DDPMPipeline"]
    assert not_built.verdict == "not_judged"
    assert "OSError: there is no network" in not_built.reason
    assert "/a/place" not in not_built.reason
    assert "`StableDiffusionPipeline`" in (tmp_path / "docs/models.md").read_text()
