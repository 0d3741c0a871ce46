"""EnvSection: a group of variables declared as fields; the only code that reads os.environ."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo

MASK = "**********"
STRICT = ConfigDict(
    frozen=True, extra="forbid", populate_by_name=True, validate_default=True, hide_input_in_errors=True
)


class EnvSection(BaseModel):
    """The variables under one heading of the document: one field each, built with `variable`.

    A field takes its value by the variable's name or by its own: the environment gives
    `CacheDiT(SGLANG_CACHE_DIT_FN="4")`, code may write `CacheDiT(fn=4)`; both obey the same bounds.
    """

    model_config = STRICT

    heading: ClassVar[tuple[str, ...]]
    when_unset: ClassVar[str] = "not set"

    @classmethod
    @functools.cache
    def declarations(cls) -> tuple["Declaration", ...]:
        return tuple(Declaration.of(cls, field, info) for field, info in cls.model_fields.items())


def variable(name: str, default: Any, description: str, effect: str) -> Any:
    """Declare the variable `name`: `description` is the document's, `effect` what Triptych does with it."""
    return Field(default, alias=name, description=description, json_schema_extra={"effect": effect})


@dataclass(frozen=True)
class Declaration:
    """What one field of a section declares, as the document, the checker and the tests read it."""

    section: type[EnvSection]
    field: str
    variable: str
    default: str  # as the document writes it
    description: str
    effect: str
    is_secret: bool

    @classmethod
    def of(cls, section: type[EnvSection], field: str, info: FieldInfo) -> "Declaration":
        assert info.alias is not None
        assert info.description is not None
        assert isinstance(info.json_schema_extra, dict)
        return cls(
            section=section,
            field=field,
            variable=info.alias,
            default=section.when_unset if info.default is None else shown(info.default),
            description=info.description,
            effect=str(info.json_schema_extra["effect"]),
            is_secret=SecretStr in get_args(info.annotation),
        )


def shown(value: object) -> str:
    """Write a value as a user would read it; a secret is masked."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


@dataclass(frozen=True)
class Problem:
    """One bad value: the variable, its text as it may be shown (None = not set), and what is allowed."""

    variable: str
    value: str | None
    allowed: str

    @classmethod
    def of(cls, declaration: Declaration, text: str | None, allowed: str) -> "Problem":
        if text is not None:
            text = MASK if declaration.is_secret else re.sub(r"//.*@", f"//{MASK}@", text)
        return cls(declaration.variable, text, allowed)

    def __str__(self) -> str:
        value = "is not set" if self.value is None else f"= {self.value!r}"
        return f"{self.variable} {value}: {self.allowed}"


class EnvConfigError(ValueError):
    """Every bad value of a process, one line each; its `args` are `Problem`s, so that it can be pickled."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.args

    def __str__(self) -> str:
        lines = [f"{len(self.problems)} environment variable(s) cannot be used:"]
        return "\n  ".join(lines + [str(problem) for problem in self.problems])


def read_environ(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables set in `environ` (None: in this process), trimmed; a blank one counts as unset."""
    source = os.environ if environ is None else environ
    return {name: text.strip() for name, text in source.items() if text.strip()}
