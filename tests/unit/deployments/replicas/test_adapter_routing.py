"""A replica that holds a request's LoRAs is preferred, and never at the price of waiting for a busy one."""

from __future__ import annotations

import pytest

from deployments.adapters.use import AdapterUse
from deployments.messages import GenerationRequest, OutputFormat
from deployments.replicas.adapter_routing import Candidate, best_holders, wanted_by


def replica(id: str, ongoing: int | None, *held: str) -> Candidate[str]:
    return Candidate(id, ongoing, frozenset(held))


@pytest.mark.parametrize(
    ("candidates", "wanted", "chosen"),
    [
        ([replica("a", 0), replica("b", 0, "x")], {"x"}, ["b"]),
        ([replica("a", 0), replica("b", 1, "x")], {"x"}, []),  # the holder has more to do
        ([replica("a", 3), replica("b", 3, "x"), replica("c", 4, "x")], {"x"}, ["b"]),
        ([replica("a", 0, "x"), replica("b", 0, "x", "y"), replica("c", 0, "y")], {"x", "y"}, ["b"]),
        ([replica("a", 0, "x"), replica("b", 0, "y")], {"x", "y"}, ["a", "b"]),
        ([replica("a", 0, "z"), replica("b", 0)], {"x"}, []),
        ([replica("a", None, "x"), replica("b", 0)], {"x"}, []),  # it does not answer
        ([replica("a", None, "x")], {"x"}, []),
        ([], {"x"}, []),
    ],
)
def test_the_best_holders_are_among_those_that_have_least_to_do(
    candidates: list[Candidate[str]], wanted: set[str], chosen: list[str]
) -> None:
    assert best_holders(candidates, frozenset(wanted)) == chosen


def test_what_is_wanted_are_the_known_digests_of_a_request() -> None:
    uses = [AdapterUse("a", "/a", digest="x"), AdapterUse("b", "/b"), AdapterUse("c", "/c", digest="y")]
    features = {"loras": [use.plain() for use in uses]}
    request = GenerationRequest("1", "flux", {}, 0, OutputFormat("image", "png"), features=features)
    assert wanted_by([request, "envelope"]) == {"x", "y"}
    assert wanted_by([]) == wanted_by(["text"]) == frozenset()
