"""The mask of known false negatives against a loop over cells."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import contrastive_loss, known_negatives_mask


def by_loop(passages: list[list[int]], positives: list[list[int]], target: list[int]) -> torch.Tensor:
    rows = []
    for ids, known, column in zip(passages, positives, target):
        row = []
        for j, passage in enumerate(ids):
            keep = passage >= 0 and passage not in known and passage not in ids[:j]
            if column >= 0:
                keep = j == column or (keep and passage != ids[column])
            row.append(keep)
        rows.append(row)
    return torch.tensor(rows)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_against_a_loop(data):
    queries, columns, width = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(0, 4)))
    number = st.integers(-1, 6)
    own = data.draw(st.booleans())
    passages = [data.draw(st.lists(number, min_size=columns, max_size=columns)) for _ in range(queries if own else 1)]
    positives = [data.draw(st.lists(number, min_size=width, max_size=width)) for _ in range(queries)]
    target = [data.draw(st.integers(-1, columns - 1)) for _ in range(queries)]
    mask = known_negatives_mask(
        torch.tensor(passages if own else passages[0]),
        torch.tensor(positives, dtype=torch.long).reshape(queries, width),
        torch.tensor(target),
    )
    assert torch.equal(mask, by_loop(passages if own else passages * queries, positives, target))


def test_the_batch_of_two_queries_with_the_same_positive():
    # Query 0 and query 1 share passage 7; passage 9 is another positive of query 1 that query 0 mined as a negative.
    passages = torch.tensor([7, 9, 3, 7, 4, 3])
    mask = known_negatives_mask(passages, torch.tensor([[7, -1], [7, 9]]), torch.tensor([0, 3]))
    assert mask.tolist() == [
        [True, True, True, False, True, False],
        [False, False, True, True, True, False],
    ]


def test_without_positives_only_repetitions_go():
    passages = torch.tensor([5, 6, 5, 6, 8])
    mask = known_negatives_mask(passages, None, torch.tensor([-1, 3]))
    assert mask.tolist() == [[True, True, False, False, True], [True, False, False, True, True]]


def test_the_mask_takes_away_the_pull_on_a_known_positive():
    scores = torch.zeros(1, 3, requires_grad=True)
    mask = known_negatives_mask(torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.tensor([0]))
    contrastive_loss(scores, torch.tensor([0]), mask=mask).backward()
    assert scores.grad[0, 1] == 0 and scores.grad[0, 2] > 0
