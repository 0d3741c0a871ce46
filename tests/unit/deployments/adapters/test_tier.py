"""A tier of memory: what was used longest ago goes first, what is in use never."""

from deployments.adapters.tier import Tier


def full_tier() -> Tier[str, int]:
    tier: Tier[str, int] = Tier(30)
    for number, name in enumerate("abc"):
        tier.put(name, number, 10)
    return tier


def gone(tier: Tier[str, int], room_for: int) -> list[str]:
    return [key for key, _ in tier.too_many(room_for)]


def test_nothing_goes_while_there_is_room() -> None:
    assert gone(full_tier(), 0) == []


def test_the_one_used_longest_ago_goes_first() -> None:
    tier = full_tier()
    assert tier.get("a") == 0
    assert gone(tier, 1) == ["b"]
    assert gone(tier, 11) == ["b", "c"]


def test_what_is_in_use_stays_also_over_the_budget() -> None:
    tier = full_tier()
    tier.pin("a")
    tier.pin("a")
    tier.unpin("a")
    assert gone(tier, 1000) == ["b", "c"]
    tier.unpin("a")
    assert gone(tier, 1000) == ["a", "b", "c"]


def test_what_was_removed_counts_no_more() -> None:
    tier = full_tier()
    tier.remove("b")
    assert (tier.num_bytes, len(tier), "b" in tier, tier.get("b")) == (20, 2, False, None)
