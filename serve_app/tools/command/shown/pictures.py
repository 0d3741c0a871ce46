"""A picture as the bytes by which a terminal shows it: kitty's, iTerm2's and DEC's (sixel) protocols."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from serve_app.tools.command.shown.terminal import Protocol

MOST_PIXELS_A_SIDE = 512
CHUNK = 4096  # bytes of base64 in an escape of kitty's
COLOURS = 255
BAND = 6  # rows of pixels in a line of sixels


def picture_bytes(data: bytes, protocol: Protocol) -> bytes:
    """`data`: a file of a picture. Raises OSError or ValueError for one that cannot be read."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        picture = opened.convert("RGBA" if "A" in opened.getbands() or "transparency" in opened.info else "RGB")
    picture.thumbnail((MOST_PIXELS_A_SIDE, MOST_PIXELS_A_SIDE))
    return ENCODERS[protocol](picture) + b"\n"


def kitty(picture: Image) -> bytes:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/#remote-client"""
    encoded = base64.b64encode(png(picture))
    chunks = [encoded[start : start + CHUNK] for start in range(0, len(encoded), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    parts = zip(heads, chunks, range(len(chunks) - 1, -1, -1), strict=True)
    return b"".join(b"\x1b_G%sm=%d;%s\x1b\\" % (head.encode(), min(1, left), chunk) for head, chunk, left in parts)


def iterm2(picture: Image) -> bytes:
    """https://iterm2.com/documentation-images.html"""
    data = png(picture)
    return b"\x1b]1337;File=inline=1;size=%d;width=%dpx:%s\x07" % (len(data), picture.width, base64.b64encode(data))


def png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def sixel(picture: Image) -> bytes:
    """https://vt100.net/docs/vt3xx-gp/chapter14.html, at a ratio of 1:1; what is transparent stays as it is."""
    import numpy as np

    indexed = picture.convert("RGB").quantize(COLOURS)
    numbers = np.asarray(indexed).astype(np.int16)
    if picture.mode == "RGBA":
        numbers[np.asarray(picture.getchannel("A")) < 128] = -1
    palette = np.asarray(indexed.getpalette(), np.uint32).reshape(-1, 3)[: int(numbers.max(initial=0)) + 1]
    percents = (palette * 100 + 127) // 255
    colours = b"".join(b"#%d;2;%d;%d;%d" % (number, *map(int, each)) for number, each in enumerate(percents))
    bands = b"-".join(_band(numbers[row : row + BAND]) for row in range(0, picture.height, BAND))
    return b'\x1bP0;1q"1;1;%d;%d%s%s\x1b\\' % (picture.width, picture.height, colours, bands)


def _band(numbers: Any) -> bytes:
    """A line of sixels for each colour in it, over each other."""
    return b"$".join(b"#%d%s" % each for each in _lines(numbers))


def _lines(numbers: Any) -> Iterator[tuple[int, bytes]]:
    import numpy as np

    bits = np.left_shift(1, np.arange(len(numbers)))[:, None]
    for colour in np.unique(numbers[numbers >= 0]):
        line = ((numbers == colour) * bits).sum(axis=0).astype(np.uint8) + 63
        yield int(colour), re.sub(rb"(.)\1{3,}", _repeated, line.tobytes())


def _repeated(run: re.Match[bytes]) -> bytes:
    return b"!%d%s" % (len(run[0]), run[1])


ENCODERS: dict[str, Callable[[Any], bytes]] = {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}
