"""What Ray's errors say: whether a replica died, or what it had made was lost with its node."""

from __future__ import annotations

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import RayServeException

from deployments.errors import ReplicaUnfitError

# A replica died under its requests (OutOfMemoryError: Ray ended it, its node was short of memory), or will do so now,
# or with its node what it had made.
LOST = (RayActorError, NodeDiedError, WorkerCrashedError, OutOfMemoryError, ReplicaUnfitError, ObjectLostError)


def lost(error: BaseException) -> BaseException | None:
    """The death of a replica or of what it made, also where it made an argument of the call that failed.

    Such a failure is a RayTaskError when the call was made, and a RayServeException of the router when it was not.
    """
    while (cause := _cause_of(error)) is not None:
        error = cause
    return error if isinstance(error, LOST) else None


def _cause_of(error: BaseException) -> BaseException | None:
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return error.cause
    return error.__cause__ if isinstance(error, RayServeException) else None


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
