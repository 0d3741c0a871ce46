"""A job tells its warnings while it waits and when it is done: in its object, its events and its result."""

from __future__ import annotations

from pathlib import Path

from tests.support.jobs_in_process import ended, server_with_jobs


async def test_a_job_tells_its_warnings_in_its_object_its_events_and_its_result(tmp_path: Path) -> None:
    body = {"prompt": "x", "background": True, "style": "vivid", "cfg": 3, "strict": False}
    async with server_with_jobs(tmp_path / "outputs") as (_, client):
        accepted = (await client.post("/v1/images/generations", json=body)).json()
        job = await ended(client, accepted["id"])
        events = (await client.get(f"/v1/jobs/{job['id']}/events")).text
    expected = [("no_effect", "style"), ("unknown_parameter", "cfg")]
    for told in (accepted["warnings"], job["warnings"], job["result"]["warnings"]):
        assert [(warning["code"], warning["param"]) for warning in told] == expected
    assert events.count("event: warning\n") == len(expected)
