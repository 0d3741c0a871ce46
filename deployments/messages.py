"""All that crosses a replica boundary: GenerationRequest -> Conditioning -> DecodeInputs -> Media.

Messages hold plain values and byte buffers, never an object of torch or diffusers: deployments.tensors.packing
turns tensors and outputs of models into `Packed` and back, so a process without torch can pass them on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

MediaKind = Literal["image", "video", "audio", "tensors"]  # tensors: embeddings or coordinates, as a file of numbers
FileFormat = Literal["png", "jpeg", "webp", "gif", "mp4", "wav", "flac", "mp3", "safetensors"]
Background = Literal["transparent", "opaque"]
StageName = Literal["encoder", "denoiser", "vae"]
STAGES: tuple[StageName, ...] = ("encoder", "denoiser", "vae")

# What a pipeline makes of what, by the Hugging Face hub's names; features are embeddings.
Task = Literal[
    "text_to_image", "image_to_image", "inpainting", "text_to_video", "image_to_video", "video_to_video",
    "text_to_audio", "audio_to_audio", "feature_extraction", "image_feature_extraction",
]  # fmt: skip
BEGIN_WITH_A_PICTURE: frozenset[Task] = frozenset(
    {"image_to_image", "inpainting", "image_to_video", "image_feature_extraction"}
)

# Names that pipelines give to how long a sound is, or where it ends, in seconds.
LENGTH_OF_SOUND = re.compile(r"(audio_)?(duration|length|end)(_in)?(_s|_seconds)?")

# Files that callers may send as pictures, by Pillow's names of their formats; HEIC is HEIF.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")
PICTURE_FILE = "a PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF or HEIC file"

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True)
class Packed:
    """A tree of values: its structure as JSON and the numbers of its tensors as flat bytes."""

    tree: JSON
    buffers: tuple[npt.NDArray[np.uint8], ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


@dataclass(frozen=True)
class InputImage:
    """A picture given by the caller: an encoded file, already checked for its size and type."""

    data: bytes


@dataclass(frozen=True)
class InputSound:
    """Sound given by the caller: an encoded file, already checked for its length and type."""

    data: bytes


InputFile = InputImage | InputSound


@dataclass(frozen=True)
class OutputFormat:
    """The file that the VAE stage writes."""

    kind: MediaKind
    format: FileFormat
    quality: int | None = None  # 0..100, for jpeg and webp; None: the encoder's default
    fps: float | None = None  # frames per second of a video; None: the model's own
    background: Background = "opaque"  # transparent: the alpha that the model makes is kept; opaque: laid on white
    max_frames: int | None = None  # of a video that the model makes longer than was asked for, the first; None: all
    bit_depth: Literal[8, 16] = 8  # of each channel of a png


@dataclass(frozen=True)
class RequestWarning:
    """What the caller should know of a request that is made all the same: a field without effect, a prompt cut."""

    code: str  # for programs, see docs/errors.md
    param: str | None  # the field
    message: str  # for people


@dataclass(frozen=True)
class GenerationRequest:
    """The work: one picture, video, sound or file of tensors, by the arguments of the pipeline's own `__call__`."""

    request_id: str
    model: str
    arguments: dict[str, Any]  # by the pipeline's parameter names: JSON in which an InputFile may stand anywhere
    seed: int
    output: OutputFormat
    deterministic: bool = False  # forwards run alone: the same seed gives the same bytes whatever else goes on
    deadline_s: float | None = None  # seconds from its arrival at the denoiser by which it should be done
    features: dict[str, Any] = field(default_factory=dict)  # by name, what it asks of deployments.features
    num_steps: int | None = None  # scheduler steps that it makes, where they were counted at the door
    warnings: tuple[RequestWarning, ...] = ()  # known at the door; told in the answer
    left_out: tuple[RequestWarning, ...] = ()  # those of them about the pipeline's arguments; told in the file too


@dataclass(frozen=True)
class Envelope:
    """How a request is followed on its way. Nothing in it changes what is made."""

    owner: str = ""  # name of the Ray actor that asks; when it is gone the denoising ends
    report_progress: bool = False  # an event after each step
    previews: int = 0  # pictures to show on the way
    complete_hand_off: bool = False  # defer every decoder call instead of ending at the first
    remote_calls: bool = False  # make decoder calls in their stage at once, and hand over the result
    tried_until: int | None = None  # a suspected request: until this step no other such is in the replica
    refused_before: int = 0  # requests that its ingress had no room for since the last: for the autoscaling
    trace: Mapping[str, str] = field(default_factory=dict)  # deployments.tracing.Carrier; empty: it is not traced


UNFOLLOWED = Envelope()


