"""The handles of the three stages, what every call of them carries, and what was learned of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ray.serve.handle import DeploymentHandle

from deployments import tracing
from deployments.messages import Envelope, GenerationRequest
from deployments.metrics.meter import NO_METER, Meter
from serve_app.making.follower import Follower
from serve_app.making.sleep.model_sleep import ModelSleep
from serve_app.making.suspects import Suspects, Suspicion

MOST_KINDS = 1000  # of requests that are remembered

RequestKind = tuple[str, ...]  # what is made, and the names of its arguments
# From the denoiser to the VAE: the first decoder call, all of them, or (each made in its stage at once) the result.
HandOffWay = Literal["first", "complete", "remote"]


@dataclass
class Stages:
    """The handles of the three stages; with fewer deployments than stages, some are the same."""

    encoder: DeploymentHandle
    denoiser: DeploymentHandle
    vae: DeploymentHandle
    owner: str = ""  # the Ray actor of this process, without which the denoiser does not go on
    take_refused: Callable[[], int] = lambda: 0  # requests refused since the last call: the encoder is told
    meter: Meter = NO_METER  # takes what this process measures
    version: str = ""  # of the model's arguments: replicas of an earlier one may be there during an update
    suspects: Suspects = field(default_factory=Suspects, init=False)
    # Never asleep, until it is told how Serve is asked.
    sleep: ModelSleep = field(default_factory=lambda: ModelSleep({}), init=False)
    _hand_offs: dict[RequestKind, HandOffWay] = field(default_factory=dict, init=False)

    def deployments(self) -> dict[str, DeploymentHandle]:
        """The handles by the name of their deployment, each once."""
        return {handle.deployment_name: handle for handle in (self.encoder, self.denoiser, self.vae)}

    def envelope(self, follower: Follower, suspicion: Suspicion, hand_off: HandOffWay) -> Envelope:
        """How a request of `follower` is to be followed by the stages."""
        return Envelope(
            owner=self.owner,
            report_progress=follower.wants_progress or suspicion.tried_until is not None,
            previews=follower.previews,
            complete_hand_off=hand_off == "complete",
            remote_calls=hand_off == "remote",
            tried_until=suspicion.tried_until,
            trace=tracing.carried(),
        )

    def hand_off_of(self, request: GenerationRequest) -> HandOffWay:
        """The first way on which one of its kind has succeeded; the shortest where that is not known."""
        return self._hand_offs.get(kind_of(request), "first")

    def note_hand_off(self, request: GenerationRequest, hand_off: HandOffWay) -> None:
        """It has succeeded so, and on the shorter ways had failed."""
        if hand_off != "first" and len(self._hand_offs) < MOST_KINDS:
            self._hand_offs[kind_of(request)] = hand_off


def kind_of(request: GenerationRequest) -> RequestKind:
    """Requests of one kind take the same way through the pipeline's code."""
    return (request.output.kind, *sorted(request.arguments))
