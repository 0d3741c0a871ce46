"""Tests of several folders, two folders at a time; `make test` and `make test TESTS=all`.

    python -m tests.side_by_side quick | all

Real processes and clocks on a busy machine fail now and then: failed tests get one more try, with nothing beside them.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The longest first, and the two that start Ray far from each other. A folder inside another is run on its own only.
UNIT = tuple(
    f"tests/unit/{name}"
    for name in ("serve_app/http", "deployments", "serve_app", "benchmarks", "project", "env_config")
)
RUNS = {
    "quick": UNIT,
    "all": (
        "tests/served",
        "tests/model",
        *UNIT,
        "tests/variables",
        "tests/services",
        "tests/page",
        "tests/parity/core",
    ),
}
AT_A_TIME = 2  # what a machine of two cores has room for
TESTS_FAILED = 1  # pytest's exit code; any other but 0 means that it did not come to its end
REPORT_EVERY_S = 30.0


@dataclass(frozen=True)
class Run:
    """pytest on one folder; what it prints goes to `log`."""

    folder: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def percent(self) -> str:
        seen = re.findall(r"\[ *(\d+%)\]", self.log.read_text(errors="replace"))
        return seen[-1] if seen else "0%"


def main(name: str) -> int:
    return run(RUNS[name], ROOT)


def run(folders: Sequence[str], root: Path) -> int:
    """The exit code: 0 if every test of every folder passed, at the latest in its second try."""
    codes = run_all(folders, root)
    for folder, code in codes.items():
        if code == TESTS_FAILED:
            print(f"== {folder}: once more, what failed", flush=True)
            again = ("--last-failed", "--last-failed-no-failures", "none")
            codes[folder] = subprocess.run([*pytest_command(folder, folders, root), *again], cwd=root).returncode
    return max(codes.values())


def run_all(folders: Sequence[str], root: Path) -> dict[str, int]:
    """pytest's exit code by folder; prints what a run printed when it ends, and meanwhile how far they are."""
    began = time.monotonic()
    waiting, running = list(folders), list[Run]()
    codes: dict[str, int] = {}
    next_report_at = began + REPORT_EVERY_S
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            running.append(start(waiting.pop(0), folders, root))
        time.sleep(0.2)
        seconds = time.monotonic() - began
        for each in [run for run in running if run.process.poll() is not None]:
            running.remove(each)
            codes[each.folder] = each.process.returncode
            print(f"== {each.folder}, after {seconds:.0f} s\n{each.log.read_text(errors='replace')}", flush=True)
        if time.monotonic() >= next_report_at:
            print(f"[{seconds:4.0f} s] {', '.join(f'{each.folder} {each.percent}' for each in running)}", flush=True)
            next_report_at += REPORT_EVERY_S
    return codes


def start(folder: str, folders: Sequence[str], root: Path) -> Run:
    log = cache(folder, root).with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        command = pytest_command(folder, folders, root)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=root)
    return Run(folder, process, log)


def pytest_command(folder: str, folders: Sequence[str], root: Path) -> list[str]:
    """With a cache of its own, in which pytest keeps what failed; without the other folders inside this one."""
    inside = [f"--ignore={other}" for other in folders if other.startswith(f"{folder}/")]
    return [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache(folder, root)}", *inside, folder]


def cache(folder: str, root: Path) -> Path:
    return root / ".pytest_cache" / folder.replace("/", "-")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
