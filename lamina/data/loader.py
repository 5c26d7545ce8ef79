"""Which images form a global batch, and each process's share of it.

A global batch depends on its address and on nothing else: not on the number of processes or workers, nor on
what was drawn before. So a run that resumes at step 812 goes on with the batch that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lamina.data.labelled import labelled
from lamina.data.stream import Split
from lamina.data.transforms import Transform
from lamina.data.views import View
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


class Part(NamedTuple):
    """One process's part of a global batch, before any image is read.

    Attributes:
        positions: (b,), int64. The place of each image in its split.
        passes: (b,), int64. Which pass through the split each image belongs to, counted over epochs and repetitions.
        views: (b,), int64. Which of its fixed views each image shows.
        size, weight: as in `Step`.
    """

    positions: np.ndarray
    passes: np.ndarray
    views: np.ndarray
    size: int
    weight: float


class Step(NamedTuple):
    """One process's part of one training step.

    Attributes:
        images: (b, 3, size, size), float32, normalised.
        columns: (b,), int64; (b, size, size) where images have label maps.
        positions: (b,), int64. The place of each image in its split.
        views: (b,), int64. Which of its fixed views each image shows; 0 where there are none.
        size: images in the global batch, over all processes.
        weight: what to multiply this process's mean loss by, so that the mean over processes (as DDP forms
            it) is the mean over the global batch. 0 for a process that got no image of a small last batch: it
            is given the first one, so that it has something to run.
    """

    images: Tensor
    columns: Tensor
    positions: Tensor
    views: Tensor
    size: int
    weight: float


class PlainBatch(NamedTuple):
    """Images in order, each as it looks at any time.

    Attributes:
        images: (b, 3, size, size), float32, normalised.
        columns: (b,), int64; (b, size, size) where images have label maps.
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


