"""Ray's fake provider of machines, whose nodes have time to start: it is named in the autoscaler's configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ray._private import parameter, services
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from tests.support.served_application import free_port

START_TIMEOUT_S = 300
RayParams, get_node = parameter.RayParams, services.get_node


class FakeMachines(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray has no types here
    def _create_node_with_resources_and_labels(self, *given: Any) -> None:
        with time_to_start():
            super()._create_node_with_resources_and_labels(*given)


@contextmanager
def time_to_start() -> Iterator[None]:
    """Ray gives a node up whose agents have not told their ports within 15 s, and one that is not there after 30 s."""

    def with_ports(**params: Any) -> Any:
        names = [
            f"{of}_port" for of in ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent")
        ]
        return RayParams(**params | {name: free_port() for name in names})

    def node_when_it_is_there(*given: Any) -> Any:
        give_up = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return get_node(*given)
            except RuntimeError:
                if time.monotonic() > give_up:
                    raise
            time.sleep(0.2)

    with patch.object(parameter, "RayParams", with_ports), patch.object(services, "get_node", node_when_it_is_there):
        yield
