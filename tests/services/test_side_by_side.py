"""The folders of CI: a second try for what failed, and no other way to a good end."""

from pathlib import Path

import pytest

from tests import side_by_side
from tests.side_by_side import LINT, MARKED, RUNS, run

PASSES = "def test_it():\n    pass\n"
FAILS = "def test_it():\n    assert False\n"
FAILS_ONCE = """
from pathlib import Path

def test_it():
    tried = Path(__file__).with_suffix(".tried")
    before = tried.exists()
    tried.touch()
    assert before
"""
COUNTS = """
from pathlib import Path

def test_it():
    with Path("runs").open("a") as file:
        file.write(f"{Path(__file__).parent.name} ")
"""
MARKS = """
from pathlib import Path

import pytest

@pytest.mark.parametrize("case", ["first", pytest.param("further", marks=pytest.mark.rest)])
def test_it(case):
    with Path("runs").open("a") as file:
        file.write(f"{case} ")
"""
MEETS = """
import time
from pathlib import Path

import pytest

def test_it():
    Path(f"{Path(__file__).stem}.begun").touch()
    ends_at = time.monotonic() + 60
    while len(list(Path().glob("*.begun"))) < 3:
        if time.monotonic() > ends_at:
            pytest.exit("not all have begun", 3)  # for which there is no second try
        time.sleep(0.05)
"""
CRASHES = "import os\n\ndef test_before():\n    pass\n\ndef test_it():\n    os._exit(1)\n"
IS_KILLED = "import os, signal\n\ndef test_it():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
FAILS_AND_IS_KILLED = f"{FAILS_ONCE}    os.kill(os.getpid(), signal.SIGKILL)\n".replace(
    "\n", "\nimport os, signal\n", 1
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins take longer to load than these tests."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.mark.parametrize(
    ("one", "other", "ends_well"),
    [
        (PASSES, FAILS_ONCE, True),
        (FAILS, PASSES, False),
        (CRASHES, PASSES, False),
        (IS_KILLED, PASSES, False),
        (FAILS_AND_IS_KILLED, PASSES, False),
    ],
    ids=["fails once", "fails", "crashes", "is killed", "is killed in its second try"],
)
def test_all_folders_must_pass_at_the_latest_in_their_second_try(
    one: str, other: str, ends_well: bool, tmp_path: Path
) -> None:
    folders = ("one", "other", "third") if ends_well else ("one", "other")
    for name, code in zip(folders, (one, other, PASSES), strict=False):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:schemathesis -p no:hypothesispytest\n")
    failed_yesterday = side_by_side.cache("one", tmp_path) / "v/cache/lastfailed"
    failed_yesterday.parent.mkdir(parents=True)
    failed_yesterday.write_text('{"one/test_one.py::test_before": true}')
    assert (run(folders, tmp_path) == 0) == ends_well


@pytest.mark.parametrize(("lint", "ends_well"), [("@true", True), ("@false", False)])
def test_lint_beside_the_folders_must_pass(lint: str, ends_well: bool, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"lint:\n\t{lint}\n")
    assert (run((LINT,), tmp_path) == 0) == ends_well


def test_the_run_of_further_cases_makes_those_and_no_other_run_does(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = rest\naddopts = -p no:schemathesis\n")
    for name, code in {"both": MARKS, "other": COUNTS}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text(code)
    assert run(("both", "other"), tmp_path, MARKED["rest"]) == 0, "a folder without any is no failure"
    assert (tmp_path / "runs").read_text().split() == ["further"]
    assert run(("both",), tmp_path) == 0
    assert (tmp_path / "runs").read_text().split() == ["further", "first"]


def test_every_folder_of_tests_is_in_every_run_or_in_one_of_its_own() -> None:
    runs = (*RUNS["all"], "tests/parity/rest", "tests/stress", "tests/fuzz")
    tested = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("test_*.py")}
    assert [file for file in sorted(tested) if not any(file.startswith(f"{folder}/") for folder in runs)] == []


def test_a_third_folder_runs_beside_the_one_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three ends when all have begun."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:schemathesis -p no:hypothesispytest\n")
    monkeypatch.setattr(side_by_side, "WAITS", "first")
    names = ("first", "second", "third")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text(MEETS)
    assert run(names, tmp_path) == 0


def test_a_folder_inside_another_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:schemathesis -p no:hypothesispytest\n")
    for name in ("outer", "outer/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name[-5:]}.py").write_text(COUNTS)
    assert run(("outer/inner", "outer"), tmp_path) == 0
    assert sorted((tmp_path / "runs").read_text().split()) == ["inner", "outer"]
