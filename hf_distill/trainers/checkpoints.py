"""Checkpoints that were written to their end."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..console import get_logger, is_main_process
from ..distributed import world_size
from ..files import read_json


logger = get_logger(__name__)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; newer ones that were cut off are removed.

    All processes must come here together.
    """
    from accelerate.utils import broadcast_object_list

    # One process looks and removes, all go by what it saw: what they see at different moments differs.
    found = [_last_complete(Path(folder)) if is_main_process() else None]
    return broadcast_object_list(found)[0] if world_size() > 1 else found[0]


def _last_complete(folder: Path) -> str | None:
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        # The state is the last file of a checkpoint but for the random states of the other processes.
        random_states = len(list(Path(checkpoint).glob("rng_state*.pth")))
        try:
            read_json(Path(checkpoint) / "trainer_state.json")
            complete = True
        except (OSError, ValueError):
            complete = False
        if complete and not random_states:
            logger.warning("%s holds a model alone (save_only_model): training starts at the beginning.", checkpoint)
            return None
        if complete and random_states >= world_size():
            return checkpoint
        logger.warning("%s was cut off while it was written; going back to the one before.", checkpoint)
        shutil.rmtree(checkpoint)
    return None
