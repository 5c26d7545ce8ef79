"""CLAP over prompts in null space: tiny CLIP of 3 blocks, 2 of them with 4 prompts; 2 tasks of 3 classes."""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.heads.clap import ClapHead
from lamina.methods.clap import CLAP
from lamina.methods.clap_nsp2 import CLAPNSP2
from lamina.model import Batch
from lamina.protections.distribution import TokenMoments
from lamina.protections.null_space import NullSpace
from tests.backbones.clips import images, tiny_clip
from tests.streams import blobs, trainer_of

SMALL = dict(blocks=2, epochs=2, batch_size=5, samples=3, memory=2, lr=0.01)


@pytest.fixture
def stream():
    return blobs(tasks=2, per_task=3)


def prompts_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.learner.model.prompts.named_parameters()}


def test_the_classifier_is_claps_and_the_first_blocks_have_protected_prompts():
    learner = CLAPNSP2(**SMALL).build(tiny_clip())
    assert isinstance(learner.model.head, ClapHead) and learner.cache == "off"
    assert list(learner.model.prompts.layers) == [0, 1] and learner.memory.per_class == 2
    null_space, moments = learner.protections
    assert isinstance(null_space, NullSpace) and isinstance(moments, TokenMoments)


def test_old_images_feel_the_second_task_less_than_without_projection(stream):
    moved = []
    for eta in (1.0, 0.0):
        trainer = trainer_of(CLAPNSP2(**SMALL, eta=eta, moments=0.0), tiny_clip())
        trainer.learn(stream.tasks[0])
        old = torch.cat([batch.images for batch in trainer.feed.plain(stream.tasks[0].test)])
        model, before = trainer.learner.model, prompts_of(trainer)
        rest = model.features(Batch(old))[0].detach()
        trainer.learn(stream.tasks[1])
        far = (model.features(Batch(old))[0].detach() - rest).norm()
        length = sum((value - before[name]).square().sum() for name, value in prompts_of(trainer).items()).sqrt()
        assert length > 0
        moved.append(far / length)
    assert moved[0] < 0.7 * moved[1]


def test_the_stretch_on_old_images_moves_encoders_and_leaves_prompts_and_attention(stream):
    trainer = trainer_of(CLAPNSP2(**SMALL), tiny_clip())
    trainer.learn(stream.tasks[0])
    model, held, phases = trainer.learner.model, {}, trainer.learner.refine

    def closing(task):
        held.update({name: value.detach().clone() for name, value in model.named_parameters()})
        return phases(task)

    trainer._look_back, look = (lambda task, tasks: (look(task, tasks), closing(task))), trainer._look_back
    trainer.learn(stream.tasks[1])
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, held[name])}
    assert {"head.encoders.tasks.0.mean.weight", "head.encoders.tasks.1.spread.bias"} <= changed
    assert not {name for name in changed if name.startswith(("prompts.", "head.guidance.", *model.towers))}


def test_each_task_trains_prompts_and_the_newest_encoder(stream):
    trainer = trainer_of(CLAPNSP2(**{**SMALL, "balance": 0}), tiny_clip())
    trainer.learn(stream.tasks[0])
    before = {name: value.detach().clone() for name, value in trainer.learner.model.named_parameters()}
    trainer.learn(stream.tasks[1])
    after = dict(trainer.learner.model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"prompts.values.0", "prompts.values.1"} <= changed
    assert not {name for name in changed if name.startswith("head.encoders.tasks.0.")}


def test_scores_of_an_image_do_not_depend_on_its_batch(stream):
    trainer = trainer_of(CLAPNSP2(**SMALL), tiny_clip())
    trainer.learn(stream.tasks[0])
    model, pictures = trainer.learner.model.eval(), images()
    with torch.no_grad():
        whole = model(Batch(pictures)).logits
        alone = torch.cat([model(Batch(one[None])).logits for one in pictures])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)


def test_defaults_are_those_of_its_parts():
    published = dict(length=4, blocks=4, eta=0.98, moments=1.0, samples=20, divergence=0.001, language=15.0)
    assert {name: getattr(CLAPNSP2(), name) for name in published} == published
    assert set(CLAP.model_fields) < set(CLAPNSP2.model_fields)


def test_words_with_prompts_of_their_own_are_refused():
    with pytest.raises(ConfigError) as error:
        CLAPNSP2(text="maple")
    assert str(error.value) == "CLAPNSP2.text must be 'hand', 'coop' or 'attriclip'; got 'maple'"
