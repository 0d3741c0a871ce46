"""The features that one request uses, taken together."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from deployments.adapters.held import Adapters
from deployments.denoising.checkpoint import ResumableSession
from deployments.engine.forward import Surround
from deployments.errors import InvalidRequestError
from deployments.features.feature import NOTHING, Feature, FeatureInUse, Summary, Surrounding
from deployments.messages import GenerationRequest, RequestWarning
from deployments.tensors.packing import tensor_bytes
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

Wanted = list[tuple[Feature, Any]]  # each with what its `wanted` returned


def wanted_features(features: Sequence[Feature], env: EnvConfig, request: GenerationRequest) -> Wanted:
    """Raises InvalidRequestError for a feature that there is not, or one that cannot be had as asked."""
    names = [feature.name for feature in features if feature.is_asked_for]
    for name in request.features:
        if name not in names:
            known = f"known are {', '.join(names)}" if names else "there are none here"
            raise InvalidRequestError(f"unknown feature {name!r}; {known}", param=name)
    asked = [(feature, feature.wanted(env, request.features.get(feature.name))) for feature in features]
    return [(feature, options) for feature, options in asked if options is not None]


def fetch_features(
    wanted: Wanted, adapters: Adapters | None, request: GenerationRequest
) -> tuple[Wanted, str, GenerationRequest]:
    """What `begin_features` gets, what of it belongs into the request's fingerprint, and the request that says what was
    found; raises what a feature does."""
    fetched = [(feature, feature.fetch(adapters, options)) for feature, options in wanted]
    fingerprints = [f"{feature.name}:{each.fingerprint}" for feature, each in fetched if each.fingerprint]
    entries = {feature.name: each.entry for feature, each in fetched if each.entry is not None}
    found = replace(request, features=request.features | entries) if entries else request
    return [(feature, each.options) for feature, each in fetched], "|".join(fingerprints), found


LEFT_OUT = "left out"  # in place of a cache that was too large for a checkpoint


class FeaturesInUse:
    """What the features of one request do, in the order of their rows.

    `caches` are the names of those that may go on without their snapshot, `warnings` what a resume has changed.
    """

    def __init__(
        self,
        in_use: Mapping[str, FeatureInUse],
        caches: Collection[str] = (),
        warnings: tuple[RequestWarning, ...] = (),
    ) -> None:
        self.in_use = dict(in_use)
        self.caches = caches
        self.warnings = warnings

    def surround(self, component: str, module: Any) -> Surrounding:
        """All surroundings of the forward that comes next as one; it may share a batch if each of them allows it."""
        if not self.in_use:
            return NOTHING
        each = [(name, feature.surround(component, module)) for name, feature in self.in_use.items()]
        keys = tuple((name, a.merge_key) for name, a in each if a.enter is not None or a.merge_key != NOTHING.merge_key)
        merge_key = None if any(key is None for _, key in keys) else keys
        entered = [around.enter for _, around in each if around.enter is not None]
        by_position = any(around.by_position for _, around in each)
        per_sample = [around.per_sample for _, around in each if around.per_sample is not None]
        if len(per_sample) > 1:
            names = [name for name, around in each if around.per_sample is not None]
            raise ValueError(f"only one feature may tell the samples of a batch apart, not {', '.join(names)}")
        return Surrounding(_entered_in_turn(entered), merge_key, by_position, per_sample[0] if per_sample else None)

    def snapshot(self, max_cache_bytes: int | None = None, must_be_whole: bool = False) -> dict[str, Any] | None:
        """By feature, without those that have nothing to keep; LEFT_OUT for caches of more than `max_cache_bytes`
        (None: no bound).

        `must_be_whole`: None where one would be left out.
        """
        states = {name: feature.snapshot() for name, feature in self.in_use.items()}
        kept = {name: state for name, state in states.items() if state is not None}
        if max_cache_bytes is not None:
            for name in [name for name in kept if name in self.caches and tensor_bytes(kept[name]) > max_cache_bytes]:
                if must_be_whole:
                    return None
                kept[name] = LEFT_OUT
        return kept

    def end(self) -> None:
        """The request has ended; each lets go of what it holds, whatever another one raises."""
        with ExitStack() as stack:
            for feature in self.in_use.values():
                stack.callback(feature.end)

    def summaries(self) -> dict[str, Summary]:
        """By feature, without those that have nothing to say, or fail to: the request has ended anyway."""
        summaries = {}
        for name, feature in self.in_use.items():
            try:
                summary = feature.summary()
            except Exception:
                logger.exception("the feature %s has no summary of a request", name)
                continue
            if summary is not None:
                summaries[name] = summary
        return summaries


@torch.no_grad()
def begin_features(wanted: Wanted, session: ResumableSession) -> FeaturesInUse:
    saved = dict(session.saved_features)
    lost = [name for name, state in saved.items() if isinstance(state, str) and state == LEFT_OUT]
    for name in lost:
        del saved[name]
    in_use = FeaturesInUse(
        {},
        caches={feature.name for feature, _ in wanted if feature.is_a_cache},
        warnings=tuple(_warmed_up_again(name, session.resumed_at) for name in lost),
    )
    try:
        for feature, options in wanted:
            in_use.in_use[feature.name] = feature.begin(options, session, saved.get(feature.name))
    except BaseException:
        in_use.end()
        raise
    return in_use


def _warmed_up_again(name: str, step: int) -> RequestWarning:
    return RequestWarning(
        "cache_lost",
        name,
        f"it was interrupted and went on after step {step} without what {name} had kept, which was too large for a "
        "checkpoint: it warmed up again, and the result is not that of an uninterrupted request bit for bit",
    )


def _entered_in_turn(entered: Sequence[Surround]) -> Surround | None:
    if len(entered) <= 1:
        return entered[0] if entered else None

    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as stack:
            for enter in entered:
                stack.enter_context(enter())
            yield

    return all_of_them
