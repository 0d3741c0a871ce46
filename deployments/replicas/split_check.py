"""`verify: true`: a replica that denoises starts only where the split makes what the unsplit pipeline makes."""

from __future__ import annotations

import logging

from deployments.errors import CheckpointError
from deployments.messages import StageName
from deployments.model import ModelArgs
from deployments.verify.process import CheckOrder, run_check
from env_config.children import environment_of_children

logger = logging.getLogger(__name__)


def check_split(model: ModelArgs, processes: tuple[tuple[StageName, ...], ...]) -> None:
    """In a process of its own, on this replica's device, before its own weights are there.

    Raises CheckpointError where the split makes anything else, or cannot be checked.
    """
    logger.info("verify: %s is held against the unsplit pipeline", model.name)
    report = run_check(CheckOrder(model=model, processes=processes), environment_of_children())
    for line in report.lines():
        logger.log(logging.INFO if report.passed else logging.ERROR, "verify: %s", line)
    if not report.passed:
        raise CheckpointError(f"verify: {report.conclusion}")
