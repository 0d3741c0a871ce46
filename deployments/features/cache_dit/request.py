"""The Cache-DiT contexts of one request: made at its first forward, swapped in before each of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from deployments.denoising.checkpoint import ResumableSession
from deployments.features.cache_dit import contexts as cache_dit
from deployments.features.cache_dit.forward import Contexts
from deployments.features.cache_dit.plan import CachePlan, cache_plans, expert_steps, is_wanted
from deployments.messages import GenerationRequest
from env_config.variables import EnvConfig


class RequestCaches:
    """What one request remembers of its earlier steps, for each of its transformers.

    Raises InvalidRequestError at the first forward for a `cache_dit` field that cannot be used.
    """

    def __init__(self, env: EnvConfig, request: GenerationRequest) -> None:
        self.env = env
        self.overrides: Any = request.features.get("cache_dit")
        self.is_wanted = is_wanted(env, self.overrides)
        self.plans: dict[str, CachePlan] = {}
        self.contexts: dict[str, tuple[Any, Contexts]] = {}  # denoiser -> (module, contexts)
        self._passes: dict[str, tuple[int, int]] = {}  # denoiser -> (steps done, passes since the last step)

    def lent(self, session: ResumableSession, component: str, module: Any) -> AbstractContextManager[None] | None:
        """Lends this request's contexts to the module for the forward that comes next; None: it runs uncached."""
        if not self.is_wanted or session.is_skipping:
            return None
        if not self.plans:
            self.plans = cache_plans(self.env, steps_of_denoisers(session), self.overrides) or {}
        if component not in self.plans:
            return None
        return self._lent(session, component, module, self._count_pass(session, component))

    @contextlib.contextmanager
    def _lent(self, session: ResumableSession, component: str, module: Any, guidance_pass: int) -> Iterator[None]:
        """Entered in the engine's thread, because the first use of a module changes its forward.

        Between two forwards a module holds nobody's contexts, so that nobody's memory is kept by it.
        """
        if component not in self.contexts:
            self.contexts[component] = (module, self._begin(session, component, module))
        cache_dit.activate(module, self.contexts[component][1], guidance_pass)
        try:
            yield
        finally:
            cache_dit.activate(module, None)

    def state(self) -> Any:
        """For a checkpoint: plain values and tensors."""
        return {name: cache_dit.snapshot(contexts) for name, (_, contexts) in self.contexts.items()} or None

    def summary(self) -> dict[str, dict[str, Any]]:
        """Steps and blocks computed and reused, by transformer."""
        return {
            name: dataclasses.asdict(cache_dit.summary(module, contexts))
            for name, (module, contexts) in self.contexts.items()
        }

    def _begin(self, session: ResumableSession, component: str, module: Any) -> Contexts:
        plan = self.plans[component]
        saved = (session.saved_caches or {}).get(component)
        if saved is not None:
            cache_dit.prepare(module)
            return cache_dit.restore(module, plan, saved)
        return cache_dit.new_contexts(module, plan)

    def _count_pass(self, session: ResumableSession, component: str) -> int:
        steps, count = self._passes.get(component, (session.steps_done, -1))
        count = count + 1 if steps == session.steps_done else 0
        self._passes[component] = (session.steps_done, count)
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
