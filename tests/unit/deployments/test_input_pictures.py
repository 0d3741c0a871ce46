"""Pictures and masks of every kind that callers send, against the same pixels made without a file."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.media.inputs import decode_input_image, decode_mask
from deployments.messages import PICTURE_FORMATS, GenerationRequest, InputImage, OutputFormat
from deployments.stages.encode import call_arguments

pillow_heif.register_heif_opener()

LIMIT = 10_000
NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 255, (20, 30, 3), dtype=np.uint8))
SMOOTH = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
RAMP = np.tile(np.linspace(0, 65535, 64).round().astype(np.uint16), (4, 1))
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {}, "TIFF": {}, "BMP": {}, "WEBP": {"lossless": True}, "HEIF": {"quality": -1, "chroma": 444},
}  # fmt: skip


def file_of(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def read(data: bytes, **options: Any) -> Image.Image:
    return decode_input_image(InputImage(data), LIMIT, **options)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def sixteen_bit_png(colour_type: int, channels: int, alpha: int | None = None) -> bytes:
    """RAMP in every channel; Pillow writes no such files."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def row(values: np.ndarray) -> bytes:
        columns = np.stack([values] * channels + ([] if alpha is None else [np.full_like(values, alpha)]), -1)
        return b"\0" + columns.astype(">u2").tobytes()

    header = struct.pack(">IIBBBBB", RAMP.shape[1], RAMP.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(row(values) for values in RAMP)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- kinds of files ---


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_every_kind_of_file_comes_out_as_the_picture_it_shows(format):
    options = LOSSLESS.get(format, {"quality": 100} if format in ("JPEG", "AVIF") else {})
    seen = read(file_of(SMOOTH, format, **options))
    assert (seen.mode, seen.size) == ("RGB", (30, 20))
    assert np.abs(pixels(seen) - pixels(SMOOTH)).max() <= (0 if format in ("PNG", "TIFF", "BMP", "WEBP") else 4)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF", "AVIF", "MPO"])
def test_of_a_moving_picture_the_first_frame_counts(format):
    frames = [Image.new("RGB", (16, 16), (level, level, level)) for level in (250, 128, 5)]
    seen = read(file_of(frames[0], format, save_all=True, append_images=frames[1:]))
    assert pixels(seen).min() > 240


@pytest.mark.parametrize(
    "data",
    [
        file_of(Image.fromarray(RAMP), "PNG"),
        file_of(Image.fromarray(RAMP), "TIFF"),
        sixteen_bit_png(2, 3),
        sixteen_bit_png(4, 1, alpha=65535),
        sixteen_bit_png(6, 3, alpha=65535),
    ],
    ids=["grey png", "grey tiff", "rgb png", "grey+alpha png", "rgba png"],
)
def test_sixteen_bits_become_eight_over_the_whole_range(data):
    seen = pixels(read(data))
    assert np.abs(seen[..., 0] - RAMP / 257).max() <= 1
    assert (seen[0, 0].tolist(), seen[-1, -1].tolist()) == ([0, 0, 0], [255, 255, 255])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused_since_their_white_is_not_known(mode):
    with pytest.raises(InvalidRequestError, match="8 or 16 bits") as caught:
        read(file_of(Image.new(mode, (4, 4)), "TIFF"))
    assert caught.value.param == "image"


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_printers_colours_become_those_of_a_screen(format):
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert np.abs(pixels(read(file_of(red.convert("CMYK"), format))) - pixels(red)).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_exif_is_made_upright(format, orientation):
    sideways = Image.new("RGB", (32, 16))
    sideways.paste((255, 255, 255), (0, 0, 16, 8))  # a white corner tells where it was turned to
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    seen = read(file_of(sideways, format, exif=exif))
    assert seen.size == ((32, 16) if orientation < 5 else (16, 32))
    column, row = corners[orientation]
    bright = pixels(seen)[..., 0] > 128
    assert bright[row, column]
    assert bright.mean() == pytest.approx(0.25, abs=0.02)


def test_a_sixteen_bit_picture_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(file_of(Image.fromarray(RAMP), "PNG", exif=exif)).size == (4, 64)


# --- transparency ---


def holed(hole: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Image.Image:
    """Red, with a transparent frame whose hidden colour is black."""
    picture = Image.new("RGBA", (32, 16), hole)
    picture.paste((255, 0, 0, 255), (8, 4, 24, 12))
    return picture


def palette_with_transparency() -> bytes:
    picture = holed().convert("RGB").quantize(4)
    return file_of(picture, "PNG", transparency=picture.getpixel((0, 0)))


@pytest.mark.parametrize(
    "data",
    [file_of(holed(), "PNG"), file_of(holed(), "WEBP", lossless=True), file_of(holed(), "TIFF"),
     file_of(holed(), "GIF"), file_of(holed(), "HEIF", quality=-1, chroma=444), palette_with_transparency()],
    ids=["png", "webp", "tiff", "gif", "heic", "palette"],
)  # fmt: skip
def test_what_is_transparent_is_laid_on_white(data):
    seen = pixels(read(data))
    assert seen[0, 0].min() >= 250
    assert seen[8, 16][0] >= 250
    assert seen[8, 16][1:].max() <= 5


def test_a_model_that_reads_four_channels_gets_them_from_every_picture():
    vae = SimpleNamespace(config={"input_channels": 4})
    stage: Any = SimpleNamespace(pipeline=SimpleNamespace(vae=vae))
    for picture in (holed(), SMOOTH):
        arguments: dict[str, Any] = {"image": InputImage(file_of(picture, "PNG"))}
        request = GenerationRequest("r", "m", arguments, 0, OutputFormat("image", "png"))
        assert np.array_equal(pixels(call_arguments(stage, request)["image"]), pixels(picture.convert("RGBA")))


# --- masks ---


def mask(picture: Image.Image, format: str = "PNG", **options: Any) -> np.ndarray:
    lossless = {"quality": -1} if format == "HEIF" else {}
    seen = decode_mask(InputImage(file_of(picture, format, **lossless)), LIMIT, **options)
    assert seen.mode == "RGB"
    return pixels(seen)[..., 0]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF", "AVIF", "HEIF"])
def test_a_mask_repaints_where_it_is_fully_transparent_whatever_its_colours(format):
    for hidden in ((0, 0, 0, 0), (255, 255, 255, 0)):
        seen = mask(holed(hidden), format)
        assert (seen[0, 0], seen[8, 16], seen[-1, -1]) == (255, 0, 255)
        assert set(np.unique(seen)) == {0, 255}


def test_what_is_half_transparent_in_a_mask_is_kept():
    picture = holed()
    picture.paste((0, 0, 0, 1), (8, 4, 9, 5))
    assert mask(picture)[4, 8] == 0


def test_a_palette_with_transparency_is_a_mask_by_alpha():
    seen = pixels(decode_mask(InputImage(palette_with_transparency()), LIMIT))
    assert (seen[0, 0, 0], seen[8, 16, 0]) == (255, 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "LA", "RGBA"])
def test_a_mask_without_transparency_is_white_where_to_repaint(mode):
    picture = Image.new("L", (32, 16))
    picture.paste(255, (0, 0, 16, 16))
    assert np.array_equal(mask(picture.convert(mode)), pixels(picture))


def test_a_coloured_mask_that_hides_nothing_is_refused_and_not_read_by_its_brightness():
    with pytest.raises(InvalidRequestError, match="no pixel of it is transparent") as caught:
        mask(NOISE.convert("RGBA"))
    assert caught.value.param == "mask_image"


def test_the_pictures_own_alpha_is_a_mask_but_never_its_brightness():
    assert mask(holed(), by_alpha=True)[0, 0] == 255
    for opaque in (SMOOTH, SMOOTH.convert("RGBA")):
        with pytest.raises(InvalidRequestError, match="no pixel of it is transparent"):
            mask(opaque, by_alpha=True)


@pytest.mark.parametrize("name", ["mask_image", "mask", "control_mask", "mask_video"])
def test_every_argument_named_mask_is_read_as_one(name):
    stage: Any = SimpleNamespace(pipeline=SimpleNamespace(vae=None))
    sent = [InputImage(file_of(holed(), "PNG"))]
    request = GenerationRequest("r", "m", {name: sent, "image": sent}, 0, OutputFormat("image", "png"))
    arguments = call_arguments(stage, request)
    assert pixels(arguments[name][0])[8, 16].tolist() == [0, 0, 0]
    assert pixels(arguments["image"][0])[8, 16].tolist() == [255, 0, 0]


# --- broken files and bombs ---


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_a_file_cut_short_is_refused_by_name(format):
    data = file_of(NOISE, format)
    with pytest.raises(InvalidRequestError, match="PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF or HEIC") as caught:
        decode_input_image(InputImage(data[: len(data) // 2]), LIMIT, "last_image")
    assert caught.value.param == "last_image"


@pytest.mark.parametrize("format", PICTURE_FORMATS)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage that it can live with
def test_a_damaged_file_is_read_or_refused_but_nothing_else(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = file_of(NOISE, format, exif=exif)
    dice = random.Random(1)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        for decode in (decode_input_image, decode_mask):
            with contextlib.suppress(InvalidRequestError):
                assert decode(InputImage(bytes(damaged)), LIMIT).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"not a picture", b"<svg/>"], ids=["empty", "text", "svg"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(InvalidRequestError, match="PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF or HEIC"):
        read(data)


def png_that_says_it_is(width: int, height: int) -> bytes:
    """A small file whose header claims a huge picture."""
    data = bytearray(file_of(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (file_of(NOISE, "PNG"), "at most 599 pixels .* 30x20"),
        (png_that_says_it_is(12_000, 12_000), "at most 599 pixels"),  # Pillow warns of it
        (png_that_says_it_is(60_000, 60_000), "at most 599 pixels"),  # Pillow refuses it
    ],
)
@pytest.mark.parametrize("decode", [decode_input_image, decode_mask])
def test_pictures_with_too_many_pixels_are_refused_by_name(decode, data, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        decode(InputImage(data), 599, "mask_image")
    assert caught.value.param == "mask_image"


def jpeg_of(part: bytes, times: int) -> bytes:
    data = file_of(NOISE, "JPEG")
    return data[:2] + part * times + data[2:]


def png_of(times: int, place: int) -> bytes:
    data, part = file_of(NOISE, "PNG"), struct.pack(">I", 0) + b"juNk" + struct.pack(">I", zlib.crc32(b"juNk"))
    return data[:place] + part * times + data[place:]


@pytest.mark.parametrize(
    "data",
    [
        jpeg_of(b"\xff\xe1" + struct.pack(">H", 12) + b"Exif\0\0abcd", 200_000),  # Pillow joins them in quadratic time
        png_of(200_000, 33),
        png_of(200_000, -12),
    ],
    ids=["parts of EXIF", "chunks before the pixels", "chunks behind them"],
)
def test_a_file_of_countless_parts_is_refused_before_they_are_read(data):
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read(data)
