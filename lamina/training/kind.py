"""What is asked of the images of a stream: how right answers are learned, and how they are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lamina.data.stream import Stream, Task
from lamina.data.transforms import InputSpec, Transform, transform
from lamina.errors import ConfigError
from lamina.learner import Learner, Phase
from lamina.lookback import Reduce
from lamina.model import Batch, Output, PromptedModel
from lamina.training.calibration import Calibration
from lamina.training.evaluation import accuracies
from lamina.training.feed import Feed
from lamina.training.novelty import Detection
from lamina.training.objective import classify
from lamina.training.usage import Usage


@dataclass(frozen=True)
class Question:
    """What an evaluation goes by.

    Attributes:
        tasks: whose test images are asked about.
        feed: brings this process's share of them.
        seed: of draws inside the model.
        reduce: sums over processes.
        advance: told how many images more are done.
        temperature: what scores are divided by to be those that the loss saw last.
    """

    tasks: Sequence[Task]
    feed: Feed
    seed: int
    reduce: Reduce
    advance: Callable[[int], None] = lambda images: None
    temperature: float = 1.0


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found; empty, or None, is what a kind does not measure.

    Attributes:
        row: the measure on each task, a fraction.
        aware: the same with the task given.
        figures: further numbers over all test images, by name.
        by_class: the measure for each class, by name; None for one that no test image shows.
        known: how known the images look.
        usage, calibration, batch_calibration, reliability: as of `lamina.training.trainer.Trainer`.
    """

    row: list[float]
    aware: list[float] = field(default_factory=list)
    usage: list[list[list[int]]] = field(default_factory=list)
    calibration: float | None = None
    batch_calibration: float | None = None
    reliability: list[list[float]] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, float | None] = field(default_factory=dict)
    known: Detection | None = None


class Kind:
    """Classification: one answer for an image. Other kinds override what is different.

    Attributes:
        measure: what a matrix of results holds.
    """

    measure = "accuracy"

    def transform(self, name: str, spec: InputSpec) -> Transform:
        """Return the transform of training or test images called `name`."""
        return transform(name, spec)

    def adapted(self, learner: Learner, spec: InputSpec) -> Learner:
        """Return a method as it was built, made ready for this kind.

        Raises:
            ConfigError: when it cannot be.
        """
        return learner

    def protocol(self) -> dict[str, str | int | float]:
        """Return what a reader of numbers must know; nothing where they are accuracies."""
        return {}

    def check(self, learner: Learner, stream: Stream) -> None:
        """Make sure that a stream asks for this kind, and that the method can learn it; raise ConfigError if not."""
        if stream.dense:
            raise ConfigError(
                f"stream {stream.name} has a label for each pixel, and one for each image is what would be learned; "
                "run it by `lamina run`, or give the trainer kind=Segmentation(...)"
            )

    def loss(self, output: Output, labels: Tensor, task: Task, phase: Phase) -> Tensor:
        """Return the loss by which a phase learns, beside the terms of prompts, head and protections."""
        return classify(output.logits, labels, task, phase)

    def evaluate(self, model: PromptedModel, asked: Question) -> Evaluated:
        """Return how right a model is, how sure, and which prompts its images choose."""
        usage = Usage(asked.tasks, model.pool_size)
        calibration = Calibration(asked.temperature)
        known = Detection(asked.tasks, asked.temperature, asked.feed.share)

        def see(place: int, batch: Batch, output: Output) -> None:
            usage.see(place, batch, output)
            calibration.see(place, batch, output)
            known.see(place, batch, output)

        row, aware = accuracies(
            model,
            asked.tasks,
            lambda task: asked.feed.plain(task.test),
            seed=asked.seed,
            reduce=asked.reduce,
            advance=asked.advance,
            see=see,
        )
        return Evaluated(
            row,
            aware,
            usage=usage.counts(asked.reduce),
            calibration=calibration.error(asked.reduce),
            batch_calibration=calibration.batch_mean(asked.reduce),
            reliability=calibration.bins(asked.reduce).tolist(),
            known=known,
        )
