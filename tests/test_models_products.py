"""Fast matrix products of a training on a CPU: values, gradients, and where torch's own are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_distill.models import products
from hf_distill.models.products import FastOnCpu, onednn_works, product


needed = pytest.mark.skipif(not onednn_works(), reason="no oneDNN products on this processor")


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.fixture
def calls(monkeypatch):
    """How often the product was computed by oneDNN."""
    counted = []
    multiply = products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *args: counted.append(1) or multiply(*args))
    return counted


@needed
@pytest.mark.parametrize("rows", [(200,), (5, 40), (2, 3, 34)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_torchs(calls, rows, with_bias):
    input, weight, bias = tensors((*rows, 96), (72, 96), (72,))
    bias = bias if with_bias else None
    inputs = [one for one in (input, weight, bias) if one is not None]
    weights = torch.randn(*rows, 72, generator=torch.Generator().manual_seed(4))
    expected = F.linear(input, weight, bias)
    gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    assert not calls
    with FastOnCpu():
        found = F.linear(input, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), inputs), gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
    assert len(calls) == 3


@needed
def test_only_what_is_trained_gets_a_gradient(calls):
    layer = nn.Linear(64, 64)
    layer.weight.requires_grad_(False)
    with FastOnCpu():
        layer(torch.randn(64, 64)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((64,), 64.0))
    assert len(calls) == 1


@needed
def test_inputs_that_are_not_contiguous(calls):
    input, weight = tensors((64, 128), (80, 64))
    with FastOnCpu():
        found = F.linear(input.T, weight)
        found.T.contiguous().sum().backward()
    torch.testing.assert_close(found, input.T @ weight.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(input.grad, weight.sum(0)[:, None].expand(64, 128), rtol=1e-5, atol=1e-4)
    assert calls


def test_cases_that_stay_with_torch(calls):
    large, small = tensors((100, 64), (100, 8))
    with FastOnCpu():
        nn.Linear(8, 100)(small)
        nn.Linear(64, 100)(large[:2])
        nn.Linear(64, 100, dtype=torch.float64)(large.double())
        nn.Linear(64, 100, dtype=torch.bfloat16)(large.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.Linear(64, 100)(large).dtype == torch.bfloat16
    nn.Linear(64, 100)(large)
    assert not calls


@pytest.mark.parametrize("shape", [(3, 5, 7), (70, 65, 80)])
def test_product(shape):
    left, right = (one.detach() for one in tensors(shape[::2], shape[1:]))
    torch.testing.assert_close(product(left, right), left @ right.T, rtol=1e-5, atol=1e-4)
