"""Sound that callers send, read into samples: within limits, and without letting the file choose what is opened."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt

from deployments.errors import InvalidRequestError

# By the first bytes of a file, FFmpeg's name of its format: its own guess would also open play lists.
CONTAINERS = (
    (re.compile(rb"RIFF....WAVE", re.DOTALL), "wav"),
    (re.compile(rb"fLaC"), "flac"),
    (re.compile(rb"OggS"), "ogg"),
    (re.compile(rb"....ftyp", re.DOTALL), "mp4"),
    (re.compile(rb"\x1aE\xdf\xa3"), "matroska"),
    (re.compile(rb"ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]"), "mp3"),  # layer III of MPEG 1, 2 and 2.5
)
CODECS = re.compile(r"pcm_(u8|[sf](16|24|32|64)(le|be)|mulaw|alaw)|flac|mp3(float)?|vorbis|(lib)?opus|aac|alac")
SOUND_FILE = "a WAV, FLAC, MP3, Ogg, M4A or WebM file"
MAX_CHANNELS = 8
MAX_RATE = 384_000  # samples per second
LAYOUTS = {1: "mono", 2: "stereo"}

Samples = npt.NDArray[np.float32]  # [channels, time] in -1..1


@dataclass(frozen=True)
class Sound:
    """What was read: `rate` samples per second of each channel."""

    samples: Samples
    rate: int


def sound_container(data: bytes) -> str | None:
    """FFmpeg's name of the file's format; None if it is none that is read here."""
    return next((name for signature, name in CONTAINERS if signature.match(data)), None)


def check_sound(data: bytes, param: str, max_s: float) -> float:
    """Reads the file to its end, keeps nothing and returns its seconds. Raises InvalidRequestError as `read_sound`."""
    return float(sum(part.shape[1] / rate for part, rate in _read(data, param, max_s, None, None)))


def read_sound(data: bytes, param: str, max_s: float, rate: int | None = None, channels: int | None = None) -> Sound:
    """The file's first sound, in mono or stereo, resampled to `rate`; None: its own rate and channels.

    Raises InvalidRequestError, naming `param`, for what cannot be read to its end and for more than `max_s` seconds.
    """
    parts = list(_read(data, param, max_s, rate, channels))
    return Sound(np.concatenate([part for part, _ in parts], axis=1), parts[0][1])


def _read(
    data: bytes, param: str, max_s: float, rate: int | None, channels: int | None
) -> Iterator[tuple[Samples, int]]:
    length_s, is_empty = 0.0, True
    try:
        with av.open(io.BytesIO(data), "r", format=sound_container(data) or "wav") as file:
            [stream, *_] = file.streams.audio
            context = stream.codec_context
            if context is None or not CODECS.fullmatch(context.name):
                raise ValueError("of no codec that is read here")
            if context.rate > MAX_RATE or context.channels > MAX_CHANNELS:
                raise ValueError(f"{context.channels} channels at {context.rate} Hz")
            context.thread_count = 1
            layout = LAYOUTS[channels or min(context.channels, 2)]
            resampler = av.AudioResampler("fltp", layout, rate or context.rate)
            for frame in _frames(file, stream):
                if frame is not None:
                    length_s += frame.samples / frame.sample_rate
                if length_s > max_s:
                    raise _too_long(param, max_s)
                for made in resampler.resample(frame):
                    is_empty = is_empty and not made.samples
                    yield made.to_ndarray().astype(np.float32, copy=False), made.sample_rate
    except (av.FFmpegError, ValueError, OSError, EOFError, LookupError) as error:
        raise _unreadable(param) from error
    if is_empty:
        raise _unreadable(param)


def _frames(file: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame | None]:
    """None ends them: the resampler gives out what it has kept."""
    yield from file.decode(stream)
    yield None


def _unreadable(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} must be {SOUND_FILE}, complete; it cannot be read as one", param)


def _too_long(param: str, max_s: float) -> InvalidRequestError:
    return InvalidRequestError(f"{param}: at most {max_s:g} seconds of sound", param, "limit_exceeded")
