"""Checkpoints on the Hub: pushed in the background while training goes on, and fetched to go on from."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..console import get_logger
from ..errors import InputError
from ..files import atomic_path, read_json, write_json
from .client import attempt, explain, is_transport_error, split_revision
from .download import check_content
from .push import RUN_KEY, Target, differing_settings, files_of, push_files


logger = get_logger(__name__)

# Where checkpoints lie in the repository, by what `hub_strategy` says.
LAST, BEST = "last-checkpoint", "best-checkpoint"
STATE = "trainer_state.json"
# Files of a checkpoint that only a resumed training needs.
_OF_THE_TRAINING = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", STATE, "global_step*", "latest", "zero_to_fp32.py",
    "pytorch_model_fsdp_*",
)  # fmt: skip
_STAGED = ".push-"


def native_files(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint that make the model, by their path in it."""
    return {
        path: file
        for path, file in files_of(checkpoint).items()
        if not any(fnmatch.fnmatch(path.split("/")[0], pattern) for pattern in _OF_THE_TRAINING)
    }


class Publisher:
    """Pushes the states of an output folder, one at a time, in a thread of its own.

    A failure is a warning of one sentence: training goes on, and the next state is tried again.

    Args:
        folder: The output folder.
        target: Where it goes.
    """

    def __init__(self, folder: str | Path, target: Target):
        self.folder, self.target = Path(folder), target
        self._executor = ThreadPoolExecutor(1, "push")
        self._running: Future | None = None
        for left_over in self.folder.glob(f"{_STAGED}*"):
            shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed while it pushed

    @property
    def busy(self) -> bool:
        """Whether a push is under way."""
        return self._running is not None and not self._running.done()

    def wait(self) -> None:
        """Returns when the push under way has ended, well or badly."""
        if self._running is not None:
            self._running.result()

    def push_checkpoint(self, checkpoint: Path, strategy: str, best: Path | None, message: str) -> None:
        """Begins to push the model of a checkpoint with everything beside it, and the checkpoint too, in one commit.

        The files are linked aside first, so that later steps may delete the checkpoint meanwhile.

        Args:
            checkpoint: A complete checkpoint of the output folder.
            strategy: `"every_save"` (the model alone), `"checkpoint"` (also the whole checkpoint, as the last one) or
                `"all_checkpoints"` (also the whole checkpoint under its own name); the best one comes along with both.
            best: The best checkpoint so far.
            message: Of the commit.
        """
        staged = self.folder / f"{_STAGED}{checkpoint.name}"
        shutil.rmtree(staged, ignore_errors=True)
        files = {**files_of(self.folder), **native_files(checkpoint)}
        if strategy != "every_save":
            name = LAST if strategy == "checkpoint" else checkpoint.name
            files |= {f"{name}/{path}": file for path, file in files_of(checkpoint).items()}
            if best is not None and best.is_dir() and best.resolve() != checkpoint.resolve():
                files |= {f"{BEST}/{path}": file for path, file in native_files(best).items()}
        try:
            aside = {path: _link(file, staged / path) for path, file in files.items()}
        except OSError as error:
            self._warn(message, f"its files cannot be put aside: {error}")
            shutil.rmtree(staged, ignore_errors=True)
        else:
            self._running = self._executor.submit(self._push, aside, message, staged)

    def _push(self, files: Mapping[str, Path], message: str, staged: Path) -> None:
        try:
            pushed = push_files(files, self.target, message)
            self.target = replace(self.target, repo_id=pushed.repo_id, create=False)
            logger.info("%s: pushed to %s", message, pushed.url)
        except Exception as error:
            self._warn(message, str(error).rstrip(".") if isinstance(error, InputError) else explain(error))
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _warn(self, message: str, reason: str) -> None:
        sentence = "%s: not pushed to %s (%s); training goes on, and what is saved next is pushed again."
        logger.warning(sentence, message, self.target.repo_id, reason)


def _link(file: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)  # a file system without hard links
    return target


