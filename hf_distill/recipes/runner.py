"""Runs a recipe: decides what is to be done, starts a command for each stage, keeps records, writes the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import duration, get_logger, print_table
from ..errors import InputError
from ..files import write_text
from . import processes
from .board import Board, Line
from .checks import check_graph, check_ids, check_stages, command_settings, fields_to_check
from .cost import estimate
from .keys import Contents, differences, stage_keys
from .loading import Recipe
from .processes import in_other_process
from .records import DONE, FAILED, RUNNING, Record, Workspace
from .remote import Remote
from .report import measures_of, write_report
from .results import stage_figures


logger = get_logger(__name__)

# What is to happen to a stage.
SKIP, TAKE_BACK, PULL, RESUME, START, REDO = "done", "taken back", "pulled", "goes on", "new", "again"


@dataclass
class Decision:
    """What is to happen to a stage, and why."""

    stage: str
    key: str
    parts: dict[str, Any]
    action: str
    why: list[str] = field(default_factory=list)
    record: Record | None = None

    @property
    def works(self) -> bool:
        """Whether its command will be started."""
        return self.action in (RESUME, START, REDO)


class RecipeRun:
    """A recipe in a folder.

    Args:
        recipe: The recipe.
        folder: Where everything goes; see [`hf_distill.recipes.records`].
        push_to: Push every finished stage to this repository of the Hub.
        pull_from: Take finished stages from this repository of the Hub.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, push_to: str | None = None, pull_from: str | None = None):
        self.recipe, self.workspace = recipe, Workspace(folder)
        self.push_to = None if push_to is None else Remote(push_to, "--push_to")
        self.pull_from = None if pull_from is None else Remote(pull_from, "--pull_from")
        self.contents = Contents(self.workspace.records_folder / "contents.json")

    # ---- what is to be done ----
    def decide(self) -> dict[str, Decision]:
        """For every stage what is to happen to it; changes nothing."""
        keys, parts = stage_keys(self.recipe, self.contents)
        return {name: self._decide(name, keys[name], parts[name]) for name in self.recipe.stages}

    def _decide(self, name: str, key: str, parts: dict[str, Any]) -> Decision:
        record, stage = self.workspace.record(name), self.recipe.stages[name]
        decision = Decision(name, key, parts, START, record=record)
        if record is not None and record.key == key:
            if record.status != DONE:
                decision.action, decision.why = RESUME, [f"was {_words(record.status)} before"]
            elif self.workspace.has_result(stage) or record.remote is not None:
                decision.action = SKIP
            else:
                decision.action, decision.why = REDO, ["its result is not there any more"]
        elif (shelved := self.workspace.shelved(name, key)) is not None and shelved.status == DONE:
            decision.action, decision.why, decision.record = TAKE_BACK, ["these settings were run before"], shelved
        elif record is not None:
            decision.action, decision.why = REDO, differences(record.parts, parts)
        if decision.works and self.pull_from is not None:
            pulled = self.pull_from.record(stage, key)
            if pulled is not None:
                decision.action, decision.why, decision.record = PULL, [f"{pulled.remote} has it"], pulled
        return decision

    def _part(self, first: str | None, last: str | None, decisions: dict[str, Decision]) -> list[str]:
        names = self.recipe.part(first, last)
        begin = list(self.recipe.stages).index(names[0])
        for name in list(self.recipe.stages)[:begin]:
            if decisions[name].works and any(name in self._needs(one) for one in names):
                raise InputError(
                    f"stage {name!r} is needed and not done ({decisions[name].action})",
                    where="--from",
                    cure=f"Begin with --from {name}",
                )
        return names

    def _needs(self, name: str) -> set[str]:
        """The stages that a stage stands on, however far below."""
        found: set[str] = set()
        waiting = list(self.recipe.stages[name].needs)
        while waiting:
            other = waiting.pop()
            if other not in found:
                found.add(other)
                waiting += self.recipe.stages[other].needs
        return found

    # ---- showing ----
    @property
    def title(self) -> str:
        """Name and profile."""
        profile = f", profile {self.recipe.profile}" if self.recipe.profile else ""
        return f"Recipe {self.recipe.name}{profile}, in {self.workspace.folder}"

    def show_plan(self, first: str | None = None, last: str | None = None) -> None:
        """Checks everything, prints what would be done and about how long it would take."""
        decisions = self.decide()
        names = self._part(first, last, decisions)
        work = [name for name in names if decisions[name].works]
        check_graph(self.recipe, work, self.workspace, _available(decisions))
        in_other_process(check_stages, fields_to_check(self.recipe, work, self.workspace))
        in_other_process(check_ids, self.recipe, work)
        flops, speeds = in_other_process(estimate, self.recipe, work, self.workspace)
        rows, total, seconds = [], 0.0, 0.0
        for name in names:
            decision, stage = decisions[name], self.recipe.stages[name]
            operations = flops.get(name)
            about = "" if name not in work else "?"
            if operations is not None:
                total += operations
                seconds += operations / speeds[name]
                about = duration(operations / speeds[name])
            size = f"{operations:.1e}" if operations else ""
            rows.append([name, stage.kind.verb, decision.action, size, about, "; ".join(decision.why)])
        rows.append(["in all", "", "", f"{total:.1e}", duration(seconds), ""])
        columns = ["stage", "verb", "state", "operations", "about, here", "why"]
        print_table(self.title, columns, rows)
        if speeds:
            speed = " or ".join(f"{speed / 1e9:.0f}" for speed in sorted(set(speeds.values())))
            logger.info("The times are those of the models' arithmetic at %s GFLOP/s, on one process.", speed)

    # ---- running ----
    def run(self, first: str | None = None, last: str | None = None) -> None:
        """Runs the stages from `first` to `last` that are not done.

        Raises:
            InputError: If anything in the recipe is wrong (before any stage starts), or a stage fails.
        """
        decisions = self.decide()
        names = self._part(first, last, decisions)
        work = [name for name in names if decisions[name].works]
        if work:
            check_graph(self.recipe, work, self.workspace, _available(decisions))
            in_other_process(check_stages, fields_to_check(self.recipe, work, self.workspace))
            in_other_process(check_ids, self.recipe, work)
        lock = self._lock()
        try:
            self.contents.save()
            self._announce([decisions[name] for name in names])
            self._run([decisions[name] for name in names])
            self._report()
        finally:
            lock.release()

    def _lock(self) -> Any:
        from filelock import FileLock, Timeout

        self.workspace.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.workspace.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                "another process is running this recipe",
                where=str(self.workspace.folder),
                cure="Wait for it to end, or choose another --output_dir",
            ) from None
        return lock

    def _announce(self, decisions: Sequence[Decision]) -> None:
        """Says what changed since the last start and what will be done again because of it."""
        for decision in decisions:
            if decision.action in (REDO, TAKE_BACK, PULL, RESUME):
                logger.info("%s %s: %s", decision.stage, _sentence(decision.action), "; ".join(decision.why))

    def _run(self, decisions: Sequence[Decision]) -> None:
        lines = [Line(one.stage, self.recipe.stages[one.stage].kind.verb) for one in decisions]
        board = Board(self.title, lines)
        try:
            with board:
                for decision in decisions:
                    self._step(decision, board)
        finally:
            board.show()

    def _report(self) -> None:
        """Writes the report and prints its tables."""
        for dataset, systems in write_report(self.recipe, self.workspace).items():
            measures = measures_of(systems)
            rows = [
                [name, *(f"{figures[one]:.4f}" if figures.get(one) is not None else "" for one in measures)]
                for name, figures in systems.items()
            ]
            print_table(dataset, ["system", *measures], rows)
        logger.info("report: %s", self.workspace.folder / "report.html")

    def _step(self, decision: Decision, board: Board) -> None:
        name, record = decision.stage, decision.record
        if decision.action == TAKE_BACK:
            self.workspace.supersede(name)
            record = self.workspace.take_back(name, decision.key)
        if decision.action == PULL:
            self.workspace.supersede(name)
            self.workspace.save(record)
        if not decision.works:
            self._push(record)
            board.was_done(name, record.seconds, record.figures.get("headline", ""))
            return
        if decision.action != RESUME:
            shelf = self.workspace.supersede(name)
            if shelf is not None and record is not None and record.key != decision.key:
                logger.info("%s: the result of the other settings is kept in %s", name, shelf)
            record = Record(name, self.recipe.stages[name].kind.verb, decision.key, decision.parts)
        self._fetch_needs(name)
        self._work(record, board)
        self._push(record)

    def _fetch_needs(self, name: str) -> None:
        """Brings the results that a stage reads and that lie on the Hub only."""
        for other in self.recipe.stages[name].needs:
            stage, record = self.recipe.stages[other], self.workspace.record(other)
            if record is not None and record.remote is not None and not self.workspace.has_result(stage):
                Remote(record.remote, "--pull_from").fetch(stage, self.workspace)

    def _push(self, record: Record) -> None:
        """Pushes a finished stage, if that is wanted and not done."""
        if self.push_to is None or self.push_to.repo_id in (record.pushed, record.remote):
            return
        self.push_to.push(self.recipe.stages[record.stage], self.workspace, record)

    def _work(self, record: Record, board: Board) -> None:
        """Starts the stage's command and waits for it."""
        import yaml

        name, stage = record.stage, self.recipe.stages[record.stage]
        if not processes.wait_for_end(record.process):
            raise InputError(
                f"process {record.process} of an earlier start is still working on stage {name!r}",
                where=str(self.workspace.result(name)),
                cure="Wait for it to end, or end it",
            )
        config, log = self.workspace.file(name, ".yaml"), self.workspace.file(name, ".log")
        settings = command_settings(self.recipe, name, self.workspace)
        write_text(config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        words = processes.verb_command(stage.kind.verb, config, stage.launch)
        earlier, begin = record.seconds, time.monotonic()
        record.status, record.starts, record.process = RUNNING, record.starts + 1, None

        def started(process: int) -> None:
            record.process = process
            self.workspace.save(record)

        def says(line: str) -> None:
            record.seconds = earlier + time.monotonic() - begin
            board.says(line)

        # Before the command writes anything: what lies in a stage's folder is known by its record.
        self.workspace.save(record)
        board.begins(name, " ".join(["hf-distill", *words]))
        code = processes.run_words(words, log, started, says)
        record.seconds = earlier + time.monotonic() - begin
        record.process = None
        record.status = DONE if code == 0 else FAILED
        if code == 0:
            record.figures = stage_figures(stage, self.workspace.result(name))
        self.workspace.save(record)
        board.ends(name, record.status, record.seconds, record.figures.get("headline", ""))
        if code != 0:
            last = processes.last_words(log)
            raise InputError(
                f"the command ended with code {code} after {duration(record.seconds)}; its last words:\n{last}\n",
                where=f"stage {name!r}",
                cure=f"The whole log is {log}; the same command goes on here once this is mended",
            )


def _words(status: str) -> str:
    return {RUNNING: "cut off", FAILED: "ended by an error"}[status]


def _sentence(action: str) -> str:
    return {
        REDO: "will be done again",
        TAKE_BACK: "is taken back",
        PULL: "is pulled",
        RESUME: "goes on where it stopped",
    }[action]


def _available(decisions: Mapping[str, Decision]) -> list[str]:
    """Stages whose results are taken from elsewhere."""
    return [name for name, decision in decisions.items() if decision.action in (TAKE_BACK, PULL)]
