"""CLAP: Gaussians around class names, with a few old images; 27 images a task, tasks of 3 classes, F 24, S 4 draws."""

import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from lightning_fabric import Fabric

from lamina.errors import ConfigError
from lamina.learner import check_lessons
from lamina.methods.clap import CLAP
from lamina.methods.coop import CoOp
from lamina.model import Batch
from lamina.schedules import Moment
from lamina.training.feed import Feed
from lamina.training.trainer import Trainer
from tests.backbones.clips import close, tiny_clip
from tests.methods.states import kept, moved
from tests.streams import SPEC, blobs, trainer_of

SMALL = {"epochs": 2, "batch_size": 10, "memory": 4, "samples": 4, "lr": 0.02}
SMALL |= {"templates": ["a photo of a {}.", "the {}, small"]}
GUIDANCE = "head.guidance."


def recorded(tasks=2, **changes):
    """A trainer that has run, with all that it had learned before and after each phase, and how it stood inside."""
    trainer = trainer_of(CLAP(**{**SMALL, **changes}), tiny_clip())
    take, trainer.seen = trainer._take_steps, {}

    def watched(model, task, number, phase, *rest):
        before, asked = kept(trainer), {n for n, p in model.named_parameters() if p.requires_grad}
        inside = []
        handle = model.register_forward_hook(lambda *_: inside.append(modes(model)))
        take(model, task, number, phase, *rest)
        handle.remove()
        trainer.seen[task.index, number] = before, kept(trainer), asked, inside

    trainer._take_steps = watched
    trainer.run(blobs(tasks))
    return trainer


def modes(model):
    guidance = model.head.guidance
    return model.head.training, guidance is not None and guidance.training and guidance.layer.training


ran = cache(recorded)  # nobody changes what it returns


def encoder(*tasks):
    return {f"head.encoders.tasks.{t}.{part}.{kind}" for t in tasks for part in ("mean", "spread")
            for kind in ("weight", "bias")}  # fmt: skip


def attention(names):
    return {name for name in names if name.startswith(GUIDANCE)}


# ── who learns when ──────────────────────────────────────────────────────────────────────────────────


def test_a_task_moves_the_attention_and_its_own_encoder_and_leaves_those_before_to_the_bit():
    seen = ran().seen
    assert set(seen) == {(0, 0), (1, 0), (1, 2)}
    for task in (0, 1):
        before, after, asked, inside = seen[task, 0]
        changed = moved(before, after)
        assert changed == attention(changed) | encoder(task) and attention(changed)
        assert asked == attention(before) | encoder(task)
        assert set(inside) == {(True, True)}


def test_the_memory_moves_all_encoders_and_leaves_the_attention_to_the_bit():
    before, after, asked, inside = ran().seen[1, 2]
    assert moved(before, after) == encoder(0, 1) == asked
    assert set(inside) == {(True, False)}  # draws are new, and nothing is dropped


def test_what_is_learned_on_the_memory_is_not_learned_on_in_the_next_task():
    seen = recorded(tasks=3, epochs=1, balance=1).seen
    assert seen[2, 0][2] == attention(seen[2, 0][0]) | encoder(2)
    assert moved(seen[2, 0][0], seen[2, 0][1]) & encoder(0, 1) == set()
    assert moved(seen[2, 2][0], seen[2, 2][1]) == encoder(0, 1, 2)


def test_towers_and_the_scale_keep_every_bit():
    model, fresh = ran().learner.model, CLAP(**SMALL).build(tiny_clip()).model
    frozen = {n: v for n, v in model.state_dict().items() if n.startswith(model.towers)}
    assert len(frozen) > 50 and all(torch.equal(value, fresh.state_dict()[name]) for name, value in frozen.items())
    assert torch.equal(model.head.log_scale, fresh.head.log_scale)
    assert all(before["head.log_scale"] == after["head.log_scale"] for before, after, *_ in ran().seen.values())


def test_a_run_learns_and_scores_tasks_to_come_by_name():
    trainer = ran()
    assert len(trainer.learner.model.head.encoders.tasks) == 2 and [len(row) for row in trainer.matrix] == [1, 2]
    assert [len(row) for row in trainer.future] == [1] and trainer.learner.model.prompts is None


