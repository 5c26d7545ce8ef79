"""How far old features may have moved: an estimate, against what really happened to images kept back."""

import pytest
import torch

from lamina.audit import Drift
from lamina.drift import lesson_drift
from lamina.heads.linear import LinearHead
from lamina.methods.vpt_deep import VPTDeep
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch, PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.protections.base import Felt, Protection
from tests.streams import blobs, trainer_of


def lesson(tower, method, tasks=3):
    """Learn all tasks but one, then the last: models on both sides, protections, and their memory between."""
    stream = blobs(tasks=tasks, train=27, test=11)
    trainer = trainer_of(method, tower)
    for task in stream.tasks[:-1]:
        trainer.learn(task)
    state = {name: value.clone() for name, value in trainer.learner.model.learned().items()}
    memory = [protection.state_dict() for protection in trainer.learner.protections]
    trainer.learn(stream.tasks[-1])
    before = method.build(tower).model
    for task in stream.tasks[:-1]:
        before.begin_task(task)
    before.load_state_dict(state, strict=False)
    return before, trainer, memory, stream


def moved(before, after, batches):
    squares = [(after.features(b)[0] - before.features(b)[0]).square().sum(1) for b in batches]
    return float(torch.cat(squares).mean().sqrt())


@pytest.mark.parametrize("eta", [0.0, 0.97])
@torch.no_grad()
def test_the_estimate_is_close_to_what_old_images_kept_back_really_moved(tiny_vit, eta):
    settings = VPTNSP2(length=5, epochs=4, batch_size=9, lr=0.02, temperature=1.0, eta1=eta, eta2=eta)
    with torch.enable_grad():
        before, trainer, memory, stream = lesson(tiny_vit, settings)
    after, feed = trainer.learner.model, trainer.feed
    kept_back = [batch for task in stream.tasks[:-1] for batch in feed.plain(task.test)]
    really = moved(before, after, kept_back)
    found = lesson_drift(before, after, feed.plain(stream.tasks[-1].test), trainer.learner.protections, memory, 1.0)
    assert found.old == pytest.approx(really, rel=0.5)
    assert really <= found.bound
    assert found.new == pytest.approx(moved(before, after, feed.plain(stream.tasks[-1].test)), rel=1e-5)
    assert [block.block for block in found.blocks] == [0, 1, 2]
    assert sum(block.old**2 for block in found.blocks) == pytest.approx(found.old**2, rel=1e-6)


class Feels(Protection):
    """Feels 2 + 6 for old images, where the worst is 32, and 0.5 for those that came since."""

    def felt(self, before, images):
        if images == {"since": {"seen": 7}}:
            return [Felt(0, 1.0, 0.5, 1.0)]
        assert images == {"seen": 7}
        return [Felt(0, 1.5, 2.0, 14.0), Felt(2, 2.5, 6.0, 18.0)]

    def since(self, memory):
        return {"since": memory}


def test_the_drift_of_new_images_is_scaled_by_how_much_more_old_ones_feel(tiny_vit):
    before, after = two_models(tiny_vit, torch.randn(24))
    found = lesson_drift(before, after, [Batch(torch.randn(5, 3, 32, 32))], [Feels()], [{"seen": 7}], 1.0)
    assert found.old == pytest.approx(found.new * 4) and found.bound == pytest.approx(found.new * 8)
    assert [(b.block, b.step) for b in found.blocks] == [(0, 1.5), (2, 2.5)]
    assert found.blocks[0].old == pytest.approx(found.new * 2)
    assert found.blocks[1].bound == pytest.approx(found.new * 6)


def two_models(tower, shift):
    """The same model twice, the second with moved prompts."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(PromptedModel(tower, DeepPrompts(range(3), 4, 24), LinearHead(24)))
    models[1].prompts.value(1).data[0] += shift
    return models


def test_prompts_that_stay_leave_features_where_they_are(tiny_vit):
    before, after = two_models(tiny_vit, 0.0)
    found = lesson_drift(before, after, [Batch(torch.randn(5, 3, 32, 32))], [], [], 1.0)
    assert found == Drift(new=0.0, old=0.0, bound=0.0, blocks=[])


def test_drift_is_told_in_units_of_the_spread(tiny_vit):
    before, after = two_models(tiny_vit, torch.randn(24))
    images = [Batch(torch.randn(5, 3, 32, 32)), Batch(torch.randn(2, 3, 32, 32))]
    one, third = (lesson_drift(before, after, images, [], [], spread).new for spread in (1.0, 3.0))
    assert one > 0 and third == pytest.approx(one / 3)
    with torch.no_grad():
        assert one == pytest.approx(moved(before, after, images), rel=1e-5)


def test_without_a_protection_nothing_is_claimed_about_old_images(tiny_vit):
    settings = VPTDeep(length=2, epochs=1, batch_size=9)
    before, trainer, memory, stream = lesson(tiny_vit, settings, tasks=2)
    found = lesson_drift(before, trainer.learner.model, trainer.feed.plain(stream.tasks[1].test), [], memory, 1.0)
    assert found.new > 0 and found.old is None and found.bound is None and found.blocks == []


def shared(value):
    """A head with words that all classes share, a scale, and a row for each class."""
    head = LinearHead(24)
    head.words, head.scale = torch.nn.Parameter(torch.full((5, 7), value)), torch.nn.Parameter(torch.tensor(value))
    head.rows = torch.nn.Parameter(torch.arange(3.0)[:, None].repeat(1, 2))
    return head


@pytest.mark.parametrize(
    "change, retrained",
    [
        (lambda head: None, False),
        (lambda head: head.words.data[4, 6].add_(1), True),
        (lambda head: head.scale.data.add_(1), False),
        (lambda head: setattr(head, "more", torch.nn.Parameter(torch.ones(2))), False),
        (lambda head: setattr(head, "rows", torch.nn.Parameter(torch.arange(9.0)[:, None].repeat(1, 2))), False),
        (lambda head: setattr(head, "rows", torch.nn.Parameter(torch.ones(9, 2))), True),
    ],
)
def test_a_head_learned_on_if_what_old_classes_had_of_it_is_another(tiny_vit, change, retrained):
    before, after = (PromptedModel(tiny_vit, None, shared(2.0)) for _ in range(2))
    after.head.load_state_dict(before.head.state_dict())
    change(after.head)
    expected = Drift(new=0.0, old=0.0, bound=0.0, blocks=[], retrained=retrained)
    assert lesson_drift(before, after, [], [], [], 1.0) == expected


def test_what_has_no_prompts_does_not_drift(tiny_vit):
    model = PromptedModel(tiny_vit, None, LinearHead(24))
    assert lesson_drift(model, model, [], [], [], 1.0) == Drift(new=0.0, old=0.0, bound=0.0, blocks=[])
