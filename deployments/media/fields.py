"""The fields of diffusers' outputs, by what they hold."""

from __future__ import annotations

from deployments.messages import MediaKind

# What a pipeline makes is told by the first of these that its output has.
FIELDS_OF: dict[MediaKind, tuple[str, ...]] = {
    "video": ("frames", "video"),
    "image": ("images", "image", "rgb", "prediction"),
    "audio": ("audios", "audio", "sound"),
}
# Measures of what is in a picture. They are pictures too, beside the others or alone.
MAPS = ("prediction", "depth", "uncertainty")
TEXTS = ("texts", "text")
