"""LoRA as a feature: a request's adapters are brought here, held until it ends, and used by its samples alone.

Its forwards share batches with those of any other adapters, and of none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from deployments.adapters.forward import RowsUnknownError, applied, prepare
from deployments.adapters.held import Adapters, Held, OnHost
from deployments.adapters.use import FEATURE, AdapterUse, use_of
from deployments.denoising.checkpoint import ResumableSession
from deployments.engine.batching.merging import CannotMergeError
from deployments.engine.forward import PerSample
from deployments.errors import InvalidRequestError
from deployments.features.feature import NOTHING, Feature, Fetched, Summary, Surrounding
from env_config.variables import EnvConfig

Uses = tuple[AdapterUse, ...]
Value = tuple[tuple[str, float], ...]  # PEFT's names with the scales in one component

FIELDS = frozenset(AdapterUse("", "").plain())


@dataclass(frozen=True)
class AdapterOptions:
    """The adapters of one request, with the digests of what was fetched."""

    adapters: Adapters
    uses: Uses
    on_host: tuple[OnHost, ...]  # so that they are there when the request begins, however many others come meanwhile


def wanted(env: EnvConfig, asked: Any) -> Uses | None:
    """None: it goes without. Raises InvalidRequestError for entries that are not those of `AdapterUse.plain`."""
    if asked is None or asked == []:
        return None
    if not isinstance(asked, list | tuple):
        raise _refused(f"must be a list of adapters, got {asked!r}")
    uses = tuple(_read(entry) for entry in asked)
    names = [use.name for use in uses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _refused(f"name {', '.join(twice)} more than once")
    return uses


def _read(entry: Any) -> AdapterUse:
    if not isinstance(entry, Mapping) or not {"name", "path"} <= set(entry) <= FIELDS:
        raise _refused(f"must be objects with {', '.join(sorted(FIELDS))}, got {entry!r}")
    use = use_of(entry)
    texts = (use.name, use.path, use.digest, use.weight_name or "")
    if not all(isinstance(text, str) for text in texts) or not (use.name and use.path):
        raise _refused(f"need words for name, path, weight_name and digest, got {entry!r}")
    scales = list(use.scale.values()) if isinstance(use.scale, Mapping) else [use.scale]
    is_named = not isinstance(use.scale, Mapping) or all(isinstance(name, str) for name in use.scale)
    if not is_named or not all(map(_is_number, scales)):
        raise _refused(f"{use.name}: scale must be a finite number, or one by component, got {use.scale!r}")
    return use


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refused(sentence: str) -> InvalidRequestError:
    return InvalidRequestError(f"{FEATURE} {sentence}", param=FEATURE)


def fetch(adapters: Adapters | None, uses: Uses) -> Fetched:
    """Waits for the files; a request with other contents under the same names is another request."""
    if adapters is None:
        raise _refused("cannot be used: this process holds no adapters")
    on_host = tuple(adapters.fetched(use) for use in uses)
    fetched = tuple(replace(use, digest=each.digest) for use, each in zip(uses, on_host, strict=True))
    found = ",".join(use.digest for use in fetched)
    return Fetched(AdapterOptions(adapters, fetched, on_host), found, [use.plain() for use in fetched])


class RequestAdapters:
    """The adapters of one request, held from its begin to its end."""

    def __init__(self, options: AdapterOptions, session: ResumableSession, saved: Any) -> None:
        self.uses = options.uses
        self._around: dict[str, Surrounding] = {}  # by component
        with ExitStack() as stack:
            self.held: Sequence[Held] = stack.enter_context(options.adapters.holding(options.uses))
            for name in session.stage.layout.denoisers:  # before any forward: what PEFT has put in is active
                if name in session.stage.components:
                    prepare(session.stage.components[name])
            self._stack = stack.pop_all()

    def surround(self, component: str, module: Any) -> Surrounding:
        if component not in self._around:
            self._around[component] = self._surrounding(component, module)
        return self._around[component]

    def _surrounding(self, component: str, module: torch.nn.Module) -> Surrounding:
        value = value_in(component, self.held)
        if not value:
            return NOTHING
        names = frozenset(name for name, _ in value)
        return replace(NOTHING, per_sample=PerSample(partial(_entered, module), value, names))

    def snapshot(self) -> Any:
        """Nothing: a forward leaves nothing behind in an adapter."""
        return None

    def end(self) -> None:
        self._stack.close()

    def summary(self) -> Summary | None:
        """The digests of the adapters, by name."""
        return Summary({use.name: use.digest for use in self.uses})


def value_in(component: str, held: Sequence[Held]) -> Value:
    """The scales in one component; contents that have two names in a request have the sum of both."""
    scales: dict[str, float] = {}
    for each in held:
        if component in each.components:
            scales[each.peft_name] = scales.get(each.peft_name, 0.0) + each.use.scale_in(component)
    return tuple((name, scale) for name, scale in scales.items() if scale)


@contextmanager
def _entered(module: torch.nn.Module, values: Sequence[tuple[Value | None, int]], is_even: bool) -> Iterator[None]:
    try:
        with applied(module, [(number, dict(value or ())) for value, number in values], is_even):
            yield
    except RowsUnknownError as error:
        raise CannotMergeError(str(error)) from error


# No caller writes the entries: they hold places that only the configuration and the registry may say.
LORA = Feature(FEATURE, wanted, RequestAdapters, fetch=fetch, is_a_field=False)
