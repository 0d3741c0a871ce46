"""The 11 variables under "Runtime", each on a real replica: changed, it changes what the replica does."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import runai_model_streamer
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from fastapi import FastAPI
from fastapi.testclient import TestClient
from torch._inductor.runtime.cache_dir_utils import cache_dir

from deployments.accelerations.attention_kernels import refusal_of
from deployments.devices import DeviceError
from deployments.messages import GenerationRequest, OutputFormat
from deployments.observability.stage_timing import read_requests
from env_config.library_caches import LIBRARY_CACHES, set_library_caches
from env_config.variables import EnvConfig
from serve_app.http.errors import install_error_handlers
from serve_app.http.routes.dev import dev_routes
from serve_app.making.layers.request_log import RequestLog
from tests.support.forking.command import python_with_libraries
from tests.support.further import further
from tests.support.proofs import proof
from tests.support.whole_replica import MakeReplica

ROOT = Path(__file__).resolve().parents[2]

# Python 3.12 warns of forks beside threads; the media pool is built for them.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


# --- SGLANG_DIFFUSION_TARGET_DEVICE ---


def test_sglang_diffusion_target_device_is_where_the_replica_runs(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    whole = make_replica(flux_checkpoint, SGLANG_DIFFUSION_TARGET_DEVICE="CPU")
    assert whole.replica.description.device == "cpu"
    with pytest.raises(DeviceError, match=r"SGLANG_DIFFUSION_TARGET_DEVICE=musa.*torch_musa.*cpu"):
        make_replica(flux_checkpoint, SGLANG_DIFFUSION_TARGET_DEVICE="musa")


@pytest.mark.parametrize("name", ["npu", further("musa")])
@proof("simulated device (npu, musa); CPU")
def test_sglang_diffusion_target_device_places_every_component_on_a_simulated_device(
    name: str, flux_checkpoint: Path, tmp_path: Path
) -> None:
    command = [*python_with_libraries(), "-m", "tests.support.replica_on_simulated_device", name, str(flux_checkpoint)]
    run = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["device"] == name
    assert set(report["devices_of_parameters"]) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert all(devices == [name] for devices in report["devices_of_parameters"].values())
    assert report["operations"] > 100


# --- attention ---


@pytest.fixture
def math_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Shapes that reach diffusers' `_native_math`, a real backend that nothing uses unless asked."""
    calls: list[Any] = []
    backend = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["query"].shape)
        return backend(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counted)
    yield calls
    refusal_of.cache_clear()


STEPS = 4
FLUX_BLOCKS = 5


@proof("real library on CPU; flash-attn as a stand-in kernel")
def test_sglang_diffusion_attention_backend_is_called_by_every_attention(
    make_replica: MakeReplica, flux_checkpoint: Path, math_calls: list[Any]
) -> None:
    make_replica(flux_checkpoint).generate(STEPS)
    assert math_calls == []
    whole = make_replica(flux_checkpoint, SGLANG_DIFFUSION_ATTENTION_BACKEND="_NATIVE_MATH")
    math_calls.clear()
    whole.generate(STEPS)
    assert len(math_calls) >= STEPS * FLUX_BLOCKS, "the VAE's attention may come on top"


RULE = {"rules": [{"component": "transformer", "blocks": [0], "backend": "_native_math"}]}


