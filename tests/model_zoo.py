"""Tiny models of many families, made from their configurations; helpers of the model tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


TEXTS = [
    "a cat sat on the mat",
    "dogs",
    "how does the heart pump blood through the body and the lungs while a person sleeps in the night",
    "",
    "the [SEP] in the middle, and [PAD] too",
    "volcano " * 40,
]
PAIRS = [(query, passage) for query, passage in zip(TEXTS, reversed(TEXTS))] + [("a " * 50, "b " * 50), ("x", "y")]


def tokenizer_for(tokenizer: Any, padding_side: str = "right", specials: bool = True) -> Any:
    """The WordPiece tokenizer for any family; without special tokens it ends a text with [SEP], as decoders want."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if not specials:
        backend.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", tokenizer.sep_token_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=64,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        eos_token="[SEP]",
        **{
            name: f"[{name[:-6].upper()}]"
            for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        },
    )


def tiny_config(family: str, vocabulary: int, layers: int = 4, **overrides: Any) -> Any:
    """A configuration of a family with `layers` layers of width 32."""
    import transformers

    common = {"vocab_size": vocabulary, "pad_token_id": 0, **overrides}
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    decoder = encoder | {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 3, "bos_token_id": None}
    if family == "bert":
        return transformers.BertConfig(**common, **encoder)
    if family == "deberta":
        return transformers.DebertaV2Config(**common, **encoder, pooler_hidden_size=32)
    if family == "roberta":
        return transformers.RobertaConfig(**common, **encoder, type_vocab_size=1)
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": layers, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
        return transformers.DistilBertConfig(**common, **sizes)
    if family == "llama":
        return transformers.LlamaConfig(**common, **decoder)
    if family == "qwen2":
        return transformers.Qwen2Config(**common, **decoder)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
        return transformers.GPT2Config(**common, **sizes, eos_token_id=3, bos_token_id=3)
    if family == "modernbert":
        ends = {"eos_token_id": 3, "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 3}
        return transformers.ModernBertConfig(**common, **encoder, **ends)
    if family == "albert":
        return transformers.AlbertConfig(**common, **encoder, embedding_size=16)
    if family == "t5":
        return transformers.T5Config(**common, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4)
    raise KeyError(family)


def save_tiny(
    folder: Path, family: str, tokenizer: Any, *, head: str | None = None, layers: int = 4, seed: int = 0, **more: Any
) -> Path:
    """Saves a tiny checkpoint: the bare backbone, or with the `head` of an auto class such as `"MaskedLM"`."""
    import transformers

    config = tiny_config(family, len(tokenizer), layers, **more)
    torch.manual_seed(seed)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # The small initial weights would make all texts nearly alike.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vectors(model: Any, texts: list[str], kind: str, chunk_size: int | None = None) -> torch.Tensor:
    """Our embeddings, in inference mode; `chunk_size` texts at a time."""
    processor = model.processor()
    features = processor.encode(texts, kind)
    step = chunk_size or len(features)
    model.eval()
    with torch.no_grad():
        parts = [model.encode(processor.pad(features[i : i + step]), kind) for i in range(0, len(features), step)]
    return torch.cat(parts)


def pair_scores(model: Any, pairs: list[tuple[str, str]], with_types: bool = True) -> torch.Tensor:
    """Our scores of pairs, in inference mode, in one chunk."""
    processor = model.processor()
    ids, types = processor.pairs([query for query, _ in pairs], [passage for _, passage in pairs])
    model.eval()
    with torch.no_grad():
        return model.score_chunk(processor.pad(ids, types if with_types else None))


def batch_of(processor: Any, features: list[list[int]], chunks: int, types: list[list[int]] | None = None) -> dict:
    """A token batch of length-sorted chunks, as the collator makes it."""
    order = sorted(range(len(features)), key=lambda number: len(features[number]))
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    parts = []
    for part in torch.tensor(order).tensor_split(chunks):
        rows = part.tolist()
        parts.append(processor.pad([features[row] for row in rows], [types[row] for row in rows] if types else None))
    return {"chunks": parts, "inverse": inverse}


def tokenizer_of_words(vocab: Sequence[str]) -> Any:
    """A tokenizer of golden cases: every word of the list is its place there, pairs are joined as BERT does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=specials
    )
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)
