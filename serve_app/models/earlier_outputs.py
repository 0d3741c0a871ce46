"""The files that were made here before, for bodies that refer to them."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.errors import ConflictError, JobNotFoundError, ObjectNotFoundError
from serve_app.jobs.service import Jobs
from serve_app.requests.given.references import EarlierOutput
from serve_app.storage.base import StorageBackend


@dataclass(frozen=True)
class EarlierOutputs:
    """Those in the storage, and those of the caller's jobs, whichever model made them."""

    jobs: Jobs
    storage: StorageBackend

    async def read(self, earlier: EarlierOutput, caller: str, field: str) -> bytes:
        """The file that `field` names. Raises NotFoundError, ConflictError, StorageError."""
        key = earlier.file_id or await self._key_of_output(earlier, caller, field)
        try:
            data, _ = await self.storage.load(key)
        except ObjectNotFoundError as error:
            raise ObjectNotFoundError(f"{field}: there is no file {key[:200]!r} here", field) from error
        return data

    async def _key_of_output(self, earlier: EarlierOutput, caller: str, field: str) -> str:
        try:
            job = await self.jobs.get(earlier.id, caller)
        except JobNotFoundError as error:
            raise JobNotFoundError(f"{field}: there is no job {earlier.id[:96]!r}", field) from error
        if job.status != "completed":
            raise ConflictError(f"{field}: {job.id!r} cannot be used, it is {job.status}", field, "output_not_ready")
        if earlier.index >= len(job.outputs):
            raise JobNotFoundError(f"{field}: {job.id!r} has {len(job.outputs)} files, from 0", field)
        return job.outputs[earlier.index].key
