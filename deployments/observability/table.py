"""OBSERVERS: all that watches a replica, a row each."""

from deployments.observability.kernel_api_log import make_kernel_api_log
from deployments.observability.observer import MakeObserver
from deployments.observability.present_requests import PresentRequests
from deployments.observability.stage_load import StageLoads
from deployments.observability.stage_timing import make_stage_timer
from deployments.observability.torch_profiler import TorchProfiler
from deployments.observability.traces import make_traces

# In the order of nesting: the timer comes after the profiler, whose start and end it does not measure.
OBSERVERS: tuple[MakeObserver, ...] = (
    lambda replica: StageLoads(replica.stages),
    lambda replica: PresentRequests(),
    make_traces,
    lambda replica: TorchProfiler(replica.env.runtime, replica.replica_id),
    make_stage_timer,
    make_kernel_api_log,
)
