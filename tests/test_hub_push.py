"""Pushing a folder: one commit, every fault in every phase, and nobody's run is overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from hf_distill.data import load_collection
from hf_distill.hub.client import PATIENCE, split_revision

from .hub_client import RemoteError, verb


# The phases of a push into a new repository, in the order in which they come.
PHASES = ("info", "create", "validate", "preupload", "batch", "put", "complete", "verify", "commit")
# `complete` ends an upload in several parts.
PART_SIZES = {"complete": 4096}
PASSING = ("refuse", "cut", "lose", "slow", 409, 429, 500, 503)
LASTING = (401, 403, "delete")


def push(folder, repo_id, **options):
    from hf_distill.hub import Target, push_folder

    pushed = push_folder(folder, Target(repo_id, **options))
    return {"repo_id": pushed.repo_id, "commit": pushed.commit, "changed": pushed.changed, "url": pushed.url}


def push_each(folder, cases):
    """Pushes once for each case; the answers say how it went."""
    from hf_distill.errors import HubError

    answers = []
    for repo_id in cases:
        try:
            answers.append(push(folder, repo_id)["changed"])
        except HubError as error:
            answers.append(str(error))
    return answers


@pytest.fixture()
def student(tmp_path):
    """A folder as a run leaves it; the weights need several parts on the way to the Hub when `part_size` is small."""
    folder = tmp_path / "student"
    files = {
        "README.md": b"---\ntags: [x]\n---\n# A card\n",
        "model.safetensors": bytes(range(256)) * 40,
        "1_Pooling/config.json": b"{}",
        "run_manifest.json": json.dumps({"settings": {"seed": 1}, "made": "today"}).encode(),
        "checkpoint-5/model.safetensors": b"not part of the result",
        "no_teacher/model.safetensors": b"nor this",
        ".lock": b"",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


RESULT = {"README.md", "model.safetensors", "1_Pooling/config.json", "run_manifest.json"}


def test_one_commit_with_all_files_and_none_without_a_change(hub, hub_client, student):
    first = hub_client(push, student, "student", private=True)
    repo = hub.repo("alice/student")
    assert first["repo_id"] == "alice/student" and first["changed"] and repo.private
    assert first["url"] == f"{hub.url}/alice/student"
    assert set(repo.files()) == RESULT and repo.history() == ["Push student", "initial commit"]
    assert all(repo.files()[name] == (student / name).read_bytes() for name in RESULT)
    again = hub_client(push, student, "alice/student")
    assert not again["changed"] and again["commit"] == first["commit"] and len(repo.history()) == 2
    assert "no new commit" in hub_client.log[-1]


def test_what_an_earlier_push_left_is_removed(hub, hub_client, student):
    (student / "runs").mkdir()
    (student / "runs" / "old.trec").write_text("1 Q0 2 1 1.0 x\n")
    hub_client(push, student, "alice/student")
    (student / "runs" / "old.trec").rename(student / "runs" / "new.trec")
    (student / "model.safetensors").rename(student / "model-00001-of-00001.safetensors")
    hub_client(push, student, "alice/student")
    files = set(hub.repo("alice/student").files())
    assert "runs/new.trec" in files and "runs/old.trec" not in files
    assert "model-00001-of-00001.safetensors" in files and "model.safetensors" not in files


def test_a_branch_and_a_large_file_in_parts(hub, hub_client, student, monkeypatch):
    monkeypatch.setattr(hub, "part_size", 4096)
    hub_client(push, student, "alice/student", revision="dev/x")
    assert set(hub.repo("alice/student").files("dev/x")) == RESULT
    assert hub.repo("alice/student").files() == {}
    assert hub.phases().count("put") == 3 and "complete" in hub.phases()


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again(hub, hub_client, student, kind, monkeypatch):
    """A fault once, in every phase: the push succeeds, and the repository holds exactly the folder."""
    for phase in PHASES:
        hub.blobs.clear()
        monkeypatch.setattr(hub, "part_size", PART_SIZES.get(phase, 5_000_000))
        name = f"alice/once-{phase}"
        fault = hub.fail(_only(name, phase), kind, seconds=0.1, retry_after=7 if kind == 429 else None)
        assert hub_client(push_each, student, [name]) == [True], phase
        assert fault.seen, "it struck"
        repo = hub.repo(name)
        assert all(repo.files()[file] == (student / file).read_bytes() for file in RESULT)
        assert repo.history() == ["Push student", "initial commit"], name
        if kind == 429:
            assert any(seconds >= 7 for seconds in hub_client.sleeps), "Retry-After is kept to"


def _only(name, phase):
    """A pattern of the requests of one phase for one repository; uploads know no repository, so they get all."""
    return {
        "info": f"GET /api/models/{name}/revision|GET /api/models/{name}$",
        "create": "POST /api/repos/create",
        "validate": "POST /api/validate-yaml",
        "preupload": f"{name}/preupload",
        "batch": rf"{name}\.git/info/lfs",
        "put": "PUT /lfs/put",
        "complete": "POST /lfs/complete",
        "verify": "POST /lfs/verify",
        "commit": f"{name}/commit",
    }[phase]


@pytest.mark.parametrize("phase", PHASES)
def test_what_stays_ends_with_one_sentence_and_nothing_lost(hub, hub_client, student, phase, monkeypatch):
    """A fault that does not pass, of every kind, in one phase: the folder is untouched, the sentence says it all."""
    monkeypatch.setattr(hub, "part_size", PART_SIZES.get(phase, 5_000_000))
    before, kinds = contents(student), [*(kind for kind in PASSING if kind not in ("lose", "slow")), *LASTING]
    for number, kind in enumerate(kinds):
        hub.blobs.clear()
        hub.faults.clear()
        name = f"alice/{phase}-{number}"
        if kind == "delete" and phase == "create":
            continue  # there is nothing to delete yet
        hub.fail(_only(name, phase), kind, times=float("inf"))
        (answer,) = hub_client(push_each, student, [name])
        if kind == "delete" and phase in ("info", "validate", "put", "complete", "verify") and answer is True:
            continue  # gone before anything was in it, and made anew
        assert isinstance(answer, str), (kind, answer)
        assert answer.startswith(f"{student} is complete on this machine but was not pushed to {name}: "), answer
        assert answer.endswith(f"hf-distill push {student} --repo_id {name}."), answer
        assert _MEANINGS[kind] in answer, (kind, answer)
        assert "hf_alice" not in answer and "\n" not in answer and answer.count(". ") <= 2
        if kind in (401, 403, "delete"):
            assert not hub_client.sleeps, "no waiting where it cannot help"
        assert sum(hub_client.sleeps) <= 5 * PATIENCE
        hub.faults.clear()
        assert hub_client(push_each, student, [name]) == [True], "what the sentence recommends"
        assert set(hub.repo(name).files()) == RESULT
    assert contents(student) == before


_MEANINGS = {
    "refuse": "the Hub cannot be reached",
    "cut": "the Hub cannot be reached",
    401: "401",
    403: "this account may not write there (403)",
    409: "another change is in progress there (409)",
    429: "the Hub takes no more requests for now (429)",
    500: "the Hub failed (500)",
    503: "the Hub failed (503)",
    "delete": "404",
}


def test_a_hub_that_is_not_there(hub, hub_client, student):
    with hub.down(), pytest.raises(RemoteError, match="cannot be reached .*refused.*Push it later with: hf-distill"):
        hub_client(push, student, "alice/student")
    assert len(hub_client.sleeps) == 4
    hub.fail("commit", "slow", seconds=0.5)
    assert hub_client(push, student, "alice/student")["changed"]


def _push_with_little_patience(folder, repo_id):
    from hf_distill.hub import client

    client.SILENCE, before = 0.2, client.SILENCE
    try:
        return push(folder, repo_id)
    finally:
        client.SILENCE = before


def test_a_hub_that_says_nothing_for_long(hub, hub_client, student):
    hub.fail("commit", "slow", seconds=0.6)
    assert hub_client(_push_with_little_patience, student, "alice/student")["changed"]
    assert any("cannot be reached" in line and "trying again" in line for line in hub_client.log)
    assert len(hub.repo("alice/student").history()) == 2


def test_a_wait_that_is_too_long_is_not_waited_for(hub, hub_client, student):
    hub.fail("commit", 429, retry_after=3600)
    with pytest.raises(RemoteError, match="429"):
        hub_client(push, student, "alice/student")
    assert not [seconds for seconds in hub_client.sleeps if seconds > PATIENCE]


@pytest.mark.parametrize(
    ("token", "sentence"),
    [(None, "nobody is logged in"), ("hf_wr0ng", "does not know the token"), ("hf_bob", "may not write there")],
    ids=["nobody", "unknown", "stranger"],
)
def test_who_may_not_push(hub, hub_client, student, token, sentence):
    hub.add_repo("alice/student")
    with pytest.raises(RemoteError, match=f"{sentence}.*later after `hf auth login` with") as error:
        hub_client(push, student, "alice/student", env={"HF_TOKEN": token})
    assert error.value.kind == "HubError" and "hf_wr0ng" not in str(error.value)
    assert hub.repo("alice/student").files() == {}


def test_another_run_is_not_overwritten(hub, hub_client, student):
    hub_client(push, student, "alice/student")
    manifest = student / "run_manifest.json"
    manifest.write_text(json.dumps({"settings": {"seed": 1}, "made": "tomorrow"}))
    assert hub_client(push, student, "alice/student")["changed"], "the same run, later"
    manifest.write_text(json.dumps({"settings": {"seed": 2}}))
    with pytest.raises(RemoteError, match="holds another run.*--overwrite true") as error:
        hub_client(push, student, "alice/student")
    assert error.value.kind == "InputError"
    assert b'"tomorrow"' in hub.repo("alice/student").files()["run_manifest.json"]
    assert hub_client(push, student, "alice/student", overwrite=True)["changed"]
    manifest.unlink()
    with pytest.raises(RemoteError, match="another run"):
        hub_client(push, student, "alice/student")


def test_files_of_unknown_origin_are_not_overwritten_but_a_readme_is(hub, hub_client, student):
    hub.add_repo("alice/full", {"config.json": b"{}"})
    with pytest.raises(RemoteError, match="files that no such run has made"):
        hub_client(push, student, "alice/full")
    hub.add_repo("alice/begun", {"README.md": b"# soon", "LICENSE": b"mine"})
    assert hub_client(push, student, "alice/begun")["changed"]


def _push_while_another_does(folder, repo_id):
    """A run of other settings pushes between this run's look at the repository and its commit."""
    from huggingface_hub import HfApi

    commit, calls = HfApi.create_commit, []

    def late(self, *args, **kwargs):
        if not calls:
            calls.append(1)
            self.upload_file(
                path_or_fileobj=json.dumps({"settings": {"seed": 9}}).encode(),
                path_in_repo="run_manifest.json",
                repo_id=repo_id,
            )
        return commit(self, *args, **kwargs)

    HfApi.create_commit = late
    try:
        return push(folder, repo_id)
    finally:
        HfApi.create_commit = commit


