"""What a walk through a pipeline finds: bytes of weights by precision, peaks of activations by call. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from deployments.messages import StageName

Scheme = Literal[
    "fp32", "bf16", "fp16", "fp8", "fp8_dynamic", "int8", "int8_dynamic", "nf4", "layerwise", "gguf_q8", "gguf_q4"
]
PLAIN: tuple[Scheme, ...] = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Component:
    """A model of the pipeline. All sizes are bytes.

    `loaded` is what it takes in the dtype that it is loaded in, `weights` in each precision; `halves` has what the
    encoder and the decoder of an autoencoder take of `loaded`. A quantised layer is unpacked to `largest_layer` for its
    matrix product; group offload holds `largest_block` twice, and what is `outside_blocks`. `stored` is the size of its
    files, where these are known. Of a denoiser `ways` has the numbers of ranks that each way of `parallel` can have,
    and `tensor_bytes` is what `tensor` splits of `loaded`.
    """

    name: str
    class_name: str
    stages: tuple[StageName, ...]
    dtype: str
    loaded: int
    weights: dict[Scheme, int]
    largest_layer: int = 0
    largest_block: int = 0
    outside_blocks: int = 0
    halves: dict[str, int] = field(default_factory=dict)
    stored: int | None = None
    stored_dtype: str | None = None
    is_quantised: bool = False  # as it is stored: no other precision can be chosen
    ways: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensor_bytes: int = 0

    @property
    def is_denoiser(self) -> bool:
        return self.stages == ("denoiser",)


@dataclass(frozen=True)
class Call:
    """A call of a model that the pipeline makes for one sample; `peak` is the largest sum of bytes that live at once
    beside the weights, `tiled` the same where the decoder works in tiles (None: it cannot)."""

    component: str
    method: str
    stage: StageName
    peak: int
    tiled: int | None = None


@dataclass(frozen=True)
class Measured:
    """The walk through one checkpoint. `problem`: why nothing could be told; `notes`: what could not, in sentences."""

    model: str
    pipeline_class: str = ""
    request: dict[str, str] = field(default_factory=dict)  # its arguments in words
    width: int = 0  # pixels
    height: int = 0
    num_frames: int = 1
    components: tuple[Component, ...] = ()
    calls: tuple[Call, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""

    def peak(self, stage: StageName, tiled: bool = False) -> int:
        """Bytes of activations of the stage's hungriest call, for one sample."""
        calls = [call for call in self.calls if call.stage == stage]
        return max((call.tiled if tiled and call.tiled is not None else call.peak for call in calls), default=0)

    @property
    def can_tile(self) -> bool:
        return any(call.stage == "vae" and call.tiled is not None and call.tiled < call.peak for call in self.calls)
