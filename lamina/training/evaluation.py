"""Accuracy per task, exact over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from lightning_fabric import Fabric
from torch import Tensor

from lamina.data.stream import Task
from lamina.lookback import Reduce
from lamina.model import Batch, Output, PromptedModel
from lamina.seeds import seed_at


@torch.inference_mode()
def accuracies(
    model: PromptedModel,
    tasks: Sequence[Task],
    batches: Callable[[Task], Iterable[Batch]],
    *,
    seed: int,
    reduce: Reduce,
    advance: Callable[[int], None] = lambda images: None,
    see: Callable[[int, Batch, Output], None] = lambda place, batch, output: None,
) -> tuple[list[float], list[float]]:
    """Return the accuracy on each task's test images: over all classes met, and over the task's own.

    Each process counts right answers on its share; the counts are summed, so no image counts twice
    however uneven the shares. The second list masks all columns but those that the task's test images
    are of, which is what task-incremental learning reports.

    Args:
        batches: this process's share of a task's test images, with their columns as labels.
        seed: of draws inside the model, for heads that sample.
        see: shown the place of a task among `tasks`, a batch of its images, and what the model said of them.
    """
    model.eval()
    counts = torch.zeros(len(tasks), 3, dtype=torch.float64)  # right, right with the task known, images
    for place, task in enumerate(tasks):
        torch.manual_seed(seed_at(seed, "evaluate", task.index))
        own = torch.as_tensor(task.tested)
        for batch in batches(task):
            output = model(batch._replace(labels=None))
            see(place, batch, output)
            logits = averaged(output)
            own = own.to(logits.device)
            counts[place, 0] += (logits.argmax(-1) == batch.targets).sum().cpu()
            counts[place, 1] += (own[logits[:, own].argmax(-1)] == batch.targets).sum().cpu()
            counts[place, 2] += len(batch.targets)
            advance(len(batch.targets))
    counts = reduce(counts)
    return (counts[:, 0] / counts[:, 2]).tolist(), (counts[:, 1] / counts[:, 2]).tolist()


@torch.inference_mode()
def foreseen(
    model: PromptedModel,
    tasks: Sequence[Task],
    met: int,
    batches: Callable[[Task], Iterable[Batch]],
    *,
    seed: int,
    reduce: Reduce,
    advance: Callable[[int], None] = lambda images: None,
) -> list[float]:
    """Return the accuracy on test images of tasks that are still to come, by the names of their classes alone.

    Each task's own classes are there to choose from. Empty for a head that cannot score a class by its name.

    Args:
        tasks: that are to come.
        met: how many classes were met so far.

    References:
        Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models, ICCV
        2023, section 4: its "transfer" is the mean of these over tasks and stages.
    """
    model.eval()
    counts = torch.zeros(len(tasks), 2, dtype=torch.float64)
    for place, task in enumerate(tasks):
        head = model.head.preview([name for name, c in zip(task.classes, task.columns, strict=True) if c >= met])
        if head is None:
            return []
        columns = torch.as_tensor(task.tested)
        news = [column for column in task.columns if column >= met]  # these are appended in this order
        places = torch.tensor([c if c < met else met + news.index(c) for c in task.tested])
        torch.manual_seed(seed_at(seed, "foresee", task.index))
        for batch in batches(task):
            features, _ = model.features(batch._replace(labels=None))
            logits = averaged(Output(head(features).logits, {}))[:, places.to(features.device)]
            right = columns.to(features.device)[logits.argmax(-1)] == batch.targets
            counts[place] += torch.tensor([float(right.sum()), float(len(right))])
            advance(len(batch.targets))
    counts = reduce(counts)
    return (counts[:, 0] / counts[:, 1]).tolist()


@torch.inference_mode()
def shown(
    model: PromptedModel,
    tasks: Sequence[Task],
    batches: Callable[[Task], Iterable[Batch]],
    see: Callable[[int, Batch, Output], None],
    *,
    seed: int,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Show what a model says of test images, whatever their classes, as `accuracies` does."""
    model.eval()
    for place, task in enumerate(tasks):
        torch.manual_seed(seed_at(seed, "evaluate", task.index))
        for batch in batches(task):
            see(place, batch, model(batch._replace(labels=None)))
            advance(len(batch.targets))


def scores(model: PromptedModel, batch: Batch) -> Tensor:
    """Return logits (B, C) of a batch, averaged over samples where the head draws some."""
    return averaged(model(batch._replace(labels=None)))


def averaged(output: Output) -> Tensor:
    """Return logits (B, C), the mean over draws where a head draws some."""
    return output.logits.mean(0) if output.logits.ndim == 3 else output.logits


def summed(fabric: Fabric) -> Reduce:
    """Return the function that sums a tensor over a Fabric's processes."""

    def reduce(value: Tensor) -> Tensor:
        if fabric.world_size == 1:
            return value
        total = fabric.all_reduce(value.to(fabric.device), reduce_op="sum")
        return total.to(value.device)  # type: ignore[union-attr]  # a tensor in, a tensor out

    return reduce
