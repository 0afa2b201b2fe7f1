"""The Hub on loopback is enough of a Hub for the real clients; what it is told to do wrong, it does."""

from __future__ import annotations

import pytest

from .hub_client import RemoteError


def _clients_round_trip(folder):
    """Everything that huggingface_hub does with a repository, in one go."""
    import datasets
    from huggingface_hub import HfApi, snapshot_download

    api, seen = HfApi(), {}
    seen["name"] = api.whoami()["name"]
    api.create_repo("alice/model", private=True)
    seen["again"] = api.create_repo("alice/model", exist_ok=True).repo_id
    first = api.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="all")
    second = api.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="nothing new")
    seen["same_commit"] = first.oid == second.oid
    api.create_branch("alice/model", branch="dev/x")
    api.create_tag("alice/model", tag="v1")
    api.upload_file(repo_id="alice/model", path_in_repo="a/b.txt", path_or_fileobj=b"on a branch", revision="dev/x")
    seen["refs"] = sorted(ref.name for ref in api.list_repo_refs("alice/model").branches)
    seen["main"] = sorted(api.list_repo_files("alice/model"))
    seen["branch"] = sorted(api.list_repo_files("alice/model", revision="dev/x"))
    downloaded = snapshot_download("alice/model", revision="v1")
    seen["equal"] = all(
        (folder / name).read_bytes() == open(f"{downloaded}/{name}", "rb").read()
        for name in ("README.md", "model.safetensors")
    )
    rows = datasets.Dataset.from_dict({"number": list(range(100))})
    rows.push_to_hub("alice/rows", config_name="numbers", num_shards=2)
    seen["rows"] = datasets.load_dataset("alice/rows", "numbers", split="train")["number"][:3]
    stream = datasets.load_dataset("alice/rows", "numbers", split="train", streaming=True)
    seen["stream"] = sum(row["number"] for row in stream)
    api.delete_repo("alice/rows", repo_type="dataset")
    seen["gone"] = not api.repo_exists("alice/rows", repo_type="dataset")
    return seen


def test_the_real_clients(hub, hub_client, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 24_000)  # more than one part
    seen = hub_client(_clients_round_trip, tmp_path)
    assert seen == {
        "name": "alice",
        "again": "alice/model",
        "same_commit": True,
        "refs": ["dev/x", "main"],
        "main": [".gitattributes", "README.md", "model.safetensors"],
        "branch": [".gitattributes", "README.md", "a/b.txt", "model.safetensors"],
        "equal": True,
        "rows": [0, 1, 2],
        "stream": 4950,
        "gone": True,
    }
    assert hub.repo("alice/model").private
    assert {"batch", "put", "complete", "verify", "commit"} <= set(hub.phases())
    assert any(request.status == 206 for request in hub.requests), "streaming reads ranges"


def _info(name, **options):
    from huggingface_hub import HfApi

    return HfApi().model_info(name, **options).id


def _download(name, file):
    from huggingface_hub import hf_hub_download

    return open(hf_hub_download(name, file), "rb").read()


@pytest.mark.parametrize(
    ("token", "kind"),
    [(None, "RepositoryNotFoundError"), ("hf_bob", "RepositoryNotFoundError"), ("hf_wrong", "HfHubHTTPError")],
)
def test_a_private_repository(hub, hub_client, token, kind):
    hub.add_repo("alice/secret", private=True)
    assert hub_client(_info, "alice/secret") == "alice/secret"
    with pytest.raises(RemoteError) as error:
        hub_client(_info, "alice/secret", env={"HF_TOKEN": token})
    assert error.value.kind == kind
    assert kind != "HfHubHTTPError" or "Invalid credentials" in error.value.message


def test_a_gated_repository_and_a_missing_revision(hub, hub_client):
    hub.add_repo("alice/gated", {"config.json": b"{}"}, gated=True)
    with pytest.raises(RemoteError, match="GatedRepoError"):
        hub_client(_download, "alice/gated", "config.json", env={"HF_TOKEN": "hf_bob"})
    assert hub_client(_download, "alice/gated", "config.json") == b"{}"
    with pytest.raises(RemoteError, match="RevisionNotFoundError"):
        hub_client(_info, "alice/gated", revision="v9")


def test_faults(hub, hub_client):
    hub.add_repo("alice/model", {"a.txt": b"0123456789" * 1000, "b.txt": b"0123456789"})
    hub.fail("info", 503, nth=2)
    assert hub_client(_info, "alice/model") == "alice/model"
    with pytest.raises(RemoteError, match="503"):
        hub_client(_info, "alice/model")
    assert hub_client(_info, "alice/model") == "alice/model"
    hub.fail("GET .*a.txt", "cut")
    assert hub_client(_download, "alice/model", "a.txt") == b"0123456789" * 1000, "the client asks again"
    assert [request.status for request in hub.requests if request.path.endswith("a.txt")][-2:] == ["cut", 200]
    hub.fail("GET .*b.txt", "corrupt")
    assert hub_client(_download, "alice/model", "b.txt") == b"0123446789", "the client looks at the size alone"
    hub.fail("info", "refuse")
    with pytest.raises(RemoteError, match="reset|disconnected"):
        hub_client(_info, "alice/model")
    with hub.down(), pytest.raises(RemoteError, match="refused"):
        hub_client(_info, "alice/model")
    hub.fail("info", "slow", seconds=0.3)
    assert hub_client(_info, "alice/model") == "alice/model"
    hub.fail("info", "delete")
    with pytest.raises(RemoteError, match="RepositoryNotFoundError"):
        hub_client(_info, "alice/model")