@pytest.mark.parametrize(
    ("changes", "first", "after"),
    [
        ({"text": "coop"}, {"head.texts.contexts.0"}, {"head.texts.contexts.0"}),
        ({"encoder": "none"}, set(), None),
        ({"encoder": "none", "text": "coop"}, {"head.texts.contexts.0"}, {"head.texts.contexts.0"}),
        ({"guidance": False}, set(), set()),
        ({"balance": 0}, set(), None),
        ({"memory": 0}, set(), None),
    ],
)
def test_what_learns_beside_encoders_is_what_settings_have(changes, first, after):
    """`after` is what learns from the memory beside them; None where there is no such phase."""
    seen = recorded(**{"epochs": 1, "balance": 1, **changes}).seen
    has = changes.get("encoder") != "none"

    def own(*tasks):
        found = {n for n in seen[1, 0][0] if n.startswith(tuple(f"head.encoders.tasks.{t}." for t in tasks))}
        assert bool(found) == has
        return found

    asked = seen[1, 0][2]
    assert asked - attention(asked) == first | own(1) and bool(attention(asked)) == changes.get("guidance", True)
    assert ((1, 2) in seen) == (after is not None)
    if after is not None:
        assert seen[1, 2][2] == after | own(0, 1) == moved(*seen[1, 2][:2])


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────


def optimizer_of(phase):
    made = phase.optimizer([torch.nn.Parameter(torch.zeros(2))])
    (group,) = made.param_groups
    return type(made), group["lr"], group["momentum"], group["weight_decay"]


def test_the_plan_is_that_of_the_paper():
    learner, (first, second) = CLAP().build(tiny_clip()), blobs().tasks
    (phase,), (close_,) = learner.phases(second), learner.refine(second)
    assert (phase.epochs, phase.batch_size, phase.classes, phase.data) == (5, 64, "seen", "task+memory")
    assert (close_.epochs, close_.batch_size, close_.classes, close_.data) == (2, 64, "seen", "memory")
    assert optimizer_of(phase) == (torch.optim.SGD, 0.001, 0.0, 0)
    assert optimizer_of(close_) == (torch.optim.SGD, 0.0001, 0.0, 0)
    assert len(learner.phases(first)) == 1 and learner.refine(first) == []
    assert phase.parameters is None and str(learner.memory) == "20 per class, random" and learner.cache == "features"


def published(step, steps, rise, lr):
    """The rate of a step: from 0 to `lr`, both left out, then half a cosine to a thousandth."""
    if step < rise:
        return lr * (step + 1) / (rise + 1)
    part = (step - rise) / (steps - rise)
    return lr / 1000 + (lr - lr / 1000) * 0.5 * (1 + math.cos(math.pi * part))


def test_the_rate_of_every_step_is_that_of_the_released_code():
    """785 steps, 235 of them rising, as published: 6.78e-6, 1.5932e-3, 1.6e-3 and 1.613e-6."""
    values = [published(step, 785, 235, 1.6e-3) for step in (0, 234, 235, 784)]
    assert values == pytest.approx([6.78e-6, 1.5932e-3, 1.6e-3, 1.613e-6], rel=1e-3)
    (phase,) = CLAP(preset="code", warmup=235 / 785).phases(blobs().tasks[0])
    ours = [1.6e-3 * phase.schedule(Moment(step, 785)) for step in range(785)]
    assert optimizer_of(phase)[1] == 1.6e-3
    assert ours == pytest.approx([published(step, 785, 235, 1.6e-3) for step in range(785)], rel=1e-9)


