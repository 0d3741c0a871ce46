"""What a pipeline returned becomes sound: samples of each channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deployments.errors import GenerationFailedError, NotNumbersError, PipelineFailedError
from deployments.media.files import Samples
from deployments.media.pixels import as_tensor, described

MOST_CHANNELS = 2


def to_tracks(audio: Any) -> list[Samples]:
    """The sounds of a tensor, an array or a list of them: [B, channels, time], [B, time], [channels, time] or [time].

    Two rows of samples are the channels of one sound, more are sounds of one channel. Values outside -1..1 are clipped.
    Raises NotNumbersError for values that are not finite, PipelineFailedError for a sound of no length, which arguments
    can ask for, GenerationFailedError for what is no sound.
    """
    if isinstance(audio, list | tuple):
        return [track for each in audio for track in to_tracks(each)]
    waves = _waves(audio)
    if not torch.isfinite(waves).all():
        raise NotNumbersError("the model made sound with values that are not numbers (NaN or infinite)")
    if waves.ndim == 2:
        waves = waves[None] if len(waves) <= MOST_CHANNELS else waves[:, None]
    tracks = waves.reshape(-1, *waves.shape[-2:]).clamp(-1, 1)
    if tracks.shape[1] > MOST_CHANNELS:
        raise GenerationFailedError(f"sound has one or two channels, the model made {tracks.shape[1]}")
    return [np.ascontiguousarray(track) for track in tracks.numpy()]


def _waves(audio: Any) -> torch.Tensor:
    """With the time as the last axis, and at least one before it."""
    if not isinstance(audio, np.ndarray | torch.Tensor):
        raise GenerationFailedError(f"cannot write {described(audio)} as sound")
    waves = as_tensor(audio).float().cpu()
    if not waves.numel():
        raise PipelineFailedError("it makes a sound of no length")
    if waves.ndim < 2:
        return waves.reshape(1, -1)
    is_time_first = waves.shape[-1] <= MOST_CHANNELS < waves.shape[-2]
    return waves.movedim(-1, -2) if is_time_first else waves