@dataclass(frozen=True)
class Conditioning:
    """What the encoder stage recorded: the outcome of each encoder call, in the order of the calls."""

    calls: Packed
    made_at: float = 0.0  # time.time() of its sender, for the time of the transfer
    warnings: tuple[RequestWarning, ...] = ()  # what the encoders did not read
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRAs by name, with the digests of what encoders used
    making: str = ""  # ModelArgs.making of the replica; empty: it is not known


@dataclass(frozen=True)
class DecodeInputs:
    """What the denoiser stage hands over: the arguments of each decoder call, or a finished result."""

    kind: Literal["decoder_calls", "result"]
    content: Packed
    made_at: float = 0.0
    num_steps: int | None = None  # scheduler steps that were made, those before a resume too; None: not counted
    warnings: tuple[RequestWarning, ...] = ()  # those of the conditioning and of the denoising
    token: str = ""  # by which the process that made them finds what they were made of; empty: it has no decoders
    making: str = ""  # ModelArgs.making of the replica; empty: it is not known


@dataclass(frozen=True)
class MediaFile:
    """One encoded picture, video or sound, or a file of tensors, which has no measures."""

    data: bytes = field(repr=False)
    mime_type: str = "image/png"
    width: int = 0  # pixels; 0: nothing is to be seen
    height: int = 0  # pixels
    num_frames: int = 1
    fps: float | None = None
    sample_rate: int | None = None  # samples per second of its sound; None: it has none
    channels: int | None = None  # of its sound
    num_samples: int | None = None  # of each channel

    @property
    def seconds(self) -> float | None:
        """How long it plays; None for what does not play."""
        return play_time(self.num_frames, self.fps, self.num_samples, self.sample_rate)


def play_time(num_frames: int, fps: float | None, num_samples: int | None, sample_rate: int | None) -> float | None:
    """Seconds that a file plays: those of its frames, else of its sound."""
    if fps:
        return num_frames / fps
    return num_samples / sample_rate if num_samples is not None and sample_rate else None


@dataclass(frozen=True)
class Usage:
    """What one request was, in tokens: nothing is billed by them.

    A token of a picture is a place of the latents that the denoiser works on: as many pixels of width and height as
    `StageDescription.size_multiple` says, and of a video `frame_multiple` frames.
    """

    text_tokens: int = 0  # of the prompt and the negative prompt, by the pipeline's first tokenizer, whole
    image_tokens: int = 0  # of the pictures sent along, masks among them, at their own sizes
    output_tokens: int = 0  # of what was made


