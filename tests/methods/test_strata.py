"""Strata: F 48 from two layers of D 24, M 5 prompt tokens, L 3 blocks; 27 training and 11 test images of a class."""

import numpy as np
import pytest
import torch

from lamina.data.stream import Split, Stream, Task
from lamina.errors import ConfigError
from lamina.heads.linear import LinearHead
from lamina.heads.statistics import Discriminant
from lamina.methods.strata import Strata
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import Batch
from lamina.protections.bounded import BoundedNullSpace
from lamina.registry import method_class
from tests.streams import blobs, trainer_of

SMALL = {"length": 5, "epochs": 3, "batch_size": 8, "temperature": 1.0, "lr": 0.05}


def arriving(groups):
    """Return a stream of tasks of these classes; a class's pictures are the same in whatever task it comes."""
    source, met, tasks = blobs(tasks=5, per_task=1).tasks, [], []
    for index, group in enumerate(groups):
        met += group
        columns = [met.index(label) for label in group]

        def together(role, group=group, columns=columns):
            parts = [getattr(source[label], role) for label in group]
            places = np.repeat(columns, [len(part.indices) for part in parts])
            return Split(parts[0].images, np.concatenate([part.indices for part in parts]), places)

        names = [f"class {label}" for label in group]
        tasks.append(Task(index, names, columns, together("train"), together("test")))
    return Stream("arriving", tasks, order_seed=0, fingerprint=f"arriving {groups}")


def made(tower, **settings):
    return trainer_of(Strata(**SMALL | settings), tower)


@torch.no_grad()
def features(trainer, split):
    """Features (n, 48) of a split, as prompts have them now."""
    return torch.cat([trainer.learner.model.features(Batch(b.images))[0] for b in trainer.feed.plain(split)])


@torch.no_grad()
def logits(trainer, split):
    model = trainer.learner.model.eval()
    return torch.cat([model(Batch(batch.images)).logits for batch in trainer.feed.plain(split)])


def prompts_of(trainer):
    return [value.detach().clone() for value in trainer.learner.model.prompts.parameters()]


def same(ours, theirs):
    return [torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)]


def moved(before, after):
    """How far features moved, root mean square, as a share of their spread."""
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    return float((after - before).square().sum(1).mean().sqrt() / spread)


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


def test_predictions_are_those_of_a_discriminant_of_the_features_that_each_look_back_saw(tiny_vit):
    trainer, stream = made(tiny_vit, max_drift=0.5), arriving([[3, 0], [1], [2, 4]])
    then = []
    for task in stream:
        trainer.learn(task)
        then.append(features(trainer, task.train))
    now = [features(trainer, task.train) for task in stream]
    assert moved(then[0], now[0]) > 0.01 and torch.equal(then[2], now[2])
    columns = torch.cat([torch.from_numpy(task.train.columns) for task in stream])

    def fitted(rows):
        head = Discriminant(48)
        head.begin_task(0, [f"class {column}" for column in range(5)], range(5))
        head.collect(torch.cat(rows), columns)
        head.end_look(lambda total: total)
        return head

    for task in stream:
        said, fresh = logits(trainer, task.test), features(trainer, task.test)
        torch.testing.assert_close(said, fitted(then)(fresh).logits, rtol=1e-4, atol=1e-3)
        assert (said - fitted(now)(fresh).logits).abs().max() > 0.1
        assert (said.argmax(1).numpy() == task.test.columns).mean() > 0.8


def test_without_prompts_features_are_the_frozen_towers_and_read_from_two_blocks(tiny_vit):
    trainer, stream = trainer_of(Strata(), tiny_vit), arriving([[3, 0], [1], [2, 4]])
    trainer.run(stream)
    task = stream.tasks[2]
    rows = [batch.features for batch in trainer.feed.plain(task.test)]
    bare = trainer_of(Strata(length=5), tiny_vit)  # reads images
    with torch.no_grad():
        seen = torch.cat([tiny_vit(batch.images, layers=2).features for batch in bare.feed.plain(task.test)])
    assert torch.cat(rows).shape == (len(task.test), 48)
    torch.testing.assert_close(torch.cat(rows), seen, rtol=1e-5, atol=1e-5)
    assert np.mean(trainer.matrix[-1]) > 0.9


