"""Fast dropout: distribution, gradients, random states, and where it leaves torch alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_distill.models.dropout import dropout_mask, has_dropout, set_dropout
from hf_distill.models.products import FastOnCpu


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("probability", [0.003, 0.1, 0.5, 0.9])
def test_mask_drops_with_the_probability_and_keeps_the_mean(dtype, probability):
    torch.manual_seed(0)
    mask = dropout_mask(torch.Size((500, 1001)), dtype, probability)
    assert mask.shape == (500, 1001) and mask.dtype == dtype
    values = mask.double().unique()
    expected = torch.tensor([0.0, 1 / (1 - probability)], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-3, atol=0)
    dropped = (mask == 0).double()
    deviation = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(dropped.mean() - probability) < 5 * deviation + 2**-16
    # Neither neighbours nor rows go together.
    for one, other in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])):
        together = (one * other).mean()
        assert abs(together - dropped.mean() ** 2) < 6 * (probability**2 * (1 - probability**2) / one.numel()) ** 0.5


def test_gradient_goes_where_the_values_went():
    values = torch.ones(64, 64, requires_grad=True)
    with FastOnCpu():
        result = nn.Dropout(0.3)(values)
    result.sum().backward()
    torch.testing.assert_close(values.grad, result.detach(), rtol=0, atol=0)
    assert 0 < (values.grad == 0).float().mean() < 1


def test_random_state_of_torch_brings_a_mask_back():
    values = torch.ones(100, 100)
    with FastOnCpu():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first, second = F.dropout(values, 0.5), F.dropout(values, 0.5)
        torch.set_rng_state(state)
        again = F.dropout(values, 0.5)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_cases_that_stay_with_torch():
    values = torch.rand(30, 30)
    with FastOnCpu():
        assert torch.equal(nn.Dropout(0.5).eval()(values), values)
        assert torch.equal(F.dropout(values, 0.0), values)
        assert torch.equal(F.dropout(values, 1.0), torch.zeros_like(values))
        torch.manual_seed(0)
        double = F.dropout(values.double(), 0.5)
        changed = values.clone()
        F.dropout(changed, 0.5, True, True)
    torch.manual_seed(0)
    torch.testing.assert_close(double, F.dropout(values.double(), 0.5), rtol=0, atol=0)
    assert (changed == 0).any()


def test_empty_input():
    with FastOnCpu():
        assert F.dropout(torch.ones(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_model_in_training_uses_it(tiny_bert, precision, monkeypatch):
    from hf_distill.models import DenseRetriever, dropout, set_dropout

    model = DenseRetriever.from_pretrained(tiny_bert)
    set_dropout(model, 0.2)
    shapes = []
    monkeypatch.setattr(
        dropout, "dropout_mask", lambda shape, *rest: shapes.append(tuple(shape)) or dropout_mask(shape, *rest)
    )
    ids = torch.tensor([[2, 5, 6, 3]])
    batch = {"chunks": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], "inverse": torch.tensor([0])}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        model.eval()(query=batch)
        assert not shapes
        model.train()(query=batch)
    layers, heads = model.backbone.config.num_hidden_layers, model.backbone.config.num_attention_heads
    # The embeddings, and in each layer the attention's weights, its output and the feed-forward output.
    assert len(shapes) == 1 + 3 * layers
    assert shapes.count((1, heads, 4, 4)) == layers


def test_a_model_drops_until_it_is_told_not_to():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.dense = 0.2, nn.Dropout(0.0)

    layer = Layer()
    assert has_dropout(layer)
    set_dropout(layer, 0.0)
    assert not has_dropout(layer)
    layer.dense.p = 0.1
    assert has_dropout(layer)
