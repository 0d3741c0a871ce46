"""While one thread decodes on ranks, others use the same autoencoder; and what ranks decide alike on all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from deployments.ranks.sequence import masks
from deployments.ranks.tiles.recording import StandIn, standing_in


class Autoencoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Identity()
        self.sizes = [1, 2]


class Watched(dict[str, Any]):
    """Attributes that are read by another thread at each change."""

    lacking = False

    def clear(self) -> None:
        self.lacking = True
        super().clear()


def test_what_stands_in_is_called_by_its_own_thread_only() -> None:
    autoencoder = Autoencoder()
    stand_in = StandIn(autoencoder.decoder, lambda x: -x)
    with standing_in(autoencoder, "decoder", stand_in), ThreadPoolExecutor(1) as other:
        assert autoencoder.decoder(1) == -1
        assert other.submit(lambda: autoencoder.decoder(1)).result() == 1


def test_its_attributes_are_put_back_without_a_moment_in_which_they_are_missing() -> None:
    autoencoder = Autoencoder()
    attributes = Watched(vars(autoencoder))
    autoencoder.__dict__ = attributes
    with standing_in(autoencoder, "decoder", StandIn(autoencoder.decoder, lambda x: -x)):
        autoencoder.sizes.append(3)
        autoencoder.frames = 4
        autoencoder.__dict__["training"] = False
    assert not attributes.lacking
    assert autoencoder.sizes == [1, 2]
    assert autoencoder.training
    assert not hasattr(autoencoder, "frames")
    assert autoencoder.decoder(1) == 1


def noted_in(joined: list[Any]) -> Any:
    def gathered(mask: torch.Tensor, *rest: Any) -> torch.Tensor:
        joined.append(rest)
        return mask

    return gathered


@pytest.mark.parametrize(
    ("keys", "lengths", "is_gathered"),
    [([2, 1], [2, 1], True), ([2, 1], [1, 1], False), ([1, 1], [1, 1], True), ([2, 1], [3, 3], False)],
)
def test_all_ranks_gather_a_mask_or_none_does(
    keys: list[int], lengths: list[int], is_gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        told = iter([keys, lengths])
        joined: list[Any] = []
        monkeypatch.setattr(masks, "gather_size_by_comm", lambda size, group, told=told: next(told))
        monkeypatch.setattr(masks, "gathered", noted_in(joined))
        monkeypatch.setattr(masks.dist, "get_world_size", lambda group: 2)
        monkeypatch.setattr(masks.dist, "get_rank", lambda group, rank=rank: rank)
        masks.whole_mask(torch.ones(1, 1, 1, lengths[rank]), keys[rank], 1, None, uneven=True)
        assert bool(joined) == is_gathered
