"""Frozen linear layers: equal to `F.linear`, whatever they are made of inside."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.backbones.packed import FrozenLinear, _available, linear
from lamina.backbones.timm_vit import TimmTower

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}
packs = pytest.mark.skipif(not _available(torch.bfloat16), reason="no bfloat16 operators of oneDNN here")


def pair(dtype, bias=True, keep=False):
    layer = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    return layer, FrozenLinear(copy.deepcopy(layer), keep=keep)


def both(x, one, other):
    """Values and gradients of two layers at the same place."""
    found = []
    for layer in (one, other):
        x = x.detach().clone().requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 1, 40, dtype=y.dtype)).sum().backward()
        found += [y.detach(), x.grad]
    return found[:2], found[2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 17, 24), (1, 1, 24), (5, 24), (0, 17, 24), (7, 0, 24)])
def test_values_and_gradients_are_those_of_a_plain_layer(dtype, bias, shape):
    want, got = both(torch.randn(shape, dtype=dtype), *pair(dtype, bias))
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_some_rows_of_a_weight_give_some_of_the_values():
    layer, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(7, 17, 24)
    got = linear(x.transpose(0, 1), layer.weight[8:20], layer.bias[8:20])
    torch.testing.assert_close(got, layer(x).transpose(0, 1)[..., 8:20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_operators_it_is_a_plain_layer(monkeypatch, dtype):
    monkeypatch.setattr("lamina.backbones.packed._available", lambda dtype: False)
    layer, frozen = pair(dtype)
    want, got = both(torch.randn(7, 17, 24, dtype=dtype), layer, frozen)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert frozen.weight is not None


@packs
@pytest.mark.parametrize("keep", [True, False])
def test_a_packed_copy_replaces_the_plain_weight_unless_rows_of_it_are_used(keep):
    layer, frozen = pair(torch.bfloat16, keep=keep)
    frozen(torch.randn(7, 17, 24, dtype=torch.bfloat16))
    assert (frozen.weight is not None) == keep
    assert frozen._back is None
    frozen(torch.randn(7, 17, 24, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert torch.equal(frozen._ahead.to_dense(), layer.weight)
    assert torch.equal(frozen._back.to_dense(), layer.weight.t())


def test_a_weight_in_float32_stays_as_it_is():
    layer, frozen = pair(torch.float32)
    weight = frozen.weight
    both(torch.randn(7, 17, 24), layer, frozen)
    assert frozen.weight is weight and frozen._ahead is None


@pytest.mark.parametrize(
    "move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.float().bfloat16()]
)
def test_a_used_layer_can_be_copied_sent_and_cast(move):
    layer, frozen = pair(torch.bfloat16)
    x = torch.randn(7, 17, 24, dtype=torch.bfloat16)
    both(x, layer, frozen)
    moved = move(frozen)
    assert torch.equal(moved.weight, layer.weight) and not moved.weight.requires_grad
    for one in (moved, frozen):
        want, got = both(x, layer, one)
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_a_tower_computes_with_frozen_layers_only(make, images):
    for dtype in (torch.float32, torch.bfloat16):
        blocks = TimmTower(make(), dtype=dtype).model.blocks
        assert not [m for m in blocks.modules() if type(m) is nn.Linear]
        assert sum(isinstance(m, FrozenLinear) for m in blocks.modules()) == 4 * 3


def test_a_used_tower_can_be_copied(half, images):
    want = half(images).features
    assert torch.equal(copy.deepcopy(half)(images).features, want)
    assert torch.equal(half(images).features, want)


def test_a_fallback_in_float64_is_a_plain_layer():
    layer, frozen = pair(torch.float64)
    x = torch.randn(7, 17, 24, dtype=torch.float64)
    assert torch.equal(frozen(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("used", [False, True])
def test_another_precision_than_the_weights_is_refused_as_by_a_plain_layer(used):
    layer, frozen = pair(torch.bfloat16)
    if used:
        frozen(torch.randn(7, 24, dtype=torch.bfloat16))
    for one in (layer, frozen):
        with pytest.raises(RuntimeError):
            one(torch.randn(7, 24))


def test_under_autocast_a_low_precision_input_meets_a_float32_weight():
    layer, frozen = pair(torch.float32)
    x = torch.randn(7, 24, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), layer(x))
