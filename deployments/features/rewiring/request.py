"""Rewiring as a feature: the attention processors, hooks and switches that a request's pipeline has set in its own
modules are put into the shared ones around its forwards.

Forwards share a batch with those that are rewired alike, if what was put in keeps no state: a class and plain settings.
The samples then lie in the batch as the pipeline's own would. Where something may keep state the forwards run alone,
checkpoints hold the state, and the pipeline must run to its end in the denoiser stage, which alone has that state.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from deployments.denoising.checkpoint import ResumableSession
from deployments.errors import CannotResumeError, FeedsBackError
from deployments.features.feature import NOTHING, Feature, Summary, Surrounding
from deployments.features.rewiring.state import UNKEPT, kept_state, put_back, settings_of
from deployments.stage_pipeline.sessions.own_modules import Change, OwnModules, rewired
from deployments.tensors.values import copied
from env_config.variables import EnvConfig


def wanted(env: EnvConfig, asked: Any) -> bool:
    """By every request: what its pipeline rewires shows itself when it runs."""
    return True


class Rewiring:
    """What one request's pipeline has rewired, by component.

    Raises CannotResumeError for a checkpoint that lacks a state which no message can carry.
    """

    def __init__(self, wanted: bool, session: ResumableSession, saved: Mapping[str, Any] | None) -> None:
        self.session = session
        self.saved = saved or {}
        self.rewired: dict[str, int] = {}  # component -> changes at its latest forward
        self._tried: set[Hashable] = set()  # settings that a forward has left as they were
        if UNKEPT in self.saved.values():
            raise CannotResumeError("what it put into the denoiser keeps a state that no checkpoint can hold")

    def surround(self, component: str, module: Any) -> Surrounding:
        self._put_back_state()
        own = self.session.own_modules.get(component)
        changes = own.changes() if own is not None else []
        if own is None or not changes:
            return NOTHING
        self.rewired[component] = len(changes)
        settings = settings_of(changes)
        if settings is None:
            self._refuse_to_hand_over()
        # The first forward shows whether what was put in changes by itself.
        merge_key = settings if settings in self._tried else None
        return Surrounding(partial(self._entered, own, changes, settings), merge_key, by_position=True)

    @contextmanager
    def _entered(self, own: OwnModules, changes: Sequence[Change], settings: Hashable | None) -> Iterator[None]:
        with rewired(own, changes):
            yield
        if settings is None:
            return
        if settings_of(changes) == settings:
            self._tried.add(settings)
        else:
            self._refuse_to_hand_over()

    def _refuse_to_hand_over(self) -> None:
        if self.session.hands_over:
            raise FeedsBackError("what the pipeline put into the denoiser keeps a state that other stages do not have")

    def _put_back_state(self) -> None:
        """When the steps before the checkpoint have been skipped; the pipeline has put in the same by then."""
        if not self.saved or self.session.is_skipping:
            return
        for component, states in self.saved.items():
            put_back(self.session.own_modules.get(component), states)
        self.saved = {}

    def snapshot(self) -> Any:
        """The state of each component's changes; None where none can have any."""
        denoisers, own_modules = self.session.stage.layout.denoisers, self.session.own_modules
        states = {name: copied(kept_state(own_modules[name])) for name in denoisers if name in own_modules}
        return {name: state for name, state in states.items() if state is not None} or None

    def end(self) -> None:
        """What was put into shared modules is out of them after each forward."""

    def summary(self) -> Summary | None:
        """The number of changes, by component."""
        return Summary(dict(self.rewired)) if self.rewired else None


REWIRING = Feature("rewiring", wanted, Rewiring, is_asked_for=False)
