"""Tiny towers and streams: every axis its own size, so that a mistaken axis cannot hide behind two equal ones."""

import os

import pytest
import torch

from lamina.backbones.timm_vit import TimmTower
from lamina.registry import method_names

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep together, in one process, what shares finished runs: the tests of a file, or of one method in contracts.

    Groups marked by `xdist_group` would say so, too, but pytest-xdist 3.8 does not see them under pytest 9.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    methods = sorted(method_names(), key=len, reverse=True)  # "l2p-pgp" before "l2p", which it begins with

    class ByFileAndMethod(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, test = nodeid.partition("::")
            part = test.partition("[")[2] if path.startswith("tests/contracts/") else ""
            return f"{path} {next((name for name in methods if part.startswith(name)), '')}"

    config.option.loadscopereorder = False  # the short ones, doctests, stay at the end
    return ByFileAndMethod(config, log)
