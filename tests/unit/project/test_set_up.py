"""Setting up: constraints.txt pins what pyproject.toml asks for, and `make` does what it says."""

import ast
import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import side_by_side
from tests.support.source import nodes_of

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = ("serve_app", "deployments", "env_config")

# Libraries that are there only beside their hardware; the file that wraps one says so when it is asked for.
ONLY_WITH_THEIR_HARDWARE = {"flash_attn", "flash_attn_interface", "mlx", "torch_musa", "torch_npu"}
# Of precision and of traces; the file that imports one is asked only where it is asked for.
ONLY_WITH_AN_EXTRA = {"gguf", "opentelemetry", "torchao"}


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert None not in pins, "every line is `name==version`, without a local version, a path or an address"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def requirements() -> list[Requirement]:
    asked = [
        *PROJECT["dependencies"],
        *(line for name in EXTRAS if name != "flash-attn" for line in EXTRAS[name]),
    ]
    return [requirement for requirement in map(Requirement, asked) if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_pinned_version_is_one_that_the_project_asks_for(requirement: Requirement) -> None:
    assert requirement.specifier.contains(constraints()[canonicalize_name(requirement.name)])


def test_no_other_extra_installs_flash_attn() -> None:
    others = [line for name, lines in EXTRAS.items() if name != "flash-attn" for line in lines]
    assert [line for line in [*PROJECT["dependencies"], *others] if "flash" in line] == []


def test_every_imported_library_is_a_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = packages_distributions() | {"pydantic_core": ["pydantic"]}
    missing = {
        name
        for name in imported_names()
        - sys.stdlib_module_names
        - set(PACKAGES)
        - ONLY_WITH_THEIR_HARDWARE
        - ONLY_WITH_AN_EXTRA
        if not declared & {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
    }
    assert missing == set()


def imported_names() -> set[str]:
    names = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in nodes_of(file):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.split(".")[0])
    return names


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in our packages, with its place."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in nodes_of(file):
                if isinstance(node, ast.Call):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def reads_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text, which without `encoding` is what the locale says."""
    keywords = {keyword.arg for keyword in call.keywords}
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
        return True
    if {"text", "universal_newlines"} & keywords:
        return True
    modes = [each.value for each in call.args if isinstance(each, ast.Constant)]
    is_builtin = isinstance(call.func, ast.Name) and call.func.id == "open"
    is_path = isinstance(call.func, ast.Attribute) and call.func.attr == "open" and len(call.args) < 2 and not keywords
    is_path = is_path and ast.unparse(call.func) not in ("Image.open", "av.open")
    return (is_builtin or is_path) and not any(isinstance(mode, str) and "b" in mode for mode in modes)


def test_every_file_of_text_is_opened_with_its_encoding() -> None:
    without = [
        place
        for place, call in calls()
        if reads_text(call) and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert without == []


# The tests below run the real Makefile and .ci/run with programs that only write down how they were called.
STAND_IN_PYTHON = """#!/bin/sh
case "$*" in
    "-c "*) exit 0 ;;
    "--version") echo "Python 3.12.0" ;;
    "-m venv "*)
        mkdir -p .venv/bin
        for name in python pip ruff mypy; do cp {programs}/tool .venv/bin/$name; done ;;
