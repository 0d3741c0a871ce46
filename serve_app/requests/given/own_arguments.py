"""Fields that are arguments of the served pipeline, by their own names: files in them are read."""

from __future__ import annotations

from typing import Any

from deployments.errors import InvalidRequestError
from deployments.messages import StageDescription
from serve_app.requests.argument_values import check_depth
from serve_app.requests.edit_bodies import ImageEditBody
from serve_app.requests.given.files import with_files
from serve_app.requests.given.pictures import Body
from serve_app.requests.given.sources import FileSource

# Arguments that stand for a field of OpenAI's where a pipeline calls it otherwise.
OTHER_NAMES = {"image": "images", "mask_image": "mask"}


def with_pipelines_names(body: Body, description: StageDescription) -> Body:
    """Of an edit: `image` for a pipeline that takes `images` only, `mask` for one that takes `mask`."""
    if not isinstance(body, ImageEditBody):
        return body
    changes: dict[str, Any] = {}
    own: dict[str, Any] = dict(body.own_arguments)
    for field, name in OTHER_NAMES.items():
        value = getattr(body, field)
        if value is None or description.takes(field) or not description.takes(name):
            continue
        if name in own:
            raise InvalidRequestError(f"{name} is given twice, also as {field}", name)
        own[name] = value
        changes[field] = None
    return body.model_copy(update={**changes, "own_arguments": own}) if changes else body


async def with_own_files(body: Body, description: StageDescription, source: FileSource) -> Body:
    """The body with the files of its own arguments read. Raises InvalidRequestError that names the field."""
    own = {name: await _read(name, name, value, description, source) for name, value in body.own_arguments.items()}
    extra = {
        name: await _read(f"extra_args.{name}", name, value, description, source)
        for name, value in body.extra_args.items()
    }
    return body.model_copy(update={"own_arguments": own, "extra_args": extra})


async def _read(param: str, name: str, value: Any, description: StageDescription, source: FileSource) -> Any:
    if not description.takes(name) or description.notes_of(name).why_not:
        return value  # refused later, by name
    check_depth(param, value)
    return await with_files(param, value, description.type_of(name), source)


def is_edit_of_pictures(description: StageDescription) -> bool:
    """Whether the pipeline takes the pictures of an edit, under whichever name."""
    return description.takes("image") or description.takes(OTHER_NAMES["image"])


def takes_mask(description: StageDescription) -> bool:
    """Whether the pipeline takes the mask of an edit, under whichever name."""
    return description.takes("mask_image") or description.takes(OTHER_NAMES["mask_image"])
