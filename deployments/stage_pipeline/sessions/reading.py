"""Notices the texts that a tokenizer cuts: its private copy counts the tokens that the limit of a call leaves out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import TruncationStrategy

OnText = Callable[[str, int, int | None, Callable[[str], int]], None]  # text, tokens, limit; counts tokens of others


def reading_copy(value: Any, on_text: OnText) -> Any:
    """The tokenizer, or a processor with one, as one request uses it; None for what is neither.

    `on_text` is told of every text that is tokenized: the text, its tokens with the special ones, and the limit
    above which the call cuts them (None: it does not).
    """
    if isinstance(value, PreTrainedTokenizerBase):
        private = _copied(value)
        cls: Any = type(value)
        private.__class__ = _reading_class(cls)
        private.__dict__["_on_text"] = on_text
        return private
    if isinstance(value, ProcessorMixin) and isinstance(getattr(value, "tokenizer", None), PreTrainedTokenizerBase):
        private = _copied(value)
        private.__dict__["tokenizer"] = reading_copy(value.tokenizer, on_text)
        return private
    return None


def _copied(value: Any) -> Any:
    """As copy.copy, which asks classes with a __getattr__ of their own too early."""
    private = object.__new__(type(value))
    private.__dict__.update(value.__dict__)
    return private


@functools.cache
def _reading_class(cls: Any) -> Any:
    """A subclass under the same name: all ways to tokenize lead to `_encode_plus`."""

    @functools.wraps(cls._encode_plus)
    def encode_plus(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        encoding = cls._encode_plus(self, text, *args, **kwargs)
        on_text, special = self.__dict__["_on_text"], kwargs.get("add_special_tokens", True)
        cuts = (
            kwargs.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE) != TruncationStrategy.DO_NOT_TRUNCATE
        )
        limit = kwargs.get("max_length") if cuts else None
        without_special = functools.partial(_count, cls, self, special=False)
        for each in [text] if isinstance(text, str) else text:
            if isinstance(each, str):
                on_text(each, _count(cls, self, each, special), limit, without_special)
        return encoding

    members = {"__module__": cls.__module__, "__class__": property(lambda self: cls), "_encode_plus": encode_plus}
    return type(cls.__name__, (cls,), members)


def _count(cls: Any, tokenizer: Any, text: str, special: bool) -> int:
    return len(cls._encode_plus(tokenizer, text, add_special_tokens=special, verbose=False)["input_ids"])


class TextsRead:
    """What of one request's texts its tokenizers left out.

    `sequence_length`: tokens that the pipeline keeps of a text, where its call has such an argument.
    """

    def __init__(self, arguments: dict[str, Any], sequence_length: int | None) -> None:
        self._texts = {name: text for name, value in arguments.items() for text in _texts(value)}
        self._sequence_length = sequence_length
        self.cut: dict[str, tuple[int, int]] = {}  # argument -> tokens, and how many of them the strictest reads

    def note(self, text: str, tokens: int, limit: int | None, count: Callable[[str], int]) -> None:
        name = self._argument_of(text)
        if name is None:
            return
        if limit is not None and tokens > limit:
            self._note(name, tokens, limit)
        elif self._sequence_length is not None and tokens > self._sequence_length:
            alone = count(self._texts[name])  # the rest is a template, which the pipeline drops
            if alone > self._sequence_length:
                self._note(name, alone, self._sequence_length)

    def _note(self, name: str, tokens: int, limit: int) -> None:
        if name not in self.cut or limit < self.cut[name][1]:
            self.cut[name] = tokens, limit

    def _argument_of(self, text: str) -> str | None:
        """The longest of the caller's texts that is in it, whatever a pipeline made of its spaces and cases."""
        plain = _plain(text)
        found = [name for name, own in self._texts.items() if _plain(own)[:200] in plain]
        return max(found, key=lambda name: len(self._texts[name]), default=None)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
