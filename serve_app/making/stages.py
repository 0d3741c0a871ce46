"""The handles of the three stages, and what every call of them carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ray.serve.handle import DeploymentHandle

from deployments.messages import Envelope
from serve_app.making.follower import Follower


@dataclass
class Stages:
    """The handles of the three stages; with fewer deployments than stages, some are the same."""

    encoder: DeploymentHandle
    denoiser: DeploymentHandle
    vae: DeploymentHandle
    owner: str = ""  # the Ray actor of this process, without which the denoiser does not go on
    take_refused: Callable[[], int] = lambda: 0  # requests refused since the last call, told with the next
    complete_hand_off: bool = field(default=False, init=False)  # learned: see HandOffIncompleteError

    def deployments(self) -> dict[str, DeploymentHandle]:
        """The handles by the name of their deployment, each once."""
        return {handle.deployment_name: handle for handle in (self.encoder, self.denoiser, self.vae)}

    def envelope(self, follower: Follower) -> Envelope:
        """How a request of `follower` is to be followed by the stages."""
        return Envelope(
            owner=self.owner,
            report_progress=follower.wants_progress,
            previews=follower.previews,
            complete_hand_off=self.complete_hand_off,
            refused_before=self.take_refused(),
        )
