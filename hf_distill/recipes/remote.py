"""Stages on the Hub: each is a branch, models in a model repository, everything else in a dataset of the same name."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from ..console import get_logger
from ..errors import HubError, InputError
from ..files import atomic_path, write_json
from .kinds import MODEL
from .loading import Stage
from .records import DONE, Record, Workspace, read_record


logger = get_logger(__name__)

_RECORD = "recipe_record.json"


class Remote:
    """A repository that a run pushes its stages to, or takes them from.

    Args:
        repo_id: `you/name`; a dataset of the same name holds what is no model.
        option: Which option named it, for messages.
    """

    def __init__(self, repo_id: str, option: str):
        from ..hub.client import check_repo_id

        check_repo_id(repo_id, option)
        self.repo_id, self.option = repo_id, option

    @staticmethod
    def _kind(stage: Stage) -> str:
        return "model" if stage.kind.result == MODEL else "dataset"

    def push(self, stage: Stage, workspace: Workspace, record: Record) -> bool:
        """Pushes a finished stage with its record; False (and a warning) if the Hub does not take it now."""
        from ..hub.push import Target, files_of, push_folder

        folder = workspace.result(stage.name)
        told = workspace.file(stage.name, ".pushed.json")
        write_json(told, asdict(replace(record, pushed=None, process=None)))
        files = {**(files_of(folder) if folder.is_dir() else {}), _RECORD: told}
        target = Target(self.repo_id, kind=self._kind(stage), revision=stage.name, overwrite=True, mirror=True)
        try:
            push_folder(folder, target, files=files, message=f"Stage {stage.name} ({record.key})")
        except (InputError, HubError) as error:
            logger.warning("stage %s is not pushed: %s The next start tries again.", stage.name, error)
            return False
        finally:
            told.unlink()
        record.pushed = self.repo_id
        workspace.save(record)
        return True

    def record(self, stage: Stage, key: str) -> Record | None:
        """The record of a finished stage of exactly this key; None if the repository has none."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            path = hf_hub_download(self.repo_id, _RECORD, repo_type=self._kind(stage), revision=stage.name)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        except Exception as error:
            raise self._unreachable(error) from error
        record = read_record(Path(path))
        if record is None or record.key != key or record.status != DONE:
            return None
        return replace(record, remote=self.repo_id)

    def fetch(self, stage: Stage, workspace: Workspace) -> None:
        """Downloads the result of a stage into the run's folder."""
        from huggingface_hub import snapshot_download

        target = workspace.result(stage.name)
        logger.info("%s: fetched from %s, branch %s", stage.name, self.repo_id, stage.name)
        with atomic_path(target) as temporary:
            try:
                snapshot_download(self.repo_id, repo_type=self._kind(stage), revision=stage.name, local_dir=temporary)
            except Exception as error:
                raise self._unreachable(error) from error
            shutil.rmtree(temporary / ".cache", ignore_errors=True)
            for name in (_RECORD, ".gitattributes"):
                (temporary / name).unlink(missing_ok=True)

    def _unreachable(self, error: Exception) -> InputError:
        from ..hub.client import explain

        return InputError(
            f"{self.repo_id} cannot be read: {explain(error)}",
            where=self.option,
            cure="Try again later, or leave the option out to do the stages here",
        )
