"""A play of the pipeline: its own call, with numbers drawn from their inputs in place of what large models return.

The denoiser and the decoders are played: a call with the same inputs returns the same numbers, one with any other
input returns others. Encoders are real where they are here, and asked once for the same inputs. So two plays end
alike if and only if what differs between them reaches no model, no scheduler and no code that makes the output,
and a play makes as many scheduler steps as the request would.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import stage_of_call
from deployments.stage_pipeline.sessions.session import Session
from deployments.stage_pipeline.shapes import output_description
from deployments.stage_pipeline.skeleton import meta_twin_maker
from deployments.tensors.global_generators import moved_states
from deployments.tensors.values import PLAIN, MissingTensor, Opaque, copied, map_values, parts
from deployments.weights.precision.computing import dtype_computed_in


@dataclass(frozen=True)
class Played:
    """How a play ended: equal where the same came out."""

    output: str  # SHA-256
    num_steps: int = field(compare=False)  # scheduler steps that were made


class PlaySession(Session):
    """One play. `encoded` keeps what real encoders returned, for all plays of a question."""

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any], encoded: dict[str, Any]) -> None:
        super().__init__(stage, arguments, seed=0)
        self.encoded = encoded
        self._digests: dict[int, tuple[torch.Tensor, int, bytes]] = {}  # of what every step is given again

    def run(self) -> Played:
        """Raises what the pipeline raises for such arguments."""
        output = self.call_pipeline()
        return Played(self._digest(dict(output) if hasattr(output, "keys") else output), self.steps_done)

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        return self._played(component, "forward", args, kwargs)

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        return self._played(component, method, args, kwargs)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self.call_inside(component, function, args, kwargs)
        if component in self.stage.layout.models and not self._is_real(component, method):
            return self._played(component, method, args, kwargs)
        key = self._digest([component, method, args, kwargs])
        if key in self.encoded and not self.hooks.active:
            return copied(self.encoded[key])
        before = self.random_states()
        output = self.call_inside(component, function, args, kwargs)
        after = self.random_states()
        if torch.equal(before[0], after[0]) and not moved_states(before[1], after[1]):
            self.encoded[key] = copied(output)
        return output

    def _is_real(self, component: str, method: str) -> bool:
        decodes = stage_of_call(self.stage, component, method) == "vae" and component in self.stage.layout.autoencoders
        return self.stage.is_here(component) and not decodes

    def _played(self, component: str, method: str, args: Any, kwargs: Any) -> Any:
        twin, own = _with_twin(self.stage, component), self.own_component(component)
        with self.waiting():  # a large model is walked through once for each shape: others may go on meanwhile
            description = output_description(self.stage, twin, component, method, args, kwargs, own)
        seed = int(self._digest([component, method, args, kwargs])[:12], 16)
        return drawn(description, seed, self.stage.device)

    def _digest(self, value: Any) -> str:
        return content_digest(value, self._tensor_digest)

    def _tensor_digest(self, tensor: torch.Tensor) -> bytes:
        known = self._digests.get(id(tensor))
        if known is None or known[1] != tensor._version:
            known = self._digests[id(tensor)] = tensor, tensor._version, tensor_digest(tensor)
        return known[2]


def _with_twin(stage: StagePipeline, component: str) -> Any:
    """What knows the component's twin on the meta device: the skeleton, or for a real one a stand-in."""
    module = getattr(stage.pipeline, component)
    if "meta_twin" in module.__dict__:
        return module
    if component not in stage.twins:
        dtype = dtype_computed_in(module)
        make = meta_twin_maker(module, stage.layout.models[component], stage.layout.folder / component, dtype)
        stage.twins[component] = SimpleNamespace(meta_twin=make)
    return stage.twins[component]


def drawn(description: Any, seed: int, device: torch.device) -> Any:
    """A tree of the described shapes with numbers between -1 and 1 that follow from the seed."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def leaf(value: Any) -> Any:
        if not isinstance(value, MissingTensor):
            return None if isinstance(value, Opaque) else value
        where = device if value.on_stage_device else torch.device("cpu")
        if not value.dtype.is_floating_point:
            return torch.zeros(value.shape, dtype=value.dtype, device=where)
        # A few numbers, repeated: they need not be good noise, and their count is that of a video.
        few = torch.rand(min(math.prod(value.shape), FEW_NUMBERS) or 1, generator=generator) * 2 - 1
        times = -(-math.prod(value.shape) // few.numel())
        numbers = few.repeat(times)[: math.prod(value.shape)]
        return numbers.reshape(value.shape).to(where, value.dtype)

    return map_values(leaf, description)


FEW_NUMBERS = 4099  # a prime, so that rows differ


def drawn_output(stage: StagePipeline, component: str, args: Any, kwargs: Any) -> Any:
    """Numbers in the shape of what the component's forward would return."""
    twin = _with_twin(stage, component)
    return drawn(output_description(stage, twin, component, "forward", args, kwargs), 0, stage.device)


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of its numbers; of one on the meta device, which has none, of its shape alone."""
    sha = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.device.type != "meta":
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)  # of its own: an expanded tensor cannot be seen as bytes
        flat.copy_(tensor.detach().reshape(-1))
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.digest()


def content_digest(value: Any, of_tensor: Callable[[torch.Tensor], bytes] = tensor_digest) -> str:
    """SHA-256 of a tree's numbers, texts and structure; generators and objects of other kinds count by their type."""
    sha = hashlib.sha256()
    _feed(sha, value, of_tensor)
    return sha.hexdigest()


def _feed(sha: Any, value: Any, of_tensor: Callable[[torch.Tensor], bytes]) -> None:
    opened = parts(value)
    if opened is not None:
        names = list(value.keys()) if hasattr(value, "keys") else len(opened[0])
        sha.update(f"{type(value).__name__}{names}(".encode())
        for child in opened[0]:
            _feed(sha, child, of_tensor)
        return
    if isinstance(value, torch.Tensor):
        sha.update(of_tensor(value))
    elif isinstance(value, np.ndarray):
        sha.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        sha.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    else:
        sha.update(f"{type(value).__name__}:{value if isinstance(value, PLAIN) else ''};".encode(errors="replace"))
