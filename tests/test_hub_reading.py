"""Models and data from the Hub: by id and revision, tried again where that helps, refused in one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_distill.data import load_collection, save_collection

from .hub_client import RemoteError


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def weights(name, revision=None):
    from hf_distill.models import load_model

    model = load_model(name, revision=revision)
    return model.weights_fingerprint(), model.source.revision


def texts(name, revision=None):
    from hf_distill.data import load_collection

    collection = load_collection(name, revision=revision)
    return collection.fingerprint, collection.revision


@pytest.fixture()
def model_files(tiny_bert):
    return files_in(tiny_bert)


@pytest.fixture()
def data_files(micro, tmp_path):
    save_collection(load_collection(micro), tmp_path / "collection")
    return files_in(tmp_path / "collection")


def test_a_model_by_id_and_revision(hub, hub_client, model_files, tiny_bert):
    repo = hub.add_repo("alice/bert", model_files, private=True)
    repo.tags["v1"] = repo.at().oid
    here = hub_client(weights, str(tiny_bert))[0]
    assert hub_client(weights, "alice/bert", "v1") == (here, repo.tags["v1"])
    assert hub_client(weights, "alice/bert@v1") == (here, repo.tags["v1"])


def test_data_by_id_and_revision(hub, hub_client, data_files, micro):
    repo = hub.add_repo("alice/micro", data_files, kind="dataset", private=True)
    first = repo.at().oid
    assert hub_client(texts, "alice/micro", first) == (load_collection(micro).fingerprint, first)
    assert hub_client(texts, "alice/micro")[1] == first


@pytest.mark.parametrize(("read", "kind"), [(weights, "model"), (texts, "dataset")])
@pytest.mark.parametrize("fault", ["refuse", 500, 503, 429])
def test_a_fault_that_passes(hub, hub_client, model_files, data_files, read, kind, fault):
    """Once while the Hub is asked, once in a download: the second try gets it."""
    name = f"alice/{kind}-{fault}"
    hub.add_repo(name, model_files if kind == "model" else data_files, kind=kind)
    hub.fail(f"/api/{kind}s/{name}", fault)
    hub.fail(f"GET .*{name}/resolve/.*(safetensors|parquet)", fault)
    hub_client(read, name)
    assert all(one.seen > 1 for one in hub.faults)


@pytest.mark.parametrize(("read", "kind"), [(weights, "model"), (texts, "dataset")])
def test_what_is_not_given(hub, hub_client, model_files, data_files, read, kind):
    files = model_files if kind == "model" else data_files
    hub.add_repo(f"alice/secret-{kind}", files, kind=kind, private=True)
    hub.add_repo(f"alice/gated-{kind}", files, kind=kind, gated=True)
    bob = {"HF_TOKEN": "hf_bob"}
    for name, revision, env, words in (
        (f"alice/no-such-{kind}", None, {}, "hf auth login"),
        (f"alice/secret-{kind}", None, bob, "hf auth login"),
        (f"alice/secret-{kind}", None, {"HF_TOKEN": None}, "hf auth login"),
        (f"alice/gated-{kind}", None, bob, "gated.*Ask for access.*hf auth login"),
        (f"alice/secret-{kind}", "v9", {}, "revision"),
    ):
        with pytest.raises(RemoteError, match=words) as error:
            hub_client(read, name, revision, env=env)
        assert error.value.kind == "InputError" and name in error.value.message and "\n" not in error.value.message
        assert "hf_bob" not in error.value.message and not hub_client.sleeps


def test_a_damaged_file_is_refused_and_fetched_anew(hub, hub_client, model_files, data_files):
    hub.add_repo("alice/damaged", model_files)
    hub.fail(r"GET .*model\.safetensors", "corrupt")
    with pytest.raises(RemoteError, match="model.safetensors: the downloaded file is damaged.*start the same command"):
        hub_client(weights, "alice/damaged")
    hub_client(weights, "alice/damaged")
    hub.add_repo("alice/damaged-rows", data_files, kind="dataset")
    hub.fail(r"GET .*corpus.*\.parquet", "corrupt")
    with pytest.raises(RemoteError, match="corpus.*parquet: the downloaded file is damaged"):
        hub_client(texts, "alice/damaged-rows")
    hub_client(texts, "alice/damaged-rows")


def test_a_broken_card_and_a_loading_script(hub, hub_client, data_files):
    broken = {**data_files, "README.md": b"---\nconfigs: [a: b: c\n---\n# text\n"}
    hub.add_repo("alice/broken", broken, kind="dataset")
    with pytest.raises(RemoteError, match="alice/broken.*") as error:
        hub_client(texts, "alice/broken")
    assert error.value.kind == "InputError" and "YAML" in error.value.message, error.value.message
    hub.add_repo("alice/script", {"script.py": b"import datasets\nraise SystemExit('I ran')\n"}, kind="dataset")
    with pytest.raises(RemoteError, match="never run") as error:
        hub_client(texts, "alice/script")
    assert error.value.kind == "LoadingScriptError"
