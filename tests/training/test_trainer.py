"""The loop, step by step: 27 training images a task in batches of 5, N 17 tokens, D 24 channels, 3 classes a task."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from lamina.data.loader import global_batch
from lamina.data.stream import Split, Task
from lamina.errors import ConfigError, TrainingError
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase
from lamina.lookback import Watcher
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.nearest_mean import NearestMean
from lamina.methods.vpt_deep import VPTDeep
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch, Output, PromptedModel
from lamina.protections.base import Protection
from lamina.seeds import seed_at
from lamina.training import checkpoint
from lamina.training.evaluation import accuracies, scores
from lamina.training.feed import Feed
from lamina.training.log import Log
from lamina.training.objective import classify
from lamina.training.progress import Progress
from lamina.training.trainer import Stopped, Trainer
from tests.streams import SPEC, blobs, trainer_of

DEEP = VPTDeep(length=4, epochs=2, batch_size=5)
PROTECTED = VPTNSP2(length=4, epochs=2, batch_size=5)
STEPS = 12  # of a task: two epochs of six steps


@pytest.fixture
def stream():
    return blobs(tasks=2, per_task=3)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def sgd_phase(*, lr=0.5, epochs=2, batch_size=5, **values):
    return Phase(epochs, batch_size, partial(torch.optim.SGD, lr=lr, momentum=0.9), **values)


def head_trainer(tower, phases, protections=(), **arguments):
    """A trainer of a linear head on cached features, with any plan."""
    torch.manual_seed(0)
    head = LinearHead(tower.features)
    learner = Learner(PromptedModel(tower, None, head), lambda task: phases, list(protections), cache="features")
    feed = Feed(Fabric(accelerator="cpu", devices=1), SPEC, eval_batch=6, features=tower)
    return Trainer(learner, feed, **arguments)


# ── the objective ────────────────────────────────────────────────────────────────────────────────────

OBJECTIVE_TASK = Task(1, ["x", "y", "z"], [4, 2, 5], None, None)


def cross_entropy_by_hand(logits, labels, columns, temperature):
    """Mean over rows of -log of the label's share of exp(logit / temperature) among `columns`."""
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = {column: math.exp(row[column] / temperature) for column in columns}
        losses.append(-math.log(weights[label] / sum(weights.values())))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("classes", "columns"), [("task", [4, 2, 5]), ("seen", range(7))])
def test_the_loss_is_the_cross_entropy_over_the_columns_that_compete(classes, columns, temperature):
    logits, labels = 4 * torch.randn(5, 7), torch.tensor([2, 5, 5, 4, 2])
    loss = classify(logits, labels, OBJECTIVE_TASK, sgd_phase(classes=classes, temperature=temperature))
    assert loss.item() == pytest.approx(cross_entropy_by_hand(logits, labels, columns, temperature), rel=1e-5)


@pytest.mark.parametrize(("classes", "columns"), [("task", [4, 2, 5]), ("seen", range(7))])
def test_the_loss_of_several_draws_is_the_mean_of_their_losses(classes, columns):
    logits, labels = 4 * torch.randn(3, 5, 7), torch.tensor([2, 5, 5, 4, 2])
    loss = classify(logits, labels, OBJECTIVE_TASK, sgd_phase(classes=classes))
    each = [cross_entropy_by_hand(draw, labels, columns, 1.0) for draw in logits]
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_the_loss_is_computed_in_float32_whatever_the_logits():
    logits, labels = torch.randn(5, 7).bfloat16(), torch.tensor([2, 5, 5, 4, 2])
    loss = classify(logits, labels, OBJECTIVE_TASK, sgd_phase())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy_by_hand(logits, labels, [4, 2, 5], 1.0), rel=1e-5)


def test_columns_outside_the_task_get_no_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    classify(logits, torch.tensor([2, 5, 5, 4, 2]), OBJECTIVE_TASK, sgd_phase()).backward()
    assert logits.grad.abs().sum(0).ne(0).tolist() == [False, False, True, False, True, True, False]


# ── one task of steps ────────────────────────────────────────────────────────────────────────────────


