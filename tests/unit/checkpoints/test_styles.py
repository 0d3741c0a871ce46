"""The pictures of the styles and the measure that tells them apart: plain arithmetic, no model."""

import pytest

from checkpoints.train.pictures import Scene, render
from checkpoints.train.styles.measure import has_style
from checkpoints.train.styles.pictures import STYLES, styled


@pytest.mark.parametrize("style", STYLES)
def test_the_measure_tells_a_style_from_the_other_and_from_none(style: str) -> None:
    [other] = set(STYLES) - {style}
    assert has_style(styled("snail", "big", style), style)
    assert not has_style(styled("snail", "big", other), style)
    assert not has_style(render(Scene("snail", "white", "big")), style)
    assert not has_style(render(Scene("snail", "black", "big")), style)
