"""The attention functions of diffusers' backends: put under names of our own, and tried before they are used.

A kernel is tried for a kind of call: its dtype, the numbers per head, the kind of its mask. What it makes of a few
tokens is compared with torch's own attention in float32 on the CPU.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

from deployments.accelerations.attention_rules import COMPUTE_DTYPES, DIFFUSERS_BACKENDS, FUNCTION_ARGUMENTS, Choice
from deployments.devices import Device
from deployments.modules import Kernel

logger = logging.getLogger(__name__)

INSTALL_LINES = {
    "flash": "pip install flash-attn --no-build-isolation",
    "flash_varlen": "pip install flash-attn --no-build-isolation",
    "_flash_3": "build FlashAttention 3 from the `hopper` folder of the flash-attention repository",
    "_flash_varlen_3": "build FlashAttention 3 from the `hopper` folder of the flash-attention repository",
    "xformers": "pip install xformers",
    "_native_npu": "pip install torch-npu",
    "_native_xla": "pip install torch-xla",
} | {
    name: "pip install kernels" if name.endswith("_hub") else "build sageattention>=2.1.1 from its repository"
    for name in DIFFUSERS_BACKENDS
    if name.endswith("_hub") or "sage" in name
}

NATIVE = Choice("native")
SAMPLES, TOKENS, HEADS = 2, 16, 2  # of a trial
LARGEST_TRIAL_ERROR = 0.1  # of values within [-1, 1]: INT8 and FP8 kernels pass, a wrong layout does not


@dataclass(frozen=True)
class BackendKernel:
    """The attention function of a choice, perhaps watched by the kernel API log."""

    choice: Choice
    function: Kernel

    def dispatcher_name(self) -> AttentionBackendName:
        """The name by which diffusers' dispatcher finds this function."""
        is_plain = self.choice == Choice(self.choice.backend) and self.function is function_for(self.choice)
        return AttentionBackendName(self.choice.backend) if is_plain else _registered(self.function)


@dataclass(frozen=True)
class Call:
    """What kernels look at of a call, and may refuse."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    mask: tuple[int, bool, bool] | None = None  # its axes, whether it is the same for all queries, whether it is added
    is_causal: bool = False
    is_grouped: bool = False  # several heads of queries share one of keys

    def __str__(self) -> str:
        mask = ", a mask" if self.mask else ""
        grouped = ", shared keys" if self.is_grouped else ""
        return f"{self.dtype}, {self.head_dim} numbers per head{mask}{', causal' if self.is_causal else ''}{grouped}"


def usual_call(dtype: torch.dtype, head_dim: int) -> Call:
    return Call(dtype, head_dim, head_dim)


@functools.cache
def function_for(choice: Choice) -> Kernel:
    """An attention function on tensors of shape [B, S, H, D]."""
    backend = AttentionBackendName(choice.backend)
    masked = AttentionBackendName(choice.when_masked) if choice.when_masked is not None else backend
    dtype = COMPUTE_DTYPES[choice.compute_dtype] if choice.compute_dtype is not None else None

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        is_rerouted = attn_mask is not None and masked is not backend
        if dtype is not None and attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        output: torch.Tensor = dispatch_attention_fn(
            *(x.to(dtype or x.dtype) for x in (query, key, value)),
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            attention_kwargs={} if is_rerouted else dict(choice.options),
            backend=masked if is_rerouted else backend,
            parallel_config=_parallel_config,
        )
        return output.to(query.dtype)

    return attend


def function_where_it_can(choice: Choice, device: Device, name: str) -> Kernel:
    """As `function_for`, but torch's own attention for the calls that the backend refuses or gets wrong.

    Each kind of call is tried when it first comes; in code that is being compiled, what was not tried before is not.
    """
    own, native = function_for(choice), function_for(NATIVE)
    takes: dict[Call, bool] = {}

    @torch.compiler.disable
    def tried(call: Call) -> bool:
        refusal = refusal_of(choice, device, call)
        takes[call] = refusal is None
        if refusal is not None:
            logger.info("%s: torch's own for calls with %s: %s", name, call, refusal)
        return takes[call]

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        call = _kind_of(query, key, value, attn_mask, is_causal)
        known = takes.get(call)
        if known is None:
            known = not torch.compiler.is_compiling() and tried(call)
        attend_so = own if known else native
        output: torch.Tensor = attend_so(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config
        )
        return output

    return attend


def _kind_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
) -> Call:
    kind = None
    if isinstance(mask, torch.Tensor):
        is_of_samples = mask.ndim == 2 and tuple(mask.shape) == (query.shape[0], key.shape[1])
        kind = mask.ndim, is_of_samples or mask.shape[-2] == 1, mask.is_floating_point()
    return Call(query.dtype, query.shape[-1], value.shape[-1], kind, is_causal, query.shape[2] != key.shape[2])


@functools.cache
def _registered(function: Kernel) -> AttentionBackendName:
    """A name of our own in diffusers' table: nothing asks for it but the processors that were given it."""
    value = f"triptych_{len(_AttentionBackendRegistry._backends)}"
    name = str.__new__(AttentionBackendName, value)
    name._name_, name._value_ = value.upper(), value
    _AttentionBackendRegistry._backends[name] = function
    _AttentionBackendRegistry._constraints[name] = []
    _AttentionBackendRegistry._supported_arg_names[name] = set(FUNCTION_ARGUMENTS)
    return name


