"""Which attention backend a module is to use: SGLang's names, diffusers' names, and the file of rules."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from deployments.modules import AccelerationError
from env_config.closest import did_you_mean
from env_config.variables import EnvConfig

BACKEND_VARIABLE = "SGLANG_DIFFUSION_ATTENTION_BACKEND"
CONFIG_VARIABLE = "SGLANG_DIFFUSION_ATTENTION_CONFIG"

# SGLang's names and diffusers'; None: diffusers has nothing like it.
BACKENDS: dict[str, str | None] = {
    "torch_sdpa": "native",
    "torch_cudnn_sdpa": "_native_cudnn",
    "cudnn_sdpa": "_native_cudnn",
    "fa": "flash",
    "fa2": "flash",
    "fa3": "_flash_3",
    "fa4": "flash_4_hub",
    "sage_attn": "sage",
    "sage_attn_3": "sage_blackwell_hub",
    "aiter": "aiter_fa2_hub",
    "dynamic_cudnn_sdpa": None,
    "aiter_sage": None,
    "sparge_attn": None,
    "sliding_tile_attn": None,
    "video_sparse_attn": None,
    "video_sparse_attn_h3": None,
    "hybrid_window_attn_h3": None,
    "sparse_video_gen_2_attn": None,
    "vmoba_attn": None,
    "sla_attn": None,
    "sage_sla_attn": None,
    "laser_attn": None,
    "block_sparse_attn": None,
    "rain_fusion_attn": None,
    "sol_attn": None,
    "subblock_sparse_attn": None,
    "cube_sparse_attn": None,
    "fp8_fa_sm120": None,
    "no_attention": None,
}
DIFFUSERS_BACKENDS = tuple(member.value for member in AttentionBackendName)

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the caller of a backend function decides; the rest of its parameters are options of the backend.
FUNCTION_ARGUMENTS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "_parallel_config",
)  # fmt: skip
CALL_ARGUMENTS = (*FUNCTION_ARGUMENTS, "return_lse", "return_attn_probs")


@dataclass(frozen=True)
class Choice:
    """A backend of diffusers with its options."""

    backend: str
    compute_dtype: str | None = None  # queries, keys and values are cast to it for the kernel
    when_masked: str | None = None  # the backend of calls with a mask, for kernels that take none
    options: tuple[tuple[str, Any], ...] = ()  # parameters of the backend's own function
    source: str = field(default="", compare=False)  # where it was asked for, and by what name


@dataclass(frozen=True)
class Rule:
    """A choice for the attention modules of a component that all its conditions match."""

    choice: Choice
    component: str | None = None
    blocks: tuple[range, ...] | None = None
    modules: str | None = None  # a wildcard pattern of the module's path in its component
    where_it_can: bool = False  # modules and calls that the kernel refuses keep torch's own attention

    def matches(self, component: str, path: str) -> bool:
        if self.component is not None and self.component != component:
            return False
        if self.modules is not None and not fnmatchcase(path, self.modules):
            return False
        block = block_of(path)
        return self.blocks is None or (block is not None and any(block in span for span in self.blocks))


def read_rules(env: EnvConfig) -> tuple[Rule, ...]:
    """The rules of this process, the last match wins: the variable's, then those of the file."""
    runtime = env.runtime
    rules = []
    if runtime.attention_backend is not None:
        backend = diffusers_backend(runtime.attention_backend, BACKEND_VARIABLE)
        choice = Choice(backend, source=f"{BACKEND_VARIABLE}={runtime.attention_backend}")
        rules.append(Rule(choice, where_it_can=True))
    if runtime.attention_config is not None:
        rules += _read_config(runtime.config_root / runtime.attention_config, runtime.attention_backend)
    return tuple(rules)


def diffusers_backend(name: str, source: str) -> str:
    """diffusers' name of a backend, given SGLang's name or diffusers' own, in any case."""
    known = name.strip().lower()
    if known in DIFFUSERS_BACKENDS:
        return known
    if known not in BACKENDS:
        hint = _closest(known, (*BACKENDS, *DIFFUSERS_BACKENDS))
        raise AccelerationError(
            f"{source}: {name!r} is not a known attention backend{hint}; allowed are "
            f"{', '.join(available_names())} and diffusers' own names {', '.join(DIFFUSERS_BACKENDS)}"
        )
    backend = BACKENDS[known]
    if backend is None:
        raise AccelerationError(
            f"{source}: diffusers has no equivalent of SGLang's {known}; available are {', '.join(available_names())}"
        )
    return backend


