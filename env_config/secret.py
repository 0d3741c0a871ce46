"""Secrets among the YAML `args`: a config says where a secret stands, never what it is, for Serve shows its config."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

HOW = "write where the secret stands, {file: /absolute/path} or {env: NAME}, not the secret: Ray Serve shows its config"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PASSWORD_IN_URL = re.compile(r"^[^/?#]*//[^/?#]*@")


class SecretError(ValueError):
    """A secret cannot be read where the arguments say that it stands."""


@dataclass(frozen=True)
class SecretReference:
    """`{file: PATH}` or `{env: NAME}`: where a secret is read by the process that needs it.

    As a field of a pydantic model it refuses a plain value, and repeats nothing of it.
    """

    file: Path | None = None
    env: str | None = None

    def read(self, argument: str) -> str:
        """The secret, without the line break at its end. Raises SecretError that names `argument`."""
        secret = self._from_file(argument) if self.file else os.environ.get(self.env or "", "")
        secret = secret.rstrip("\r\n")
        if not secret:
            place = f"the file {str(self.file)!r} is empty" if self.file else f"the variable {self.env} is not set"
            raise SecretError(f"{argument}: {place}")
        return secret

    def _from_file(self, argument: str) -> str:
        assert self.file is not None
        try:
            return self.file.read_text(encoding="utf-8")
        except OSError as error:
            raise SecretError(f"{argument}: the file {str(self.file)!r} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError:
            raise SecretError(f"{argument}: the file {str(self.file)!r} is not UTF-8") from None

    @classmethod
    def of(cls, value: Any) -> "SecretReference":
        """Raises ValueError, whose text has nothing of `value`."""
        if isinstance(value, cls):
            return value
        match dict(value) if isinstance(value, Mapping) else None:
            case {"file": str() | Path() as file, **others} if not others and _is_absolute_path(str(file)):
                return cls(file=Path(file))
            case {"env": str() as name, **others} if not others and _NAME.fullmatch(name):
                return cls(env=name)
        raise ValueError(HOW)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.of)


def _is_absolute_path(text: str) -> bool:
    return text.startswith("/") and text.isprintable()


def _path_and_no_secret(path: Path) -> Path:
    if not str(path).isprintable() or "PRIVATE KEY" in str(path) or str(path).startswith("sk-"):
        raise ValueError("must be the path of a file, not what stands in it: Ray Serve shows its config")
    return path


def without_password(url: str) -> str:
    """A URL that has no user and password. Raises ValueError, whose text has nothing of it."""
    if _PASSWORD_IN_URL.match(url):
        raise ValueError("must not have a user and password in it: Ray Serve shows its config")
    return url


SecretPath = Annotated[Path, AfterValidator(_path_and_no_secret)]  # of a file whose content is secret
PlainURL = Annotated[str, AfterValidator(without_password)]
