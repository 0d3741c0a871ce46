"""What a docstring in diffusers' style says of each parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CHARS = 400  # of a description
_NUMBER = r"`?(-?\d+(?:\.\d+)?)`?"
_BOUNDS = (
    re.compile(rf"\bbetween {_NUMBER} and {_NUMBER}", re.IGNORECASE),
    re.compile(rf"\b(?:in|range)(?: the range)?(?: of)? `?\[ ?{_NUMBER}, ?{_NUMBER} ?\]", re.IGNORECASE),
)
_SHAPE = re.compile(r"`[(\[]([^)\]`]*[A-Za-z][^)\]`]*,[^)\]`]*)[)\]]`")  # `(batch, channels, samples)`, not `[0, 1]`
_SECTION = re.compile(r"^\s*(Returns|Examples?|Raises|Yields):", re.MULTILINE)


@dataclass(frozen=True)
class ParameterDoc:
    """`name (type, *optional*): text` taken apart."""

    type: str = ""
    text: str = ""

    @property
    def is_optional(self) -> bool:
        return "optional" in self.type

    @property
    def description(self) -> str:
        """Its first sentences, without the markup of links."""
        text = re.sub(r"\[`?~?([^\]`]+)`?\](\([^)]*\))?", r"\1", self.text)
        if len(text) <= MAX_CHARS:
            return text
        whole, stop, _ = text[:MAX_CHARS].rpartition(". ")
        return whole + "." if stop else text[:MAX_CHARS] + "..."

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of a number, where the text gives both."""
        found = next((found for pattern in _BOUNDS if (found := pattern.search(self.text))), None)
        return (float(found[1]), float(found[2])) if found and float(found[1]) < float(found[2]) else None

    @property
    def shape(self) -> tuple[str, ...]:
        """The dimensions of a tensor as the text names them, in lower case; empty where it does not."""
        found = _SHAPE.search(self.text)
        return tuple(part.strip().lower() for part in found[1].split(",")) if found else ()


NO_DOC = ParameterDoc()


def parameter_docs(docstring: str | None, names: Iterable[str]) -> dict[str, ParameterDoc]:
    """Of the parameters that the docstring has an entry for."""
    text = docstring or ""
    starts: dict[int, str] = {}
    for name in names:
        found = re.search(rf"^[ \t]*`?{re.escape(name)}`?[ \t]*\(", text, re.MULTILINE)
        if found:
            starts[found.end()] = name
    ends = sorted([*starts, *(found.start() for found in _SECTION.finditer(text)), len(text)])
    docs = {}
    for start, name in starts.items():
        end = next(each for each in ends if each > start)
        entry = text[start:end]
        docs[name] = _taken_apart(entry if end not in starts else entry[: entry.rstrip().rfind("\n") + 1])
    return docs


def _taken_apart(entry: str) -> ParameterDoc:
    """`entry` begins behind the bracket that opens the type."""
    depth = 1
    for index, character in enumerate(entry):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return ParameterDoc(_on_one_line(entry[:index]), _on_one_line(entry[index + 1 :].lstrip(" :")))
    return NO_DOC


def _on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
