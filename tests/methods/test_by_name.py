"""The plan that methods share which compare images with names: who competes, and which old images there are.

Two tasks of 3 classes, 27 training images each; 2 old images of a class; n 3 words.
"""

import pytest
import torch

from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.methods.by_name import ByName
from lamina.methods.coop import CoOp
from tests.backbones.clips import tiny_clip
from tests.streams import blobs, trainer_of

FIRST, SECOND = Task(0, ["a", "b"], [0, 1], None, None), Task(1, ["c"], [2], None, None)


def rate(phase):
    return phase.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]


def ran(**values):
    """Return a trainer that ran over both tasks, and how many images it showed in each stretch of training."""
    trainer, shown = trainer_of(CoOp(length=3, epochs=1, batch_size=5, **values), tiny_clip()), []
    trainer.progress.begin = lambda name, task, tasks, images: shown.append(images) if name == "train" else None
    trainer.run(blobs())
    return trainer, shown


def test_the_defaults_are_those_of_the_sheet():
    (phase,) = ByName().phases(FIRST)
    assert (phase.epochs, phase.batch_size, phase.classes, phase.data) == (5, 32, "task", "task")
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.SGD
    assert {"lr": 0.002, "momentum": 0.9, "weight_decay": 0}.items() <= optimizer.defaults.items()
    assert [round(phase.schedule(p), 3) for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]
    assert ByName().refine(FIRST) == [] and ByName().memory == 0


def test_with_a_memory_all_classes_compete_and_old_images_come_again():
    settings = ByName(memory=4, balance=2, lr=0.5)
    (phase,), (close,) = settings.phases(FIRST), settings.refine(FIRST)
    assert (phase.classes, phase.data, phase.epochs, rate(phase)) == ("seen", "task+memory", 5, 0.5)
    assert (close.classes, close.data, close.epochs, rate(close)) == ("seen", "memory", 2, 0.05)
    assert ByName(memory=4).refine(FIRST) == []
    learner = CoOp(memory=4).build(tiny_clip())
    assert str(learner.memory) == "4 per class, random" and learner.model.head.negatives == "seen"
    learner = CoOp().build(tiny_clip())
    assert learner.memory is None and learner.model.head.negatives == "task"


def test_a_class_alone_is_not_trained_on_and_one_among_those_met_is():
    alone = Task(0, ["a"], [0], None, None)
    for settings in (ByName(), ByName(negatives="seen"), ByName(memory=4, balance=1)):
        assert settings.phases(alone) == [] == settings.refine(alone)
    assert ByName().phases(SECOND) == []
    assert [phase.classes for phase in ByName(negatives="seen").phases(SECOND)] == ["seen"]
    assert len(ByName(memory=4, balance=1).phases(SECOND)) == len(ByName(memory=4, balance=1).refine(SECOND)) == 1


def test_settings_without_an_effect_are_named():
    assert ByName().idle() == {"balance": "without a memory", "choose": "without a memory"}
    settings = CoOp(memory=1, negatives="seen")
    with pytest.raises(ConfigError) as error:
        settings.heed({"memory": 1, "negatives": "seen"}, {})
    assert str(error.value) == (
        "negatives changes nothing with a memory, where all classes met so far compete; leave it out, or change that"
    )


def test_a_run_shows_old_images_beside_the_new_and_closes_with_as_many_of_each_class():
    trainer, shown = ran(memory=2, balance=3)
    assert shown == [27, 3 * 6, 27 + 6, 3 * 12]
    without, shown = ran()
    assert shown == [27, 27]
    ours, theirs = (t.learner.model.head.texts.contexts[0] for t in (trainer, without))
    assert (ours - theirs).abs().max() > 1e-4
