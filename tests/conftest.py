"""Tiny towers and streams: every axis its own size, so that a mistaken axis cannot hide behind two equal ones."""

import os

import pytest
import torch

from lamina.backbones.timm_vit import TimmTower

# Tiny tensors are slower on many threads, and one thread makes sums repeatable on any machine.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch):
    """Each test starts from the same seed, with a cache and a data folder of its own."""
    torch.manual_seed(0)
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny_vit():
    """N 17 tokens, D 24 channels, H 2 heads, L 3 blocks, 32 x 32 pixels, float32."""
    return make_tiny_vit()


def make_tiny_vit(dtype=torch.float32):
    torch.manual_seed(0)
    tower = TimmTower.create(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, dtype=dtype
    )
    # timm's small initial weights make all images look alike
    for name, value in tower.named_parameters():
        if value.ndim == 2 and "blocks" in name:
            value.data.mul_(5)
    return tower


def pytest_collection_modifyitems(items):
    """Keep together, in one process, what shares finished runs: the tests of a file, or there, those of one method."""
    for item in items:
        method = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        part = f"-{method}" if item.path.parent.name == "contracts" and isinstance(method, str) else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}{part}"))
