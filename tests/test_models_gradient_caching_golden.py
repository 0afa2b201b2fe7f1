"""Gradient caching and negatives from all processes together: the golden cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_distill.distributed import gather_rows, rank, scale_gradient, world_size
from hf_distill.losses import contrastive_loss
from hf_distill.models.base import RetrievalModel


GOLDEN = Path(__file__).parent / "golden" / "tele_gradcache_ddp.npz"
CHUNKS = {"none": None, "8_32": (8, 32), "4_8": (4, 8), "3_5": (3, 5), "1_1": (1, 1)}


class Tower(nn.Module):
    """The golden cases' encoder: a text is its first token's features through two layers."""

    def __init__(self, weights, name):
        super().__init__()
        for part in ("W1", "b1", "W2"):
            setattr(self, part, nn.Parameter(torch.from_numpy(weights[f"{name}.{part}"].copy())))

    def forward(self, features):
        return torch.tanh(features[:, 0] @ self.W1 + self.b1) @ self.W2


class Towers(nn.Module):
    """One or two towers that encode in chunks, each recomputed in the backward pass as `RetrievalModel` does it."""

    def __init__(self, golden, tag):
        super().__init__()
        weights = {key.removeprefix(f"{tag}.W."): golden[key] for key in golden.files if key.startswith(f"{tag}.W.")}
        self.lm_q = Tower(weights, "lm_q")
        self.lm_p = Tower(weights, "lm_p") if tag == "untied" else self.lm_q
        self.recompute = False

    def _attend_for_training(self):
        """There is no attention to choose."""

    def forward(self, queries, passages, chunks):
        self.recompute = chunks is not None
        sides = ((self.lm_q, queries, chunks and chunks[0]), (self.lm_p, passages, chunks and chunks[1]))
        return [
            torch.cat([RetrievalModel._maybe_recompute(self, tower, part) for part in texts.split(size or len(texts))])
            for tower, texts, size in sides
        ]


def step(model, golden, chunks):
    """This process's share of the golden batch: the joint loss, with its gradient left in the parameters."""
    queries, passages = (torch.from_numpy(golden[name]).chunk(world_size())[rank()] for name in ("q_feats", "p_feats"))
    query, passage = model(queries, passages, chunks)
    scores = gather_rows(query) @ gather_rows(passage).T
    per_query = scores.shape[1] // scores.shape[0]
    loss = contrastive_loss(scores, torch.arange(len(scores)) * per_query)
    scale_gradient(loss, world_size()).backward()
    return loss.item(), scores


def check(model, golden, tag, loss):
    towers = getattr(model, "module", model)
    assert loss == pytest.approx(float(golden[f"{tag}.loss"]), abs=1e-5)
    for name in [key for key in golden.files if key.startswith(f"{tag}.grad.")]:
        _, _, tower, part = name.split(".")
        gradient = getattr(getattr(towers, tower), part).grad
        np.testing.assert_allclose(gradient.numpy(), golden[name], atol=2e-6)


@pytest.mark.parametrize("tag", ["tied", "untied"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_one_process(tag, chunks):
    golden = np.load(GOLDEN)
    model = Towers(golden, tag)
    calls = []
    model.lm_p.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, scores = step(model, golden, CHUNKS[chunks])
    check(model, golden, tag, loss)
    np.testing.assert_allclose(scores.detach().numpy(), golden[f"{tag}.scores"], atol=1e-5)
    if chunks == "1_1":  # each of 32 passages twice, and in one shared tower each of 8 queries too
        assert len(calls) == 2 * (32 + (8 if tag == "tied" else 0))