def test_the_rate_rises_in_the_first_pass_of_the_paper_and_never_on_the_memory():
    settings, second = CLAP(), blobs().tasks[1]
    (phase,), (close_,) = settings.phases(second), settings.refine(second)
    assert [phase.schedule(p) for p in (0.0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    assert phase.schedule(0.6) == pytest.approx(0.5005) and phase.schedule(1.0) == pytest.approx(0.001)
    assert [close_.schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5005, 0.001])
    (phase,) = CLAP(warmup=0.0).phases(second)
    assert phase.schedule(0.0) == 1


# ── old images ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("choose", ["first", "variance"])
def test_a_budget_for_all_is_shared_evenly_and_never_exceeded(choose):
    trainer = recorded(epochs=1, balance=1, memory_total=14, choose=choose)
    memory, stream = trainer.learner.memory, blobs()
    assert str(memory) == f"14 in all, {choose}" and memory.images == 12
    rows = memory.state_dict()["kept"]
    assert [sum(column == c for _, _, column in rows) for c in range(6)] == [2] * 6
    first = [[t, p, c] for t in (0, 1) for c in stream.tasks[t].columns
             for p in [p for p, own in enumerate(stream.tasks[t].train.columns) if own == c][:2]]  # fmt: skip
    assert (sorted(rows) == sorted(first)) == (choose == "first")


def test_a_budget_that_is_too_small_is_refused_before_anything_is_learned():
    trainer = trainer_of(CLAP(**SMALL, memory_total=5), tiny_clip())
    with pytest.raises(ConfigError) as error:
        trainer.run(blobs())
    assert str(error.value) == (
        "a memory needs an image of each class; got 5 in all for 6 classes: give it at least 6, or a number per class"
    )
    assert trainer.position == (0, 0, 0)


def test_images_cannot_be_chosen_by_draws_where_there_are_none():
    for settings in (CLAP(choose="variance", variational=False), CoOp(choose="variance", memory=2)):
        with pytest.raises(ConfigError) as error:
            settings.build(tiny_clip())
        assert str(error.value) == (
            "choose='variance' keeps images on which draws agree, and the head of this method draws nothing: take "
            "choose='entropy' or 'energy'"
        )


def test_without_a_memory_every_task_is_anchored_and_lessons_can_be_taken():
    with_, without = CLAP().build(tiny_clip()), CLAP(memory=0).build(tiny_clip())
    assert (with_.model.head.anchored, without.model.head.anchored) == ("learning", "all")
    assert CLAP(memory=0, anchored="past").build(tiny_clip()).model.head.anchored == "past"
    assert CLAP(memory=0, memory_total=60).build(tiny_clip()).model.head.anchored == "learning"
    (phase,) = without.phases(blobs().tasks[1])
    assert (phase.data, phase.classes) == ("task", "seen") and without.memory is None
    assert without.refine(blobs().tasks[1]) == []
    check_lessons("clap", without)


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_what_depends_on_a_batch_takes_no_lessons(preset):
    with pytest.raises(ConfigError) as error:
        check_lessons("clap", CLAP(preset=preset, memory=0).build(tiny_clip()))
    assert str(error.value) == (
        "what a kept model says of an image must not depend on the other images of a batch; with context=batch what "
        "clap says does: take context=image, or measure it by `lamina run`"
    )
    check_lessons("clap", CLAP(preset=preset, memory=0, context="image").build(tiny_clip()))


# ── features that are computed once ──────────────────────────────────────────────────────────────────


def test_cached_features_teach_what_images_teach():
    learned = []
    for cache_ in ("features", "off"):
        torch.manual_seed(0)
        learner = replace(CLAP(**SMALL).build(tiny_clip()), cache=cache_)
        fabric = Fabric(accelerator="cpu", devices=1)
        feed = Feed.to(learner, fabric, SPEC, seed=0, eval_batch=6, augmentation="plain")
        trainer = Trainer(learner, feed, fabric, seed=0)
        assert (feed.features is None) == (cache_ == "off")
        trainer.run(blobs())
        learned.append((kept(trainer), trainer.learner.memory.state_dict()))
    (ours, rows), (theirs, others) = learned
    assert rows == others
    for name, value in ours.items():
        close(theirs[name], value, 1e-4)


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "heads", "normed", "cached", "learned"),
    [
        ("hand", 1, False, True, set()),
        ("coop", 1, True, True, {"head.texts.contexts.0"}),
        ("attriclip", 8, False, True, {"head.texts.prompts"}),
        ("maple", 1, True, False, {"head.texts.contexts.0", "head.texts.deep.0", "head.texts.deep.1", "prompts."}),
    ],
)
def test_each_kind_of_text_is_learned_with_what_the_released_code_has_for_it(text, heads, normed, cached, learned):
    tower = tiny_clip()
    settings = CLAP(**{**SMALL, "epochs": 1, "batch_size": 27, "memory": 1, "warmup": 0.0}, balance=1, text=text)
    trainer = trainer_of(settings, tower)
    model = trainer.learner.model
    assert model.head.guidance.layer.self_attn.num_heads == heads
    assert trainer.learner.cache == ("features" if cached else "off") and (model.prompts is None) == cached
    model.begin_task(blobs().tasks[0])
    assert (model.head.encoders.tasks[0].mean_norm is not None) == normed
    trainer = trainer_of(settings, tower)
    trainer.learn(blobs().tasks[0])
    before = kept(trainer)
    trainer.learn(blobs().tasks[1])
    changed = moved(before, {**before, **kept(trainer)})
    words = {name for name in changed if name.startswith(("head.texts.", "prompts."))}
    assert {"prompts." if name.startswith("prompts.") else name for name in words} == {
        name for name in learned if name in before or name == "prompts."
    }
    assert trainer.learner.model.head.eval()(torch.randn(7, 24)).logits.shape == (7, 6)


