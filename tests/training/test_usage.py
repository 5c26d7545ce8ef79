"""Which prompts test images choose: 11 images and 3 classes a task, a pool of 5 prompts, 2 of them for an image."""

from dataclasses import replace

import pytest
import torch

from lamina.data.loader import Share
from lamina.data.stream import Task
from lamina.methods.attriclip import AttriCLIP
from lamina.methods.dualprompt import DualPrompt
from lamina.methods.l2p import L2P
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import Batch, Output
from lamina.registry import method_class, method_names
from lamina.training.trainer import Stopped
from lamina.training.usage import Usage
from tests.backbones.clips import tiny_clip, tower_for
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

POOL = L2P(size=5, top=2, length=1, epochs=1, batch_size=13)


def alone(table):
    """The sum over one process."""
    return table


def untrained(settings=POOL, tasks=2, tower=None, **arguments):
    """A trainer that met the tasks of a stream and learned nothing."""
    trainer = trainer_of(settings, tower or make_tiny_vit(), **arguments)
    trainer._begin(blobs(tasks).tasks)
    return trainer


def by_hand(trainer, task):
    """The counts of a task (classes, prompts): images one after another, without batches or a cache."""
    model, counts = trainer.learner.model.eval(), torch.zeros(len(task.classes), 5, dtype=torch.int64)
    for index, column in zip(task.test.indices, task.test.columns, strict=True):
        pixels = (task.test.images.image(int(index))[None] / 255 - 0.5) / 0.25
        with torch.no_grad():
            _, begun = model.look(Batch(pixels))
        for prompt in begun.chosen[0]:
            counts[list(task.columns).index(column), prompt] += 1
    return counts.tolist()


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────


def test_choices_are_counted_by_task_class_and_prompt():
    """The second task has the classes of columns 3 and 1, in this order; the first one 0, 1 and 2."""
    tasks = [Task(0, ["a", "b", "c"], [0, 1, 2], None, None), Task(1, ["d", "b"], [3, 1], None, None)]
    usage = Usage(tasks, 4)
    for place, labels, chosen in (
        (0, [0, 2, 2], [[3, 0], [1, 3], [3, 1]]),
        (1, [1], [[0, 1]]),
        (1, [3, 3, 1], [[2, 3], [2, 0], [0, 2]]),
    ):
        usage.see(place, Batch(None, torch.tensor(labels)), Output(torch.zeros(1), {}, torch.tensor(chosen)))
    assert usage.counts(alone) == [
        [[1, 0, 0, 1], [0, 0, 0, 0], [0, 2, 0, 2]],
        [[1, 0, 2, 1], [2, 1, 1, 0]],
    ]


def test_the_model_says_which_prompts_its_images_chose():
    trainer = untrained()
    batch = next(iter(trainer.feed.plain(blobs().tasks[0].test)))
    output = trainer.learner.model.eval()(batch._replace(labels=None))
    _, begun = trainer.learner.model.look(batch)
    assert output.chosen.shape == (6, 2) and torch.equal(output.chosen, begun.chosen)


def test_an_evaluation_counts_what_images_choose_one_by_one():
    trainer, tasks = untrained(), blobs().tasks
    trainer.evaluate(tasks)
    assert trainer.usage == [by_hand(trainer, task) for task in tasks]
    assert [sum(map(sum, table)) for table in trainer.usage] == [22, 22]
    assert len({tuple(row) for table in trainer.usage for row in table}) > 1


def test_the_last_evaluation_stands_alone():
    trainer, tasks = untrained(), blobs().tasks
    trainer.evaluate(tasks[:1])
    first = trainer.usage
    trainer.evaluate(tasks)
    assert len(first) == 1 and len(trainer.usage) == 2 and trainer.usage[0] == first[0]


def test_a_pool_that_grows_is_counted_at_its_size_of_the_day():
    trainer = trainer_of(DualPrompt(length=1, epochs=1, batch_size=13), make_tiny_vit())
    tasks = blobs(3).tasks
    for count in (1, 2, 3):
        trainer._begin(tasks[:count])
        trainer.evaluate(tasks[:count])
        assert [[len(row) for row in table] for table in trainer.usage] == [[count] * 3] * count
        assert [sum(map(sum, table)) for table in trainer.usage] == [11] * count


def test_domains_of_the_same_classes_are_counted_apart():
    """The second task shows the classes of the first again, in images of its own."""
    first, second = blobs().tasks
    again = replace(second.test, columns=second.test.columns - 3)
    trainer = untrained(tasks=1)
    domains = [first, Task(1, first.classes, first.columns, second.train, again)]
    trainer.evaluate(domains)
    assert trainer.usage == [by_hand(trainer, task) for task in domains]
    assert trainer.usage[0] != trainer.usage[1]


