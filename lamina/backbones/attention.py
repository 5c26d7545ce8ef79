"""Attention, and which kernel computes it: the one place where that is decided."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Longest row of keys for which plain matrix products are used on a CPU in low precision.
#: `benchmarks/attention.py` found them faster at every length up to 1025, forward and backward together
#: (0.2 to 0.8 of the fused kernel's time from 65 keys on; forward alone mostly 0.4 to 1). But their memory
#: grows with the square of the length, so the longest rows are left to the fused kernel. In float32 fused
#: is about as fast or faster from 65 keys on.
PLAIN_UP_TO = 640


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mix values by scaled dot-product attention.

    The kernel depends on the length of a row, on dtype and device, never on the number of images, so
    that an image's result does not depend on how many others are in its batch.

    Args:
        q: (B, H, R, d). k, v: (B, H, K, d).
        mask: (R, K), or (B, 1, R, K), added to the logits.

    Returns:
        (B, H, R, d).
    """
    if plain_is_faster(k.shape[2], k.dtype, k.device):
        return attention_weights(q, k, mask) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the softmax of the scaled logits (B, H, R, K); see `attend`."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if mask is None else logits + mask.to(logits.dtype)).softmax(dim=-1)


def plain_is_faster(keys: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether plain matrix products are the faster kernel for rows of `keys` keys.

    >>> plain_is_faster(65, torch.bfloat16, torch.device("cpu"))
    True
    >>> plain_is_faster(65, torch.float32, torch.device("cpu"))
    False
    """
    return device.type == "cpu" and dtype != torch.float32 and dtype != torch.float64 and keys <= PLAIN_UP_TO
