"""The application in this process with its jobs running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.in_process import Server, serving


@asynccontextmanager
async def server_with_jobs(folder: Path, **settings: Any) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """A server that runs its jobs, and a client of it."""
    with serving(folder) as server:
        server.configure(**settings)
        await server.open()
        server.service.start()
        async with server.client(timeout=60) as client:
            yield server, client


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            job: dict[str, Any] = (await client.get(f"/v1/jobs/{job_id}")).json()
            if job["status"] not in ("queued", "in_progress"):
                return job
            await asyncio.sleep(0.02)
