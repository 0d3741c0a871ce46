"""How the text of a variable becomes its value, and the words for what is allowed."""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from pydantic import ValidatorFunctionWrapHandler, WrapValidator

FLAG_TEXTS = {
    **dict.fromkeys(("1", "true", "yes", "y", "t", "on"), True),
    **dict.fromkeys(("0", "false", "no", "n", "f", "off"), False),
}


def flag() -> WrapValidator:
    return accepting("true (1 true yes y t on) or false (0 false no n f off)", parse_flag)


def integer(at_least: int, at_most: int | None = None) -> WrapValidator:
    def is_within(value: int) -> bool:
        return at_least <= value and (at_most is None or value <= at_most)

    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    return accepting(f"an integer {bounds}", int, is_within)


def number_above(bound: float) -> WrapValidator:
    def is_within(value: float) -> bool:
        return math.isfinite(value) and value > bound

    return accepting(f"a finite number above {bound:g}", float, is_within)


def one_of(choices: Any, fold: Callable[[str], str] = str.lower) -> WrapValidator:
    """Accept the members of a `Literal` type; `fold` brings other spellings of a member to its own."""
    return accepting(f"one of {', '.join(get_args(choices))}", fold)


def path() -> WrapValidator:
    return accepting("a path (a leading ~ must name a known home directory)", parse_path, has_known_home)


def absolute_path() -> WrapValidator:
    return accepting("an absolute path", parse_path, Path.is_absolute)


def http_url() -> WrapValidator:
    return accepting("an http:// or https:// URL without user name and password", str, is_http_url)


def lower_cased() -> WrapValidator:
    return accepting("a name", str.lower)


def stream_or_path() -> WrapValidator:
    return accepting("stdout, stderr or a file path", parse_stream_or_path)


def positive_integers() -> WrapValidator:
    def are_positive(values: tuple[int, ...]) -> bool:
        return all(value > 0 for value in values)

    return accepting("a comma-separated list of integers of at least 1", parse_integers, are_positive)


def patterns() -> WrapValidator:
    return accepting("a comma-separated list of wildcard patterns", parse_patterns)


def accepting(
    words: str, parse: Callable[[str], Any], is_allowed: Callable[[Any], bool] = lambda value: True
) -> WrapValidator:
    """Build the rule of a field: text is parsed, every value is checked, and `words` say what is allowed."""

    def validate(value: Any, check_type: ValidatorFunctionWrapHandler) -> Any:
        with suppress(ValueError):  # pydantic's ValidationError is one
            accepted = check_type(parse(value) if isinstance(value, str) else value)
            if accepted is None or is_allowed(accepted):
                return accepted
        raise ValueError(f"must be {words}")

    return WrapValidator(validate)


def parse_flag(text: str) -> bool:
    if text.strip().lower() not in FLAG_TEXTS:
        raise ValueError(text)
    return FLAG_TEXTS[text.strip().lower()]


def parse_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def has_known_home(value: Path) -> bool:
    return not str(value).startswith("~")


def is_http_url(text: str) -> bool:
    url = urlsplit(text)  # its port is checked when read
    return (
        url.scheme in ("http", "https")
        and bool(url.hostname)
        and "@" not in url.netloc
        and (url.port is None or url.port > 0)
    )


def parse_stream_or_path(text: str) -> str:
    return text.lower() if text.lower() in ("stdout", "stderr") else os.path.expanduser(text)


def parse_integers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


def parse_patterns(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())
