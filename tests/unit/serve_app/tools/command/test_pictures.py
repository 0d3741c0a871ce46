"""Pictures in a terminal: what is written can be read back, and is written only where it is understood."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from serve_app.tools.command.shown.pictures import picture_bytes
from serve_app.tools.command.shown.terminal import by_answer, by_variables, protocol_here


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 27)) -> Image.Image:
    made = Image.new(mode, size, (250, 200, 0))
    ImageDraw.Draw(made).ellipse((5, 5, 25, 20), (0, 60, 200))
    return made


def file_of(made: Image.Image) -> bytes:
    file = io.BytesIO()
    made.save(file, "png")
    return file.getvalue()


def test_kitty_gets_a_png_in_chunks() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    written = picture_bytes(file_of(noise), "kitty")
    chunks = re.findall(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\", written)
    assert [head for head, _ in chunks] == [b"a=T,f=100,q=2,m=1", *[b"m=1"] * (len(chunks) - 2), b"m=0"]
    assert all(len(data) <= 4096 for _, data in chunks)
    with Image.open(io.BytesIO(base64.b64decode(b"".join(data for _, data in chunks)))) as read:
        assert np.array_equal(np.asarray(read), np.asarray(noise))


def test_iterm2_gets_a_file_with_its_size() -> None:
    written = picture_bytes(file_of(picture()), "iterm2")
    [(size, data)] = re.findall(rb"\x1b\]1337;File=inline=1;size=(\d+);width=40px:([^\x07]*)\x07", written)
    assert len(base64.b64decode(data)) == int(size)


@pytest.mark.parametrize("size", [(40, 27), (3, 1), (64, 6)])
def test_sixels_are_the_pixels_of_the_picture(size: tuple[int, int]) -> None:
    made = picture(size=size)
    read = read_sixels(picture_bytes(file_of(made), "sixel"))
    assert np.abs(read - np.asarray(made).astype(int)).max() <= 4  # sixels have colours in percent


def test_what_is_transparent_has_no_sixel() -> None:
    made = picture("RGBA")
    made.paste((0, 0, 0, 0), (0, 0, 40, 6))
    read = read_sixels(picture_bytes(file_of(made), "sixel"))
    assert (read[:6] == -1).all()
    assert (read[6:] >= 0).all()


def test_a_large_picture_is_made_smaller() -> None:
    assert b'"1;1;512;256#' in picture_bytes(file_of(picture(size=(2048, 1024))), "sixel")


def test_what_is_no_picture_raises() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        picture_bytes(b"no picture", "kitty")


def read_sixels(data: bytes) -> np.ndarray:
    """The pixels as a terminal would draw them; -1 where nothing is drawn."""
    match = re.fullmatch(rb'\x1bP0;1q"1;1;(\d+);(\d+)((?:#\d+;2;\d+;\d+;\d+)*)(.*)\x1b\\\n', data, re.DOTALL)
    assert match is not None
    width, height = int(match[1]), int(match[2])
    colours = {
        int(n): [int(c) * 255 / 100 for c in rgb.split(b";")] for n, rgb in re.findall(rb"#(\d+);2;([\d;]+)", match[3])
    }
    pixels = np.full((-(-height // 6) * 6, width, 3), -1.0)
    for band, line in enumerate(match[4].split(b"-")):
        for number, run in re.findall(rb"#(\d+)([^#$]*)", line):
            column = 0
            for count, each in re.findall(rb"(?:!(\d+))?([?-~])", run):
                for _ in range(int(count or 1)):
                    for row in range(6):
                        if (each[0] - 63) >> row & 1:
                            pixels[6 * band + row, column] = colours[int(number)]
                    column += 1
            assert column == width
    return pixels[:height]


@pytest.mark.parametrize(
    ("variables", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2", "TERM": "xterm-256color"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_a_terminal_is_known_by_its_variables(variables: dict[str, str], protocol: str | None) -> None:
    assert by_variables(variables) == protocol


@pytest.mark.parametrize(
    ("answer", "protocol"),
    [
        (b"\x1b_Gi=31;OK\x1b\\\x1b[?62;4c", "kitty"),
        (b"\x1b[?62;4;22c", "sixel"),
        (b"\x1b[?64;1;2;6;9;14c", None),
        (b"\x1b_Gi=31;EINVAL\x1b\\\x1b[?6c", None),
        (b"", None),
    ],
)
def test_a_terminal_is_known_by_its_answer(answer: bytes, protocol: str | None) -> None:
    assert by_answer(answer) == protocol


def test_into_a_pipe_nothing_is_shown() -> None:
    assert protocol_here() is None
