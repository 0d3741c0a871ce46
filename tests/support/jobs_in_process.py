"""The application in this process with its jobs running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from serve_app.jobs.service import JobArgs, Jobs
from tests.support.in_process import Server, serving


@asynccontextmanager
async def server_with_jobs(folder: Path, **settings: Any) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    with serving(folder) as server:
        server.configure(**settings)
        ingress = server.ingress
        ingress.jobs = Jobs(
            JobArgs(), folder, "app", ingress.shared.generate, ingress.storage, ingress.admission, ingress.describe
        )
        ingress.jobs.start()
        try:
            async with server.client(timeout=60) as client:
                yield server, client
        finally:
            ingress.jobs.close()


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            job: dict[str, Any] = (await client.get(f"/v1/jobs/{job_id}")).json()
            if job["status"] not in ("queued", "in_progress"):
                return job
            await asyncio.sleep(0.02)
