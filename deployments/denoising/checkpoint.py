"""Checkpoints of a denoising loop, and the session that writes them and goes on from one, bit for bit.

The save point is the first forward of an iteration. To resume, the same `__call__` runs from the top:
forwards before the first step of a round run for real (they may fill caches), and so do those that left something
behind, in a cache that they were given or as an object that they made. The other skipped forwards answer NaN;
skipped scheduler steps run for real on NaN, so that counters and random draws advance, and hand out the saved outputs
at the end of each round; after the last skipped step, schedulers, guiders and generators are restored. If anything
computed from NaN were used, the result would be NaN, and the request starts again.

The loop itself only takes copies on the device. Another thread fetches, packs and digests them while it goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deployments.errors import CannotResumeError, NotNumbersError
from deployments.messages import Checkpoint, GenerationRequest, Packed
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, HandOff, Result
from deployments.tensors.copies import Moment, beside_forwards, queued_so_far, wait_until
from deployments.tensors.packing import can_pack, pack, unpack
from deployments.tensors.values import PORTABLE, copied, fill, has_nan, leaves
from deployments.tensors.watched import Watched

FORMAT = 5  # raised when what a checkpoint holds changes
SHARE_OF_TIME = 0.01  # that checkpoints may take
FIRST_AFTER_S = 0.2  # what the first one costs is not known before: 2 ms are taken for it
SAVED = {  # what a checkpoint holds
    *("steps", "rounds", "counts", "outputs", "schedulers", "guiders"),
    *("generators", "descriptions", "forwards", "left_behind", "features"),
}
NOT_SAVED = ("_internal_dict", "_session")

Round = tuple[int, int]  # (ordinal of the scheduler object, number of its set_timesteps call)


@dataclass(frozen=True)
class Snapshot:
    """Where a loop stands: copies, for another thread to make a checkpoint of."""

    step: int
    content: dict[str, Any]
    device: torch.device
    moment: Moment  # at which the device has made the copies
    seconds: float  # that the loop stood still for it

    def packed(self) -> Packed:
        with beside_forwards(self.device, self.moment):
            return pack(self.content)

    def wait(self) -> None:
        """Until the device has made it: forwards that were queued before it are no cost of the checkpoint."""
        wait_until(self.moment)


class CheckpointInterval:
    """Steps between two checkpoints: as given, or as few as keep their cost below SHARE_OF_TIME.

    Those as given are all made. Otherwise none is due while the last is on its way.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._steps = every or 1
        self._is_known = every is not None
        self._is_on_its_way = False
        self._started = time.perf_counter()

    def is_due(self, steps_since_last: int) -> bool:
        if self.every is None and self._is_on_its_way:
            return False
        if not self._is_known and time.perf_counter() - self._started < FIRST_AFTER_S:
            return False
        return steps_since_last >= self._steps

    def begin(self) -> None:
        """A checkpoint is on its way; `note` says that it has left."""
        self._is_on_its_way = True

    def note(self, checkpoint_seconds: float, steps_done: int) -> None:
        self._is_known, self._is_on_its_way = True, False
        if self.every is None and steps_done:
            step_seconds = (time.perf_counter() - self._started) / steps_done
            self._steps = max(1, math.ceil(checkpoint_seconds / (SHARE_OF_TIME * max(step_seconds, 1e-6))))


