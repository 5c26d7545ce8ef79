"""What a method is, once it is built: a model, a plan and its protections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from lamina.data.stream import Task
from lamina.model import PromptedModel
from lamina.protections.base import Protection
from lamina.schedules import Schedule, constant


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimizer.

    Attributes:
        epochs: passes over the phase's images.
        batch_size: images in one step, over all devices.
        optimizer: makes the optimizer of the parameters it is given.
        classes: which columns compete in the loss: the task's own, or all met so far.
        temperature: divides the logits in the loss.
        schedule: factor of the learning rate as a function of progress in [0, 1).
    """

    epochs: int
    batch_size: int
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    classes: Literal["task", "seen"] = "task"
    temperature: float = 1.0
    schedule: Schedule = constant


@dataclass
class Learner:
    """A method, built for one backbone and one stream.

    Attributes:
        phases: the plan of each task; an empty plan learns from the look back alone.
        cache: "features" when all that is learned is a function of the frozen features, which are then
            computed once per image; training images come without augmentation.
        at_once: learn all tasks as one: an upper bound, not continual learning.
    """

    model: PromptedModel
    phases: Callable[[Task], Sequence[Phase]]
    protections: Sequence[Protection] = ()
    cache: Literal["off", "features"] = "off"
    at_once: bool = False
