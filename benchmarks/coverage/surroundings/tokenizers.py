"""Tiny tokenizers of the classes that the tests' checkpoints use, made without any download."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from typing import Any

CORPUS = [
    "a small red cat sits on the mat and looks at the bright sun",
    "dance monkey dance bad quality blurry a painting of a squirrel eating a burger",
    "describe the key features of the input image system user assistant photo of a dog astronaut riding horse",
    "negative prompt low resolution worst quality picture 1: make the sky blue and the house green",
]
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_FIRST_SPECIAL = 151643  # where Qwen2's special tokens begin; the tests name their numbers
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    a = alphabet()
    merges = [("t", "h"), ("a", "t</w>"), ("c", "at</w>")]
    pieces = [*a, *(x + "</w>" for x in a), *(x + y for x, y in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=numbered(pieces), merges=merges, model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram()]
    return T5TokenizerFast(vocab=pieces, extra_ids=100, model_max_length=512)


def qwen2_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet(), show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    for i in range(len(vocab), QWEN_FIRST_SPECIAL):
        vocab[f"<filler_{i}>"] = i
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_SPECIAL[1:]})
    tokenizer.chat_template = CHAT
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
    return tokenizer


def gemma_tokenizer(pieces: list[str] | None = None) -> Any:
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    pieces = pieces or ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters()]
    tokenizer = GemmaTokenizer(vocab=numbered(pieces), merges=[], model_max_length=512)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.chat_template = CHAT
    return tokenizer


def llama_tokenizer(extra: tuple[str, ...] = ()) -> Any:
    from transformers import LlamaTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "<pad>", *characters()]
    tokenizer = LlamaTokenizerFast(vocab=numbered(pieces), merges=[], pad_token="<pad>", model_max_length=512)
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.chat_template = CHAT
    return tokenizer


def numbered(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def characters() -> list[str]:
    return [*(f"<0x{b:02X}>" for b in range(256)), *string.printable.strip(), "▁"]


def alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def unigram() -> list[tuple[str, float]]:
    words = sorted({w for s in CORPUS for w in s.split()})
    pieces = [("▁", -2.0)] + [("▁" + w, -3.0 - 0.01 * i) for i, w in enumerate(words)]
    return pieces + [(c, -6.0) for c in string.printable.strip()]
