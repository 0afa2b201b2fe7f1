"""What the verbs push: finished runs and row sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import is_main_process
from ..distributed import wait_for_everyone
from ..errors import InputError
from ..files import read_json
from .options import CollectionOptions, PushToOptions


if TYPE_CHECKING:
    from ..data import RowSet
    from ..trainers.base import BaseTrainer


def check_push(args: Any) -> None:
    """Opens the repository that a training will push to, before any work; all processes must call this.

    Raises:
        InputError: If this account may not push there, or another run has.
    """
    if args.push_to_hub and is_main_process():
        from ..hub.push import RUN_KEY
        from ..trainers.publishing import open_target

        open_target(args, read_json(Path(args.output_dir) / RUN_KEY))
    wait_for_everyone()


def check_no_checkpoint(args: Any, parts: str) -> None:
    """Raises [`InputError`] if a checkpoint is named for a verb of several trainings, its `parts`."""
    if args.resume_from_checkpoint:
        raise InputError(
            f"{parts} go on by themselves from what lies in the output folder, and from there only",
            where="--resume_from_checkpoint",
            cure="Leave it out",
        )


def publish(trainer: BaseTrainer) -> None:
    """Pushes a finished run if that was asked for; all processes must call this.

    Raises:
        HubError: If the Hub does not take it. The run is complete in its folder.
    """
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def check_push_to(options: PushToOptions) -> None:
    """Looks whether rows can be pushed where they are to go, before they are made; all processes must call this.

    Raises:
        InputError: If this account may not push there.
    """
    if options.push_to is not None and is_main_process():
        from ..hub.push import check_target

        # Whose rows lie there already can only be said when these are made.
        check_target(_target(options, overwrite=True), "--push_to", {})
    wait_for_everyone()


def push_rows(rows: RowSet, data_options: CollectionOptions, options: PushToOptions, folder: Path) -> None:
    """Pushes saved rows if that was asked for.

    Raises:
        HubError: If the Hub does not take them. They are complete in their folder.
    """
    if options.push_to is not None and is_main_process():
        from ..hub.artefacts import push_rows

        push_rows(rows, folder, _target(options), data=data_options.data)


def _target(options: PushToOptions, overwrite: bool = False) -> Any:
    from ..hub.push import Target

    return Target(options.push_to, "dataset", private=options.private, overwrite=overwrite)
