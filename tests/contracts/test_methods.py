"""What every registered method must do, whatever it is: the contracts, on a tower with axes of their own sizes.

27 training and 11 test images a task, 3 classes a task, N 17 tokens, M 3 prompt tokens, D 24 channels, L 3 blocks.
"""

import importlib
import inspect
import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from lamina.config import read_toml, write_toml
from lamina.model import Batch
from lamina.registry import method_class, method_names
from lamina.training.replay import taking
from lamina.training.trainer import Stopped
from tests.backbones.clips import tower_for
from tests.streams import blobs, trainer_of

#: makes any method cheap; applied where a method has such a setting
CHEAP = {"epochs": 2, "batch_size": 7, "length": 3, "width": 40, "refine_epochs": 2, "refine_draws": 6, "words": ""}
CHEAP |= {"contexts": 4, "balance": 1}
#: where one pass of three steps proves as much
BRIEF = {"epochs": 1, "batch_size": 9, "refine_epochs": 1}
#: published rates are for a text tower that was trained; one that was not hears little of learned words
FAST = {name: {"lr": 0.1, "momentum": 0.9} for name in ("attriclip", "proda")} | {"clip-adapter": {"lr": 0.01}}
FAST |= {"maple": {"lr": 0.03}, "clap": {"lr": 0.01, "mc": "mean"}}
FAST |= {"adapter": {"lr": 0.01}, "bi-adaptformer": {"lr": 0.01}, "bitfit": {"lr": 0.01}, "full": {"lr": 0.003}}
FAST |= {"clip-nsp2": {"lr": 0.01}, "clip-pgp": {"first_lr": 0.1}}
#: are clearly better than chance after half the epochs
QUICK = "bayes-prompt clip-nsp2 clip-pgp cocoop cprompt dualprompt dualprompt-pgp joint l2p l2p-nsp2 l2p-pgp l2p-pp"
QUICK = {*QUICK.split(), "linear-probe", "strata", "vpt-deep", "vpt-nsp2", "vpt-nsp2-exact", "vpt-pgp"}
#: by how much of the spread of logits bf16 may move them where that is not 4 %
LOOSE = {"clap": 0.02, "clap-nsp2": 0.02, "clip-nsp2": 0.06, "clip-seq": 0.1, "cocoop": 0.1, "proof": 0.06}
TASKS, PER_TASK = 2, 3

every_method = pytest.mark.parametrize("name", method_names())


class Death(Exception):
    """The process is gone; nothing catches this."""


def cheap(name, **values):
    """Return cheap settings of a method, with those of `values` that it has."""
    kind = method_class(name)
    return kind(**{setting: value for setting, value in {**CHEAP, **values}.items() if setting in kind.model_fields})


FOLDER = tempfile.TemporaryDirectory()  # of finished runs

tower = cache(tower_for)  # with a text side for methods that read the names of classes: D 48, F 24, W 40


@cache
def finished(name, seed=0):
    """Return a trainer that has run a method over both tasks without a break, its folder kept; nobody changes it."""
    trainer = trainer_of(cheap(name), tower(name), seed=seed, run_dir=Path(tempfile.mkdtemp(dir=FOLDER.name)))
    trainer.run(blobs(TASKS, PER_TASK))
    return trainer


@cache
def disturbed(name):
    """Return a trainer that keeps no folder and has run a method, on a tower of its own, while others drew numbers.

    `frozen` are, before and after, the tensors of the tower that it was given and what is not learned of its model;
    `columns` are the classes that it scored after each task.
    """
    given = tower.__wrapped__(name)
    trainer = trainer_of(cheap(name), given)
    model, evaluate = trainer.learner.model, trainer.evaluate
    stream = blobs(TASKS, PER_TASK)
    images, _ = images_and_labels(stream)

    def frozen():
        state, learned = model.state_dict(), model.learned()
        kept = {key: value for key, value in state.items() if key not in learned}
        kept |= {f"given {key}": value for key, value in given.state_dict().items()}
        return {key: value.clone() for key, value in kept.items()}

    def look_at_columns(tasks):
        trainer.columns.append(logits_of(trainer, images).shape)
        evaluate(tasks)

    trainer.frozen, trainer.columns, trainer.evaluate = [frozen()], [], look_at_columns
    trainer.should_stop = lambda: torch.rand(3).sum() > 3
    torch.manual_seed(99)
    trainer.run(stream)
    trainer.frozen.append(frozen())
    return trainer


