"""A denoiser over several cards: which way helps which shortage, what is chosen, and what cannot be had."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deployments.messages import STAGES
from deployments.plan.budget import Choice, Levers, demands, needed, shares, usable
from deployments.plan.cards import card_of
from deployments.plan.choose import Plan, Wishes, choose
from deployments.plan.measured import Measured
from deployments.plan.ranks import are_possible, parallel_problem, rank_rows
from serve_app.app import AppArgs
from serve_app.tools.fits import demanded
from tests.support.measured_models import flux
from tests.support.measured_published import kept_measurement

THREE = (("Encoder", ("encoder",)), ("Denoiser", ("denoiser",)), ("VAE", ("vae",)))
PLACEMENTS: Any = {"three_stage": THREE, "one_stage": (("Pipeline", STAGES),)}
FLUX2 = kept_measurement("black-forest-labs/FLUX.2-dev")
WAN = kept_measurement("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
WITHOUT = flux()  # has no way


def planned(measured: Measured, gpu: str, num_cards: int, **wishes: Any) -> Plan:
    return choose(measured, card_of(gpu), num_cards, PLACEMENTS, Wishes(**wishes))


def of_ranks(measured: Measured, **parallel: int) -> list[tuple[float, float]]:
    """GB of weights and activations of each rank of the denoiser."""
    choice = Choice("three_stage", apart=True, parallel=parallel)
    found = [each for each in demands(measured, choice, THREE) if each.process == "Denoiser"]  # type: ignore[arg-type]
    return [(each.weights / 1e9, each.activations / 1e9) for each in found]


def test_tensor_splits_the_weights_of_its_plan_and_no_activations() -> None:
    [(whole, peak)] = of_ranks(FLUX2)
    for weights, activations in of_ranks(FLUX2, tensor=2):
        assert weights == pytest.approx(whole - FLUX2.components[0].tensor_bytes / 2e9)
        assert activations == peak


def test_ulysses_splits_the_sequence_and_no_weights() -> None:
    [(whole, peak)] = of_ranks(WAN)
    assert of_ranks(WAN, ulysses=4) == [(whole, pytest.approx(peak / 4))] * 4


def test_batch_splits_merged_requests_and_nothing_of_one() -> None:
    one, four = (Choice("", max_batch_size=size, parallel={"batch": 2}) for size in (1, 4))
    alone = demands(FLUX2, Choice(""), THREE)[1]  # type: ignore[arg-type]
    assert demands(FLUX2, one, THREE)[1].activations == alone.activations  # type: ignore[arg-type]
    assert demands(FLUX2, four, THREE)[1].activations == 2 * alone.activations  # type: ignore[arg-type]


def test_other_ranks_hold_denoisers_alone_even_of_one_process_for_all() -> None:
    first, second = demands(FLUX2, Choice("one_stage", parallel={"tensor": 2}), (("Pipeline", STAGES),))
    assert (first.card, second.card, second.name) == (0, 1, "Pipeline, rank 1")
    assert second.weights < first.weights
    assert shares((first, second)) == {"Pipeline": 1}


def test_weights_that_do_not_fit_one_card_are_split_over_two() -> None:
    plan = planned(FLUX2, "L40S", 3)
    assert plan.args["parallel"] == {"tensor": 2}
    assert "transformer" not in plan.args.get("precision", {})
    assert max(needed(plan.demands).values()) <= usable(plan.card.num_bytes)
    [why] = [reason for reason in plan.reasons if "ranks" in reason]
    assert why.startswith("2 ranks make each forward together (tensor 2), because on one card it would be at least ")
    assert "Tensor splits its weights; the activations of its sequence are whole on each." in plan.reasons


def test_activations_that_do_not_fit_one_card_are_split_by_ulysses() -> None:
    long = tuple(replace(each, peak=3 * each.peak) if each.stage == "denoiser" else each for each in WAN.calls)
    plan = planned(replace(WAN, calls=long), "H100", 3)
    assert plan.args["parallel"] == {"ulysses": 2}
    assert not plan.args.get("precision")


@pytest.mark.parametrize("measured", [FLUX2, WAN], ids=["flux2", "wan"])
def test_what_fits_without_ranks_has_none(measured: Measured) -> None:
    assert "parallel" not in planned(measured, "H100", 2).args


def test_ranks_are_never_beside_what_they_cannot_have() -> None:
    packed, waiting = Levers({"transformer": "fp8"}), Levers(offloaded=frozenset({"transformer"}))
    assert not are_possible(FLUX2, {"tensor": 2}, packed)
    assert are_possible(FLUX2, {"ulysses": 2}, packed)
    assert not are_possible(FLUX2, {"ulysses": 2}, waiting)


def test_a_way_that_was_asked_for_is_taken_where_one_card_would_do() -> None:
    plan = planned(WAN, "H100", 3, parallel={"ulysses": 2})
    assert plan.args["parallel"] == {"ulysses": 2}
    assert {demand.card for demand in plan.demands if demand.process == "Denoiser"} == {0, 1}
    assert "2 ranks make each forward together (ulysses 2)." in plan.reasons


@pytest.mark.parametrize(
    ("measured", "parallel", "told"),
    [
        (
            WITHOUT,
            {"ulysses": 2},
            "parallel ulysses=2 is not possible for transformer. Of 2, 4, 8 ranks can be had",
        ),
        (WAN, {"tensor": 2}, "not possible for transformer and transformer_2"),
        (WAN, {"ulysses": 3}, "ulysses: 2 or 4 or 8; batch: any number"),
    ],
)
def test_a_way_that_a_model_does_not_have_is_told_with_those_that_it_has(
    measured: Measured, parallel: dict[str, int], told: str
) -> None:
    assert told in str(parallel_problem(measured, parallel))


def test_every_model_has_batch() -> None:
    assert parallel_problem(WITHOUT, {"batch": 3}) is None


def test_the_rows_tell_of_each_way_what_a_rank_holds() -> None:
    rows = {(row.way, row.num_ranks): row for row in rank_rows(FLUX2, card_of("L40S"))}
    assert not rows["", 1].fits
    assert not rows["ulysses", 8].fits, "its weights are whole"
    assert rows["tensor", 2].fits
    assert list(rank_rows(WITHOUT, card_of("L40S"))) == []


def test_each_rank_of_a_config_has_the_card_of_its_bundle() -> None:
    args = AppArgs.model_validate({"model": "m", "parallel": {"ulysses": 2}})
    bundles = [{"CPU": 1, "GPU": 0.7}] * 2
    options = {"Encoder": 0.1, "Denoiser": 0.7, "VAE": 0.2}
    application = {
        "deployments": [
            {"name": name, "ray_actor_options": {"num_gpus": share}}
            | ({"placement_group_bundles": bundles} if name == "Denoiser" else {})
            for name, share in options.items()
        ]
    }
    found = {each.name: each.card for each in demanded(WAN, args, application, 1)}
    assert found == {"Denoiser": 0, "Denoiser, rank 1": 1, "Encoder": 0, "VAE": 0}
