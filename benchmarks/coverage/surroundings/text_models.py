"""Stand-ins for the tests' tokenizers and text encoders."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path

import torch

from benchmarks.coverage.surroundings.hub import repository
from benchmarks.coverage.surroundings.tokenizers import (
    CORPUS,
    alphabet,
    clip_tokenizer,
    gemma_tokenizer,
    llama_tokenizer,
    numbered,
    qwen2_tokenizer,
    t5_tokenizer,
    unigram,
)


@repository("hf-internal-testing/tiny-random-clip")
def _clip(folder: Path) -> None:
    clip_tokenizer().save_pretrained(folder)


T5_SIZES = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 1103}


@repository(
    "hf-internal-testing/tiny-random-t5",
    "hf-internal-testing/tiny-random-T5Model",
    "hf-internal-testing/tiny-random-T5ForConditionalGeneration",
)
def _t5(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    T5EncoderModel(T5Config(**T5_SIZES)).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-umt5")
def _umt5(folder: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(2)
    UMT5EncoderModel(UMT5Config(**T5_SIZES)).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)


@repository("Qwen/Qwen3-Embedding-0.6B", "THUDM/glm-4-9b-chat", "Qwen/Qwen2-tiny")
def _qwen_tokenizer(folder: Path) -> None:
    qwen2_tokenizer().save_pretrained(folder)


@repository("hf-internal-testing/tiny-cosmos3-modular-pipe")
def _cosmos3(folder: Path) -> None:
    qwen2_tokenizer().save_pretrained(folder / "text_tokenizer")


@repository("hf-internal-testing/tiny-random-Gemma3ForCausalLM")
def _gemma(folder: Path) -> None:
    gemma_tokenizer().save_pretrained(folder)


@repository("hf-internal-testing/dummy-gemma")
def _tiny_gemma(folder: Path) -> None:
    """Eight pieces: the tests take the logits of a model with as many as the caption's channels."""
    gemma_tokenizer(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "a", "e", "▁"]).save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-BertModel")
def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(6)
    config = BertConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=1124
    )
    BertModel(config).save_pretrained(folder)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    BertTokenizerFast(vocab=numbered(pieces), model_max_length=512).save_pretrained(folder)


@repository("YiYiXu/tiny-random-mclip-base")
def _mclip(folder: Path) -> None:
    from transformers import XLMRobertaTokenizerFast

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram(), ("<mask>", 0.0)]
    XLMRobertaTokenizerFast(vocab=pieces, model_max_length=77).save_pretrained(folder)


@repository("finetrainers/dummy-hunyaunvideo")
def _hunyuan(folder: Path) -> None:
    llama_tokenizer(("<image>",)).save_pretrained(folder / "tokenizer")


@repository("hf-internal-testing/llama-tokenizer")
def _llama_tokenizer(folder: Path) -> None:
    llama_tokenizer().save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-LlamaForCausalLM")
def _llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-chatglm3-6b")
def _chatglm(folder: Path) -> None:
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "corpus.txt"
        text.write_text("\n".join(CORPUS * 4))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=f"{place}/tokenizer",
            vocab_size=120,
            model_type="bpe",
            character_coverage=1.0,
            byte_fallback=False,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        (folder / "tokenizer.model").write_bytes((Path(place) / "tokenizer.model").read_bytes())
    tokenizer = ChatGLMTokenizer(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(6)
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=200,
        hidden_size=8,
        ffn_hidden_size=8,
        kv_channels=4,
        num_attention_heads=2,
        seq_length=512,
        multi_query_attention=True,
        multi_query_group_num=2,
        rmsnorm=True,
        add_qkv_bias=True,
        post_layer_norm=True,
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        original_rope=True,
        apply_residual_connection_post_layernorm=False,
        bias_dropout_fusion=True,
        interleaved_qkv=False,
        attention_softmax_in_fp32=True,
        apply_query_key_layer_scaling=True,
        fp32_residual_connection=False,
    )
    model = ChatGLMModel(config)
    with torch.no_grad():  # it is built without values
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.1)
    model.save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-roberta")
def _roberta(folder: Path) -> None:
    from transformers import RobertaTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet()]
    RobertaTokenizerFast(vocab=numbered(pieces), merges=[], model_max_length=77).save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-ClapModel")
def _clap(folder: Path) -> None:
    from transformers import ClapFeatureExtractor

    ClapFeatureExtractor(feature_size=64, max_length_s=1, sampling_rate=16000).save_pretrained(folder)