esac
"""
STAND_IN_TOOL = """#!/bin/sh
echo "${0##*/} $*" >> called
test -z "$SAYS" || echo "$SAYS"
case "$*" in *"$FAILS"*) test -n "$FAILS" && exit 1 ;; esac
exit 0
"""
PIP = "python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt"
INSTALL = [f"{PIP} torch", "python install.py ."]
INSTALL_FOR_TESTS = [f"{PIP} torch", "python install.py .[dev]"]
LINT = ["ruff check .", "mypy "]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone's set-up files, and beside them the programs that are found on the PATH."""
    clone, programs = tmp_path / "clone", tmp_path / "programs"
    (clone / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "install.py", ".ci/run"):
        shutil.copy(ROOT / name, clone / name)
    programs.mkdir()
    for name in ("bash", "cp", "date", "dirname", "env", "make", "mkdir", "rm", "sh", "tail", "touch"):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    write_program(programs / "tool", STAND_IN_TOOL)
    write_program(programs / "python3", STAND_IN_PYTHON.format(programs=programs))
    return clone


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(clone: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=clone,
        env={"PATH": str(clone.parent / "programs"), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def called(clone: Path) -> list[str]:
    """What was called since the last time this was asked."""
    file = clone / "called"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_make_serve_installs_torch_first_and_then_serves_the_config(clone: Path) -> None:
    done = run(clone, "make", "serve", "CONFIG=ray_configs/mine.yaml")
    assert done.returncode == 0, done.stdout
    assert called(clone) == [*INSTALL, "python -m serve_app.tools.launch ray_configs/mine.yaml"]
    assert without_seconds(done.stdout) == [
        "[1/3] .venv with Python 3.12.0 ... N s",
        "[2/3] torch, the largest download ... N s",
        "[3/3] Ray Serve, diffusers and the rest ... N s",
    ]


def without_seconds(printed: str) -> list[str]:
    return [re.sub(r"\d+ s$", "N s", line) for line in printed.splitlines()]


def test_a_step_says_one_line_and_its_program_speaks_to_the_log(clone: Path) -> None:
    done = run(clone, "make", "test", SAYS="Collecting everything")
    assert without_seconds(done.stdout)[:4] == [
        "[1/3] .venv with Python 3.12.0 ... N s",
        "[2/3] torch, the largest download ... N s",
        "[3/3] Ray Serve, diffusers, tools for the tests and the rest ... N s",
        "== ruff",
    ]
    log = (clone / ".venv/set-up.log").read_text()
    assert log.count("Collecting everything") == 2
    assert "[3/3] Ray Serve" in log


def test_on_a_terminal_the_seconds_of_a_step_count_up(clone: Path) -> None:
    programs = clone.parent / "programs"
    write_program(programs / "sleep", "#!/bin/sh\nexit 0\n")
    write_program(programs / "tool", STAND_IN_TOOL.replace("exit 0", "until [ -e go_on ]; do :; done"))
    terminal, inside = pty.openpty()
    env = {"PATH": str(programs)}
    make = subprocess.Popen(
        ["make", "serve"], cwd=clone, env=env, stdin=subprocess.DEVNULL, stdout=inside, stderr=inside
    )
    os.close(inside)
    printed = b""
    while len(re.findall(rb"\r\[2/3\] torch, the largest download \.\.\. \d+ s", printed)) < 2:
        printed += os.read(terminal, 1000)
    (clone / "go_on").touch()
    with contextlib.suppress(OSError):  # the other end is closed
        while text := os.read(terminal, 1000):
            printed += text
    os.close(terminal)
    assert make.wait() == 0
    assert re.search(rb"\r\[3/3\] Ray Serve, diffusers and the rest \.\.\. \d+ s\r\n$", printed)


def test_the_second_make_serve_installs_nothing(clone: Path) -> None:
    run(clone, "make", "serve")
    called(clone)
    run(clone, "make", "serve")
    assert called(clone) == ["python -m serve_app.tools.launch ray_configs/serve_emoji_both_cpu.yaml"]


def test_make_serve_after_make_test_installs_nothing_and_make_test_after_make_serve_the_tools(clone: Path) -> None:
    run(clone, "make", "test")
    called(clone)
    run(clone, "make", "serve")
    assert called(clone) == ["python -m serve_app.tools.launch ray_configs/serve_emoji_both_cpu.yaml"]
    run(clone, "make", "clean")
    run(clone, "make", "serve")
    called(clone)
    run(clone, "make", "lint")
    assert called(clone) == [*INSTALL_FOR_TESTS, *LINT]


def test_new_pins_are_installed_at_the_next_make_serve(clone: Path) -> None:
    run(clone, "make", "serve")
    called(clone)
    stamp = (clone / ".venv/installed").stat().st_mtime
    os.utime(clone / "constraints.txt", (stamp + 1, stamp + 1))
    run(clone, "make", "serve")
    assert called(clone)[:-1] == INSTALL


def test_an_install_that_failed_says_what_to_do_and_is_tried_again(clone: Path) -> None:
    failed = run(clone, "make", "serve", FAILS="install.py", SAYS="No space left on device")
    assert failed.returncode != 0
    for told in ("[3/3] Ray Serve, diffusers and the rest ... failed after", "make clean", ".venv/set-up.log"):
        assert told in failed.stdout
    assert "No space left on device" in failed.stdout
    assert failed.stdout.index("failed after") < failed.stdout.index("No space left on device")
    assert called(clone) == INSTALL
    assert run(clone, "make", "serve").returncode == 0
    assert called(clone)[:-1] == INSTALL


def test_without_a_python_make_says_which_one_is_needed(clone: Path) -> None:
    write_program(clone.parent / "programs/python3", "#!/bin/sh\nexit 1\n")
    failed = run(clone, "make", "serve")
    assert failed.returncode != 0
    assert "No Python 3.11 to 3.14 with the venv module was found on the PATH." in failed.stdout
    assert "apt-get install python3 python3-venv" in failed.stdout


def test_an_unfit_python_is_passed_over_for_a_fit_one(clone: Path) -> None:
    programs = clone.parent / "programs"
    (programs / "python3").rename(programs / "python3.12")
    write_program(programs / "python3", "#!/bin/sh\nexit 1\n")
    assert run(clone, "make", "serve").returncode == 0
    assert called(clone)[:-1] == INSTALL


RUNS = {
    "quick": "tests.side_by_side quick",
    "all": "tests.side_by_side all",
    "rest": "tests.side_by_side rest",
    "parity": "pytest tests/parity",
    "stress": "pytest tests/stress",
    "fuzz": "pytest -rP tests/fuzz",
}


@pytest.mark.parametrize("tests", RUNS)
def test_make_test_runs_the_folders_of_its_choice(tests: str, clone: Path) -> None:
    assert run(clone, "make", "test", f"TESTS={tests}").returncode == 0
    lint = [] if tests == "all" else LINT  # which is among what tests.side_by_side runs
    assert called(clone) == [*INSTALL_FOR_TESTS, *lint, f"python -m {RUNS[tests]}"]


def test_make_test_runs_the_quick_tests_by_default(clone: Path) -> None:
    run(clone, "make", "test")
    assert called(clone)[-1] == "python -m tests.side_by_side quick"


def test_ci_runs_lint_and_all_tests_but_the_long_ones(clone: Path) -> None:
    assert run(clone, ".ci/run").returncode == 0
    assert called(clone) == [*INSTALL_FOR_TESTS, "python -m tests.side_by_side all"]
    assert side_by_side.LINT in side_by_side.RUNS["all"]


def test_make_test_runs_all_where_ci_is_set(clone: Path) -> None:
    run(clone, "make", "test", CI="true")
    assert called(clone)[-1] == "python -m tests.side_by_side all"


@pytest.mark.parametrize(
    ("step", "command"),
    [
        ("ruff", ("make", "lint")),
        ("mypy", ("make", "lint")),
        ("install.py", (".ci/run",)),
        ("side_by_side", (".ci/run",)),
    ],
)
def test_ci_fails_when_a_step_fails(step: str, command: tuple[str, ...], clone: Path) -> None:
    """tests/services/test_side_by_side.py shows that the tests fail with the lint beside them."""
    write_program(
        clone.parent / "programs/tool",
        STAND_IN_TOOL.replace("exit 0", f'case "$0 $*" in *{step}*) exit 1 ;; esac'),
    )
    assert run(clone, *command).returncode != 0


def test_an_unknown_choice_of_tests_is_refused(clone: Path) -> None:
    failed = run(clone, "make", "test", "TESTS=some")
    assert failed.returncode != 0
    assert "TESTS must be quick, all, rest, parity, stress or fuzz, got some" in failed.stdout
