"""Pictures and videos as files: writes what a pipeline returned, reads the pictures that callers send.

Every file carries how it was made (model, seed, prompt, steps, size, parameters) as one JSON text, where
its format has a place for it: the iTXt chunk `parameters` of PNG, the EXIF tag UserComment of JPEG and WebP,
the `comment` of MP4. `read_metadata` reads it back. It holds nothing that changes from run to run, so the
same request gives the same bytes.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from deployments.errors import GenerationFailedError, InvalidRequestError
from deployments.messages import GenerationRequest, InputImage, Media, MediaFile

Pixels = npt.NDArray[np.uint8]  # [H, W, C]; C is 1 (grey), 3 (RGB) or 4 (RGBA)
Samples = npt.NDArray[np.float32]  # [channels, time] in -1..1

MIME_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}
INPUT_FORMATS = ("PNG", "JPEG", "WEBP")

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


def encode_media(output: Any, request: GenerationRequest, default_fps: float, audio_sample_rate: int | None) -> Media:
    """Write the files of one request.

    `output` is what a diffusers pipeline returned with output_type="pt": `.images` [B, C, H, W] or `.frames`
    [B, F, C, H, W] with values in 0..1, or (nested) lists of them; a video may come with `.audio`
    [B, channels, time] in -1..1, sampled `audio_sample_rate` times a second. Pixels are rounded as diffusers
    rounds them for PIL; values outside 0..1 are clipped. Without `request.output.fps` a video plays
    `default_fps` frames a second.

    Raises GenerationFailedError for values that are not finite (a black picture otherwise) and for an output
    that is not what was asked for; InvalidRequestError if the model's own safety checker refused the picture.
    """
    started = time.perf_counter()
    _refuse_flagged(output)
    if request.output.kind == "video":
        files = _videos(output, request, request.output.fps or default_fps, audio_sample_rate)
    else:
        files = _pictures(output, request)
    return Media(files, {"encode_media": time.perf_counter() - started})


def decode_input_image(image: InputImage, max_pixels: int, param: str = "image") -> Image.Image:
    """The caller's picture as diffusers.utils.load_image gives it: upright and RGB.

    Raises InvalidRequestError, naming `param`, for what is no complete PNG, JPEG or WebP file, and for more
    than `max_pixels` (width x height), before any pixel is unpacked.
    """
    try:
        picture = Image.open(io.BytesIO(image.data), formats=INPUT_FORMATS)
        width, height = picture.size
        if width * height > max_pixels:
            raise _too_many_pixels(f"{width}x{height}", max_pixels, param)
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels("larger still", max_pixels, param) from error
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error) as error:
        # What Pillow raises for a broken file: each of its readers has its own.
        raise InvalidRequestError(
            f"{param} must be a complete PNG, JPEG or WebP file; it cannot be read as one", param
        ) from error


def read_metadata(data: bytes, mime_type: str) -> dict[str, Any]:
    """The metadata that `encode_media` wrote into a file. Raises ValueError if there are none."""
    text = _METADATA_READERS[mime_type](data)
    if not text:
        raise ValueError(f"this {mime_type} file carries no metadata of Triptych")
    metadata: dict[str, Any] = json.loads(text)
    return metadata


def _too_many_pixels(size: str, max_pixels: int, param: str) -> InvalidRequestError:
    message = f"{param} may have at most {max_pixels} pixels (width x height), it is {size}"
    return InvalidRequestError(message, param)


def _refuse_flagged(output: Any) -> None:
    """A pipeline with a safety checker blackens what it flags; say so instead."""
    flags = getattr(output, "nsfw_content_detected", None) or []
    if any(flags):
        raise InvalidRequestError(
            "the model's safety checker refused what this prompt and seed made",
            param="prompt",
            code="content_policy_violation",
        )


# --- pictures ---


def _pictures(output: Any, request: GenerationRequest) -> tuple[MediaFile, ...]:
    made = getattr(output, "images", None)
    if made is None:
        raise GenerationFailedError(f"a picture was asked for, but {type(output).__name__} has no images")
    encode = _PICTURE_ENCODERS[request.output.format]
    return tuple(_picture_file(pixels, request, encode) for pixels in _to_pixels(made))


def _picture_file(pixels: Pixels, request: GenerationRequest, encode: PictureEncoder) -> MediaFile:
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    data = encode(image, _metadata(request, width, height), request.output.quality)
    return MediaFile(data, MIME_TYPES[request.output.format], width, height)


def _png(image: Image.Image, metadata: dict[str, Any], quality: int | None) -> bytes:
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(metadata, ensure_ascii=False))
    return _saved(image, format="PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=info)


def _jpeg(image: Image.Image, metadata: dict[str, Any], quality: int | None) -> bytes:
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
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


def _to_pixels(made: Any) -> list[Pixels]:
    """Each picture of a tensor [..., C, H, W] in 0..1, of a PIL image, or of nested lists of them."""
    if isinstance(made, list | tuple):
        return [pixels for item in made for pixels in _to_pixels(item)]
    if isinstance(made, Image.Image):  # some pipelines return these whatever the output_type
        if made.mode != "L":
            made = made.convert("RGBA" if made.has_transparency_data else "RGB")
        return [np.asarray(made).reshape(made.height, made.width, -1)]
    if not isinstance(made, torch.Tensor) or made.ndim < 3 or made.shape[-3] not in (1, 3, 4):
        raise GenerationFailedError(
            f"cannot write {_described(made)} as pictures: a tensor [..., C, H, W] with C 1, 3 or 4 is needed"
        )
    if not torch.isfinite(made).all():
        raise GenerationFailedError("the model made values that are not numbers (NaN or infinite)")
    # numpy_to_pil of diffusers.image_processor, before the copy from the device: a quarter of the bytes
    rounded = made.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    height, width = made.shape[-2:]
    return list(rounded.movedim(-3, -1).reshape(-1, height, width, made.shape[-3]).cpu().numpy())


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


# --- videos ---


def _videos(
    output: Any, request: GenerationRequest, fps: float, audio_sample_rate: int | None
) -> tuple[MediaFile, ...]:
    made = _first_of(output, ("frames", "video"))
    if made is None:
        raise GenerationFailedError(f"a video was asked for, but {type(output).__name__} has no frames")
    audio = _first_of(output, ("audio", "sound"))
    if audio is not None and audio_sample_rate is None:
        raise GenerationFailedError("the model made audio, but its sample rate is not known")
    videos = [_to_pixels(video) for video in _each_video(made)]
    tracks = [None] * len(videos) if audio is None else _to_samples(audio, len(videos))
    return tuple(
        _video_file(frames, samples, request, fps, audio_sample_rate or 0)
        for frames, samples in zip(videos, tracks, strict=True)
    )


def _first_of(output: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def _each_video(made: Any) -> list[Any]:
    """The videos of a batch; a lone video [F, C, H, W], or a list of frames, is a batch of one."""
    if isinstance(made, torch.Tensor):
        return list(made) if made.ndim == 5 else [made]
    is_frame = isinstance(made[0], Image.Image) or getattr(made[0], "ndim", 0) == 3
    return [made] if is_frame else list(made)


def _video_file(
    frames: list[Pixels],
    samples: Samples | None,
    request: GenerationRequest,
    fps: float,
    audio_sample_rate: int,
) -> MediaFile:
    frames = [_even_rgb(frame) for frame in frames]
    height, width = frames[0].shape[:2]
    metadata = _metadata(request, width, height) | {"num_frames": len(frames), "fps": fps}
    data = _mp4(frames, fps, samples, audio_sample_rate, json.dumps(metadata, ensure_ascii=False))
    return MediaFile(data, MIME_TYPES["mp4"], width, height, len(frames), fps)


def _even_rgb(frame: Pixels) -> Pixels:
    """yuv420p has one colour for four pixels: an odd side repeats its last row or column."""
    height, width, channels = frame.shape
    rgb = np.repeat(frame, 3, axis=2) if channels == 1 else frame[:, :, :3]
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


def _to_samples(audio: Any, num_videos: int) -> list[Samples]:
    """The tracks of a batch: [B, channels, time], [B, time] or, for one video, [channels, time] or [time]."""
    waves = torch.as_tensor(audio).detach().float().cpu()
    if not torch.isfinite(waves).all():
        raise GenerationFailedError("the model made sound with values that are not numbers (NaN or infinite)")
    tracks = waves.reshape(num_videos, -1, waves.shape[-1]).clamp(-1, 1)
    if tracks.shape[1] > 2:
        raise GenerationFailedError(f"sound has one or two channels, the model made {tracks.shape[1]}")
    return [np.ascontiguousarray(track) for track in tracks.numpy()]


# --- metadata ---


def _metadata(request: GenerationRequest, width: int, height: int) -> dict[str, Any]:
    parameters = {
        name: value
        for name, value in request.arguments.items()
        if name not in ("prompt", "num_inference_steps") and not _holds_picture(value)
    }
    return {
        "model": request.model,
        "seed": request.seed,
        "prompt": request.arguments.get("prompt"),
        "steps": request.arguments.get("num_inference_steps"),
        "size": f"{width}x{height}",
        "parameters": parameters,
    }


def _holds_picture(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_picture(item) for item in value)
    return isinstance(value, InputImage)


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


def _read_mp4(data: bytes) -> str:
    with av.open(io.BytesIO(data)) as container:
        return container.metadata.get("comment", "")


_METADATA_READERS: dict[str, Callable[[bytes], str]] = {
    "image/png": _read_png,
    "image/jpeg": _read_exif,
    "image/webp": _read_exif,
    "video/mp4": _read_mp4,
}