def part_of(
    split: Split,
    *,
    address: tuple[int | str, ...],
    batch_size: int,
    step: int,
    share: Share = Share(),
    repeat: int = 1,
    views: int = 1,
) -> Part:
    """Return this process's part of a step's global batch.

    Args:
        views: how many fixed views an image shows in turn. Images next to each other begin with different ones, so a
            batch mixes them.
    """
    batch = _places(split, address, batch_size, step, repeat)
    mine, weight = share.of(batch)
    again, positions = np.divmod(mine, len(split))
    passes = step // steps_per_epoch(split, batch_size, repeat) * repeat + again
    return Part(positions, passes, (passes + split.first_indices[positions]) % views, len(batch), weight)


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
    views: Sequence[View] = (),
) -> Iterator[Step]:
    """Yield this process's part of every training step from `start_step` to the last of the last epoch.

    The global random generators are left as they were found.

    Args:
        address: of this stretch of training: seed, purpose, task, phase.
        batch_size: images in a global batch, over all processes.
        start_step: counted over all epochs; the steps before are not touched.
        workers: processes that prepare batches ahead; 0 prepares each when it is asked for.
        repeat: how many times an epoch goes through the split, shuffled together and each time augmented anew.
        views: what images show in turn, in place of the transform; empty where each pass draws anew.

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
    steps = _Steps(split, transform, address, batch_size, share, repeat, views)
    return steps.run(range(start_step, total), workers)


def plain_batches(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    share: Share = Share(),
    draw: tuple[int | str, ...] = (),
) -> Iterator[PlainBatch]:
    """Yield this process's images in the order of the split, `batch_size` at a time; every image comes once.

    Shares may differ by one image; a process without images gets no batch.

    Args:
        draw: the address of a view's draw, under which a transform may be random; see `View`.

    Raises:
        ConfigError: when the transform is random without an address, or the batch size below 1.
    """
    if transform.random and not draw:
        raise ConfigError(f"evaluation needs a transform without randomness: 'plain'; got {transform.name!r}")
    steps_per_epoch(split, batch_size)
    mine = np.arange(share.rank, len(split), share.world)
    return _plain(split, View(transform, draw), mine, batch_size)


def _plain(split: Split, view: View, mine: np.ndarray, batch_size: int) -> Iterator[PlainBatch]:
    transform = view.transform
    for start in range(0, len(mine), batch_size):
        positions = mine[start : start + batch_size]
        pixels = _pixels(split, positions)
        if isinstance(pixels, Tensor) and not transform.random:
            seen = transform(pixels)
        else:
            indices = split.first_indices[positions].tolist()
            seen = _seen(pixels, [_viewed(view, index) for index in indices])
        pixels, columns = _apart(seen, split, positions)
        yield PlainBatch(transform.normalised(pixels), columns, torch.from_numpy(positions))


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
        views: Sequence[View],
    ) -> None:
        self.split, self.transform, self.address, self.batch_size = split, transform, address, batch_size
        self.share, self.repeat, self.views = share, repeat, views

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
        part = part_of(
            self.split,
            address=self.address,
            batch_size=self.batch_size,
            step=step,
            share=self.share,
            repeat=self.repeat,
            views=max(1, len(self.views)),
        )
        pixels, columns = _apart(self._augmented(part), self.split, part.positions)
        images = self.transform.normalised(pixels)
        places, views = torch.from_numpy(part.positions), torch.from_numpy(part.views)
        return Step(images, columns, places, views, part.size, part.weight)

    def _augmented(self, part: Part) -> Tensor:
        """Return uint8 (b, 3, size, size), or (b, 4, size, size) with label maps."""
        pixels = _pixels(self.split, part.positions)
        if self.views:
            shown = zip(part.views.tolist(), self.split.first_indices[part.positions].tolist(), strict=True)
            return _seen(pixels, [_viewed(self.views[view], index) for view, index in shown])
        if not self.transform.random and isinstance(pixels, Tensor):
            return self.transform(pixels)
        drawn = zip(part.passes.tolist(), self.split.indices[part.positions].tolist(), strict=True)
        return _seen(pixels, [(self.transform, self._anew(number, index)) for number, index in drawn])

    def _anew(self, number: int, index: int) -> int:
        """Return the seed of what an image draws in a pass of its own."""
        epoch, again = divmod(number, self.repeat)
        # the first time has the address of old
        return seed_at(*self.address, "augment", epoch, index, *([again] if again else []))


def _viewed(view: View, index: int) -> tuple[Transform, int]:
    """Return how an image is seen in a fixed view, and under which seed."""
    return view.transform, seed_at(*view.address, index)


def _seen(pixels: Iterable[Tensor], ways: Sequence[tuple[Transform, int]]) -> Tensor:
    """Return uint8 (b, 3, size, size): each image by its own transform, which draws under its own seed."""
    first = ways[0][0]
    out = torch.empty(len(ways), first.channels, first.spec.size, first.spec.size, dtype=torch.uint8)
    before = torch.get_rng_state()
    try:
        for place, (image, (transform, seed)) in enumerate(zip(pixels, ways, strict=True)):
            # the CPU's generator alone: torch.manual_seed would also reset those of the GPUs
            torch.default_generator.manual_seed(seed)
            out[place] = transform(image)
    finally:
        torch.set_rng_state(before)
    return out


def _pixels(split: Split, positions: np.ndarray) -> Tensor | list[Tensor]:
    """Return the images as one tensor (b, 3, height, width) where the set can, else one by one.

    Label maps come along as a fourth channel: whatever moves a pixel moves its label.
    """
    indices = split.indices[positions]
    if split.dense:
        return [labelled(split.images, int(index)) for index in indices]
    batch = getattr(split.images, "batch", None)
    together = batch(indices) if batch is not None else None
    return together if together is not None else [split.images.image(int(index)) for index in indices]


def _apart(seen: Tensor, split: Split, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return pixels (b, 3, size, size), uint8, and columns: (b,), or (b, size, size) where images have label maps."""
    if not split.dense:
        return seen, _columns(split, positions)
    return seen[:, :3], seen[:, 3].long()


def _columns(split: Split, positions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(split.columns[positions], np.int64))


def _as_it_is(step: Step) -> Step:
    return step
