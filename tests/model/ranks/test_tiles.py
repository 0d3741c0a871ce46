"""Tiles that ranks share out are those of one process, bit for bit, whatever an autoencoder does with them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import select_device
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.ranks.tiles.calls import made, of_message, to_message
from deployments.ranks.tiles.recording import Coder, NotSpreadError, record
from deployments.ranks.tiles.spread import DECODER, check_apart, play, shared_out
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from tests.support.further import all_but, further
from tests.support.ranks import tiles_on_ranks, vae_stage_on_ranks
from tests.support.tiled_autoencoders import TILED, latents_for, magvit_autoencoder, tiled
from tests.support.tiny_models import checkpoint, request_arguments
from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.ltx import ltx_autoencoder

pytestmark = pytest.mark.filterwarnings("default")  # torch.distributed warns of its own affairs

CPU = torch.device("cpu")
SHOWN = ["AutoencoderKL", "Wan 2.1"]
TIME = torch.tensor([0.05])


def coder_of(autoencoder: Any, make: Callable[[], Any]) -> Coder:
    twin = tiled(make).to("meta")
    return Coder(autoencoder.decoder, lambda: twin.decoder)


@torch.no_grad()
def assert_others_make_the_same(autoencoder: Any, coder: Coder, latents: torch.Tensor, **arguments: Any) -> int:
    """The number of parts that may be made apart, which are made here from the last to the first, as if sent."""

    def work() -> Any:
        return autoencoder.decode(latents, **arguments)[0]

    truth = work()
    recording = record(autoencoder, DECODER, coder, work)
    outputs: dict[int, Any] = {}
    for index in reversed(range(len(recording.chains))):
        outputs[index] = made(coder.module, of_message(to_message(recording.chains[index]), CPU))
    gathered = [outputs[index] for index in range(len(outputs))]
    assert torch.equal(play(autoencoder, coder, recording, gathered, work), truth)
    assert torch.equal(work(), truth), "and it is as it was"
    return len(recording.chains)


@pytest.mark.parametrize("name", all_but(SHOWN, TILED))
def test_tiles_may_be_decoded_in_any_order_and_elsewhere(name: str) -> None:
    """Frames of a tile that follow from each other (Wan, CogVideoX, Mochi) stay together."""
    autoencoder = tiled(TILED[name])
    coder = coder_of(autoencoder, TILED[name])
    check_apart(autoencoder, coder)
    assert assert_others_make_the_same(autoencoder, coder, latents_for(autoencoder)) > 1


@pytest.mark.rest
def test_what_is_given_beside_the_latents_comes_along() -> None:
    def make() -> Any:
        return ltx_autoencoder(timestep_conditioning=True)

    autoencoder = tiled(make)
    coder = coder_of(autoencoder, make)
    assert assert_others_make_the_same(autoencoder, coder, latents_for(autoencoder), temb=TIME) > 1


def test_the_pictures_of_a_batch_are_shared_out_too() -> None:
    autoencoder = tiled(kl_autoencoder)
    autoencoder.use_slicing = True
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    assert assert_others_make_the_same(autoencoder, coder_of(autoencoder, kl_autoencoder), latents) == 3


# -- what cannot be spread is told at the start ----------------------------------------------------------------------


class Keeps(torch.nn.Module):
    """A decoder that keeps something from call to call, as EasyAnimate's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 3, 1)
        self.last: Any = None

    def forward(self, x: torch.Tensor, before: Any = None) -> torch.Tensor:
        self.last = x
        made: torch.Tensor = self.conv(x)
        return made


class Draws(Keeps):
    def forward(self, x: torch.Tensor, before: Any = None) -> torch.Tensor:
        return torch.randn_like(self.conv(x))


class Plain(Keeps):
    def forward(self, x: torch.Tensor, before: Any = None) -> torch.Tensor:
        made: torch.Tensor = self.conv(x) if before is None else self.conv(x) + before
        return made


class Rows(torch.nn.Module):
    """Decodes two rows; `how` says what becomes of the first before the second is decoded."""

    def __init__(self, decoder: torch.nn.Module, how: str) -> None:
        super().__init__()
        self.decoder, self.how = decoder, how
        self.tile_latent_min_size = 1

    def decode(self, z: torch.Tensor) -> tuple[torch.Tensor]:
        first = self.decoder(z[:, :, :1])
        if self.how == "asked":
            first = first * float(first.max())
        if self.how == "written":
            z[:, :3, 1:] = first
        if self.how == "set":
            self.decoder.conv.padding = (0, 0) if self.decoder.conv.padding else (1, 1)
        before = first.mean(2, keepdim=True) if self.how == "taken" else first if self.how == "given" else None
        return (torch.cat([first, self.decoder(z[:, :, 1:], before)], 2),)


