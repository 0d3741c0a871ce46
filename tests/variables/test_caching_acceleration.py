"""The 12 + 7 variables of Cache-DiT on a real replica: each changes which steps and blocks are computed.

The tiny models have random weights, whose residuals change more than a trained model's: a high threshold
stands for a model whose steps are alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.proofs import proof
from tests.support.whole_replica import MakeReplica

STEPS = 16
ALIKE = {"SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_RDT": "1000"}
# Warm-up 4, then three reused steps after each computed one: the documented defaults.
REUSED = (4, 5, 6, 8, 9, 10, 12, 13, 14)
BLOCKS = 5  # of the tiny FLUX


@pytest.fixture(scope="module")
def runs() -> dict[Any, Any]:
    """What requests gave, by the model and the variables: several tests compare with the same."""
    return {}


@pytest.fixture
def run(make_replica: MakeReplica, flux_checkpoint: Path, runs: dict[Any, Any]) -> Any:
    """The summary and the picture of one request in a replica with these variables beside ALIKE."""

    def run(**variables: str) -> tuple[dict[str, Any], bytes]:
        key = ("flux", *sorted(variables.items()))
        if key not in runs:
            runs[key] = run_anew(**variables)
        result: tuple[dict[str, Any], bytes] = runs[key]
        return result

    def run_anew(**variables: str) -> tuple[dict[str, Any], bytes]:
        whole = make_replica(flux_checkpoint, **ALIKE, **{f"SGLANG_CACHE_DIT_{n}": v for n, v in variables.items()})
        media = whole.generate(STEPS)
        return whole.cache_summary(), media.files[0].data

    return run


def reused_steps(summary: dict[str, Any]) -> tuple[int, ...]:
    """Reused in every list of blocks."""
    return tuple(sorted(set.intersection(*map(set, summary["reused"]))))


@proof("real library on CPU")
def test_sglang_cache_dit_enabled_reuses_steps(make_replica: MakeReplica, flux_checkpoint: Path) -> None:
    off = make_replica(flux_checkpoint, SGLANG_CACHE_DIT_RDT="1000")
    picture = off.generate(STEPS).files[0].data
    assert not off.replica.denoiser.recent_summaries["cache_dit"]
    on = make_replica(flux_checkpoint, **ALIKE)
    assert on.generate(STEPS).files[0].data != picture
    assert reused_steps(on.cache_summary()) == REUSED


@proof("real library on CPU")
def test_sglang_cache_dit_fn_blocks_are_always_computed(run: Any) -> None:
    one, _ = run()
    two, _ = run(FN="2")
    assert one["blocks_computed"] == STEPS * BLOCKS - len(REUSED) * (BLOCKS - 1)
    assert two["blocks_computed"] == STEPS * BLOCKS - len(REUSED) * (BLOCKS - 2)


@proof("real library on CPU")
def test_sglang_cache_dit_bn_blocks_are_always_computed(run: Any) -> None:
    summary, picture = run(BN="1")
    assert summary["blocks_computed"] == STEPS * BLOCKS - len(REUSED) * (BLOCKS - 2)
    assert picture != run(FN="2")[1], "the last block, not the second"


@proof("real library on CPU")
def test_sglang_cache_dit_warmup_steps_are_computed(run: Any) -> None:
    assert reused_steps(run(WARMUP="8")[0]) == (8, 9, 10, 12, 13, 14)


@proof("real library on CPU")
def test_sglang_cache_dit_rdt_decides_what_is_alike(make_replica: MakeReplica, flux_checkpoint: Path) -> None:
    strict = make_replica(flux_checkpoint, SGLANG_CACHE_DIT_ENABLED="1", SGLANG_CACHE_DIT_RDT="0.000001")
    strict.generate(STEPS)
    assert reused_steps(strict.cache_summary()) == ()


@pytest.mark.parametrize(("limit", "expected"), [("0", ()), ("1", (4, 6, 8, 10, 12, 14)), ("-1", tuple(range(4, 16)))])
@proof("real library on CPU")
def test_sglang_cache_dit_mc_limits_the_reused_steps_in_a_row(limit: str, expected: tuple[int, ...], run: Any) -> None:
    assert reused_steps(run(MC=limit)[0]) == expected


@proof("real library on CPU")
def test_sglang_cache_dit_taylorseer_extrapolates_what_is_reused(run: Any) -> None:
    repeated, picture = run()
    extrapolated, other_picture = run(TAYLORSEER="true")
    assert reused_steps(extrapolated) == reused_steps(repeated) == REUSED
    assert other_picture != picture


@proof("real library on CPU")
def test_sglang_cache_dit_ts_order_changes_the_extrapolation(run: Any) -> None:
    first, second = (run(TAYLORSEER="true", TS_ORDER=order) for order in ("1", "2"))
    assert reused_steps(first[0]) == reused_steps(second[0])
    assert first[1] != second[1]


@proof("real library on CPU")
def test_sglang_cache_dit_scm_preset_chooses_the_computed_steps(run: Any) -> None:
    computed = {
        preset: run(SCM_PRESET=preset, SCM_POLICY="static", MC="-1", WARMUP="1")[0]["computed_steps"]
        for preset in ("none", "slow", "medium", "fast", "ultra")
    }
    assert computed["none"] == 1, "without a mask only the warm-up is computed"
    assert computed["slow"] > computed["medium"] > computed["fast"] > computed["ultra"] > 1


@proof("real library on CPU")
def test_sglang_cache_dit_scm_policy_static_reuses_whatever_the_threshold_says(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    strict = {
        "SGLANG_CACHE_DIT_ENABLED": "1",
        "SGLANG_CACHE_DIT_RDT": "0.000001",
        "SGLANG_CACHE_DIT_SCM_PRESET": "fast",
    }
    reused = {}
    for policy in ("dynamic", "static"):
        whole = make_replica(flux_checkpoint, SGLANG_CACHE_DIT_SCM_POLICY=policy, **strict)
        whole.generate(STEPS)
        reused[policy] = whole.cache_summary()["reused_steps"]
    assert reused["dynamic"] == 0
    assert reused["static"] > 5


BINS = {"SCM_POLICY": "static", "WARMUP": "1", "MC": "-1"}


@proof("real library on CPU")
def test_sglang_cache_dit_scm_compute_bins_are_the_runs_of_computed_steps(run: Any) -> None:
    assert reused_steps(run(SCM_COMPUTE_BINS="2,1", SCM_CACHE_BINS="6,7", **BINS)[0]) == (
        *range(2, 8),
        *range(9, 16),
    )
    assert reused_steps(run(SCM_COMPUTE_BINS="4,5", SCM_CACHE_BINS="3,4", **BINS)[0]) == (4, 5, 6, 12, 13, 14, 15)


@proof("real library on CPU")
def test_sglang_cache_dit_scm_cache_bins_are_the_runs_of_reused_steps(run: Any) -> None:
    assert reused_steps(run(SCM_COMPUTE_BINS="2,8", SCM_CACHE_BINS="1,5", **BINS)[0]) == (2, *range(11, 16))
    assert reused_steps(run(SCM_COMPUTE_BINS="2,8", SCM_CACHE_BINS="4,2", **BINS)[0]) == (2, 3, 4, 5, 14, 15)


# --- the second transformer of Wan2.2 ---


@pytest.fixture
def run_wan(make_replica: MakeReplica, wan22_checkpoint: Path, runs: dict[Any, Any]) -> Any:
    """The summaries of both transformers and the latents."""

    def run(**variables: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
        key = ("wan22", *sorted(variables.items()))
        if key not in runs:
            runs[key] = run_anew(**variables)
        result: tuple[dict[str, Any], dict[str, Any], bytes] = runs[key]
        return result

    def run_anew(**variables: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
        primary = {"WARMUP": "1", "MC": "1"}
        named = {f"SGLANG_CACHE_DIT_{n}": v for n, v in (primary | variables).items()}
        whole = make_replica(wan22_checkpoint, **ALIKE | named)
        whole.generate(24)
        return whole.cache_summary(), whole.cache_summary("transformer_2"), whole.latents

    return run


def share_computed(summary: dict[str, Any]) -> float:
    share: float = summary["blocks_computed"] / summary["blocks_total"]
    return share


def test_the_second_transformer_falls_back_to_the_primarys_values(run_wan: Any) -> None:
    first, second, _ = run_wan()
    assert first["computed_steps"] + first["reused_steps"] + second["computed_steps"] + second["reused_steps"] == 24
    assert first["reused_steps"] == first["computed_steps"] or abs(first["reused_steps"] - first["computed_steps"]) <= 1
    assert abs(second["reused_steps"] - second["computed_steps"]) <= 1


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_fn_blocks_of_the_second_are_always_computed(run_wan: Any) -> None:
    first, second, _ = run_wan()
    same_first, changed, _ = run_wan(SECONDARY_FN="2")
    assert same_first == first
    assert changed["reused"] == second["reused"]
    assert changed["blocks_computed"] == second["blocks_computed"] + second["reused_steps"]


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_bn_blocks_of_the_second_are_always_computed(run_wan: Any) -> None:
    first, second, _ = run_wan()
    same_first, changed, latents = run_wan(SECONDARY_BN="1")
    assert same_first == first
    assert changed["blocks_computed"] == second["blocks_computed"] + second["reused_steps"]
    assert latents != run_wan(SECONDARY_FN="2")[2], "the last block, not the second"


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_warmup_counts_the_seconds_own_steps(run_wan: Any) -> None:
    first, second, _ = run_wan()
    same_first, changed, _ = run_wan(SECONDARY_WARMUP="5")
    assert same_first == first
    assert min(reused_steps(second)) == 1
    assert min(reused_steps(changed)) == 5


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_rdt_is_the_seconds_threshold(run_wan: Any) -> None:
    first, _, _ = run_wan()
    same_first, changed, _ = run_wan(SECONDARY_RDT="0.000001")
    assert same_first == first
    assert changed["reused_steps"] == 0


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_mc_limits_the_seconds_reused_steps(run_wan: Any) -> None:
    first, _, _ = run_wan()
    same_first, changed, _ = run_wan(SECONDARY_MC="-1")
    assert same_first == first
    assert changed["computed_steps"] == 1


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_taylorseer_extrapolates_the_seconds_steps(run_wan: Any) -> None:
    first, second, latents = run_wan()
    same_first, same_second, other_latents = run_wan(SECONDARY_TAYLORSEER="true")
    assert (same_first, same_second) == (first, second)
    assert other_latents != latents


@proof("real library on CPU")
def test_sglang_cache_dit_secondary_ts_order_changes_the_seconds_extrapolation(run_wan: Any) -> None:
    latents = [run_wan(SECONDARY_TAYLORSEER="true", SECONDARY_TS_ORDER=order)[2] for order in ("1", "2")]
    assert latents[0] != latents[1]
