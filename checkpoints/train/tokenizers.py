"""Word-level tokenizers in the pipelines' own classes: one token for a known word, harmless ones for others."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from checkpoints.train.prompts import words

PUNCTUATION = ",.!?-'\":;"
CLIP_MAX_LENGTH = 77
T5_MAX_LENGTH = 512


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's lower-casing byte BPE whose merges make every known word one token; unknown words become pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, initial_alphabet=[], end_of_word_suffix="</w>", min_frequency=1, show_progress=False
    )
    learner.train_from_iterator([word for word in words() if word.isalpha()], trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    vocab: dict[str, int] = {}
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    for piece in [*pieces, start, end]:
        vocab.setdefault(piece, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_MAX_LENGTH)


def t5_tokenizer(known_words: Iterable[str]) -> T5TokenizerFast:
    """T5's unigram tokenizer over these words; each word also as Title and UPPER piece, as T5 does not fold case."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(sign, -4.0) for sign in PUNCTUATION]
    pieces += [("▁" + form, -3.0) for form in case_forms(known_words)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=T5_MAX_LENGTH)


def case_forms(known_words: Iterable[str]) -> dict[str, str]:
    """Each written form of each known word -> the word in lower case (in order, without repeats)."""
    forms: dict[str, str] = {}
    known_words = list(known_words)
    for form_of in (str.lower, str.capitalize, str.upper):
        for word in known_words:
            forms.setdefault(form_of(word), word)
    return forms
