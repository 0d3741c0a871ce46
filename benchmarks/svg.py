"""Bar charts as SVG text, for the pages in docs/: no library, and the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#3b6fb6", "#e08a3c", "#5a9e6f", "#b5504f", "#8064a2", "#9b9b9b", "#c9b037", "#4bacc6")
LABEL_WIDTH = 280  # pixels, as all lengths here
BAR_WIDTH = 430
BAR_HEIGHT = 22
ROW_HEIGHT = 30
LEGEND_WIDTH = 165
LEGENDS_A_LINE = 4
MARGIN = 16


@dataclass(frozen=True)
class Bar:
    """One row: its label, one length for each part of the legend, and what is written behind it."""

    label: str
    lengths: tuple[float, ...]
    text: str


def bar_chart(title: str, legend: Sequence[str], bars: Sequence[Bar]) -> str:
    """Horizontal bars, whose parts lie end to end; the longest fills the width."""
    scale = BAR_WIDTH / max(sum(bar.lengths) for bar in bars)
    lines = [_text(MARGIN, 24, title, "font-weight='bold' font-size='15'")]
    for number, name in enumerate(legend if len(legend) > 1 else ()):
        x = MARGIN + number % LEGENDS_A_LINE * LEGEND_WIDTH
        y = 38 + number // LEGENDS_A_LINE * 20
        lines += [_rectangle(x, y, 12, 12, number), _text(x + 18, y + 11, name)]
    top = 38 + (-(-len(legend) // LEGENDS_A_LINE) * 20 + 8 if len(legend) > 1 else 0)
    for row, bar in enumerate(bars):
        lines += _bar(bar, top + row * ROW_HEIGHT, scale)
    width, height = LABEL_WIDTH + BAR_WIDTH + 110, top + len(bars) * ROW_HEIGHT + MARGIN
    return "\n".join([
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
        " font-family='sans-serif' font-size='12' fill='#222'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        *lines,
        "</svg>",
        "",
    ])  # fmt: skip


def _bar(bar: Bar, y: float, scale: float) -> list[str]:
    lines = [_text(LABEL_WIDTH - 8, y + 15, bar.label, "text-anchor='end'")]
    x = float(LABEL_WIDTH)
    for number, length in enumerate(bar.lengths):
        lines.append(_rectangle(x, y, length * scale, BAR_HEIGHT, number))
        x += length * scale
    return [*lines, _text(x + 6, y + 15, bar.text)]


def _rectangle(x: float, y: float, width: float, height: float, colour: int) -> str:
    return f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height}' fill='{COLOURS[colour]}'/>"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {attributes}>{escape(text)}</text>"
