"""What does not fit is remembered, and tried again after a while."""

from deployments.engine.batching.caps import GOOD_BATCHES, Caps


def run_full(caps: Caps, batches: int) -> None:
    for _ in range(batches):
        caps.fits("s", caps.of("s") or 8, 1)


def test_a_cap_recovers_after_enough_good_batches() -> None:
    caps = Caps()
    assert caps.of("s") is None
    caps.does_not_fit("s", 8)
    assert caps.of("s") == 4
    run_full(caps, GOOD_BATCHES - 1)
    assert caps.of("s") == 4
    run_full(caps, 1)
    assert caps.of("s") == 5
    run_full(caps, 3 * GOOD_BATCHES)
    assert caps.of("s") == 8
    assert caps.of("another") is None


def test_each_try_that_fails_makes_the_next_one_rarer() -> None:
    caps = Caps()
    caps.does_not_fit("s", 8)
    run_full(caps, GOOD_BATCHES)
    caps.does_not_fit("s", 5)
    assert caps.of("s") == 2
    run_full(caps, GOOD_BATCHES)
    assert caps.of("s") == 2
    run_full(caps, GOOD_BATCHES)
    assert caps.of("s") == 3


def test_batches_that_were_not_full_say_nothing() -> None:
    caps = Caps()
    caps.does_not_fit("s", 8)
    for _ in range(10 * GOOD_BATCHES):
        caps.fits("s", 2, 1)
    assert caps.of("s") == 4


def test_a_forward_of_several_samples_is_added_whole() -> None:
    caps = Caps()
    caps.does_not_fit("s", 8)
    for _ in range(GOOD_BATCHES):
        caps.fits("s", 4, 2)
    assert caps.of("s") == 6


def test_the_larger_half_of_a_batch_that_did_not_fit_may_show_that_more_fits_than_half() -> None:
    caps = Caps()
    caps.does_not_fit("s", 3)
    caps.fits("s", 2, 1)
    assert caps.of("s") == 2


def test_what_ended_processes_before_is_tried_the_more_seldom_the_more_often_it_did() -> None:
    for deaths in (1, 2, 3):
        caps = Caps()
        caps.did_not_fit_before("s", 8, deaths)
        assert caps.of("s") == 4
        run_full(caps, GOOD_BATCHES * 2 ** (deaths - 1) - 1)
        assert caps.of("s") == 4
        run_full(caps, 1)
        assert caps.of("s") == 5
