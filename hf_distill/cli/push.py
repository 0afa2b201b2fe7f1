"""`hf-distill push`: anything that was made offline goes to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..settings import option
from .parsing import Verb, leading_words, require


@dataclass
class PushOptions:
    """What to push, and where."""

    _argument_group_name = "push"

    folder: str | None = option(None, "What to push (may stand first, without the flag).")
    repo_id: str | None = option(None, "The repository: you/name.")
    repo_type: str | None = option(
        None,
        "Push all files as they are into such a repository. Default: what the folder holds decides.",
        choices=["model", "dataset", "space"],
    )
    private: bool | None = option(None, "Whether a new repository is private. Default: as the account is set up.")
    revision: str | None = option(None, "The branch; it is made if there is none. Default: main.")
    message: str | None = option(None, "Message of the commit.")
    overwrite: bool = option(False, "Replace the files of another run in the repository.")
    data: str | None = option(
        None, "For rows: the collection that they belong to. Default: what their manifest names, or the folder around."
    )
    data_revision: str | None = option(None, "Its branch, tag or commit on the Hub.")
    name: str | None = option(None, "For rows: the name of the full row set. Default: the source of its negatives.")
    num_negatives: int | None = option(
        None, "For rows: negatives of each row in the config 'train'. Default: what nine tenths of the rows have."
    )
    template: str | None = option(
        None, "For rows: how title and text of a passage become one string. Default: as the retriever read them."
    )
    cache_dir: str | None = option(
        None, "Where prepared data is kept. Default: $HF_DISTILL_CACHE or ~/.cache/hf_distill."
    )


def run(options: PushOptions) -> None:
    """Finds out what the folder holds, and pushes it in one commit."""
    require("push", folder=(options.folder, "what to push"), repo_id=(options.repo_id, "where to, you/name"))
    from ..hub.artefacts import REPO_KINDS, kind_of, push_artefact
    from ..hub.client import check_repo_id
    from ..hub.push import Target

    folder = Path(options.folder)
    check_repo_id(options.repo_id, "--repo_id")
    kind = kind_of(folder) if options.repo_type is None else None
    target = Target(
        options.repo_id,
        kind=options.repo_type or REPO_KINDS[kind],
        private=options.private,
        revision=options.revision,
        overwrite=options.overwrite,
    )
    if kind == "rows":
        _push_rows(folder, target, options)
    else:
        push_artefact(folder, target, kind=kind, message=options.message)


def _push_rows(folder: Path, target: object, options: PushOptions) -> None:
    from ..data import RowSet, load_collection
    from ..hub.artefacts import collection_of, push_rows

    data, revision = options.data, options.data_revision
    if data is None:
        found = collection_of(folder)
        if found is None:
            raise InputError(
                "a row set holds ids, and the collection that it belongs to is not known",
                where=str(folder),
                cure="Name it with --data",
            )
        data, revision = found
    collection = load_collection(data, revision=revision, cache_dir=options.cache_dir)
    rows = RowSet.load(folder, collection.queries, collection.corpus, cache_dir=options.cache_dir)
    push_rows(
        rows,
        folder,
        target,
        name=options.name,
        num_negatives=options.num_negatives,
        template=options.template,
        data=data,
        message=options.message,
    )


VERB = Verb(
    "push",
    "Push a model, a checkpoint, mined or scored rows, a collection or any other folder to the Hub, in one commit.",
    (PushOptions,),
    run,
    example="hf-distill push outputs/student --repo_id you/student --private true",
    words=leading_words("folder"),
)
