"""Cases that only `make test TESTS=rest` makes: of each mechanism one case runs every time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def further(*values: Any) -> Any:
    """The case of these values, among those of `pytest.mark.parametrize`."""
    return pytest.param(*values, marks=pytest.mark.rest)


def all_but(shown: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All the `cases`, of which only those that are `shown` run every time."""
    always = list(shown)
    return [case if case in always else further(case) for case in cases]
