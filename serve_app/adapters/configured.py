"""What a configuration may say of LoRAs beyond what each says of itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from deployments.adapters.args import AdapterArgs
from deployments.errors import InvalidRequestError
from serve_app.adapters.names import check_no_clash
from serve_app.requests.limits import RequestLimits
from serve_app.requests.loras import AskedAdapter, check_scales, is_scale_of_all


def check_configured(adapters: Mapping[str, AdapterArgs], models: Collection[str], limits: RequestLimits) -> None:
    """Raises ValueError for one that is called as a model is, or whose scale no request may have."""
    check_no_clash(adapters, models)
    try:
        check_scales([AskedAdapter(name, each.scale, "adapters") for name, each in adapters.items()], limits)
    except InvalidRequestError as error:
        raise ValueError(error.message) from error


def check_arguments(arguments: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Of the pipeline, by where they stand. Raises ValueError for a scale of all LoRAs at once."""
    for place, given in arguments:
        for name, value in given.items():
            if is_scale_of_all(name, value):
                raise ValueError(f"{place}.{name}.scale: give each LoRA its own with adapters.NAME.scale")
