"""Small pictures of what is made: those of a job's events."""

from __future__ import annotations

import base64
import io

from PIL import Image

from serve_app.storage.previews import PREVIEW_LONGEST_SIDE, small_picture


def test_a_preview_is_a_jpeg_whose_longer_side_is_bounded():
    file = io.BytesIO()
    Image.new("RGBA", (1024, 512), "red").save(file, "PNG")

    event = small_picture(file.getvalue())

    shown = Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))
    assert event["size"] == f"{PREVIEW_LONGEST_SIDE}x{PREVIEW_LONGEST_SIDE // 2}"
    assert (shown.format, shown.size) == ("JPEG", (PREVIEW_LONGEST_SIDE, PREVIEW_LONGEST_SIDE // 2))
    assert event["output_format"] == "jpeg"
