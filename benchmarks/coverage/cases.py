"""The test classes of a folder of diffusers' tests that build a tiny pipeline and call it."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.coverage.checkpoint import TestCall, save_checkpoint
from benchmarks.coverage.exported import exported_class

MADE_BY = ("get_dummy_components", "get_dummy_inputs")
_NAME = re.compile(r"\b\w*Pipeline\w*\b|\bSanaWMLTX2Refiner\b")


@dataclass(frozen=True)
class Case:
    """A configuration of a pipeline class, as a test builds and calls it."""

    name: str  # the test's file and class, or the tiny model
    pipeline: str  # the exported class
    save: Callable[[Path], TestCall]  # writes the checkpoint into this folder
    folder: str = "checkpoint"  # the name that the folder must have


def find_cases(tests: Path, only: str = "") -> tuple[list[Case], dict[str, str]]:
    """Of the classes that match `only`; with why tests could not be imported, by the pipelines that they name.

    `tests` is a folder that holds diffusers' package `tests`; it must not have been imported from elsewhere.
    """
    sys.path.insert(0, str(tests.resolve()))
    cases: list[Case] = []
    failed: dict[str, str] = {}
    seen: set[Any] = set()
    for file in _files(tests, only):
        module_name = ".".join(file.relative_to(tests).with_suffix("").parts)
        try:
            module = importlib.import_module(module_name)
        except BaseException as error:  # noqa: BLE001  (a test file may also skip itself)
            failed |= dict.fromkeys(_NAME.findall(file.read_text(encoding="utf-8")), f"{type(error).__name__}: {error}")
            continue
        cases += _cases(module, f"{file.parent.name}/{file.stem}", seen)
    return [case for case in cases if re.search(only, case.pipeline)], failed


def _files(tests: Path, only: str) -> Iterator[Path]:
    """Importing takes the most time: only files that name a class that matches."""
    for file in sorted((tests / "tests" / "pipelines").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if all(each in text for each in MADE_BY) and any(re.search(only, name) for name in set(_NAME.findall(text))):
            yield file


def _cases(module: Any, place: str, seen: set[Any]) -> Iterator[Case]:
    """Newer tests split a class into several with one configuration: it is taken once."""
    for name, cls in vars(module).items():
        if not inspect.isclass(cls) or cls.__module__ != module.__name__ or not all(hasattr(cls, m) for m in MADE_BY):
            continue
        pipeline_class = getattr(cls, "pipeline_class", None)
        key = (pipeline_class, *(getattr(cls, method) for method in MADE_BY))
        if inspect.isclass(pipeline_class) and key not in seen and not _is_for_others(cls):
            seen.add(key)
            yield Case(f"{place}::{name}", exported_class(pipeline_class).__name__, partial(save_checkpoint, cls))


def _is_for_others(cls: Any) -> bool:
    """A class that others build on, each with arguments of its own for the components."""
    parameters = list(inspect.signature(cls.get_dummy_components).parameters.values())[1:]
    return any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