class ResumableSession(DenoiseSession):
    """A DenoiseSession that emits checkpoints and may start from one.

    `on_checkpoint` is given snapshots, and tells `interval` when each has left; `resume_from` is the content of a
    checkpoint; `feature_states` gives what the request's features keep, by name, or None where no checkpoint can be
    made of it; `saved_features` gives it back after a resume.
    """

    def __init__(
        self,
        *args: Any,
        on_checkpoint: Callable[[Snapshot], None] | None = None,
        every: int | None = None,
        resume_from: Packed | None = None,
        feature_states: Callable[[], dict[str, Any] | None] = dict,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.on_checkpoint = on_checkpoint
        self.feature_states = feature_states
        self.interval = CheckpointInterval(every)
        self.saved = _unpacked(resume_from, self.stage.device) if resume_from else None
        self.resumed_at = self.saved["steps"] if self.saved else 0
        self._last_checkpoint = self.resumed_at
        self._stepped: list[Any] = []  # scheduler objects in the order of their first step
        self._counts: dict[Round, int] = {}  # steps of each round
        # Outputs of each round's steps since its last forward: (number of the first, outputs, generators after).
        self._outputs: dict[Round, tuple[int, list[Any], Any]] = {}
        self._rounds_since_forward: set[Round] = set()
        self._skipped_forwards = 0
        self._left_behind: list[bool] = []  # of each forward: whether later ones may need what it wrote or made
        self._counted: list[Any] = []  # containers of which the last forward changed plain values
        self._round_is_fresh = True
        self._generators_after_step: Any = None
        self._is_restored = False

    @property
    def saved_features(self) -> dict[str, Any]:
        return self.saved["features"] if self.saved else {}

    @property
    def is_resuming(self) -> bool:
        """Whether it is still on its way to the step of the checkpoint that it goes on from."""
        return self.saved is not None and not self._is_restored

    @property
    def is_skipping(self) -> bool:
        return self.saved is not None and self.steps_done < self.saved["steps"]

    def run(self) -> HandOff | Result:
        """As DenoiseSession's; raises CannotResumeError where numbers are missing after a resume."""
        try:
            return super().run()
        except NotNumbersError as error:
            if self.saved is None:
                raise
            raise CannotResumeError("after the skipped steps it made values that are not numbers") from error

    def forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        is_first, self._rounds_since_forward = bool(self._rounds_since_forward), set()  # of an iteration
        watched = Watched((args, kwargs))
        if self._left_behind and watched.contains(self._counted):
            self._left_behind[-1] = True
        if self.is_skipping:
            assert self.saved is not None
            index = self._skipped_forwards
            self._skipped_forwards += 1
            if not self._round_is_fresh and not self.saved["left_behind"][index]:
                self._left_behind.append(False)
                return fill(self.saved["descriptions"][self.saved["forwards"][index]], self.stage.device)
            if has_nan((args, kwargs)):
                raise CannotResumeError(f"{component} left something behind that the skipped steps lead to")
        elif is_first and self._is_checkpoint_due():
            self._save()
        output = super().forward(component, real, args, kwargs)
        makes_objects = any(not isinstance(leaf, PORTABLE) for leaf in leaves(output))
        self._left_behind.append(makes_objects or watched.is_written())
        self._counted = watched.counted()
        return output

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        watched = Watched((args, kwargs)) if self.is_skipping else None
        output = super().on_denoiser_method(component, method, function, args, kwargs)
        if watched and watched.is_written() and has_nan((args, kwargs)):
            raise CannotResumeError(f"{component}.{method} left something behind that the skipped steps lead to")
        return output

    def on_round(self, scheduler: Any) -> None:
        scheduler.__dict__["_round"] = scheduler.__dict__.get("_round", 0) + 1
        self._round_is_fresh = True

    def on_scheduler_step(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._round_is_fresh = False
        round_ = (self._ordinal(scheduler), scheduler.__dict__.get("_round", 0))
        self._counts[round_] = self._counts.get(round_, 0) + 1
        if self.is_skipping:
            return self._skip_step(round_, step, args, kwargs)
        output = super().on_scheduler_step(scheduler, step, args, kwargs)
        self._generators_after_step = self.random_states()
        if round_ not in self._rounds_since_forward:
            self._outputs[round_] = (self._counts[round_], [], None)
            self._rounds_since_forward.add(round_)
        first, outputs, _ = self._outputs[round_]
        kept = copied(output)  # the pipeline may go on with it in place
        self._outputs[round_] = (first, [*outputs, kept], self._generators_after_step)
        return output

    def _skip_step(self, round_: Round, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self.saved is not None
        self.steps_done += 1
        output, failure = None, None
        try:
            output = step(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (on NaN; what it would return may be saved)
            failure = error
        first, outputs, generators = self.saved["outputs"][self.saved["rounds"].index(round_)]
        count = self._counts[round_]
        if count >= first:
            output = copied(outputs[count - first])
        elif failure is not None:
            raise failure
        if count == self.saved["counts"][self.saved["rounds"].index(round_)] and generators is not None:
            self.set_random_states(generators)  # the end of a round: what its steps drew counts
        if self.steps_done == self.saved["steps"]:
            self._restore()
        self._rounds_since_forward.add(round_)
        return output

    def _restore(self) -> None:
        assert self.saved is not None
        for target, state in zip(self._stepped, self.saved["schedulers"], strict=True):
            target.__dict__.update(copied(state))
        for target, state in zip(self.guiders, self.saved["guiders"], strict=True):
            target.__dict__.update(copied(state))
        self.set_random_states(self.saved["generators"])
        # What a further checkpoint needs of the rounds before this process took over.
        for round_, count, outputs in zip(
            self.saved["rounds"], self.saved["counts"], self.saved["outputs"], strict=True
        ):
            self._counts[round_] = count
            self._outputs[round_] = outputs
        self._generators_after_step = self.saved["generators"]
        self._is_restored = True

    def _is_checkpoint_due(self) -> bool:
        since = self.steps_done - self._last_checkpoint
        return self.on_checkpoint is not None and since > 0 and self.interval.is_due(since)

    def _save(self) -> None:
        assert self.on_checkpoint is not None
        started = time.perf_counter()
        self._last_checkpoint = self.steps_done
        features = self.feature_states()
        if features is None:
            return
        rounds = list(self._counts)
        forwards = [e[2] for e in self.hand_off.events if e[0] == "denoiser" and "." not in e[1]]
        content = {
            "steps": self.steps_done,
            "rounds": rounds,
            "counts": [self._counts[r] for r in rounds],
            "outputs": [self._outputs[r] for r in rounds],
            "schedulers": [_portable_state(s) for s in self._stepped],
            "guiders": [_portable_state(g) for g in self.guiders],
            "generators": self._generators_after_step,
            "descriptions": list(self.hand_off.descriptions),
            "forwards": forwards,
            "left_behind": list(self._left_behind),
            "features": features,
        }
        self.interval.begin()
        device = self.stage.device
        moment = queued_so_far(device)
        self.on_checkpoint(Snapshot(self.steps_done, content, device, moment, time.perf_counter() - started))

    def _ordinal(self, scheduler: Any) -> int:
        for index, known in enumerate(self._stepped):
            if known is scheduler:
                return index
        self._stepped.append(scheduler)
        return len(self._stepped) - 1


def _portable_state(owner: Any) -> dict[str, Any]:
    """A copy of the attributes that can be packed; the others (noise samplers) are rebuilt by the object itself."""
    return {name: copied(value) for name, value in vars(owner).items() if name not in NOT_SAVED and can_pack(value)}


def _unpacked(content: Packed, device: torch.device) -> dict[str, Any]:
    """Raises CannotResumeError: the digest was right, but this version does not read what was written."""
    try:
        saved: dict[str, Any] = unpack(content, device)
        missing = SAVED - saved.keys()
    except Exception as error:
        raise CannotResumeError(f"the checkpoint cannot be read: {error}") from error
    if missing:
        raise CannotResumeError(f"the checkpoint lacks {', '.join(sorted(missing))}")
    return saved


def make_checkpoint(request: GenerationRequest, fingerprint: str, step: int, content: Packed) -> Checkpoint:
    return Checkpoint(request.request_id, step, fingerprint, digest(content), content)


def check_checkpoint(checkpoint: Checkpoint, fingerprint: str) -> Packed:
    """The content; raises CannotResumeError for a damaged checkpoint or one of another model or request."""
    if digest(checkpoint.content) != checkpoint.digest:
        raise CannotResumeError("the checkpoint is damaged: its digest is not that of its content")
    if checkpoint.fingerprint != fingerprint:
        raise CannotResumeError("the checkpoint was made by another model, version or request, or with other settings")
    return checkpoint.content


def digest(content: Packed) -> str:
    """SHA-256 of the structure and the bytes."""
    sha = hashlib.sha256(json.dumps(content.tree).encode())
    for buffer in content.buffers:
        sha.update(len(buffer).to_bytes(8, "little"))
        sha.update(buffer.data)
    return sha.hexdigest()
