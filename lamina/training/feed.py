"""Batches of a task's images, or of their frozen features where those are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from lamina.backbones.tower import Tower
from lamina.data.cache import cached_array
from lamina.data.loader import Share, part_of, plain_batches, steps_per_epoch, training_steps
from lamina.data.pictures import hashed
from lamina.data.stream import Split, Task
from lamina.data.transforms import InputSpec, Transform, still_of, transform
from lamina.data.views import Asked, View, fixed_views
from lamina.errors import ConfigError
from lamina.heads.base import Head
from lamina.learner import Learner, Phase
from lamina.model import Batch
from lamina.seeds import generator_at


class Fed(NamedTuple):
    """One training step's worth.

    Attributes:
        batch: this process's share, on its device.
        weight: of this process's mean loss; see `lamina.data.loader.Step`.
        images: in the global batch.
    """

    batch: Batch
    weight: float
    images: int


@dataclass
class Feed:
    """Brings batches to a device, to every process its share.

    Attributes:
        spec: the pixels that the tower takes.
        augmentation: name of the transform of training images.
        views: training images show fixed ones in turn: the plain image and its mirror image ("flip"), or so many draws
            of the augmentation. None shows a new draw in every pass, and features of plain images.
        seed: of the run; order and augmentation depend on it and on the address of a step alone.
        eval_batch: images in one batch where nothing is trained.
        workers: processes that load training images; 0 loads in this one.
        features: the frozen tower, when its features stand in for images.
        layers: from how many of its last blocks they are read, side by side.
        queries: the frozen tower, when prompts ask for its features: images that come without augmentation or in
            fixed views bring them along, computed once.
        transform: from the name of a transform and the pixels that the tower takes to the transform.

    Raises:
        ConfigError: when nobody knows the augmentation, or there are no such views.
    """

    fabric: Fabric
    spec: InputSpec
    augmentation: str = "crop-flip"
    views: Asked = None
    seed: int = 0
    eval_batch: int = 100
    workers: int = 0
    features: Tower | None = None
    layers: int = 1
    queries: Tower | None = None
    transform: Callable[[str, InputSpec], Transform] = transform

    @classmethod
    def to(cls, learner: Learner, fabric: Fabric, spec: InputSpec, **arguments: Any) -> Feed:
        """Return what feeds a method as it was built; the other arguments are the attributes above."""
        model = learner.model
        asked = model.prompts is not None and model.prompts.query == "frozen"
        return cls(
            fabric,
            spec,
            features=model.tower if learner.cache == "features" else None,
            layers=model.layers,
            queries=model.tower if asked and learner.cache == "off" else None,
            **arguments,
        )

    def __post_init__(self) -> None:
        self.share = Share(self.fabric.global_rank, self.fabric.world_size)
        self.plain_view = View(self.transform(still_of(self.augmentation), self.spec))
        self.train_transform = self.transform(self.augmentation, self.spec)
        if self.views is not None and self.train_transform.channels > 3:
            raise ConfigError(f"images with label maps have no fixed views; got views={self.views}: leave it out")
        self.fixed = fixed_views(self.views, self.augmentation, self.spec, self.seed)

    def steps(self, split: Split, phase: Phase) -> int:
        """Return how many steps a phase takes on a split."""
        return phase.epochs * steps_per_epoch(split, phase.batch_size, phase.repeat)

    def train(self, task: Task, number: int, phase: Phase, first: int) -> Iterator[Fed]:
        """Yield the steps of phase `number` of a task, from step `first` on."""
        address = (self.seed, "train", task.index, number)
        split, size = task.train, phase.batch_size
        if self.features is not None:
            features = self._of_views(self.features, split, self.fixed or [self.plain_view], self.layers)
            columns, views = torch.from_numpy(split.columns), len(features)
            for step in range(first, self.steps(split, phase)):
                mine = part_of(
                    split,
                    address=address,
                    batch_size=size,
                    step=step,
                    share=self.share,
                    repeat=phase.repeat,
                    views=views,
                )
                batch = Batch(None, columns[mine.positions], features=features[mine.views, mine.positions])
                yield Fed(self.fabric.to_device(batch), mine.weight, mine.size)
            return
        queries, fixed = None, self.fixed or ([] if self.train_transform.random else [self.plain_view])
        if self.queries is not None and fixed:
            queries = self._of_views(self.queries, split, fixed)
        for part in training_steps(
            split,
            self.train_transform,
            address=address,
            epochs=phase.epochs,
            batch_size=size,
            start_step=first,
            share=self.share,
            workers=self.workers,
            repeat=phase.repeat,
            views=self.fixed,
        ):
            query = queries[part.views, part.positions] if queries is not None else None
            yield Fed(self.fabric.to_device(Batch(part.images, part.columns, query)), part.weight, part.size)

    def drawn(self, head: Head, task: Task, number: int, phase: Phase, first: int) -> Iterator[Fed]:
        """Yield the steps of a phase on features that the head draws, anew in every epoch, from step `first` on."""
        address, size = (self.seed, "train", task.index, number), phase.batch_size
        for epoch in range(phase.epochs):
            features, columns = head.draws(phase.draws, *address, "draws", epoch)
            steps = -(-len(columns) // size)
            order = torch.randperm(len(columns), generator=generator_at(*address, "order", epoch)).numpy()
            for step in range(max(first - epoch * steps, 0), steps):
                positions = order[step * size : (step + 1) * size]
                mine, weight = self.share.of(positions)
                yield Fed(
                    self.fabric.to_device(Batch(None, columns[mine], features=features[mine])), weight, len(positions)
                )

    def plain(self, split: Split) -> Iterator[Batch]:
        """Yield this process's share of a split once, in order and without augmentation."""
        if self.features is not None:
            features = self._once(self.features, split, self.plain_view, self.layers)
            columns = torch.from_numpy(split.columns)
            mine = np.arange(self.share.rank, len(split), self.share.world)
            for start in range(0, len(mine), self.eval_batch):
                rows = mine[start : start + self.eval_batch]
                yield self.fabric.to_device(Batch(None, columns[rows], features=features[rows]))
            return
        plain = self.plain_view
        queries = self._once(self.queries, split, plain) if self.queries is not None else None
        for part in plain_batches(split, plain.transform, batch_size=self.eval_batch, share=self.share):
            query = queries[part.positions] if queries is not None else None
            yield self.fabric.to_device(Batch(part.images, part.columns, query))

    def _of_views(self, tower: Tower, split: Split, views: Sequence[View], layers: int = 1) -> Tensor:
        """Return the frozen features (V, n, F), float32, of a whole split in each of V views."""
        return torch.stack([self._once(tower, split, view, layers) for view in views])

    def _once(self, tower: Tower, split: Split, view: View, layers: int = 1) -> Tensor:
        """Return the frozen features (n, F), float32, of a whole split in one view; kept on disk from run to run.

        A split that was taken from others takes its rows from theirs, so no image is read again for it.
        """
        if split.origins:
            parts = [self._once(tower, origin.split, view, layers)[origin.positions] for origin in split.origins]
            return torch.cat(parts)
        dtype = str(next(tower.parameters()).dtype)
        images = (split.images.fingerprint, split.indices)
        key = hashed(tower.fingerprint, dtype, repr(self.spec), *images, str(layers), *view.key)

        def fill(out: np.ndarray) -> None:
            for part in plain_batches(split, view.transform, batch_size=self.eval_batch, draw=view.address):
                with torch.no_grad():
                    encoded = tower(self.fabric.to_device(part.images), layers=layers)
                    out[part.positions] = encoded.features.cpu().numpy()

        shape = (len(split), layers * tower.features)
        array = cached_array(f"features-{key}", shape, np.float32, fill, kind="features")
        return torch.from_numpy(np.array(array))
