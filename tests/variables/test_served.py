"""What only shows when served: variables on two nodes, per deployment, in logs; and that no secret gets out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.s3_server import s3_server
from tests.support.serve_on_two_nodes import OVERRIDES

pytestmark = [pytest.mark.timeout(600), pytest.mark.rest]

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("Encoder", "Denoiser", "VAE")
STEPS = 12


@dataclass(frozen=True)
class Served:
    """What an application on two raylets answered and left behind."""

    report: dict[str, Any]
    folder: Path  # the cache root, traces, dumps and logs of the replicas
    session: Path  # Ray's own logs
    output: str  # of the process that served
    secrets: tuple[str, str]
    stored: list[str]  # keys in the bucket

    def environment(self, deployment: str) -> dict[str, dict[str, str]]:
        [rows] = self.report["dev"]["config"][deployment].values()
        return {row["variable"]: row for row in rows}


@pytest.fixture(scope="module")
def served(flux_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two-nodes")
    ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets in it have 107 characters
    with s3_server() as server:
        server.create_bucket("pictures")
        keys = {
            "SGLANG_S3_ACCESS_KEY_ID": server.access_key,
            "SGLANG_S3_SECRET_ACCESS_KEY": server.secret_key,
        }
        variables = {
            "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu",
            "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
            "SGLANG_DIFFUSION_TORCH_PROFILER_DIR": str(folder / "traces"),
            "SGLANG_DIFFUSION_STAGE_LOGGING": "true",
            "SGLANG_DIFFUSION_SERVER_DEV_MODE": "true",
            "SGLANG_DIFFUSION_LOGGING_LEVEL": "DEBUG",
            "SGLANG_CACHE_DIT_ENABLED": "true",
            "SGLANG_CACHE_DIT_RDT": "1000",
            "SGLANG_CLOUD_STORAGE_TYPE": "s3",
            "SGLANG_S3_BUCKET_NAME": "pictures",
            "SGLANG_S3_ENDPOINT_URL": server.endpoint,
            "SGLANG_KERNEL_API_LOGLEVEL": "10",
            "SGLANG_KERNEL_API_LOGDEST": str(folder / "kernels-%i.log"),
            "SGLANG_KERNEL_API_DUMP_DIR": str(folder / "dumps-%i"),
            "SGLANG_KERNEL_API_DUMP_INCLUDE": "diffusion.*",
        }
        (folder / "settings.json").write_text(json.dumps({"checkpoint": str(flux_checkpoint), "variables": variables}))
        settings_of_ray = {
            "RAY_TMPDIR": ray_folder,
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "120",  # two cores that others use too
        }
        environ = os.environ | keys | settings_of_ray | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.support.serve_on_two_nodes"]
        run = subprocess.run(
            [*command, str(folder / "settings.json"), str(folder / "report.json")],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-5000:]
        report = json.loads((folder / "report.json").read_text())
        with closing(server.client()) as client:
            stored = [item["Key"] for item in client.list_objects_v2(Bucket="pictures")["Contents"]]
        yield Served(
            report, folder, Path(report["session_folder"]), run.stdout + run.stderr, tuple(keys.values()), stored
        )
    shutil.rmtree(ray_folder, ignore_errors=True)


def test_the_variables_of_the_application_reach_the_replicas_on_both_nodes(served: Served) -> None:
    nodes = served.report["nodes"]
    places = {name: replicas[0]["node_id"] for name, replicas in served.report["dev"]["replicas"].items()}
    assert nodes[places["Encoder"]] == ["first"]
    assert nodes[places["Denoiser"]] == nodes[places["VAE"]] == ["second"]
    for deployment in STAGES:
        rows = served.environment(deployment)
        assert rows["SGLANG_CACHE_DIT_RDT"]["value"] == "1000.0"
        assert rows["SGLANG_DIFFUSION_LOGGING_LEVEL"]["source"] == "environment"


def test_the_variables_of_a_deployment_win_over_the_applications(served: Served) -> None:
    for deployment in STAGES:
        rows = served.environment(deployment)
        for name in {name for variables in OVERRIDES.values() for name in variables}:
            own = OVERRIDES.get(deployment, {}).get(name)
            if own is not None:
                assert rows[name]["value"] == own
    assert served.environment("Encoder")["SGLANG_CACHE_DIT_FN"]["value"] == "1"
    [vae] = served.report["dev"]["replicas"]["VAE"]
    assert vae["media_pool"]["method"] == "spawn"
    [cached] = served.report["dev"]["cache_dit"]["Denoiser"][0]["requests"]
    reused = cached["transformer"]["reused_steps"]
    assert cached["transformer"]["blocks_computed"] == STEPS * 5 - reused * (5 - 2), "FN=2 of five blocks"


def test_sglang_diffusion_stage_logging_served_writes_one_line_a_request(served: Served) -> None:
    lines = (served.folder / "cache" / "logs" / "requests.jsonl").read_text().splitlines()
    requests = [json.loads(line) for line in lines]
    assert [request["outcome"] for request in requests] == ["ok", "InvalidRequestError", "ok"]
    stages = requests[0]["stages"]
    assert {stage["stage"] for stage in stages} == {"encoder", "denoiser"}, "the VAE was told not to log"
    [denoiser] = [stage for stage in stages if stage["stage"] == "denoiser"]
    assert denoiser["steps"] == STEPS
    assert denoiser["transfer_s"] > 0
    # The first request of a kind is also encoded in small, to learn its batch axes.
    assert denoiser["bytes_in"] in [stage["bytes_out"] for stage in stages if stage["stage"] == "encoder"]
    assert requests[0]["total_s"] > requests[0]["in_stages_s"] > 0
    assert requests[0]["file_bytes"] > 100


def test_sglang_diffusion_torch_profiler_dir_served_has_traces_of_every_stage(served: Served) -> None:
    names = [file.name for file in (served.folder / "traces").iterdir()]
    for stage in ("encoder", "denoiser", "vae"):
        assert any(f"-{stage}." in name for name in names)


def test_sglang_diffusion_server_dev_mode_served_opens_profiler_windows(served: Served) -> None:
    started, stopped = served.report["profiler"]
    assert started == stopped
    assert set(stopped) == set(STAGES)
    assert all(Path(answer[0]["file"]).stat().st_size > 0 for answer in stopped.values())


def test_sglang_diffusion_logging_level_served_opens_the_log_of_every_replica(served: Served) -> None:
    logs = {file.name: file.read_text() for file in (served.session / "logs" / "serve").glob("replica_*.log")}
    for deployment in (*STAGES, "Ingress"):
        text = "".join(text for name, text in logs.items() if f"_{deployment}_" in name)
        assert "DEBUG" in text, deployment
    assert any("stage timing: " in text for text in logs.values())


def test_a_requests_cache_dit_field_overrides_the_variables(served: Served) -> None:
    error = served.report["refused"]["error"]
    assert (served.report["refused"]["status"], error["param"]) == (400, "cache_dit")
    assert "Fn_compute_blocks must be an integer of at least 1" in error["message"]
    made, uncached = (served.report[name]["data"][0]["b64_json"] for name in ("made", "uncached"))
    assert made != uncached


def test_no_secret_is_in_anything_that_the_run_wrote(served: Served) -> None:
    assert len(served.stored) == 2, "the keys were used"
    texts = {"answers": json.dumps(served.report), "output": served.output}
    files = [file for root in (served.folder, served.session) for file in root.rglob("*") if file.is_file()]
    assert len(files) > 50
    found = [name for name, text in texts.items() if any(secret in text for secret in leaks(served))]
    found += [str(file) for file in files if any(secret.encode() in file.read_bytes() for secret in leaks(served))]
    assert found == []


def leaks(served: Served) -> list[str]:
    """The secret key; the key's id is part of every presigned URL, so it is looked for apart."""
    return [served.secrets[1]]


def test_the_id_of_the_key_is_in_presigned_urls_only(served: Served) -> None:
    key_id = served.secrets[0]
    for file in (file for root in (served.folder, served.session) for file in root.rglob("*") if file.is_file()):
        text = file.read_bytes().decode(errors="replace").replace(f"X-Amz-Credential={key_id}%2F", "")
        if file.name != "report.json":
            assert key_id not in text, file
