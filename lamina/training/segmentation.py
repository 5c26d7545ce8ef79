"""Segmentation: one answer for every pixel, by whatever method, with a head for pixels in place of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lamina.data.labelled import IGNORE, dense_transform, labelled
from lamina.data.loader import Share
from lamina.data.stream import Split, Stream, Task
from lamina.data.transforms import InputSpec, Transform
from lamina.errors import ConfigError
from lamina.heads.setr import CHANNELS, SetrHead, pixel_loss
from lamina.learner import Learner, Phase
from lamina.model import Batch, Output, PromptedModel
from lamina.results.pixels import class_ious, mean_iou, pixel_accuracy
from lamina.seeds import seed_at
from lamina.training.dense import DenseSettings
from lamina.training.kind import Evaluated, Kind, Question
from lamina.training.windows import over_scales, whole

#: scores in memory at once, where nothing is trained: a GB of them
_MOST_SCORES = 2**28


class Segmentation(Kind):
    """Pixels, by the mean over classes of intersection over union.

    What a method says of prompts, steps and rates holds; of its head nothing is left. The loss divides the logits of
    the main decoder by the phase's temperature, not those of the auxiliary ones.
    """

    measure = "mIoU"

    def __init__(self, settings: DenseSettings | None = None) -> None:
        self.settings = settings or DenseSettings()

    def transform(self, name: str, spec: InputSpec) -> Transform:
        return dense_transform(name, spec, padding=self.settings.padding)

    def adapted(self, learner: Learner, spec: InputSpec) -> Learner:
        model = learner.model
        tower = model.tower
        if tower.first_patch is None:
            raise ConfigError(
                f"pixels are told apart by tokens of patches, and a {type(tower).__name__} has no grid of them; take "
                "another backbone"
            )
        if not model.head.replaceable:
            raise ConfigError(
                f"a head for pixels cannot take the place of a {type(model.head).__name__}, which is part of how the "
                "method learns; take a method, or a setting of it, with a linear head"
            )
        if model.layers > 1:
            raise ConfigError(f"layers={model.layers} changes nothing where pixels are told apart; leave it out")
        if learner.memory is not None:
            raise ConfigError("there is one task where pixels are told apart, so a memory of old images has no use")
        for protection in learner.protections:
            if protection.measures or protection.looks_at in ("features", "queries"):
                raise ConfigError(
                    f"{type(protection).__name__} looks at features of whole images, and there is one task where "
                    "pixels are told apart, so nothing to protect: take the method without it"
                )
        grid = tower.grid(torch.empty(1, 3, spec.size, spec.size, device="meta"))
        head = SetrHead(
            tower.width,
            tower.depth,
            (grid.height, grid.width),
            (spec.size, spec.size),
            channels=self.settings.channels or min(CHANNELS, max(1, tower.width // 3)),
            weight=self.settings.auxiliary,
        )
        return dataclasses.replace(learner, model=PromptedModel(tower, model.prompts, head), cache="off")

    def protocol(self) -> dict[str, str | int | float]:
        scales = ", then the mean over six sizes and mirror images" if self.settings.multi_scale else ""
        changed = {f"dense.{name}": value for name, value in self.settings.changed().items() if name != "multi_scale"}
        return {"measure": self.measure, "windows": f"of the backbone's size, by two thirds{scales}", **changed}

    def check(self, learner: Learner, stream: Stream) -> None:
        if not stream.dense:
            raise ConfigError(f"stream {stream.name} has a label for each image, and none for pixels")
        if len(stream) > 1:
            raise ConfigError(f"pixels are told apart in one task; stream {stream.name} has {len(stream)}")
        for task in stream:
            for phase in (*learner.phases(task), *learner.refine(task)):
                if phase.draws or phase.data != "task":
                    raise ConfigError(
                        "this method learns from features that its head draws, or from old images, and a head for "
                        "pixels has neither; take another head, or another method"
                    )

    def loss(self, output: Output, labels: Tensor, task: Task, phase: Phase) -> Tensor:
        return pixel_loss(output.logits / phase.temperature, labels)

    @torch.inference_mode()
    def evaluate(self, model: PromptedModel, asked: Question) -> Evaluated:
        """Return intersections over unions, in one size and, if that is asked for, over several."""
        model.eval()
        (task,) = asked.tasks
        feed, count = asked.feed, len(task.columns)
        torch.manual_seed(seed_at(asked.seed, "evaluate", task.index))
        crop, normalised = feed.spec.size, feed.plain_view.transform.normalised
        most = max(1, min(feed.eval_batch, _MOST_SCORES // (count * crop**2)))
        counts = torch.zeros(1 + self.settings.multi_scale, count, count, dtype=torch.int64)

        def score(windows: Tensor) -> Tensor:
            return model(Batch(windows)).logits

        for pairs in groups(task.test, feed.share, most):
            pairs = feed.fabric.to_device(pairs)
            images, labels = pairs[:, :3], pairs[:, 3].long()
            counts[0] += confusion(whole(score, images, crop, normalised, most=most), labels).cpu()
            if self.settings.multi_scale:
                counts[1] += confusion(over_scales(score, images, crop, normalised, most=most), labels).cpu()
            asked.advance(len(pairs))
        once, *several = asked.reduce(counts).numpy()
        figures = {"pixel_accuracy": pixel_accuracy(once)}
        if several:
            figures["miou_multi_scale"] = mean_iou(several[0])
        return Evaluated(
            [mean_iou(once)],
            figures=figures,
            by_class=dict(zip(task.classes, class_ious(once), strict=True)),
        )


def groups(split: Split, share: Share, most: int) -> Iterator[Tensor]:
    """Yield this process's images with their label maps (b, 4, height, width), uint8: in order, of one size at once.

    Args:
        most: images at once.
    """
    group: list[Tensor] = []
    for position in range(share.rank, len(split), share.world):
        pair = labelled(split.images, int(split.indices[position]))
        if group and (len(group) == most or pair.shape != group[0].shape):
            yield torch.stack(group)
            group = []
        group.append(pair)
    if group:
        yield torch.stack(group)


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how often pixels of class c are taken for class k (C, C), int64, by scores (B, C, height, width).

    Args:
        labels: (B, height, width), columns, or `IGNORE`.
    """
    return multiclass_confusion_matrix(
        scores.argmax(1), labels, num_classes=scores.shape[1], ignore_index=IGNORE, validate_args=False
    )
