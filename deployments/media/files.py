"""Pixels, sound and numbers as files, without torch, so that any process can write them.

Every file carries how it was made (model, seed, prompt, steps, size, parameters) as one JSON text, where
its format has a place for it: the iTXt chunk `parameters` of PNG, the EXIF tag UserComment of JPEG and WebP,
the comment of GIF, MP4 and sound, the entry `parameters` of the metadata of safetensors. `read_metadata` reads
it back. It holds nothing that changes from run to run, so the same request gives the same bytes.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo, putchunk
from safetensors import TensorSpec, serialize

from deployments.messages import MediaFile

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]  # [H, W, C]; C is 1 (grey), 3 (RGB) or 4 (RGBA)
Samples = npt.NDArray[np.float32]  # [channels, time] in -1..1

MIME_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "safetensors": "application/octet-stream",
}

PNG_COMPRESS_LEVEL = 1  # a fifth of the time of Pillow's default, for files some percent larger
JPEG_QUALITY = 95
WEBP_QUALITY = 90
H264_OPTIONS = {
    "crf": "18",  # the constant rate factor usually called visually lossless
    "x264-params": "cpu-independent=1",  # without it the bytes of small videos differ from run to run
}
H264_THREADS = 4  # fixed, because the bytes depend on it: a machine with more cores must write the same file
BT709 = 1  # the number of ITU-R BT.709 in ITU-T H.273, for primaries, transfer and matrix alike
LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
JPEG_METADATA_BYTES = 60_000  # a JPEG segment ends at 65 533 bytes
SHORTENED_PROMPT_CHARS = 5_000
SIXTEEN_BITS_HIGHEST = 65_535
PNG_HEADER_BYTES = 33  # the signature and IHDR, behind which text may stand
SOUNDS = {"wav": ("pcm_s16le", "s16"), "flac": ("flac", "s16"), "mp3": ("libmp3lame", "fltp")}  # codec, sample format
LAYOUTS = {1: "mono", 2: "stereo"}
S16_HIGHEST = 32_767


@dataclass(frozen=True)
class TensorToWrite:
    """Numbers under a name; `dtype` is torch's name of their type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]  # little-endian