def test_without_prompts_the_order_and_the_number_of_tasks_do_not_matter(tiny_vit):
    said = []
    for groups in ([[3, 0], [1], [2, 4]], [[3], [0, 1, 2], [4]]):
        trainer, stream = trainer_of(Strata(), tiny_vit), arriving(groups)
        trainer.run(stream)
        test = torch.cat([batch.features for task in stream for batch in trainer.feed.plain(task.test)])
        said.append(trainer.learner.model.head(test).logits)
    torch.testing.assert_close(said[0], said[1], rtol=1e-5, atol=1e-4)


def test_no_drift_allowed_after_the_first_task_means_that_old_features_stay_where_they_are(tiny_vit):
    trainer, stream = made(tiny_vit, max_drift=0.0), arriving([[3, 0], [1, 2, 4]])
    first = prompts_of(trainer)
    trainer.learn(stream.tasks[0])
    assert same(prompts_of(trainer), first) == [False] * 3
    before, kept = features(trainer, stream.tasks[0].train), prompts_of(trainer)
    trainer.learn(stream.tasks[1])
    assert torch.equal(features(trainer, stream.tasks[0].train), before)
    assert same(prompts_of(trainer), kept) == [True] * 3
    for task in stream:  # the head learns all the same
        assert (logits(trainer, task.test).argmax(1).numpy() == task.test.columns).mean() > 0.8


def test_what_drift_is_allowed_lets_prompts_move(tiny_vit):
    trainer, stream = made(tiny_vit, max_drift=0.1), arriving([[3, 0], [1, 2, 4]])
    trainer.learn(stream.tasks[0])
    before = features(trainer, stream.tasks[0].train)
    trainer.learn(stream.tasks[1])
    assert 0.001 < moved(before, features(trainer, stream.tasks[0].train)) < 0.2


def test_of_two_tasks_of_one_class_each_either_may_come_first(tiny_vit):
    ours, theirs = made(tiny_vit), made(tiny_vit)
    begun = prompts_of(ours)
    ours.run(arriving([[0], [1]]))
    theirs.run(arriving([[1], [0]]))
    assert same(prompts_of(ours), begun) == same(prompts_of(theirs), begun) == [True] * 3
    for task in arriving([[0], [1]]):
        said, other = (logits(trainer, task.test) for trainer in (ours, theirs))
        torch.testing.assert_close(other[:, [1, 0]], said, rtol=1e-4, atol=1e-4)
    assert np.mean(ours.matrix[-1]) > 0.9 and ours.matrix[-1] == theirs.matrix[-1][::-1]


# ── a first task of a single class ───────────────────────────────────────────────────────────────────


@pytest.fixture
def single(tiny_vit):
    """A trainer that has learned a task of one class, and the task of three classes that comes next."""
    trainer, stream = made(tiny_vit), arriving([[0], [1, 2, 3]])
    trainer.begun = prompts_of(trainer)
    trainer.learn(stream.tasks[0])
    return trainer, *stream


def test_after_a_first_task_that_moved_nothing_the_wish_is_a_move_as_long_as_the_prompts(single):
    trainer, _, _ = single
    (null_space,) = trainer.learner.protections
    assert same(prompts_of(trainer), trainer.begun) == [True] * 3
    assert null_space.start == {} and [*null_space.wish] == [0, 1, 2]
    assert same([null_space.wish[i] for i in range(3)], trainer.begun) == [True] * 3
    assert all(bool(wish.any()) for wish in null_space.wish.values())