@dataclass(frozen=True)
class Media:
    """The files that one request made (most models make one) and the seconds that each part took."""

    files: tuple[MediaFile, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    usage: Usage = Usage()
    num_steps: int | None = None  # scheduler steps that were made; None: not counted
    warnings: tuple[RequestWarning, ...] = ()  # of the request, and of the stages


@dataclass(frozen=True)
class DenoisingBegun:
    """An event of the denoiser's stream: its engine has taken the request up, which waits for nobody any more."""


@dataclass(frozen=True)
class DenoisingProgress:
    """An event of the denoiser's stream: `step` of `num_steps` scheduler steps are done."""

    step: int
    num_steps: int
    eta_s: float | None = None  # seconds until the loop is done, from the measured time of its steps


@dataclass(frozen=True)
class Checkpoint:
    """Where a denoising loop stands: enough to go on in another process with the same bytes."""

    request_id: str
    step: int
    fingerprint: str  # of the model, the versions and the request; another one is refused
    digest: str  # SHA-256 of the content
    content: Packed


@dataclass(frozen=True)
class PayloadFollows:
    """Announces that the next item of the stream is large and is to be passed on by reference, unread.

    The last item of a stream whose replica dies is its error. So an unread checkpoint or preview is known to be one
    only when another item has followed it. "decode_inputs" are the last; an error in their place fails the decoding.
    """

    kind: Literal["decode_inputs", "checkpoint", "preview"]
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # spent by the denoiser on this request


@dataclass(frozen=True)
class ComponentCall:
    """A call to a component that lives in another stage, for pipelines that need it inside their loop."""

    component: str
    method: str
    arguments: Packed  # (args, kwargs, states of torch's global generators, switches that the request has set)
    adapters: tuple[dict[str, Any], ...] = ()  # LoRAs of the request, as its features say
    is_steady: bool = False  # it must give the same bytes whatever else runs: StageMemory.run
    making: str = ""  # ModelArgs.making of the replica that asks; empty: it is not known
    model: str = ""  # whose component it is, where a process has those of several


@dataclass(frozen=True)
class ComponentAnswer:
    """The outcome of a ComponentCall: the output and the states of the generators after it."""

    outcome: Packed


@dataclass(frozen=True)
class ValueType:
    """What an argument of a pipeline may be, read from its annotation, its name and the docstring.

    `of` are the parts: the choices of a union, the one type of the items of a list, a row or a dict, the types of the
    items of a tuple, those of a record's fields. A row is a tuple of any length. Pictures, videos and sounds come as
    files; a video also as a list of pictures. Beside a picture a tensor stands for several pictures; tensors and
    objects alone cannot be sent.
    """

    kind: Literal[
        "any", "none", "bool", "int", "float", "str", "choice", "list", "row", "tuple", "dict", "union", "record",
        "picture", "video", "sound", "tensor", "object",
    ]  # fmt: skip
    of: tuple[ValueType, ...] = ()
    choices: tuple[JSON, ...] = ()  # the values of a choice
    names: tuple[str, ...] = ()  # of a record's fields
    needed: tuple[str, ...] = ()  # those of them that have no default

    def choices_of(self) -> tuple[ValueType, ...]:
        """The choices of a union; any other type is its own."""
        return self.of if self.kind == "union" else (self,)

    def holds(self, *kinds: str) -> bool:
        """Whether it, or a part of it at any depth, is of one of the kinds."""
        return self.kind in kinds or any(part.holds(*kinds) for part in self.of)


MEDIA_TYPES = ("picture", "video", "sound")
ANY_VALUE = ValueType("any")


@dataclass(frozen=True)
class ArgumentNotes:
    """What the signature and the docstring say of an argument besides its type."""

    description: str = ""
    default: JSON = None  # where it is a plain value
    minimum: float | None = None
    maximum: float | None = None
    why_not: str = ""  # why it cannot be sent; empty: it can


@dataclass(frozen=True)
class Effects:
    """What a request's arguments do on this checkpoint, told by plays of the pipeline."""

    without: dict[str, str] = field(default_factory=dict)  # arguments that change nothing -> with what they would
    num_steps: int | None = None  # scheduler steps that the request makes; None: it could not be played


@dataclass(frozen=True)
class ArgumentDescription:
    """An argument of the pipeline's call that this checkpoint reads."""

    name: str
    type: str  # in words of JSON, such as number or list of number; any: not known
    default: JSON
    when: str  # always, or with what it matters; empty: not known


@dataclass(frozen=True)
class StageDescription:
    """What a replica holds; /health, /v1/models and the validation of requests read it."""

    stages: tuple[StageName, ...]
    pipeline_class: str
    parameters: dict[str, Any]  # of the pipeline's __call__: name -> default, where it is a plain value
    required: tuple[str, ...]  # parameters that the pipeline cannot do without
    media_kind: MediaKind
    size_multiple: int  # width and height must be multiples of it
    default_width: int | None
    default_height: int | None
    device: str
    dtype: str
    weight_bytes: dict[str, int]  # component -> bytes of parameters and buffers held in this process
    process_id: int
    node_id: str = ""
    features: tuple[str, ...] = ()  # names that GenerationRequest.features may have
    argument_types: dict[str, ValueType] = field(default_factory=dict)  # of `parameters`
    argument_notes: dict[str, ArgumentNotes] = field(default_factory=dict)  # of them, and of those that only we set
    tasks: tuple[Task, ...] = ()  # what callers can ask of it; empty where they can only give tensors or nothing
    frame_multiple: int = 1  # frames of a video for one of its latents: it makes 1 + a multiple of them
    makes_alpha: bool = False  # its pictures have four channels
    takes_adapters: bool = False  # LoRAs can be put into its models
    start_s: float = 0.0  # from the start of the replica's process until it could serve; 0: not measured
    version: str = ""  # ModelArgs.version
    shared: Mapping[str, str] = field(default_factory=dict)  # component -> MODEL.COMPONENT that it is too
    models: Mapping[str, StageDescription] = field(default_factory=dict)  # of a replica of several: each one's

    def of(self, model: str) -> StageDescription:
        """What the replica holds of one of its models."""
        return self.models.get(model, self)

    def takes(self, name: str) -> bool:
        """Whether the pipeline's `__call__` has this parameter; those without a default are among them."""
        return name in self.parameters

    @property
    def length_argument(self) -> str | None:
        """The parameter that says how many seconds of sound are made; None: there is none, or it makes no sound."""
        if self.media_kind != "audio":
            return None
        return next((name for name in self.parameters if LENGTH_OF_SOUND.fullmatch(name)), None)

    def type_of(self, name: str) -> ValueType:
        """What the argument may be; anything where it has no annotation."""
        return self.argument_types.get(name, ANY_VALUE)

    def notes_of(self, name: str) -> ArgumentNotes:
        """What is told of the argument; nothing where it has no docstring."""
        return self.argument_notes.get(name, ArgumentNotes())

    @property
    def needs_picture(self) -> bool:
        """Whether every task begins with a picture, so that a prompt alone is not enough."""
        return bool(self.tasks) and BEGIN_WITH_A_PICTURE.issuperset(self.tasks)
