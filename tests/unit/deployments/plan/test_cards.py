"""GPUs by name and by size."""

import pytest

from deployments.plan.cards import CARDS, UnknownCardError, card_of


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("81559MiB", 81_559 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("h100", 81_559 * 2**20),
        ("NVIDIA L40S", 46_068 * 2**20),
        ("RTX 4090", 24_564 * 2**20),
        ("A100-80G", 81_920 * 2**20),  # as Ray calls it
    ],
)
def test_a_card_is_a_size_or_a_name(text: str, num_bytes: int) -> None:
    assert card_of(text).num_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "24", "GB", "-3GB", "0GB", "1.2.3GB", "H1000", "L44S"])
def test_another_word_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(UnknownCardError) as refused:
        card_of(text)
    assert f"gpu {text!r} must be a size such as 24GB, or one of B200" in str(refused.value)


def test_a_misspelt_name_is_told_the_closest() -> None:
    with pytest.raises(UnknownCardError, match="did you mean 'L40S'"):
        card_of("L44S")


def test_cards_of_ampere_do_not_multiply_8_bit_floats() -> None:
    """A size alone tells nothing of the card."""
    assert [name for name, card in CARDS.items() if card.eight_bits == "int8"] == [
        "A100-80", "A100-40", "A40", "A10G", "T4", "V100-32", "V100-16", "A6000", "3090",
    ]  # fmt: skip
    assert [card_of(name).eight_bits for name in ("24GB", "4090", "H100")] == ["fp8", "fp8_dynamic", "fp8_dynamic"]
