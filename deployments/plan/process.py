"""The walk as a process of its own: whoever asks needs no torch, and its environment is the one to be served.

The order goes in as JSON, what was measured comes out as JSON; what is written meanwhile goes to the error stream.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from deployments.model import ModelArgs
from deployments.plan.measured import Measured

MEASURED = TypeAdapter(Measured)


class MeasureOrder(BaseModel):
    """What is to be measured, at which size; None: as the model's defaults say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelArgs
    width: int | None = Field(None, ge=1, description="pixels")
    height: int | None = Field(None, ge=1, description="pixels")
    num_frames: int | None = Field(None, ge=1)


def run_measure(order: MeasureOrder, environment: Mapping[str, str]) -> Measured:
    """`environment` is the whole one of the process. A process that dies is an answer with a problem."""
    variables = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "deployments.plan"]
    ended = subprocess.run(command, input=order.model_dump_json().encode(), stdout=subprocess.PIPE, env=variables)
    try:
        return MEASURED.validate_json(ended.stdout)
    except ValueError:
        return Measured(order.model.name, problem=f"the process of the plan ended with the status {ended.returncode}")
