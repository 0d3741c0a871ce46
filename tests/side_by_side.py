"""Tests of several folders side by side: `make test`, `make test TESTS=all` (with lint) and `TESTS=rest`.

    python -m tests.side_by_side quick | all | rest

Tests that are marked `rest` are further cases of what others show: the run `rest` makes them, no other run does.

All are forked from one process that has imported what they need (`tests/support/forking`). Real processes and clocks
on a busy machine fail now and then: failed tests get one more try, with nothing beside them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.forking.command import forks_of_this_process, python_with_libraries
from tests.support.forking.environment import environment_of_tests

ROOT = Path(__file__).resolve().parents[1]
LINT = "lint"  # `make lint`, among the folders
# The longest first, so that both lanes end together. A folder inside another is run on its own only.
UNIT = ("tests/unit", "tests/unit/deployments", "tests/unit/serve_app/http")
ALL = ("tests/served", "tests/model", "tests/parity/core", *UNIT, "tests/services", "tests/variables", "tests/page")
# Lint early: meanwhile the first folder writes the bytecode of torch and diffusers that the others read.
RUNS = {"quick": UNIT, "all": (ALL[0], LINT, *ALL[1:]), "rest": ALL}
MARKED = {"quick": "not rest", "all": "not rest", "rest": "rest"}  # the tests of a run, as pytest's -m takes them
AT_A_TIME = 2  # what a machine of two cores has room for, but for the folder that mostly waits for Ray
WAITS = "tests/served"
TESTS_FAILED = 1  # pytest's exit code; any other but 0 means that it did not come to its end
NO_TESTS = 5  # of the marked ones there need not be any
REPORT_EVERY_S = 30.0
LOOP = "s = 0\nfor i in range(5_000_000): s += i * i"  # of a module's names: measured so before
CHECKPOINTS = "TESTS_CHECKPOINTS"  # names the folder in which the runs build their tiny checkpoints, each of them once


@dataclass(frozen=True)
class Run:
    """pytest on one folder, or lint; what it prints goes to `log`."""

    folder: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def percent(self) -> str:
        seen = re.findall(r"\[ *(\d+%)\]", self.log.read_text(errors="replace"))
        return seen[-1] if seen else "0%"


def main(name: str) -> int:
    print(f"== {speed()}", flush=True)
    with forks_of_this_process() as forks:
        os.environ.update(forks)
        code = run(RUNS[name], ROOT, MARKED[name])
    print(f"== {speed()}", flush=True)
    return code


def speed() -> str:
    """How fast this machine is now, beside which the seconds of a run are to be read."""
    began = time.process_time()
    exec(LOOP, {})
    seconds = time.process_time() - began
    return f"this machine: {seconds:.1f} s of processor for five million rounds of a loop, where 0.4 s are usual"


def run(folders: Sequence[str], root: Path, marked: str = MARKED["all"]) -> int:
    """The exit code: 0 if every test of every folder that is so `marked` passed, at the latest in its second try.

    A folder that does not come to its end has no second try. LINT among the folders must pass too, in its first try.
    """
    with tempfile.TemporaryDirectory() as checkpoints:
        environ = environment_of_tests(os.environ) | {CHECKPOINTS: checkpoints}
        codes = run_all(folders, root, marked, environ)
        for folder, code in codes.items():
            if code == TESTS_FAILED:
                print(f"== {folder}: once more, what failed", flush=True)
                again = ("--last-failed", "--last-failed-no-failures", "none")
                command = [*pytest_command(folder, folders, root, marked), *again]
                codes[folder] = subprocess.run(command, cwd=root, env=environ).returncode
            if code == NO_TESTS and marked == MARKED["rest"]:
                codes[folder] = 0
    return 1 if any(codes.values()) else 0  # a killed one's is negative


def run_all(folders: Sequence[str], root: Path, marked: str, environ: Mapping[str, str]) -> dict[str, int]:
    """pytest's exit code by folder; prints what a run printed when it ends, and meanwhile how far they are."""
    began = time.monotonic()
    waiting, running = list(folders), list[Run]()
    codes: dict[str, int] = {}
    next_report_at = began + REPORT_EVERY_S
    while waiting or running:
        while waiting and len([run for run in running if run.folder != WAITS]) < AT_A_TIME:
            running.append(start(waiting.pop(0), folders, root, marked, environ))
        time.sleep(0.2)
        seconds = time.monotonic() - began
        for each in [run for run in running if run.process.poll() is not None]:
            running.remove(each)
            codes[each.folder] = each.process.returncode
            said = each.log.read_text(errors="replace")
            print(f"== {each.folder}, after {seconds:.0f} s, exit code {codes[each.folder]}\n{said}", flush=True)
        if time.monotonic() >= next_report_at:
            print(f"[{seconds:4.0f} s] {', '.join(f'{each.folder} {each.percent}' for each in running)}", flush=True)
            next_report_at += REPORT_EVERY_S
    return codes


def start(folder: str, folders: Sequence[str], root: Path, marked: str, environ: Mapping[str, str]) -> Run:
    log = cache(folder, root).with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    shutil.rmtree(cache(folder, root), ignore_errors=True)  # what failed in an earlier run is not to be tried again
    with log.open("wb") as output:
        command = ["make", "lint"] if folder == LINT else pytest_command(folder, folders, root, marked)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=root, env=environ)
    return Run(folder, process, log)


def pytest_command(folder: str, folders: Sequence[str], root: Path, marked: str) -> list[str]:
    """With a cache of its own, in which pytest keeps what failed; without the other folders inside this one."""
    inside = [f"--ignore={other}" for other in folders if other.startswith(f"{folder}/")]
    return [
        *python_with_libraries(),
        "-m",
        "pytest",
        "-m",
        marked,
        "-o",
        f"cache_dir={cache(folder, root)}",
        *inside,
        folder,
    ]


def cache(folder: str, root: Path) -> Path:
    return root / ".pytest_cache" / folder.replace("/", "-")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
