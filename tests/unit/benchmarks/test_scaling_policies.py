"""What the policies ask for, given what the controller was told."""

import pytest

from benchmarks.cluster_simulation import Arrival, Report, RequestKind, Stage, View, simulate
from benchmarks.scaling_policies import Fixed, ReplicaRatio, ServeDefault, proportional


def view(time_s: float, reports: list[Report], running: tuple[int, ...] = (1,)) -> View:
    return View(time_s, reports, running, running)


def report(time_s: float, ongoing: int, integral: float) -> Report:
    return Report(time_s, (ongoing,), (integral,), (0,), (0,), (0.0,), (0.0,), (0.0,))


def test_the_mean_of_ongoing_requests_covers_the_look_back_and_what_passed_since_the_last_report() -> None:
    reports = [report(0, 0, 0.0), report(10, 2, 10.0), report(20, 4, 40.0)]
    assert view(20, reports).mean_ongoing(0, 10) == pytest.approx(3.0)
    assert view(25, reports).mean_ongoing(0, 10) == pytest.approx((30 + 5 * 4) / 15)
    assert view(20, reports).mean_ongoing(0, 100) == pytest.approx(2.0)


def test_serves_default_waits_for_its_delay_and_then_starts_what_two_requests_each_need() -> None:
    policy = ServeDefault(1, 100)
    asked = {time_s: policy(view(time_s, [report(0, 20, 0.0)]))[0] for time_s in range(40)}
    assert asked[29] == 1
    assert asked[30] == 10


def test_serves_default_keeps_replicas_for_ten_minutes() -> None:
    policy = ServeDefault(1, 100)
    asked = {time_s: policy(view(time_s, [report(0, 4, 0.0)], (10,)))[0] for time_s in range(601)}
    assert asked[599] == 10
    assert asked[600] == 2


def test_the_ratio_of_replicas_follows_the_ratio_of_work() -> None:
    asked = []

    def record(seen: View) -> list[int]:
        asked.append(list(policy(seen)))
        return asked[-1]

    policy = ReplicaRatio(1000, target_utilisation=0.8)
    kind = RequestKind("request", (0.2, 8.0, 0.8))
    arrivals = [Arrival(number / 10, kind) for number in range(3000)]  # 2, 80 and 8 seconds of work a second
    simulate([Stage(name) for name in ("encoder", "denoiser", "vae")], arrivals, 1000, record, (3, 100, 10))
    assert asked[250] == pytest.approx([3, 100, 10], abs=1)


@pytest.mark.parametrize("weights", [(0.001, 10, 0.01), (1, 1, 1), (5, 3, 2), (0.021, 6.447, 0.010)])
@pytest.mark.parametrize("total", [3, 4, 10, 100, 1000])
def test_a_split_gives_out_all_and_each_gets_one(weights: tuple[float, ...], total: int) -> None:
    split = proportional(weights, total)
    assert sum(split) == total
    assert min(split) >= 1
    by_weight = [share for _, share in sorted(zip(weights, split, strict=True))]
    assert by_weight == sorted(split)


def test_fixed_is_fixed() -> None:
    assert Fixed((1, 5, 2))(view(100, [report(0, 1000, 0.0)])) == (1, 5, 2)
