"""What a LoRA may be called, and how a request names one in `model`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator

SEPARATOR = ":"  # between the model and the adapter
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def check_adapter_name(name: str) -> str:
    """Raises ValueError. A name stands in addresses, in `model` behind a colon, and in logs."""
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise ValueError(
            f"{name[:80]!r} must be 1 to 64 of the letters A to Z, digits, '.', '_' and '-', and begin with a letter "
            "or a digit"
        )
    return name


AdapterName = Annotated[str, AfterValidator(check_adapter_name)]


def adapter_in(model: str | None, names: Collection[str]) -> str | None:
    """The adapter of MODEL:ADAPTER, where MODEL is one of `names`; None where no adapter is named."""
    if model is None or model in names:
        return None
    base, separator, adapter = model.rpartition(SEPARATOR)
    return adapter if separator and base in names and adapter else None


def name_in_model(model: str, adapter: str) -> str:
    """MODEL:ADAPTER, as a request may say it in `model`."""
    return f"{model}{SEPARATOR}{adapter}"


def check_no_clash(adapters: Collection[str], models: Collection[str]) -> None:
    """Raises ValueError for an adapter that would be called as a model is."""
    for adapter in adapters:
        if (model := model_called(adapter, models, models)) is not None:
            raise ValueError(f"adapters: {adapter!r} is taken: a model is called {model!r}")


def model_called(adapter: str, own: Collection[str], models: Collection[str]) -> str | None:
    """The name of a model that an adapter would have too, alone or behind one of `own`, the names of its model."""
    for model in models:
        if (adapter_in(model, [each for each in own if each != model]) or model) == adapter:
            return model
    return None