@functools.cache
def refusal_of(choice: Choice, device: Device, call: Call) -> str | None:
    """Why such calls cannot be had: no package, a kernel that does not run here, wrong numbers. None: they can."""
    source = f"the attention backend {choice.backend} of diffusers"
    for backend in filter(None, (choice.backend, choice.when_masked)):
        try:
            with attention_backend(backend):  # checks the package, fetches a kernel from the hub
                pass
        except Exception as error:  # noqa: BLE001  (whatever a package raises that is not what it should be)
            hint = f" Install: {INSTALL_LINES[backend]}" if backend in INSTALL_LINES else ""
            return f"{source} is not usable: {error}{hint}"
    query, key, value, mask = _trial(call)
    asked: dict[str, Any] = {"is_causal": call.is_causal, "enable_gqa": call.is_grouped}
    expected = function_for(NATIVE)(query, key, value, mask, **asked)
    on_device = [x.to(device.torch_device, call.dtype) for x in (query, key, value)]
    if mask is not None:
        mask = mask.to(device.torch_device, call.dtype if mask.is_floating_point() else mask.dtype)
    try:
        output = function_for(choice)(*on_device, mask, **asked)
    except Exception as error:  # noqa: BLE001  (as above)
        return f"{source} does not run on {device.name} with {call}: {error}"
    largest = (output.float().cpu() - expected).abs().max().item()
    # A backend's own options, such as a window, change the numbers on purpose.
    if not largest <= (float("inf") if choice.options else LARGEST_TRIAL_ERROR):
        return f"{source} gives wrong numbers on {device.name}: off by {largest:g}"
    return None


def _trial(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries, keys, values and the mask of a small call of this kind, [B, S, H, D]."""
    query, value = (_numbers(dim) for dim in (call.head_dim, call.value_dim))
    key, value = query.flip(1), value.roll(5, dims=1)
    if call.is_grouped:
        key, value = key[:, :, :1], value[:, :, :1]
    return query, key, value, _mask(*call.mask) if call.mask is not None else None


def _numbers(dim: int) -> torch.Tensor:
    return torch.linspace(-1, 1, SAMPLES * TOKENS * HEADS * dim).reshape(SAMPLES, TOKENS, HEADS, dim)


def _mask(axes: int, is_of_keys: bool, is_added: bool) -> torch.Tensor:
    positions = torch.arange(TOKENS)
    mask = (positions < TOKENS // 2)[None] if is_of_keys else positions[None, :] <= positions[:, None]
    if is_added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    if axes == 2 and is_of_keys:
        return mask.repeat(SAMPLES, 1)
    return mask.reshape((1,) * (axes - 2) + tuple(mask.shape))