def names_repository(name: str) -> bool:
    """Whether a value of `resume_from_checkpoint` means a repository: `user/name` or `user/name@revision`."""
    return not Path(name).exists() and split_revision(name)[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def fetch_checkpoint(name: str, output_dir: str | Path, token: str | None = None) -> Path:
    """Brings the last checkpoint of a repository into an output folder, where training goes on from it.

    Args:
        name: `user/name` or `user/name@revision`, pushed with `hub_strategy` `checkpoint` or `all_checkpoints`.
        output_dir: Where the checkpoint goes, under its own name (`checkpoint-500`), with the best one beside it.
        token: Instead of the login's.

    Raises:
        InputError: If the Hub does not give it, the repository holds no checkpoint, or it belongs to another run than
            the output folder.
    """
    output_dir = Path(output_dir)
    with _reasons(name):
        info, download = _open(name, token)
        files = [sibling.rfilename for sibling in info.siblings or []]
        folder = _checkpoint_in(files, name)
        snapshot = download(f"{folder}/{STATE}", RUN_KEY)
        _check_run(snapshot / RUN_KEY, output_dir / RUN_KEY, name)
        state = read_json(snapshot / folder / STATE)
        checkpoint = output_dir / f"checkpoint-{state['global_step']}"
        best = Path(state["best_model_checkpoint"]).name if state.get("best_model_checkpoint") else None
        best_folder = best if any(path.startswith(f"{best}/") for path in files) else BEST
        with_best = best is not None and best != checkpoint.name
        snapshot = download(f"{folder}/*", *([f"{best_folder}/*"] if with_best else []))
    check_content(snapshot, info.siblings)
    # The best one first: a checkpoint with a state counts as complete, and then everything has to be there.
    if with_best and not (output_dir / best).is_dir():
        _copy(snapshot / best_folder, output_dir / best)
    _copy(snapshot / folder, checkpoint, best=None if best is None else str(output_dir / best))
    logger.info("going on from step %d of %s at %s", state["global_step"], info.id, info.sha[:10])
    return checkpoint


def _open(name: str, token: str | None) -> tuple[Any, Callable[..., Path]]:
    """What the Hub says about a repository, and a function that downloads files of that commit by patterns."""
    from huggingface_hub import HfApi, snapshot_download

    repo_id, revision = split_revision(name)
    info = attempt(
        lambda: HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True, timeout=30),
        f"asking for {name}",
    )

    def download(*patterns: str) -> Path:
        wanted = {"revision": info.sha, "allow_patterns": list(patterns), "token": token}
        return Path(attempt(lambda: snapshot_download(repo_id, **wanted), f"downloading {name}"))

    return info, download


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Turns the client library's errors into a sentence about `resume_from_checkpoint`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cure = "Check the name, the revision and your login (`hf auth login`)"
        if is_transport_error(error):
            cure = "Connect to the network, and start the same command again"
        problem = f"there is no such folder here, and {explain(error)}"
        raise InputError(problem, where=f"resume_from_checkpoint, {name}", cure=cure) from error


def _checkpoint_in(files: list[str], name: str) -> str:
    if f"{LAST}/{STATE}" in files:
        return LAST
    steps = [int(path.split("/")[0].removeprefix("checkpoint-")) for path in files if _is_state(path)]
    if not steps:
        raise InputError(
            "the repository holds no checkpoint to go on from",
            where=f"resume_from_checkpoint, {name}",
            cure="Only a run pushed with --hub_strategy checkpoint or all_checkpoints can be resumed from the Hub",
        )
    return f"checkpoint-{max(steps)}"


def _is_state(path: str) -> bool:
    folder, _, name = path.partition("/")
    return name == STATE and folder.startswith("checkpoint-") and folder.removeprefix("checkpoint-").isdigit()


def _check_run(theirs: Path, ours: Path, name: str) -> None:
    if not (theirs.is_file() and ours.is_file()):
        return
    differing = differing_settings(read_json(theirs), read_json(ours))
    if differing:
        raise InputError(
            f"it is a checkpoint of another run ({'; '.join(differing)})",
            where=f"resume_from_checkpoint, {name}",
            cure="Go on with the settings and the data of its start, or leave --resume_from_checkpoint out",
        )


def _copy(source: Path, target: Path, best: str | None = None) -> None:
    with atomic_path(target) as temporary:
        # Not the links that the Hub's cache is made of.
        shutil.copytree(source, temporary, copy_function=shutil.copyfile)
        if (temporary / STATE).is_file():
            state: dict[str, Any] = {**read_json(temporary / STATE), "best_model_checkpoint": best}
            write_json(temporary / STATE, state)
