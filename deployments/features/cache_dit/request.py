"""Cache-DiT as a feature: the contexts of one request, made at its first forward, lent before each of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from deployments.denoising.checkpoint import ResumableSession
from deployments.errors import InvalidRequestError
from deployments.features.cache_dit import contexts as cache_dit
from deployments.features.cache_dit.forward import Contexts
from deployments.features.cache_dit.measurements import CachedSteps
from deployments.features.cache_dit.plan import PARAM, CachePlan, cache_plans, expert_steps, is_wanted, resolve_knobs
from deployments.features.feature import NOTHING, Feature, Summary, Surrounding
from env_config.variables import EnvConfig


@dataclass(frozen=True)
class CacheOptions:
    """The variables, and what the request says otherwise."""

    env: EnvConfig
    overrides: Mapping[str, Any] | None


def wanted(env: EnvConfig, asked: Any) -> CacheOptions | None:
    """None: the request runs uncached. Raises InvalidRequestError for a `cache_dit` field that cannot be used."""
    if asked is not None and not isinstance(asked, Mapping):
        raise InvalidRequestError(f"{PARAM} must be an object, got {asked!r}", param=PARAM)
    if not is_wanted(env, asked):
        return None
    resolve_knobs(env, asked, secondary=True)
    return CacheOptions(env, asked)


class RequestCaches:
    """What one request remembers of its earlier steps, for each of its transformers.

    Raises InvalidRequestError at the first forward for knobs that do not fit its steps or its transformer.
    """

    def __init__(self, options: CacheOptions, session: ResumableSession, saved: Mapping[str, Any] | None) -> None:
        self.options = options
        self.session = session
        self.saved = saved or {}
        self.plans: dict[str, CachePlan] = {}
        self.contexts: dict[str, tuple[Any, Contexts]] = {}  # denoiser -> (module, contexts)
        self._passes: dict[str, tuple[int, int]] = {}  # denoiser -> (steps done, passes since the last step)

    def surround(self, component: str, module: Any) -> Surrounding:
        """Lends this request's contexts to the module for the forward that comes next."""
        if self.session.is_skipping:
            return NOTHING
        if not self.plans:
            steps = steps_of_denoisers(self.session)
            self.plans = cache_plans(self.options.env, steps, self.options.overrides) or {}
        if component not in self.plans:
            return NOTHING
        # Alone even where the mask or the warm-up has all of it computed. Each cached forward writes the residuals of
        # its samples into the contexts of one request, and cache-dit's buffers do not say which axis is the batch, so
        # those of a merged forward could not be told apart afterwards. And where the threshold decides, cache-dit takes
        # the mean over the whole batch: whether a request reuses a step would depend on who runs beside it.
        return Surrounding(partial(self._lent, component, module, self._count_pass(component)), merge_key=None)

    @contextlib.contextmanager
    def _lent(self, component: str, module: Any, guidance_pass: int) -> Iterator[None]:
        """Entered in the engine's thread, because the first use of a module changes its forward.

        Between two forwards a module holds nobody's contexts, so that nobody's memory is kept by it.
        """
        if component not in self.contexts:
            self.contexts[component] = (module, self._begin(component, module))
        cache_dit.activate(module, self.contexts[component][1], guidance_pass)
        try:
            yield
        finally:
            cache_dit.activate(module, None)
        cache_dit.let_go_of_finished(self.contexts[component][1])

    def snapshot(self) -> Any:
        """The contexts of each transformer as plain values and tensors."""
        return {name: cache_dit.snapshot(contexts) for name, (_, contexts) in self.contexts.items()} or None

    def end(self) -> None:
        """The contexts are this object's own."""

    def summary(self) -> Summary | None:
        """Steps and blocks computed and reused, by transformer."""
        if not self.contexts:
            return None
        each = {name: cache_dit.summary(module, contexts) for name, (module, contexts) in self.contexts.items()}
        return Summary(
            {name: dataclasses.asdict(counts) for name, counts in each.items()},
            tuple(CachedSteps(name, counts.computed_steps, counts.reused_steps) for name, counts in each.items()),
        )

    def _begin(self, component: str, module: Any) -> Contexts:
        plan, saved = self.plans[component], self.saved.get(component)
        if saved is not None:
            cache_dit.prepare(module)
            return cache_dit.restore(module, plan, saved)
        return cache_dit.new_contexts(module, plan)

    def _count_pass(self, component: str) -> int:
        steps, count = self._passes.get(component, (self.session.steps_done, -1))
        count = count + 1 if steps == self.session.steps_done else 0
        self._passes[component] = (self.session.steps_done, count)
        return count


def steps_of_denoisers(session: ResumableSession) -> dict[str, int]:
    """Steps that each denoiser runs in this request, the primary one first.

    Two experts with a boundary share the steps (Wan2.2's high- and low-noise transformers); others run them all.
    """
    timesteps = [float(t) for t in session.schedulers[0].timesteps]
    names = [name for name in session.stage.layout.denoisers if name.startswith("transformer")]
    names = names or list(session.stage.layout.denoisers[:1])
    boundary = getattr(session.stage.pipeline.config, "boundary_ratio", None)
    if len(names) == 2 and boundary is not None:
        threshold = boundary * session.schedulers[0].config.num_train_timesteps
        return dict(zip(names, expert_steps(timesteps, threshold), strict=True))
    return {name: len(timesteps) for name in names}


CACHE_DIT = Feature(
    "cache_dit",
    wanted,
    RequestCaches,
    settings=lambda env: (env.cache_dit, env.cache_dit_secondary),
    install=cache_dit.install,
    is_a_cache=True,
)
