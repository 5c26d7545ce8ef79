"""CLIP-Adapter: a residual bottleneck on frozen features: B 7, F 24, 6 inside; C 3 and 2 in two tasks, 27 images."""

from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

from lamina.data.stream import Task
from lamina.heads.adapter import Adapter, AdapterHead
from lamina.heads.text import TextHead
from lamina.heads.texts import HandTexts
from lamina.methods.clip_adapter import ClipAdapter
from lamina.training.feed import Feed
from lamina.training.trainer import Trainer
from tests.backbones.clips import close, images, tiny_clip
from tests.streams import SPEC, blobs, trainer_of

FIRST = Task(0, ["cat", "lawn_mower", "red panda"], [0, 1, 2], None, None)
SECOND = Task(1, ["aquarium fish", "x"], [3, 4], None, None)
TEMPLATES = ["a photo of a {}.", "the {}, small"]


def built(**values):
    model = ClipAdapter(templates=TEMPLATES, **values).build(tiny_clip()).model
    model.begin_task(FIRST)
    model.begin_task(SECOND)
    return model.eval()


def zero_shot(features):
    head = TextHead(HandTexts(tiny_clip().text, TEMPLATES))
    head.begin_task(0, FIRST.classes, FIRST.columns)
    head.begin_task(1, SECOND.classes, SECOND.columns)
    return head(features).logits


@torch.no_grad()
def features_of(model):
    return model.tower(images()).features


def test_a_ratio_of_0_is_zero_shot():
    model = built(ratio=0.0)
    features = features_of(model)
    close(model.head(features).logits, zero_shot(features), 1e-6)
    assert not [p for p in model.parameters() if p.requires_grad]
    head = AdapterHead(model.head.texts, images=Adapter(24, 0.0), names=Adapter(24, 0.0))
    close(head(features).logits, zero_shot(features), 1e-6)


@pytest.mark.parametrize("final_relu", [False, True])
def test_scores_follow_the_formula(final_relu):
    model = built(ratio=0.3, text_ratio=0.6, final_relu=final_relu)
    features, names = features_of(model), model.head.texts()

    def adapted(adapter, x, ratio):
        found = (x @ adapter.narrow.weight.T).clamp(min=0) @ adapter.widen.weight.T
        return ratio * (found.clamp(min=0) if final_relu else found) + (1 - ratio) * x

    seen = F.normalize(adapted(model.head.images, features, 0.3), dim=-1)
    said = F.normalize(adapted(model.head.names, names, 0.6), dim=-1)
    close(model.head(features).logits, 20 * seen @ said.T)


def test_the_bottleneck_is_a_quarter_wide_and_has_no_biases():
    assert sum(value.numel() for value in Adapter(512, 0.2).parameters()) == 131_072
    assert [tuple(p.shape) for p in built().parameters() if p.requires_grad] == [(6, 24), (24, 6)]
    assert Adapter(3, 0.2).narrow.weight.shape == (1, 3)


def test_a_step_changes_two_matrices_and_nothing_else():
    trainer = trainer_of(ClipAdapter(epochs=1, batch_size=27), tiny_clip())
    task = blobs().tasks[0]
    trainer._begin([task])
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    trainer.learn(task)
    after = trainer.learner.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"head.images.narrow.weight", "head.images.widen.weight"}


def test_cached_features_train_like_images():
    """Ten steps in the same order; images without augmentation."""
    settings = ClipAdapter(epochs=2, batch_size=6, text_ratio=0.4)
    cached = trainer_of(settings, tiny_clip())
    torch.manual_seed(0)
    learner = replace(settings.build(tiny_clip()), cache="off")
    fabric = Fabric(accelerator="cpu", devices=1)
    seen = Trainer(learner, Feed.to(learner, fabric, SPEC, eval_batch=6, augmentation="plain"), fabric)
    for trainer in (cached, seen):
        trainer.learn(blobs().tasks[0])
    ours, theirs = (trainer.learner.model.learned() for trainer in (cached, seen))
    assert cached.position == seen.position and cached.feed.features is not None and seen.feed.features is None
    for name, value in ours.items():
        close(value, theirs[name])


def test_a_bottleneck_is_kept_from_task_to_task_unless_asked():
    for reset in (False, True):
        model = ClipAdapter(reinit_each_task=reset, text_ratio=0.5).build(tiny_clip()).model
        fresh = [p.clone() for p in model.parameters() if p.requires_grad]
        model.begin_task(FIRST)
        begun = [p.clone() for p in model.parameters() if p.requires_grad]
        model.begin_task(SECOND)
        kept = [
            torch.equal(a, p) for a, p in zip(begun, (p for p in model.parameters() if p.requires_grad), strict=True)
        ]
        assert kept == [not reset] * 4 and all(map(torch.equal, fresh, begun))


def test_a_preview_scores_further_classes_through_the_same_bottleneck():
    model = built(text_ratio=0.5)
    features = features_of(model)
    seen = model.head.preview(["dog", "x"])
    close(seen(features).logits[:, :5], model.head(features).logits)
    assert seen(features).logits.shape == (7, 6) and seen.images is model.head.images


def test_the_defaults_are_those_of_the_paper_and_the_sheet():
    settings = ClipAdapter()
    assert (settings.ratio, settings.text_ratio, settings.reduction) == (0.2, 0.0, 4)
    assert (settings.final_relu, settings.reinit_each_task, settings.epochs) == (False, False, 5)
    optimizer = settings.phases(FIRST)[0].optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert {"lr": 0.001, "weight_decay": 0.01}.items() <= optimizer.defaults.items()


def test_the_optimizer_of_the_released_code_is_a_setting():
    settings = ClipAdapter(optimizer="sgd", momentum=0.0, weight_decay=0.0, memory=3, balance=2)
    rates = []
    for phase in [*settings.phases(FIRST), *settings.refine(FIRST)]:
        optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert type(optimizer) is torch.optim.SGD
        assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0, 0)
        rates.append((optimizer.defaults["lr"], phase.data))
    assert rates == [(0.001, "task+memory"), (0.0001, "memory")]
    assert ClipAdapter(optimizer="sgd", momentum=0.7).descent(1.0).keywords["momentum"] == 0.7


def test_settings_without_an_effect_are_named():
    assert set(ClipAdapter().idle()) == {"balance", "choose", "momentum"}
    assert set(ClipAdapter(optimizer="sgd", memory=1).idle()) == {"negatives"}
    nothing = ClipAdapter(ratio=0.0, memory=1, balance=1)
    assert {"lr", "epochs", "reduction", "memory"} <= set(nothing.idle()) and "templates" not in nothing.idle()
    assert nothing.phases(FIRST) == [] == nothing.refine(FIRST)
