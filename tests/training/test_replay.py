"""Old images come again: 27 training images a task, of which 2 of each of 3 classes are kept; N 17, D 24."""

import itertools
import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

from lamina.continual import ContinualModel
from lamina.data.loader import Share, global_batch, plain_batches
from lamina.data.memory import Memory, disagreement
from lamina.errors import ConfigError, ResumeError
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase
from lamina.methods.nearest_mean import NearestMean
from lamina.model import PromptedModel
from lamina.runs import execute, plan
from lamina.training.feed import Feed
from lamina.training.launch import launch
from lamina.training.progress import Progress
from lamina.training.replay import Choosing, taking
from lamina.training.trainer import Stopped, Trainer
from tests.commands import BACKBONE
from tests.conftest import make_tiny_vit
from tests.streams import SPEC, blobs, trainer_of

TRAIN, KEPT = 27, 6
BOTH, OLD = "task+memory", "memory"


class Death(Exception):
    """The process is gone; nothing catches this."""


@pytest.fixture
def stream():
    return blobs(tasks=3, per_task=3)


def phase(data, *, epochs=2, batch_size=5, lr=0.1, **values):
    return Phase(epochs, batch_size, partial(torch.optim.SGD, lr=lr, momentum=0.9), "seen", data=data, **values)


def balancing():
    """A phase that moves the columns of all tasks."""
    return phase(OLD, batch_size=4, parameters=lambda model: list(model.head.parameters()))


def replaying(
    tower, *, before=None, after=None, choose="herding", cache="features", fabric=None, seed=0, memory=None, **arguments
):
    """A trainer of a linear head that learns from task and memory, and is balanced on the memory."""
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    before = [phase(BOTH)] if before is None else before
    after = [balancing()] if after is None else after
    torch.manual_seed(seed)
    learner = Learner(
        PromptedModel(tower, None, LinearHead(tower.features)),
        lambda task: before,
        refine=lambda task: after,
        cache=cache,
        memory=memory or Memory(per_class=2, choose=choose),
    )
    return Trainer(learner, Feed.to(learner, fabric, SPEC, seed=seed, eval_batch=6), fabric, seed=seed, **arguments)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def taken_by(trainer):
    """Note the training images of each phase that takes a step."""
    taken, train = {}, trainer.feed.train

    def watched(task, number, *rest):
        taken[task.index, number] = task.train
        return train(task, number, *rest)

    trainer.feed.train = watched
    return taken


def kept_of(memory, *tasks):
    """Indices of what is kept of some tasks, task by task, in order of arrival."""
    rows = memory.state_dict()["kept"]
    own = [(task, sorted(position for t, position, _ in rows if t == task.index)) for task in tasks]
    return [int(task.train.indices[position]) for task, positions in own for position in positions]


# ── what a phase takes ───────────────────────────────────────────────────────────────────────────────


def test_a_phase_takes_its_task_or_old_images_or_both(tiny_vit, stream):
    trainer = replaying(tiny_vit)
    taken, memory = taken_by(trainer), trainer.learner.memory
    trainer.run(stream)
    assert list(taken) == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]
    tasks = stream.tasks
    for index, task in enumerate(tasks):
        own = task.train.indices.tolist()
        assert taken[index, 0].indices.tolist() == own + kept_of(memory, *tasks[:index])
        assert taken[index, 2].indices.tolist() == kept_of(memory, *tasks[: index + 1])
        assert [len(taken[index, number]) for number in (0, 2)] == [TRAIN + KEPT * index, KEPT * (index + 1)]
    for split in taken.values():
        assert split.images is tasks[0].train.images
        assert split.columns.tolist() == split.images.labels[split.indices].tolist()


def test_a_phase_on_task_and_memory_takes_each_image_once_when_the_memory_has_chosen(tiny_vit, stream):
    trainer = replaying(tiny_vit, before=[], after=[phase(BOTH)])
    taken = taken_by(trainer)
    trainer.run(stream)
    for index, task in enumerate(stream):
        old = kept_of(trainer.learner.memory, *stream.tasks[:index])
        assert taken[index, 1].indices.tolist() == task.train.indices.tolist() + old


@pytest.mark.parametrize("cache", ["features", "off"])
def test_a_phase_on_the_memory_takes_no_step_before_anything_is_kept(tiny_vit, stream, tmp_path, cache):
    before = [phase(OLD, epochs=1), phase("task", epochs=1)]
    trainer = replaying(tiny_vit, before=before, after=[], cache=cache, run_dir=tmp_path)
    trainer.run(stream)
    steps = [tuple(line["position"][:2]) for line in lines(tmp_path)]
    assert {place: steps.count(place) for place in steps} == {(0, 1): 6, (1, 0): 2, (1, 1): 6, (2, 0): 3, (2, 1): 6}


