"""Forwards share a batch where that lets requests be done sooner, on devices whose time is simulated."""

from functools import cache

import pytest

from tests.support.simulated_time import Asked, SecondsOf, SimulatedDevice, free, linear, mean, p95, serve

HARMLESS = 1.02
WARM_UP = (Asked(110), Asked(110))  # forwards until the merge of such a structure has been tried
WARM_S = 400.0


def half(samples: int) -> float:
    """The second sample of a batch takes half of what the first takes."""
    return 0.5 + 0.5 * samples


DEVICES: dict[str, SecondsOf] = {"linear": linear, "free": free, "half": half}
LOADS: dict[str, tuple[Asked, ...]] = {
    "four at once": (Asked(20),) * 4,
    "eight of a few steps": (Asked(4),) * 8,
    "one after another": tuple(Asked(28, at=9.0 * i) for i in range(8)),
    "long, then two short": (Asked(40), Asked(8, at=10.0), Asked(8, at=16.7)),
}
EQUAL = ("four at once", "eight of a few steps", "one after another")


@cache
def latencies(device: str, load: str, runs_ahead: bool = True, is_warm: bool = True, **settings: object) -> list[float]:
    """In seconds of a lone forward."""
    simulated = SimulatedDevice(DEVICES[device], runs_ahead=runs_ahead)
    if not is_warm:
        return serve(simulated, LOADS[load], **settings)[0]
    later = [Asked(asked.steps, WARM_S + asked.at) for asked in LOADS[load]]
    return serve(simulated, [*WARM_UP, *later], **settings)[0][len(WARM_UP) :]


def unmerged_latencies(device: str, load: str) -> list[float]:
    """First come, first served, one at a time."""
    return latencies(device, load, is_warm=False, order="fifo", max_batch_size=1)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("device", DEVICES)
def test_in_order_of_arrival_nobody_is_later_than_without_merging(device: str, load: str) -> None:
    unmerged = unmerged_latencies(device, load)
    served = latencies(device, load, order="fifo")
    assert mean(served) <= HARMLESS * mean(unmerged)
    if device != "half" or load in EQUAL:  # else the long one is the last 5 %, and goes on with the short ones
        assert p95(served) <= HARMLESS * p95(unmerged)


@pytest.mark.parametrize("load", EQUAL)
@pytest.mark.parametrize("device", DEVICES)
def test_equal_requests_are_done_as_soon_by_deadline_as_in_order_of_arrival(device: str, load: str) -> None:
    unmerged = unmerged_latencies(device, load)
    served = latencies(device, load)
    assert mean(served) <= HARMLESS * mean(unmerged)
    assert p95(served) <= HARMLESS * p95(unmerged)


@pytest.mark.parametrize("runs_ahead", [True, False], ids=["accelerator", "CPU"])
def test_a_merge_that_gains_nothing_makes_nobody_late(runs_ahead: bool) -> None:
    """Merged at any price, four equal requests are all done last; by turns too."""
    merged = latencies("linear", "four at once", runs_ahead, merging="always")
    served = latencies("linear", "four at once", runs_ahead)
    assert mean(merged) >= 77
    assert mean(served) <= HARMLESS * 50
    assert max(served) <= HARMLESS * 80


def test_short_requests_pass_a_long_one_and_no_passenger_makes_them_late() -> None:
    for device in ("linear", "half"):
        served = latencies(device, "long, then two short")
        assert mean(served) < mean(unmerged_latencies(device, "long, then two short")) * 0.9
    _, *short = latencies("linear", "long, then two short")
    assert max(short) <= 8 + 2.5, "their own forwards, what the device had already, and the rest of the first one's"


def test_where_a_batch_is_free_all_are_done_at_once() -> None:
    assert mean(latencies("free", "four at once")) <= 21
    assert mean(latencies("half", "four at once")) < mean(unmerged_latencies("half", "four at once"))


@pytest.mark.parametrize("load", EQUAL)
@pytest.mark.parametrize("device", DEVICES)
def test_the_first_merge_of_a_structure_makes_nobody_late(device: str, load: str) -> None:
    unmerged = unmerged_latencies(device, load)
    served = latencies(device, load, is_warm=False)
    assert mean(served) <= HARMLESS * mean(unmerged)
    assert p95(served) <= HARMLESS * p95(unmerged)


def test_trials_that_do_not_pay_cost_less_than_a_percent_and_become_rarer() -> None:
    device = SimulatedDevice(linear)
    steps = 400
    serve(device, [Asked(steps), Asked(steps), Asked(steps)])
    trials = device.sizes.count(2)
    assert 1 <= trials <= 3
    assert 2 * trials <= 0.01 * 3 * steps


def test_a_device_on_which_merging_comes_to_pay_is_noticed() -> None:
    seconds = [linear]
    device = SimulatedDevice(lambda samples: seconds[0](samples))
    load = [Asked(300), Asked(300), Asked(1, at=450.0, width=5), Asked(600, at=700.0), Asked(600, at=700.0)]

    def seconds_of(samples: int) -> float:
        return linear(samples) if device.clock.now() < 650 else free(samples)

    device.seconds_of = seconds_of
    taken, _ = serve(device, load)
    assert max(taken[3:]) < 1000, "not one after the other"


def test_a_deadline_that_a_request_reaches_alone_is_not_missed_for_a_passenger() -> None:
    """With its passenger each step takes 1.3: 40 steps in 52 s."""

    def served(deadline_s: float) -> list[float]:
        load = [*WARM_UP, Asked(40, WARM_S, deadline_s=deadline_s), Asked(40, WARM_S)]
        return serve(SimulatedDevice(lambda samples: 0.7 + 0.3 * samples), load)[0][2:]

    urgent, passenger = served(50.0)
    assert urgent <= 50
    assert passenger <= 81
    assert all(51 < each <= 53 for each in served(60.0)), "merged, where its deadline allows that"
