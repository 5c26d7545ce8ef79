"""Two kernels of one attention, and the rule that chooses."""

import inspect

import pytest
import torch

from lamina.backbones.attention import attend, plain_is_faster


@pytest.mark.parametrize("mask", [None, torch.randn(17, 22)])
def test_both_kernels_agree(monkeypatch, mask):
    q, k, v = torch.randn(7, 2, 17, 12), torch.randn(7, 2, 22, 12), torch.randn(7, 2, 22, 12)
    results = []
    for plain in (False, True):
        monkeypatch.setattr("lamina.backbones.attention.plain_is_faster", lambda *_, plain=plain, **__: plain)
        results.append(attend(q, k, v, mask))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_choice_cannot_depend_on_the_batch():
    assert "batch" not in inspect.signature(plain_is_faster).parameters


def test_other_devices_get_the_fused_kernel():
    assert not plain_is_faster(65, torch.bfloat16, torch.device("cuda"))
