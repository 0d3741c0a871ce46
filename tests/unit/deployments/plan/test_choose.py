"""What is chosen for given cards, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.messages import STAGES
from deployments.plan.budget import needed, usable
from deployments.plan.cards import card_of
from deployments.plan.choose import Plan, Wishes, choose
from deployments.plan.measured import Measured
from tests.support.measured_models import flux, wan
from tests.support.measured_published import kept_measurement

PLACEMENTS = {
    "three_stage": (("Encoder", ("encoder",)), ("Denoiser", ("denoiser",)), ("VAE", ("vae",))),
    "two_stage": (("EncoderVAE", ("encoder", "vae")), ("Denoiser", ("denoiser",))),
    "one_stage": (("Pipeline", STAGES),),
}
FLUX = flux(1024, denoiser=0.49, vae=1.61)


def planned(measured: Measured, gpu: str, num_cards: int = 1, **wishes: object) -> Plan:
    return choose(measured, card_of(gpu), num_cards, PLACEMENTS, Wishes(**wishes))  # type: ignore[arg-type]


def test_the_first_of_all_choices_is_taken_where_all_fits() -> None:
    plan = planned(FLUX, "H100")
    assert plan.args == {"placement": "three_stage", "denoising": {"max_batch_size": 4}}
    [only] = plan.reasons
    assert only.startswith("38.9 GB of 85.5 GB on H100 (Encoder ")


def test_each_thing_that_is_given_up_is_told_with_what_it_would_need() -> None:
    plan = planned(FLUX, "24GB")
    assert plan.args["precision"] == {"transformer": "fp8", "text_encoder_2": "fp8"}
    [why] = [reason for reason in plan.reasons if "fp8" in reason]
    assert why.startswith(
        "Transformer and text_encoder_2 in fp8, because weights as they are loaded would need at least"
    )
    assert "of 23.3 GB" in why


def test_a_card_without_8_bit_floats_gets_whole_numbers() -> None:
    assert set(planned(FLUX, "A10G").args["precision"].values()) == {"int8"}


def test_two_cards_are_used_before_a_precision_is_lowered() -> None:
    plan = planned(wan(), "H100", 2)
    assert plan.args == {"placement": "three_stage", "denoising": {"max_batch_size": 1}}
    assert plan.num_gpus["Denoiser"] == 1
    assert any(reason.startswith("The denoiser has a card of its own, because on one card") for reason in plan.reasons)
    assert any("merging would only make others wait" in reason for reason in plan.reasons)


def test_a_decoder_works_in_tiles_where_it_does_not_fit_otherwise() -> None:
    """On one card of 85 GB: 57.3 + 8.6 + 11.4 and three contexts leave no room for 18.9 more."""
    plan = planned(wan(), "H100")
    assert plan.args["vae"] == {"tiling": "on"}
    assert any(
        reason.startswith("The VAE decodes in tiles, because without them it would be at least")
        for reason in plan.reasons
    )


def test_where_nothing_fits_it_is_told_by_how_much() -> None:
    plan = planned(FLUX, "2GB")
    assert plan.choice is None
    assert plan.args == {}
    [why] = plan.reasons
    assert why.startswith("Nothing fits: the least, ")
    assert why.endswith("of the 1.9 GB that can be counted on.")


@pytest.mark.parametrize(
    "gpu", ["T4", "16GB", "L4", "3090", "4090", "32GB", "A100-40", "L40S", "A100-80", "H100", "B200"]
)
@pytest.mark.parametrize("num_cards", [1, 2])
@pytest.mark.parametrize("measured", [FLUX, flux(), wan()], ids=["flux", "flux large", "wan"])
def test_whatever_is_chosen_fits(measured: Measured, gpu: str, num_cards: int) -> None:
    plan = planned(measured, gpu, num_cards)
    if plan.choice is not None:
        totals = needed(plan.demands)
        assert max(totals.values()) <= usable(card_of(gpu).num_bytes)
        assert len(totals) <= num_cards
        assert set(plan.num_gpus) == {name for name, _ in PLACEMENTS[plan.choice.placement]}
        assert plan.reasons


def test_what_was_wished_is_kept() -> None:
    plan = planned(FLUX, "H100", precision="nf4", placement="one_stage", max_batch_size=2)
    assert plan.args["placement"] == "one_stage"
    assert plan.args["precision"]["transformer"] == "nf4"
    assert plan.args["denoising"] == {"max_batch_size": 2}
    assert {row.placement for row in plan.rows} == {"one_stage"}


def test_a_plain_precision_is_one_too() -> None:
    assert planned(FLUX, "H100", precision="bf16").args["precision"] == {"transformer": "bf16"}


def test_what_is_stored_quantised_is_never_quantised_again() -> None:
    components = tuple(replace(each, is_quantised=each.is_denoiser, weights={}) for each in FLUX.components)
    plan = planned(replace(FLUX, components=components), "24GB")
    assert "transformer" not in plan.args.get("precision", {})


def test_the_rows_hold_each_placement_and_precision_with_what_it_needs() -> None:
    plan = planned(FLUX, "24GB")
    assert {row.placement for row in plan.rows} == set(PLACEMENTS)
    assert all((row.needed <= usable(plan.card.num_bytes)) == row.fits for row in plan.rows)


# GB, as the audit of the libraries' sources counted them: weights in bfloat16, the denoiser's peak, the decoder's.
AUDIT = {
    "black-forest-labs/FLUX.1-dev": ({"transformer": 23.80, "text_encoder_2": 9.52, "vae": 0.17}, 0.49, 1.61),
    "Qwen/Qwen-Image": ({"transformer": 40.86, "text_encoder": 16.58, "vae": 0.25}, 0.66, 6.10),
    "Tongyi-MAI/Z-Image-Turbo": ({"transformer": 12.31, "text_encoder": 8.04}, 0.51, 1.61),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (
        {"transformer": 28.64, "transformer_2": 28.64, "text_encoder": 11.36, "vae": 0.51},
        8.62,
        18.86,
    ),
}


@pytest.mark.parametrize("repository", AUDIT)
def test_published_models_were_measured_as_the_audit_counted_them(repository: str) -> None:
    """Z-Image's texts were shorter in the audit: 128 tokens, here 512."""
    weights, denoiser, decoder = AUDIT[repository]
    measured = kept_measurement(repository)
    loaded = {each.name: each.loaded / 1e9 for each in measured.components}
    assert {name: loaded[name] for name in weights} == pytest.approx(weights, abs=0.01)
    assert measured.peak("denoiser") / 1e9 == pytest.approx(denoiser, rel=0.1)
    assert measured.peak("vae") / 1e9 == pytest.approx(decoder, rel=0.01)
