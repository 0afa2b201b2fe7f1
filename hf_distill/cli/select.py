"""`hf-distill select`: the queries on which the teacher is right and the student nearly so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..console import get_logger
from ..errors import InputError
from ..files import file_fingerprint
from ..provenance import note_source
from ..settings import option
from .options import CollectionOptions
from .parsing import Verb, require


logger = get_logger(__name__)


@dataclass
class SelectOptions:
    """Which queries are kept."""

    _argument_group_name = "selection"

    rows: str | None = option(
        None, "The student's results with a teacher's scores: a row set's name in the collection, or a folder."
    )
    rule: str = option(
        "2 <= student <= 15 and teacher == 1",
        "Condition on the first positive's ranks in the orders of student and teacher; scores_NAME is called NAME.",
    )
    teacher_column: str | None = option(
        None, "The only column of the rule, called teacher there. Default: scores is teacher, scores_NAME is NAME."
    )
    keep_negatives: int = option(100, "Negatives kept for each query, the student's best first; 0 means all.")
    answers: str | None = option(
        None, 'JSON lines {"query_id", "answers"}: passages that hold an answer count as positives in the ranks.'
    )
    fewest: int = option(1, "Fewer queries than this are an error.")
    output_dir: str | None = option(None, "Folder for the selected rows.")


def run(data_options: CollectionOptions, options: SelectOptions) -> None:
    """Selects and saves a row set."""
    require(
        "select",
        data=(data_options.data, "the collection, a folder or Hub id"),
        rows=(options.rows, "the student's results with a teacher's scores: a row set's name, or its folder"),
        output_dir=(options.output_dir, "folder of the selected rows"),
    )
    from ..retrieval.select import select_rows
    from . import folders, row_sets, steps

    data = steps.Data.open(data_options)
    rows = row_sets.named_rows(data, options.rows)
    columns = None if options.teacher_column is None else {"teacher": options.teacher_column}
    selected = select_rows(
        rows,
        options.rule,
        columns=columns,
        num_negatives=options.keep_negatives or None,
        answers=None if options.answers is None else read_answers(options.answers),
        fewest=options.fewest,
    )
    target = folders.claim_rows(row_sets.row_folder(data, options.output_dir, options.rows))
    row_sets.save_rows(selected, data, target, target.name)
    logger.info("%s of %s rows written to %s", f"{len(selected):,}", f"{len(rows):,}", target)


def read_answers(path: str) -> dict[str, list[str]]:
    """Answers by query id, from JSON lines `{"query_id": ..., "answers": [...]}`.

    Raises:
        InputError: If there is no such file, or a line is of another form.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}", where="--answers", cure="Give a file of JSON lines")
    note_source("file", path, lambda: {"fingerprint": file_fingerprint(path)})
    answers = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
                answers[str(entry["query_id"])] = [str(answer) for answer in entry["answers"]]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"not of the form that is expected ({error})",
                    where=f"{path}, line {number}",
                    cure='A line is {"query_id": "...", "answers": ["...", "..."]}',
                ) from error
    return answers


VERB = Verb(
    "select",
    "Keep the rows whose query satisfies a rule on the ranks of student and teacher.",
    (CollectionOptions, SelectOptions),
    run,
    example="hf-distill select --data my_collection --rows outputs/scored --output_dir outputs/selected "
    "--rule '2 <= student <= 15 and teacher == 1'",
)
