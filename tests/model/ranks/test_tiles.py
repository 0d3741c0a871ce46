"""Tiles that ranks share out are those of one process, bit for bit, whatever an autoencoder does with them."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import select_device
from deployments.messages import STAGES, GenerationRequest, OutputFormat
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.ranks.tiles.calls import Call, made, of_message, to_message
from deployments.ranks.tiles.recording import Coder, NotSpreadError, record
from deployments.ranks.tiles.spread import DECODER, check_apart, play, shared_out
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.tensors.values import tensors
from env_config.variables import EnvConfig
from tests.support.further import all_but, further
from tests.support.ranks import tiles_on_ranks, vae_stage_on_ranks
from tests.support.tiled_autoencoders import TILED, latents_for, magvit_autoencoder, tiled
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches
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
            self.decoder.last = 1
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
        (Plain, "set", "a Plain in it keeps something from call to call"),
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
    autoencoder = tiled(kl_autoencoder)
    if multiprocessing.parent_process() is not None:
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


TILES: dict[str, tuple[dict[str, int], dict[str, int]]] = {  # by model: sizes of the tiles, and of the request
    "flux": ({"tile_sample_min_size": 16}, {"height": 48, "width": 48}),
    "wan21": (
        {f"tile_sample_{size}_{side}": n for side in ("height", "width") for size, n in (("min", 16), ("stride", 8))},
        {"height": 32, "width": 32},
    ),
}


def served(model: str, folder: Path, **vae: Any) -> ModelArgs:
    tile = {"tiling": "on", "tile": TILES[model][0]}
    return ModelArgs.model_validate({"path": str(folder), "name": model, "vae": tile | vae})


@pytest.mark.parametrize("model", ["flux", further("wan21")])
def test_a_vae_stage_on_ranks_makes_what_it_makes_alone(model: str, checkpoints_root: Path) -> None:
    tiny_patches()
    folder = checkpoint(model, checkpoints_root)
    alone = build_stage(served(model, folder), STAGES, EnvConfig(), select_device("cpu"))
    arguments = request_arguments(model) | {"num_inference_steps": 2} | TILES[model][1]
    request = GenerationRequest("r", model, arguments, 0, OutputFormat("image", "png"))
    denoiser = DenoiserStage(alone)
    inputs, _ = denoiser.denoise(request, encode(alone, request))
    denoiser.engine.close()
    truth = tensors(dict(decode_output(alone, request, inputs)))
    with vae_stage_on_ranks(served(model, folder, parallel=2)) as (stage, tiles):
        output = tensors(dict(decode_output(stage, request, inputs)))
    assert tiles.made_elsewhere > 0
    assert truth
    assert all(torch.equal(one, other) for one, other in zip(output, truth, strict=True))


@pytest.mark.rest
def test_a_model_whose_tiles_depend_on_each_other_does_not_start(checkpoints_root: Path) -> None:
    tiny_patches()
    args = {"path": str(checkpoint("easyanimate", checkpoints_root)), "name": "m"}
    model = ModelArgs.model_validate({**args, "vae": {"tiling": "on", "parallel": 2}})
    reason = "vae.parallel: 2 is not possible for vae, AutoencoderKLMagvit: .* keeps something from call to call"
    with pytest.raises(AccelerationError, match=reason), vae_stage_on_ranks(model):
        pass


def test_weights_of_a_vae_with_ranks_stay_on_the_device(flux_checkpoint: Path) -> None:
    args = {"path": str(flux_checkpoint), "name": "flux", "offload": {"vae": "model"}}
    model = ModelArgs.model_validate({**args, "vae": {"tiling": "on", "parallel": 2}})
    with pytest.raises(AccelerationError, match=r"offload\.vae is not possible with vae\.parallel"):
        build_stage(model, ("vae",), EnvConfig(), select_device("cpu"))


# -- who gets what ---------------------------------------------------------------------------------------------------


def test_tiles_are_shared_out_by_their_size_and_rank_0_gets_no_more_than_others() -> None:
    chains = [(Call((torch.zeros(size),), {}),) for size in (4, 4, 2, 4, 4, 2, 2, 2, 1)]
    shares = shared_out(chains, 3)
    assert sorted(index for share in shares for index in share) == list(range(9))
    costs = [sum(chains[index][0].cost for index in share) for share in shares]
    assert max(costs) - min(costs) <= 2
    assert costs[0] == min(costs)
