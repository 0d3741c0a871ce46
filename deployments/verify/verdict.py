"""What a check finds: a verdict for each stage, and all of them as a report. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["same bits", "within bounds", "does not apply", "not judged", "differs", "fails"]
BAD: tuple[Outcome, ...] = ("differs", "fails")
SHOWN = 3  # differences of a verdict that are told in words


@dataclass(frozen=True)
class Difference:
    """A value that is not the unsplit pipeline's.

    `relative` is the largest deviation divided by the largest value of the tensor; None where no numbers can be
    compared (another shape, type or word), or where they are not finite.
    """

    place: str  # such as images, or text_encoder.forward[0].last_hidden_state
    what: str
    relative: float | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@dataclass(frozen=True)
class Verdict:
    """What one part of the split does with the request, against the unsplit pipeline."""

    part: str  # encoder, denoiser, vae, engine, merged, resumed, ...
    outcome: Outcome
    told: str
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        more = len(self.differences) - SHOWN
        shown = [str(difference) for difference in self.differences[:SHOWN]]
        shown += [f"and {more} more"] if more > 0 else []
        return "; ".join(filter(None, [self.told, *shown]))


@dataclass(frozen=True)
class Report:
    """The check of one checkpoint. `problem`: why there was nothing to compare; then there are no verdicts."""

    model: str
    pipeline_class: str = ""
    device: str = ""
    dtype: str = ""
    request: dict[str, str] = field(default_factory=dict)  # its arguments in words
    verdicts: tuple[Verdict, ...] = ()
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and bool(self.verdicts) and not self.mismatches

    @property
    def mismatches(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome in BAD]

    @property
    def conclusion(self) -> str:
        """One sentence, which a log or a status can hold."""
        if self.problem:
            return f"{self.model} could not be checked: {self.problem}"
        if self.passed:
            return f"{self.model}: the split makes what the unsplit {self.pipeline_class} makes"
        first, *others = self.mismatches
        also = f" (and the verdicts on {', '.join(verdict.part for verdict in others)})" if others else ""
        return (
            f"{self.model}: the split does not make what the unsplit {self.pipeline_class} makes. "
            f"{first.part} {first.outcome}: {first}{also}"
        )

    def lines(self) -> list[str]:
        """For people: the request, a line for each verdict, the conclusion."""
        head = f"{self.pipeline_class} on {self.device}, {self.dtype}: " if self.pipeline_class else ""
        asked = ", ".join(f"{name} {value}" for name, value in self.request.items())
        part, outcome = (max((len(text) for text in column), default=0) for column in self._columns())
        rows = [f"  {v.part:<{part}}  {v.outcome:<{outcome}}  {v}".rstrip() for v in self.verdicts]
        return [*filter(None, [head + asked]), *rows, self.conclusion]

    def _columns(self) -> tuple[list[str], list[str]]:
        return [verdict.part for verdict in self.verdicts], [verdict.outcome for verdict in self.verdicts]
