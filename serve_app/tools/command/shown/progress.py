"""Progress on stderr: a bar on a terminal, a few lines elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from serve_app.tools.command.shown.text import printable


class Progress(Protocol):
    """How far something is."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, percent: int, step: int, num_steps: int, eta_s: float | None) -> None: ...

    def done(self) -> None: ...


@contextmanager
def shown_progress(title: str, is_quiet: bool = False) -> Iterator[Progress]:
    if is_quiet:
        yield Nothing()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bars

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        detail = TextColumn("{task.fields[detail]}", markup=False)
        with Bars(*columns, detail, console=Console(stderr=True), transient=True) as bars:
            yield Bar(bars, bars.add_task(printable(title).replace("\n", " "), total=100, detail=""))


class Bar:
    """A bar of rich."""

    def __init__(self, bars: Any, task: Any) -> None:
        self._bars = bars
        self._task = task

    def say(self, text: str) -> None:
        self._bars.update(self._task, detail=printable(text))

    def warn(self, text: str) -> None:
        self._bars.console.print(f"warning: {printable(text)}", markup=False, highlight=False)

    def step(self, percent: int, step: int, num_steps: int, eta_s: float | None) -> None:
        self._bars.update(self._task, completed=percent, detail=step_in_words(step, num_steps, eta_s))

    def done(self) -> None:
        self._bars.update(self._task, completed=100, detail="made")


class Lines:
    """A line for each thing that is said, and for each quarter of the steps."""

    def __init__(self) -> None:
        self._quarters = 0
        self._said = ""

    def say(self, text: str) -> None:
        if text != self._said:
            print(printable(text), file=sys.stderr, flush=True)
        self._said = text

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def step(self, percent: int, step: int, num_steps: int, eta_s: float | None) -> None:
        quarters = 4 * step // max(1, num_steps)
        if quarters > self._quarters:
            self._quarters = quarters
            self.say(step_in_words(step, num_steps, eta_s))

    def done(self) -> None:
        self.say("made")


class Nothing:
    """Says nothing but warnings."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        print(f"warning: {printable(text)}", file=sys.stderr)

    def step(self, percent: int, step: int, num_steps: int, eta_s: float | None) -> None: ...

    def done(self) -> None: ...


def step_in_words(step: int, num_steps: int, eta_s: float | None) -> str:
    left = f", about {eta_s:.0f} s left" if eta_s and eta_s >= 1 else ""
    return f"step {step} of {num_steps}{left}"