def test_task_and_memory_are_the_task_before_anything_is_kept(stream):
    task = stream.tasks[0]
    assert taking(phase(BOTH), task, Memory(per_class=2), [task]).train is task.train


def test_steps_schedule_and_progress_are_those_of_all_images_of_the_phase(tiny_vit, stream, tmp_path):
    told = []

    class Listener(Progress):
        def begin(self, stretch, task, tasks, images):
            told.append((stretch, task, images))

        def advance(self, images, loss=None):
            told.append(images)

    once = phase(BOTH, repeat=2, schedule=lambda progress: 1 + progress)
    trainer = replaying(tiny_vit, before=[once], after=[], run_dir=tmp_path, progress=Listener())
    trainer.run(stream)
    for task, images in enumerate((TRAIN, TRAIN + KEPT, TRAIN + 2 * KEPT)):
        steps = 2 * -(-2 * images // 5)
        mine = [line for line in lines(tmp_path) if line["position"][0] == task]
        assert [line["lr"] for line in mine] == pytest.approx([0.1 * (1 + step / steps) for step in range(steps)])
        start = told.index(("train", task, 4 * images))
        assert sum(told[start + 1 : start + 1 + steps]) == 4 * images


def test_online_goes_through_task_and_memory_once(tiny_vit, stream, tmp_path):
    trainer = replaying(tiny_vit, before=[phase(BOTH, repeat=3)], run_dir=tmp_path, online=True)
    trainer.run(stream)
    steps = [tuple(line["position"][:2]) for line in lines(tmp_path)]
    counts = {place: steps.count(place) for place in steps}
    assert counts == {(0, 0): 6, (0, 2): 2, (1, 0): 7, (1, 2): 3, (2, 0): 8, (2, 2): 5}


def test_it_learns_what_a_loop_written_by_hand_learns(tiny_vit, stream):
    """Plain features of the task's images and of old ones, in the order that the address says; all classes compete."""
    trainer = replaying(tiny_vit, after=[], seed=3)
    trainer.learn(stream.tasks[0])
    task, heads, step = stream.tasks[1], [], trainer._take_steps

    def watched(model, *rest):
        heads.append(deepcopy(model.head))
        step(model, *rest)

    trainer._take_steps = watched
    trainer.learn(task)
    (head,) = heads
    old = stream.tasks[0].train.images
    indices = [*task.train.indices.tolist(), *kept_of(trainer.learner.memory, stream.tasks[0])]
    with torch.no_grad():
        features = tiny_vit((torch.stack([old.image(index) for index in indices]) / 255 - 0.5) / 0.25).features
    labels = torch.from_numpy(old.labels[indices])
    split = replace(task.train, indices=np.array(indices), columns=labels.numpy())
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for number in range(2 * 7):
        chosen = global_batch(split, address=(3, "train", 1, 0), batch_size=5, step=number)
        optimizer.zero_grad()
        F.cross_entropy(head(features[chosen]).logits, labels[chosen]).backward()
        optimizer.step()
    for ours, by_hand in zip(trainer.learner.model.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-6)


def test_old_images_are_augmented_like_new_ones(tiny_vit, stream):
    trainer = replaying(tiny_vit, cache="off", choose="random", before=[], after=[])
    for task in stream.tasks[:2]:
        trainer.learn(task)
    task = taking(balancing(), stream.tasks[1], trainer.learner.memory, stream.tasks[:2])
    fed = next(trainer.feed.train(task, 2, balancing(), 0)).batch
    plain = torch.cat([batch.images for batch in trainer.feed.plain(task.train)])
    chosen = global_batch(task.train, address=(0, "train", 1, 2), batch_size=4, step=0)
    assert fed.labels.tolist() == task.train.columns[chosen].tolist()
    assert (fed.images - plain[chosen]).abs().flatten(1).mean(1).min() > 0.1


# ── features ─────────────────────────────────────────────────────────────────────────────────────────


def test_features_of_old_images_are_looked_up_and_not_computed_anew(tiny_vit, stream, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    computed = []

    def noted(split, *rest, **more):
        computed.append(split)
        return plain_batches(split, *rest, **more)

    monkeypatch.setattr("lamina.training.feed.plain_batches", noted)
    replaying(tiny_vit).run(stream)
    assert computed == [split for task in stream for split in (task.train, task.test)]


def test_queries_of_old_images_are_those_of_the_frozen_tower(tiny_vit, stream):
    feed = Feed(Fabric(accelerator="cpu", devices=1), SPEC, augmentation="plain", eval_batch=6, queries=tiny_vit)
    memory = Memory(per_class=2)
    memory.keep(stream.tasks[0], 0)
    task = taking(phase(BOTH), stream.tasks[1], memory, stream.tasks[:2])
    for fed in itertools.islice(feed.train(task, 0, phase(BOTH), 0), 7):
        with torch.no_grad():
            torch.testing.assert_close(fed.batch.query, tiny_vit(fed.batch.images).features, rtol=1e-4, atol=1e-5)


# ── what the memory chooses by ───────────────────────────────────────────────────────────────────────


def plain_features(tower, split):
    pixels = torch.stack([split.images.image(int(index)) for index in split.indices])
    with torch.no_grad():
        return tower((pixels / 255 - 0.5) / 0.25).features


@pytest.mark.parametrize("cache", ["features", "off"])
def test_herding_is_by_features_of_plain_images(tiny_vit, stream, cache):
    trainer = replaying(tiny_vit, before=[], after=[], cache=cache)
    task, expected = stream.tasks[0], Memory(per_class=2, choose="herding")
    trainer.learn(task)
    expected.keep(task, 0, features=plain_features(tiny_vit, task.train))
    assert trainer.learner.memory.state_dict() == expected.state_dict()


def test_entropy_is_that_of_the_model_as_the_look_back_leaves_it(tiny_vit, stream):
    """A head of class means says nothing of new classes before."""
    trainer = trainer_of(NearestMean(), tiny_vit)
    trainer.learner.memory = Memory(per_class=2, choose="entropy")
    expected = Memory(per_class=2, choose="entropy")
    for task in stream.tasks[:2]:
        trainer.learn(task)
        with torch.no_grad():
            logits = trainer.learner.model.head(plain_features(tiny_vit, task.train)).logits
        expected.keep(task, 0, scores=logits)
    assert trainer.learner.memory.state_dict() == expected.state_dict()
    chance = Memory(per_class=2)
    for task in stream.tasks[:2]:
        chance.keep(task, 0)
    assert chance.state_dict() != expected.state_dict()


def test_a_random_choice_looks_at_no_image_and_depends_on_the_seed(tiny_vit, stream):
    kept = []
    for seed in (0, 1):
        trainer = replaying(tiny_vit, before=[], after=[], choose="random", seed=seed)
        trainer.feed.plain = None
        trainer.learn(stream.tasks[0])
        expected = Memory(per_class=2)
        expected.keep(stream.tasks[0], seed)
        assert trainer.learner.memory.state_dict() == expected.state_dict()
        kept.append(expected.state_dict())
    assert kept[0] != kept[1]


class Drawing(LinearHead):
    """A head that draws three times: scores grow from one to the next."""

    sampling = True

    def samples_of(self, features):
        return torch.stack([self(features).logits * factor for factor in (0.5, 1.0, 3.0)])


def test_variance_is_that_of_what_the_head_draws(tiny_vit, stream):
    task, head = stream.tasks[0], Drawing(tiny_vit.features)
    learner = Learner(
        PromptedModel(tiny_vit, None, head), lambda task: [], memory=Memory(per_class=2, choose="variance")
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    Trainer(learner, Feed.to(learner, fabric, SPEC, eval_batch=6), fabric).learn(task)
    expected = Memory(per_class=2, choose="variance")
    with torch.no_grad():
        draws = disagreement(head.samples_of(plain_features(tiny_vit, task.train)))[:, None]
    expected.keep(task, 0, draws=draws)
    assert learner.memory.state_dict() == expected.state_dict()


def test_a_head_that_draws_nothing_leaves_nothing_to_choose_by(tiny_vit, stream):
    """Refused when a learner is built; what says so and does not, when the choice is due."""
    message = (
        "choose='variance' keeps images on which draws agree, and the head of this method draws nothing: take "
        "choose='entropy' or 'energy'"
    )
    with pytest.raises(ConfigError) as error:
        replaying(tiny_vit, choose="variance")
    assert str(error.value) == message
    trainer = replaying(tiny_vit, before=[], after=[])
    trainer.learner.memory = Memory(per_class=2, choose="variance")
    with pytest.raises(ConfigError) as error:
        trainer.learn(stream.tasks[0])
    assert str(error.value) == message


@pytest.mark.parametrize("choose", ["herding", "entropy"])
def test_processes_without_an_image_choose_like_the_others(tiny_vit, stream, choose):
    """Thirty of them share 27 images: three see none."""
    task = stream.tasks[0]
    model = PromptedModel(tiny_vit, None, LinearHead(tiny_vit.features))
    model.begin_task(task)
    features = plain_features(tiny_vit, task.train)
    memories = [Memory(per_class=2, choose=choose) for _ in range(31)]
    shares = [*(Share(rank, 30) for rank in range(30)), Share()]
    watchers = [
        Choosing(memory, task, model.eval(), classes=3, share=share, seed=0)
        for memory, share in zip(memories, shares, strict=True)
    ]
    for watcher, share in zip(watchers, shares, strict=True):
        rows = np.arange(share.rank, TRAIN, share.world)
        for some in np.split(rows, range(6, len(rows), 6)) if len(rows) else []:
            watcher.collect(features[some], torch.from_numpy(task.train.columns[some]))
    tables = []
    with torch.no_grad():
        for watcher in watchers:
            watcher.end_look(lambda table: tables.append(table) or table)
        total = sum(tables[:30])
        torch.testing.assert_close(total, tables[30], rtol=1e-5, atol=1e-6)
        values = {memory.wants: total for memory in memories[:1]}
    memories[0].keep(task, 0, **values)
    assert memories[0].state_dict() == memories[30].state_dict()


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────


def finished(trainer):
    learned = {name: value.clone() for name, value in trainer.learner.model.learned().items()}
    return learned, trainer.learner.memory.state_dict(), [trainer.matrix, trainer.matrix_task_aware]


def assert_same(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    assert [name for name, value in ours[0].items() if not torch.equal(value, theirs[0][name])] == []
    assert ours[1:] == theirs[1:]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = replaying(make_tiny_vit(), run_dir=folder)
    trainer.run(blobs(tasks=3, per_task=3))
    return finished(trainer), [line["position"] for line in lines(folder)]


def middles():
    """After which steps to stop, counted over the run: the first, the middle and the last of each phase."""
    stops, done = [], 0
    for task in range(3):
        for images, batch in ((TRAIN + KEPT * task, 5), (KEPT * (task + 1), 4)):
            steps = 2 * -(-images // batch)
            stops += [done + 1, done + steps // 2, done + steps] if task == 1 else [done + steps // 2]
            done += steps
        done += 1  # asked once between the tasks
    return stops


@pytest.mark.parametrize("stop", middles())
def test_a_run_stopped_in_any_phase_goes_on_as_if_it_had_not_stopped(tiny_vit, stream, tmp_path, unbroken, stop):
    calls = itertools.count(1)
    trainer = replaying(tiny_vit, run_dir=tmp_path)
    trainer.should_stop = lambda: next(calls) == stop
    with pytest.raises(Stopped):
        trainer.run(stream)
    torch.manual_seed(4711)
    trainer = replaying(tiny_vit, run_dir=tmp_path)
    assert trainer.restore(stream)
    trainer.run(stream)
    assert_same(finished(trainer), unbroken[0])
    assert [line["position"] for line in lines(tmp_path)] == unbroken[1]


def test_a_run_that_dies_when_the_memory_has_chosen_chooses_once_more_alike(tiny_vit, stream, tmp_path, unbroken):
    trainer = replaying(tiny_vit, run_dir=tmp_path)
    save = trainer._save

    def dying(*optimizer):
        if trainer.position == (1, 2, 0):
            raise Death
        save(*optimizer)

    trainer._save = dying
    with pytest.raises(Death):
        trainer.run(stream)
    assert trainer.learner.memory.images == 2 * KEPT
    trainer = replaying(tiny_vit, run_dir=tmp_path)
    assert trainer.restore(stream) and trainer.learner.memory.images == KEPT
    trainer.run(stream)
    assert_same(finished(trainer), unbroken[0])


def without_old_images(folder):
    """Make a checkpoint look as before there were memories."""
    state = torch.load(folder / "state.pt", weights_only=True)
    del state["old_images"]
    torch.save(state, folder / "state.pt")


def test_a_checkpoint_from_before_there_were_memories_is_taken_up(tiny_vit, stream, tmp_path):
    trainer_of(NearestMean(), tiny_vit, run_dir=tmp_path).run(stream)
    without_old_images(tmp_path)
    trainer = trainer_of(NearestMean(), tiny_vit, run_dir=tmp_path)
    assert trainer.restore(stream) and trainer.position == (3, 0, 0)


def test_a_run_with_a_memory_does_not_go_on_from_one_without(tiny_vit, stream, tmp_path):
    trainer = replaying(tiny_vit, run_dir=tmp_path)
    trainer.learn(stream.tasks[0])
    without_old_images(tmp_path)
    with pytest.raises(ResumeError) as error:
        replaying(tiny_vit, run_dir=tmp_path).restore(stream)
    assert str(error.value) == f"{tmp_path} was saved without a memory of old images; start this run anew"


# ── two processes ────────────────────────────────────────────────────────────────────────────────────


def learn_both(fabric, folder):
    """What each of two processes does; it leaves its results in a file of its own."""
    torch.set_num_threads(1)
    results = {}
    for choose in ("herding", "entropy"):
        trainer = replaying(make_tiny_vit(), choose=choose, fabric=fabric)
        trainer.run(blobs(tasks=2, per_task=3))
        results[choose] = finished(trainer)
    torch.save(results, Path(folder) / f"{fabric.global_rank}.pt")
    return fabric.world_size


def test_two_processes_learn_and_keep_what_one_does(tmp_path):
    """Batches of 5 and 4, the last ones smaller: shares are uneven, and some empty."""
    assert launch(learn_both, tmp_path, accelerator="cpu", devices=2) == 2
    for choose in ("herding", "entropy"):
        alone = replaying(make_tiny_vit(), choose=choose)
        alone.run(blobs(tasks=2, per_task=3))
        learned, *rest = finished(alone)
        for rank in (0, 1):
            theirs, *others = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[choose]
            assert others == rest
            for name, value in learned.items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-5)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [BOTH, OLD])
def test_a_phase_that_draws_features_takes_no_old_images(data):
    with pytest.raises(ConfigError) as error:
        phase(data, draws=7)
    assert str(error.value) == (
        f"a phase on features that the head draws takes no images; got data={data!r} with draws=7: leave one of them "
        "out"
    )


@pytest.mark.parametrize("data", [BOTH, OLD])
def test_old_images_do_not_come_where_only_the_classes_of_the_task_compete(data):
    with pytest.raises(ConfigError) as error:
        replace(phase(data), classes="task")
    assert str(error.value) == (
        f"old images are of classes that the task may not have; got data={data!r} with classes='task': take "
        "classes='seen'"
    )


def test_a_phase_on_old_images_needs_a_memory(tiny_vit, stream):
    trainer = replaying(tiny_vit)
    trainer.learner.memory = None
    with pytest.raises(ConfigError) as error:
        trainer.run(stream)
    assert str(error.value) == (
        "a phase takes old images and its learner keeps none; got data='task+memory' with memory=None: give the "
        "learner a Memory"
    )


def test_a_memory_that_is_too_small_is_refused_before_anything_is_learned(tiny_vit, stream):
    trainer = replaying(tiny_vit, memory=Memory(total=8))
    with pytest.raises(ConfigError, match="^a memory needs an image of each class; got 8 in all for 9 classes: "):
        trainer.run(stream)
    assert trainer.position == (0, 0, 0) and not trainer.met


@pytest.fixture
def herding(monkeypatch):
    """A method that keeps images."""
    build = NearestMean.build

    def built(self, tower):
        return replace(build(self, tower), memory=Memory(per_class=2, choose="herding"))

    monkeypatch.setattr(NearestMean, "build", built)


def test_a_kept_model_has_no_old_images(herding):
    with pytest.raises(ConfigError) as error:
        ContinualModel("nearest-mean", BACKBONE)
    assert str(error.value) == (
        "a lesson brings new images alone, and with these settings nearest-mean learns from old ones again "
        "(2 per class, herding): take settings without a memory, or measure it by `lamina run`"
    )


def recorded(folder):
    values = {"stream": {"per_class": 3, "test_per_class": 2, "tasks": 2}, "backbone": BACKBONE, "precision": "32"}
    return execute(plan("nearest-mean", "digits", recipe=False, overrides=values)[0], folder)


def test_a_record_says_which_old_images_are_kept_and_counts_none_of_them(tmp_path, monkeypatch):
    without = recorded(tmp_path / "without")
    with monkeypatch.context() as patch:
        build = NearestMean.build
        memory = Memory(per_class=2, choose="herding")
        patch.setattr(NearestMean, "build", lambda self, tower: replace(build(self, tower), memory=memory))
        kept = recorded(tmp_path / "with")
    assert kept.protocol == {**without.protocol, "memory": "2 per class, herding"} != without.protocol
    assert memory.images == 20 and kept.stored_numbers == without.stored_numbers
