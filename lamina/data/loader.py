"""Which images form a global batch, and each process's share of it.

A global batch depends on its address and on nothing else: not on the number of processes or workers, nor on
what was drawn before. So a run that resumes at step 812 goes on with the batch that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lamina.data.stream import Split
from lamina.data.transforms import Transform
from lamina.errors import ConfigError, DataError
from lamina.seeds import generator_at, seed_at


@dataclass(frozen=True)
class Share:
    """Which part of every global batch is this process's: images rank, rank + world, ...

    Raises:
        ConfigError: when the rank is not from 0 to world - 1.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"a share needs 0 <= rank < world; got rank {self.rank} of {self.world}")

    def of(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        """Return this process's part of a global batch (g,), and the weight of its mean; see `Step`."""
        mine = batch[self.rank :: self.world]
        weight = len(mine) / len(batch) * self.world
        return (mine if len(mine) else batch[:1]), weight


class Step(NamedTuple):
    """One process's part of one training step.

    Attributes:
        images: (b, 3, size, size), float32, normalised.
        columns: (b,), int64.
        positions: (b,), int64. The place of each image in its split.
        size: images in the global batch, over all processes.
        weight: what to multiply this process's mean loss by, so that the mean over processes (as DDP forms
            it) is the mean over the global batch. 0 for a process that got no image of a small last batch: it
            is given the first one, so that it has something to run.
    """

    images: Tensor
    columns: Tensor
    positions: Tensor
    size: int
    weight: float


class PlainBatch(NamedTuple):
    """Images without randomness, in order.

    Attributes:
        images: (b, 3, size, size), float32, normalised.
        columns: (b,), int64.
        positions: (b,), int64. The place of each image in its split.
    """

    images: Tensor
    columns: Tensor
    positions: Tensor


def steps_per_epoch(split: Split, batch_size: int, repeat: int = 1) -> int:
    """Return how many global batches an epoch has; the last one may be smaller.

    Args:
        repeat: how many times an epoch goes through the split, shuffled together.

    Raises:
        ConfigError: when a number is below 1.
    """
    for name, number in {"batch_size": batch_size, "repeat": repeat}.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1; got {number}")
    return -(-len(split) * repeat // batch_size)


def global_batch(
    split: Split, *, address: tuple[int | str, ...], batch_size: int, step: int, repeat: int = 1
) -> np.ndarray:
    """Return the positions (g,), int64, of the images in a step's global batch; steps count over epochs.

    Args:
        repeat: as in `steps_per_epoch`; an image may then come twice in a batch.
    """
    return _places(split, address, batch_size, step, repeat) % len(split)


def _places(split: Split, address: tuple[int | str, ...], batch_size: int, step: int, repeat: int) -> np.ndarray:
    """Return the places (g,) of a step's global batch among `repeat` splits in a row."""
    epoch, place = divmod(step, steps_per_epoch(split, batch_size, repeat))
    return _order(address, epoch, len(split) * repeat)[place * batch_size : (place + 1) * batch_size].copy()


@lru_cache(maxsize=4)
def _order(address: tuple[int | str, ...], epoch: int, count: int) -> np.ndarray:
    # kept, because every step of an epoch asks for it
    return torch.randperm(count, generator=generator_at(*address, "order", epoch)).numpy()


def training_steps(
    split: Split,
    transform: Transform,
    *,
    address: tuple[int | str, ...],
    epochs: int,
    batch_size: int,
    start_step: int = 0,
    share: Share = Share(),
    workers: int = 0,
    repeat: int = 1,
) -> Iterator[Step]:
    """Yield this process's part of every training step from `start_step` to the last of the last epoch.

    The global random generators are left as they were found.

    Args:
        address: of this stretch of training: seed, purpose, task, phase.
        batch_size: images in a global batch, over all processes.
        start_step: counted over all epochs; the steps before are not touched.
        workers: processes that prepare batches ahead; 0 prepares each when it is asked for.
        repeat: how many times an epoch goes through the split, shuffled together and each time augmented anew.

    Raises:
        DataError: when the split is empty.
        ConfigError: when a number is out of range.
    """
    if not len(split):
        raise DataError("there is nothing to train on: the split has no images")
    total = epochs * steps_per_epoch(split, batch_size, repeat)
    if start_step < 0 or workers < 0 or epochs < 0:
        raise ConfigError(
            f"start_step, workers and epochs must be at least 0; got {start_step}, {workers} and {epochs}"
        )
    steps = _Steps(split, transform, address, batch_size, share, repeat)
    return steps.run(range(start_step, total), workers)


def plain_batches(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    share: Share = Share(),
) -> Iterator[PlainBatch]:
    """Yield this process's images in the order of the split, `batch_size` at a time; every image comes once.

    Shares may differ by one image; a process without images gets no batch.

    Raises:
        ConfigError: when the transform is random, or the batch size below 1.
    """
    if transform.random:
        raise ConfigError(f"evaluation needs a transform without randomness: 'plain'; got {transform.name!r}")
    steps_per_epoch(split, batch_size)
    mine = np.arange(share.rank, len(split), share.world)
    return _plain(split, transform, mine, batch_size)


def _plain(split: Split, transform: Transform, mine: np.ndarray, batch_size: int) -> Iterator[PlainBatch]:
    for start in range(0, len(mine), batch_size):
        positions = mine[start : start + batch_size]
        pixels = _pixels(split, positions)
        seen = transform(pixels) if isinstance(pixels, Tensor) else torch.stack([transform(image) for image in pixels])
        yield PlainBatch(transform.normalised(seen), _columns(split, positions), torch.from_numpy(positions))


class _Steps:
    """The steps by number; a DataLoader's workers index it."""

    def __init__(
        self,
        split: Split,
        transform: Transform,
        address: tuple[int | str, ...],
        batch_size: int,
        share: Share,
        repeat: int,
    ) -> None:
        self.split, self.transform, self.address, self.batch_size = split, transform, address, batch_size
        self.share, self.repeat = share, repeat

    def run(self, numbers: range, workers: int) -> Iterator[Step]:
        if not workers:
            return (self[number] for number in numbers)
        # one item is one whole step; a generator of its own, as DataLoader else draws from the global one
        return iter(
            DataLoader(
                self,  # type: ignore[arg-type]
                sampler=numbers,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]
                generator=torch.Generator(),
            )
        )

    def __getitem__(self, step: int) -> Step:
        batch = _places(self.split, self.address, self.batch_size, step, self.repeat)
        mine, weight = self.share.of(batch)
        epoch = step // steps_per_epoch(self.split, self.batch_size, self.repeat)
        seen = self._augmented(mine, epoch)
        positions = mine % len(self.split)
        columns, places = _columns(self.split, positions), torch.from_numpy(positions)
        return Step(self.transform.normalised(seen), columns, places, len(batch), weight)

    def _augmented(self, places: np.ndarray, epoch: int) -> Tensor:
        """Return uint8 (b, 3, size, size)."""
        times, positions = np.divmod(places, len(self.split))
        pixels = _pixels(self.split, positions)
        if not self.transform.random and isinstance(pixels, Tensor):
            return self.transform(pixels)
        size = self.transform.spec.size
        out = torch.empty(len(positions), 3, size, size, dtype=torch.uint8)
        before = torch.get_rng_state()
        try:
            for place, image in enumerate(pixels):
                index = int(self.split.indices[positions[place]])
                again = [int(times[place])] if times[place] else []  # the first time has the address of old
                # the CPU's generator alone: torch.manual_seed would also reset those of the GPUs
                torch.default_generator.manual_seed(seed_at(*self.address, "augment", epoch, index, *again))
                out[place] = self.transform(image)
        finally:
            torch.set_rng_state(before)
        return out


def _pixels(split: Split, positions: np.ndarray) -> Tensor | list[Tensor]:
    """Return the images as one tensor (b, 3, height, width) where the set can, else one by one."""
    indices = split.indices[positions]
    batch = getattr(split.images, "batch", None)
    together = batch(indices) if batch is not None else None
    return together if together is not None else [split.images.image(int(index)) for index in indices]


def _columns(split: Split, positions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(split.columns[positions], np.int64))


def _as_it_is(step: Step) -> Step:
    return step
