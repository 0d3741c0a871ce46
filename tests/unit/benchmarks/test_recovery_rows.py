"""What is said of kills: medians of the like, and nothing where nothing was measured."""

from dataclasses import replace

import pytest

from benchmarks.recovery_rows import Run, as_table, summarize

RUN = Run("Denoiser", "late", 2, True, alone_s=2.0, total_s=2.3, killed_at_s=1.6, noticed_s=0.02, next_step_s=0.1,
          extra_steps=1, whole_s=15.0)  # fmt: skip


def test_runs_of_the_same_kill_become_a_row_of_medians() -> None:
    runs = [RUN, replace(RUN, total_s=5.0, alone_s=4.0), replace(RUN, total_s=2.5)]
    [row] = summarize(runs)
    assert row["runs"] == 3
    assert row["added_s"] == pytest.approx(0.5), "the median of the differences, not the difference of medians"
    assert row["from_start"] is None


def test_kills_without_checkpoints_stand_beside_those_with_them() -> None:
    [row] = summarize([RUN, replace(RUN, has_checkpoints=False, total_s=4.0, extra_steps=24)])
    assert row["runs"] == 1
    assert row["added_s"] == pytest.approx(0.3)
    assert row["from_start"] == {"runs": 1, "extra_steps": 24, "added_s": 2.0}


def test_other_moments_and_other_numbers_of_replicas_are_rows_of_their_own() -> None:
    rows = summarize([RUN, replace(RUN, moment="early"), replace(RUN, replicas=1), replace(RUN, killed="VAE")])
    assert [(row["killed"], row["moment"], row["replicas"]) for row in rows] == [
        ("Denoiser", "late", 2), ("Denoiser", "early", 2), ("Denoiser", "late", 1), ("VAE", "late", 2),
    ]  # fmt: skip


def test_a_request_whose_steps_were_all_done_has_no_next_step() -> None:
    [row] = summarize([replace(RUN, killed="VAE", moment="at work", next_step_s=None, extra_steps=0)])
    assert row["next_step_s"] is None
    line = as_table([row])[-1]
    assert line == "| VAE | at work | 2 | 0.02 s |  | 0 | 2.00 s | 2.30 s | 0.30 s |  |  | 15.00 s |"
