"""Which file an argument is sent as, or why it cannot be sent: told by annotation, name and docstring together.

diffusers annotates many pictures as tensors, and some numbers too: where the annotation has a tensor and nothing else,
the docstring's type decides, then the words of the name.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from deployments.messages import ANY_VALUE, ValueType
from deployments.stage_pipeline.inputs.docstrings import NO_DOC, ParameterDoc

Medium = Literal["picture", "video", "sound"]

# Words of names. Of an argument that could be a tensor, the last word that says something decides.
MEDIUM_OF_WORD: dict[str, Medium] = {
    **dict.fromkeys(("audio", "audios", "waveform", "waveforms", "sound", "speech", "music"), "sound"),
    **dict.fromkeys(("video", "videos", "frames"), "video"),
    **dict.fromkeys(("image", "images", "picture", "photo", "hint", "mask", "masks", "depth", "controls"), "picture"),
}
MADE_BY_CODE = re.compile(
    r"latents?($|_)|embeds|embeddings?($|_)|(attention|padding)_mask|cu_seqlens|hidden|processor|(^|_)(ids|tokens|thw)$"
)
CALLS_BACK = re.compile(r"callback|generator($|_)")
PATH_NAME = re.compile(r"(^|_)(file|files|path|paths|dir|directory|folder|filename)$")
PATH_TEXT = re.compile(r"\bpaths? (of|to)\b|on disk|\bfile(name)? (of|to)\b", re.IGNORECASE)
PLAIN_DOC = {"int": "int", "float": "float", "bool": "bool", "str": "str"}

WHY_CODE = "only code can make its tensor"
WHY_CALL = "it is a function or an object of Python"
WHY_PATH = "it is the path of a file on the server"
WHYS = (WHY_CODE, WHY_CALL, WHY_PATH)

PICTURE, VIDEO, SOUND = ValueType("picture"), ValueType("video"), ValueType("sound")
NOT_PLAIN = ("picture", "video", "sound", "tensor", "object", "record")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What may be sent, or why nothing may."""

    type: ValueType
    why_not: str = ""


def kind_of(name: str, annotated: ValueType, doc: ParameterDoc) -> Kind:
    """`annotated` is the type that the annotation and the default give."""
    if CALLS_BACK.search(name):
        return Kind(annotated, WHY_CALL)
    if _is_path(name, annotated, doc):
        return Kind(annotated, WHY_PATH)
    if annotated.holds("record"):
        records = _only(annotated, lambda each: each.holds("record") or each.kind == "none")
        return Kind(_with_kinds(records))
    is_known = annotated != ANY_VALUE and annotated.kind != "none"
    if is_known and not annotated.holds("picture", "tensor", "object"):
        return Kind(annotated)
    plain = _plain_part(annotated)
    if is_known and not annotated.holds("picture") and _says_something(plain):
        return Kind(plain)  # a number, or a tensor of such
    if MADE_BY_CODE.search(name):
        return Kind(annotated, WHY_CODE)
    medium = _medium_of(name, annotated, doc)
    if medium is not None:
        return Kind(_as_medium(medium, annotated, doc))
    if annotated.holds("tensor", "object"):
        from_doc = _plain_of_doc(doc)
        if from_doc is not None:
            return Kind(from_doc)
        return Kind(annotated, WHY_CODE if annotated.holds("tensor") else WHY_CALL)
    return Kind(_plain_of_doc(doc) or annotated)


def _with_kinds(wanted: ValueType) -> ValueType:
    """The fields of each record by their own names; those that cannot be sent are left out."""
    if wanted.kind != "record":
        return dataclasses.replace(wanted, of=tuple(map(_with_kinds, wanted.of)))
    kinds = {name: kind_of(name, each, NO_DOC) for name, each in zip(wanted.names, wanted.of, strict=True)}
    if any(kinds[name].why_not for name in wanted.needed):
        return ValueType("object")
    sent = {name: kind.type for name, kind in kinds.items() if not kind.why_not}
    return ValueType("record", tuple(sent.values()), names=tuple(sent), needed=wanted.needed)


def _is_path(name: str, annotated: ValueType, doc: ParameterDoc) -> bool:
    return annotated.holds("str") and bool(PATH_NAME.search(name) or PATH_TEXT.search(doc.text))


