"""How the client's time of a request is divided: every part by its own clock, and nothing lost."""

import copy
import math
from typing import Any

import pytest

from benchmarks.request_parts import COMPUTE, PARTS, as_table, attribute, by_kind, describe, ms, typical

HEADER = "make;dur=1000.000, answer;dur=20.000"
# The path of a request whose parts are all known; times of day in milliseconds, as in the log.
LINE: dict[str, Any] = {
    "outcome": "ok",
    "started_at": "2026-11-21T12:00:00.010+00:00",
    "total_s": 0.97,
    "asked_s": 0.015,
    "seconds": {"denoiser_forwards": 0.7, "encode_media": 0.004},
    "stages": [
        {"stage": "encoder", "started_at": "2026-11-21T12:00:00.022+00:00",
         "queue_s": 0.002, "transfer_s": 0.0, "compute_s": 0.02},
        {"stage": "denoiser", "started_at": "2026-11-21T12:00:00.060+00:00",
         "queue_s": 0.001, "transfer_s": 0.017, "compute_s": 0.75},
        {"stage": "vae", "started_at": "2026-11-21T12:00:00.823+00:00",
         "queue_s": 0.001, "transfer_s": 0.012, "compute_s": 0.1},
    ],
}  # fmt: skip
EXPECTED = {
    "http": 0.03, "ingress": 0.015, "to_encoder": 0.01, "encoder_queue": 0.002, "encoder": 0.02, "to_denoiser": 0.017,
    "denoiser_queue": 0.001, "forwards": 0.7, "loop": 0.05, "to_vae": 0.012, "vae_queue": 0.001, "vae": 0.1,
    "media": 0.004, "back": 0.053, "asked": 0.015, "store": 0.02, "not_attributed": 0.0,
}  # fmt: skip


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(LINE) | changes


def test_every_part_is_found_and_they_sum_to_the_clients_time() -> None:
    parts = attribute(1.05, HEADER, LINE)
    assert parts == pytest.approx(EXPECTED, abs=1e-6)
    assert list(parts) == list(PARTS)
    assert math.isclose(sum(parts.values()), 1.05)


def test_a_gap_between_two_parts_is_not_attributed() -> None:
    line = changed()
    line["stages"][1]["transfer_s"] -= 0.008
    parts = attribute(1.05, HEADER, line)
    assert parts["not_attributed"] == pytest.approx(0.008, abs=1e-6)
    assert math.isclose(sum(parts.values()), 1.05)


def test_an_overlap_of_two_parts_is_a_negative_rest() -> None:
    line = changed()
    line["stages"][2]["transfer_s"] += 0.005
    assert attribute(1.05, HEADER, line)["not_attributed"] == pytest.approx(-0.005, abs=1e-6)


@pytest.mark.parametrize(
    "line",
    [
        changed(outcome="CancelledError"),
        changed(stages=LINE["stages"][:2]),
        changed(stages=[LINE["stages"][0], *LINE["stages"]]),
    ],
    ids=["cancelled", "a stage did not tell", "encoded twice"],
)
def test_a_request_that_did_not_go_once_through_each_stage_is_refused(line: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not once through each stage"):
        attribute(1.05, HEADER, line)


def test_what_is_typical_leaves_slow_and_fast_requests_out_and_still_adds_up() -> None:
    requests = [attribute(client_s, HEADER, LINE) for client_s in (1.06, 9.0, 1.04, 1.02)]
    found = typical(requests)
    assert found["http"] == pytest.approx(0.03)
    assert math.isclose(sum(found.values()), 1.05)


def test_kinds_hold_all_of_the_time() -> None:
    parts = attribute(1.05, HEADER, LINE)
    kinds = by_kind(parts)
    assert math.isclose(sum(kinds.values()), 1.05)
    assert kinds["compute"] == pytest.approx(0.02 + 0.7 + 0.1)
    assert kinds["queue"] == pytest.approx(0.004)


def test_the_ratio_is_that_of_neighbours_to_compute_alone() -> None:
    alone = {"encoder": 0.01, "forwards": 0.5, "vae": 0.08, "media": 0.01, "loop": 0.1}
    slow = {name: 2 * seconds for name, seconds in alone.items()}
    served = [attribute(1.05, HEADER, LINE), {name: 2 * s for name, s in attribute(1.05, HEADER, LINE).items()}]
    row = describe(served, [alone, slow])
    assert row["ratio_to_compute_alone"] == pytest.approx(1.05 / 0.6)
    assert row["ratio_to_in_process"] == pytest.approx(1.05 / 0.7)
    assert set(COMPUTE) <= set(alone)


def test_the_table_has_a_row_for_each_part_and_its_sum() -> None:
    parts = attribute(1.05, HEADER, LINE)
    alone = {"encoder": 0.01, "forwards": 0.5, "vae": 0.08, "media": 0.01, "loop": 0.1}
    lines = as_table(describe([parts] * 2, [alone] * 2))
    assert len(lines) == 2 + len(PARTS) + 1
    assert lines[-1] == "|  | **sum** | **1050.0** | **700.0** |"
    assert any(line.endswith("| 700.0 | 500.0 |") for line in lines)
    assert ms(None) == ""
