"""The first ten minutes on a card: `python -m benchmarks.gpu_first_look`; the page is in docs/benchmarks/.

Runs the parts of benchmarks/first_look/ one after the other, each in a process of its own and in its box of time, and
stops with a sentence at the first thing that is wrong. Needs torch, transformers and the wheels that `--prepare` brings
into an ignored folder (`benchmarks/gpu_first_look.sh` does that, too); neither Ray nor a checkpoint.

    python -m benchmarks.gpu_first_look --prepare .wheels     here, where packages can be fetched
    python -m pip install --no-index --no-deps --target .site .wheels/*.whl; PYTHONPATH=.site:. python -m ...   there
    python -m benchmarks.gpu_first_look --small               a rehearsal on the CPU, with small sizes
    python -m benchmarks.gpu_first_look --part two_cards      on a machine with two cards; it takes some minutes
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.first_look.table import PARTS, Part

ALL_S = 570  # seconds for everything: under ten minutes
SMALL_TIMES = 3  # longer boxes for a rehearsal on a busy machine
NAME = "gpu_first_look"
ONLY = f"only this; repeatable. Looked at by name alone: {', '.join(part.name for part in PARTS if part.by_name)}"
PYTHON = "3.12"  # of the machine with the card
WHEELS = (
    *("diffusers", "greenlet", "cache-dit", "runai-model-streamer", "boto3", "botocore", "s3transfer", "jmespath"),
    *("pydantic", "pydantic-core", "typing-inspection", "annotated-types"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Looked:
    """A part that ran: its findings, or why there are none."""

    part: Part
    seconds: float
    figures: dict[str, Any]
    lines: tuple[str, ...]
    wrong: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small sizes, on the CPU: a rehearsal; no page is written")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help=ONLY)
    parser.add_argument(
        "--out", type=Path, help="the folder for the JSON and the page; default: where benchmarks write"
    )
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="fetch the wheels that the machine lacks")
    options = parser.parse_args(arguments)
    if options.prepare:
        return prepare(options.prepare)
    parts = [part for part in PARTS if (part.name in options.part if options.part else not part.by_name)]
    looked = look(parts, options.small)
    write(looked, parts, options.small, options.out)
    wrong = next((each for each in looked if each.wrong), None)
    print(f"wrong, in {wrong.part.name}: {wrong.wrong}" if wrong else "nothing is wrong", flush=True)
    return 1 if wrong else 0


def look(parts: Sequence[Part], is_small: bool) -> list[Looked]:
    """Until the first that is wrong, or until the time is over."""
    until, looked = time.monotonic() + ALL_S * (SMALL_TIMES if is_small else 1), []
    for part in parts:
        left = until - time.monotonic()
        if left <= 0:
            break
        looked.append(look_at(part, is_small, min(left, part.box_s * (SMALL_TIMES if is_small else 1))))
        print(
            "\n".join([f"{part.title} ({looked[-1].seconds:.0f} s)", *(f"  {line}" for line in looked[-1].lines)]),
            flush=True,
        )
        if looked[-1].wrong:
            break
    return looked


def look_at(part: Part, is_small: bool, box_s: float) -> Looked:
    began = time.monotonic()
    process = subprocess.Popen(
        command_of(part, is_small), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        answer, errors = process.communicate(timeout=box_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.communicate()
        return Looked(part, box_s, {}, (), f"it did not end within its {box_s:.0f} s")
    seconds = time.monotonic() - began
    try:
        found = json.loads(answer)
    except ValueError:
        return Looked(part, seconds, {}, (), f"it ended with the status {process.returncode}: {last_line(errors)}")
    return Looked(part, seconds, found["figures"], tuple(found["lines"]), found["wrong"])


def command_of(part: Part, is_small: bool) -> list[str]:
    device, size = ("cpu", "small") if is_small else ("cuda", "full")
    return [sys.executable, "-m", "benchmarks.first_look", part.name, device, size]


def last_line(errors: str) -> str:
    return next((line for line in reversed(errors.splitlines()) if line.strip()), "it said nothing")


def write(looked: Sequence[Looked], parts: Sequence[Part], is_small: bool, out: Path | None) -> None:
    """One JSON, and one page where a card was looked at (or where `out` says)."""
    figures = {each.part.name: {"seconds": each.seconds, "wrong": each.wrong, **each.figures} for each in looked}
    result = {"machine": report.machine(), "is_small": is_small, "parts": figures}
    if out is None and not is_small:
        report.write(NAME, result, page(looked, parts))
        return
    folder = out or report.RAW
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if out is not None:
        (folder / f"{NAME}.md").write_text("\n".join(page(looked, parts)) + "\n", encoding="utf-8")


def page(looked: Sequence[Looked], parts: Sequence[Part]) -> list[str]:
    lines = [
        "# A first look at a card",
        "",
        f"`python -m benchmarks.{NAME}`, models of published sizes with random weights.",
    ]
    for each in looked:
        lines += ["", f"## {each.part.title}", "", *(f"* {line}" for line in each.lines)]
        lines += [f"* **Wrong**: {each.wrong}"] if each.wrong else []
        lines += [f"* {each.seconds:.0f} s"]
    if not_run := [part.title for part in parts[len(looked) :]]:
        lines += ["", f"Not looked at: {', '.join(not_run)}."]
    return lines


def prepare(folder: Path) -> int:
    """The wheels, of the versions in constraints.txt, for that machine's Python; pip takes them from its own index."""
    pinned = dict(
        line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"
    )
    names = {name.lower().replace("_", "-"): (name, version) for name, version in pinned.items()}
    wanted = [f"{name}=={names[name][1]}" for name in WHEELS if name in names]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    command += ["--implementation", "cp", *(f"--platform={each}" for each in PLATFORMS), "--dest", str(folder)]
    return subprocess.run([*command, *wanted]).returncode


if __name__ == "__main__":
    sys.exit(main())
