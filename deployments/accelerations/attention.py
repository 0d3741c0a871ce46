"""Attention backends: SGLang's names on diffusers' dispatcher, set per module and never for the process.

`SGLANG_DIFFUSION_ATTENTION_BACKEND` gives the backend of every attention module of the stage whose calls it can make;
`SGLANG_DIFFUSION_ATTENTION_CONFIG` names a file of rules that differ from it per component, block range or
module, with a backend's options (docs/attention.md). What a rule of the file asks for must be had.

diffusers' own `set_attention_backend` also changes the default of the whole process: it is not used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from deployments.accelerations.acceleration import Acceleration
from deployments.accelerations.attention_kernels import (
    NATIVE,
    BackendKernel,
    function_for,
    function_where_it_can,
    refusal_of,
    usual_call,
)
from deployments.accelerations.attention_modules import attention_modules, find_route, floating_dtype, head_dim
from deployments.accelerations.attention_rules import Rule, read_rules
from deployments.modules import AccelerationError, StageModules
from env_config.variables import EnvConfig

# What transformers calls the same kernels; its models keep their own attention for all others.
TEXT_ENCODER_BACKENDS = {"native": "sdpa", "flash": "flash_attention_2", "_flash_3": "flash_attention_3"}
TEXT_ENCODER_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}

USUAL_HEAD_DIM = 64  # of a module that does not say how many numbers its heads have; its calls show it
MOST_NAMED = 8  # modules


def install(modules: StageModules, env: EnvConfig) -> str:
    """Set the backend of every attention module; one line per component says how many, and which were not."""
    rules = read_rules(env)
    # The kernel API log also watches modules that no rule speaks of.
    default = Rule(NATIVE) if env.kernel_api.loglevel > 0 else None
    lines, of_denoisers = [], []
    for name, component in modules.components.items():
        if isinstance(component, PreTrainedModel):
            lines.append(_install_in_text_encoder(name, component, rules))
            continue
        report = _install_in_component(name, component, rules, default, modules)
        of_denoisers += [report] if name in modules.denoisers else []
        lines.append(str(report))
    _check_denoisers(modules, rules, of_denoisers)
    return "attention: " + "; ".join(lines)


def _check_denoisers(modules: StageModules, rules: tuple[Rule, ...], reports: list[Report]) -> None:
    """Raises AccelerationError where a backend was asked for, and no module of a denoiser has it."""
    for_denoisers = [rule.choice for rule in rules if rule.component in (None, *modules.denoisers)]
    asked = [choice for choice in for_denoisers if choice.backend != "native"]
    if not modules.denoisers or not asked:
        return
    refusals = [refusal for report in reports for refusal in report.refused]
    if refusals and not any(report.num_as_asked for report in reports):
        raise AccelerationError(refusals[0])
    if not any(report.routed for report in reports):
        raise AccelerationError(
            f"{asked[0].source} cannot be had: no attention module of {', '.join(modules.denoisers)} "
            f"can be given a backend: {'; '.join(map(str, reports))}"
        )


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
    num_as_asked: int = 0  # of them those that have another backend than native
    refused: dict[str, list[str]] = field(default_factory=dict)  # paths of the modules that keep native, by the reason
    unaffected: Counter[str] = field(default_factory=Counter)  # modules by kind

    def __str__(self) -> str:
        routed = [f"{backend} in {count} modules" for backend, count in self.routed.items()]
        routed += [f"native in {_named(paths)}, since {reason}" for reason, paths in self.refused.items()]
        text = f"{self.component}: {', '.join(routed) or 'no attention module that can be given a backend'}"
        if self.unaffected:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.unaffected.items())
            text += f" (UNAFFECTED: {kinds})"
        return text


def _named(paths: list[str]) -> str:
    shown = ", ".join(paths[:MOST_NAMED])
    return shown if len(paths) <= MOST_NAMED else f"{shown} and {len(paths) - MOST_NAMED} more"


def _install_in_component(
    name: str,
    component: torch.nn.Module,
    rules: tuple[Rule, ...],
    default: Rule | None,
    modules: StageModules,
) -> Report:
    report = Report(name)
    dtype = floating_dtype(component) or torch.float32
    unused = {rule for rule in rules if rule.component == name}
    kernels: dict[Rule, BackendKernel] = {}
    for path, module in attention_modules(component):
        rule = next((rule for rule in reversed(rules) if rule.matches(name, path)), default)
        if rule is None:
            continue
        unused.discard(rule)
        route = find_route(module)
        if route is None:
            processor = getattr(module, "processor", None)
            with_processor = f" with {type(processor).__name__}" if processor is not None else ""
            report.unaffected[type(module).__name__ + with_processor] += 1
            continue
        refusal = _refusal(rule, module, dtype, modules)
        if refusal is not None and not rule.where_it_can:
            raise AccelerationError(refusal)
        if refusal is not None:
            report.refused.setdefault(refusal, []).append(path)
            rule = default
            if rule is None:
                continue
        if rule not in kernels:
            kernels[rule] = _kernel(rule, f"attention.{name}.{rule.choice.backend}", modules)
        route(module, kernels[rule])
        report.num_as_asked += rule.choice.backend != "native"
        report.routed[rule.choice.backend] += refusal is None
    if unused:
        source = unused.pop().choice.source
        raise AccelerationError(f"{source}: no attention module of {name} matches this rule, or later ones do")
    report.routed = +report.routed
    return report


def _refusal(rule: Rule, module: torch.nn.Module, dtype: torch.dtype, modules: StageModules) -> str | None:
    """Of the module's usual call, without a mask."""
    call = usual_call(floating_dtype(module) or dtype, head_dim(module) or USUAL_HEAD_DIM)
    refusal = refusal_of(rule.choice, modules.device, call)
    return refusal and f"{rule.choice.source}: {refusal}"


def _kernel(rule: Rule, name: str, modules: StageModules) -> BackendKernel:
    is_plain = not rule.where_it_can or rule.choice.backend == "native"
    function = function_for(rule.choice) if is_plain else function_where_it_can(rule.choice, modules.device, name)
    return BackendKernel(rule.choice, modules.wrap_kernel(name, function))


def _install_in_text_encoder(name: str, encoder: PreTrainedModel, rules: tuple[Rule, ...]) -> str:
    own = f"{name}: keeps transformers' {encoder.config._attn_implementation}"
    rule = next((rule for rule in reversed(rules) if rule.matches(name, "")), None)
    if rule is None:
        return own
    choice = rule.choice
    implementation = TEXT_ENCODER_BACKENDS.get(choice.backend)
    if implementation is None:
        return f"{own} (UNAFFECTED: transformers has no {choice.backend})"
    if not getattr(encoder, TEXT_ENCODER_SUPPORT[implementation], False):
        return f"{own} (UNAFFECTED: {type(encoder).__name__} does not support {implementation})"
    if implementation.startswith("flash") and floating_dtype(encoder) in (None, torch.float32):
        return f"{own} (UNAFFECTED: {implementation} does not take its float32)"
    try:
        encoder.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        if rule.where_it_can:
            return f"{own} (UNAFFECTED: {str(error).splitlines()[0]})"
        raise AccelerationError(f"{choice.source}, {name}: {error}") from error
    return f"{name}: transformers' {implementation}"
