"""Pre-training of a masked language model for lexical retrieval, from texts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..console import get_logger
from ..data.masking import CorpusTexts, MaskingCollator, StreamedTexts
from ..data.tables import Corpus
from ..errors import InputError
from ..losses.combine import LossTerm
from ..models.lexmae import LexMAEForPreTraining
from .arguments import LexMAETrainingArguments
from .base import STUDENT, BaseTrainer
from .training_rows import data_seed


logger = get_logger(__name__)


class LexMAEPretrainer(BaseTrainer):
    """Trains an encoder to predict masked tokens, and to say a text in vocabulary terms from which a weak decoder can.

    The result is an ordinary masked-LM checkpoint. With a model of `decoder_layers=0` this is plain masked language
    modelling on the same batches, to compare with.

    Args:
        model: What is trained.
        args: Its configuration.
        texts: A corpus, or a stream without an end (`args.max_steps` says when to stop).
        callbacks: See [`BaseTrainer`].

    Raises:
        InputError: For shares of masked tokens that cannot be, a corpus that fills no batch, or a stream without
            `max_steps`.

    Shen et al., "LexMAE: Lexicon-Bottlenecked Pretraining for Large-Scale Retrieval" (2023).
    """

    _name = "LexMAE pre-training"
    _tags = ("hf_distill", "lexmae", "fill-mask")
    _paper = {
        "title": "LexMAE: Lexicon-Bottlenecked Pretraining for Large-Scale Retrieval",
        "authors": "Tao Shen, Xiubo Geng, Chongyang Tao, Can Xu, Xiaolong Huang, Binxing Jiao, Linjun Yang and others",
        "year": "2023",
        "arxiv": "2208.14754",
    }

    def __init__(
        self,
        model: LexMAEForPreTraining,
        args: LexMAETrainingArguments,
        texts: Corpus | StreamedTexts,
        **kwargs: Any,
    ):
        with_decoder = model.config.decoder_layers > 0
        collator = MaskingCollator(
            STUDENT,
            model.processor(),
            encoder_rate=args.encoder_rate,
            decoder_rate=args.decoder_rate if with_decoder else None,
            decoder_masking=args.decoder_masking,
            seed=data_seed(args),
        )
        if isinstance(texts, StreamedTexts):
            if args.max_steps <= 0:
                raise InputError(
                    "a stream has no end", where="pretraining", cure="Say how long to train with max_steps"
                )
        else:
            texts = CorpusTexts(texts, model.config.template)
            batch = args.per_device_train_batch_size * max(args.world_size, 1)
            if len(texts) < batch:
                raise InputError(
                    f"{len(texts)} texts do not fill one batch of {batch}",
                    where="pretraining",
                    cure="Lower --per_device_train_batch_size, or bring more texts",
                )
        super().__init__(model, args, **kwargs)
        if not with_decoder:
            self._name, self._tags, self._paper = "Masked language modelling", ("hf_distill", "fill-mask"), None
        self.train_dataset, self.data_collator = texts, collator

    def parse_losses(self, args: LexMAETrainingArguments) -> dict[str, LossTerm]:
        return {}

    def loss_parts(self, model: Any, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        # Means over the tokens of the joint batch, not of each process's.
        labels = batch["tokens"][STUDENT]
        losses = {
            "encoder_loss": (output.encoder_loss, "labels"),
            "decoder_loss": (output.decoder_loss, "decoder_labels"),
        }
        return {
            name: self.reduce_counted(loss, labels[which] >= 0, candidates="own")
            for name, (loss, which) in losses.items()
            if loss is not None
        }

    @property
    def must_be_finite(self) -> tuple[str, ...]:
        return ("encoder_loss", "decoder_loss")