@pytest.mark.parametrize(
    ("decoder", "how", "reason"),
    [
        (Keeps, "", "a Keeps in it keeps something from call to call"),
        (Draws, "", "it draws random numbers"),
        (Plain, "asked", "its code needs one call's numbers before the others"),
        (Plain, "taken", "what one call is given is computed from what another returns"),
        (Plain, "written", "what one call is given is computed from what another returns"),
        (Plain, "set", "a Conv2d in it keeps something from call to call"),
        (Plain, "given", "it makes no two tiles that do not depend on each other"),
    ],
)
def test_tiles_that_depend_on_each_other_are_refused_with_the_reason(decoder: Any, how: str, reason: str) -> None:
    autoencoder, twin = Rows(decoder(), how), decoder().to("meta")
    with pytest.raises(NotSpreadError, match=re.escape(reason)):
        check_apart(autoencoder, Coder(autoencoder.decoder, lambda: twin))


@pytest.mark.rest
def test_easyanimate_keeps_frames_in_its_layers() -> None:
    autoencoder = tiled(magvit_autoencoder)
    with pytest.raises(NotSpreadError, match="keeps something from call to call"):
        check_apart(autoencoder, coder_of(autoencoder, magvit_autoencoder))


# -- on ranks --------------------------------------------------------------------------------------------------------


def tiled_kl() -> Any:
    return tiled(kl_autoencoder)


def failing_kl() -> Any:
    """Its decoder fails in every process but the one that made the test."""
    autoencoder, here = tiled(kl_autoencoder), os.environ.get("PYTEST_CURRENT_TEST")
    if here is None:
        autoencoder.decoder.conv_out = torch.nn.Conv2d(1, 3, 3)
    return autoencoder


def latents(side: int = 8) -> torch.Tensor:
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_ranks_decode_what_one_process_decodes_and_rank_0_what_a_lost_one_owes() -> None:
    truth = tiled_kl().decode(latents()).sample
    with tiles_on_ranks(tiled_kl) as (autoencoder, tiles):
        assert torch.equal(autoencoder.decode(latents()).sample, truth)
        made_before = tiles.made_elsewhere
        assert made_before > 0
        rank: Any = tiles._group.processes[1]
        os.kill(rank.process.pid, signal.SIGKILL)
        for _ in range(3):
            assert torch.equal(autoencoder.decode(latents()).sample, truth)
        assert tiles.made_elsewhere == made_before
        assert tiles._group.lost is not None, "and Serve replaces the replica"


@pytest.mark.rest
@torch.no_grad()
def test_a_rank_that_is_stopped_or_hangs_is_given_up_within_the_bound() -> None:
    truth = tiled_kl().decode(latents()).sample
    with tiles_on_ranks(tiled_kl, answer_timeout_s=5.0, silence_timeout_s=2.0) as (autoencoder, tiles):
        rank: Any = tiles._group.processes[1]
        os.kill(rank.process.pid, signal.SIGSTOP)
        assert torch.equal(autoencoder.decode(latents()).sample, truth)
        assert re.search("not been heard of|cannot be reached", tiles._group.lost or "")


@pytest.mark.rest
@torch.no_grad()
def test_what_a_rank_cannot_decode_rank_0_decodes() -> None:
    with tiles_on_ranks(failing_kl, ranks=3) as (autoencoder, tiles):
        assert torch.equal(autoencoder.decode(latents()).sample, tiled_kl().decode(latents()).sample)
        assert tiles.made_elsewhere == 0
        assert tiles._group.lost is None, "they are in step"


@pytest.mark.parametrize("model", ["flux", further("wan21")])
def test_a_vae_stage_on_ranks_makes_the_pipelines_own_output(model: str, checkpoints_root: Path) -> None:
    folder = checkpoint(model, checkpoints_root)
    args = {"path": str(folder), "name": model}
    vae = {"tiling": "on", "tile": SMALL_TILES[model]}
    alone = build_stage(ModelArgs(**args, vae=vae), ("encoder", "denoiser", "vae"), EnvConfig(), select_device("cpu"))
    request, inputs = denoised(alone, model)
    truth = decode_output(alone, request, inputs)[0]
    with vae_stage_on_ranks(ModelArgs(**args, vae=vae | {"parallel": 2})) as (stage, tiles):
        output = decode_output(stage, request, inputs)[0]
    assert tiles.made_elsewhere > 0
    assert str(output) == str(truth) if not hasattr(truth, "tobytes") else output.tobytes() == truth.tobytes()
