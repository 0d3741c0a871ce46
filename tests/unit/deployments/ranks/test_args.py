"""`parallel` says how many ranks there are, and refuses what could have no effect or no meaning."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.accelerators import bundles_problem
from deployments.ranks.args import ParallelArgs


@pytest.mark.parametrize(
    ("given", "size", "ranks_of_sample"),
    [
        ({"ulysses": 2}, 2, 2),
        ({"batch": 2}, 2, 1),
        ({"ulysses": 2, "batch": 2}, 4, 2),
        ({"tensor": 2, "batch": 3}, 6, 2),
    ],
)
def test_there_are_as_many_ranks_as_the_product_of_the_ways(given: Any, size: int, ranks_of_sample: int) -> None:
    args = ParallelArgs(**given)
    assert (args.size, args.ranks_of_sample, args.degrees) == (size, ranks_of_sample, given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "one of ulysses, ring, tensor, batch must be 2 or more"),
        ({"ulysses": 1}, "leave `parallel` out for one device"),
        ({"collective_timeout_s": 3}, "must be 2 or more"),
        ({"ulysses": 2, "tensor": 2}, "tensor: 2 is not possible with ulysses or ring"),
        ({"cfg": 2}, r"batch splits the passes of guidance too.*guidance_passes: together"),
        ({"ulyses": 2}, "Extra inputs are not permitted"),
        ({"ulysses": 0}, "greater than or equal to 1"),
        ({"ulysses": 2, "silence_timeout_s": 1}, "greater than or equal to 2"),
    ],
)
def test_what_means_nothing_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ParallelArgs(**given)


@pytest.mark.parametrize(
    ("bundles", "device", "problem"),
    [
        (
            [],
            "cpu",
            r"has 0 bundles, and `parallel` asks for 2 ranks: write one for each, such as \[{'CPU': 1}, {'CPU'",
        ),
        ([{"CPU": 1}] * 3, "cpu", "has 3 bundles"),
        ([{"CPU": 1, "GPU": 1}, {"CPU": 1}], "cuda", r"placement_group_bundles\[1\] has 0 GPU: with .*=cuda"),
        ([{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 2}], "cuda", r"\[1\] has 2 GPU"),
    ],
)
def test_each_rank_needs_a_bundle_with_its_device(bundles: Any, device: str, problem: str) -> None:
    assert re.search(problem, bundles_problem(device, bundles, 2) or "")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bundle_with_a_device_for_each_rank_is_right(device: str) -> None:
    assert bundles_problem(device, [{"CPU": 1, "GPU": 1}, {"CPU": 0.5, "GPU": 0.5}], 2) is None
