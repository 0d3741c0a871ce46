"""The launcher with a real Ray: that which all tests of this folder share."""

import psutil
import pytest

from tests.support.launching import still_running
from tests.support.served_application import ServedApplication

pytestmark = pytest.mark.timeout(600)  # the first test starts Ray


def test_it_says_where_it_serves_and_finds_again_all_that_it_started(served: ServedApplication) -> None:
    """tests.support.served_application.stop then sees that it ends at Ctrl-C without leaving a process."""
    assert f"Ready: {served.url} " in served.launchers_output()
    started = psutil.Process(served.launcher.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {process.name() for process in started}
    found = set(served.processes())
    assert still_running([each for each in started if each not in found]) == [], "if `serve run` died"
