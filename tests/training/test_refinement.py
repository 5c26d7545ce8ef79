"""After the look back a head is balanced: 3 steps of 9 images, then 3 steps an epoch for 3 classes, 5 for 6."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lamina.heads.refined import RefinedHead
from lamina.learner import refinement
from lamina.methods.vpt_deep import VPTDeep
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.protections.base import Protection
from lamina.seeds import generator_at
from lamina.training import checkpoint
from lamina.training.progress import Progress
from lamina.training.trainer import Stopped
from tests.streams import blobs, trainer_of

SMALL = {"length": 3, "epochs": 1, "batch_size": 9, "temperature": 2.0}
EPOCHS, DRAWS, BATCH = 2, 10, 13
TRAIN, FIRST, SECOND = 3, 6, 10  # steps: of a task's images, of the refinement after the first task and the second


class Death(Exception):
    """The process is gone; nothing catches this."""


def brief():
    return replace(refinement(epochs=EPOCHS, draws=DRAWS), batch_size=BATCH)


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr("lamina.methods.vpt_deep.refinement", brief)


@pytest.fixture
def stream():
    return blobs(tasks=2, per_task=3)


def learned(trainer):
    return {name: value.clone() for name, value in trainer.learner.model.learned().items()}


def settings(kind=VPTDeep, head="refined"):
    return kind(head=head, **SMALL)


# ── what it does ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [VPTDeep, VPTNSP2])
def test_prompts_are_those_of_a_head_that_is_not_balanced_to_the_bit(tiny_vit, stream, kind):
    refined, plain = (trainer_of(settings(kind, head), tiny_vit) for head in ("refined", "linear"))
    for task in stream:
        refined.learn(task)
        plain.learn(task)
        ours, theirs = learned(refined), learned(plain)
        assert {name for name in theirs if not torch.equal(ours[name], theirs[name])} == {
            name for name in theirs if name.startswith("head.")
        }
    kept = [[p.state_dict() for p in trainer.learner.protections] for trainer in (refined, plain)]
    assert str(kept[0]) == str(kept[1])


def test_all_blocks_of_the_head_move_and_nothing_else(tiny_vit, stream):
    trainer, before = trainer_of(settings(), tiny_vit), {}
    run_phase = trainer._run_phase

    def watched(task, number, *rest):
        before[task.index, number] = learned(trainer)
        run_phase(task, number, *rest)

    trainer._run_phase = watched
    for task in stream:
        trainer.learn(task)
    assert list(before) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    after, start = learned(trainer), before[1, 2]
    moved = {name for name in after if not torch.equal(after[name], start[name])}
    assert moved == {f"head.blocks.{block}.{part}" for block in (0, 1) for part in ("weight", "bias")}


def test_it_is_what_a_loop_written_by_hand_learns(tiny_vit, stream):
    """SGD with Nesterov's momentum on draws of each epoch, shuffled; all classes compete, at temperature 1."""
    trainer = trainer_of(settings(), tiny_vit, seed=3)
    trainer.learn(stream.tasks[0])
    run_phase, head, weights = trainer._run_phase, trainer.learner.model.head, []

    def watched(task, number, *rest):
        if number == 2:
            weights.extend(torch.cat([getattr(b, part).detach() for b in head.blocks]) for part in ("weight", "bias"))
        run_phase(task, number, *rest)

    trainer._run_phase = watched
    trainer.learn(stream.tasks[1])
    weight, bias = (value.requires_grad_() for value in weights)
    optimizer = torch.optim.SGD([weight, bias], lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for epoch in range(EPOCHS):
        features, columns = head.draws(DRAWS, 3, "train", 1, 2, "draws", epoch)
        order = torch.randperm(60, generator=generator_at(3, "train", 1, 2, "order", epoch))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(features[rows] @ weight.mT + bias, columns[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(torch.cat([block.weight for block in head.blocks]), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([block.bias for block in head.blocks]), bias, rtol=1e-5, atol=1e-6)


class Flags(Protection):
    """Notes which parameters ask for a gradient at each step."""

    def __init__(self):
        self.seen = []

    def terms(self, model):
        self.seen.append(asking(model))
        return {}


def asking(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


PROMPTS = [f"prompts.values.{layer}" for layer in range(3)]


def blocks(*numbers):
    return [f"head.blocks.{number}.{part}" for number in numbers for part in ("weight", "bias")]


def test_its_parameters_alone_ask_for_a_gradient_inside_and_all_is_as_before_afterwards(tiny_vit, stream):
    trainer, flags = trainer_of(settings(), tiny_vit), Flags()
    trainer.learner.protections = [flags]
    trainer.learn(stream.tasks[0])
    assert asking(trainer.learner.model) == PROMPTS + blocks(0)
    trainer.learn(stream.tasks[1])
    assert asking(trainer.learner.model) == PROMPTS + blocks(1)
    one, two = flags.seen[: TRAIN + FIRST], flags.seen[TRAIN + FIRST :]
    assert one == [PROMPTS + blocks(0)] * TRAIN + [blocks(0)] * FIRST
    assert two == [PROMPTS + blocks(1)] * TRAIN + [blocks(0, 1)] * SECOND


def test_flags_are_as_before_when_it_is_stopped_inside(tiny_vit, stream):
    trainer, calls = trainer_of(settings(), tiny_vit), itertools.count(1)
    trainer.should_stop = lambda: next(calls) == TRAIN + 2
    with pytest.raises(Stopped):
        trainer.learn(stream.tasks[0])
    assert asking(trainer.learner.model) == PROMPTS + blocks(0)


def test_a_phase_may_train_prompts_alone(tiny_vit, stream):
    trainer = trainer_of(settings(head="linear"), tiny_vit)
    (phase,) = trainer.learner.phases(stream.tasks[0])
    only = replace(phase, parameters=lambda model: list(model.prompts.parameters()))
    trainer.learner.phases, before = lambda task: [only], []
    trainer._begin([stream.tasks[0]])
    before = learned(trainer)
    trainer.learn(stream.tasks[0])
    after = learned(trainer)
    assert [name for name in after if not torch.equal(after[name], before[name])] == PROMPTS


def test_its_numbers_are_those_of_the_paper():
    phase = refinement()
    assert (phase.epochs, phase.draws, phase.batch_size, phase.classes, phase.temperature) == (50, 256, 256, "seen", 1)
    (group,) = phase.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    wanted = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "dampening": 0}
    assert {name: group[name] for name in wanted} == wanted
    assert phase.optimizer.func is torch.optim.SGD and phase.schedule(0.0) == phase.schedule(0.99) == 1


def test_only_a_refined_head_is_refined(stream):
    plans = {
        head: settings(head=head).refine(stream.tasks[0]) for head in ("linear", "cosine", "statistics", "refined")
    }
    assert {head: len(plan) for head, plan in plans.items()} == dict(linear=0, cosine=0, statistics=0, refined=1)


class Told(Progress):
    def __init__(self):
        self.stretches = []

    def begin(self, stage, task, tasks, images):
        self.stretches.append([stage, task, images, 0])

    def advance(self, images, loss=None):
        self.stretches[-1][3] += images


def test_whoever_watches_is_told_of_every_draw(tiny_vit, stream):
    progress = Told()
    trainer_of(settings(), tiny_vit, progress=progress).run(stream)
    expected = []
    for task, classes in enumerate((3, 6)):
        sizes = {"train": 27, "look back": 27, "evaluate": 11 * (task + 1)}
        expected += [["train", task, 27, 27], ["look back", task, 27, 27]]
        expected += [["train", task, EPOCHS * DRAWS * classes, EPOCHS * DRAWS * classes]]
        expected += [["evaluate", task, sizes["evaluate"], sizes["evaluate"]]]
    assert progress.stretches == expected


# ── killed and taken up again ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    from tests.conftest import make_tiny_vit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.methods.vpt_deep.refinement", brief)
        trainer = trainer_of(settings(VPTNSP2), make_tiny_vit())
        trainer.run(blobs(tasks=2, per_task=3))
    return trainer


def positions(folder):
    return [tuple(json.loads(line)["position"]) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(trainer, other, folder):
    ours, theirs = learned(trainer), learned(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert trainer.learner.model.head.counts.tolist() == [9.0] * 6  # each look counted once
    for mine, its in zip(trainer.learner.protections, other.learner.protections, strict=True):
        assert str(mine.state_dict()) == str(its.state_dict())
    assert trainer.matrix == other.matrix
    assert positions(folder) == [
        (task, number, step + 1)
        for task, steps in enumerate((FIRST, SECOND))
        for number, count in ((0, TRAIN), (2, steps))
        for step in range(count)
    ]


def looks_of(trainer):
    """Count the looks back that a trainer finishes."""
    looks, end_look = [], trainer.learner.model.head.end_look
    trainer.learner.model.head.end_look = lambda reduce: (looks.append(trainer.position), end_look(reduce))
    return looks


@pytest.mark.parametrize("stop", [2, 3, 4, 6, 9, 10, 11, 13, 14, 18, 19, 23])
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not_stopped(tiny_vit, stream, tmp_path, unbroken, stop):
    """It is asked after each step, and once between the tasks: the tenth time."""
    trainer, calls = trainer_of(settings(VPTNSP2), tiny_vit, run_dir=tmp_path), itertools.count(1)
    trainer.should_stop = lambda: next(calls) == stop
    with pytest.raises(Stopped):
        trainer.run(stream)
    torch.manual_seed(4711)
    trainer = trainer_of(settings(VPTNSP2), tiny_vit, run_dir=tmp_path)
    assert trainer.restore(stream)
    looks = looks_of(trainer)
    trainer.run(stream)
    done = (stop > TRAIN) + (stop > TRAIN + FIRST + 1 + TRAIN)
    assert len(looks) == 2 - done
    assert_same(trainer, unbroken, tmp_path)


def kill(trainer, place):
    """Arrange that a run dies there, in its second task."""
    save, step = trainer._save, trainer._take_steps
    if place == "in the look back":
        end_look = trainer.learner.model.head.end_look

        def dying(reduce):
            end_look(reduce)
            if trainer.position.task == 1:
                raise Death

        trainer.learner.model.head.end_look = dying
    elif place == "before the look back is saved":

        def dying(*optimizer):
            if trainer.position == (1, 2, 0):
                raise Death
            save(*optimizer)

        trainer._save = dying
    elif place == "before the first step of the refinement":

        def dying(model, task, number, *rest):
            if (task.index, number) == (1, 2):
                raise Death
            step(model, task, number, *rest)

        trainer._take_steps = dying
    elif place == "after the refinement":

        def dying(*optimizer):
            save(*optimizer)
            if trainer.position == (1, 3, 0):
                raise Death

        trainer._save = dying
    else:

        def dying():
            if trainer.position == (1, 2, 7):
                raise Death
            return False

        trainer.should_stop = dying


@pytest.mark.parametrize(
    ("place", "looks"),
    [
        ("in the look back", 1),
        ("before the look back is saved", 1),
        ("before the first step of the refinement", 0),
        ("in the middle of the refinement", 0),
        ("after the refinement", 0),
    ],
)
@pytest.mark.parametrize("every", [0, 3])
def test_a_run_that_dies_around_the_look_back_counts_it_once(tiny_vit, stream, tmp_path, unbroken, place, looks, every):
    arguments = {"run_dir": tmp_path, "checkpoint_every": every}
    trainer = trainer_of(settings(VPTNSP2), tiny_vit, **arguments)
    kill(trainer, place)
    with pytest.raises(Death):
        trainer.run(stream)
    torch.manual_seed(4711)
    trainer = trainer_of(settings(VPTNSP2), tiny_vit, **arguments)
    assert trainer.restore(stream)
    again = looks_of(trainer)
    trainer.run(stream)
    assert len(again) == looks
    assert_same(trainer, unbroken, tmp_path)


def test_checkpoints_stand_after_each_phase_the_look_back_and_the_refinement(tiny_vit, stream, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, state: (saved.append(state["position"]), save(folder, state))
    )
    trainer_of(settings(), tiny_vit, run_dir=tmp_path, checkpoint_every=4).run(stream)
    first = [(0, 1, 0), (0, 2, 0), (0, 2, 4), (0, 3, 0), (1, 0, 0)]
    assert saved == [*first, (1, 1, 0), (1, 2, 0), (1, 2, 4), (1, 2, 8), (1, 3, 0), (2, 0, 0)]


def test_a_plan_without_training_may_refine_what_the_look_back_found(tiny_vit, stream, tmp_path):
    """Phase 0 is then the look back itself."""

    def trainer():
        made = trainer_of(settings(), tiny_vit, run_dir=tmp_path)
        made.learner.phases = lambda task: []
        return made

    whole = trainer()
    whole.run_dir = None
    whole.run(stream)
    broken, calls = trainer(), itertools.count(1)
    broken.should_stop = lambda: next(calls) == 2
    with pytest.raises(Stopped):
        broken.run(stream)
    assert broken.position == (0, 1, 2)
    broken = trainer()
    assert broken.restore(stream)
    broken.run(stream)
    ours, theirs = learned(broken), learned(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert isinstance(broken.learner.model.head, RefinedHead) and ours["head.counts"].tolist() == [9.0] * 6