def test_a_linear_probe_learns_what_a_loop_written_by_hand_learns(tiny_vit, stream):
    """Plain features, batches by address, Adam, half a cosine, the task's columns alone: no augmentation."""
    settings = LinearProbe(epochs=2, batch_size=5, lr=0.02, weight_decay=0.01, temperature=2.0)
    trainer = trainer_of(settings, tiny_vit, seed=3)
    trainer.run(stream)
    blocks = []
    for task in stream:
        split = task.train
        pixels = torch.stack([split.images.image(int(index)) for index in split.indices]) / 255
        with torch.no_grad():
            features = tiny_vit((pixels - 0.5) / 0.25).features
        torch.manual_seed(seed_at(3, "begin", task.index))
        blocks.append(block := nn.Linear(24, 3))
        nn.init.trunc_normal_(block.weight, std=0.02)
        nn.init.zeros_(block.bias)
        optimizer = torch.optim.Adam(block.parameters(), lr=0.02, weight_decay=0.01)
        for step in range(STEPS):
            chosen = global_batch(split, address=(3, "train", task.index, 0), batch_size=5, step=step)
            optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            labels = torch.from_numpy(split.columns[chosen]) - 3 * task.index
            loss = nn.functional.cross_entropy(block(features[chosen]) / 2.0, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, by_hand in zip(trainer.learner.model.head.blocks, blocks, strict=True):
        torch.testing.assert_close(ours.weight, by_hand.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.bias, by_hand.bias, rtol=1e-5, atol=1e-6)


def test_training_images_are_augmented_and_those_of_the_look_back_are_not(tiny_vit, stream):
    trainer = trainer_of(DEEP, tiny_vit)
    task = stream.tasks[0]
    (phase,) = DEEP.phases(task)
    plain = torch.cat([batch.images for batch in trainer.feed.plain(task.train)])
    stored = torch.stack([task.train.images.image(int(index)) for index in task.train.indices])
    torch.testing.assert_close(plain, (stored / 255 - 0.5) / 0.25)
    chosen = global_batch(task.train, address=(0, "train", 0, 0), batch_size=5, step=0)
    fed = next(trainer.feed.train(task, 0, phase, 0))
    assert fed.batch.labels.tolist() == task.train.columns[chosen].tolist()
    assert (fed.batch.images - plain[chosen]).abs().mean() > 0.1


def test_the_learning_rate_follows_the_schedule_step_by_step(tiny_vit, stream, tmp_path):
    """The first step is at progress 0, the last one just short of 1; each phase begins anew."""
    phases = [sgd_phase(schedule=lambda p: 1 + p), sgd_phase(lr=0.25, epochs=1, schedule=lambda p: 2 - p)]
    head_trainer(tiny_vit, phases, run_dir=tmp_path).run(stream)
    one_task = [0.5 * (1 + step / 12) for step in range(12)] + [0.25 * (2 - step / 6) for step in range(6)]
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx(2 * one_task)


def test_the_rate_that_is_logged_is_the_one_that_a_step_is_taken_with(tiny_vit, stream, tmp_path):
    """Plain SGD: a step is the rate times the gradient."""
    plan = [Phase(1, 27, partial(torch.optim.SGD, lr=0.5), schedule=lambda p: 0.125)]
    trainer = head_trainer(tiny_vit, plan)
    moved = []

    class Watch(Protection):
        def terms(self, model):
            (block,) = model.head.blocks
            self.before = block.bias.detach().clone()
            return {}

    watch = Watch()
    trainer.learner.protections = [watch]

    def stop():
        (block,) = trainer.learner.model.head.blocks
        moved.append((block.bias.detach() - watch.before, block.bias.grad.clone()))
        return False

    trainer.should_stop = stop
    trainer.learn(stream.tasks[0])
    ((step, gradient),) = moved
    torch.testing.assert_close(step, -0.0625 * gradient)


class Strict(Protection):
    """Notes what it is asked, and takes no more than so many training images."""

    def __init__(self, most):
        super().__init__()
        self.most, self.asked = most, []

    def check(self, tasks, processes=1):
        self.asked.append([task.index for task in tasks])
        if any(len(task.train) > self.most for task in tasks):
            raise ConfigError("too many images")


@pytest.mark.parametrize("at_once", [False, True])
def test_protections_are_asked_about_all_that_will_be_learned_before_any_of_it_is(tiny_vit, stream, at_once):
    most, stages = (54, [0]) if at_once else (27, [0, 1])
    for limit in (most, most - 1):
        trainer = head_trainer(tiny_vit, [sgd_phase()])
        trainer.learner.protections, trainer.learner.at_once = [Protection(), Strict(limit)], at_once
        if limit == most:
            trainer.run(stream)
            assert trainer.position.task == len(stages)
        else:
            with pytest.raises(ConfigError, match="^too many images$"):
                trainer.run(stream)
            assert not trainer.learner.model.learned()
        assert trainer.learner.protections[1].asked == [stages]


def test_prompts_are_asked_about_all_tasks_before_the_first_and_about_none_when_one_is_learned_alone(tiny_vit, stream):
    trainer, asked = trainer_of(DEEP, tiny_vit), []
    trainer.learner.model.prompts.check = lambda tasks: asked.append((trainer.position, list(tasks)))
    trainer.learn(stream.tasks[0])
    assert asked == []
    again = trainer_of(DEEP, tiny_vit)
    again.learner.model.prompts.check = lambda tasks: asked.append((again.position, list(tasks)))
    again.run(stream)
    assert asked == [((0, 0, 0), list(stream.tasks))]


def test_every_step_has_a_line_with_its_loss_terms_by_name(tiny_vit, stream, tmp_path):
    trainer_of(PROTECTED, tiny_vit, run_dir=tmp_path).run(stream)
    written = lines(tmp_path)
    assert [line["position"] for line in written] == [[t, 0, s + 1] for t in range(2) for s in range(STEPS)]
    for line in written:
        protected = line["position"][0] == 1
        terms = ["classify", "moments"] if protected else ["classify"]
        assert list(line) == ["position", "loss", *terms, "lr", "images_per_second"]
        assert line["loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)
    assert any(line["moments"] > 0 for line in written[STEPS + 1 :])


def test_the_weight_of_a_protection_scales_its_term(tiny_vit, stream, tmp_path):
    for weight in (1.0, 3.0):
        settings = PROTECTED.model_copy(update={"moments": weight})
        trainer = trainer_of(settings, tiny_vit, run_dir=tmp_path / str(weight))
        (tmp_path / str(weight)).mkdir()
        trainer.learn(stream.tasks[0])
        with torch.no_grad():
            for prompt in trainer.learner.model.prompts.parameters():
                prompt.add_(0.5)
        trainer.learn(stream.tasks[1])
    one, three = (lines(tmp_path / weight)[STEPS]["moments"] for weight in ("1.0", "3.0"))
    assert one > 0.5 and three == pytest.approx(3 * one, rel=1e-5)


def test_several_phases_of_a_task_go_on_from_a_stop_inside_the_second(tiny_vit, stream, tmp_path):
    """Momentum of one phase is not that of the next, and each phase has an order of its own."""

    def trainer(folder):
        phases = [sgd_phase(epochs=1), sgd_phase(lr=0.25, epochs=1, batch_size=4, schedule=lambda p: 1 - p)]
        return head_trainer(tiny_vit, phases, run_dir=folder)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    unbroken = trainer(whole)
    unbroken.run(stream)
    assert [line["position"] for line in lines(whole)][:14] == [
        *([0, 0, step] for step in range(1, 7)),
        *([0, 1, step] for step in range(1, 8)),
        [1, 0, 1],
    ]
    for stop in (6, 3, 1, 5):  # the last step of the first phase, and inside the second
        broken = trainer(parts)
        broken.restore(stream)
        countdown = iter([False] * (stop - 1) + [True] + [False] * 99)
        broken.should_stop = lambda countdown=countdown: next(countdown)
        with pytest.raises(Stopped):
            broken.run(stream)
    broken = trainer(parts)
    assert broken.restore(stream)
    broken.run(stream)
    theirs = broken.learner.model.learned()
    assert all(torch.equal(value, theirs[name]) for name, value in unbroken.learner.model.learned().items())
    assert broken.matrix == unbroken.matrix
    for name in ("position", "loss", "lr"):
        assert [line[name] for line in lines(parts)] == [line[name] for line in lines(whole)]


def test_phases_begin_without_the_momentum_of_the_last(tiny_vit, stream, tmp_path):
    states = []

    def watched(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        optimizer.register_step_pre_hook(lambda *_: states.append(len(optimizer.state)))
        return optimizer

    head_trainer(tiny_vit, [Phase(1, 14, watched), Phase(1, 14, watched)]).run(stream)
    assert states == [0, 2] * 4


# ── what a model draws ───────────────────────────────────────────────────────────────────────────────


class NoisyHead(LinearHead):
    """Draws noise in training, as heads that sample do, and looks back."""

    looks_at = "features"

    def __init__(self, features):
        super().__init__(features)
        self.drawn, self.training_in_look_back = [], []

    def forward(self, features, labels=None):
        noise = 0.1 * torch.randn_like(features) if self.training else torch.zeros_like(features)
        if self.training:
            self.drawn.append(noise[0, 0].item())
        return super().forward(features + noise)

    def collect(self, features, columns):
        self.training_in_look_back.append(self.training)


def noisy_trainer(tower, folder):
    trainer = head_trainer(tower, [sgd_phase(batch_size=9, epochs=1)] * 2, run_dir=folder)
    trainer.learner.model.head = NoisyHead(tower.features)
    return trainer


def test_every_step_of_every_phase_and_task_draws_other_numbers(tiny_vit, stream):
    trainer = noisy_trainer(tiny_vit, None)
    trainer.run(stream)
    drawn = trainer.learner.model.head.drawn
    assert len(drawn) == len(set(drawn)) == 12  # two tasks of two phases of three steps


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_resumed_run_draws_what_an_unbroken_one_draws(tiny_vit, stream, tmp_path, stop):
    unbroken = noisy_trainer(tiny_vit, None)
    unbroken.run(stream)
    broken = noisy_trainer(tiny_vit, tmp_path)
    stopping = broken.learner.model.head.drawn
    broken.should_stop = lambda: len(stopping) == stop
    with pytest.raises(Stopped):
        broken.run(stream)
    torch.manual_seed(4711)
    broken = noisy_trainer(tiny_vit, tmp_path)
    broken.restore(stream)
    broken.run(stream)
    assert broken.learner.model.head.drawn == unbroken.learner.model.head.drawn[stop:]
    theirs = unbroken.learner.model.learned()
    assert all(torch.equal(value, theirs[name]) for name, value in broken.learner.model.learned().items())


def test_the_look_back_sees_the_model_as_it_will_be_used_not_as_it_trains(tiny_vit, stream):
    trainer = noisy_trainer(tiny_vit, None)
    trainer.learn(stream.tasks[0])
    assert trainer.learner.model.head.training_in_look_back == [False] * 5


# ── a loss that is not finite ────────────────────────────────────────────────────────────────────────


class Poison(Protection):
    """Adds a term that is not finite at one step, counted from 1."""

    def __init__(self, step, value):
        self.step, self.value, self.count = step, value, 0

    def terms(self, model):
        self.count += 1
        return {"poison": torch.tensor(self.value if self.count == self.step else 0.0)}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_which_term(tiny_vit, stream, tmp_path, value):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    healthy = head_trainer(tiny_vit, [sgd_phase()], [Poison(0, 0.0)], run_dir=whole)
    healthy.run(stream)
    trainer = head_trainer(tiny_vit, [sgd_phase()], [Poison(STEPS + 8, value)], run_dir=broken, checkpoint_every=3)
    with pytest.raises(TrainingError) as error:
        trainer.run(stream)
    classified = lines(whole)[STEPS + 7]["classify"]
    assert str(error.value) == (
        f"the loss is not finite in task 2, step 8: classify = {classified:.4g}, poison = {value}; lower the learning "
        "rate or raise the temperature. The last checkpoint is from before this step."
    )
    assert all(parameter.isfinite().all() for parameter in trainer.learner.model.parameters())
    again = head_trainer(tiny_vit, [sgd_phase()], [Poison(0, 0.0)], run_dir=broken)
    assert again.restore(stream)
    assert again.position == (1, 0, 6)
    again.run(stream)
    theirs = healthy.learner.model.learned()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.learner.model.learned().items())


# ── accuracy ─────────────────────────────────────────────────────────────────────────────────────────


class Echo(nn.Module):
    """Takes its features for logits."""

    def forward(self, batch, task=None):
        assert batch.labels is None, "a model under test must not see the labels"
        assert not self.training
        return Output(batch.features, {})


def echo_tasks():
    """Two tasks: columns 0 and 1, then 2 to 4; four and three images with scores by hand."""
    logits = {
        0: [[9, 1, 0, 0, 0], [1, 9, 0, 0, 0], [5, 1, 8, 0, 0], [5, 6, 0, 0, 0]],
        1: [[9, 0, 5, 1, 1], [0, 0, 1, 2, 7], [9, 0, 1, 2, 3]],
    }
    labels = {0: [0, 1, 0, 0], 1: [2, 4, 3]}
    tasks = [Task(0, ["a", "b"], [0, 1], None, None), Task(1, ["c", "d", "e"], [2, 3, 4], None, None)]

    def batches(task, size=3):
        rows, truth = torch.tensor(logits[task.index], dtype=torch.float32), torch.tensor(labels[task.index])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            yield Batch(None, truth[part], features=rows[part])

    return tasks, batches


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_accuracy_counts_images_and_the_task_aware_one_masks_other_columns(size):
    tasks, batches = echo_tasks()
    row, aware = accuracies(Echo(), tasks, lambda task: batches(task, size), seed=0, reduce=lambda counts: counts)
    assert row == [2 / 4, 1 / 3]
    assert aware == [3 / 4, 2 / 3]


def test_counts_of_all_processes_are_summed_before_they_are_divided():
    """Another process had 1 of 2 images of the first task right and 0 of 5 of the second."""
    tasks, batches = echo_tasks()
    others = torch.tensor([[1, 2, 2], [0, 1, 5]], dtype=torch.float64)
    row, aware = accuracies(Echo(), tasks, batches, seed=0, reduce=lambda counts: counts + others)
    assert row == [3 / 6, 1 / 8]
    assert aware == [5 / 6, 3 / 8]


def test_draws_of_a_head_are_averaged_before_the_best_class_is_taken():
    class Draws(Echo):
        def forward(self, batch, task=None):
            return Output(torch.stack([batch.features, 3 * batch.features.flip(-1)]), {})

    logits = scores(Draws().eval(), Batch(None, torch.tensor([0]), features=torch.tensor([[1.0, 2.0, 5.0]])))
    assert logits.tolist() == [[8.0, 4.0, 4.0]]


def test_accuracy_of_tasks_with_uneven_test_sets_is_each_ones_own(tiny_vit, stream):
    """Against a count by hand over images one by one."""
    first, second = stream.tasks
    few = Split(second.test.images, second.test.indices[:4], second.test.columns[:4])
    second = Task(1, second.classes, second.columns, second.train, few)
    trainer = trainer_of(NearestMean(), tiny_vit)
    trainer.learn(first)
    trainer.learn(second)
    trainer.evaluate([first, second])
    right = []
    with torch.no_grad():
        for split in (first.test, second.test):
            pixels = torch.stack([split.images.image(int(index)) for index in split.indices]) / 255
            logits = trainer.learner.model(Batch((pixels - 0.5) / 0.25)).logits
            right.append(np.mean(logits.argmax(-1).numpy() == split.columns))
    assert trainer.matrix == [pytest.approx(right)]
    assert round(trainer.matrix[0][0] * 11, 9).is_integer() and round(trainer.matrix[0][1] * 4, 9).is_integer()


# ── the look back ────────────────────────────────────────────────────────────────────────────────────


class Looker(Protection):
    """Remembers what it was shown."""

    def __init__(self, looks_at):
        self.looks_at, self.calls = looks_at, []
        self.features, self.columns, self.layers = [], [], []

    def begin_look(self):
        self.calls.append("begin")

    def see(self, probe):
        self.layers.append((probe.layer, len(probe.inputs)))

    def collect(self, features, columns):
        assert not features.requires_grad
        self.features.append(features)
        self.columns.append(columns)

    def end_look(self, reduce):
        self.calls.append("end")
        assert reduce(torch.tensor(3.0)) == 3.0


@pytest.fixture
def forwards(tiny_vit):
    """The number of images in each call of the tower, in order."""
    sizes, forward = [], tiny_vit.forward

    def counted(inputs, *arguments, **named):
        sizes.append(len(inputs))
        return forward(inputs, *arguments, **named)

    tiny_vit.forward = counted
    return sizes


def test_nothing_is_looked_back_on_when_nobody_looks(tiny_vit, stream, forwards):
    trainer_of(DEEP, tiny_vit).learn(stream.tasks[0])
    assert forwards == 2 * [5, 5, 5, 5, 5, 2]


def test_everyone_who_looks_shares_one_pass(tiny_vit, stream, forwards):
    lookers = [Looker("probes"), Looker("features"), Looker("nothing"), Looker("probes"), Looker("features")]
    trainer = trainer_of(DEEP, tiny_vit)
    trainer.learner.protections = lookers
    task = stream.tasks[0]
    trainer.learn(task)
    assert forwards[STEPS:] == [6, 6, 6, 6, 3]
    assert all(looker.calls == ["begin", "end"] for looker in lookers)
    shown = [(layer, size) for size in (6, 6, 6, 6, 3) for layer in range(3)]
    assert [looker.layers for looker in lookers] == [shown, [], [], shown, []]
    plain = torch.cat([batch.images for batch in trainer.feed.plain(task.train)])
    with torch.no_grad():
        features, _ = trainer.learner.model.features(Batch(plain))
    for looker in (lookers[1], lookers[4]):
        torch.testing.assert_close(torch.cat(looker.features), features, rtol=1e-4, atol=1e-5)
        assert torch.cat(looker.columns).tolist() == task.train.columns.tolist()


def test_a_head_that_looks_is_shown_the_task_too(tiny_vit, stream, forwards):
    trainer = trainer_of(NearestMean(), tiny_vit)
    trainer.learn(stream.tasks[0])
    assert trainer.learner.model.head.seen.counts.tolist() == [9, 9, 9]
    assert sum(forwards) <= 27


def test_a_watcher_looks_at_nothing_unless_it_says_so():
    assert Watcher().looks_at == Protection().looks_at == LinearHead(24).looks_at == "nothing"


# ── time, progress, checkpoints ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings", [DEEP, PROTECTED, NearestMean(), LinearProbe(epochs=1)], ids=lambda s: type(s).__name__
)
def test_every_stretch_of_work_is_timed_once_per_row_of_the_matrix(tiny_vit, stream, settings):
    trainer = trainer_of(settings, tiny_vit)
    trainer.run(stream)
    assert {name: len(parts) for name, parts in trainer.seconds.items()} == {"train": 2, "look_back": 2, "evaluate": 2}
    trained = [value > 0 for value in trainer.seconds["train"]]
    assert trained == [not isinstance(settings, NearestMean)] * 2
    assert all(value > 0 for value in trainer.seconds["evaluate"])


def test_seconds_of_an_interrupted_task_are_kept_and_added_to(tiny_vit, stream, tmp_path):
    trainer = trainer_of(DEEP, tiny_vit, run_dir=tmp_path)
    calls = iter([False] * 4 + [True])
    trainer.should_stop = lambda: next(calls)
    with pytest.raises(Stopped):
        trainer.run(stream)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["seconds"]["train"]
    assert len(saved) == 1 and saved[0] > 0
    trainer = trainer_of(DEEP, tiny_vit, run_dir=tmp_path)
    trainer.restore(stream)
    trainer.run(stream)
    assert [len(parts) for parts in trainer.seconds.values()] == [2, 2, 2]
    assert trainer.seconds["train"][0] > saved[0]


class Recorder(Progress):
    def __init__(self):
        self.stretches, self.rows, self.losses, self.skipped = [], [], 0, []

    def begin(self, stage, task, tasks, images):
        self.stretches.append([stage, task, tasks, images, 0])

    def advance(self, images, loss=None):
        self.stretches[-1][4] += images
        self.losses += loss is not None

    def skip(self, images):
        self.stretches[-1][4] += images
        self.skipped.append(images)

    def row(self, task, tasks, accuracies):
        self.rows.append((task, tasks, accuracies))


def test_whoever_watches_is_told_of_every_image_once(tiny_vit, stream):
    progress = Recorder()
    trainer = trainer_of(PROTECTED, tiny_vit, progress=progress)
    trainer.run(stream)
    assert progress.stretches == [
        ["train", 0, 2, 54, 54],
        ["look back", 0, 2, 27, 27],
        ["evaluate", 0, 1, 11, 11],
        ["train", 1, 2, 54, 54],
        ["look back", 1, 2, 27, 27],
        ["evaluate", 1, 2, 22, 22],
    ]
    assert progress.losses == 2 * STEPS
    assert progress.rows == [(0, 2, trainer.matrix[0]), (1, 2, trainer.matrix[1])]


def test_a_resumed_run_tells_of_the_images_that_were_done_before(tiny_vit, stream, tmp_path):
    trainer = trainer_of(DEEP, tiny_vit, run_dir=tmp_path)
    calls = iter([False] * 7 + [True])
    trainer.should_stop = lambda: next(calls)
    with pytest.raises(Stopped):
        trainer.run(stream)
    progress = Recorder()
    trainer = trainer_of(DEEP, tiny_vit, run_dir=tmp_path, progress=progress)
    trainer.restore(stream)
    trainer.run(stream)
    # eight steps of five are 40 images at most: the last batch of the first epoch had two
    assert progress.skipped == [40, 0]
    assert progress.stretches[0] == ["train", 0, 2, 54, 40 + 5 + 5 + 5 + 2]


@pytest.mark.parametrize(("every", "inside"), [(0, []), (5, [5, 10]), (4, [4, 8, 12]), (100, [])])
def test_a_checkpoint_is_written_every_so_many_steps_and_between_tasks(
    tiny_vit, stream, tmp_path, monkeypatch, every, inside
):
    saved, save = [], checkpoint.save

    def recorded(folder, state):
        saved.append((*state["position"], state["optimizer"] is not None, len(state["matrix"])))
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save", recorded)
    head_trainer(tiny_vit, [sgd_phase()], run_dir=tmp_path, checkpoint_every=every).run(stream)
    expected = []
    for task in range(2):
        expected += [(task, 0, step, True, task) for step in inside]
        expected += [(task, 1, 0, False, task), (task + 1, 0, 0, False, task + 1)]
    assert saved == expected


def test_a_trainer_without_a_folder_writes_nothing(tiny_vit, stream, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head_trainer(tiny_vit, [sgd_phase()], checkpoint_every=1).run(stream)
    assert list(tmp_path.iterdir()) == []


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_log_drops_lines_after_a_position_and_a_line_cut_short(tmp_path):
    log = Log(tmp_path)
    for position in [(0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1), (1, 0, 2)]:
        log.step(position, {"loss": 0.5}, lr=0.1, images=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"position": [1, 0')
    log.cut((1, 0, 1))
    assert [line["position"] for line in lines(tmp_path)] == [[0, 0, 1], [0, 0, 2], [0, 1, 1], [1, 0, 1]]
    log.step((1, 0, 2), {"loss": 0.5}, lr=0.1, images=5)
    assert lines(tmp_path)[-1]["position"] == [1, 0, 2]


def test_steps_before_the_first_checkpoint_stand_in_the_log_once_after_a_restart(tiny_vit, stream, tmp_path):
    """A process that dies before it saved anything leaves lines of steps that will be taken again."""
    trainer = head_trainer(tiny_vit, [sgd_phase()], run_dir=tmp_path, checkpoint_every=100)
    calls = iter([False] * 4 + [None])
    trainer.should_stop = lambda: next(calls) is None and 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run(stream)
    assert not (tmp_path / "state.pt").exists() and len(lines(tmp_path)) == 5
    trainer = head_trainer(tiny_vit, [sgd_phase()], run_dir=tmp_path, checkpoint_every=100)
    assert not trainer.restore(stream)
    trainer.run(stream)
    assert [line["position"] for line in lines(tmp_path)] == [[t, 0, s + 1] for t in range(2) for s in range(STEPS)]
