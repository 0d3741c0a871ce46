"""The embedded styles on all 100 held-out prompts: the figures of checkpoints/README.md."""

from pathlib import Path

import pytest

from checkpoints.train.evaluate import generate, held_out_prompts
from checkpoints.train.styles.evaluate import BASE, load, report, use
from checkpoints.train.styles.pictures import STYLES

CHECKPOINTS = Path(__file__).resolve().parents[3] / "checkpoints"


@pytest.mark.parametrize("made_with", [BASE, *STYLES])
def test_nouns_stay_right_and_styles_are_told_apart(made_with: str) -> None:
    pipeline, wanted = load(CHECKPOINTS / "emoji-flux", CHECKPOINTS / "emoji-flux-loras"), held_out_prompts(100)
    use(pipeline, {made_with: 1.0} if made_with in STYLES else {})
    figures = report(wanted, generate(pipeline, [prompt for _, prompt in wanted], 10, 64), made_with)
    assert figures["noun"] >= 0.9, figures["wrong_nouns"]
    for style, share in figures["taken_for"].items():
        assert share >= 0.75 if style == made_with else share <= 0.05
