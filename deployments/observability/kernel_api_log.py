"""Logs each call at a kernel boundary before it runs, so that the last line names the kernel that crashed."""

from __future__ import annotations

import functools
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch

from deployments.observability.observer import Kernel, ObservedReplica, Observer
from env_config.variables import KernelAPI

# SGLANG_KERNEL_API_LOGLEVEL; a level between two of these is the lower one.
NAMES, METADATA, STATISTICS, DUMPS = 1, 3, 5, 10

LARGEST_LIST, LARGEST_MAPPING, DEEPEST = 4, 8, 2  # what a line describes; dumps hold every tensor
LONGEST_TEXT = 100  # characters of a plain value
STREAMS = {"stdout": 1, "stderr": 2}  # file descriptors
AUTOENCODER_METHODS = ("encode", "decode")


class KernelApiLog(Observer):
    """Wraps functions so that their calls are logged and dumped as the SGLANG_KERNEL_API_ variables say.

    A record is one write to a descriptor opened for appending: whole between threads and processes, and out
    of the process before the kernel starts. From level 3 on, work on an accelerator is awaited before a
    return is logged; at level 1 set CUDA_LAUNCH_BLOCKING=1 for the same certainty.
    """

    def __init__(self, settings: KernelAPI) -> None:
        """Raises ValueError if the file of SGLANG_KERNEL_API_LOGDEST cannot be opened."""
        self.level = settings.loglevel
        self._descriptor = open_destination(settings.logdest)
        self._dump_root = Path(with_process_id(str(settings.dump_dir)))
        self._dump_include = settings.dump_include or ("*",)
        self._dump_exclude = settings.dump_exclude or ()
        self._counters: dict[str, Iterator[int]] = {}

    def wrap_kernel(self, name: str, kernel: Kernel) -> Kernel:
        """`kernel` with its calls logged under `name`."""

        @functools.wraps(kernel)
        def logged(*args: Any, **kwargs: Any) -> Any:
            if is_traced_or_captured():
                return kernel(*args, **kwargs)
            number = next(self._counters.setdefault(name, itertools.count(1)))
            inputs = name_inputs(args, kwargs)
            self._write("Call", name, number, self._describe(inputs))
            dump = self._open_dump(name, number, inputs)
            try:
                result = kernel(*args, **kwargs)
                if self.level >= METADATA:
                    wait_for_the_accelerator()
            except BaseException as error:
                self._write("Exception", name, number, f"  {type(error).__name__}: {shorten(str(error))}\n")
                if dump:
                    dump.record("exception", exception={"type": type(error).__name__, "message": str(error)})
                raise
            self._write("Return", name, number, self._describe({"result": result}))
            if dump:
                dump.save_outputs(result)
            return result

        return cast(Kernel, logged)

    def install(self, components: Mapping[str, torch.nn.Module]) -> None:
        """Logs the calls of a pipeline's components: `encode` and `decode` of an autoencoder, else `forward`.

        The methods are replaced on the objects and keep their signatures, which pipelines inspect.
        """
        for component, module in components.items():
            is_autoencoder = all(hasattr(module, method) for method in AUTOENCODER_METHODS)
            for method in AUTOENCODER_METHODS if is_autoencoder else ("forward",):
                logged = self.wrap_kernel(f"diffusion.{component}.{method}", getattr(module, method))
                setattr(module, method, logged)

    def _write(self, event: str, name: str, number: int, details: str) -> None:
        now = datetime.now().isoformat(" ", "milliseconds")
        where = f"call={number} pid={os.getpid()} thread={threading.get_native_id()}"
        os.write(self._descriptor, f"[{now}] Kernel API {event}: {name} {where}\n{details}".encode())

    def _describe(self, values: Mapping[str, Any]) -> str:
        if self.level < METADATA:
            return ""
        with_statistics = self.level >= STATISTICS
        return "".join(f"  {key}: {describe(value, with_statistics)}\n" for key, value in values.items())

    def _open_dump(self, name: str, number: int, inputs: Mapping[str, Any]) -> Dump | None:
        included = any(fnmatchcase(name, pattern) for pattern in self._dump_include)
        excluded = any(fnmatchcase(name, pattern) for pattern in self._dump_exclude)
        if self.level < DUMPS or excluded or not included:
            return None
        return Dump.begin(self._dump_root, name, number, inputs)


def make_kernel_api_log(replica: ObservedReplica) -> KernelApiLog | None:
    """From level 1 on. Raises ValueError if the file of SGLANG_KERNEL_API_LOGDEST cannot be opened."""
    settings = replica.env.kernel_api
    return KernelApiLog(settings) if settings.loglevel >= NAMES else None


