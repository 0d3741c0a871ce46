"""The process of a plan: see `process`. Reads an order, writes what it measured."""

from __future__ import annotations

import os
import sys
import traceback

from deployments.errors import TriptychError
from deployments.observability.logging_setup import apply_logging_level
from deployments.plan.measure import measure
from deployments.plan.measured import Measured
from deployments.plan.process import MEASURED, MeasureOrder
from env_config.library_caches import check_cache_root, set_library_caches
from env_config.section import EnvConfigError
from env_config.variables import EnvConfig


def main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the error stream from now on
    order = MeasureOrder.model_validate_json(sys.stdin.read())
    answer.write(MEASURED.dump_json(measured(order)).decode())
    answer.flush()


def measured(order: MeasureOrder) -> Measured:
    """A model that cannot be looked at is an answer with a problem."""
    try:
        env = EnvConfig.from_environ()
        check_cache_root(env.runtime.cache_root)
        set_library_caches(env.runtime.cache_root)
        apply_logging_level(env.runtime.logging_level)
        return measure(order, env)
    except (TriptychError, EnvConfigError) as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001  (of a library: whoever asked is told)
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    return Measured(order.model.name, problem=problem)


if __name__ == "__main__":
    main()
