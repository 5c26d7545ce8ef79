"""What a method is, once it is built: a model, a plan and its protections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lamina.data.memory import Memory
from lamina.data.stream import Task
from lamina.errors import ConfigError
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
        draws: 0 takes images; otherwise features that the head draws take their place, so many of each class met so
            far in an epoch.
        parameters: what is trained; None takes all that ask for a gradient.
        clip_norm: of all gradients together, the longest a step may use; longer ones are scaled down to it. None
            leaves them as they are.
        data: whose images it takes: the task's, those and what the learner's memory keeps of earlier tasks, or all that
            the memory keeps. After the look back, that has images of the finished task; before anything is kept, a
            phase on it takes no step.

    Raises:
        ConfigError: when old images are asked for where only the task's classes compete, or beside draws.
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
    data: Literal["task", "task+memory", "memory"] = "task"

    def __post_init__(self) -> None:
        if self.data != "task" and self.draws:
            raise ConfigError(
                f"a phase on features that the head draws takes no images; got data={self.data!r} with "
                f"draws={self.draws}: leave one of them out"
            )
        if self.data != "task" and self.classes == "task":
            raise ConfigError(
                f"old images are of classes that the task may not have; got data={self.data!r} with classes='task': "
                "take classes='seen'"
            )


def _nothing(task: Task) -> Sequence[Phase]:
    return []


#: why images cannot be chosen by what draws say
NO_DRAWS = (
    "choose='variance' keeps images on which draws agree, and the head of this method draws nothing: take "
    "choose='entropy' or 'energy'"
)


@dataclass
class Learner:
    """A method, built for one backbone and one stream.

    Attributes:
        phases: the plan of each task; an empty plan learns from the look back alone.
        refine: the plan for after the look back.
        cache: "features" when all that is learned is a function of the frozen features, which are then
            computed once per image; training images come without augmentation.
        at_once: learn all tasks as one: an upper bound, not continual learning.
        memory: which old training images there will be for phases that ask for them; None keeps none.

    Raises:
        ConfigError: when the memory is to choose by draws and the head draws nothing, or features that stay as they
            are were asked of a tower that is tuned.
    """

    model: PromptedModel
    phases: Callable[[Task], Sequence[Phase]]
    protections: Sequence[Protection] = ()
    refine: Callable[[Task], Sequence[Phase]] = _nothing
    cache: Literal["off", "features"] = "off"
    at_once: bool = False
    memory: Memory | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory.wants == "draws" and not self.model.head.sampling:
            raise ConfigError(NO_DRAWS)
        prompts = self.model.prompts
        stays = self.cache == "features" or (prompts is not None and prompts.query == "frozen")
        if stays and self.model.tower.learned:
            raise ConfigError(
                "features are kept, in a cache or as queries of prompts, where a frozen tower gives them; the tower of "
                "this model is tuned: take cache='off' and prompts that ask for no frozen query"
            )


def check_lessons(method: str, learner: Learner) -> None:
    """Make sure that a method, as it was built, can learn in lessons, of which a file holds what was learned alone.

    Raises:
        ConfigError: when it learns all classes at once, lets images decide together, or keeps something of single
            images.
    """
    if learner.at_once:
        raise ConfigError(f"{method} learns all classes at once, so it cannot take lessons; choose another one")
    if learner.model.transductive:
        head = learner.model.head
        setting, batch = head.decides if head.transductive else ("selection", "batch")
        raise ConfigError(
            "what a kept model says of an image must not depend on the other images of a batch; with "
            f"{setting}={batch} what {method} says does: take {setting}=image, or measure it by `lamina run`"
        )
    if any(protection.of_images for protection in learner.protections):
        raise ConfigError(
            f"a model file holds nothing of single images; with space=sample {method} would: take space=feature"
        )
    if learner.memory is not None:
        raise ConfigError(
            f"a lesson brings new images alone, and with these settings {method} learns from old ones again "
            f"({learner.memory}): take settings without a memory, or measure it by `lamina run`"
        )


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


def decaying(kind: type[Optimizer], decay: float, **options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    """Return what makes an optimizer that wears down matrices, but neither a bias nor a number, as timm does."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        parts = [[p for p in parameters if (p.ndim > 1) == matrix] for matrix in (True, False)]
        groups = [
            {"params": part, "weight_decay": rate} for part, rate in zip(parts, (decay, 0.0), strict=True) if part
        ]
        return kind(groups, **options)

    return make


def all_but(*held: str) -> Callable[[PromptedModel], list[nn.Parameter]]:
    """Return what finds the parameters of a model but what is frozen in towers and parts that `held` names."""

    def find(model: PromptedModel) -> list[nn.Parameter]:
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in model.not_frozen(parameters) if not name.startswith(held)]

    return find