@dataclass(frozen=True)
class Dump:
    """The folder of one call: inputs.pt, outputs.pt and metadata.json.

    Its `execution_status` goes from `inputs_saved` to `completed` or `exception`; a crash leaves it as it is.
    """

    folder: Path
    metadata: dict[str, Any]

    @classmethod
    def begin(cls, root: Path, name: str, number: int, inputs: Mapping[str, Any]) -> Dump:
        now = datetime.now()
        stamp = f"{now:%Y%m%d_%H%M%S}_{now.microsecond // 1000:03d}"
        folder = root / f"{stamp}_pid{os.getpid()}_{name.replace('/', '_')}_call{number:04d}"
        folder.mkdir(parents=True)
        tensors = save_tensors(inputs, folder / "inputs.pt")
        dump = cls(folder, {"function_name": name, "timestamp": now.isoformat(), "process_id": os.getpid()})
        dump.record("inputs_saved", input_metadata=describe_all(inputs), input_tensor_keys=tensors)
        return dump

    def save_outputs(self, result: Any) -> None:
        outputs = {"result": result}
        tensors = save_tensors(outputs, self.folder / "outputs.pt")
        self.record("completed", output_metadata=describe_all(outputs), output_tensor_keys=tensors)

    def record(self, status: str, **more: Any) -> None:
        self.metadata.update(execution_status=status, **more)
        partial = self.folder / "metadata.json.partial"
        partial.write_text(json.dumps(self.metadata, indent=2), encoding="utf-8")
        partial.replace(self.folder / "metadata.json")


def save_tensors(values: Mapping[str, Any], path: Path) -> list[str]:
    """Writes every tensor in `values` as one dictionary and answers its keys, such as `arg_0_1`."""
    tensors = {key: t.detach().cpu().clone() for name, value in values.items() for key, t in find_tensors(name, value)}
    torch.save(tensors, path)
    return list(tensors)


def find_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        yield name, value
    for key, item in items_of(value):
        yield from find_tensors(f"{name}_{key}", item)


def items_of(value: Any) -> list[tuple[Any, Any]]:
    """What is inside a list, a tuple or a mapping; outputs of diffusers and transformers are mappings."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def name_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    positional = {f"arg_{index}": value for index, value in enumerate(args)}
    return positional | {f"kwarg_{name}": value for name, value in kwargs.items()}


def describe_all(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: describe(value, with_statistics=False) for name, value in values.items()}


def describe(value: Any, with_statistics: bool, depth: int = 0) -> str:
    if isinstance(value, torch.Tensor):
        return describe_tensor(value, with_statistics)
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device | None):
        return shorten(repr(value))
    items, limit = items_of(value), LARGEST_MAPPING if isinstance(value, Mapping) else LARGEST_LIST
    if not items or depth == DEEPEST:
        return f"<{type(value).__name__}>"
    shown = [f"{key}: {describe(item, with_statistics, depth + 1)}" for key, item in items[:limit]]
    rest = [f"... {len(items) - limit} more"] if len(items) > limit else []
    return f"{type(value).__name__}({', '.join(shown + rest)})"


def describe_tensor(tensor: torch.Tensor, with_statistics: bool) -> str:
    is_contiguous = tensor.layout == torch.strided and tensor.is_contiguous()
    parts = [
        f"shape={tuple(tensor.shape)}",
        f"dtype={tensor.dtype}",
        f"device={tensor.device}",
        f"requires_grad={tensor.requires_grad}",
        f"is_contiguous={is_contiguous}",
    ]
    if with_statistics and tensor.numel() and not tensor.is_meta:
        parts += describe_values(tensor)
    return f"Tensor({', '.join(parts)})"


def describe_values(tensor: torch.Tensor) -> list[str]:
    values = tensor.detach()
    values = torch.view_as_real(values).double() if values.is_complex() else values.float()
    smallest, largest = torch.aminmax(values)
    return [
        f"min={smallest.item():.6g}",
        f"max={largest.item():.6g}",
        f"mean={values.mean().item():.6g}",
        f"nan_count={int(values.isnan().sum())}",
        f"inf_count={int(values.isinf().sum())}",
    ]


def is_traced_or_captured() -> bool:
    """Inside torch.compile's tracing or a CUDA graph's capture, where nothing may be read or written."""
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def wait_for_the_accelerator() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def open_destination(destination: str) -> int:
    if destination in STREAMS:
        return STREAMS[destination]
    path = Path(with_process_id(destination))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ValueError(f"SGLANG_KERNEL_API_LOGDEST={destination}: {error.strerror}") from error


def with_process_id(path: str) -> str:
    return path.replace("%i", str(os.getpid()))


def shorten(text: str) -> str:
    line = text.replace("\n", " ")
    return line if len(line) <= LONGEST_TEXT else f"{line[:LONGEST_TEXT]}..."
