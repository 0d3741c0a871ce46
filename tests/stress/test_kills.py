"""Twenty kills under load, of pictures and of videos made by two transformers."""

import pytest

from tests.support.kills import Application, check_kills, stages_of
from tests.support.served_application import ServedApplication

# Ray warns of its own affairs (sockets, forks) in a process that joins it.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("default")]


def test_no_request_is_lost_or_changed_by_kills(
    wan: ServedApplication, metrics_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    applications = [Application("flux", stages_of("triptych")), Application("wan22", stages_of("wan"))]
    figures = check_kills(applications, 4, metrics_port)
    with capsys.disabled():
        print("\n" + "\n".join(figures))
    wan.wait_until_healthy()
    wan.wait_until_healthy("/wan")