@dataclass(frozen=True)
class FileToWrite:
    """One picture, video, sound or set of tensors, made but not yet encoded."""

    format: str  # a key of MIME_TYPES
    frames: list[Pixels] = field(default_factory=list)  # one for a picture
    metadata: dict[str, Any] = field(default_factory=dict)  # plain values
    quality: int | None = None  # 0..100, for jpeg and webp; None: the defaults above
    fps: float | None = None  # frames per second, for mp4 and moving pictures
    samples: Samples | None = None  # a sound, or that of an mp4
    sample_rate: int = 0  # samples per second
    tensors: tuple[TensorToWrite, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of what is not yet encoded."""
        sound = 0 if self.samples is None else self.samples.nbytes
        return sound + sum(frame.nbytes for frame in self.frames) + sum(each.data.nbytes for each in self.tensors)


def write_file(file: FileToWrite) -> MediaFile:
    """The encoded file."""
    if file.format in SOUNDS:
        return _write_sound(file)
    if file.format == "safetensors":
        return MediaFile(_safetensors(file), MIME_TYPES["safetensors"])
    if file.format == "mp4":
        return _write_video(file)
    return _write_picture(file) if file.fps is None else _write_animation(file)


def read_metadata(data: bytes, mime_type: str) -> dict[str, Any]:
    """The metadata that `write_file` wrote into a file. Raises ValueError if there are none."""
    text = _METADATA_READERS[mime_type](data)
    if not text:
        raise ValueError(f"this {mime_type} file carries no metadata of Triptych")
    metadata: dict[str, Any] = json.loads(text)
    return metadata


def _write_picture(file: FileToWrite) -> MediaFile:
    pixels = file.frames[0]
    height, width = pixels.shape[:2]
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        data = _deep_png(pixels, file.metadata)
    else:
        data = _PICTURE_ENCODERS[file.format](_image(pixels), file.metadata, file.quality)
    return MediaFile(data, MIME_TYPES[file.format], width, height)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def laid_on_white(pixels: Pixels) -> Pixels:
    """RGBA as RGB, of as many bits."""
    if pixels.dtype == np.uint8:
        return np.asarray(on_white(Image.fromarray(pixels)))
    colours, alpha = pixels[..., :3].astype(np.float64), pixels[..., 3:] / SIXTEEN_BITS_HIGHEST
    laid: npt.NDArray[np.uint16] = np.rint(colours * alpha + SIXTEEN_BITS_HIGHEST * (1 - alpha)).astype(np.uint16)
    return laid


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _png(image: Image.Image, metadata: dict[str, Any], quality: int | None) -> bytes:
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(metadata, ensure_ascii=False))
    return _saved(image, format="PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=info)


def _deep_png(pixels: Pixels, metadata: dict[str, Any]) -> bytes:
    """Colours of 16 bits, which Pillow cannot write."""
    layout = {3: "rgb48be", 4: "rgba64be"}[pixels.shape[2]]
    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.height, codec.width, codec.pix_fmt = *pixels.shape[:2], layout
    codec.time_base = Fraction(1)
    frame = av.VideoFrame(codec.width, codec.height, layout)
    rows = np.frombuffer(memoryview(frame.planes[0]), np.uint8).reshape(codec.height, -1)
    rows[:, : pixels.nbytes // codec.height] = (
        np.ascontiguousarray(pixels, dtype=">u2").view(np.uint8).reshape(codec.height, -1)
    )
    data = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    text = io.BytesIO()
    putchunk(text, b"iTXt", b"parameters\0\0\0\0\0" + json.dumps(metadata, ensure_ascii=False).encode())
    return data[:PNG_HEADER_BYTES] + text.getvalue() + data[PNG_HEADER_BYTES:]


def _jpeg(image: Image.Image, metadata: dict[str, Any], quality: int | None) -> bytes:
    if image.mode == "RGBA":
        image = on_white(image)
    exif = _exif(metadata, JPEG_METADATA_BYTES)
    return _saved(image, format="JPEG", quality=JPEG_QUALITY if quality is None else quality, exif=exif)


def _webp(image: Image.Image, metadata: dict[str, Any], quality: int | None) -> bytes:
    exif = _exif(metadata)
    return _saved(image, format="WEBP", quality=WEBP_QUALITY if quality is None else quality, exif=exif)


PictureEncoder = Callable[[Image.Image, dict[str, Any], int | None], bytes]
_PICTURE_ENCODERS: dict[str, PictureEncoder] = {"png": _png, "jpeg": _jpeg, "webp": _webp}


def _saved(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _write_animation(file: FileToWrite) -> MediaFile:
    """A moving picture that repeats without end, at the nearest rate that its format has: GIF counts in 10 ms."""
    assert file.fps is not None
    unit_ms = {"gif": 10, "webp": 1}[file.format]
    duration_ms = max(1, round(1000 / file.fps / unit_ms)) * unit_ms
    first, *others = [_image(frame) for frame in file.frames]
    options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": duration_ms, "loop": 0}
    if file.format == "gif":
        text = json.dumps(file.metadata)
        data = _saved(first, format="GIF", comment=text.encode("ascii"), disposal=0, **options)
    else:
        quality = WEBP_QUALITY if file.quality is None else file.quality
        data = _saved(first, format="WEBP", quality=quality, exif=_exif(file.metadata), minimize_size=False, **options)
    height, width = file.frames[0].shape[:2]
    return MediaFile(data, MIME_TYPES[file.format], width, height, len(file.frames), 1000 / duration_ms)


def _write_video(file: FileToWrite) -> MediaFile:
    assert file.fps is not None
    frames = [_even_rgb(frame) for frame in file.frames]
    height, width = frames[0].shape[:2]
    comment = json.dumps(file.metadata, ensure_ascii=False)
    samples, rate = file.samples, file.sample_rate
    if samples is None:
        data = _mp4(frames, file.fps, None, 0, comment)
        return MediaFile(data, MIME_TYPES["mp4"], width, height, len(frames), file.fps)
    samples, rate = at_rate_of_codec(samples, rate, "aac")
    data = _mp4(frames, file.fps, samples, rate, comment)
    return MediaFile(data, MIME_TYPES["mp4"], width, height, len(frames), file.fps, rate, *samples.shape)


def _even_rgb(frame: Pixels) -> Pixels:
    """yuv420p has one colour for four pixels: an odd side repeats its last row or column."""
    height, width, channels = frame.shape
    rgb = np.repeat(frame, 3, axis=2) if channels == 1 else frame
    if channels == 4:
        rgb = np.asarray(on_white(Image.fromarray(frame)))
    return np.ascontiguousarray(np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def _mp4(frames: list[Pixels], fps: float, samples: Samples | None, audio_sample_rate: int, comment: str) -> bytes:
    """H.264 and, with `samples`, AAC; the index comes first, so that it plays during the download."""
    height, width = frames[0].shape[:2]
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        path = Path(folder, "video.mp4")  # moving the index to the front reads the file back by its name
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            container.metadata["comment"] = comment
            rate = Fraction(fps).limit_denominator(1001)
            video = container.add_stream("libx264", rate=rate, options=H264_OPTIONS)
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            context = video.codec_context
            context.thread_count = H264_THREADS
            # Said in the file, or players guess the matrix from the height.
            context.color_primaries = context.color_trc = context.colorspace = BT709
            context.color_range = LIMITED_RANGE
            audio = None
            if samples is not None:
                layout = "mono" if len(samples) == 1 else "stereo"
                audio = container.add_stream("aac", rate=audio_sample_rate, layout=layout)
            for frame in frames:
                rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
                container.mux(video.encode(rgb.reformat(format="yuv420p", dst_colorspace="ITU709")))
            container.mux(video.encode())
            if audio is not None and samples is not None:
                sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout=audio.layout.name)
                sound.sample_rate = audio_sample_rate
                container.mux(audio.encode(sound))
                container.mux(audio.encode())
        return path.read_bytes()


def _write_sound(file: FileToWrite) -> MediaFile:
    assert file.samples is not None
    codec, sample_format = SOUNDS[file.format]
    samples, rate = at_rate_of_codec(file.samples, file.sample_rate, codec)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file.format) as container:
        container.metadata["comment"] = json.dumps(file.metadata, ensure_ascii=False)
        stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[len(samples)])
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.format = av.AudioFormat(sample_format)
        container.mux(stream.encode(_sound_frame(samples, rate, sample_format)))
        container.mux(stream.encode())
    channels, num_samples = samples.shape
    return MediaFile(
        buffer.getvalue(), MIME_TYPES[file.format], sample_rate=rate, channels=channels, num_samples=num_samples
    )


def _sound_frame(samples: Samples, rate: int, sample_format: str) -> av.AudioFrame:
    layout = LAYOUTS[len(samples)]
    if sample_format == "s16":  # the samples of all channels at a time, and then those of the next
        whole = np.rint(samples * S16_HIGHEST).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(whole.T).reshape(1, -1), "s16", layout)
    else:
        frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
    frame.sample_rate = rate
    return frame


def at_rate_of_codec(samples: Samples, rate: int, codec: str) -> tuple[Samples, int]:
    """The sound at the next higher rate that the codec has, where it has not its own; and the rate."""
    rates = sorted(av.Codec(codec, "w").audio_rates or ())
    if not rates or rate in rates:
        return samples, rate
    new_rate = next((each for each in rates if each > rate), rates[-1])
    layout = LAYOUTS[len(samples)]
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=new_rate)
    frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
    frame.sample_rate = rate
    parts = [part.to_ndarray() for part in [*resampler.resample(frame), *resampler.resample(None)]]
    return np.ascontiguousarray(np.concatenate(parts, axis=1)), new_rate


def _safetensors(file: FileToWrite) -> bytes:
    tensors = {
        each.name: TensorSpec(
            dtype=each.dtype, shape=list(each.shape), data_ptr=each.data.ctypes.data, data_len=each.data.nbytes
        )
        for each in file.tensors
    }
    data: bytes = serialize(tensors, {"parameters": json.dumps(file.metadata, ensure_ascii=False)})
    return data


def _exif(metadata: dict[str, Any], max_bytes: int | None = None) -> Image.Exif:
    text = json.dumps(metadata)  # ASCII: the one charset that all readers of UserComment agree on
    if max_bytes is not None and len(text) > max_bytes:
        prompt = str(metadata["prompt"])[:SHORTENED_PROMPT_CHARS]
        text = json.dumps(metadata | {"prompt": prompt, "parameters": {}, "shortened": True})
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + text.encode("ascii")
    return exif


def _read_png(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return str(image.info.get("parameters", ""))


def _read_exif(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        comment: bytes = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    return comment[8:].decode("ascii")


def _read_gif(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        comment: bytes = image.info.get("comment", b"")
    return comment.decode("ascii")


def _read_comment(data: bytes) -> str:
    with av.open(io.BytesIO(data)) as container:
        tags = container.metadata | {name.lower(): text for name, text in container.metadata.items()}
        return tags.get("comment", "")


def _read_safetensors(data: bytes) -> str:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return str(header.get("__metadata__", {}).get("parameters", ""))


_METADATA_READERS: dict[str, Callable[[bytes], str]] = {
    "image/png": _read_png,
    "image/jpeg": _read_exif,
    "image/webp": _read_exif,
    "image/gif": _read_gif,
    "video/mp4": _read_comment,
    "audio/wav": _read_comment,
    "audio/flac": _read_comment,
    "audio/mpeg": _read_comment,
    "application/octet-stream": _read_safetensors,
}
