"""The help of `triptych`: quick, documented, completed by shells."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import get_args

import pytest

from deployments.model import DType
from serve_app import app
from serve_app.jobs import records
from serve_app.tools import options
from serve_app.tools.command import page
from serve_app.tools.command.described import command_of
from serve_app.tools.command.main import COMMANDS, run
from serve_app.tools.command.subcommands import jobs
from serve_app.tools.command.subcommands.completion import PLACES

SLOW = ("torch", "ray", "pydantic", "numpy", "httpx2", "rich", "PIL", "yaml")


def test_the_help_imports_nothing_that_is_slow() -> None:
    code = "import sys; from serve_app.tools.command.main import run; run(['--help']); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in COMMANDS)
    assert [name for name in SLOW if name in said.splitlines()[-1].split()] == []


def test_docs_command_md_is_what_the_help_says() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.fresh(text), "run: python -m serve_app.tools.command.page"


def test_a_page_that_is_stale_is_seen() -> None:
    text = page.PAGE.read_text(encoding="utf-8").replace("| 3 |", "| 7 |")
    assert text != page.fresh(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Usage: triptych {name}" in told
    assert "--json" in told or "Commands:" in told


@pytest.mark.parametrize("shell", PLACES)
def test_a_completion_script_calls_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_TRIPTYCH_COMPLETE" in capsys.readouterr().out


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("triptych 0.")


def test_choices_that_stand_without_their_slow_library_are_those_of_the_application() -> None:
    assert get_args(DType) == options.DTYPES
    assert tuple(app.PLACEMENTS) == options.PLACEMENTS
    assert jobs.STATUSES == records.STATUSES


@pytest.mark.parametrize(
    ("parser", "line"),
    [
        (options.parser_of_plan(), "org/m --gpu 24GB --gpus 2 --size 64x32 --precision fp8 --json"),
        (options.parser_of_plan(), "--config a.yaml --gpu H100 --write b.yaml"),
        (options.parser_of_check(), "a.yaml b.yaml --gpu 4090"),
        (options.parser_of_verify(), "m --argument a=1 --argument b=x --steps 2 --dtype float16"),
        (options.parser_of_verify(), "m"),
    ],
)
def test_a_tool_gets_the_same_from_both_command_lines(parser: argparse.ArgumentParser, line: str) -> None:
    seen: list[argparse.Namespace] = []

    def take(given: argparse.Namespace) -> int:
        seen.append(given)
        return 0

    command_of(parser, take).main(line.split(), standalone_mode=False)
    expected = {name: listed(value) for name, value in vars(parser.parse_args(line.split())).items()}
    assert {name: listed(value) for name, value in vars(seen[0]).items()} == expected


def listed(value: object) -> object:
    return list(value) if isinstance(value, tuple | list) else value
