"""Which arguments of a request matter on this checkpoint, and with what the others would: told by plays.

An argument matters if another value of it, or none, ends the play otherwise. The plays are small in size and steps;
one that makes all steps counts them, and confirms what was found without effect.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.messages import MEDIA_TYPES, ArgumentDescription, Effects, GenerationRequest, ValueType
from deployments.stage_pipeline.argument_types import call_inputs, is_record_class
from deployments.stage_pipeline.description import OWN_PARAMETERS, size_multiple
from deployments.stage_pipeline.inputs.fields import argument_fields
from deployments.stage_pipeline.inputs.values import Waveform, as_pipeline_takes
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.plays.play import Played, PlaySession
from deployments.stages.encode import call_arguments

logger = logging.getLogger(__name__)

FEW_STEPS = 4
SMALL_SIDE = 8  # times the multiple that sides must be of
FEW_FRAMES = 9
PICTURE_DIMS = 4  # of a tensor: batch, channels, height, width
MAX_CHANGES = 24  # of other arguments, each tried for whether the argument matters with it
SOUND_SAMPLES = 64
TOGETHER = {"width": "height", "height": "width"}  # an argument is changed together with the other

Arguments = dict[str, Any]
Change = tuple[str, Any]  # an argument and another value of it; ABSENT: without it
ABSENT = object()


def effects_of(stage: StagePipeline, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
    """`asked`: the arguments that the caller set. What cannot be played is taken to matter."""
    plays = _Plays(stage)
    arguments = plays.playable(call_arguments(stage, request))
    if arguments is None:
        return Effects()
    ended = plays.end_of(arguments)
    if ended is not None and ended.num_steps == 0:  # nothing matters to no step: the request says what is wrong with it
        return Effects()
    few = plays.with_few_steps(arguments)
    without = {
        name: plays.reason(few, name)
        for name in asked
        if name in arguments and not plays.matters(few, name) and not plays.matters(arguments, name)
    }
    return Effects(without, ended.num_steps if ended else None)


def arguments_of(stage: StagePipeline, names: tuple[str, ...], defaults: Arguments) -> list[ArgumentDescription]:
    """Those of `names` that the checkpoint reads; `defaults`, plain JSON, count over the pipeline's own."""
    plays = _Plays(stage)
    inputs = {n: p for n, p in call_inputs(type(stage.pipeline)).items() if n in names}
    usual = {n: plays.sample(n) for n, p in inputs.items() if plays.fields[n].is_needed or n == "prompt"}
    usual = plays.with_few_steps(usual | defaults)
    base = plays.playable(usual) or plays.playable(usual | {"image": _picture()})
    described = []
    for name, parameter in inputs.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        when = plays.when(base, name, plays.sample(name)) if base else ""
        if when is not None:
            own = parameter.default if isinstance(parameter.default, bool | int | float | str) else None
            default = defaults.get(name, own)
            described.append(ArgumentDescription(name, in_json_words(plays.fields[name].type), default, when))
    return described


