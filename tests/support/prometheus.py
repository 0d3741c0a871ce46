"""A real Prometheus (Debian's package `prometheus`), and an exporter that is played."""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.served_application import free_port

NO_PROMETHEUS = "there is no prometheus and no promtool here: Debian's package `prometheus` has both"


def has_prometheus() -> bool:
    return all(shutil.which(program) for program in ("prometheus", "promtool"))


@dataclass(frozen=True)
class Prometheus:
    """Listens at `url`."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that the expression has now. Raises AssertionError for one that is not valid."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def shown(self, expression: str, seconds: float = 900, step_s: float = 15) -> list[float]:
        """The numbers that a panel of the last `seconds` draws, of all series."""
        now = time.time()
        asked = {"query": expression, "start": now - seconds, "end": now, "step": step_s}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params=asked, timeout=30).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        numbers = [float(value) for series in answer["data"]["result"] for _, value in series["values"]]
        return [number for number in numbers if not math.isnan(number)]

    def rules(self) -> dict[str, str]:
        """The health of each rule by its name: ok, or what is wrong."""
        answer = httpx.get(f"{self.url}/api/v1/rules", timeout=30).json()
        rules = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
        return {rule["name"]: rule.get("lastError") or rule["health"] for rule in rules}


@contextmanager
def running_prometheus(
    folder: Path, scraped: list[dict[str, Any]], rules: tuple[Path, ...] = ()
) -> Iterator[Prometheus]:
    """`scraped`: its scrape_configs; what it stores lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    port, config = free_port(), folder / "prometheus.yml"
    settings = {"global": {"scrape_interval": "5s", "evaluation_interval": "5s"}, "scrape_configs": scraped}
    config.write_text(yaml.safe_dump(settings | {"rule_files": [str(rule.resolve()) for rule in rules]}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        wait_until(lambda: _is_ready(prometheus), "Prometheus is not ready", 60)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def scraped_exporter(port: int) -> dict[str, Any]:
    """A scrape config of one exporter on this machine."""
    return {"job_name": f"port-{port}", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}


def scraped_ray() -> dict[str, Any]:
    """The scrape config of docs/operations.md: all nodes of the Ray that runs here."""
    return {"job_name": "ray", "file_sd_configs": [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]}


@contextmanager
def played_exporter(text: Callable[[], str]) -> Iterator[int]:
    """The port of an exporter that answers with `text()`; a webhook may be sent to it too."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def wait_until(is_true: Callable[[], object], otherwise: str, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.5)


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)


def _is_ready(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