def test_two_runs_at_the_same_moment(hub, hub_client, student):
    with pytest.raises(RemoteError, match="holds another run"):
        hub_client(_push_while_another_does, student, "alice/student")
    assert set(hub.repo("alice/student").files()) == {"run_manifest.json"}, "no mixture of two runs"


def test_a_token_in_a_file_is_not_published(hub, hub_client, student):
    (student / "training_args.json").write_text('{"hub_token": "hf_alice"}')
    with pytest.raises(RemoteError, match="training_args.json: the file holds your Hub token") as error:
        hub_client(push, student, "alice/student")
    assert "hf_alice" not in str(error.value) and ("model", "alice/student") not in hub.repos


def test_a_card_with_broken_yaml(hub, hub_client, student):
    (student / "README.md").write_text("---\ntags: [a: b: c\n---\n# A card\n")
    with pytest.raises(RemoteError, match="not pushed to alice/student: Invalid metadata in README.md"):
        hub_client(push, student, "alice/student")
    assert hub.repo("alice/student").files() == {} and not hub_client.sleeps


def test_revisions_in_names():
    assert split_revision("me/rows@v1") == ("me/rows", "v1")
    assert split_revision("me/rows") == ("me/rows", None)


# ---- hf-distill push ----


def test_what_a_folder_holds_decides(hub, hub_client, micro, tiny_bert, tmp_path):
    (tiny_bert / "README.md").write_text('---\ntags: [x]\n---\nSentenceTransformer("tiny-bert")\n')
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(tiny_bert, checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    space = tmp_path / "space"
    space.mkdir()
    (space / "README.md").write_text("---\nsdk: gradio\n---\n")
    (space / "app.py").write_text("")
    for number, (folder, kind) in enumerate(
        [(tiny_bert, "model"), (checkpoint, "model"), (micro, "dataset"), (space, "space")]
    ):
        code, errors = hub_client(verb, "push", folder, "--repo_id", f"alice/thing-{number}", "--private", "true")
        assert code == 0, errors
        assert hub.repo(f"alice/thing-{number}", kind).private
    assert b'SentenceTransformer("alice/thing-0")' in hub.repo("alice/thing-0").files()["README.md"]
    assert b'("tiny-bert")' in (tiny_bert / "README.md").read_bytes(), "the folder stays as it is"
    files = set(hub.repo("alice/thing-1").files())
    assert {"model.safetensors", "last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= files
    assert "optimizer.pt" not in files
    assert {"README.md", "qrels/dev.parquet"} <= set(hub.repo("alice/thing-2", "dataset").files()), "in our layout"
    assert hub_client(_fingerprint, "alice/thing-2") == load_collection(micro).fingerprint


def _fingerprint(name):
    from hf_distill.data import load_collection

    return load_collection(name).fingerprint


def test_the_manifest_of_a_pushed_model_fits_the_card_that_names_the_repository(hub, hub_client, student):
    from hf_distill.hub.manifest import artefacts

    (student / "README.md").write_text('---\ntags: [x]\n---\nSentenceTransformer("student")\n')
    manifest = json.loads((student / "run_manifest.json").read_text())
    (student / "run_manifest.json").write_text(json.dumps({**manifest, "artefacts": artefacts(student)}))
    before = contents(student)
    assert hub_client(verb, "push", student, "--repo_id", "alice/other-name")[0] == 0
    files = hub.repo("alice/other-name").files()
    assert b'SentenceTransformer("alice/other-name")' in files["README.md"]
    told = json.loads(files["run_manifest.json"])["artefacts"]
    assert {name: facts["sha256"] for name, facts in told.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "run_manifest.json"
    }
    assert contents(student) == before
    head = hub.repo("alice/other-name").at().oid
    assert hub_client(verb, "push", student, "--repo_id", "alice/other-name")[0] == 0
    assert hub.repo("alice/other-name").at().oid == head, "no change, no commit"


def test_what_cannot_be_pushed(hub, hub_client, tmp_path):
    (tmp_path / "empty").mkdir()
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "metadata.json").write_text("{}")
    (rows / "train.parquet").write_bytes(b"PAR1")
    for words, sentence in (
        ([], "still needs --folder (what to push), --repo_id (where to, you/name)"),
        ([tmp_path / "nowhere", "--repo_id", "alice/x"], "no such folder"),
        ([tmp_path / "empty", "--repo_id", "alice/x"], "neither a model, nor rows, nor data are recognised"),
        ([tmp_path / "empty", "--repo_id", "alice/x", "--repo_type", "model"], "nothing to push"),
        ([tmp_path / "empty", "--repo_id", "a/b/c"], "'a/b/c' is no id of a repository"),
        ([rows, "--repo_id", "alice/x"], "the collection that it belongs to is not known. Name it with --data"),
    ):
        code, errors = hub_client(verb, "push", *words)
        assert code == 2 and sentence in errors, errors
    assert not hub.repos
