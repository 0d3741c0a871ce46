"""In place of `serve run` and `serve status`, without Ray: an application that loads, gets ready, or cannot start.

    python -m tests.support.played_serve launch CONFIG      the launcher, with this module as its `serve`

What happens is said by the arguments of tests.support.toy_app in the config file. Like Ray, it starts processes
in its session, of which one outlives it unless it is asked to end.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from serve_app.tools import launch
from tests.support.forking.command import python_with_libraries

COMMAND = [sys.executable, "-m", "tests.support.played_serve"]


def main(command: str, *arguments: str) -> int:
    if command == "launch":
        launch.SERVE[:] = COMMAND
        launch.CHECK[:] = [*python_with_libraries(), *launch.CHECK[1:]]
        return launch.main(list(arguments))
    if command == "status":
        print(yaml.safe_dump({"applications": {"toy": status()}}))
        return 0
    run(yaml.safe_load(Path(arguments[-1]).read_text()))
    return 0


def run(config: dict[str, Any]) -> None:
    """Until SIGINT, at which the process that it has started ends too."""
    raylet = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("View the dashboard at http://127.0.0.1:1", flush=True)
    arguments = config["applications"][0]["args"]
    address = (config["http_options"]["host"], config["http_options"]["port"])
    ready_at = time.monotonic() + (600 if "refused" in arguments else arguments.get("load_s", 0))

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = time.monotonic() >= ready_at
            body = {"stages": {"Encoder": {"ready": ready, "detail": "" if ready else "loading weights"}}}
            self.send_response(200 if ready else 503)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    server = ThreadingHTTPServer(address, Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.sigwait({signal.SIGINT})
    raylet.terminate()


def status() -> dict[str, Any]:
    """As Serve tells of an application with a deployment whose constructor has raised."""
    config = yaml.safe_load(Path("serve_toy.yaml").read_text())
    value = config["applications"][0]["args"].get("refused")
    if value is None:
        return {"status": "DEPLOYING", "message": "", "deployments": {}}
    message = f"ValueError: SGLANG_DIFFUSION_ATTENTION_BACKEND={value!r} is not allowed"
    return {"status": "DEPLOY_FAILED", "message": "", "deployments": {"Encoder": {"message": message}}}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
