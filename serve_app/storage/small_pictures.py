"""Small pictures for the events of a job, which the job store keeps."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

LONGEST_SIDE = 256  # pixels
QUALITY = 75


def small_picture(data: bytes) -> dict[str, Any]:
    """A picture file as a JPEG of at most LONGEST_SIDE pixels, in the words of an event."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return {
        "b64_json": base64.b64encode(file.getvalue()).decode(),
        "output_format": "jpeg",
        "size": f"{picture.width}x{picture.height}",
    }
