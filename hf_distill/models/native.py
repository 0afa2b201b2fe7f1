"""Models that are native folders outside: how they are opened, saved, and recognised by their weights."""

from __future__ import annotations

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..errors import InputError
from ..files import staged_files, write_json
from ..passages import DEFAULT_TEMPLATE
from . import layouts
from .backbones import is_adapted, plain_model, unused_parts
from .loading import Head, auto_class, quiet_transformers
from .opening import Opening, checked_settings
from .source import ModelSource, find_model


class RetrievalConfig(PretrainedConfig):
    """Settings shared by all archetypes.

    Args:
        backbone: The backbone's own configuration as a dictionary.
        query_prompt: Text put before every query.
        template: How a document's title and text become one passage.
    """

    model_type = "hf_distill"

    backbone: dict | None = None
    hidden_size: int | None = None
    query_prompt: str = ""
    template: str = DEFAULT_TEMPLATE

    def check(self) -> None:
        """Raises [`InputError`] for settings that cannot be; asked when a model is made."""


class NativeModel(PreTrainedModel, ABC):
    """A model that holds one or more backbones of transformers and is saved as other libraries open it.

    Which folders an archetype opens and what it writes are its own; the methods that say so are abstract here.

    Args:
        config: The settings.
        backbone: A model of transformers with the archetype's kind of head; made from `config.backbone` if None.
        tokenizer: Its tokenizer.

    Attributes:
        archetype: What `hf_distill.json` calls the archetype.
        backbone_head: What its backbones carry on top.
        known_settings: What `from_pretrained` takes beside its named arguments.
        recorded_settings: The fields of its configuration that only `hf_distill.json` has a place for.
        source: The files it was opened from; None for one that was built from parts.
        attention_is_fixed: Whether the attention was somebody's choice.
        training_modules: What is trained along but not exported.
    """

    archetype: ClassVar[str]
    backbone_head: ClassVar[Head] = "none"
    known_settings: ClassVar[tuple[str, ...]]
    recorded_settings: ClassVar[tuple[str, ...]] = ("template",)

    def __init__(self, config: RetrievalConfig, backbone: PreTrainedModel | None = None, tokenizer: Any = None):
        super().__init__(config)
        config.check()
        self.tokenizer = tokenizer
        self.source: ModelSource | None = None
        self.attention_is_fixed = False
        self.training_modules = nn.ModuleDict()
        # Read by transformers where a model's tied weights are asked for; the backbones answer for themselves.
        self.all_tied_weights_keys: dict[str, str] = {}
        if backbone is None:
            backbone = auto_class(self.backbone_head).from_config(AutoConfig.for_model(**config.backbone))
        self.backbone = backbone
        config.hidden_size = plain_model(backbone).config.hidden_size
        config.backbone = plain_model(backbone).config.to_dict()

    # ---------------------------------------------------------------------------------------------- to override

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The backbones by attribute name."""
        return {"backbone": self.backbone}

    @classmethod
    @abstractmethod
    def _open(cls, opening: Opening) -> Self:
        """Makes a model of the files and wishes of one call of `from_pretrained`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What changes the model's outputs apart from its weights and its reading of text, as JSON."""

    @abstractmethod
    def _export(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Writes the native folder, but for `hf_distill.json`."""

    def _restore(self, folder: Path) -> None:
        """Takes over the weights that `_export` wrote."""
        self._restore_tower("backbone", folder)

    def _record(self) -> dict[str, Any]:
        """What `hf_distill.json` holds."""
        return {"archetype": self.archetype} | {name: getattr(self.config, name) for name in self.recorded_settings}

    def check_export(self) -> None:  # noqa: B027 - most models can always be saved
        """Raises [`InputError`] if no other library could make the same of a saved model; asked before training."""

    # -------------------------------------------------------------------------------------------------- opening

    @classmethod
    def from_pretrained(  # noqa: D417 - overrides are described as one
        cls,
        pretrained_model_name_or_path: str | os.PathLike | ModelSource,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Opens a model as one of this archetype, whose class says what it reads.

        Args:
            pretrained_model_name_or_path: The folder or Hub id.
            revision: Branch, tag or commit on the Hub.
            dtype: The weights' precision; float32 unless said otherwise, whatever the checkpoint's is.
            attn_implementation: Fixes the attention; by default it is chosen by device and mode.
            overrides: What replaces the checkpoint's own settings, where it is not None: fields of the archetype's
                configuration, and further options that its class names.

        Raises:
            InputError: If the model cannot be found, read, or run as this archetype with these settings.
        """
        wanted = checked_settings(overrides, cls.known_settings, cls.__name__)
        source = find_model(pretrained_model_name_or_path, revision)
        if source.kind not in (None, cls.archetype):
            raise InputError(
                f"this is asked for as a {source.kind} model and opened as a {cls.archetype} one",
                where=f"{source.kind}:{source.name}",
                cure=f"Leave {source.kind}: out, or choose the other kind",
            )
        model = cls._open(Opening(source, wanted, cls.backbone_head, dtype, attn_implementation))
        model.name_or_path = model.config.name_or_path = source.name
        model.source = source
        model.attention_is_fixed = attn_implementation is not None
        return model.eval()

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        """Puts a PEFT adapter (LoRA, say) on every tower; only it is trained, and export merges it.

        Args:
            config: A configuration of `peft`, for example `peft.LoraConfig(r=8, target_modules=["query", "value"])`.
            adapter_name: Its name.
        """
        from peft import get_peft_model

        for name, tower in self.towers.items():
            setattr(self, name, get_peft_model(tower, config, adapter_name=adapter_name))

    def weights_fingerprint(self) -> str:
        """16 hexadecimal digits that identify the weights and settings that make this model's outputs.

        It does not depend on folders or names, nor on weights that the forward pass does not use; it does on the
        weights' precision. The reading of text is not part of it: see [`TextProcessor.settings`].
        """
        unused = tuple(f"{name}.{part}" for name, tower in self.towers.items() for part in unused_parts(tower))
        digest = hashlib.sha256(repr(sorted(self.settings().items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith("training_modules.") or (unused and name.startswith(unused)):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().data)
        return digest.hexdigest()[:16]

    # --------------------------------------------------------------------------------------------------- saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the native folder: it opens in transformers and sentence-transformers without this library.

        Args:
            save_directory: The folder; files of other kinds in it stay.
            is_main_process: Only the main process writes.
            state_dict: This model's state dictionary, where the parameters themselves are sharded (ZeRO-3, FSDP).
            push_to_hub: Not supported here; call `push_to_hub(repo_id)`.
            kwargs: Accepted for the sake of transformers' signature.

        Raises:
            InputError: If the model cannot be exported (`check_export`), or its weights are not all here.
        """
        if push_to_hub:
            raise InputError(
                "save_pretrained(push_to_hub=True) is not supported", cure="Call model.push_to_hub('you/name')"
            )
        self.check_export()
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise InputError("this is a file", where=str(folder), cure="Give a folder to save the model in")
        state = self.state_dict() if state_dict is None else state_dict
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise InputError(
                f"the parameter {empty[0]!r} is empty in this process, so it is sharded over processes",
                where="save_pretrained",
                cure="Pass the consolidated weights as state_dict; under ZeRO-3 set "
                "stage3_gather_16bit_weights_on_model_save in the DeepSpeed configuration",
            )
        kept_apart = self._kept_apart()
        private = {name: tensor.contiguous() for name, tensor in state.items() if name in kept_apart}
        # A checkpoint that a full disk or a kill cuts off must not look like a finished one.
        with staged_files(folder) as temporary:
            self._export(temporary, state)
            write_json(temporary / layouts.EXTRA_FILE, self._record())
            if private:
                from safetensors.torch import save_file

                save_file(private, temporary / layouts.TRAINING_FILE)
        if not private:
            (folder / layouts.TRAINING_FILE).unlink(missing_ok=True)

    def load_checkpoint(self, folder: str | os.PathLike) -> None:
        """Takes over the weights that `save_pretrained` wrote for this very model, in place (to resume training).

        Adapters are restored as adapters: the exported folder holds them merged, `training_modules.safetensors` apart.

        Raises:
            InputError: If the folder's weights do not fit this model.
        """
        folder = Path(folder)
        try:
            self._restore(folder)
            expected = self._kept_apart()
            found: dict[str, torch.Tensor] = {}
            if (folder / layouts.TRAINING_FILE).is_file():
                from safetensors.torch import load_file

                found = load_file(folder / layouts.TRAINING_FILE)
            if expected != set(found):
                raise RuntimeError(f"{layouts.TRAINING_FILE} differs in {sorted(expected ^ set(found))[:3]}")
            self.load_state_dict(found, strict=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"the weights do not fit this model: {str(error).strip()}",
                where=str(folder),
                cure="Resume with the model and the settings that the checkpoint was written with",
            ) from None

    def _kept_apart(self) -> set[str]:
        """The tensors that go to `training_modules.safetensors`: what is trained along, and adapters."""
        names = {f"training_modules.{name}" for name in self.training_modules.state_dict()}
        for tower_name, tower in self.towers.items():
            if is_adapted(tower):
                names |= {f"{tower_name}.{name}" for name, one in tower.named_parameters() if one.requires_grad}
        return names

    def _save_tower(self, name: str, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Saves one backbone natively, adapters merged, and its tokenizer beside it."""
        tower = self.towers[name]
        own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
        if is_adapted(tower):
            # A copy is merged: merging and un-merging the live weights would change them by rounding.
            duplicate = copy.deepcopy(tower)
            duplicate.load_state_dict(own)
            merged = duplicate.merge_and_unload()
            with quiet_transformers():
                merged.save_pretrained(folder, state_dict=self._to_stored(merged.state_dict()))
        else:
            with quiet_transformers():
                tower.save_pretrained(folder, state_dict=self._to_stored(own))
        if self.tokenizer is not None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is not None:
                # What the last call set would otherwise be saved as the tokenizer's own.
                backend.no_truncation()
                backend.no_padding()
            self.tokenizer.save_pretrained(folder)

    def _restore_tower(self, name: str, folder: Path) -> None:
        tower = self.towers[name]
        if is_adapted(tower):
            return
        with quiet_transformers():
            loaded, report = type(tower).from_pretrained(
                folder, config=copy.deepcopy(tower.config), dtype=tower.dtype, output_loading_info=True
            )
        own = set(tower.state_dict())
        wrong = [
            key for key in (*report["missing_keys"], *report["unexpected_keys"]) if key in own or "pooler" not in key
        ]
        if wrong:
            raise RuntimeError(f"weights differ in {sorted(wrong)[:3]}")
        stored = {key: tensor for key, tensor in loaded.state_dict().items() if key in own}
        tower.load_state_dict(self._from_stored(stored))

    def _to_stored(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A backbone's weights as its folder holds them; the same, unless an archetype says otherwise."""
        return state

    def _from_stored(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The way back from `_to_stored`."""
        return state
