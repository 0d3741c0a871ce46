"""What wraps the making of media: one file and one row each, the innermost first."""

from serve_app.making.follower import Make
from serve_app.making.layers.callers_faults import CALLERS_FAULTS
from serve_app.making.layers.layer import Layer, LayerContext
from serve_app.making.layers.replaced_adapters import REPLACED_ADAPTERS
from serve_app.making.layers.request_log import REQUEST_LOG
from serve_app.making.layers.sharing import SHARING
from serve_app.making.layers.signing import SIGNING
from serve_app.making.layers.time_limits import TIME_LIMITS
from serve_app.making.layers.traces import TRACES
from serve_app.making.layers.waking import WAKING

LAYERS: tuple[Layer, ...] = (
    REPLACED_ADAPTERS,
    CALLERS_FAULTS,
    REQUEST_LOG,
    SIGNING,
    SHARING,
    WAKING,
    TIME_LIMITS,
    TRACES,
)


def wrapped(make: Make, context: LayerContext, layers: tuple[Layer, ...] = LAYERS) -> Make:
    """`make` with every layer that is on."""
    for layer in layers:
        make = layer.wrap(make, context)
    return make


__all__ = ["LAYERS", "Layer", "LayerContext", "wrapped"]
