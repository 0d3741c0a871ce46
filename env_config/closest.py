"""The known name that a misspelt one most likely means."""

import difflib
from collections.abc import Iterable

LONGEST_NAME = 80  # characters that are compared: the name may be a caller's


def closest(name: object, known: Iterable[str]) -> str | None:
    """None if no known name is close."""
    matches = difflib.get_close_matches(str(name)[:LONGEST_NAME], list(known), n=1)
    return matches[0] if matches else None


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """The question that names the closest known name; `otherwise` if no known name is close."""
    meant = closest(name, known)
    return otherwise if meant is None else f"did you mean {meant!r}?"


def hint(name: object, known: Iterable[str]) -> str:
    """For the end of a sentence about a name that is not known."""
    return "; " + did_you_mean(name, known, f"known: {', '.join(sorted(known))}")
