"""Directions found among images, as the released code of PGP finds them; for comparison with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lamina.backbones.splice import Probe
from lamina.data.stream import Task
from lamina.errors import ConfigError, ShapeError
from lamina.lookback import Reduce
from lamina.model import Batch, PromptedModel
from lamina.protections.base import Room
from lamina.protections.subspace import Subspace

Space = Literal["feature", "sample"]
_EPS = torch.finfo(torch.float64).eps


class SampleSubspace(Subspace):
    """A subspace whose directions are found among images and applied to channels, because there are as many of both.

    After each task, D of its images are taken. All that a block shows of one (tokens, or queries of all heads, or the
    frozen tower's features) is one row; principal component analysis over rows gives scores S, images by components.
    The directions are those of S Sᵀ (D, D): their entries belong to images, not to channels, so what they keep of old
    features depends on the order of the images. What all images have in common, such as positions and the class
    token at block 0, drops out with the mean.

    Where a pool takes part, the scores of its D channels over its tokens are added to S, entry by entry. It
    is the pool as it was when the finished task began, and takes no part in the first one.

    Args:
        components: of the principal component analysis.
        pool: the tokens (..., D) of a pool that takes part.
        arguments, options: as of `Subspace`, but `share` is what `extended` takes, and queries are of all heads.

    Attributes:
        before: the pool when the task at hand began; None in the first task, and without a pool.
        held: of the energy of each block's last S Sᵀ, the share that the directions hold.
    """

    of_images = True

    def __init__(
        self, *arguments: Any, components: int, pool: Callable[[], Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.looks_at = "nothing"
        self.measures, self.components, self.pool = self.shape[-1], components, pool
        self.before: Tensor | None = None
        self.held: dict[int, float] = {}

    def check(self, tasks: Sequence[Task], processes: int = 1) -> None:
        for task in tasks:
            if len(task.train) < self.measures:
                raise ConfigError(
                    'space="sample", which parity="official" has, needs as many images of each task as the '
                    f"backbone has channels, {self.measures}; task {task.index + 1} has {len(task.train)}: take "
                    'space="feature", or fewer and larger tasks'
                )
        if processes > 1:
            raise ConfigError(
                f'space="sample" compares the images of a task with each other, so one process has to see them all; '
                f'got {processes}: take devices=1 or space="feature"'
            )

    @torch.no_grad()
    def measure(self, model: PromptedModel, batches: Sequence[Batch], reduce: Reduce) -> None:
        """Add the directions of D images of the finished task.

        Raises:
            ConfigError: when there is another number of them, or several processes.
        """
        images, processes = sum(len(batch.targets) for batch in batches), int(reduce(torch.ones(1)))
        if processes > 1 or images != self.measures:
            raise ConfigError(
                f'space="sample" needs {self.measures} images of each task, all in one process; got {images} in one of '
                f'{processes}: take space="feature"'
            )
        for layer in self.layers:  # one after the other: the rows of each may be half a gigabyte
            table = scores(self._rows(model, batches, layer), self.components)
            if self.before is not None:
                table = table + scores(self.before.flatten(0, -2).mT.to(table), self.components)
            gram = table @ table.mT
            basis = extended(self.used[layer][0].to(gram) if layer in self.used else None, gram, self.share)
            inside, total = (part.square().sum() for part in (basis.mT @ gram, gram))
            self.used[layer], self.held[layer] = [basis], float(inside / total.clamp_min(torch.finfo().tiny))
        self.before = self.pool().detach().clone() if self.pool is not None else None

    def _rows(self, model: PromptedModel, batches: Sequence[Batch], layer: int) -> Tensor:
        """Return a row for each image (D, columns)."""
        if self.features == "frozen":
            return torch.cat([model.query(batch) for batch in batches])
        seen: list[Tensor] = []

        def tap(probe: Probe) -> None:
            if probe.layer == layer:
                seen.append((probe.inputs if self.features == "tokens" else probe.queries).flatten(1))

        for batch in batches:
            model.features(batch, tap=tap)
        return torch.cat(seen)

    def room(self) -> list[Room]:
        return [Room(i, self.what, U.shape[1], len(U), self.held[i]) for i, (U,) in self.used.items()]

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "held": dict(self.held)}
        return state if self.before is None else state | {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "held" not in state:
            raise ShapeError("what is remembered was found among channels; let `space` stay as it was")
        found = {i: [tuple(basis.shape) for basis in bases] for i, bases in state["used"].items()}
        wanted = {i: [(self.measures, min(found.get(i, [(0, 0)])[0][-1], self.measures))] for i in self.layers}
        if found and found != wanted:
            raise ShapeError(f"used must be {wanted} in shape, by block; got {found}")
        self.used, self.held, self.before = dict(state["used"]), dict(state["held"]), state.get("before")


def scores(rows: Tensor, components: int) -> Tensor:
    """Return the scores (n, k), float64, of a principal component analysis over rows (n, columns); k is at most n.

    Exact, from products of rows. The largest entry of a column is positive; columns beyond the rank are zero.

    >>> scores(torch.tensor([[1.0, 7.0, 0.0], [3.0, 7.0, 0.0], [-4.0, 7.0, 0.0]]), 1).round()
    tensor([[-1.],
            [-3.],
            [ 4.]], dtype=torch.float64)
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(8192, dim=1):  # float64 of all at once would be a gigabyte
        centred = part.double() - part.double().mean(0)
        gram += centred @ centred.mT
    values, vectors = (x.flip(-1)[..., :components] for x in torch.linalg.eigh(gram))
    values = values.where(values > len(rows) * _EPS * values[0], 0)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign() * values.sqrt()


def extended(used: Tensor | None, gram: Tensor, share: float) -> Tensor:
    """Add to a basis (n, r) the leading directions of a matrix (n, n), as the released code does.

    Energies are squares of its singular values: for S Sᵀ, fourth powers of those of S. The first time, where there
    is no basis, the direction with which the share is reached stays out, so there may be none; later it is
    added. What holds nothing up to rounding never is. The columns of `used` stay in front.

    >>> [extended(None, torch.diag(torch.tensor([3.0, 4.0])), share).shape[1] for share in (0.6, 0.7)]
    [0, 1]
    """
    first, used = used is None, gram.new_zeros(len(gram), 0) if used is None else used
    rest, total = gram - used @ (used.mT @ gram), gram.square().sum()
    left, values, _ = torch.linalg.svd(rest)
    energies, held = values.square(), total - rest.square().sum()
    reached = held + energies.cumsum(0) - (0 if first else energies)
    count = int(((reached < share * total) & (energies > len(gram) * _EPS * total)).sum())
    return torch.cat([used, left[:, :count]], dim=1)[:, : len(gram)]
