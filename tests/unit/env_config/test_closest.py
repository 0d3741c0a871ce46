"""The known name that a misspelt one most likely means."""

from env_config.closest import closest, did_you_mean

KNOWN = ("prompt", "seed")


def test_the_closest_known_name_is_found() -> None:
    assert closest("promt", KNOWN) == "prompt"
    assert did_you_mean("promt", KNOWN) == "did you mean 'prompt'?"


def test_a_name_far_from_all_has_no_closest() -> None:
    assert closest("width", KNOWN) is None
    assert did_you_mean("width", KNOWN) == ""
    assert did_you_mean("width", KNOWN, "known: prompt, seed") == "known: prompt, seed"


def test_a_very_long_name_is_compared_by_its_beginning() -> None:
    assert closest("prompt" * 100_000, KNOWN) is None


def test_a_name_need_not_be_text() -> None:
    assert closest(7, ["7", "8"]) == "7"
