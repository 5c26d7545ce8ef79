"""Tiny towers in which every axis has a size of its own: B 7, N 17, M 5, D 24, H 2, L 3."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from lamina.backbones.timm_vit import TimmTower

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}


def stir(model):
    """Give every weight a value that matters: timm starts with small ones, and norms and biases that do nothing."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim > 1:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def tiny(name=None, **changes):
    """A tiny model of timm: a plain ViT, or `name` made small."""
    torch.manual_seed(0)
    arguments = {**TINY, **changes}
    if name is None:
        return stir(VisionTransformer(**arguments))
    return stir(timm.create_model(name, pretrained=False, **arguments))


@pytest.fixture
def make():
    """`tiny`, for tests that need a model of their own."""
    return tiny


@pytest.fixture
def vit():
    return tiny()


@pytest.fixture
def tower(vit):
    return TimmTower(vit)


@pytest.fixture
def half():
    """The same tower in bfloat16."""
    return TimmTower(tiny(), dtype=torch.bfloat16)


@pytest.fixture
def images():
    return torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def values():
    """Prompts (L, M, D)."""
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["fused", "plain"])
def kernel(request, monkeypatch):
    """Either attention kernel, whatever the rule would say."""
    monkeypatch.setattr("lamina.backbones.attention.plain_is_faster", lambda *_, **__: request.param == "plain")
    return request.param
