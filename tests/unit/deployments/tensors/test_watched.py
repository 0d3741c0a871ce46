"""What a call writes into its arguments is seen, in whatever containers and objects it lies."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.tensors.watched import Watched


class Cache:
    """An object of a model's own, with one of its kind inside."""

    def __init__(self) -> None:
        self.layers = [SimpleNamespace(keys=torch.zeros(2, 2), length=0)]
        self.itself = self


def arguments() -> dict[str, Any]:
    return {"x": torch.zeros(2), "caches": [{"keys": torch.zeros(2, 2), "count": 0}], "cache": Cache(), "n": 1}


def replace(given: dict[str, Any]) -> None:
    given["caches"][0]["keys"] = torch.zeros(2, 2)


WRITES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor": lambda given: given["x"].add_(1),
    "a view of a tensor": lambda given: given["caches"][0]["keys"][0].fill_(1),
    "another tensor in its place": replace,
    "a tensor more": lambda given: given["caches"].append(torch.zeros(1)),
    "a tensor less": lambda given: given["caches"].clear(),
    "a tensor in an object": lambda given: given["cache"].layers[0].keys.zero_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_seen(write: str) -> None:
    given = arguments()
    watched = Watched(given)
    WRITES[write](given)
    assert watched.is_written()


def test_reading_and_counting_write_nothing() -> None:
    given = arguments()
    watched = Watched(given)
    given["x"] + given["caches"][0]["keys"] @ given["x"]
    given["caches"][0]["count"] += 1
    assert not watched.is_written()
    assert [container is given["caches"][0] for container in watched.counted()] == [True]
    assert Watched([given["caches"]]).contains(watched.counted())
    assert not Watched(arguments()).contains(watched.counted())
