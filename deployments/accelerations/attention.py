"""Attention backends: SGLang's names on diffusers' dispatcher, set per module and never for the process.

`SGLANG_DIFFUSION_ATTENTION_BACKEND` gives the backend of every attention module of the stage;
`SGLANG_DIFFUSION_ATTENTION_CONFIG` names a file of rules that differ from it per component, block range or
module, with a backend's options (docs/attention.md).

diffusers' own `set_attention_backend` also changes the default of the whole process, so it is not used:
a module whose processor asks the dispatcher gets its backend in that processor; a module that calls
torch's `scaled_dot_product_attention` itself has that one call redirected while its forward runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, MochiAttention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from deployments.accelerations.acceleration import Acceleration
from deployments.accelerations.attention_rules import (
    COMPUTE_DTYPES,
    DIFFUSERS_BACKENDS,
    FUNCTION_ARGUMENTS,
    Choice,
    Rule,
    read_rules,
)
from deployments.devices import Device
from deployments.modules import AccelerationError, Kernel, StageModules
from env_config.variables import EnvConfig

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

# What transformers calls the same kernels; its models keep their own attention for all others.
TEXT_ENCODER_BACKENDS = {"native": "sdpa", "flash": "flash_attention_2", "_flash_3": "flash_attention_3"}
TEXT_ENCODER_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}

LARGEST_PROBE_ERROR = 0.1  # of values within [-1, 1]: INT8 and FP8 kernels pass, a wrong layout does not


def install(modules: StageModules, env: EnvConfig) -> str:
    """Set the backend of every attention module; one line per component says how many, and which were not."""
    rules = read_rules(env)
    # The kernel API log also watches modules that no rule speaks of.
    default = Rule(Choice("native")) if env.kernel_api.loglevel > 0 else None
    lines = []
    num_routed = 0
    for name, component in modules.components.items():
        if isinstance(component, PreTrainedModel):
            lines.append(_install_in_text_encoder(name, component, rules))
            continue
        report = _install_in_component(name, component, rules, default, modules)
        num_routed += report.num_routed if name in modules.denoisers else 0
        lines.append(str(report))
    for_denoisers = [rule.choice for rule in rules if rule.component in (None, *modules.denoisers)]
    asked = [choice for choice in for_denoisers if choice.backend != "native"]
    if modules.denoisers and asked and not num_routed:
        raise AccelerationError(
            f"{asked[0].source} cannot be had: no attention module of {', '.join(modules.denoisers)} "
            f"can be given a backend: {'; '.join(lines)}"
        )
    return "attention: " + "; ".join(lines)


def _is_on(env: EnvConfig) -> bool:
    runtime = env.runtime
    is_asked = runtime.attention_backend is not None or runtime.attention_config is not None
    return is_asked or env.kernel_api.loglevel > 0


def _settings(env: EnvConfig) -> object:
    """The rules, whichever file they come from."""
    return [replace(rule, choice=replace(rule.choice, source="")) for rule in read_rules(env)]


ATTENTION = Acceleration("attention", _is_on, install, _settings)


@dataclass
class Report:
    """What was done to one component."""

    component: str
    routed: Counter[str] = field(default_factory=Counter)  # modules by backend
    unaffected: Counter[str] = field(default_factory=Counter)  # modules by kind

    @property
    def num_routed(self) -> int:
        return self.routed.total()

    def __str__(self) -> str:
        routed = ", ".join(f"{backend} in {count} modules" for backend, count in self.routed.items())
        text = f"{self.component}: {routed or 'no attention module that can be given a backend'}"
        if self.unaffected:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.unaffected.items())
            text += f" (UNAFFECTED: {kinds})"
        return text


def _install_in_component(
    name: str,
    component: torch.nn.Module,
    rules: tuple[Rule, ...],
    default: Rule | None,
    modules: StageModules,
) -> Report:
    report = Report(name)
    dtype = _floating_dtype(component)
    unused = {rule for rule in rules if rule.component == name}
    kernels: dict[Choice, BackendKernel] = {}
    for path, module in _attention_modules(component):
        rule = next((rule for rule in reversed(rules) if rule.matches(name, path)), default)
        if rule is None:
            continue
        unused.discard(rule)
        backend = rule.choice.backend
        route = find_route(module)
        if route is None:
            processor = getattr(module, "processor", None)
            with_processor = f" with {type(processor).__name__}" if processor is not None else ""
            report.unaffected[type(module).__name__ + with_processor] += 1
            continue
        check_choice(rule.choice, modules.device, dtype, _head_dim(module))
        if rule.choice not in kernels:
            watched = modules.wrap_kernel(f"attention.{name}.{backend}", function_for(rule.choice))
            kernels[rule.choice] = BackendKernel(rule.choice, watched)
        route(module, kernels[rule.choice])
        report.routed[backend] += 1
    if unused:
        source = unused.pop().choice.source
        raise AccelerationError(f"{source}: no attention module of {name} matches this rule, or later ones do")
    return report


def _install_in_text_encoder(name: str, encoder: PreTrainedModel, rules: tuple[Rule, ...]) -> str:
    own = f"{name}: keeps transformers' {encoder.config._attn_implementation}"
    choice = next((rule.choice for rule in reversed(rules) if rule.matches(name, "")), None)
    if choice is None:
        return own
    implementation = TEXT_ENCODER_BACKENDS.get(choice.backend)
    if implementation is None:
        return f"{own} (UNAFFECTED: transformers has no {choice.backend})"
    if not getattr(encoder, TEXT_ENCODER_SUPPORT[implementation], False):
        return f"{own} (UNAFFECTED: {type(encoder).__name__} does not support {implementation})"
    if implementation.startswith("flash") and _floating_dtype(encoder) == torch.float32:
        return f"{own} (UNAFFECTED: {implementation} does not take its float32)"
    try:
        encoder.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        raise AccelerationError(f"{choice.source}, {name}: {error}") from error
    return f"{name}: transformers' {implementation}"


def _attention_modules(component: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    known = (Attention, MochiAttention, AttentionModuleMixin)
    for path, module in component.named_modules():
        if isinstance(module, known) or find_route(module) is not None:
            yield path, module


Route = Callable[[torch.nn.Module, "BackendKernel"], None]


def find_route(module: torch.nn.Module) -> Route | None:
    """How a module is given a backend; None: it computes attention in a way that has none."""
    processor = getattr(module, "processor", None)
    for holder in (processor, module):
        # Some processors build masks that one backend only understands, and refuse all others.
        if hasattr(holder, "_attention_backend"):
            return None if hasattr(holder, "_SUPPORTED_BACKENDS") else _name_backend
    if _calls_attention(processor) or _calls_attention(module):
        return _redirect_forward
    return None


def _calls_attention(holder: Any) -> bool:
    functions = [getattr(type(holder), name, None) for name in ("__call__", "forward")]
    codes = [getattr(inspect.unwrap(function), "__code__", None) for function in functions if function]
    names = {name for code in codes if code is not None for name in code.co_names}
    return bool(names & {"scaled_dot_product_attention", "dispatch_attention_fn"})


def _name_backend(module: torch.nn.Module, kernel: BackendKernel) -> None:
    holder: Any = module
    if hasattr(getattr(module, "processor", None), "_attention_backend"):
        holder = copy.copy(module.processor)  # modules may share one
        module.processor = holder
    holder._attention_backend = kernel.dispatcher_name()


def _redirect_forward(module: torch.nn.Module, kernel: BackendKernel) -> None:
    forward = module.forward
    redirection = _RedirectedAttention(kernel)

    @functools.wraps(forward)
    def redirected_forward(*args: Any, **kwargs: Any) -> Any:
        with redirection:
            return forward(*args, **kwargs)

    module.forward = redirected_forward


class _RedirectedAttention(TorchFunctionMode):
    """Within it, and in this thread only, torch's attention function is the kernel."""

    def __init__(self, kernel: BackendKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,  # [B, H, S, D], or [B, S, D] for one head
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        has_heads = query.ndim == 4
        heads_last = [x.transpose(1, 2) if has_heads else x.unsqueeze(2) for x in (query, key, value)]
        output: torch.Tensor = self.kernel.function(*heads_last, *args, **kwargs)
        return output.transpose(1, 2) if has_heads else output.squeeze(2)


# --- the kernels ---


@dataclass(frozen=True)
class BackendKernel:
    """The attention function of a choice, perhaps watched by the kernel API log."""

    choice: Choice
    function: Kernel

    def dispatcher_name(self) -> AttentionBackendName:
        """The name by which diffusers' dispatcher finds this function."""
        is_plain = self.choice == Choice(self.choice.backend) and self.function is function_for(self.choice)
        return AttentionBackendName(self.choice.backend) if is_plain else _registered(self.function)


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
def check_choice(choice: Choice, device: Device, dtype: torch.dtype, head_dim: int) -> None:
    """Attend once on the device and compare with torch's own attention in float32 on the CPU.

    Raises AccelerationError for a missing package, a kernel that does not run here, or wrong numbers.
    """
    source = f"{choice.source}: the attention backend {choice.backend} of diffusers"
    for backend in filter(None, (choice.backend, choice.when_masked)):
        try:
            with attention_backend(backend):  # checks the package, fetches a kernel from the hub
                pass
        except Exception as error:
            hint = f" Install: {INSTALL_LINES[backend]}" if backend in INSTALL_LINES else ""
            raise AccelerationError(f"{source} is not usable: {error}{hint}") from error
    shape = (1, 16, 2, head_dim)
    query = torch.linspace(-1, 1, 32 * head_dim).reshape(shape)
    key, value = query.flip(1), query.roll(5, dims=1)
    expected = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    on_device = [x.to(device.torch_device, dtype) for x in (query, key, value)]
    try:
        output = function_for(choice)(*on_device)
    except Exception as error:
        raise AccelerationError(
            f"{source} does not run on {device.name} with {dtype} and {head_dim} numbers per head: {error}"
        ) from error
    largest = (output.float().cpu() - expected.transpose(1, 2)).abs().max().item()
    # A backend's own options, such as a window, change the numbers on purpose.
    if not largest <= (float("inf") if choice.options else LARGEST_PROBE_ERROR):
        raise AccelerationError(f"{source} gives wrong numbers on {device.name}: off by {largest:g}")


def _floating_dtype(module: torch.nn.Module) -> torch.dtype:
    dtypes = (p.dtype for p in module.parameters() if p.dtype in COMPUTE_DTYPES.values())
    return next(dtypes, torch.float32)


def _head_dim(module: torch.nn.Module) -> int:
    heads, inner_dim = getattr(module, "heads", None), getattr(module, "inner_dim", None)
    if isinstance(heads, int) and isinstance(inner_dim, int):
        return inner_dim // heads
    return 64
