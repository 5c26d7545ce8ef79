"""PROOF: layers that add up, fused by attention, with a few old images; 27 images a task, 3 classes, F 24."""

from functools import cache

import pytest
import torch

from lamina.errors import ConfigError
from lamina.learner import check_lessons
from lamina.methods.proof import PROOF
from tests.backbones.clips import tiny_clip
from tests.methods.states import kept, moved
from tests.streams import blobs, trainer_of

SMALL = {"epochs": 2, "batch_size": 10, "memory": 4, "templates": ["a photo of a {}.", "the {}, small"]}


def trainer_after(tasks, **changes):
    trainer = trainer_of(PROOF(**{**SMALL, **changes}), tiny_clip())
    for task in blobs().tasks[:tasks]:
        trainer.learn(task)
    return trainer


@cache
def learned(tasks):
    """A trainer that has learned so many of two tasks; nobody changes it."""
    return trainer_after(tasks)


def features_of(trainer, task):
    """All frozen features of a task's training images, and their columns."""
    batches = list(trainer.feed.plain(blobs().tasks[task].train))
    return torch.cat([b.features for b in batches]), torch.cat([b.labels for b in batches])


@pytest.mark.parametrize("freeze_texts", [True, False])
def test_old_layers_and_contexts_stay_to_the_bit_and_the_fusion_learns_on(freeze_texts):
    before, after = (kept(trainer_after(tasks, freeze_texts=freeze_texts)) for tasks in (1, 2))
    found = moved({n: v for n, v in before.items() if v.shape == after[n].shape}, after)
    texts = {"head.of_texts.layers.0.weight", "head.of_texts.layers.0.bias"}
    fusion = {name for name in before if name.startswith("head.fusion.")}
    assert found == fusion | {"head.log_scale"} | (set() if freeze_texts else texts)
    assert torch.equal(before["head.seen.sums"], after["head.seen.sums"][:3])
    assert {name for name in after if name not in before} == {
        f"head.of_{side}.layers.1.{part}" for side in ("images", "texts") for part in ("weight", "bias")
    } | {"head.contexts.1"}


def test_means_are_known_before_the_first_step_and_stay():
    trainer, seen = trainer_of(PROOF(**SMALL), tiny_clip()), []
    head = trainer.learner.model.head
    forward = head.forward

    def noting(features, labels=None):
        seen.append(head.seen.means().clone())
        return forward(features, labels)

    head.forward = noting
    trainer.learn(blobs().tasks[0])
    features, columns = features_of(trainer, 0)
    expected = torch.stack([torch.nn.functional.normalize(features[columns == c], dim=1).mean(0) for c in range(3)])
    assert len(seen) == 6 and all(torch.equal(means, seen[0]) for means in seen)
    torch.testing.assert_close(head.seen.means().float(), expected)
    assert torch.equal(head.seen.means(), seen[0]) and head.seen.counts.tolist() == [9, 9, 9]


def test_old_images_are_chosen_by_their_means_and_learned_with_the_new_ones():
    trainer = learned(2)
    memory, (phase,) = trainer.learner.memory, trainer.learner.phases(blobs().tasks[1])
    assert str(memory) == "4 per class, herding" and len(memory.state_dict()["kept"]) == 24
    assert (phase.data, phase.classes, trainer.learner.model.head.negatives) == ("task+memory", "seen", "seen")
    without = PROOF(memory=0).build(tiny_clip())
    (phase,) = without.phases(blobs().tasks[1])
    assert (phase.data, phase.classes, without.model.head.negatives) == ("task", "task", "task")
    assert without.memory is None


def test_it_learns_from_features_that_are_computed_once():
    assert learned(1).learner.cache == "features" and learned(1).learner.model.prompts is None


# ── predictions that depend on a batch ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reduce", ["image", "batch_mean"])
def test_a_model_says_whether_images_are_fused_over_a_batch(reduce):
    learner = PROOF(fusion_reduce=reduce, memory=0).build(tiny_clip())
    assert learner.model.transductive is (reduce == "batch_mean")
    if reduce == "image":
        check_lessons("proof", learner)
        return
    with pytest.raises(ConfigError) as error:
        check_lessons("proof", learner)
    assert str(error.value) == (
        "what a kept model says of an image must not depend on the other images of a batch; with "
        "fusion_reduce=batch_mean what proof says does: take fusion_reduce=image, or measure it by `lamina run`"
    )


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_those_of_the_released_code_but_for_what_depends_on_a_batch():
    settings = PROOF()
    assert settings.model_dump() == {
        "negatives": "task", "memory": 20, "memory_total": 0, "choose": "herding",
        "balance": 0, "epochs": 5, "batch_size": 64, "lr": 0.001, "momentum": 0.9,
        "names": {}, "templates": "cifar", "contexts": 3, "fusion_reduce": "image", "freeze_texts": True,
        "weight_decay": 0.05, "parity": "paper",
    }  # fmt: skip
    (phase,) = settings.build(tiny_clip()).phases(blobs().tasks[0])
    (group,) = phase.optimizer([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.001, 0.05, 0.9)
    factors = [phase.schedule(progress) for progress in (0.0, 0.19, 0.2, 0.8, 0.99)]
    assert factors == pytest.approx([1, 1, 0.904508, 0.095492, 0.095492], abs=1e-6)


def test_official_does_as_the_released_code_and_each_part_can_be_chosen():
    official = PROOF(parity="official")
    assert (official.fusion_reduce, official.freeze_texts) == ("batch_mean", False)
    head = official.build(tiny_clip()).model.head
    assert (head.reduce, head.freeze_texts, head.plain) == ("batch_mean", False, True)
    assert PROOF(**official.model_dump()) == official
    assert PROOF(parity="official", fusion_reduce="image").fusion_reduce == "image"
    head = PROOF(contexts=5).build(tiny_clip()).model.head
    assert (head.each, head.plain, head.texts.templates[0]) == (5, False, "a photo of a {}.")


def test_who_competes_is_no_choice_with_a_memory():
    assert PROOF().idle() == {"negatives": "with a memory, where all classes met so far compete"}
    assert PROOF(memory=0).idle() == {"balance": "without a memory", "choose": "without a memory"}
