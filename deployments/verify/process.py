"""The check as a process of its own: its memory is free again afterwards, and its environment is the one to be served.

Whoever asks needs no torch. The order goes in as a line of JSON, the report comes out as one; what is written meanwhile
goes to the error stream. The process ends with the one that asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, TypeAdapter

from deployments.messages import StageName
from deployments.model import ModelArgs
from deployments.verify.asked import Asked
from deployments.verify.verdict import Report

REPORT = TypeAdapter(Report)
# Equal numbers give equal bits wherever they lie in memory: read by Intel's library when it is loaded.
SAME_BITS_ANYWHERE = {"MKL_CBWR": "AUTO,STRICT"}


class CheckOrder(BaseModel):
    """What is to be checked, and asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelArgs
    processes: tuple[tuple[StageName, ...], ...]  # the stages of each process that will serve
    asked: Asked = Asked()


def run_check(order: CheckOrder, environment: Mapping[str, str]) -> Report:
    """`environment` is the whole one of the process. A process that dies is a report with a problem."""
    variables = {**SAME_BITS_ANYWHERE, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-m", "deployments.verify"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(order.model_dump_json().encode() + b"\n")
            process.stdin.flush()  # and open until the end: it is how the process knows that this one lives
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    try:
        return REPORT.validate_json(answer)
    except ValueError:
        return Report(order.model.name, problem=f"the process of the check ended with the status {process.returncode}")
