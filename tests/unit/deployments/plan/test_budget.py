"""What a choice needs on each card: the budgets that the audit of the shipped configurations counted by hand."""

from dataclasses import replace

import pytest

from deployments.messages import STAGES
from deployments.plan.budget import CONTEXT, Choice, Demand, Levers, demands, needed, shares, usable
from deployments.plan.cards import card_of
from deployments.plan.measured import Call, Measured
from tests.support.measured_models import GB, autoencoder, calls, component, flux, wan

THREE = (("Encoder", ("encoder",)), ("Denoiser", ("denoiser",)), ("VAE", ("vae",)))
TWO = (("EncoderVAE", ("encoder", "vae")), ("Denoiser", ("denoiser",)))
ONE = (("Pipeline", STAGES),)


def total(measured: Measured, choice: Choice, processes: object) -> float:
    """GB on the only card."""
    [num_bytes] = needed(demands(measured, choice, processes)).values()  # type: ignore[arg-type]
    return num_bytes / GB


def test_flux_on_an_h100_needs_the_audits_43_gb() -> None:
    """23.8 + 9.8 + 0.2 + 3 contexts 1.5 + 4.1 (4 x 1536^2) + 3.6 (VAE), and the encoder's 0.1, in three processes."""
    assert total(flux(), Choice("three_stage", max_batch_size=4), THREE) == pytest.approx(43, abs=0.5)


def test_flux_on_an_l40s_needs_the_audits_42_gb_and_fits() -> None:
    needs = total(flux(), Choice("two_stage", max_batch_size=4), TWO)
    assert needs == pytest.approx(42.5, abs=0.3)
    assert needs * GB < usable(card_of("L40S").num_bytes)


def test_two_experts_of_wan_need_the_audits_66_gb_and_their_neighbours_32() -> None:
    by_card = needed(demands(wan(), Choice("three_stage", apart=True), THREE))
    assert by_card[0] / GB == pytest.approx(66.4, abs=0.1)
    assert by_card[1] / GB == pytest.approx(32, abs=0.5)


def test_a_pipeline_in_one_process_decodes_beside_its_engine() -> None:
    """Z-Image at 1536x1024, four together: 20.5 + 0.5 + 3.05, and 2.42 for the decoder in a thread of its own."""
    models = (
        component("transformer", 12.31, "denoiser"),
        component("text_encoder", 8.04, "encoder"),
        autoencoder(0.17),
    )
    measured = Measured("Z-Image", components=models, calls=calls(0.1, 3.05 / 4, 2.42))
    needs = total(measured, Choice("one_stage", max_batch_size=4), ONE)
    assert needs == pytest.approx(20.52 + 0.5 + 3.05 + 2.42, abs=0.02)


def test_without_an_engine_a_process_does_one_thing_at_a_time() -> None:
    measured = replace(flux(), calls=(Call("text_encoder", "forward", "encoder", 7), Call("vae", "decode", "vae", 5)))
    both, _ = demands(measured, Choice("two_stage"), TWO)
    assert both.activations == 7


def test_a_process_of_one_stage_holds_half_of_an_autoencoder() -> None:
    encoder, _, vae = demands(flux(), Choice("three_stage"), THREE)
    whole = autoencoder(0.17)
    assert vae.weights == whole.loaded - whole.halves["encoder"]
    assert encoder.weights == round(9.77 * GB) + whole.loaded - whole.halves["decoder"]


def test_a_precision_changes_what_it_names_and_adds_one_unpacked_layer() -> None:
    plain = {demand.process: demand for demand in demands(flux(), Choice("two_stage"), TWO)}
    levers = Levers({"transformer": "fp8"})
    packed = {demand.process: demand for demand in demands(flux(), Choice("two_stage", levers), TWO)}
    [transformer] = [each for each in flux().components if each.name == "transformer"]
    assert packed["EncoderVAE"] == plain["EncoderVAE"]
    assert packed["Denoiser"].weights == transformer.weights["fp8"]
    assert packed["Denoiser"].activations == plain["Denoiser"].activations + transformer.largest_layer


def test_what_is_offloaded_holds_two_blocks_and_what_is_in_none() -> None:
    models = tuple(replace(each, outside_blocks=3) for each in flux().components)
    levers = Levers(offloaded=frozenset({"transformer"}))
    denoiser = demands(replace(flux(), components=models), Choice("two_stage", levers), TWO)[1]
    assert denoiser.weights == 2 * models[0].largest_block + 3


def test_merged_samples_count_each_in_the_denoiser_alone() -> None:
    one, four = (demands(flux(), Choice("two_stage", max_batch_size=size), TWO) for size in (1, 4))
    assert four[1].activations == 4 * one[1].activations
    assert four[0] == one[0]


def test_tiles_change_the_decoding_alone() -> None:
    whole, tiled = (demands(flux(), Choice("three_stage", tiling=each), THREE) for each in (False, True))
    assert [b.total - a.total for a, b in zip(whole, tiled, strict=True)] == [0, 0, round(0.4 * GB) - round(3.63 * GB)]


@pytest.mark.parametrize(("choice", "processes"), [(Choice("three_stage"), THREE), (Choice("two_stage"), TWO)])
def test_shares_of_a_card_add_up_to_it_and_keep_a_second_denoiser_out(choice: Choice, processes: object) -> None:
    parts = shares(demands(flux(), choice, processes))  # type: ignore[arg-type]
    assert sum(parts.values()) == pytest.approx(1)
    assert parts["Denoiser"] > 0.5
    assert all(round(part * 20) == pytest.approx(part * 20) for part in parts.values())


def test_a_denoiser_apart_has_its_card_and_the_others_share_theirs() -> None:
    parts = shares(demands(wan(), Choice("three_stage", apart=True), THREE))
    assert parts["Denoiser"] == 1
    assert parts["Encoder"] + parts["VAE"] == pytest.approx(1)
    assert parts["VAE"] > parts["Encoder"]


def test_a_small_neighbour_still_has_a_share() -> None:
    large, small = Demand("Denoiser", ("denoiser",), 0, 100 * GB, 0), Demand("VAE", ("vae",), 0, 0, 0)
    assert shares((large, small)) == {"Denoiser": 0.95, "VAE": 0.05}


def test_every_process_has_a_context() -> None:
    nothing = Measured("nothing")
    assert [demand.total for demand in demands(nothing, Choice("three_stage"), THREE)] == [CONTEXT] * 3