def test_a_later_task_with_classes_to_tell_apart_moves_old_features_within_a_measured_bound(single, tiny_vit):
    trainer, first, second = single
    (null_space,) = trainer.learner.protections
    assert null_space.cut is not None and 0 < null_space.drift <= 0.05
    before = features(trainer, first.train)
    trainer.learn(second)
    assert same(prompts_of(trainer), trainer.begun) == [False] * 3
    drift = moved(before, features(trainer, first.train))
    assert 0 < drift <= 0.05
    assert null_space.cut is not None and 0 < null_space.drift <= 0.05
    assert same([null_space.wish[i] for i in range(3)], trainer.begun) == [True] * 3  # it stays the wish

    free = trainer_of(VPTDeep(**SMALL, head="statistics", layers=2), tiny_vit)
    free.learn(first)
    before = features(free, first.train)
    free.learn(second)
    assert moved(before, features(free, first.train)) > 1  # with nothing in the way


def test_a_tighter_bound_cuts_earlier_after_a_first_task_of_a_single_class(tiny_vit):
    kept = []
    for bound in (0.2, 0.05, 0.01):
        trainer = made(tiny_vit, max_drift=bound)
        trainer.learn(arriving([[0]]).tasks[0])
        (null_space,) = trainer.learner.protections
        assert 0 < null_space.drift <= bound
        kept.append(null_space.cut.kept)
    assert kept[0] < kept[1] < kept[2]


# ── pins ─────────────────────────────────────────────────────────────────────────────────────────────


def test_defaults():
    assert Strata().model_dump() == {
        "length": 0,
        "epochs": 100,
        "batch_size": 256,
        "lr": 0.001,
        "weight_decay": 5e-5,
        "temperature": 28.0,
        "head": "statistics",
        "layers": 2,
        "max_drift": 0.02,
        "kept": None,
    }
    assert method_class("strata") is Strata


def test_what_is_built_with_prompts(tiny_vit):
    learner = Strata(length=16).build(tiny_vit)
    head, (null_space,) = learner.model.head, learner.protections
    assert type(head) is Discriminant and type(head.trained) is LinearHead
    assert (learner.model.layers, learner.model.width, head.seen.sums.shape) == (2, 48, (0, 48))
    assert type(null_space) is BoundedNullSpace and null_space.max_drift == 0.02 and not null_space.right_alone
    assert learner.model.prompts is null_space.prompts and null_space.prompts.normed
    assert [tuple(value.shape) for value in learner.model.prompts.parameters()] == [(16, 24)] * 3
    single, double = arriving([[0], [1, 2]])
    assert [[phase.classes for phase in learner.phases(task)] for task in (single, double)] == [[], ["task"]]
    assert learner.refine(double) == [] and not learner.at_once and learner.cache == "off"


def test_by_default_nothing_is_trained(tiny_vit):
    learner = Strata().build(tiny_vit)
    assert learner.model.prompts is None and not list(learner.model.head.parameters())
    assert (learner.model.layers, learner.model.width, learner.cache) == (2, 48, "features")
    assert not learner.protections and not learner.phases(arriving([[0, 1]]).tasks[0])


def test_without_prompts_the_settings_of_training_change_nothing_and_are_said_to():
    trained = {"epochs", "batch_size", "lr", "weight_decay", "temperature", "max_drift", "kept"}
    assert set(Strata().idle()) == trained == set(Strata.model_fields) - {"length", "head", "layers"}
    assert Strata(length=1).idle() == {} and set(Strata(length=1, kept=0.5).idle()) == {"max_drift"}
    Strata().heed({"layers": 3, "lr": 0.1, "kept": None}, {"lr": 0.1})
    with pytest.raises(ConfigError) as error:
        Strata().heed({"layers": 3, "lr": 0.1}, {})
    assert str(error.value) == (
        "lr changes nothing where length is 0, since nothing is trained; leave it out, or change that"
    )


def test_a_wrong_setting_says_what_would_be_right():
    with pytest.raises(ConfigError) as error:
        Strata(layers=0)
    assert str(error.value) == "Strata.layers must be at least 1; got 0"
    with pytest.raises(ConfigError) as error:
        Strata(head="cosine")
    assert str(error.value) == "head must be \"statistics\" where length is 0, since nothing trains it; got 'cosine'"
    assert Strata(head="cosine", length=1).head == "cosine"
    with pytest.raises(ConfigError) as error:
        Strata(head="statistic")
    assert str(error.value) == ("Strata.head must be 'linear', 'cosine', 'statistics' or 'refined'; got 'statistic'")
