"""A tower in which exact null spaces exist: N 5 tokens, H 2 heads, D 86, L 4, 8 x 8 pixels; float64."""

import pytest
import torch

from lamina.backbones.timm_vit import TimmTower


@pytest.fixture
def double():
    """Everything that is made in this test is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def roomy(double):
    """A tower wide enough that three images leave most channels and tokens alone; every weight matters."""
    tower = TimmTower.create(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=86, depth=4, num_heads=2, dtype=torch.float64
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.rand_like(weight) + (0.5 if "norm" in name else -0.5))
            else:
                scale = 1.0 if weight.ndim == 3 else weight[0].numel() ** -0.5  # tokens and positions, or weights
                weight.copy_((1.4 if "blocks" in name else 1.0) * scale * torch.randn_like(weight))
    return tower