def _medium_of(name: str, annotated: ValueType, doc: ParameterDoc) -> Medium | None:
    words = [MEDIUM_OF_WORD.get(word) for word in re.split(r"[_\d]+", name)]
    named = next((word for word in reversed(words) if word), None)
    if "video" in words and annotated.holds("picture", "tensor", "any"):
        named = "video"  # mask_video, video_frames
    if annotated.holds("picture"):
        return named if named == "video" else "picture"
    if not annotated.holds("tensor", "any") and annotated.kind != "none":
        return None
    if named is None:
        return "picture" if "Image" in doc.type else None
    if _plain_of_doc(doc) is not None or not _fits_shape(named, doc.shape):
        return None
    return named


def _fits_shape(medium: Medium, shape: tuple[str, ...]) -> bool:
    """Whether the tensor that the docstring describes has the sides of a picture, or the channels of a sound."""
    if not shape:
        return True
    has_sides = any(each.startswith("h") for each in shape)
    return not has_sides if medium == "sound" else has_sides


def _as_medium(medium: Medium, annotated: ValueType, doc: ParameterDoc) -> ValueType:
    choices = annotated.choices_of()
    none = tuple(each for each in choices if each.kind == "none")
    if medium == "video":
        return union_of((VIDEO, *none))
    if medium == "sound":
        several = tuple(ValueType("list", (SOUND,)) for each in choices if each.kind in ("list", "row"))
        return union_of((SOUND, *several[:1], *none))
    pictures = tuple(each for each in choices if each.holds("picture", "tensor") or each.kind == "none")
    if annotated == ANY_VALUE:
        pictures = (PICTURE, ValueType("list", (PICTURE,)))
    if not annotated.holds("picture") and any(each.kind == "tensor" for each in choices):
        pictures = (PICTURE, *none)  # one picture as a tensor
    return union_of(_of_pictures(each) for each in pictures)


def _of_pictures(wanted: ValueType) -> ValueType:
    """A list of tensors is a list of pictures."""
    if wanted.kind in ("list", "row"):
        return ValueType(wanted.kind, (union_of(_inside(each) for each in wanted.of[0].choices_of()),))
    return wanted


def _inside(wanted: ValueType) -> ValueType:
    return PICTURE if wanted.kind == "tensor" else _of_pictures(wanted)


def _plain_of_doc(doc: ParameterDoc) -> ValueType | None:
    """Of a docstring that names a plain type only."""
    named = re.findall(r"\w[\w.]*", doc.type.partition("optional")[0])
    found = [PLAIN_DOC[each] for each in named if each in PLAIN_DOC]
    if not found or any("Tensor" in each or "Image" in each or "array" in each for each in named):
        return None
    items = union_of(_plain_type(each) for each in found)
    is_list = any(each.lower() in ("list", "tuple") for each in named)
    return union_of((ValueType("list", (items,)) if is_list else items, ValueType("none")))


def _plain_type(kind: str) -> ValueType:
    plain: Any = kind
    return ValueType(plain)


def _only(wanted: ValueType, is_kept: Any) -> ValueType:
    return union_of(each for each in wanted.choices_of() if is_kept(each))


def _plain_part(wanted: ValueType) -> ValueType:
    """Without tensors and objects, in lists too."""
    kept = [each for each in wanted.choices_of() if each.kind not in NOT_PLAIN]
    return union_of(
        dataclasses.replace(each, of=(_plain_part(each.of[0]),)) if each.kind in ("list", "row") else each
        for each in kept
        if each.kind not in ("list", "row") or _says_something(_plain_part(each.of[0]))
    )


def _says_something(wanted: ValueType) -> bool:
    """Besides null; a list of anything beside a tensor may be one of pictures."""
    return any(each.kind != "none" for each in wanted.choices_of()) and not wanted.holds("any")


def union_of(choices: Any) -> ValueType:
    """One choice is itself, none at all is null."""
    flat = [part for choice in choices for part in choice.choices_of()]
    unique = tuple(dict.fromkeys(flat)) or (ValueType("none"),)
    return unique[0] if len(unique) == 1 else ValueType("union", unique)
