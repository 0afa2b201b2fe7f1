"""Training in episodes of teleportation negatives."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..console import get_logger, is_main_process
from ..data import Collection, RowSet
from ..distributed import wait_for_everyone
from ..errors import InputError
from ..evaluation.forgetting import DEPTH, Change, positive_ranks, write_forgetting
from ..evaluation.in_loop import RetrievalEvaluation
from ..files import fingerprint, read_json, write_json
from ..models.base import RetrievalModel
from ..models.student import load_model
from ..retrieval.searching import search
from ..retrieval.teleport import Episode, EpisodeOptions, mine_episode
from ..settings import NOT_OF_THE_RUN
from .arguments import TeleTrainingArguments
from .base import read_sources
from .checkpoints import last_complete_checkpoint
from .retrieval import RetrievalTrainer


logger = get_logger(__name__)

# In an episode's folder once its model is complete.
DONE_FILE = "episode.json"


class TeleTrainer(RetrievalTrainer):
    """Mines, trains, and mines again: ANCE-Tele (Sun et al. 2022, https://arxiv.org/abs/2210.17167).

    Each episode mines its pool with the model of the episode before (the first one with the pretrained model), puts
    it behind the pools of all episodes before, and trains *the pretrained model* on it; see
    [`hf_distill.retrieval.teleport`]. Episodes lie in `<output_dir>/episode_<e>`; what is finished there is not done
    again, an episode that was cut off goes on from its last checkpoint.

    Args:
        model: The pretrained model. After `train` the model of the last episode stands in `self.model`.
        args: Its configuration.
        collection: Queries, passages and judgements.
        split: Whose queries to train on.
        episode: How pools are mined.
        evaluation: What `evaluate` measures, in and after every episode.
        answers: For questions judged by answers; see [`mine_episode`].
        query_positions: Only these queries.
        retrieval: Further keyword arguments of [`mine_episode`]: `factory`, `dtype`, `storage`, `cache_dir`, ...
        kwargs: Further arguments of [`RetrievalTrainer`].
    """

    _name: ClassVar[str] = "ANCE-Tele"
    _card: ClassVar[str] = "ance_tele"
    _paper: ClassVar[Mapping[str, str]] = {
        "title": "Reduce Catastrophic Forgetting of Dense Retrieval Training with Teleportation Negatives",
        "authors": "Si Sun, Chenyan Xiong, Yue Yu, Arnold Overwijk, Zhiyuan Liu, Jie Bao",
        "year": "2022",
        "arxiv": "2210.17167",
    }
    _tags: ClassVar[Sequence[str]] = ("hf_distill", "ance-tele")

    def __init__(
        self,
        model: RetrievalModel,
        args: TeleTrainingArguments,
        collection: Collection,
        split: str = "train",
        *,
        episode: EpisodeOptions | None = None,
        evaluation: RetrievalEvaluation | None = None,
        answers: Mapping[int, Sequence[str]] | None = None,
        query_positions: Sequence[int] | np.ndarray | None = None,
        retrieval: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.negatives = _by_episode(args)
        self.collection, self.split, self.mining = collection, split, episode or EpisodeOptions(seed=args.seed)
        _check_weights(args, self.mining)
        self._mined = {"answers": answers, "query_positions": query_positions, **(retrieval or {})}
        self._more = dict(kwargs)
        # The pretrained weights; every episode trains a copy.
        self._start = copy.deepcopy(model).cpu()
        super().__init__(model, args, evaluation=evaluation, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> list[Change]:
        """Runs the episodes that are not finished.

        Returns:
            What every episode learned and forgot; `<output_dir>/forgetting` has it with plots.

        Raises:
            InputError: If a checkpoint is named (each episode finds its own), or a folder holds an episode of other
                settings or data.
        """
        if isinstance(resume_from_checkpoint, str):
            raise InputError(
                "episodes go on by themselves",
                where="resume_from_checkpoint",
                cure="Leave it out, and give the output folder of the run",
            )
        episodes: list[Episode] = []
        miner = self._start
        for number in range(1, self.args.episodes + 1):
            mined = mine_episode(
                miner.eval(),
                self.collection,
                self.split,
                number,
                previous=episodes[-1].rows if episodes and self.mining.momentum else None,
                options=self.mining,
                **self._mined,
            )
            episodes.append(mined)
            miner = self._train_episode(number, mined.rows)
        self._take_over(miner, episodes[-1].rows)
        self.save_model(_internal_call=True)
        return self._report(episodes, miner)

    def folder_of(self, number: int) -> Path:
        """Where an episode lies."""
        return Path(self.args.output_dir) / f"episode_{number}"

    def model_of(self, number: int) -> RetrievalModel:
        """The model that a finished episode trained."""
        return load_model(self.folder_of(number))

    def _train_episode(self, number: int, rows: RowSet) -> RetrievalModel:
        folder = self.folder_of(number)
        args = self._episode_arguments(number, folder)
        key = self._key(args, rows)
        done = folder / DONE_FILE
        if done.is_file():
            if read_json(done)["key"] != key:
                raise InputError(
                    f"it holds episode {number} of other settings or data",
                    where=str(folder),
                    cure="Choose another output folder, or remove this one",
                )
            logger.info("episode %d is finished", number)
            return self.model_of(number)
        if is_main_process() and not folder.exists():
            rows.save(folder / "pool")
        wait_for_everyone()
        trainer = RetrievalTrainer(
            copy.deepcopy(self._start), args, rows=rows, evaluation=self.eval_dataset, **self._more
        )
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        trainer.save_model(_internal_call=True)
        trainer.write_history()
        if is_main_process():
            write_json(done, {"key": key, "steps": trainer.state.global_step})
        wait_for_everyone()
        del trainer
        gc.collect()
        # What a later start will find, which does not train the episode again.
        return self.model_of(number)

    def _episode_arguments(self, number: int, folder: Path) -> TeleTrainingArguments:
        # Not a copy: an engine wants every training's arguments set up anew.
        return replace(
            self.args,
            output_dir=str(folder),
            num_negatives=self.negatives[number - 1],
            stop_after=None if number == self.args.episodes else self.args.stop_after,
            push_to_hub=False,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]; an engine has divided the episodes' models, not this one's."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _key(self, args: TeleTrainingArguments, rows: RowSet) -> str:
        settings = {name: value for name, value in args.to_dict().items() if name not in NOT_OF_THE_RUN}
        return fingerprint([settings, rows.fingerprint, self._start.weights_fingerprint(), args.world_size])

    def _take_over(self, model: RetrievalModel, rows: RowSet) -> None:
        """Makes the last episode's model, rows, steps and log this trainer's own."""
        self.accelerator.unwrap_model(self.model).load_state_dict(model.state_dict())
        self.rows = rows
        steps, history = 0, []
        for number in range(1, self.args.episodes + 1):
            folder = self.folder_of(number)
            log = read_json(folder / "history.json")
            history += [{**entry, "step": steps + entry["step"], "episode": number} for entry in log]
            steps += read_json(folder / DONE_FILE)["steps"]
        self.state.global_step, self.state.log_history = steps, history

    def _report(self, episodes: list[Episode], last: RetrievalModel) -> list[Change]:
        qrels = self.collection.split(self.split)
        queries = episodes[0].run.query
        for episode in episodes[1:]:
            queries = np.intersect1d(queries, episode.run.query)
        settings = {name: value for name, value in self._mined.items() if name not in ("answers", "query_positions")}
        runs = [episode.run for episode in episodes]
        runs.append(search(last, self.collection, queries, min(DEPTH, len(self.collection.corpus)), **settings))
        ranks = np.stack([positive_ranks(run, qrels, queries) for run in runs])
        if not is_main_process():
            return []
        return write_forgetting(
            Path(self.args.output_dir) / "forgetting",
            f"{self.collection.name}/{self.split}",
            self.collection.queries.ids_at(queries),
            ["pretrained", *(f"episode_{episode.number}" for episode in episodes)],
            ranks,
            [episode.rows for episode in episodes],
        )


def _check_weights(args: TeleTrainingArguments, mining: EpisodeOptions) -> None:
    """Weights that would be refused after an episode was mined are refused now."""
    weights = read_sources(args) or {}
    groups = mining.groups
    for name in weights:
        if name not in groups:
            raise InputError(
                f"{name!r} is no source of every episode",
                where="negative_sources",
                cure=f"Name some of {', '.join(groups)}",
            )
    if args.negative_sampling != "random" and len({weight for weight in weights.values() if weight}) > 1:
        raise InputError(
            f"the sampling {args.negative_sampling!r} takes negatives as they come and has no weights",
            where="negative_sources",
            cure="Add --negative_sampling random",
        )


def _by_episode(args: TeleTrainingArguments) -> list[int]:
    """Negatives of a query, by episode."""
    if args.episodes < 1:
        raise InputError(f"{args.episodes} episodes", where="episodes", cure="Train one at least")
    if args.episode_negatives is None:
        return [args.num_negatives] * args.episodes
    try:
        numbers = [int(number) for number in args.episode_negatives.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != args.episodes or min(numbers) < 0:
        raise InputError(
            f"{args.episode_negatives!r} are no numbers of negatives for {args.episodes} episodes",
            where="episode_negatives",
            cure="Write one for each, such as 15,31,31",
        )
    return numbers