def test_words_of_attributes_are_chosen_by_products_with_keys_as_long_as_they_are():
    texts = CLAP(text="attriclip").build(tiny_clip()).model.head.texts
    assert (texts.retrieval, texts.order, len(texts.keys), texts.top, texts.length) == ("dot", "rank", 10, 3, 12)
    assert (texts.pull, texts.apart) == (0, 0)
    words = CLAP(text="coop").build(tiny_clip()).model.head.texts
    assert (words.length, words.words, words.position, words.scope) == (12, "", "end", "shared")
    deep = CLAP(text="maple").build(tiny_clip()).model.head.texts
    assert (deep.length, deep.words, deep.fixed) == (2, "a photo", "of a")


def test_images_that_choose_words_are_counted():
    trainer = trainer_of(CLAP(**{**SMALL, "epochs": 1, "batch_size": 27}, text="attriclip"), tiny_clip())
    trainer.run(blobs(tasks=1))
    counts = torch.tensor(trainer.usage)
    assert counts.shape == (1, 3, 10) and counts.sum() == 11 * 3


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_the_papers_but_for_what_depends_on_a_batch():
    assert CLAP().model_dump() == {
        "negatives": "seen", "memory": 20, "memory_total": 0, "choose": "random", "balance": 2, "epochs": 5,
        "batch_size": 64, "lr": 0.001, "momentum": 0.0, "names": {}, "text": "hand", "templates": "cifar",
        "preset": "ours", "variational": True, "encoder": "task", "guidance": True, "context": "image", "heads": None,
        "normed": None, "samples": 20, "mc": "sample", "average": "logits", "start": "language", "divergence": 0.001,
        "language": 15.0, "anchored": None, "warmup": 0.2, "cosine": False,
    }  # fmt: skip
    head = CLAP().build(tiny_clip()).model.head
    assert (head.samples, head.mc, head.average, head.start) == (20, "sample", "logits", "language")
    assert (head.weights, head.future, head.guidance.context) == ((0.001, 15.0), True, "image")
    assert len(head.bank.templates) == 18 and head.texts is head.bank and head.scale == pytest.approx(20)


def test_settings_reach_the_head():
    head = CLAP(
        samples=7, mc="mean", average="probabilities", start="zero", divergence=0.5, language=3.0, context="none",
        heads=6, normed=True, encoder="shared", variational=False, templates="the {}", cosine=True,
    ).build(tiny_clip()).model.head  # fmt: skip
    assert (head.samples, head.mc, head.average, head.start) == (7, "mean", "probabilities", "zero")
    assert head.cosine and not CLAP().build(tiny_clip()).model.head.cosine
    assert (head.weights, head.guidance.context, head.guidance.layer.self_attn.num_heads) == ((0.5, 3.0), "none", 6)
    assert (head.encoders.normed, head.encoders.shared, head.encoders.learns_spread) == (True, True, False)
    assert head.bank.templates == ["the {}"]
    assert CLAP(guidance=False).build(tiny_clip()).model.head.guidance is None
    assert CLAP(encoder="none").build(tiny_clip()).model.head.encoders is None


