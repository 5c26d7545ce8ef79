"""Random numbers by address, not by history.

Every draw in a run has an address: (run seed, purpose, task, epoch, sample or step). The seed of a
draw is a hash of its address, so a run that resumes at step 812 draws what an unbroken run draws at
step 812, whatever the number of workers or devices.
"""

from __future__ import annotations

import hashlib

import torch


def seed_at(*address: int | str) -> int:
    """Hash an address to a 63-bit seed.

    >>> seed_at(0, "order", 1, 2) == seed_at(0, "order", 1, 2)
    True
    >>> seed_at(0, "order", 1, 2) == seed_at(0, "order", 2, 1)
    False
    """
    text = "/".join(map(str, address)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator_at(*address: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `seed_at(*address)`."""
    return torch.Generator().manual_seed(seed_at(*address))