def test_what_a_head_chooses_is_counted_too():
    trainer = untrained(AttriCLIP(size=5, top=2, length=3), tower=tiny_clip())
    model, tasks = trainer.learner.model.eval(), blobs(2).tasks
    with torch.no_grad():
        model.head.texts.keys.normal_()
    trainer.evaluate(tasks)
    for task, table in zip(tasks, trainer.usage, strict=True):
        slow = torch.zeros(len(task.classes), 5, dtype=torch.int64)
        for batch in trainer.feed.plain(task.test):
            with torch.no_grad():
                features, _ = model.features(batch)
            for image, column in zip(features, batch.targets.tolist(), strict=True):
                near = torch.stack([torch.cosine_similarity(image, key, dim=0) for key in model.head.texts.keys])
                slow[list(task.columns).index(column), near.argsort(descending=True)[:2]] += 1
        assert table == slow.tolist() and len({tuple(row) for row in table}) > 1


@pytest.mark.parametrize("settings", [VPTDeep(length=3), L2P(size=5, top=0, length=1, readout="backbone")])
def test_nothing_is_counted_where_nothing_is_chosen(settings):
    trainer = untrained(settings)
    trainer.evaluate(blobs().tasks)
    assert trainer.usage == [] and len(trainer.matrix) == 1


@pytest.mark.parametrize("name", method_names())
def test_methods_whose_images_choose_say_from_how_many(name):
    small = {"length": 3, "width": 40}
    kind = method_class(name)
    trainer = untrained(
        kind(**{key: value for key, value in small.items() if key in kind.model_fields}), tower=tower_for(name)
    )
    model = trainer.learner.model.eval()
    batch = next(iter(trainer.feed.plain(blobs().tasks[0].test)))
    with torch.no_grad():
        chosen = model(batch._replace(labels=None)).chosen
    size = model.pool_size
    assert (chosen is not None) == (size > 0)
    assert chosen is None or (len(chosen) == 6 and chosen.min() >= 0 and chosen.max() < size)


# ── several processes ────────────────────────────────────────────────────────────────────────────────


def test_uneven_shares_add_up_to_the_whole():
    """Of 11 images, 4, 4 and 3; and of 2 images one, one and none."""
    tasks = blobs().tasks
    tasks = [tasks[0], replace(tasks[1], test=tasks[1].test.some(2))]
    trainer, parts = untrained(), []
    trainer.evaluate(tasks)
    for rank in range(3):
        share, usage = untrained(), Usage(tasks, 5)
        share.feed.share = Share(rank, 3)
        for place, task in enumerate(tasks):
            for batch in share.feed.plain(task.test):
                usage.see(place, batch, share.learner.model.eval()(batch._replace(labels=None)))
        usage.counts(lambda table: parts.append(table) or table)
    assert [[int(table[place].sum()) for table in parts] for place in (0, 1)] == [[8, 8, 6], [2, 2, 0]]
    assert Usage(tasks, 5).counts(lambda table: sum(parts)) == trainer.usage


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole():
    """The counts at the end of an unbroken run over three tasks."""
    trainer = trainer_of(POOL, make_tiny_vit())
    trainer.run(blobs(3))
    assert len(trainer.usage) == 3
    return trainer.usage


@pytest.mark.parametrize("stop", [(1, 0, 0), (2, 0, 2)])
def test_a_resumed_run_ends_with_the_counts_of_an_unbroken_one(whole, tmp_path, stop):
    broken = trainer_of(POOL, make_tiny_vit(), run_dir=tmp_path)
    broken.should_stop = lambda: broken.position == stop
    with pytest.raises(Stopped):
        broken.run(blobs(3))
    again = trainer_of(POOL, make_tiny_vit(), run_dir=tmp_path)
    assert again.restore(blobs(3)) and len(again.usage) == stop[0]
    again.run(blobs(3))
    assert again.usage == whole


def test_a_run_that_was_over_still_has_its_counts(whole, tmp_path):
    """As when it was killed before its record was written: there is nothing left to evaluate."""
    trainer_of(POOL, make_tiny_vit(), run_dir=tmp_path).run(blobs(3))
    again = trainer_of(POOL, make_tiny_vit(), run_dir=tmp_path)
    assert again.restore(blobs(3))
    again.run(blobs(3))
    assert again.usage == whole and len(again.matrix) == 3


def test_a_checkpoint_from_before_choices_were_counted_is_resumed(whole, tmp_path):
    broken = trainer_of(POOL, make_tiny_vit(), run_dir=tmp_path)
    broken.should_stop = lambda: broken.position == (2, 0, 0)
    with pytest.raises(Stopped):
        broken.run(blobs(3))
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(saved.pop("usage")) == 2
    torch.save(saved, tmp_path / "state.pt")
    again = trainer_of(POOL, make_tiny_vit(), run_dir=tmp_path)
    assert again.restore(blobs(3)) and again.usage == []
    again.run(blobs(3))
    assert again.usage == whole


def test_all_tasks_learned_at_once_are_counted_apart():
    trainer = trainer_of(POOL, make_tiny_vit())
    trainer.learner = replace(trainer.learner, at_once=True)
    trainer.run(blobs())
    assert len(trainer.matrix) == 1 and len(trainer.matrix[0]) == 2
    assert trainer.usage == [by_hand(trainer, task) for task in blobs()]
