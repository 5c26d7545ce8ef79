"""What VPT-NSP² is compared with: each baseline does what its first line says."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lamina.methods.joint import Joint
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.nearest_mean import NearestMean
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import Batch
from tests.streams import blobs, trainer_of

SMALL = {"epochs": 2, "batch_size": 8, "temperature": 1.0}


@pytest.fixture
def stream():
    return blobs(tasks=2, per_task=3)


def run(settings, tower, stream):
    trainer = trainer_of(settings, tower)
    trainer.run(stream)
    return trainer


def frozen(trainer, split):
    """Frozen features and columns of a split, computed by hand."""
    tower = trainer.learner.model.tower
    feed = trainer_of(VPTDeep(**SMALL), tower).feed
    batches = list(feed.plain(split))
    features = torch.cat([tower(batch.images).features for batch in batches])
    return features, torch.cat([batch.labels for batch in batches])


def test_vpt_deep_moves_its_prompts_on_every_task(tiny_vit, stream):
    trainer = trainer_of(VPTDeep(length=5, **SMALL), tiny_vit)
    seen = [{n: p.clone() for n, p in trainer.learner.model.prompts.named_parameters()}]
    for task in stream:
        trainer.learn(task)
        seen.append({n: p.clone() for n, p in trainer.learner.model.prompts.named_parameters()})
    for before, after in pairwise(seen):
        assert all(not torch.equal(before[name], after[name]) for name in before)


def test_vpt_deep_without_prompts_is_a_probe_of_the_frozen_tower(tiny_vit, stream):
    trainer = run(VPTDeep(length=0, **SMALL), tiny_vit, stream)
    features, _ = frozen(trainer, stream.tasks[1].test)
    images = torch.cat([batch.images for batch in trainer.feed.plain(stream.tasks[1].test)])
    with torch.no_grad():
        read = trainer.learner.model.features(Batch(images))[0]
    torch.testing.assert_close(read, features)


def test_the_joint_run_sees_all_classes_at_once_and_reports_each_task(tiny_vit, stream):
    trainer = trainer_of(Joint(length=5, **SMALL), tiny_vit)
    columns = []
    learn = trainer.learn
    trainer.learn = lambda task, **more: (columns.append(list(task.columns)), learn(task, **more))
    trainer.run(stream)
    assert columns == [[0, 1, 2, 3, 4, 5]]
    assert [len(row) for row in trainer.matrix] == [2]


def test_the_joint_run_lets_classes_of_different_tasks_compete(tiny_vit, stream):
    (phase,) = Joint(**SMALL).phases(stream.merged())
    assert phase.classes == "task" and len(stream.merged().columns) == 6


def test_the_linear_probe_learns_what_a_head_on_frozen_features_learns(tiny_vit, stream):
    """One full-batch task, so that order does not matter: Adam by hand on features computed by hand."""
    settings = LinearProbe(epochs=5, batch_size=27, lr=0.05)
    trainer = trainer_of(settings, tiny_vit)
    trainer.learn(stream.tasks[0])
    features, columns = frozen(trainer, stream.tasks[0].train)
    again = trainer_of(settings, tiny_vit)
    again._begin([stream.tasks[0]])
    head = again.learner.model.head.blocks[0]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    (phase,) = settings.phases(stream.tasks[0])
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * phase.schedule(step / 5)
        optimizer.zero_grad()
        F.cross_entropy(head(features), columns).backward()
        optimizer.step()
    torch.testing.assert_close(trainer.learner.model.head.blocks[0].weight, head.weight, rtol=1e-4, atol=1e-5)


def test_the_nearest_mean_knows_each_class_by_its_mean_feature(tiny_vit, stream):
    trainer = run(NearestMean(), tiny_vit, stream)
    unit, columns = [], []
    for task in stream:
        features, own = frozen(trainer, task.train)
        unit.append(F.normalize(features, dim=-1))
        columns.append(own)
    unit, columns = torch.cat(unit), torch.cat(columns)
    means = F.normalize(torch.stack([unit[columns == c].mean(0) for c in range(6)]), dim=-1)
    for index, task in enumerate(stream):
        features, own = frozen(trainer, task.test)
        predicted = (F.normalize(features, dim=-1) @ means.T).argmax(-1)
        assert trainer.matrix[-1][index] == pytest.approx((predicted == own).double().mean().item())


def test_the_nearest_mean_does_not_depend_on_the_order_of_tasks(tiny_vit, stream):
    forward = run(NearestMean(), tiny_vit, stream).learner.model.head
    trainer = trainer_of(NearestMean(), tiny_vit)
    trainer._begin(list(stream))
    trainer._look_back(stream.tasks[1], 1)
    trainer._look_back(stream.tasks[0], 1)
    torch.testing.assert_close(trainer.learner.model.head.seen.sums, forward.seen.sums, rtol=0, atol=1e-12)
