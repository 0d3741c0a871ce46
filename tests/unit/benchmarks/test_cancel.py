"""What the denoiser's records say of cancels."""

from typing import Any

import pytest

from benchmarks.cancel import Cancel, as_markdown, cancel_of, summary
from benchmarks.request_parts import at

BEGAN_AT = "2026-11-21T12:00:00.000+00:00"


def record(compute_s: float, outcome: str = "CancelledStage") -> dict[str, Any]:
    return {"stage": "denoiser", "started_at": BEGAN_AT, "compute_s": compute_s, "outcome": outcome}


def test_a_cancel_counts_until_the_denoiser_let_go() -> None:
    cancel = cancel_of(record(0.54), at(BEGAN_AT) + 0.5, 2.0, 0.03)
    assert cancel is not None
    assert cancel.freed_s == pytest.approx(0.04, abs=1e-6)
    assert cancel.remaining_s == pytest.approx(1.5, abs=1e-6)
    assert cancel.answered_s == 0.03


def test_a_denoising_that_was_over_before_the_cancel_does_not_count() -> None:
    assert cancel_of(record(0.4, "ok"), at(BEGAN_AT) + 0.5, 2.0, None) is None


def test_a_cancel_without_effect_counts_with_all_the_work_that_was_left() -> None:
    cancel = cancel_of(record(2.0, "ok"), at(BEGAN_AT) + 0.5, 2.0, None)
    assert cancel is not None
    assert cancel.freed_s == pytest.approx(cancel.remaining_s) == pytest.approx(1.5, abs=1e-6)


def test_the_summary_tells_the_median_the_worst_and_the_share_of_the_waste() -> None:
    found = summary([Cancel(0.02, 1.0, 0.1), Cancel(0.04, 0.5, 0.3), Cancel(0.06, 1.5, 0.2)], step_s=0.04)
    assert found["freed_s"] == 0.04
    assert found["largest_freed_s"] == 0.06
    assert found["largest_in_steps"] == pytest.approx(1.5)
    assert found["remaining_s"] == 1.0
    assert found["share_of_remaining"] == pytest.approx(0.12 / 3.0)
    assert found["answered_s"] == 0.2


def test_a_way_without_an_answer_has_an_empty_cell() -> None:
    way = summary([Cancel(0.02, 1.0)], step_s=0.04)
    result = {
        "machine": {"cores": 2, "load_average": (0.5, 0.5, 0.5)}, "config": "a.yaml", "steps": 40, "step_s": 0.04,
        "total_s": 1.7, "ways": {"hang up": way},
    }  # fmt: skip
    assert as_markdown(result)[-1] == "| hang up | 1 | 20 ms | 20 ms | 0.5 | 1000 ms | 2.0% |  |"