def tensors(value, name=""):
    """Return every tensor inside nested mappings and lists, by dotted name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = enumerate(value) if isinstance(value, list | tuple) else getattr(value, "items", tuple)()
    return {k: v for key, part in parts for k, v in tensors(part, f"{name}.{key}").items()}


def remembered(trainer):
    """Return all that a run leaves behind: learned tensors and what protections keep."""
    learner = trainer.learner
    return tensors({"learned": learner.model.learned(), "kept": [p.state_dict() for p in learner.protections]})


def assert_same_run(trainer, other):
    """Bit for bit."""
    assert trainer.matrix == other.matrix
    assert trainer.matrix_task_aware == other.matrix_task_aware
    ours, theirs = remembered(trainer), remembered(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def images_and_labels(stream):
    """Return the test images (22, 3, 32, 32) of all tasks as the tower takes them, and their columns."""
    feed = trainer_of(cheap("vpt-deep"), tower("vpt-deep")).feed  # a feed of images, whatever the method asks for
    parts = [batch for task in stream for batch in feed.plain(task.test)]
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


@torch.no_grad()
def logits_of(trainer, images):
    trainer.learner.model.eval()
    return trainer.learner.model(Batch(images)).logits


# ── two tasks run ────────────────────────────────────────────────────────────────────────────────────


@every_method
def test_two_tasks_run_and_every_met_task_is_scored(name):
    trainer = finished(name)
    shape = [2] if trainer.learner.at_once else [1, 2]
    for matrix in (trainer.matrix, trainer.matrix_task_aware):
        assert [len(row) for row in matrix] == shape
        assert all(round(11 * value, 9).is_integer() and 0 <= value <= 1 for row in matrix for value in row)
    for seen, aware in zip(trainer.matrix, trainer.matrix_task_aware, strict=True):
        assert all(a >= s for s, a in zip(seen, aware, strict=True))
    assert {kind: len(parts) for kind, parts in trainer.seconds.items()} == dict.fromkeys(
        ("train", "look_back", "evaluate"), len(shape)
    )


@pytest.mark.parametrize("name", sorted({*method_names()} - {"zero-shot"}))  # which learns nothing, as it says
def test_one_task_is_learned_better_than_by_chance(name):
    """A method that learns nothing would get a third of 66 pictures right, and half of them once in 300 times."""
    more = {"epochs": 6 if name in QUICK else 12, "batch_size": 5, "temperature": 1.0, **FAST.get(name, {})}
    trainer = trainer_of(cheap(name, **more), tower(name))
    trainer.run(blobs(tasks=1, per_task=PER_TASK, test=66))
    assert trainer.matrix[0][0] >= 1 / 2


# ── resume ───────────────────────────────────────────────────────────────────────────────────────────


def resumed(name, run_dir, stream, **arguments):
    """Return a trainer of a fresh learner that took up what lies in a run folder."""
    torch.manual_seed(4711)  # a new process has another history of draws
    torch.rand(17)
    trainer = trainer_of(cheap(name), tower(name), run_dir=run_dir, **arguments)
    for parameter in trainer.learner.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)  # nothing may depend on how a fresh learner happens to start
    assert trainer.restore(stream)
    return trainer


def logged_positions(run_dir):
    path = run_dir / "log.jsonl"
    return [tuple(json.loads(line)["position"]) for line in path.read_text().splitlines()] if path.exists() else []


def expected_positions(trainer, stream):
    """Every step of a run; between the phases and the refinement, the look back takes a number."""
    stages = [stream.merged()] if trainer.learner.at_once else list(stream)
    out = []
    for task in stages:
        before, after = trainer.learner.phases(task), trainer.learner.refine(task)
        met = stages[: task.index + 1]
        taken = [taking(phase, task, trainer.learner.memory, met).train for phase in before]
        steps = dict(enumerate(trainer.feed.steps(split, phase) for split, phase in zip(taken, before, strict=True)))
        for number, phase in enumerate(after, start=len(before) + 1):
            split = taking(phase, task, trainer.learner.memory, met).train
            drawn = phase.epochs * -(-phase.draws * (max(task.columns) + 1) // phase.batch_size)
            steps[number] = drawn if phase.draws else trainer.feed.steps(split, phase)
        out += [(task.index, number, step + 1) for number, count in steps.items() for step in range(count)]
    return out


def stops_of(trainer, expected):
    """Where to stop: after the first step, after the last of each task and behind that task, and inside both."""
    moments = expected if trainer.learner.at_once else sorted([*expected, (1, 0, 0)])
    total = len(moments)
    return [moments[place - 1] for place in sorted({1, total // 4, total // 2, total // 2 + 1, total - 2, total})]


@pytest.mark.parametrize("name", [name for name in method_names() if "epochs" in method_class(name).model_fields])
def test_a_run_that_is_stopped_six_times_goes_on_as_if_it_had_not_been_stopped(name, tmp_path):
    stream = blobs(TASKS, PER_TASK)
    expected = expected_positions(finished(name), stream)
    trainer = trainer_of(cheap(name), tower(name), run_dir=tmp_path)
    stops = stops_of(trainer, expected)
    assert len(stops) == 6
    for place in stops:
        trainer.should_stop = lambda trainer=trainer, place=place: trainer.position == place
        with pytest.raises(Stopped):
            trainer.run(stream)
        assert logged_positions(tmp_path) == [position for position in expected if position <= place]
        trainer = resumed(name, tmp_path, stream)
        assert trainer.position == place
    trainer.run(stream)
    assert_same_run(trainer, finished(name))
    assert logged_positions(tmp_path) == expected


def places_of(trainer, trained):
    """Return places to die at, in the order in which a run comes by; a head that looks ahead does so before steps."""
    learner, head = trainer.learner, trainer.learner.model.head

    def stage(number, *steps):
        look, steps = [f"look {number}"], [f"step {step}" for step in steps if trained]
        return [*(look + steps if head.looks_ahead else steps + look), f"evaluate {number}"]

    if learner.at_once:
        return [*stage(0, "early", "first", "second"), "row 0"]
    foresee = [] if head.preview([]) is None else ["foresee 1"]
    return [*stage(0, "early", "first"), *foresee, "row 0", "begin 1", *stage(1, "second"), "row 1"]


def die_at(place, trainer, stream, expected):
    """Arrange that a run of these steps dies there."""
    model = trainer.learner.model
    kind, _, number = place.partition(" ")
    if kind == "step":
        begun = sum(position[0] == 0 for position in expected)  # steps of the first task
        late = 3 * begun // 4 if trainer.learner.at_once else (begun + len(expected)) // 2
        fatal = expected[{"early": 2, "first": begun // 2 + 1, "second": late}[number] - 1]

        def stop():
            if trainer.position == fatal:
                raise Death
            return False

        trainer.should_stop = stop
        return
    stage = int(number)
    if kind == "begin":
        begin = model.begin_task

        def begin_task(task):
            begin(task)
            if task.index == stage:
                raise Death

        model.begin_task = begin_task
    elif kind == "look":
        end_look = model.head.end_look

        def look(reduce):
            if trainer.position.task == stage:
                raise Death
            end_look(reduce)

        model.head.end_look = look
    elif kind in ("evaluate", "foresee"):
        plain, split = trainer.feed.plain, stream.tasks[stage].test

        def one_batch(asked):
            for number, batch in enumerate(plain(asked)):
                if asked is split and number == 1 and (trainer.position.task < stage) == (kind == "foresee"):
                    raise Death
                yield batch

        trainer.feed.plain = one_batch
    elif kind == "row":
        save = trainer._save

        def save_all_but_the_row(*optimizer):
            if len(trainer.matrix) == stage + 1:
                raise Death
            save(*optimizer)

        trainer._save = save_all_but_the_row


@every_method
def test_a_run_that_dies_again_and_again_goes_on_from_its_last_checkpoint_to_the_same_end(name, tmp_path):
    """Steps taken since the checkpoint are taken again, and stand in the log once."""
    stream = blobs(TASKS, PER_TASK)
    expected = expected_positions(finished(name), stream)
    for place in [*places_of(finished(name), expected), None]:
        torch.manual_seed(4711)
        trainer = trainer_of(cheap(name), tower(name), run_dir=tmp_path, checkpoint_every=3)
        assert trainer.restore(stream) == (tmp_path / "state.pt").exists()
        if place is not None:
            die_at(place, trainer, stream, expected)
            with pytest.raises(Death):
                trainer.run(stream)
    trainer.run(stream)
    assert_same_run(trainer, finished(name))
    assert logged_positions(tmp_path) == expected


@every_method
def test_a_finished_run_taken_up_again_has_nothing_left_to_do(name):
    stream = blobs(TASKS, PER_TASK)
    trainer = resumed(name, finished(name).run_dir, stream)
    trainer.learn = trainer.evaluate = None  # not to be called
    trainer.run(stream)
    assert_same_run(trainer, finished(name))


# ── randomness ───────────────────────────────────────────────────────────────────────────────────────


@every_method
def test_the_same_seed_gives_the_same_bits_whatever_else_draws_random_numbers(name):
    assert_same_run(disturbed(name), finished(name))


@every_method
def test_another_seed_gives_another_run_where_anything_is_random(name):
    """Random are what training moves and what a fresh learner draws; all else follows from images, and from these."""
    ours, theirs = (finished(name, seed).learner.model.learned() for seed in (0, 1))
    different = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    trained = {key for key, _ in finished(name).learner.model.named_parameters()} & set(ours)
    one, other = (trainer_of(cheap(name), tower(name), seed=seed).learner.model.learned() for seed in (0, 1))
    drawn = {key for key in one if not torch.equal(one[key], other[key])}
    assert trained | drawn <= different and bool(trained | drawn) == bool(different)


# ── predictions ──────────────────────────────────────────────────────────────────────────────────────


def batched_otherwise(trainer, images, labels):
    """Yield (how, logits in the order of `images`) for other ways to cut the same images into batches."""
    count = len(images)
    for how, order in {
        "permuted": torch.randperm(count, generator=torch.Generator().manual_seed(5)),
        "sorted by class": labels.argsort(stable=True),
    }.items():
        out = torch.cat([logits_of(trainer, images[part]) for part in order.split(9)])
        yield how, out[order.argsort()]
        yield how + ", at once", logits_of(trainer, images[order])[order.argsort()]
    yield "one by one", torch.cat([logits_of(trainer, image[None]) for image in images])
    yield "one class each", logits_by_class(trainer, images, labels)


def logits_by_class(trainer, images, labels):
    out = torch.empty_like(logits_of(trainer, images))
    for column in labels.unique():
        out[labels == column] = logits_of(trainer, images[labels == column])
    return out


@every_method
def test_a_prediction_does_not_depend_on_the_other_images_of_its_batch(name):
    trainer = finished(name)
    images, labels = images_and_labels(blobs(TASKS, PER_TASK))
    whole = logits_of(trainer, images)
    assert whole.shape == (22, 6)
    near = 1e-5 * whole.abs().max().clamp(min=1).item()
    for how, logits in batched_otherwise(trainer, images, labels):
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=near, msg=lambda text, how=how: f"{how}: {text}")
        assert torch.equal(logits.argmax(-1), whole.argmax(-1)), how


@every_method
def test_a_prediction_of_a_bf16_tower_depends_on_its_batch_by_rounding_alone(name):
    """bf16 keeps 8 bits: logits agree to 4 % of their spread, classes wherever two scores are further apart.

    What all classes of an image share is no difference: names that a text tower without training reads are nearly
    alike, so that rounding moves all their scores together. Their spread is small: see LOOSE.
    """
    trainer = trainer_of(cheap(name, **BRIEF), tower(name, torch.bfloat16))
    stream = blobs(TASKS, PER_TASK)
    trainer.run(stream)
    images, labels = images_and_labels(stream)
    whole = logits_of(trainer, images)
    tolerance = LOOSE.get(name, 0.04) * whole.std().item()
    apart = whole - whole.mean(1, keepdim=True)
    best = whole.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * tolerance
    assert clear.sum() >= 11
    for how, logits in batched_otherwise(trainer, images, labels):
        assert (logits - logits.mean(1, keepdim=True) - apart).abs().max() <= tolerance, how
        assert torch.equal(logits.argmax(-1)[clear], whole.argmax(-1)[clear]), how


@every_method
def test_classes_not_met_yet_cannot_be_predicted(name):
    trainer, stream = disturbed(name), blobs(TASKS, PER_TASK)
    if not trainer.learner.at_once:
        assert trainer.columns == [(22, 3), (22, 6)]
        return
    trainer = trainer_of(cheap(name), tower(name))
    images, _ = images_and_labels(stream)
    for task, columns in zip(stream, (3, 6), strict=True):
        trainer.learn(task)
        assert logits_of(trainer, images).shape == (22, columns)


@every_method
def test_cached_features_and_images_give_the_same_scores(name):
    trainer = finished(name)
    if trainer.learner.cache == "off":
        assert trainer.feed.features is None
        return
    stream = blobs(TASKS, PER_TASK)
    images, labels = images_and_labels(stream)
    batches = [batch for task in stream for batch in trainer.feed.plain(task.test)]
    assert all(batch.images is None for batch in batches)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)
    with torch.no_grad():
        cached = torch.cat([trainer.learner.model(batch).logits for batch in batches])
    torch.testing.assert_close(cached, logits_of(trainer, images), rtol=1e-5, atol=1e-5)


# ── what moves ───────────────────────────────────────────────────────────────────────────────────────


@every_method
def test_what_is_not_learned_keeps_every_bit_and_gets_no_gradient(name):
    """All of the tower that a method was given; all of the towers that it has but what it tunes of a copy."""
    model, (before, after) = disturbed(name).learner.model, disturbed(name).frozen
    assert before.keys() == after.keys() and {"tower."} <= set(model.towers)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    given = {key for key in before if key.startswith("given ")}
    tuned = {key for key in model.learned() if key.startswith(model.towers)}
    towers = {key for key in model.state_dict() if key.startswith(model.towers)}
    assert given and towers - tuned == before.keys() - given
    parameters = {key: p for key, p in model.named_parameters() if key in towers - tuned}
    assert all(p.grad is None and not p.requires_grad for p in parameters.values())
    assert parameters or tuned == towers


@every_method
def test_what_is_learned_belongs_to_prompts_and_head_or_is_tuned(name):
    model = finished(name).learner.model
    learned = model.learned()
    tuned = {f"tower.{key}" for key in model.tower.learned}
    assert learned and {key.partition(".")[0] for key in learned.keys() - tuned} <= {"prompts", "head"}
    assert tuned <= learned.keys()


# ── settings and words ───────────────────────────────────────────────────────────────────────────────


@every_method
def test_settings_survive_toml(name, tmp_path):
    for settings in (method_class(name)(), cheap(name)):
        write_toml(tmp_path / "settings.toml", {"settings": settings.model_dump()})
        assert type(settings)(**read_toml(tmp_path / "settings.toml")["settings"]) == settings


@every_method
def test_every_default_is_inside_its_own_limits_when_it_is_given(name):
    kind = method_class(name)
    assert kind(**kind().model_dump()) == kind()
    assert kind().changed() == {}


@every_method
def test_every_setting_says_what_it_means(name):
    for setting, field in method_class(name).model_fields.items():
        assert field.description and field.description.strip() == field.description, setting
        assert not field.is_required(), f"{setting} has no default"


@every_method
def test_the_text_of_a_method_begins_with_one_sentence_and_names_its_parts(name):
    """Each part that the learner is made of is named, by this file or by that of a method it extends."""
    kind = method_class(name)
    text = inspect.cleandoc(importlib.import_module(kind.__module__).__doc__)
    first, blank, *_ = text.splitlines()
    assert first.endswith(".") and len(first) <= 120 and blank == ""
    named = [
        word.rstrip(",;.")
        for word in text.partition("Shared parts")[2].partition("References:")[0].split()
        if "lamina." in word
    ]
    for word in named:
        module, _, attribute = word.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), word
    everything = " ".join(
        importlib.import_module(parent.__module__).__doc__ or ""
        for parent in kind.__mro__
        if parent.__module__.startswith("lamina.methods.")
    )
    learner = finished(name).learner
    parts = [learner.model.head, learner.model.prompts, *learner.protections]
    for part in filter(lambda part: part is not None, parts):
        assert f"{type(part).__module__}.{type(part).__qualname__}" in everything
