"""The file of API keys: read at the start, read again when it changes, never half."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve_app.api_keys import ApiKeys, new_key


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def write(file: Path, *lines: str) -> None:
    """As an editor saves it: another file in its place."""
    new = file.with_suffix(".new")
    new.write_text("\n".join(lines), encoding="utf-8")
    os.replace(new, file)


def test_a_changed_file_counts_at_once(key_file):
    (anna, anna_line), (berta, berta_line) = new_key("anna"), new_key("berta")
    write(key_file, anna_line)
    keys = ApiKeys(key_file)
    assert (keys.label_of(anna), keys.label_of(berta)) == ("anna", None)
    write(key_file, berta_line)
    assert (keys.label_of(anna), keys.label_of(berta)) == (None, "berta")


def test_a_file_that_becomes_broken_changes_no_keys_and_is_told(key_file, caplog):
    key, line = new_key("anna")
    write(key_file, line)
    keys = ApiKeys(key_file)
    write(key_file, line, "anna:nothex")
    assert keys.label_of(key) == "anna"
    assert "line 2" in caplog.text
    key_file.unlink()
    assert keys.label_of(key) == "anna"
    write(key_file, "")
    assert keys.label_of(key) is None


@pytest.mark.parametrize("line", ["anna", "anna:12", ":" + "0" * 64, "an na:" + "0" * 64, "anna:" + "G" * 64])
def test_a_line_that_is_wrong_is_named_at_start(key_file, line):
    write(key_file, "# fine", line)
    with pytest.raises(ValueError, match="api_keys_file: line 2"):
        ApiKeys(key_file)


def test_a_file_that_is_not_there_is_named_at_start(key_file):
    with pytest.raises(ValueError, match=r"api_keys_file: .*keys"):
        ApiKeys(key_file)
