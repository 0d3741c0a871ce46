"""The pipeline's own call, walked through without weights: each model's call is made on the meta device and counted."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch

from deployments.memory.activations import peak_of
from deployments.plan.measured import Call
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.component import function_of
from deployments.stage_pipeline.sessions.denoise import stage_of_call
from deployments.stage_pipeline.sessions.session import PIPELINE, Session
from deployments.tensors.values import (
    MissingTensor,
    Opaque,
    describe,
    fill_meta,
    leaves,
    map_values,
    shape_key,
    to_meta,
)

logger = logging.getLogger(__name__)

LATENT_DIMS = 4  # batch, channels, height, width; of a video, frames before the height
READ_BY_ENCODERS = frozenset({"input_ids", "attention_mask", "output_hidden_states", "return_dict", "use_cache"})


class WalkSession(Session):
    """Encoders and denoisers return zeros of the right shape; what decoders return has no numbers.

    Of a stage that holds no component: its pipeline consists of skeletons.
    """

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any]) -> None:
        super().__init__(stage, arguments, seed=0)
        self.calls: list[Call] = []
        self._returned: dict[str, Any] = {}  # descriptions, by the call and its inputs' shapes
        self._has_decoded = False

    def run(self) -> list[Call]:
        """The calls that were made, each kind once. Raises what the pipeline raises before it decodes anything."""
        try:
            self.call_pipeline()
        except Exception:
            if not self._has_decoded:
                raise
        return self.calls

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        return zeros(self._walked(component, "forward", args, kwargs))

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        return zeros(self._walked(component, method, args, kwargs))

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if component.startswith(PIPELINE):
            return function(*args, **kwargs)  # the models that it asks are routed themselves
        description = self._walked(component, method, args, kwargs)
        if stage_of_call(self.stage, component, method) == "vae":
            self._has_decoded = True
            return fill_meta(description)
        return zeros(description)

    def _walked(self, component: str, method: str, args: Any, kwargs: Any) -> Any:
        key = f"{component}.{method}{shape_key((args, kwargs))}"
        if key not in self._returned:
            peak, self._returned[key] = self._made_on_meta(component, method, args, kwargs)
            stage = (
                "denoiser" if component in self.stage.layout.denoisers else stage_of_call(self.stage, component, method)
            )
            call = Call(component, method, stage, peak)
            if stage == "vae":
                call = replace(call, tiled=self._peak_in_tiles(component, method, args, kwargs, self._returned[key]))
            self.calls.append(call)
        return self._returned[key]

    def _made_on_meta(self, component: str, method: str, args: Any, kwargs: Any) -> tuple[int, Any]:
        skeleton: Any = getattr(self.stage.pipeline, component)
        try:
            return counted(skeleton.meta_twin(False), method, args, kwargs)
        except Exception as error:  # of whatever kind a model raises where it asks for numbers
            logger.debug("%s.%s: %r", component, method, error)
            words = {name: value for name, value in kwargs.items() if name in READ_BY_ENCODERS}
            if words == kwargs or "input_ids" not in words:
                raise
            # Towers for pictures ask for numbers: the words alone hold a place for each piece of the pictures.
            return counted(skeleton.meta_twin(False), method, args, words)

    def _peak_in_tiles(self, component: str, method: str, args: Any, kwargs: Any, output: Any) -> int | None:
        """`output` describes that of the call. None where it has no tiles, or cannot join them without numbers."""
        twin = getattr(self.stage.pipeline, component).meta_twin(False)
        if not callable(getattr(twin, "enable_tiling", None)):
            return None
        try:
            twin.enable_tiling()
            return peak_in_tiles(twin, method, to_meta((args, kwargs)), output)
        except Exception as error:  # noqa: BLE001  (of whatever kind a model raises where it asks for numbers)
            logger.debug("%s.%s in tiles: %r", component, method, error)
            return None
        finally:
            twin.disable_tiling()


def peak_in_tiles(twin: Any, method: str, given: Any, output: Any) -> int:
    """Told from two tiles and the size of the output: a long video has hundreds, each as slow to walk as all at once.

    The tiles' outputs are held until all are there, and again when they are put together.
    """
    part = with_two_tiles(given, tile_of(twin))
    peak, made = counted(twin, method, *part)
    return peak + 2 * (described_bytes(output) - described_bytes(made))


def tile_of(twin: Any) -> int | None:
    """Height and width of a tile in latents, as the autoencoders of diffusers name it; None: not known."""
    for name in ("tile_latent_min_height", "tile_latent_min_size"):
        if isinstance(size := getattr(twin, name, None), int):
            return size
    ratio = getattr(twin, "spatial_compression_ratio", None)
    size = getattr(twin, "tile_sample_min_height", None)
    return size // ratio if isinstance(size, int) and isinstance(ratio, int) and ratio else None


def with_two_tiles(given: Any, tile: int | None) -> Any:
    """Latents of the width of one tile and a higher one; as they are where a tile's size is not known."""

    def leaf(value: Any) -> Any:
        if tile is None or not (isinstance(value, torch.Tensor) and value.ndim >= LATENT_DIMS):
            return value
        return value[..., : tile + tile // 4, :tile].contiguous()

    return map_values(leaf, given)


def described_bytes(description: Any) -> int:
    missing = [leaf for leaf in leaves(description) if isinstance(leaf, MissingTensor)]
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in missing)


def counted(twin: torch.nn.Module, method: str, args: Any, kwargs: Any) -> tuple[int, Any]:
    function, given = function_of(twin, method), to_meta((args, kwargs))
    peak, returned = peak_of(lambda: function(*given[0], **given[1]), [*twin.parameters(), *twin.buffers()])
    return peak, describe(returned)


def zeros(description: Any) -> Any:
    """A tree of the described shapes on the CPU; memory of zeros is taken only where it is written."""

    def leaf(value: Any) -> Any:
        if isinstance(value, MissingTensor):
            return torch.zeros(value.shape, dtype=value.dtype)
        if isinstance(value, torch.Tensor):
            return torch.zeros(value.shape, dtype=value.dtype)
        return None if isinstance(value, Opaque) else value

    return map_values(leaf, description)
