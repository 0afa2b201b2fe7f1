"""Tiny models made from configurations, and the micro corpus: everything the suite needs, without a network."""

from __future__ import annotations

import os


# Constants of the libraries are read when they are imported, so this stands before every other import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DISTILL_PROGRESS", "0")
# Equal bytes are promised for equal numbers of threads, here and in the processes that tests start; and pytest's
# workers have the cores between them already.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import logging
import re
import shutil
from pathlib import Path

import pytest


MICRO = Path(__file__).parent / "data" / "micro"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Every test has a cache of its own, so that no test passes thanks to another one's work."""
    monkeypatch.setenv("HF_DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _own_logging():
    """A verb that ran in a test prints the log itself from then on; the next test's `caplog` would see nothing."""
    yield
    logger = logging.getLogger("hf_distill")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def micro() -> Path:
    """A BEIR folder: about 80 passages, 40 queries, splits train, dev and test."""
    return MICRO


def _micro_texts() -> list[str]:
    texts = []
    for name in ("corpus.jsonl", "queries.jsonl"):
        for line in (MICRO / name).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            texts.append(f"{record.get('title', '')} {record['text']}")
    return texts


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A WordPiece tokenizer whose vocabulary is the micro corpus's words and the single letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = sorted({word for text in _micro_texts() for word in re.findall(r"[a-z]+", text.lower())})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *(w for w in words if len(w) > 1)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], SPECIAL_TOKENS))
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def _save_tiny(model_class, tokenizer, folder: Path, seed: int, **overrides) -> Path:
    import torch
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        **overrides,
    )
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert_source(tmp_path_factory, tiny_tokenizer) -> Path:
    from transformers import BertModel

    return _save_tiny(BertModel, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny-bert", seed=1)


@pytest.fixture(scope="session")
def tiny_ranker_source(tmp_path_factory, tiny_tokenizer) -> Path:
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-ranker"
    return _save_tiny(BertForSequenceClassification, tiny_tokenizer, folder, seed=2, num_labels=1)


@pytest.fixture()
def tiny_bert(tiny_bert_source, tmp_path) -> Path:
    """A folder with a 4-layer, 32-wide BertModel and its tokenizer; the test may change it."""
    return Path(shutil.copytree(tiny_bert_source, tmp_path / "tiny-bert"))


@pytest.fixture()
def tiny_ranker(tiny_ranker_source, tmp_path) -> Path:
    """A folder with a 4-layer, 32-wide BertForSequenceClassification of one label; the test may change it."""
    return Path(shutil.copytree(tiny_ranker_source, tmp_path / "tiny-ranker"))


@pytest.fixture(scope="session")
def hub_server():
    from .hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture()
def hub(hub_server):
    """A running Hub on loopback with the users alice and bob (tokens hf_alice, hf_bob), empty otherwise."""
    hub_server.reset()
    hub_server.add_user("alice", "hf_alice")
    hub_server.add_user("bob", "hf_bob")
    return hub_server


@pytest.fixture(scope="session")
def hub_client(hub_server, tmp_path_factory):
    """Another process, of the user alice, that talks to the Hub on loopback; see `tests/hub_client.py`."""
    from .hub_client import HubClient

    client = HubClient(hub_server.environment(tmp_path_factory.mktemp("hf_home"), token="hf_alice"))
    yield client
    client.close()