def test_presets_are_what_the_paper_says_and_what_its_code_does_and_each_part_can_be_chosen():
    plain = CLAP().model_dump()
    paper, code = (CLAP(preset=name).model_dump() for name in ("paper", "code"))
    assert {n: v for n, v in paper.items() if v != plain[n]} == {
        "preset": "paper", "context": "batch", "average": "probabilities", "anchored": "past",
    }  # fmt: skip
    assert {n: v for n, v in code.items() if v != plain[n]} == {
        "preset": "code", "context": "batch", "batch_size": 32, "lr": 0.0016, "warmup": 0.3, "choose": "first",
    }  # fmt: skip
    assert CLAP(**code) == CLAP(preset="code") and CLAP(preset="code", context="image").context == "image"
    assert CLAP(preset="code", lr=0.001).lr == 0.001
    for wrong in ("released", ["paper"]):
        with pytest.raises(ConfigError) as error:
            CLAP(preset=wrong)
        assert str(error.value) == f"CLAP.preset must be 'ours', 'paper' or 'code'; got {wrong!r}"


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"negatives": "with a memory, where all classes met so far compete"}),
        ({"memory": 0}, {"balance": "without a memory", "choose": "without a memory"}),
        ({"memory": 0, "mc": "mean"}, {"balance": "", "choose": "", "average": "with mc=mean"}),
        ({"memory": 0, "language": 0.0}, {"balance": "", "choose": "", "anchored": "with language=0"}),
        (
            {"memory": 0, "variational": False},
            {"balance": "", "choose": "", **dict.fromkeys(("samples", "mc", "average", "divergence"), "without draws")},
        ),
        (
            {"encoder": "none"},
            {"negatives": "", "balance": "where the attention alone learns"}
            | dict.fromkeys(("samples", "mc", "average", "divergence"), "without draws")
            | dict.fromkeys(("variational", "normed", "start", "language", "anchored"), "without an encoder"),
        ),
        ({"guidance": False}, {"negatives": "", **dict.fromkeys(("context", "heads"), "without guidance")}),
        ({"memory_total": 60}, {"negatives": "", "memory": "with memory_total"}),
    ],
)
def test_settings_that_change_nothing_are_named(settings, idle):
    found = CLAP(**settings).idle()
    assert found.keys() == idle.keys() and all(found[name] == why for name, why in idle.items() if why)


def test_a_stretch_on_a_memory_that_is_not_there_is_refused_where_it_is_asked_for():
    settings = CLAP(memory=0, balance=1)
    with pytest.raises(ConfigError) as error:
        settings.heed({"memory": 0, "balance": 1}, {})
    assert str(error.value) == "balance changes nothing without a memory; leave it out, or change that"
    settings.heed({"memory": 0}, {})


def test_what_cannot_learn_is_refused():
    with pytest.raises(ConfigError) as error:
        CLAP(encoder="none", guidance=False)
    assert str(error.value) == (
        'nothing learns with encoder="none", guidance=false and text="hand"; change one of them'
    )
    assert CLAP(encoder="none", guidance=False, text="coop").text == "coop"


def test_one_template_is_refused_where_encoders_start_from_a_variance():
    with pytest.raises(ConfigError) as error:
        CLAP(templates="the {}").build(tiny_clip())
    assert str(error.value) == (
        "encoders start from the variance of what templates say of a class, which takes two templates; got 'the {}' "
        "alone: give more, or another start"
    )


@pytest.mark.parametrize("start", ["zero", "default"])
def test_one_template_and_unequal_tasks_do_no_harm(start):
    settings = {**SMALL, "epochs": 1, "templates": "the {}", "start": start}
    trainer, stream = trainer_of(CLAP(**settings), tiny_clip()), blobs()
    first, second = stream.tasks

    def only(split, columns):
        return split.take(torch.isin(torch.from_numpy(split.columns), torch.tensor(columns)).nonzero()[:, 0].numpy())

    part = partial(replace, second)
    tasks = [
        first,
        part(index=1, classes=["class 3"], columns=[3], train=only(second.train, [3]), test=only(second.test, [3])),
        part(index=2, classes=["class 4", "class 5"], columns=[4, 5], train=only(second.train, [4, 5]),
             test=only(second.test, [4, 5])),
    ]  # fmt: skip
    trainer.run(replace(stream, tasks=tasks))
    assert [len(row) for row in trainer.matrix] == [1, 2, 3] and len(trainer.learner.model.head.encoders.tasks) == 3
    assert all(torch.isfinite(value).all() for value in kept(trainer).values())
    with torch.no_grad():
        logits = trainer.learner.model.eval()(Batch(None, features=torch.randn(7, 24))).logits
    assert logits.shape == (7, 6) and torch.isfinite(logits).all()
