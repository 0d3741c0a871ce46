"""The process of a check: see `process`. Reads an order, writes a report."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import TextIO

from deployments.devices import DeviceError, select_device
from deployments.errors import DeviceFullError, TooLargeForDeviceError, TriptychError
from deployments.modules import AccelerationError
from deployments.observability.logging_setup import apply_logging_level
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.verify.check import verify
from deployments.verify.process import REPORT, CheckOrder
from deployments.verify.verdict import Report
from env_config.library_caches import check_cache_root, set_allocator_settings, set_library_caches
from env_config.section import EnvConfigError
from env_config.variables import EnvConfig

TOO_LARGE = "the whole pipeline does not fit into the memory of one device, which the check needs"


def main() -> None:
    answer = _take_stdout()
    order = CheckOrder.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_whoever_asked, daemon=True).start()
    answer.write(REPORT.dump_json(report_of(order)).decode())
    answer.flush()


def report_of(order: CheckOrder) -> Report:
    """A model that cannot be loaded is a report with a problem."""
    try:
        env = EnvConfig.from_environ()
        check_cache_root(env.runtime.cache_root)
        set_library_caches(env.runtime.cache_root)
        set_allocator_settings(env.runtime.target_device)
        apply_logging_level(env.runtime.logging_level)
        return verify(order.model, order.processes, order.asked, env, select_device(env.runtime.target_device))
    except (DeviceFullError, TooLargeForDeviceError):
        problem = TOO_LARGE
    except (TriptychError, AccelerationError, DeviceError, EnvConfigError) as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001  (of a library, while it loads: whoever asked is told)
        traceback.print_exc()
        problem = TOO_LARGE if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    return Report(order.model.name, problem=problem)


def _take_stdout() -> TextIO:
    """What libraries print goes to the error stream from now on."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answer


def _end_with_whoever_asked() -> None:
    while os.read(0, 1):  # nothing comes but the end
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