class _Plays:
    """Plays of one pipeline, each made once."""

    def __init__(self, stage: StagePipeline) -> None:
        self.stage = stage
        self.side = SMALL_SIDE * size_multiple(stage)
        self.inputs = call_inputs(type(stage.pipeline))
        self.fields = argument_fields(type(stage.pipeline))
        self._encoded: dict[str, Any] = {}
        self._ended: dict[str, Played | None] = {}

    def sample(self, name: str) -> Any:
        """A value as the pipeline takes it; None where none is known."""
        field = self.fields.get(name)
        if field is None or field.notes.why_not:
            return None
        return as_pipeline_takes(type(self.stage.pipeline), name, _sample(name, self.inputs[name], field.type))

    def with_few_steps(self, arguments: Arguments) -> Arguments:
        names = [name for name in self.inputs if "inference_steps" in name]
        steps = {name: arguments.get(name, self.inputs[name].default) for name in names}
        return arguments | {name: min(n, FEW_STEPS) for name, n in steps.items() if isinstance(n, int)}

    def end_of(self, arguments: Arguments) -> Played | None:
        """None where the pipeline raises."""
        key = repr(sorted(arguments.items(), key=lambda item: item[0]))
        if key not in self._ended:
            try:
                self._ended[key] = PlaySession(self.stage, arguments, self._encoded).run()
            except Exception as error:  # noqa: BLE001  (whatever such arguments make the pipeline raise)
                logger.debug("a play with %s ends in %r", sorted(arguments), error)
                self._ended[key] = None
        return self._ended[key]

    def playable(self, arguments: Arguments) -> Arguments | None:
        """The arguments in a small size, or as they are where the pipeline takes no other; None: in neither."""
        bounds = {"width": self.side, "height": self.side, "num_frames": FEW_FRAMES}
        sized = {name: size for name, size in bounds.items() if name in self.inputs}
        small = {name: _small(value, self.side) for name, value in arguments.items()}
        return next((each for each in (small | sized, small, arguments) if self.end_of(each)), None)

    def matters(self, arguments: Arguments, name: str) -> bool:
        """Whether another value of the argument, or none, changes the end."""
        ended = self.end_of(arguments)
        is_needed = self.inputs[name].default is inspect.Parameter.empty
        if ended is None:
            return True
        without = self.end_of(_changed(arguments, (name, ABSENT)))
        if is_needed or without is None or without != ended:
            return True
        others = [self.end_of(_changed(arguments, change)) for change in self._other_values(arguments, name)]
        known = [other for other in others if other is not None]
        return any(other != ended for other in known) or (not known and bool(others))

    def reason(self, arguments: Arguments, name: str) -> str:
        """With what the argument would matter, in words."""
        found = self._found(arguments, name)
        if found is None:
            return "this model does not read it"
        return f"it matters {_in_words(found, arguments)}"

    def when(self, arguments: Arguments, name: str, value: Any) -> str | None:
        """When the argument matters; None: never. Empty: its values cannot be tried."""
        if value is None:
            return ""
        given = {**arguments, name: arguments.get(name, value)}
        if self.end_of(given) is None:
            given = self._with_another(arguments, name) or {}
        if not given:
            return ""
        if self.matters(given, name):
            return "always"
        found = self._found(given, name)
        return None if found is None else _in_words(found, given)

    def _with_another(self, arguments: Arguments, name: str) -> Arguments | None:
        """With another value of the argument, where the sample is refused."""
        return next((a for c in self._other_values(arguments, name) if self.end_of(a := _changed(arguments, c))), None)

    def _other_values(self, arguments: Arguments, name: str) -> Iterator[Change]:
        value = arguments.get(name)
        other = TOGETHER.get(name)
        if name in TOGETHER and other in arguments and isinstance(value, int):
            yield name, value * 2
        elif isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int):
            yield from ((name, value + 1), (name, value + 4))  # 4: frames that a causal VAE packs
        elif isinstance(value, float):
            yield from ((name, value * 2 + 1), (name, value / 2 + 0.125))
        elif isinstance(value, str):
            yield name, f"{value} x"
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            yield name, [f"{item} x" for item in value]
        elif isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
            yield name, [item / 2 if isinstance(item, float) else item // 2 for item in value]

    def _found(self, arguments: Arguments, name: str) -> list[Change] | None:
        """Changes of other arguments with which this one matters: one that is enough, or as few as are needed."""
        changes = list(islice(self._changes(arguments, name), MAX_CHANGES))
        for change in changes:
            if self._matters_with(arguments, name, [change]):
                return [change]
        working: list[Change] = []  # all at once, of each argument one
        for change in changes:
            if change[0] not in {n for n, _ in working} and self.end_of(_with(arguments, [*working, change])):
                working.append(change)
        if not self._matters_with(arguments, name, working):
            return None
        for change in list(working):
            fewer = [each for each in working if each is not change]
            if self._matters_with(arguments, name, fewer):
                working = fewer
        return working

    def _matters_with(self, arguments: Arguments, name: str, changes: list[Change]) -> bool:
        changed = _with(arguments, changes)
        return name in changed and self.end_of(changed) is not None and self.matters(changed, name)

    def _changes(self, arguments: Arguments, name: str) -> Iterator[Change]:
        """Of every other argument a value with which more may happen: numbers grow, texts and pictures are there."""
        for other, value in arguments.items():
            if other != name and isinstance(value, list) and self.inputs[other].default is None:
                yield other, ABSENT
        for other, parameter in self.inputs.items():
            is_amount = other.startswith(("num_", "width", "height")) or "step" in other
            if other == name or other in OWN_PARAMETERS or is_amount:
                continue
            value = arguments.get(other, None if parameter.default is parameter.empty else parameter.default)
            if isinstance(value, bool):
                yield other, not value
            elif isinstance(value, int | float):
                yield other, float(value) * 2 + 3
            elif value is None and (sample := self.sample(other)) is not None:
                yield other, sample


def _changed(arguments: Arguments, change: Change) -> Arguments:
    name, value = change
    other = TOGETHER.get(name)
    names = [name, other] if other in arguments and value is not ABSENT else [name]
    return _with(arguments, [(each, value) for each in names if each])


def _with(arguments: Arguments, changes: list[Change]) -> Arguments:
    changed = arguments | dict(changes)
    return {name: value for name, value in changed.items() if value is not ABSENT}


def _small(value: Any, side: int) -> Any:
    if isinstance(value, Image.Image):
        return value.resize((side, side))
    if isinstance(value, list) and len(value) > FEW_FRAMES and all(isinstance(item, Image.Image) for item in value):
        value = value[:FEW_FRAMES]
    if isinstance(value, torch.Tensor) and value.ndim >= PICTURE_DIMS:
        return _small_tensor(value, side)
    if is_record_class(type(value)):
        return dataclasses.replace(value, **{name: _small(each, side) for name, each in vars(value).items()})
    return [_small(item, side) for item in value] if isinstance(value, list) else value


def _small_tensor(value: torch.Tensor, side: int) -> torch.Tensor:
    """A batch of pictures [..., H, W] or videos [B, C, F, H, W] or [B, F, C, H, W], every so many pixels of it."""
    rows, columns = (torch.linspace(0, size - 1, side).long() for size in value.shape[-2:])
    small = value[..., rows, :][..., columns]
    for dim in range(1, small.ndim - 2):
        if small.shape[dim] > FEW_FRAMES:
            small = small.narrow(dim, 0, FEW_FRAMES)
    return small


def _in_words(changes: list[Change], arguments: Arguments) -> str:
    words = []
    for name, value in changes:
        if value is ABSENT:
            words.append(f"without {name}")
        elif isinstance(value, Image.Image):
            words.append(f"with {name}")
        elif isinstance(value, str | list):
            words.append(f"with {name}" if arguments.get(name) is None else f"with another {name}")
        else:
            words.append(f"with {name}={_plain_number(value)}")
    return " and ".join(words)


def _plain_number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


# --- what a parameter takes ---

_WORDS = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object", "record": "object"}
_ORDER = ("boolean", "integer", "number", "string", "picture", "video", "sound", "object")


def in_json_words(wanted: ValueType) -> str:
    """The type in words of JSON; any: not known."""
    words = set(_words(wanted))
    singles = [word for word in _ORDER if word in words]
    lists = [f"list of {word}" for word in _ORDER if f"list of {word}" in words]
    return " or ".join([*singles, *lists]) or "any"


def _words(wanted: ValueType) -> Iterator[str]:
    if wanted.kind in ("list", "row", "tuple"):
        inner = {word.removeprefix("list of ") for part in wanted.of for word in _words(part)}
        yield from (f"list of {'number' if word == 'integer' else word}" for word in inner)
    elif wanted.kind == "union":
        for part in wanted.of:
            yield from _words(part)
    elif wanted.kind == "choice":
        yield "string" if any(isinstance(each, str) for each in wanted.choices) else "integer"
    elif wanted.kind in _WORDS or wanted.kind in MEDIA_TYPES:
        yield _WORDS.get(wanted.kind, wanted.kind)


def _picture() -> Image.Image:
    return Image.new("RGB", (64, 64), (128, 64, 32))


def _sample(name: str, parameter: inspect.Parameter, wanted: ValueType) -> Any:
    """A value that a caller may send, as it comes from JSON and files; None where none is known."""
    default = None if parameter.default is parameter.empty else parameter.default
    if isinstance(default, bool | int | float | str):
        return default
    if wanted.holds(*MEDIA_TYPES):
        return _sample_of_media(wanted)
    words = in_json_words(wanted).split(" or ")
    if "string" in words:
        return "a fox" if name == "prompt" else "rain"
    if "number" in words:
        return 3.0
    if "boolean" in words:
        return True
    if "integer" in words:
        return 2
    if "list of number" in words:
        return next((list(values) for word, values in LISTS.items() if word in name), None)
    return None


def _sample_of_media(wanted: ValueType) -> Any:
    """One file; of an object the first field that is one, and those that it cannot do without."""
    choices = wanted.choices_of()
    kinds = {choice.kind: choice for choice in choices}
    if "picture" in kinds:
        return _picture()
    if "video" in kinds:
        return [_picture()] * FEW_FRAMES
    if "sound" in kinds:
        return Waveform(np.linspace(-1, 1, SOUND_SAMPLES, dtype=np.float32)[None])
    if "record" in kinds:
        record = kinds["record"]
        files = [name for name, each in zip(record.names, record.of, strict=True) if each.holds(*MEDIA_TYPES)]
        types = dict(zip(record.names, record.of, strict=True))
        return {name: _sample_of_media(types[name]) for name in files[:1]}
    [several] = [choice for choice in choices if choice.kind in ("list", "row")][:1]
    return [_sample_of_media(several.of[0])]


# Of lists whose names have the word: sigmas and time steps of a schedule, SDXL's sizes and crops.
LISTS = {"sigma": (1.0, 0.5), "timestep": (999, 500), "size": (256, 256), "crop": (8, 8)}
