"""What a folder holds, and how it goes to the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.cards import read_card
from ..errors import InputError
from ..files import read_json, write_json, write_text
from .checkpoints import LAST, STATE, native_files
from .manifest import with_files
from .push import MANIFEST, Pushed, Target, files_of, push_folder, push_later
from .row_sets import write_row_repository


if TYPE_CHECKING:
    from ..data import RowSet

# What a folder can hold, and the kind of repository that it goes to.
REPO_KINDS = {
    "model": "model",
    "checkpoint": "model",
    "rows": "dataset",
    "collection": "dataset",
    "dataset": "dataset",
    "space": "space",
}
_DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".arrow", ".csv", ".tsv")


def kind_of(folder: Path) -> str:
    """What a folder holds: one of `REPO_KINDS`.

    Raises:
        InputError: If it is no folder, or nothing that belongs on the Hub is recognised in it.
    """
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), cure="Name the folder of a model, of rows or of data")
    if (folder / STATE).is_file():
        return "checkpoint"
    if any((folder / name).is_file() for name in ("modules.json", "config.json", "model.safetensors")):
        return "model"
    if (folder / "metadata.json").is_file() and any(folder.glob("*.parquet")):
        return "rows"
    card = read_card(folder / "README.md")[0] if (folder / "README.md").is_file() else {}
    if "sdk" in card:
        return "space"
    names = {entry.name.split(".")[0] for entry in folder.iterdir()}
    if "corpus" in names and "queries" in names:
        return "collection"
    if "configs" in card or any(path.endswith(_DATA_SUFFIXES) for path in files_of(folder)):
        return "dataset"
    raise InputError(
        "neither a model, nor rows, nor data are recognised in it",
        where=str(folder),
        cure="Name the folder that holds them; with --repo_type model, dataset or space all files go as they are",
    )


def push_artefact(
    folder: str | Path, target: Target, *, kind: str | None = None, message: str | None = None
) -> Pushed:
    """Pushes a model, a checkpoint, a collection or any other folder; for row sets see [`push_rows`].

    Args:
        folder: What to push.
        target: Where; its `kind` is that of the repository.
        kind: What the folder holds, see [`kind_of`]; None to push all files as they are.
        message: Of the commit.
    """
    folder = Path(folder)
    if kind == "collection" and not (folder / "README.md").is_file():
        # Of another layout, in which `datasets` would not find corpus, queries and judgements.
        with _temporary(folder) as made:
            from ..data import load_collection, save_collection

            save_collection(load_collection(folder), made)
            target, later = replace(target, mirror=True), push_later(folder, target.repo_id)
            return push_folder(folder, target, message=message, files=files_of(made), later=later)
    files = files_of(folder)
    if kind == "checkpoint":
        files = {**native_files(folder), **{f"{LAST}/{path}": file for path, file in files.items()}}
    with _temporary(folder) as made:
        if kind == "model" and "README.md" in files:
            files |= _named_card(files, folder.resolve().name, target.repo_id, made)
        return push_folder(folder, target, message=message, files=files)


def push_rows(
    rows: RowSet,
    folder: str | Path,
    target: Target,
    *,
    name: str | None = None,
    num_negatives: int | None = None,
    template: str | None = None,
    data: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Pushes a row set with its texts and a card, so that sentence-transformers and PyLate train on it as it is.

    Args:
        rows: The row set.
        folder: Where it is saved; its manifest comes along, and a failure's message names it.
        target: Where it goes.
        name: Of the full row set in the repository; by default the source's of its negatives.
        num_negatives, template: See [`write_row_repository`].
        data: The collection, for the command in a failure's message.
        message: Of the commit.
    """
    folder = Path(folder)
    later = push_later(folder, target.repo_id, *(["--data", data] if data else []))
    with _temporary(folder) as made:
        write_row_repository(
            rows,
            made,
            target.repo_id,
            name or rows.metadata.get("mining", {}).get("source") or folder.resolve().name,
            manifest=folder / MANIFEST,
            num_negatives=num_negatives,
            template=template,
        )
        target = replace(target, mirror=True)
        return push_folder(folder, target, message=message, files=files_of(made), later=later)


def collection_of(folder: Path) -> tuple[str, str | None] | None:
    """Name and revision of a saved row set's collection: the folder around it, or what it was made of."""
    around = folder.resolve().parent
    if (around / "README.md").is_file() and (around / "corpus").exists():
        return str(around), None
    if (folder / MANIFEST).is_file():
        for one in read_json(folder / MANIFEST).get("sources", ()):
            if one.get("kind") == "data":
                return str(one["name"]), one.get("revision")
    return None


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder beside nothing of the user's, for what is made only to be pushed."""
    made = Path(tempfile.mkdtemp(prefix="hf_distill-push-"))
    try:
        yield made / folder.resolve().name.lstrip(".")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _named_card(files: Mapping[str, Path], name: str, repo_id: str, made: Path) -> dict[str, Path]:
    """The model card with the repository's id in place of the folder's name in its example, and a manifest with the
    hash of that card; nothing where the card names no folder."""
    text = files["README.md"].read_text(encoding="utf-8")
    named = text.replace(f'("{name}")', f'("{repo_id}")')
    if named == text:
        return {}
    changed = {"README.md": made / "README.md"}
    write_text(changed["README.md"], named)
    manifest = read_json(files[MANIFEST]) if MANIFEST in files else {}
    if "README.md" in manifest.get("artefacts", {}):
        changed[MANIFEST] = made / MANIFEST
        write_json(changed[MANIFEST], with_files(manifest, {"README.md": changed["README.md"]}))
    return changed
