"""Tiny tokenizers of the classes that published checkpoints use, made without any download."""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizerFast,
    Qwen2Tokenizer,
    T5TokenizerFast,
)

CORPUS = (
    "a small red cat sits on the mat and looks at the bright sun",
    "dance monkey dance bad quality blurry",
    "describe the key features of the input image",
    "system user assistant photo of a dog astronaut riding horse",
    "negative prompt low resolution worst quality",
    "picture 1: make the sky blue and the house green",
)

# Its order is its numbering in the tokenizer.
QWEN_SPECIAL_TOKENS = (
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
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's: lower case, byte-level pieces, each word ends in </w>; 517 pieces, end of text is 516."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("a", "t</w>"), ("c", "at</w>")]
    merged = [first + second for first, second in merges]
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *merged, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=_numbered(pieces), merges=merges, model_max_length=77)


def t5_tokenizer(model_max_length: int = 512) -> T5TokenizerFast:
    """T5's unigram tokenizer; UMT5 checkpoints use the same class."""
    words = sorted({word for sentence in CORPUS for word in sentence.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0 - 0.01 * index) for index, word in enumerate(words)]
    pieces += [(character, -6.0) for character in string.printable.strip()]
    return T5TokenizerFast(vocab=pieces, extra_ids=100, model_max_length=model_max_length)


def qwen2_tokenizer(extra_special_tokens: tuple[str, ...] = ()) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE with its special tokens and a chat template; fewer than 500 pieces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=1024)
    special_tokens = [*QWEN_SPECIAL_TOKENS[1:], *extra_special_tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma_tokenizer(model_max_length: int = 512) -> GemmaTokenizer:
    """Gemma's: characters and bytes, no merges; fewer than 400 pieces."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_bytes_and_characters()]
    tokenizer = GemmaTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=model_max_length)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_tokenizer(extra_special_tokens: tuple[str, ...] = ()) -> LlamaTokenizerFast:
    """Llama's: characters and bytes, no merges; fewer than 400 pieces, padding is 3."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *_bytes_and_characters()]
    tokenizer = LlamaTokenizerFast(vocab=_numbered(pieces), merges=[], pad_token="<pad>", model_max_length=512)
    if extra_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(extra_special_tokens)})
    return tokenizer


def _bytes_and_characters() -> list[str]:
    return [*(f"<0x{byte:02X}>" for byte in range(256)), *string.printable.strip(), "▁"]


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
