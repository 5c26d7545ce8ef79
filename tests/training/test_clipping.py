"""Gradients are clipped by the norm of all of them together: 27 images a task in batches of 13, D 24 channels."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase
from lamina.model import PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.protections.base import Protection
from lamina.training.launch import launch
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

LIMIT = 0.05  # far below the norm of any gradient here


class Plan:
    """Deep prompts and a linear head under plain SGD, whose steps are as long as gradients are."""

    def __init__(self, clip_norm, *, epochs=2, batch_size=13, protections=(), parameters=None):
        sgd = partial(torch.optim.SGD, lr=0.5)
        self.phase = Phase(epochs, batch_size, sgd, "task", clip_norm=clip_norm, parameters=parameters)
        self.protections = protections

    def build(self, tower):
        prompts = DeepPrompts(range(tower.depth), 4, tower.width)
        model = PromptedModel(tower, prompts, LinearHead(tower.features))
        return Learner(model, lambda task: [self.phase], self.protections)


class Pressing(Protection):
    """A loss term with a gradient of norm 5."""

    def terms(self, model):
        return {"pressing": 5 * model.head.blocks[-1].bias[0]}


def begun(plan):
    trainer = trainer_of(plan, make_tiny_vit())
    trainer._begin([blobs().tasks[0]])
    return trainer


def learned(plan, fabric=None):
    trainer = trainer_of(plan, make_tiny_vit(), fabric=fabric)
    trainer.learn(blobs().tasks[0])
    return {name: value.clone() for name, value in trainer.learner.model.learned().items()}


def moved(plan):
    """The length of the way from the start to the end of the first task, over all that is learned."""
    before = begun(plan).learner.model.learned()
    after = learned(plan)
    return sum((after[name] - value).square().sum() for name, value in before.items()).sqrt().item()


def test_steps_are_those_of_a_loop_that_scales_all_gradients_by_one_factor():
    plan = Plan(LIMIT)
    trainer, task = begun(plan), blobs().tasks[0]
    model = trainer.learner.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for fed in trainer.feed.train(task, 0, plan.phase, 0):
        gradients = torch.autograd.grad(F.cross_entropy(model(fed.batch).logits, fed.batch.labels), trained)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 2 * LIMIT
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.data.sub_(0.5 * gradient * LIMIT / norm)
    ours = learned(plan)
    for name, value in model.learned().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_shorter_gradients_are_left_as_they_are_to_the_bit():
    free, wide = learned(Plan(None)), learned(Plan(1e6))
    assert all(torch.equal(value, wide[name]) for name, value in free.items())
    assert any(not torch.equal(value, free[name]) for name, value in learned(Plan(LIMIT)).items())


def test_terms_of_protections_are_clipped_with_the_rest():
    """One step of all 27 images: as long as is allowed, to the rate of 0.5, and no longer for what the term adds."""
    plan = Plan(LIMIT, epochs=1, batch_size=27, protections=[Pressing()])
    assert moved(plan) == pytest.approx(0.5 * LIMIT, rel=1e-3)


def test_what_is_not_trained_does_not_count():
    """The head alone is trained, and has the whole length to itself."""
    plan = Plan(LIMIT, epochs=1, batch_size=27, parameters=lambda model: list(model.head.parameters()))
    assert moved(plan) == pytest.approx(0.5 * LIMIT, rel=1e-3)


def work(fabric, folder):
    """Learn in one of two processes, whose shares of a batch are 7 and 6, 7 and 6, 1 and none."""
    torch.set_num_threads(1)
    torch.save(learned(Plan(LIMIT), fabric), Path(folder) / f"{fabric.global_rank}.pt")


def test_two_processes_clip_what_one_would_clip(tmp_path):
    launch(work, tmp_path, accelerator="cpu", devices=2)
    alone = learned(Plan(LIMIT), Fabric(accelerator="cpu", devices=1))
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert theirs.keys() == alone.keys()
        for name, value in alone.items():
            assert (theirs[name] - value).abs().max() <= 1e-6
