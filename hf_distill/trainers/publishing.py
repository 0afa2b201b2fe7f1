"""What the trainers do with the Hub: push while and after training, and go on from a repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..files import read_json, write_json
from ..hub.cards import bibtex, write_model_card
from ..hub.checkpoints import Publisher, fetch_checkpoint, names_repository
from ..hub.manifest import run_manifest
from ..hub.push import MANIFEST, RUN_KEY, Pushed, Target, check_target, push_folder
from ..settings import NOT_OF_THE_RUN


@dataclass
class About:
    """What a card says about a run before its figures are known.

    Args:
        summary: A sentence.
        base_models: Hub ids or folders of what was trained from, and of the teachers.
        datasets: Hub ids or folders of the data.
    """

    summary: str = ""
    base_models: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)


def open_target(
    args: Any, settings: Mapping[str, Any], token: str | None = None, private: bool | None = None
) -> Target:
    """Makes the repository that a run pushes to; a Hub that is silent now may answer later.

    Args:
        args: The trainer's arguments.
        settings: What makes the run what it is.
        token: Instead of `hub_token`.
        private: Instead of `hub_private_repo`.

    Raises:
        InputError: If this account may not push there, or another run has.
    """
    target = Target(
        args.hub_model_id or Path(args.output_dir).absolute().name,
        private=private if private is not None else args.hub_private_repo,
        revision=args.hub_revision,
        token=token or args.hub_token,
    )
    return check_target(target, "--hub_model_id", settings)


class PublishingTrainer(Trainer):
    """A [`~transformers.Trainer`] that pushes native folders, each state in one commit.

    `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_revision`, `hub_token` and
    `hub_always_push` of the arguments mean what they mean in transformers; see `hub/push.py` for what happens when the
    Hub does not do its part. `about` may be filled before training.
    """

    hub_model_id: str | None = None
    about: About | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository; see [`open_target`]."""
        if not self.is_world_process_zero():
            return
        target = open_target(self.args, self.run_identity(), token, private)
        self.hub_model_id = target.repo_id
        self._publisher = Publisher(self.args.output_dir, target)

    def run_identity(self) -> Mapping[str, Any]:
        """The settings that make this run what it is, by which a repository is known to be its own."""
        key = Path(self.args.output_dir) / RUN_KEY
        if key.is_file():
            return read_json(key)
        settings = {name: value for name, value in self.args.to_dict().items() if name not in NOT_OF_THE_RUN}
        rows = getattr(self, "rows", None)
        settings["rows_fingerprint"] = rows.fingerprint if rows is not None else None
        return json.loads(json.dumps(settings, default=str))

    def fetch_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """Brings a checkpoint that is named by its repository into the output folder; all processes must call this."""
        name = resume_from_checkpoint
        if not isinstance(name, str) or not names_repository(name):
            return name
        fetched: list[Any] = [None]
        if self.is_world_process_zero():
            fetched = [str(fetch_checkpoint(name, self.args.output_dir, self.args.hub_token))]
        return broadcast_object_list(fetched)[0]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            return
        # The other processes write their random states into the checkpoint.
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero() or (self._publisher.busy and not self.args.hub_always_push):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._publisher.wait()
        self.describe()
        best = self.state.best_model_checkpoint
        self._publisher.push_checkpoint(
            Path(checkpoint_folder),
            strategy.value,
            None if best is None else Path(best),
            f"Training in progress, step {self.state.global_step}",
        )

    def _finish_current_push(self) -> None:
        if getattr(self, "_publisher", None) is not None:
            self._publisher.wait()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Pushed | None:
        """Saves the model into the output folder and pushes the folder; all processes must call this.

        Args:
            commit_message: Of the commit.
            blocking: Must be true: what is pushed last has to arrive.
            token: Instead of `hub_token` and the login's.
            revision: The branch, instead of `hub_revision`.
            private: Whether a new repository is private, instead of `hub_private_repo`.
            kwargs: For the sake of transformers' signature; a card is made from what the run knows.

        Returns:
            What was pushed, in the main process.

        Raises:
            HubError: If the Hub does not take it: why, and how to push the folder later.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._publisher.wait()
        self.describe()
        target = self._publisher.target
        if revision is not None:
            target = replace(target, revision=revision)
        if token is not None:
            target = replace(target, token=token)
        return push_folder(self.args.output_dir, target, message=commit_message)

    def describe(self) -> None:
        """Writes card and manifest of a run whose figures are not known (yet); a finished run's own ones stay."""
        folder = Path(self.args.output_dir)
        known = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
        if known is not None and "artefacts" in known:
            return
        training = {
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            "best_checkpoint": self.state.best_model_checkpoint,
        }
        if known is None or known.get("settings") != self.run_identity():
            seeds = {"seed": self.args.seed, "data_seed": self.args.data_seed}
            write_json(folder / MANIFEST, run_manifest(settings=self.run_identity(), seeds=seeds, training=training))
        else:
            write_json(folder / MANIFEST, {**known, "training": training})
        card = folder / "README.md"
        if not card.is_file() or "- hf_distill\n" in card.read_text(encoding="utf-8"):  # else it is somebody's own
            self.create_model_card()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes `README.md` from what the run knows by now.

        Args:
            args: For the sake of transformers' signature.
            kwargs: The same.
        """
        if not self.is_world_process_zero():
            return
        measures = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        figures = {
            name.removeprefix("eval_"): value
            for name, value in (measures[-1] if measures else {}).items()
            if name.startswith("eval_") and isinstance(value, float) and "@" in name
        }
        about = self.about or About()
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        steps = f"{self.state.global_step:,} of {self.state.max_steps:,}" if self.state.max_steps else "No"
        write_model_card(
            self.args.output_dir,
            title=Path(self.args.output_dir).absolute().name,
            summary=about.summary or "Trained with hf_distill.",
            kind=getattr(self.accelerator.unwrap_model(self.model), "representation", "dense"),
            results=f"On the development queries, at step {measures[-1]['step']:,}: {shown}." if shown else "Not yet.",
            training="\n".join(
                [
                    f"- {steps} steps, learning rate {self.args.learning_rate:g}, seed {self.args.seed}",
                    f"- Losses: {', '.join(self.terms)}",
                    "- Everything else, versions and hardware included: `run_manifest.json`",
                ]
            ),
            base_models=about.base_models,
            datasets=about.datasets,
            tags=[*self._tags, *self.terms],
            citation=bibtex(self._paper),
            model_id=self.hub_model_id,
        )
