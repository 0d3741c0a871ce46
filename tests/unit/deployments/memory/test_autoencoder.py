"""Each call of an autoencoder is made whole where that fits, else in slices, chunks of frames and tiles."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from deployments.memory import autoencoder
from deployments.memory.activations import decode_bytes
from deployments.memory.autoencoder import MARGIN
from tests.support.fitting_autoencoder import Prepared
from tests.support.tiny_models.autoencoders import kl_autoencoder

PLENTY = 10**11
SHAPE = (1, 4, 24, 24)  # tiles have 16 by 16


@functools.cache
def need() -> int:
    """Bytes that the decoding takes with its margin."""
    return int(decode_bytes(kl_autoencoder().to("meta"), SHAPE, torch.float32) * MARGIN)


def test_what_fits_is_made_whole_and_what_does_not_in_tiles() -> None:
    assert Prepared(kl_autoencoder, PLENTY).decode(*SHAPE) == [SHAPE]
    assert Prepared(kl_autoencoder, need() + 1).decode(*SHAPE) == [SHAPE]
    tiles = Prepared(kl_autoencoder, need() - 1).decode(*SHAPE)
    assert len(tiles) > 1
    assert max(tiles) == (1, 4, 16, 16)


def test_each_request_is_decided_by_what_is_free_then_and_counted_once() -> None:
    prepared = Prepared(kl_autoencoder, PLENTY)
    assert len(prepared.decode(*SHAPE)) == 1
    prepared.device.free = 0
    assert len(prepared.decode(*SHAPE)) > 1
    prepared.device.free = PLENTY
    assert len(prepared.decode(*SHAPE)) == 1
    assert prepared.counted == 1
    assert not prepared.vae.use_tiling


def test_what_a_request_has_cast_is_counted_in_its_dtype() -> None:
    prepared = Prepared(kl_autoencoder, need() + 1)
    prepared.vae.to(torch.float64)
    with torch.no_grad():
        prepared.vae.decode(torch.zeros(SHAPE, dtype=torch.float64))
    assert len(prepared.given) > 1


def test_pictures_of_a_batch_come_one_by_one_before_there_are_tiles() -> None:
    three = (3, *SHAPE[1:])
    assert Prepared(kl_autoencoder, need() * 3 // 2).decode(*three) == [SHAPE] * 3
    assert Prepared(kl_autoencoder, PLENTY).decode(*three) == [three]
    assert Prepared(kl_autoencoder, slicing="on").decode(*three) == [SHAPE] * 3
    assert max(Prepared(kl_autoencoder, 0, slicing="off").decode(*three)) == (3, 4, 16, 16)


def test_a_device_that_tells_nothing_is_tried_whole() -> None:
    prepared = Prepared(kl_autoencoder)
    assert prepared.decode(*SHAPE) == [SHAPE]
    assert prepared.counted == 0


@pytest.mark.parametrize(("tiling", "num_calls"), [("on", 4), ("off", 1)])
def test_on_and_off_ask_nobody(tiling: str, num_calls: int) -> None:
    prepared = Prepared(kl_autoencoder, 0, tiling=tiling)
    assert len(prepared.decode(1, 4, 20, 20)) == num_calls
    assert prepared.counted == 0


def test_encoding_is_decided_alike() -> None:
    prepared = Prepared(kl_autoencoder, 0)
    given: list[int] = []
    prepared.vae.encoder.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[-1]))
    with torch.no_grad():
        prepared.vae.encode(torch.zeros(1, 3, 48, 48))
    assert max(given) == 32


def test_a_shape_that_did_not_fit_after_all_is_made_in_tiles_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "TRIES_BY_TILES", 2)
    prepared = Prepared(kl_autoencoder, PLENTY)

    def refuse(_: Any, args: Any) -> None:
        if args[0].shape[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = prepared.vae.decoder.register_forward_pre_hook(refuse)
    tiles = prepared.memory.run(lambda: prepared.decode(*SHAPE))
    assert len(tiles) > 1
    hook.remove()
    assert [len(prepared.decode(*SHAPE)) > 1 for _ in range(3)] == [True, True, False]
    assert len(prepared.decode(1, 4, 20, 20)) == 1


def test_a_call_that_nobody_makes_again_is_made_again_in_tiles_at_once() -> None:
    """In a process of all stages the engine's thread decodes, in the middle of a request."""
    prepared = Prepared(kl_autoencoder, PLENTY)

    def refuse(_: Any, args: Any) -> None:
        if args[0].shape[-1] > 16:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    prepared.vae.decoder.register_forward_pre_hook(refuse)
    assert len(prepared.decode(*SHAPE)) > 1


class OnlyInTiles(torch.nn.Module):
    """As Allegro's own is written."""

    def __init__(self) -> None:
        super().__init__()
        self.use_tiling = False
        self.decoder = torch.nn.Identity()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if self.use_tiling:
            decoded: torch.Tensor = self.decoder(latents)
            return decoded
        raise NotImplementedError("Decoding without tiling has not been implemented yet.")


def test_an_autoencoder_that_knows_only_tiles_gets_them_unless_they_are_off() -> None:
    assert Prepared(OnlyInTiles).decode(2, 2) == [(2, 2)]
    with pytest.raises(NotImplementedError):
        Prepared(OnlyInTiles, tiling="off").decode(2, 2)


def test_channels_last_lays_the_weights_of_convolutions_anew_and_keeps_the_picture() -> None:
    last, first = Prepared(kl_autoencoder, memory_format="channels_last").vae, kl_autoencoder()
    weight = last.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    latents = torch.randn(SHAPE, generator=torch.manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(last.decode(latents).sample, first.decode(latents).sample)


def test_the_line_for_the_log_says_what_an_autoencoder_lacks() -> None:
    assert Prepared(kl_autoencoder, tiling="on").line == "vae: tiling on, slicing auto, contiguous"
