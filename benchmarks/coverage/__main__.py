"""Which pipelines are served: `python -m benchmarks.coverage --diffusers-tests DIR`; see docs/models.md.

DIR holds the package `tests` of a checkout of diffusers. Each pipeline class that diffusers exports is tried with the
tiny components and the call of its own test: the three stages, in a process each, must make the bits of the unsplit
pipeline; with `--engine` also the step engine alone, merged, and resumed in another process. float32, on the CPU.

    git clone https://github.com/huggingface/diffusers
    python -m benchmarks.coverage --diffusers-tests diffusers --engine
    git -C diffusers checkout v0.34.0     # for classes whose tests are gone since
    python -m benchmarks.coverage --diffusers-tests diffusers --engine --missing
    python -m benchmarks.coverage --tiny-models --engine --missing   # by the tiny models of Triptych's own tests

The rows of the classes that were judged are replaced in docs/benchmarks/coverage.jsonl, one after the other, and the
page is made again of all.
The exit status is 1 where a class is wrong or fails.
"""

from __future__ import annotations

import os

os.environ["MKL_CBWR"] = "AUTO,STRICT"  # before torch: the same bits whatever the addresses of the numbers
os.environ.update(
    {
        "DIFFUSERS_TEST_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",  # small stand-ins are made of what the tests take from the hub
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
    }
)

import argparse
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.coverage.exported import exported_modular_pipelines, exported_pipelines, is_modular
from benchmarks.coverage.page import write_page
from benchmarks.coverage.rows import MAX_REASON, Row, is_missing, newest, read_rows, row_of, write_rows

if TYPE_CHECKING:
    from benchmarks.coverage.cases import Case

NOT_YET = "not tried yet"
NO_TEST = "diffusers has no test with tiny components of it"
MODULAR = "a modular pipeline: diffusers' tests take its components from the hub"
OWN = "Triptych's tiny models"


def main() -> int:
    arguments = _arguments()
    if arguments.page:
        write_page(read_rows())
        return 0
    known = read_rows()
    wanted = _wanted(arguments, known)
    _import_libraries(arguments.packages)
    found = _run(arguments, wanted)
    worst = [row for row in found.values() if row.verdict in ("wrong", "failed")]
    return 1 if worst else 0


def _run(arguments: argparse.Namespace, wanted: list[str]) -> dict[str, Row]:
    """A row after the other: what was found before an interruption is kept."""
    from benchmarks.coverage.surroundings import hub
    from benchmarks.coverage.surroundings.allowances import allow_small_pictures

    run, found = _run_of_today(arguments), dict[str, Row]()
    if _is_kept(arguments):
        _write(_all_exported(read_rows()))
    with TemporaryDirectory() as place:
        hub.install(Path(place))
        cases, failed = _cases(arguments)
        allow_small_pictures()
        for error in sorted(set(failed.values())):
            print(f"tests that cannot be imported: {error}", flush=True)
        for pipeline in sorted({case.pipeline for case in cases}.intersection(wanted)):
            of_class = [case for case in cases if case.pipeline == pipeline]
            found[pipeline] = replace(_judged(pipeline, of_class, arguments), run=run)
            if _is_kept(arguments):
                known = read_rows()
                _write(known | {pipeline: newest(known.get(pipeline), found[pipeline])})
    if _is_kept(arguments) and not arguments.tiny_models:
        _write({name: _without_case(row, failed, run) if name in wanted else row for name, row in read_rows().items()})
    return found


def _cases(arguments: argparse.Namespace) -> tuple[list[Case], dict[str, str]]:
    if arguments.tiny_models:
        from benchmarks.coverage.own_cases import own_cases

        return own_cases(arguments.only), {}
    from benchmarks.coverage.cases import find_cases

    return find_cases(arguments.diffusers_tests, arguments.only)


def _write(rows: dict[str, Row]) -> None:
    write_rows(rows.values())
    write_page(rows)


def _judged(pipeline: str, cases: list[Case], arguments: argparse.Namespace) -> Row:
    from benchmarks.coverage.judge import judge_in_own_process

    found = []
    for case in cases:
        each = judge_in_own_process(case, arguments.placement, arguments.engine, arguments.timeout_s)
        found.append(each)
        print(f"{each.verdict:12} {pipeline} {case.name} {each.reason}", flush=True)
        if arguments.traces and each.trace:
            print(each.trace, flush=True)
    return row_of(pipeline, found)


def _all_exported(rows: dict[str, Row]) -> dict[str, Row]:
    """A row for each class that this diffusers exports, and for no other."""
    exported = [*exported_pipelines(), *exported_modular_pipelines()]
    return {name: rows.get(name, Row(name, "not_judged", NOT_YET)) for name in exported}


def _without_case(row: Row, failed: dict[str, str], run: str) -> Row:
    """Of a class that the run asked for and has not come by."""
    if row.reason not in (NOT_YET, NO_TEST, MODULAR):
        return row
    reason = MODULAR if is_modular(row.pipeline) else NO_TEST
    if row.pipeline in failed:
        reason = f"its test cannot be imported here: {failed[row.pipeline]}"
    return Row(row.pipeline, "not_judged", reason[:MAX_REASON], run=run)


def _is_kept(arguments: argparse.Namespace) -> bool:
    return bool(arguments.placement == "three_stage")


def _run_of_today(arguments: argparse.Namespace) -> str:
    tests = OWN if arguments.tiny_models else f"diffusers' tests of {_tests(arguments)}"
    versions = [f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, float32"
    return f"{datetime.now(UTC).date()}, {', '.join(versions)}, {tests}, {machine}"


def _tests(arguments: argparse.Namespace) -> str:
    return arguments.commit or _commit(arguments.diffusers_tests)


def _wanted(arguments: argparse.Namespace, known: dict[str, Row]) -> list[str]:
    exported = [*exported_pipelines(), *exported_modular_pipelines()]
    wanted = [name for name in exported if re.search(arguments.only, name)]
    if arguments.missing:
        wanted = [name for name in wanted if is_missing(known.get(name), arguments.engine)]
    return wanted


def _import_libraries(packages: Path | None) -> None:
    """In this process, from which all others are forked: before any thread runs."""
    warnings.filterwarnings("ignore")
    if packages:
        sys.path.append(str(packages))
    import torch

    from benchmarks.coverage.surroundings.libraries import make_torchvision_usable, restore_old_names

    torch.set_num_threads(1)
    make_torchvision_usable()
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    restore_old_names()


def _commit(folder: Path) -> str:
    asked = subprocess.run(
        ["git", "-C", str(folder), "describe", "--tags", "--always"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--diffusers-tests", type=Path, metavar="DIR", help="a folder that holds diffusers' `tests`")
    what.add_argument("--tiny-models", action="store_true", help="those of Triptych's own tests, in their place")
    what.add_argument("--page", action="store_true", help="only make docs/models.md again of the rows")
    parser.add_argument("--only", default="", metavar="REGEX", help="the classes whose name matches")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="the classes that no row judges; with --engine also those it was not tried of",
    )
    parser.add_argument("--engine", action="store_true", help="also the step engine: alone, merged, resumed, previews")
    parser.add_argument(
        "--placement",
        default="three_stage",
        choices=("three_stage", "two_stage", "one_stage"),
        help="which stages share a process; the rows are kept for three_stage alone",
    )
    parser.add_argument("--packages", type=Path, metavar="DIR", help="packages that only the tests need")
    parser.add_argument("--commit", help="of the tests, where DIR is no checkout of git")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one configuration")
    parser.add_argument("--traces", action="store_true", help="print the tracebacks of failures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