def available_names() -> list[str]:
    """SGLang's names that diffusers has a backend for."""
    return [name for name, backend in BACKENDS.items() if backend is not None]


RULE_KEYS = ("component", "blocks", "modules", "backend", "options")


def _read_config(file: Path, default_backend: str | None) -> list[Rule]:
    source = f"{CONFIG_VARIABLE}={file}"
    readers: dict[str, Callable[[str], Any]] = {
        ".json": json.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
    if file.suffix not in readers:
        raise AccelerationError(f"{source}: must be a file named *.json, *.yaml or *.yml")
    try:
        content = readers[file.suffix](file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AccelerationError(f"{source}: {error}") from error
    _check_keys(content, ("rules",), source)
    rules = content.get("rules")
    if not isinstance(rules, list) or not rules:
        raise AccelerationError(f"{source}: `rules` must be a list with at least one rule, got {rules!r}")
    return [_parse_rule(rule, f"{source}: rules[{i}]", default_backend) for i, rule in enumerate(rules)]


def _parse_rule(rule: Any, source: str, default_backend: str | None) -> Rule:
    _check_keys(rule, RULE_KEYS, source)
    for key in ("component", "modules", "backend"):
        if not isinstance(rule.get(key), str | None):
            raise AccelerationError(f"{source}.{key}: must be text, got {rule[key]!r}")
    name = rule.get("backend", default_backend)
    if name is None:
        raise AccelerationError(f"{source}.backend: is missing, and {BACKEND_VARIABLE} is not set")
    choice = _parse_choice(name, rule.get("options", {}), source)
    blocks = _parse_blocks(rule["blocks"], f"{source}.blocks") if "blocks" in rule else None
    return Rule(choice, rule.get("component"), blocks, rule.get("modules"))


def _parse_choice(name: str, options: Any, source: str) -> Choice:
    backend = diffusers_backend(name, f"{source}.backend")
    function = _AttentionBackendRegistry._backends[AttentionBackendName(backend)]
    own = [parameter for parameter in inspect.signature(function).parameters if parameter not in CALL_ARGUMENTS]
    _check_keys(options, ("compute_dtype", "when_masked", *own), f"{source}.options of {backend}")
    compute_dtype = options.get("compute_dtype")
    if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
        allowed = ", ".join(COMPUTE_DTYPES)
        raise AccelerationError(f"{source}.options.compute_dtype: must be one of {allowed}, got {compute_dtype!r}")
    when_masked = options.get("when_masked")
    if when_masked is not None:
        when_masked = diffusers_backend(str(when_masked), f"{source}.options.when_masked")
    values = tuple((option, _as_parameter(options[option])) for option in own if option in options)
    return Choice(backend, compute_dtype, when_masked, values, source=f"{source}.backend={name}")


def _as_parameter(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # window_size: [256, 256]


def _parse_blocks(blocks: Any, source: str) -> tuple[range, ...]:
    """Block numbers and inclusive ranges: 3, "0-3", or a list of them."""
    spans = []
    for item in blocks if isinstance(blocks, list) else [blocks]:
        first, dash, last = str(item).partition("-")
        if isinstance(item, bool) or not first.isdecimal() or (dash and not last.isdecimal()):
            raise AccelerationError(f'{source}: must be block numbers or ranges such as "0-3", got {item!r}')
        spans.append(range(int(first), int(last or first) + 1))
    return tuple(spans)


def _check_keys(mapping: Any, known: tuple[str, ...], source: str) -> None:
    if not isinstance(mapping, dict):
        raise AccelerationError(f"{source}: must be a mapping with the keys {', '.join(known)}, got {mapping!r}")
    for key in mapping:
        if key not in known:
            hint = _closest(str(key), known)
            raise AccelerationError(f"{source}: unknown key {key!r}{hint}; known are {', '.join(known)}")


def _closest(name: str, known: Any) -> str:
    hint = did_you_mean(name, known)
    return hint and f" ({hint})"


def block_of(path: str) -> int | None:
    """The number of the block that a module belongs to: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)
