"""The launcher with a real Ray."""

import signal
import urllib.request
from pathlib import Path

import psutil

from serve_app.tools.launch import processes_of_session
from tests.support.launching import REAL, config_file, launched, still_running, wait_for_output
from tests.support.served_application import free_port


def test_it_serves_and_ends_at_ctrl_c_without_leaving_a_process(tmp_path: Path) -> None:
    port = free_port()
    with launched(config_file(tmp_path, port), tmp_path, REAL) as launcher:
        wait_for_output(launcher, tmp_path, "Ready:")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
        started = psutil.Process(launcher.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {process.name() for process in started}
        assert set(started) <= set(processes_of_session(started[0].pid)), "all would be found if `serve run` died"

        launcher.send_signal(signal.SIGINT)

        assert launcher.wait(90) == 0
        assert still_running(started) == []
