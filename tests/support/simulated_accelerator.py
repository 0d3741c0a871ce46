"""A second device on a CPU machine: a PrivateUse1 backend whose tensors hold CPU tensors.

It shows where tensors are placed, which moves are made and that tensors of two devices never mix; it says
nothing about a vendor's kernels or their speed. One name per process, which must not be one torch has.

As on CUDA, it draws random numbers with a generator of its own, and refuses one of another device.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_libraries: list[torch.library.Library] = []  # a library that is collected takes its kernels with it
dispatched: list[str] = []  # every operation that ran on the simulated device
synchronized: list[int] = []  # how many operations had run at each call of synchronize()
events_waited_for: list[int] = []  # how many operations had been given to the device after each event waited for
OPERATION_MS = 0.01
crossings: list["Crossing"] = []  # every copy between the device and the host
before_operations: list[Callable[[], None]] = []  # called before each; may raise what a device raises
kept_for: list[str] = []  # streams for which memory of another one was kept
waits: list["Wait"] = []  # every time that a thread waited for the device
_storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
_generator = torch.Generator()  # the device's global one


# Operations whose answer is numbers on the host: the thread waits until the device has come so far.
READ_BY_THE_HOST = ("_local_scalar_dense", "aten.equal", "nonzero", "masked_select", "_unique2")


@dataclass(frozen=True)
class Crossing:
    """A copy between the device and the host; `stream` is empty for the usual one, on which the forwards run."""

    to: str  # "host" or "device"
    num_bytes: int
    stream: str
    is_blocking: bool  # the thread waits for it
    thread: str


@dataclass(frozen=True)
class Wait:
    """A thread waits for the device, for all that was queued on a stream before."""

    reason: str  # an operation, "copy", "event" or "synchronize"
    stream: str
    thread: str


class SimulatedStream:
    """A stream that is known by its number; nothing really runs at a time."""

    def __init__(self, device: Any = None, name: str | None = None) -> None:
        self.name = f"stream {next(_numbers)}" if name is None else name
        self.waits_for: list[str] = []

    def wait_event(self, event: "SimulatedEvent") -> None:
        self.waits_for.append(event.stream)


class SimulatedEvent:
    """Of a device that is as late as it can be: an event is reached when somebody waits for it or for a later one."""

    _reached = 0  # operations that the device is known to have done

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0
        self.stream = ""

    def record(self, stream: SimulatedStream | None = None) -> None:
        self._at = len(dispatched)
        self.stream = stream.name if stream is not None else current_stream().name

    def query(self) -> bool:
        return self._at <= SimulatedEvent._reached

    def synchronize(self) -> None:
        waits.append(Wait("event", self.stream, threading.current_thread().name))
        if not self.query():
            events_waited_for.append(len(dispatched) - self._at)
            SimulatedEvent._reached = self._at

    def elapsed_time(self, later: "SimulatedEvent") -> float:
        return OPERATION_MS * (later._at - self._at)


_numbers = iter(range(1, 1000))
_usual = SimulatedStream(name="")
_current = threading.local()


def current_stream(device: Any = None) -> SimulatedStream:
    stream: SimulatedStream = getattr(_current, "stream", _usual)
    return stream


@contextmanager
def stream(chosen: SimulatedStream) -> Iterator[None]:
    """What the thread queues in the block goes to that stream."""
    before = current_stream()
    _current.stream = chosen
    try:
        yield
    finally:
        _current.stream = before


def install_streams(name: str) -> None:
    """Give the device streams and pinned memory, as CUDA has them."""
    from deployments.tensors import copies

    module = torch.get_device_module(name)
    module.Stream, module.Event = SimulatedStream, SimulatedEvent
    module.stream, module.current_stream = stream, current_stream
    copies.pinned = lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8)


def install(name: str) -> None:
    """Make `name` ("npu" or "musa") a device of torch in this process."""
    _setup_privateuseone_for_python_backend(name)
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    kernels.impl("empty.memory_format", _empty)
    kernels.impl("empty_strided", _empty_strided)
    kernels.impl("_to_copy", _to_copy)
    others = torch.library.Library("_", "IMPL", "PrivateUse1")
    others.fallback(_run_on_cpu)
    _libraries.extend((kernels, others))
    module = torch.get_device_module(name)
    module.synchronize = _synchronize
    module.Event = SimulatedEvent
    module.memory_allocated = lambda: sum(storage.nbytes() for storage in _storages)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.manual_seed_all = module.manual_seed = _generator.manual_seed
    module.get_rng_state = lambda device=None: _generator.get_state()
    module.set_rng_state = lambda state, device=None: _generator.set_state(state)


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; `inner` holds its numbers on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "SimulatedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(torch._C._get_privateuse1_backend_name(), 0),
        )
        tensor.inner = inner
        _storages.add(inner.untyped_storage())
        return tensor

    def record_stream(self, stream: SimulatedStream) -> None:
        kept_for.append(stream.name)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run_on_cpu(func, *args, **(kwargs or {}))


def _run_on_cpu(func: Any, *args: Any, **kwargs: Any) -> Any:
    for look in before_operations:
        look()
    dispatched.append(str(func))
    device = kwargs.get("device")
    leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    simulated = [leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)]
    foreign = [leaf for leaf in leaves if not isinstance(leaf, SimulatedTensor) and leaf.dim() > 0]
    copies = (
        torch.ops.aten.copy_.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten._copy_from.default,
    )
    if simulated and foreign and func not in copies:
        raise RuntimeError(f"Expected all tensors to be on the same device ({func})")
    is_here = bool(simulated) or (device is not None and torch.device(device).type == _name())
    if is_here and any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
        raise RuntimeError(f"Expected a '{_name()}' device type for generator but found 'cpu' ({func})")
    cpu_args, cpu_kwargs = _pytree.tree_map(_inner, (args, kwargs))
    if device is not None and torch.device(device).type == _name():
        cpu_kwargs["device"] = torch.device("cpu")
    draws = is_here and torch.Tag.nondeterministic_seeded in func.tags
    with _drawing() if draws else nullcontext():
        output = func(*cpu_args, **cpu_kwargs)
    _note(func, args, kwargs, simulated)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if func is torch.ops.aten._to_copy.default and device is not None and torch.device(device).type == "cpu":
        return output
    return _pytree.tree_map(_outer, output)


@contextmanager
def _drawing() -> Iterator[None]:
    """With the device's generator in place of the CPU's global one."""
    of_the_cpu = torch.get_rng_state()
    torch.set_rng_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(torch.get_rng_state())
        torch.set_rng_state(of_the_cpu)


def _name() -> str:
    return str(torch._C._get_privateuse1_backend_name())


def _inner(value: Any) -> Any:
    if isinstance(value, SimulatedTensor):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == _name() else value


def _outer(value: Any) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor)
    return SimulatedTensor(value) if is_plain else value


def _empty(size: Any, dtype: Any = None, **_: Any) -> SimulatedTensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> SimulatedTensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _to_copy(self: torch.Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    copied = _inner(self).to(dtype=dtype or self.dtype, copy=True)
    if not isinstance(self, SimulatedTensor):
        _note_crossing("device", copied, not _.get("non_blocking"))
    return copied if device is not None and torch.device(device).type == "cpu" else SimulatedTensor(copied)


def _synchronize(*_: Any) -> None:
    synchronized.append(len(dispatched))
    waits.append(Wait("synchronize", "", threading.current_thread().name))


def _note(func: Any, args: Any, kwargs: Any, simulated: list[Any]) -> None:
    name = str(func)
    if func is torch.ops.aten.copy_.default:
        target, source = args[:2]
        if isinstance(target, SimulatedTensor) != isinstance(source, SimulatedTensor):
            to = "device" if isinstance(target, SimulatedTensor) else "host"
            _note_crossing(to, target, not (kwargs.get("non_blocking") or args[2:] == (True,)))
    elif func is torch.ops.aten._to_copy.default:
        device = kwargs.get("device")
        if simulated and device is not None and torch.device(device).type == "cpu":
            _note_crossing("host", args[0], not kwargs.get("non_blocking"))
    elif simulated and any(each in name for each in READ_BY_THE_HOST):
        waits.append(Wait(name, current_stream().name, threading.current_thread().name))


def _note_crossing(to: str, tensor: torch.Tensor, is_blocking: bool) -> None:
    thread = threading.current_thread().name
    num_bytes = tensor.numel() * tensor.element_size()
    crossings.append(Crossing(to, num_bytes, current_stream().name, is_blocking, thread))
    if is_blocking:
        waits.append(Wait("copy", current_stream().name, thread))
