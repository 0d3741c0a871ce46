"""Whether a model can make what a body asks for, as far as the model's own description says."""

from __future__ import annotations

from deployments.messages import MediaKind, StageDescription
from serve_app.requests.bodies import ImageGenerationBody, MediaBody
from serve_app.requests.edit_bodies import ImageEditBody, VideoEditBody, VideoExtensionBody
from serve_app.requests.given.own_arguments import is_edit_of_pictures
from serve_app.requests.outputs import asks_for_frames


def kind_asked_for(body: MediaBody) -> MediaKind:
    """The routes of pictures may ask for moving ones."""
    return "video" if isinstance(body, ImageGenerationBody) and asks_for_frames(body) else body.media_kind


def is_suitable(body: MediaBody, description: StageDescription) -> bool:
    """Of a model that was not named: one that makes something else, or lacks what it starts from, is not meant."""
    if description.media_kind != kind_asked_for(body):
        return False
    match body:
        case ImageEditBody():
            return is_edit_of_pictures(description)
        case VideoEditBody():
            return "video_to_video" in description.tasks
        case VideoExtensionBody():
            return "image_to_video" in description.tasks
    if getattr(body, "image", None) is not None:
        return is_edit_of_pictures(description)
    return not description.needs_picture
