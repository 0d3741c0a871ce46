"""The files of one argument: each is read as the picture, the frames or the sound that the argument takes."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import InvalidRequestError
from deployments.media.input_sounds import SOUND_FILE, check_sound, sound_container
from deployments.messages import MEDIA_TYPES, PICTURE_FILE, InputImage, InputSound, ValueType
from serve_app.requests.bodies import IMAGE_SIGNATURES
from serve_app.requests.given.references import HOW_GIVEN, is_reference, reference_of
from serve_app.requests.given.sources import FileSource
from serve_app.requests.input_pictures import check_picture
from serve_app.requests.input_videos import VIDEO_FILE, container_of, read_video
from serve_app.requests.plain_values import read_json

VIDEO_CONTAINERS = ("mp4", "matroska")
FILES = {"picture": PICTURE_FILE, "video": f"{VIDEO_FILE}, or a list of pictures", "sound": SOUND_FILE}


async def with_files(param: str, value: Any, wanted: ValueType, source: FileSource) -> Any:
    """The value with InputImages and InputSounds in place of what stands for files; a video is a list of pictures.

    Forms have no types: a text that the argument cannot be is read as JSON. Plain values are left as they are.
    Raises InvalidRequestError or NotSupportedError that names `param`.
    """
    argument = _Argument(param, source, takes_several=wanted.holds("list", "row", "tensor"))
    return _plain(await argument.read(_typed(value, wanted), wanted))


class _Frames(list[InputImage]):
    """Those of one video, which take the place of its file in a list."""


@dataclass
class _Argument:
    """One argument while its files are read."""

    param: str
    source: FileSource
    takes_several: bool  # pictures: then a video stands for its frames
    num_files: int = field(default=0, init=False)
    sound_s: float = field(default=0.0, init=False)

    async def read(self, value: Any, wanted: ValueType) -> Any:
        if not wanted.holds(*MEDIA_TYPES, "record") or value is None:
            return value
        wanted = _choice_for(value, wanted)
        if wanted.kind == "record" and isinstance(value, dict):
            types = dict(zip(wanted.names, wanted.of, strict=True))
            return {
                name: _plain(await self.read(_typed(each, types[name]), types[name])) if name in types else each
                for name, each in value.items()
            }
        if isinstance(value, list):
            return await self._list(value, wanted)
        if wanted.kind in ("list", "row") and is_reference(value):
            return await self._list([value], wanted)  # one file of a form
        return await self._file(value, wanted.kind) if is_reference(value) else value

    async def _list(self, value: list[Any], wanted: ValueType) -> list[Any]:
        if wanted.kind == "video":
            self._count(len(value), self.source.rules.limits.max_frames, "frames")
            return [await self._file(each, "picture", is_counted=isinstance(each, str | dict)) for each in value]
        item = wanted.of[0] if wanted.kind != "record" and wanted.of else wanted
        read: list[Any] = []
        for each in value:
            made = await self.read(_typed(each, item), item)
            read += made if isinstance(made, _Frames) else [made]
        return read

    async def _file(self, value: Any, kind: str, is_counted: bool = True) -> Any:
        if value is None:
            return None
        if is_counted:
            self.num_files += 1
            self._count(self.num_files, self.source.rules.limits.max_input_images, "files")
        try:
            reference = reference_of(value)
        except ValueError as error:
            raise self._no_file(kind) from error
        return await self._content(await self.source.bytes_of(reference, self.param), kind)

    async def _content(self, data: bytes, kind: str) -> Any:
        limits = self.source.rules.limits
        container = container_of(data)
        if kind == "sound" and sound_container(data) is not None:
            self.sound_s += await asyncio.to_thread(check_sound, data, self.param, limits.max_sound_s)
            self._count(self.sound_s, limits.max_sound_s, "seconds of sound")
            return InputSound(data)
        if kind in ("picture", "video") and IMAGE_SIGNATURES.match(data) and not _is_moving(data, kind):
            check_picture(data, self.param, limits)
            return InputImage(data) if kind == "picture" else _Frames([InputImage(data)])
        stands_for_pictures = kind == "picture" and self.takes_several and container in VIDEO_CONTAINERS
        if stands_for_pictures or (kind == "video" and container is not None):
            return await self._frames(data)
        raise self._no_file(kind)

    async def _frames(self, data: bytes) -> _Frames:
        try:
            video = await asyncio.to_thread(read_video, data, self.source.rules.limits)
        except InvalidRequestError as error:
            message = re.sub(r"^video\b", self.param, error.message)
            raise InvalidRequestError(message, self.param, error.code) from error
        return _Frames(video.frames)

    def _count(self, number: float, limit: float, what: str) -> None:
        if number > limit:
            raise InvalidRequestError(
                f"{self.param}: at most {limit:g} {what}, got {number:g}", self.param, "limit_exceeded"
            )

    def _no_file(self, kind: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.param} must be {FILES.get(kind, 'a file')}: {HOW_GIVEN}", self.param)


def _typed(value: Any, wanted: ValueType) -> Any:
    """A text of a form as what it says, where the argument is no text."""
    holds_files = wanted.holds(*MEDIA_TYPES, "record")
    if isinstance(value, list) and not holds_files and not wanted.holds("str", "any"):
        return [_typed(each, wanted) for each in value]
    if not isinstance(value, str):
        return value
    is_json = value.lstrip().startswith(("{", "[")) if holds_files else not wanted.holds("str", "any")
    try:
        return read_json(value) if is_json else value
    except (json.JSONDecodeError, RecursionError):
        return value


def _choice_for(value: Any, wanted: ValueType) -> ValueType:
    """The choice of a union that the value is read as."""
    choices = [each for each in wanted.choices_of() if each.holds(*MEDIA_TYPES, "record")]
    if isinstance(value, list):
        lists = [each for each in choices if each.kind in ("list", "row", "video")]
        return max(lists, key=_depth, default=choices[0])
    alone = [each for each in choices if each.kind in (*MEDIA_TYPES, "record")]
    return next(iter(alone), choices[0])


def _depth(wanted: ValueType) -> int:
    return 1 + max(map(_depth, wanted.of), default=0)


def _is_moving(data: bytes, kind: str) -> bool:
    """A GIF or WebP that is asked for as a video is read as one."""
    return kind == "video" and container_of(data) == "animation"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, _Frames) else value
