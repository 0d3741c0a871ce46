"""The command that makes an API key."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.api_keys import ApiKeys
from serve_app.tools.keys import main


def test_the_command_prints_a_key_that_its_line_lets_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "anna@example.com"]) == 0
    line, key = (text.split()[-1] for text in capsys.readouterr().out.splitlines())
    file = tmp_path / "keys"
    file.write_text(line)
    assert ApiKeys(file).label_of(key) == "anna@example.com"
    assert key not in line
    assert main(["new", "two words"]) == 2
