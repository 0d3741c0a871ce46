"""The processes that write files, and what they wrote, told to the meter of the replica."""

from __future__ import annotations

import time

from deployments.media.files import FileToWrite
from deployments.media.pool import MediaPool
from deployments.messages import MediaFile
from deployments.metrics.meter import Meter


class MediaMetrics:
    """The workers that write files; told at each look."""

    def __init__(self, meter: Meter, pool: MediaPool) -> None:
        self._meter, self._pool = meter, pool
        self._deaths_before = 0
        meter.begin("media")

    def look(self) -> None:
        """Cheap: nobody is asked."""
        workers = self._pool.workers()
        for state, count in (("idle", workers.idle), ("busy", workers.busy)):
            self._meter.set("triptych_media_workers", count, state=state)
        self._meter.count("triptych_media_worker_deaths_total", workers.deaths - self._deaths_before)
        self._deaths_before = workers.deaths

    def write(self, file: FileToWrite) -> MediaFile:
        """The file, written by the pool; raises what MediaPool.write raises."""
        began = time.perf_counter()
        written = self._pool.write(file)
        self._meter.observe("triptych_media_seconds", time.perf_counter() - began, format=file.format)
        self._meter.count("triptych_media_bytes_total", len(written.data), format=file.format)
        return written
