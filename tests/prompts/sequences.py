"""What prompts do, computed slowly: every block runs on all of [class token | prompts | patches].

B 5, N 17, D 24, H 2, L 3; float64.
"""

import torch

from tests.conftest import make_tiny_vit


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tower64():
    return make_tiny_vit(torch.float64)


def images():
    return drawn(5, 3, 32, 32, seed=3)


def block_by_hand(block, x, temperature=1.0, hidden=slice(0, 0)):
    """One block of timm by its own layers; keys of the rows `hidden` are behind a mask of minus infinity."""
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / q.shape[-1] ** 0.5 / temperature
    logits[..., hidden] = -torch.inf
    x = x + attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def by_hand(tower, pixels, entering, *, temperatures=None, masked=False):
    """Return features, and by block what entered and what came out.

    Args:
        entering: of (layer, what the last block made of the prompts, its patches): prompts (B, M, D) that enter.
    """
    x = tower.embed(pixels)[0]
    first, patches, out, seen = x[:, :1], x[:, 1:], None, []
    for layer, block in enumerate(tower.model.blocks):
        prompts = entering(layer, out, patches).expand(len(x), -1, -1)
        rows = torch.cat([first, prompts, patches], dim=1)
        inside = slice(1, 1 + prompts.shape[1])
        temperature = 1.0 if temperatures is None else temperatures[layer]
        rows = block_by_hand(block, rows, temperature, inside if masked else slice(0, 0))
        first, out, patches = rows[:, :1], rows[:, inside], rows[:, inside.stop :]
        seen.append((prompts, out))
    return tower.pool(torch.cat([first, patches], dim=1)), seen


def entering_of(tower, prompts, pixels):
    """Return what enters each block (B, M, D), as a tap sees it."""
    seen = []
    tower(pixels, prompts.start(), lambda probe: seen.append(probe.entering))
    return seen


def gradients(value, parameters):
    """Return the gradients of a fixed weighting of a value, one for each parameter."""
    return torch.autograd.grad((value * drawn(*value.shape, seed=4)).sum(), list(parameters), allow_unused=True)


def near(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