@proof("real library on CPU")
def test_sglang_diffusion_attention_config_chooses_by_block(
    make_replica: MakeReplica, flux_checkpoint: Path, math_calls: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "attention.json"
    file.write_text(json.dumps(RULE))
    whole = make_replica(flux_checkpoint, SGLANG_DIFFUSION_ATTENTION_CONFIG=str(file))
    whole.generate(STEPS)  # the first request of a kind is also probed for its batch axes
    math_calls.clear()
    whole.generate(STEPS)
    assert len(math_calls) == STEPS * 2, "the first of the double blocks and of the single ones"


@proof("real replica on CPU")
def test_sglang_diffusion_config_root_is_where_relative_paths_begin(
    make_replica: MakeReplica, flux_checkpoint: Path, math_calls: list[Any], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, rules in ((here, {"rules": [{"backend": "native"}]}), (there, RULE)):
        folder.mkdir()
        (folder / "mine.json").write_text(json.dumps(rules))
    calls = {}
    for root in (here, there):
        config = {"SGLANG_DIFFUSION_CONFIG_ROOT": str(root), "SGLANG_DIFFUSION_ATTENTION_CONFIG": "mine.json"}
        whole = make_replica(flux_checkpoint, **config)
        whole.generate(STEPS)
        math_calls.clear()
        whole.generate(STEPS)
        calls[root] = len(math_calls)
    assert calls == {here: 0, there: STEPS * 2}


# --- what is written about a request ---


@proof("real replica on CPU")
def test_sglang_diffusion_stage_logging_writes_a_line_for_each_stage_of_a_request(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cache" / "logs" / "performance.jsonl"
    make_replica(flux_checkpoint).generate(STEPS)
    assert not file.exists()
    make_replica(flux_checkpoint, SGLANG_DIFFUSION_STAGE_LOGGING="true").generate(STEPS, "cat")
    [request] = read_requests(file)
    assert [stage["stage"] for stage in request["stages"]] == ["encoder", "denoiser", "vae"]
    assert [stage["steps"] for stage in request["stages"]] == [0, STEPS, 0]
    for stage in request["stages"]:
        assert (stage["request_id"], stage["replica"], stage["outcome"]) == ("cat", "replica-1", "ok")
        assert stage["compute_s"] > 0
        assert stage["bytes_out"] > 0
    encoder, denoiser, vae = request["stages"]
    assert denoiser["bytes_in"] == encoder["bytes_out"]
    assert vae["bytes_in"] == denoiser["bytes_out"]
    assert vae["bytes_out"] == 32 * 32 * 3


async def test_sglang_diffusion_stage_logging_joins_the_stages_to_one_line_a_request(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path
) -> None:
    whole = make_replica(flux_checkpoint, SGLANG_DIFFUSION_STAGE_LOGGING="true")
    media = await asyncio.to_thread(whole.generate, STEPS, "cat")
    log = RequestLog(tmp_path / "cache", one_replica(whole.replica))
    request = GenerationRequest("cat", "flux", {}, 0, OutputFormat("image", "png"))
    async with log.record(request) as record:
        record.media = media
    with pytest.raises(RuntimeError, match="no"):
        async with log.record(request):
            raise RuntimeError("no")
    first, second = map(json.loads, log.file.read_text().splitlines())
    assert (first["request_id"], first["model"], first["outcome"]) == ("cat", "flux", "ok")
    assert [stage["stage"] for stage in first["stages"]] == ["encoder", "denoiser", "vae"]
    assert first["in_stages_s"] == pytest.approx(
        sum(stage[name] for stage in first["stages"] for name in ("queue_s", "transfer_s", "compute_s"))
    )
    assert first["file_bytes"] == len(media.files[0].data)
    assert second["outcome"] == "RuntimeError"


@proof("real replica on CPU")
def test_sglang_diffusion_torch_profiler_dir_gets_a_trace_of_each_stage(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "traces"
    make_replica(flux_checkpoint).generate(STEPS)
    assert not folder.exists()
    make_replica(flux_checkpoint, SGLANG_DIFFUSION_TORCH_PROFILER_DIR=str(folder)).generate(STEPS, "cat")
    traces = [json.loads(gzip.decompress(file.read_bytes())) for file in folder.iterdir()]
    assert {trace["stage"] for trace in traces} == {"encoder", "denoiser", "vae"}
    assert {(trace["request_id"], trace["replica"]) for trace in traces} == {("cat", "replica-1")}
    assert all(any(event["name"].startswith("aten::") for event in trace["traceEvents"]) for trace in traces)


@proof("real replica on CPU")
def test_sglang_diffusion_logging_level_silences_or_opens_the_log(
    make_replica: MakeReplica, flux_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = {}
    for level in ("WARNING", "INFO", "DEBUG"):
        caplog.clear()
        make_replica(flux_checkpoint, SGLANG_DIFFUSION_LOGGING_LEVEL=level)
        shown[level] = {(record.name.split(".")[0], record.levelno) for record in caplog.records}
    assert not {line for line in shown["WARNING"] if line[1] < logging.WARNING}
    assert ("deployments", logging.INFO) in shown["INFO"]
    assert not {line for line in shown["INFO"] if line[1] < logging.INFO}
    assert {name for name, level in shown["DEBUG"] if level == logging.DEBUG}, "libraries' own lines"


# --- dev mode ---


def one_replica(replica: Any) -> Any:
    """The handles of a deployment with one replica, which is called in this process."""

    class Handle:
        deployment_name = "Pipeline"

        def broadcast(self, method: str, *arguments: Any) -> Any:
            async def results_async(timeout_s: float) -> list[Any]:
                return [await getattr(replica, method)(*arguments)]

            return SimpleNamespace(results_async=results_async)

    return SimpleNamespace(deployments=lambda: {"Pipeline": Handle()})


@pytest.fixture
def dev_client(make_replica: MakeReplica, flux_checkpoint: Path) -> Any:
    """A client of an ingress over a real replica, both with these variables."""

    def client(**variables: str) -> TestClient:
        whole = make_replica(flux_checkpoint, SGLANG_CACHE_DIT_ENABLED="1", SGLANG_CACHE_DIT_RDT="1000", **variables)
        whole.generate(6, "cat")
        service: Any = SimpleNamespace(env=EnvConfig.from_environ(), models=one_replica(whole.replica))
        app = FastAPI()
        install_error_handlers(app)
        router = dev_routes(service)
        if router is not None:
            app.include_router(router)
        return TestClient(app)

    return client


GETS = ("/dev", "/dev/config", "/dev/replicas", "/dev/stacks", "/dev/features", "/dev/cache_dit", "/dev/caches")
POSTS = ("/dev/profiler/start", "/dev/profiler/stop", "/dev/caches/clear")


def test_sglang_diffusion_server_dev_mode_off_is_a_404_like_any_other(dev_client: Any) -> None:
    client = dev_client()
    unknown = client.get("/dev/nothing")
    for path in GETS:
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json() == json.loads(unknown.text.replace("/dev/nothing", path))
    assert [client.post(path).status_code for path in POSTS] == [404] * len(POSTS)
    assert not any(path.startswith("/dev") for path in client.get("/openapi.json").json()["paths"])


@proof("real replica on CPU")
def test_sglang_diffusion_server_dev_mode_shows_the_inside(dev_client: Any) -> None:
    secret = {"SGLANG_S3_ACCESS_KEY_ID": "hunter2-key", "SGLANG_S3_SECRET_ACCESS_KEY": "hunter2-secret"}
    client = dev_client(SGLANG_DIFFUSION_SERVER_DEV_MODE="1", SGLANG_CACHE_DIT_FN="2", **secret)
    assert set(GETS) | set(POSTS) <= {route.split()[1] for route in client.get("/dev").json()} | {"/dev"}

    config = client.get("/dev/config")
    rows = {row["variable"]: row for row in config.json()["Pipeline"]["replica-1"]}
    assert len(rows) == 45
    assert rows["SGLANG_CACHE_DIT_FN"] == {
        "variable": "SGLANG_CACHE_DIT_FN",
        "value": "2",
        "source": "environment",
    }
    assert "hunter2" not in config.text
    assert config.json()["Ingress"] == config.json()["Pipeline"]["replica-1"]

    [replica] = client.get("/dev/replicas").json()["Pipeline"]
    assert replica["requests"] == []
    assert replica["engine"]["forwards"] >= 6
    assert "environment" not in replica

    [stacks] = client.get("/dev/stacks").json()["Pipeline"]
    assert any(name.startswith("engine") for name in stacks["threads"])

    [summary] = client.get("/dev/cache_dit").json()["Pipeline"]
    [request] = summary["requests"]
    assert request["request_id"] == "cat"
    assert request["transformer"]["reused_steps"] == 2
    assert request["transformer"]["computed_steps"] == 4


def test_sglang_diffusion_server_dev_mode_opens_and_ends_a_profiler_window(dev_client: Any, tmp_path: Path) -> None:
    client = dev_client(SGLANG_DIFFUSION_SERVER_DEV_MODE="true")
    none_open = client.post("/dev/profiler/stop")
    assert (none_open.status_code, none_open.json()["error"]["message"]) == (400, "no profiler window was started")
    started = client.post("/dev/profiler/start", json={"max_s": 30}).json()["Pipeline"][0]["file"]
    again = client.post("/dev/profiler/start", json={"max_s": 30})
    assert again.status_code == 400
    assert "another trace" in again.json()["error"]["message"]
    assert client.post("/dev/profiler/stop").json()["Pipeline"][0]["file"] == started
    assert Path(started).is_relative_to(tmp_path / "cache" / "profiles")
    assert json.loads(gzip.decompress(Path(started).read_bytes()))["replica"] == "replica-1"
    assert client.post("/dev/profiler/start", json={"max_s": 0}).status_code in (400, 422)


def test_sglang_diffusion_server_dev_mode_shows_and_clears_caches(dev_client: Any) -> None:
    client = dev_client(SGLANG_DIFFUSION_SERVER_DEV_MODE="true", SGLANG_DIFFUSION_STAGE_LOGGING="1")
    [caches] = client.get("/dev/caches").json()["Pipeline"]
    assert caches["folder_bytes"]["logs"] > 100
    assert client.get("/dev/cache_dit").json()["Pipeline"][0]["requests"]
    [cleared] = client.post("/dev/caches/clear").json()["Pipeline"]
    assert cleared["folder_bytes"] == caches["folder_bytes"], "files stay"
    assert client.get("/dev/cache_dit").json()["Pipeline"][0]["requests"] == []


# --- folders, processes, weights ---


@proof("real replica on CPU")
def test_sglang_diffusion_cache_root_holds_the_caches_of_the_compilers(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (tmp_path / "one", tmp_path / "two"):
        make_replica(flux_checkpoint, SGLANG_DIFFUSION_CACHE_ROOT=str(root), SGLANG_DIFFUSION_STAGE_LOGGING="1")
        assert cache_dir() == str(root / "torchinductor"), "torch's own answer: where torch.compile would write"
        assert (root / "logs").is_dir()


def test_sglang_diffusion_cache_root_leaves_folders_that_the_user_has_set(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LIBRARY_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    folders = set_library_caches(tmp_path)
    assert folders == {name: os.environ[name] for name in LIBRARY_CACHES}
    assert folders.pop("TRITON_CACHE_DIR") == "/mine"
    assert all(Path(folder).is_relative_to(tmp_path) for folder in folders.values())


@proof("real replica on CPU")
def test_sglang_diffusion_worker_multiproc_method_starts_the_media_pool(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    pictures, has_torch = {}, {}
    for method in ("fork", "spawn"):
        whole = make_replica(flux_checkpoint, SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD=method)
        pictures[method] = whole.generate(STEPS).files[0].data
        workers = whole.replica.media_pool.process_ids
        has_torch[method] = ["libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in workers]
        spawned = ["spawn_main" in " ".join(psutil.Process(pid).cmdline()) for pid in workers]
        assert spawned == [method == "spawn"] * 2
    assert has_torch == {"fork": [True, True], "spawn": [False, False]}
    assert pictures["fork"] == pictures["spawn"]


@proof("real library on CPU")
def test_sglang_use_runai_model_streamer_streams_every_component(
    make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed: list[str] = []
    stream = runai_model_streamer.SafetensorsStreamer.stream_files

    def recorded(self: Any, paths: list[str], *args: Any, **kwargs: Any) -> Any:
        streamed.extend(Path(path).parent.name for path in paths)
        return stream(self, paths, *args, **kwargs)

    monkeypatch.setattr(runai_model_streamer.SafetensorsStreamer, "stream_files", recorded)
    pictures = {}
    for value, components in (("false", set()), ("true", {"text_encoder", "text_encoder_2", "transformer", "vae"})):
        streamed.clear()
        whole = make_replica(flux_checkpoint, SGLANG_USE_RUNAI_MODEL_STREAMER=value)
        assert set(streamed) == components
        pictures[value] = whole.generate(STEPS).files[0].data
    assert pictures["true"] == pictures["false"]
