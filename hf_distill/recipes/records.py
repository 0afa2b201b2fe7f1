"""What is kept about every stage, and where: results, records, logs.

```
<output_dir>/stages/NAME/          what the stage's command wrote
<output_dir>/records/NAME.json     its key, what that is made of, state, time, figures
<output_dir>/records/NAME.yaml     the command's settings:  hf-distill VERB --config records/NAME.yaml
<output_dir>/records/NAME.log      what the command printed
<output_dir>/superseded/NAME-KEY/  results of other settings; taken back when the settings are
```
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_json
from .kinds import FIGURES, ROWS
from .loading import Stage


RUNNING, DONE, FAILED = "running", "done", "failed"
_RECORD = "record.json"


@dataclass
class Record:
    """One stage's record.

    Attributes:
        stage: Its name.
        verb: Its verb.
        key: The skip key of the result.
        parts: What the key is made of.
        status: `running` (also after a kill), `done` or `failed`.
        seconds: All starts together.
        starts: How often it was started.
        process: Number of the process that runs it.
        figures: See [`stage_figures`].
        pushed: The repository that holds it.
        remote: The repository that it was taken from; the result itself is fetched when a stage needs it.
    """

    stage: str
    verb: str
    key: str
    parts: dict[str, Any]
    status: str = RUNNING
    seconds: float = 0.0
    starts: int = 0
    process: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    pushed: str | None = None
    remote: str | None = None


class Workspace:
    """The folder of a recipe's run."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.records_folder = self.folder / "records"

    def result(self, stage: str) -> Path:
        """Where the result of a stage lies."""
        return self.folder / "stages" / stage

    def file(self, stage: str, suffix: str) -> Path:
        """A file about a stage, such as its `.log`."""
        return self.records_folder / f"{stage}{suffix}"

    def record(self, stage: str) -> Record | None:
        """The record of a stage; None if it was never started."""
        return read_record(self.file(stage, ".json"))

    def save(self, record: Record) -> None:
        """Writes a record."""
        write_json(self.file(record.stage, ".json"), asdict(record))

    def has_result(self, stage: Stage) -> bool:
        """Whether the result of a finished stage is (still) there."""
        if stage.kind.result is None:
            return True
        folder = self.result(stage.name)
        marker = {ROWS: "metadata.json", FIGURES: "metrics.json"}.get(stage.kind.result)
        if marker is not None:
            return (folder / marker).is_file()
        return folder.is_dir() and any(folder.iterdir())

    def _shelf(self, stage: str, key: str) -> Path:
        return self.folder / "superseded" / f"{stage}-{key}"

    def shelved(self, stage: str, key: str) -> Record | None:
        """The record of a superseded result of exactly this key."""
        return read_record(self._shelf(stage, key) / _RECORD)

    def supersede(self, stage: str) -> Path | None:
        """Moves the result of other settings out of the way; returns where to, or None if there was nothing."""
        record, folder = self.record(stage), self.result(stage)
        if record is None:
            if folder.is_dir() and any(folder.iterdir()):
                raise InputError(
                    "is not empty, and no stage of this recipe made what is in it",
                    where=str(folder),
                    cure="Choose another --output_dir, or remove that folder",
                )
            return None
        shelf = self._shelf(stage, record.key)
        kept = folder.is_dir()
        if kept:
            if shelf.exists():
                shutil.rmtree(shelf)
            shelf.mkdir(parents=True)
            # The record first: a result without one would not be known.
            write_json(shelf / _RECORD, asdict(record))
            os.replace(folder, shelf / "result")
        self.file(stage, ".json").unlink(missing_ok=True)
        return shelf if kept else None

    def take_back(self, stage: str, key: str) -> Record:
        """Makes a superseded result the stage's own again."""
        shelf = self._shelf(stage, key)
        record = read_record(shelf / _RECORD)
        if (shelf / "result").is_dir():
            self.result(stage).parent.mkdir(parents=True, exist_ok=True)
            os.replace(shelf / "result", self.result(stage))
        self.save(record)
        shutil.rmtree(shelf)
        return record


def read_record(path: Path) -> Record | None:
    """Reads a record; None if there is none."""
    try:
        return Record(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(f"is no record of a stage ({error})", where=str(path), cure="Remove the file") from error
