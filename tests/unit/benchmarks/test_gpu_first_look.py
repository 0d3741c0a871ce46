"""The first look at a card: parts in their boxes of time, the first wrong one ends it, one JSON and one page."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import gpu_first_look
from benchmarks.first_look.table import PARTS, Part
from benchmarks.gpu_first_look import ALL_S, look, look_at, main

WELL = {"figures": {"s": 1.5}, "lines": ["it took 1.5 s"], "wrong": None}
BAD = {**WELL, "wrong": "it is slow"}


def answering(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """In place of a part's process."""
    monkeypatch.setattr(gpu_first_look, "command_of", lambda part, is_small: [sys.executable, "-S", "-c", code])


def part(name: str = "toy", box_s: float = 20) -> Part:
    return Part(name, name, box_s)


def test_every_row_has_its_module_and_all_boxes_together_are_known() -> None:
    assert all(find_spec(f"benchmarks.first_look.parts.{each.name}") for each in PARTS)
    assert all(0 < each.box_s <= 120 for each in PARTS if not each.by_name)
    assert ALL_S < 600


def test_a_part_for_few_machines_is_looked_at_by_its_name_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(monkeypatch, f"print({json.dumps(json.dumps(WELL))})")
    assert main(["--small", "--part", "two_cards", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "gpu_first_look.json").read_text())["parts"]) == ["two_cards"]
    monkeypatch.setattr(gpu_first_look, "PARTS", [part("a"), Part("two_cards", "two", 20, by_name=True)])
    assert main(["--small", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "gpu_first_look.json").read_text())["parts"]) == ["a"]


def test_the_first_wrong_part_ends_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, f"print({json.dumps(json.dumps(BAD))})")
    [only] = look([part("a"), part("b")], is_small=False)
    assert (only.part.name, only.wrong, only.lines) == ("a", "it is slow", ("it took 1.5 s",))


def test_a_part_that_outlasts_its_box_is_ended_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "import subprocess; subprocess.run(['sleep', '60'])")
    assert look_at(part(), False, 0.3).wrong == "it did not end within its 0 s"


def test_a_part_that_dies_is_told_by_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "raise SystemExit('no device')")
    assert look_at(part(), False, 20).wrong == "it ended with the status 1: no device"


@pytest.mark.parametrize(("answer", "status"), [(WELL, 0), (BAD, 1)])
def test_one_json_and_one_page_are_written(
    answer: object, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(monkeypatch, f"print({json.dumps(json.dumps(answer))})")
    assert main(["--small", "--part", "engine", "--part", "bits", "--out", str(tmp_path)]) == status
    written = json.loads((tmp_path / "gpu_first_look.json").read_text())
    page = (tmp_path / "gpu_first_look.md").read_text()
    assert written["parts"]["engine"]["s"] == 1.5
    assert "## The engine against the plain loop\n\n* it took 1.5 s" in page
    assert ("Not looked at: The same bits." in page) == bool(status)
    assert ("* **Wrong**: it is slow" in page) == bool(status)
