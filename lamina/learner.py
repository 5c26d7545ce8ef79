"""What a method is, once it is built: a model, a plan and its protections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
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
        repeat: how many times one epoch goes through the images, shuffled together.
        draws: 0 takes the task's images; otherwise features that the head draws take their place, so many of
            each class met so far in an epoch.
        parameters: what is trained; None takes all that ask for a gradient.
        clip_norm: of all gradients together, the longest a step may use; longer ones are scaled down to it. None
            leaves them as they are.
    """

    epochs: int
    batch_size: int
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    classes: Literal["task", "seen"] = "task"
    temperature: float = 1.0
    schedule: Schedule = constant
    repeat: int = 1
    draws: int = 0
    parameters: Callable[[PromptedModel], Sequence[nn.Parameter]] | None = None
    clip_norm: float | None = None


def _nothing(task: Task) -> Sequence[Phase]:
    return []


@dataclass
class Learner:
    """A method, built for one backbone and one stream.

    Attributes:
        phases: the plan of each task; an empty plan learns from the look back alone.
        refine: the plan for after the look back.
        cache: "features" when all that is learned is a function of the frozen features, which are then
            computed once per image; training images come without augmentation.
        at_once: learn all tasks as one: an upper bound, not continual learning.
    """

    model: PromptedModel
    phases: Callable[[Task], Sequence[Phase]]
    protections: Sequence[Protection] = ()
    refine: Callable[[Task], Sequence[Phase]] = _nothing
    cache: Literal["off", "features"] = "off"
    at_once: bool = False


def refinement(epochs: int = 50, draws: int = 256) -> Phase:
    """Return the phase that balances a `RefinedHead` over all classes met so far.

    References:
        The released code of Lu et al., NeurIPS 2024: the head refinement of the CLIP variant, with its numbers.
    """
    return Phase(
        epochs=epochs,
        batch_size=256,
        optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4),
        classes="seen",
        draws=draws,
        parameters=lambda model: list(model.head.parameters()),
    )
