"""Ray's fake provider of machines, whose nodes have time to start: it is named in the autoscaler's configuration."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ray._private import parameter, services
from ray._raylet import persist_port
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from tests.support.served_application import free_port

START_TIMEOUT_S = 300
PORTS = tuple(f"{of}_port" for of in ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent"))
RayParams, get_node, start_raylet = parameter.RayParams, services.get_node, services.start_raylet


class FakeMachines(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray has no types here
    def _create_node_with_resources_and_labels(self, *given: Any) -> None:
        with time_to_start():
            super()._create_node_with_resources_and_labels(*given)


@contextmanager
def time_to_start() -> Iterator[None]:
    """Ray gives a node up whose agents have not told their ports within 15 s, and one that is not there after 30 s."""
    with (
        patch.object(parameter, "RayParams", with_ports),
        patch.object(services, "start_raylet", start_with_known_port),
        patch.object(services, "get_node", node_when_it_is_there),
    ):
        yield


def with_ports(**params: Any) -> Any:
    return RayParams(**params | {name: free_port() for name in PORTS})


def start_with_known_port(*given: Any, **named: Any) -> Any:
    """The one port that a raylet always waits for is in a file, which the agent will write again."""
    told = inspect.signature(start_raylet).bind(*given, **named).arguments
    name = "dashboard_agent_listen_port"
    persist_port(told["session_dir"], told["node_id"], name, told[name])
    return start_raylet(*given, **named)


def node_when_it_is_there(*given: Any) -> Any:
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return get_node(*given)
        except RuntimeError:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.2)
