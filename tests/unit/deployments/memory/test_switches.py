"""What an autoencoder can is told from the code of its class; sizes of tiles that it cannot take are refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from deployments.memory.args import VAEArgs
from deployments.memory.autoencoder import refuse_switches
from deployments.memory.switches import Abilities, Way, abilities_of, check_tile, set_tile, switched, tile_sizes
from deployments.modules import AccelerationError
from tests.support.tiny_models.autoencoders import kl_autoencoder, wan_autoencoder

# As their sources read: (tiling, slicing, chunks of frames).
ABILITIES = {
    "AutoencoderKL": (True, True, False),
    "AutoencoderKLFlux2": (True, True, False),
    "AutoencoderKLWan": (True, True, False),
    "AutoencoderKLQwenImage": (True, True, False),
    "AutoencoderKLLTX2Video": (True, True, True),
    "AutoencoderKLHunyuanVideo": (True, True, True),
    "AutoencoderKLMochi": (True, True, True),
    "AutoencoderKLCosmos": (False, True, False),  # it has `enable_tiling`, and nothing reads what that sets
    "AutoencoderKLTemporalDecoder": (False, False, False),
    "VQModel": (False, False, False),
}


@pytest.mark.parametrize("name", ABILITIES)
def test_a_switch_counts_where_something_reads_it(name: str) -> None:
    assert abilities_of(getattr(diffusers, name)) == Abilities(*ABILITIES[name])


@pytest.mark.parametrize("setting", ["tiling", "slicing"])
def test_what_none_of_the_autoencoders_can_is_refused_by_name(setting: str) -> None:
    classes = {"vae": diffusers.AutoencoderKLTemporalDecoder, "audio_vae": diffusers.VQModel}
    with pytest.raises(AccelerationError, match=rf"{setting} is on, and AutoencoderKLTemporalDecoder \(vae\), VQModel"):
        refuse_switches(classes, VAEArgs.model_validate({setting: "on"}))
    refuse_switches(classes | {"vae": diffusers.AutoencoderKL}, VAEArgs.model_validate({setting: "on"}))
    refuse_switches(classes, VAEArgs())


def test_switches_are_as_before_after_a_call() -> None:
    vae = kl_autoencoder()
    before = dict(vars(vae))

    def call() -> None:
        with switched(vae, Way(slicing=True, chunks=True, tiling=True)):
            assert (vae.use_slicing, vae.use_tiling, vae.use_framewise_decoding) == (True, True, True)
            vae.use_slicing = False
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert dict(vars(vae)) == before


def test_sizes_are_set_by_the_autoencoders_own_names() -> None:
    wan: Any = wan_autoencoder()
    set_tile("vae", wan, {"tile_sample_min_height": 64, "tile_sample_stride_height": 48})
    assert (wan.tile_sample_min_height, wan.tile_sample_stride_height, wan.use_tiling) == (64, 48, False)
    kl: Any = kl_autoencoder()
    set_tile("vae", kl, {"tile_sample_min_size": 16, "tile_overlap_factor": 0.5})
    assert (kl.tile_sample_min_size, kl.tile_latent_min_size, kl.tile_overlap_factor) == (16, 8, 0.5)
    assert tile_sizes(diffusers.AutoencoderKLTemporalDecoder) == set()


@pytest.mark.parametrize(
    ("vae", "tile", "sentence"),
    [
        (
            wan_autoencoder,
            {"tile_size": 64},
            r"tile names tile_size, which AutoencoderKLWan \(vae\) does not take; .*_min",
        ),
        (
            wan_autoencoder,
            {"tile_sample_min_height": 60},
            "tile_sample_min_height of vae must be a multiple of 8, got 60",
        ),
        (wan_autoencoder, {"tile_sample_min_width": 128}, "stride_width of vae must be at most .* 128, got 192"),
        (
            kl_autoencoder,
            {"tile_overlap_factor": 1},
            "tile_overlap_factor of vae must be at least 0 and below 1, got 1",
        ),
        (kl_autoencoder, {"tile_sample_min_size": 1}, "smaller than one latent"),
    ],
)
def test_sizes_that_would_leave_gaps_are_refused_by_name(vae: Any, tile: dict[str, float], sentence: str) -> None:
    with pytest.raises(AccelerationError, match=sentence):
        set_tile("vae", vae(), tile)


def test_the_sizes_of_the_library_itself_are_in_order() -> None:
    for vae in (kl_autoencoder(), wan_autoencoder()):
        check_tile("vae", vae)
