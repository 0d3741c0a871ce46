"""The tests of every run in two processes side by side: one computes, the other waits for Ray; `make test TESTS=all`.

    python -m tests.side_by_side

Real processes and clocks on a busy machine fail now and then: failed tests get one more try, with nothing beside them.
"""

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANES = {
    "computing": ("tests/unit", "tests/services", "tests/model", "tests/parity/core"),
    "serving": ("tests/served", "tests/variables"),
}
TESTS_FAILED = 1  # pytest's exit code; any other but 0 means that it did not come to its end
REPORT_EVERY_S = 30.0


def main() -> int:
    return run(LANES, ROOT)


def run(lanes: Mapping[str, tuple[str, ...]], root: Path) -> int:
    """The exit code: 0 if every test of every lane passed, at the latest in its second try."""
    codes = run_all(lanes, root)
    for name, code in codes.items():
        if code == TESTS_FAILED:
            print(f"== {name}: once more, what failed", flush=True)
            again = ("--last-failed", "--last-failed-no-failures", "none")
            codes[name] = subprocess.run([*pytest_command(name, root), *again, *lanes[name]], cwd=root).returncode
    return max(codes.values())


def run_all(lanes: Mapping[str, tuple[str, ...]], root: Path) -> dict[str, int]:
    """pytest's exit code of each lane; prints what a lane printed when it ends, and meanwhile how far they are."""
    logs = {name: root / ".pytest_cache" / f"{name}.log" for name in lanes}
    began = time.monotonic()
    running = {name: start(name, folders, root, logs[name]) for name, folders in lanes.items()}
    codes: dict[str, int] = {}
    next_report_at = began + REPORT_EVERY_S
    while len(codes) < len(lanes):
        time.sleep(0.2)
        seconds = time.monotonic() - began
        for name, process in running.items():
            if name not in codes and process.poll() is not None:
                codes[name] = process.returncode
                print(f"== {name}, after {seconds:.0f} s\n{logs[name].read_text(errors='replace')}", flush=True)
        if time.monotonic() >= next_report_at:
            far = (f"{name} {percent(logs[name])}" for name in lanes if name not in codes)
            print(f"[{seconds:4.0f} s] {', '.join(far)}", flush=True)
            next_report_at += REPORT_EVERY_S
    return codes


def start(name: str, folders: tuple[str, ...], root: Path, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*pytest_command(name, root), *folders], stdout=output, stderr=subprocess.STDOUT, cwd=root
        )


def pytest_command(name: str, root: Path) -> list[str]:
    """With a cache of its own, in which pytest keeps what failed."""
    return [sys.executable, "-m", "pytest", "-o", f"cache_dir={root / '.pytest_cache' / name}"]


def percent(log: Path) -> str:
    seen = re.findall(r"\[ *(\d+%)\]", log.read_text(errors="replace"))
    return seen[-1] if seen else "0%"


if __name__ == "__main__":
    sys.exit(main())
