"""Which attention kernel is faster on this CPU: plain matrix products or PyTorch's fused one?

    python benchmarks/attention.py               every shape; about ten minutes
    python benchmarks/attention.py --quick       fewer shapes; a minute or two

The rule in `lamina.backbones.attention.plain_is_faster` was read off this table. Each line is the time of
the plain kernel over that of the fused one: below 1, plain is faster. The two are run in turn and the
figure is the median of the rounds' ratios. What counts is the processor time of one thread: other work
on the machine disturbs it least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.backbones.attention import attention_weights

KEYS, HEADS, BATCHES = (17, 65, 128, 197, 257, 401, 577, 1025), (3, 6, 12, 16), (1, 8, 64)
#: largest number of logits (B * H * K * K) that is worth waiting for
LIMIT = 6e7


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k) @ v


def work(kernel: Callable[..., Tensor], keys: int, heads: int, batch: int, dtype: torch.dtype, back: bool) -> Callable:
    """Return a call that does attention from a joint projection's output, as a block has it."""
    joint = torch.randn(batch, keys, 3, heads, 64, dtype=dtype).requires_grad_(back)
    weight = torch.randn(batch, keys, heads * 64, dtype=dtype)

    def run() -> None:
        q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = kernel(q, k, v).transpose(1, 2).flatten(2)
        if back:
            joint.grad = None
            mixed.backward(weight)

    return run


def ratio(first: Callable[[], None], second: Callable[[], None], seconds: float) -> float:
    """Return the median ratio of their times; rounds go on for `seconds`, at least 5 and at most 31."""
    ratios: list[float] = []
    first(), second()
    start = time.process_time()
    while len(ratios) < 5 or (time.process_time() - start < seconds and len(ratios) < 31):
        took = {}
        for call in (first, second) if len(ratios) % 2 else (second, first):
            before = time.process_time()
            call()
            took[call] = time.process_time() - before
        ratios.append(took[first] / took[second])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keys, heads, batches = ((65, 197, 257, 577), (3, 12), (1, 8)) if arguments.quick else (KEYS, HEADS, BATCHES)
    rows = []
    for dtype, back in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        for k, h, b in itertools.product(keys, heads, batches):
            if b * h * k * k > LIMIT:
                continue
            calls = (work(kernel, k, h, b, dtype, back) for kernel in (plain, F.scaled_dot_product_attention))
            row = {"dtype": str(dtype)[6:], "backward": back, "keys": k, "heads": h, "batch": b}
            rows.append(row | {"plain_over_fused": round(ratio(*calls, seconds=0.1 if arguments.quick else 0.3), 3)})
            print(*rows[-1].values(), sep="\t", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
