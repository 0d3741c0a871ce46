"""The handles of the three stages, what every call of them carries, and what was learned of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ray.serve.handle import DeploymentHandle

from deployments.messages import Envelope, GenerationRequest
from serve_app.making.follower import Follower
from serve_app.making.suspects import Suspects, Suspicion

MOST_KINDS = 1000  # of requests that are remembered

RequestKind = tuple[str, ...]  # what is made, and the names of its arguments


@dataclass
class Stages:
    """The handles of the three stages; with fewer deployments than stages, some are the same."""

    encoder: DeploymentHandle
    denoiser: DeploymentHandle
    vae: DeploymentHandle
    owner: str = ""  # the Ray actor of this process, without which the denoiser does not go on
    take_refused: Callable[[], int] = lambda: 0  # requests refused since the last call: the encoder is told
    suspects: Suspects = field(default_factory=Suspects, init=False)
    _completely: set[RequestKind] = field(default_factory=set, init=False)

    def deployments(self) -> dict[str, DeploymentHandle]:
        """The handles by the name of their deployment, each once."""
        return {handle.deployment_name: handle for handle in (self.encoder, self.denoiser, self.vae)}

    def envelope(self, follower: Follower, suspicion: Suspicion, complete_hand_off: bool) -> Envelope:
        """How a request of `follower` is to be followed by the stages."""
        return Envelope(
            owner=self.owner,
            report_progress=follower.wants_progress or suspicion.tried_until is not None,
            previews=follower.previews,
            complete_hand_off=complete_hand_off,
            tried_until=suspicion.tried_until,
        )

    def needs_complete_hand_off(self, request: GenerationRequest) -> bool:
        """Whether one of its kind has succeeded only with the complete hand-off (see HandOffIncompleteError)."""
        return kind_of(request) in self._completely

    def note_complete_hand_off(self, request: GenerationRequest) -> None:
        """It has succeeded with the complete hand-off, and without it had failed."""
        if len(self._completely) < MOST_KINDS:
            self._completely.add(kind_of(request))


def kind_of(request: GenerationRequest) -> RequestKind:
    """Requests of one kind take the same way through the pipeline's code."""
    return (request.output.kind, *sorted(request.arguments))
