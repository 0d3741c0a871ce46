"""What the stages say of LoRAs: what is in a file, and which of them a replica holds."""

from __future__ import annotations

import asyncio
import logging

from ray.serve.handle import DeploymentHandle

from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError, StageUnavailableError, TriptychError
from serve_app.adapters.records import Facts
from serve_app.errors import original_error
from serve_app.making.stages import Stages

logger = logging.getLogger(__name__)

READING_S = 600.0  # a repository of some gigabytes may have to be fetched
HOLDING_S = 2.0
FORGETTING_S = 30.0


async def read_adapter(stages: Stages, use: AdapterUse, field: str) -> Facts:
    """What a denoiser finds in the file, which it fetches for that.

    Waits for a model that is asleep as long as a caller does. Raises ModelLoadingError, InvalidRequestError that
    names `field` for a LoRA that does not fit the model, StageUnavailableError where its place does not answer, and
    what a lost replica raises. No text shows where the file is.
    """
    await stages.sleep.awake(max_wait_s=stages.sleep.max_wait_s)
    try:
        with stages.sleep.in_use():
            async with asyncio.timeout(READING_S):
                plain = await stages.denoiser.inspect_adapter.remote(use.plain())
    except TimeoutError as error:
        raise StageUnavailableError(f"the LoRA could not be brought here within {READING_S:g} s") from error
    except Exception as error:
        failure = original_error(error)
        if isinstance(failure, InvalidRequestError):
            raise InvalidRequestError(f"{field}: {_without_place(failure.message, use)}", field) from error
        if isinstance(failure, StageUnavailableError):
            raise StageUnavailableError(_without_place(str(failure), use)) from error
        if isinstance(failure, TriptychError | OSError):
            logger.warning("the LoRA %s could not be read: %s", use.name, failure)
            raise StageUnavailableError("the LoRA could not be brought here from its place; try again later") from error
        raise
    return Facts.of(plain)


def _without_place(message: str, use: AdapterUse) -> str:
    return message.replace(use.path, "its place").replace(use.path.removeprefix("s3://"), "its place")


async def replicas_that_hold(stages: Stages) -> dict[str, dict[str, int]]:
    """Of each digest, how many replicas of each deployment have it in memory; what does not answer is left out."""
    handles = await awake_deployments(stages)
    answers = await asyncio.gather(
        *(handle.broadcast("adapters_held").results_async(timeout_s=HOLDING_S) for handle in handles.values()),
        return_exceptions=True,
    )
    held: dict[str, dict[str, int]] = {}
    for name, replicas in zip(handles, answers, strict=True):
        if isinstance(replicas, BaseException):
            logger.warning("%s does not say which LoRAs it holds: %r", name, replicas)
            continue
        for digest in (digest for replica in replicas for digest in replica):
            held.setdefault(digest, {}).setdefault(name, 0)
            held[digest][name] += 1
    return held


async def forget_adapter(stages: Stages, digest: str) -> None:
    """No replica keeps it longer than the requests that use it; one that does not answer lets others push it out."""
    handles = (await awake_deployments(stages)).values()
    answers = await asyncio.gather(
        *(handle.broadcast("forget_adapter", digest).results_async(timeout_s=FORGETTING_S) for handle in handles),
        return_exceptions=True,
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            logger.warning("a deployment did not forget the LoRA %s: %r", digest, answer)


async def awake_deployments(stages: Stages) -> dict[str, DeploymentHandle]:
    """What sleeps holds nothing."""
    resting = await stages.sleep.resting_deployments()
    return {name: handle for name, handle in stages.deployments().items() if name not in resting}
