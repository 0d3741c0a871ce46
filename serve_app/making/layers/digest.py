"""What counts as the same work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from deployments.messages import GenerationRequest, InputFile, OutputFormat, RequestWarning


def work_digest(request: GenerationRequest) -> str:
    """SHA-256, equal for requests that ask for the same work: all is the same but their ids and what answers tell."""
    work = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    del work["request_id"], work["warnings"]
    return hashlib.sha256(json.dumps(work, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, InputFile):
        return {"file": hashlib.sha256(value.data).hexdigest()}
    if isinstance(value, OutputFormat | RequestWarning):
        return vars(value)
    raise TypeError(f"a {type(value).__name__} is no part of a request")
