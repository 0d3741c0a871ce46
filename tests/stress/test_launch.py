"""The launcher with a real Ray that is interrupted, cannot serve, or is killed."""

from pathlib import Path

import psutil

from tests.support.launching import REAL, config_file, launched, output, still_running, wait_for_output
from tests.support.served_application import free_port


def test_sigterm_while_it_loads_leaves_no_process(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port(), load_s=600), tmp_path, REAL) as launcher:
        wait_for_output(launcher, tmp_path, "Encoder: loading weights")
        started = psutil.Process(launcher.pid).children(recursive=True)

        launcher.terminate()
        wait_for_output(launcher, tmp_path, "Stopping")
        launcher.terminate()

        assert launcher.wait(90) == 0
        assert still_running(started) == []


def test_a_stage_that_cannot_start_ends_it_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port(), refused="fa9"), tmp_path, REAL) as launcher:
        assert launcher.wait(120) == 1
    text = output(tmp_path)
    assert "application 'toy' failed to deploy" in text
    assert "Encoder: " in text
    assert "SGLANG_DIFFUSION_ATTENTION_BACKEND='fa9' is not allowed" in text
    assert "What to do: " in text


def test_the_death_of_serve_run_ends_it_and_all_it_started(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port()), tmp_path, REAL) as launcher:
        wait_for_output(launcher, tmp_path, "Ready:")
        started = psutil.Process(launcher.pid).children(recursive=True)
        serve_run = psutil.Process(launcher.pid).children()[0]

        serve_run.kill()

        assert launcher.wait(90) == 1
        assert still_running(started) == []
    assert "`serve run` ended" in output(tmp_path)
