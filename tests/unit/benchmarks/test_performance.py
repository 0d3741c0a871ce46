"""The performance page shows the figures that were kept, and keeps what was not run again."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import performance
from benchmarks.svg import Bar, bar_chart


def test_the_page_and_its_pictures_show_the_figures_that_are_kept() -> None:
    figures = json.loads(performance.FIGURES.read_text(encoding="utf-8"))
    page = performance.PAGE.read_text(encoding="utf-8")
    assert performance.filled(page, figures) == page
    for name, chart in performance.CHARTS.items():
        assert (performance.IMAGES / name).read_text(encoding="utf-8") == chart(figures)


def test_a_run_replaces_its_own_figures_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(performance.FIGURES.read_text(encoding="utf-8"))
    monkeypatch.setattr(performance, "RAW", tmp_path)
    for name in ("FIGURES", "PAGE"):
        copy = tmp_path / getattr(performance, name).name
        copy.write_bytes(getattr(performance, name).read_bytes())
        monkeypatch.setattr(performance, name, copy)
    monkeypatch.setattr(performance, "IMAGES", tmp_path)
    machine = {"cores": 64, "load_average": [0.5, 0.1, 0.1], "python": "3.12", "torch": "2.13"}
    rows = [{"steps": 7, "alone_s": 1.0, "served_s": 1.23456, "ratio": 1.23456, "unused": "x"}]
    run = {"date": "2027-01-02", "machine": machine, "rows": rows}
    (tmp_path / "overhead.json").write_text(json.dumps(run), encoding="utf-8")

    performance.main()

    kept = json.loads(performance.FIGURES.read_text(encoding="utf-8"))
    assert kept["overhead"]["rows"] == [{"steps": 7, "alone_s": 1.0, "served_s": 1.235, "ratio": 1.235}]
    assert {name: each for name, each in kept.items() if name != "overhead"} == {
        name: each for name, each in before.items() if name != "overhead"
    }
    page = performance.PAGE.read_text(encoding="utf-8")
    assert "| 7 | 1.00 s | 1.24 s | 1.24 |" in page
    assert "*`python -m benchmarks.overhead`, 2027-01-02, load average 0.5.*" in page


def test_a_table_without_a_place_in_the_page_is_an_error() -> None:
    figures = json.loads(performance.FIGURES.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="the table 'served' has 0 places"):
        performance.filled("# Performance\n", figures)


def test_the_longest_bar_fills_the_width_and_text_is_escaped() -> None:
    chart = ElementTree.fromstring(bar_chart("a < b", ["one", "two"], [Bar("x", (1, 3), "4"), Bar("y", (1, 0), "1")]))
    texts = [each.text for each in chart if each.tag.endswith("text")]
    assert texts == ["a < b", "one", "two", "x", "4", "y", "1"]
    widths = [float(each.attrib["width"]) for each in chart if each.tag.endswith("rect")]
    assert widths[-4:] == [107.5, 322.5, 107.5, 0.0]
