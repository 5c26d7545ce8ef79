"""What a feed draws from a head: F 5 features, 3 classes with 7 draws each, in batches of 4."""

import pytest
import torch
from lightning_fabric import Fabric

from lamina.data.loader import Share
from lamina.data.stream import Task
from lamina.heads.refined import RefinedHead
from lamina.learner import Phase
from lamina.training.feed import Feed
from tests.streams import SPEC, blobs

PHASE = Phase(epochs=3, batch_size=4, optimizer=torch.optim.SGD, draws=7)
STEPS = 6  # of an epoch: 21 draws in batches of 4, 4, 4, 4, 4 and 1
TASK = Task(2, ["c"], [2], None, None)


@pytest.fixture
def head():
    head = RefinedHead(5)
    head.begin_task(0, ["a", "b", "c"], [0, 1, 2])
    head.collect(torch.randn(30, 5), torch.arange(30) % 3)
    head.end_look(lambda total: total)
    return head


def drawn(head, *, seed=4, task=TASK, number=1, first=0, share=None):
    feed = Feed(Fabric(accelerator="cpu", devices=1), SPEC, seed=seed)
    feed.share = share or Share()
    return list(feed.drawn(head, task, number, PHASE, first))


def joined(steps):
    """Return features and columns of steps, one after the other."""
    return torch.cat([s.batch.features for s in steps]), torch.cat([s.batch.labels for s in steps])


def test_each_epoch_shows_every_draw_once_in_an_order_of_its_own(head):
    steps = drawn(head)
    assert [step.images for step in steps] == [4, 4, 4, 4, 4, 1] * 3
    assert all(step.batch.images is None and step.weight == 1.0 for step in steps)
    orders = []
    for epoch in range(3):
        features, columns = joined(steps[STEPS * epoch : STEPS * epoch + STEPS])
        expected, theirs = head.draws(7, 4, "train", 2, 1, "draws", epoch)
        places = [(expected == row).all(1).nonzero().item() for row in features]
        assert sorted(places) == list(range(21)) and places != sorted(places)
        assert columns.tolist() == theirs[places].tolist()
        orders.append(places)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("change", [{"seed": 5}, {"number": 3}, {"task": Task(1, ["b"], [1], None, None)}])
def test_another_seed_phase_or_task_draws_other_features(head, change):
    ours, theirs = (joined(drawn(head, **more))[0] for more in ({}, change))
    assert not torch.isin(ours, theirs).any()
    assert torch.equal(joined(drawn(head))[0], ours)


def test_each_epoch_draws_anew(head):
    steps = drawn(head)
    epochs = [joined(steps[STEPS * epoch : STEPS * epoch + STEPS])[0] for epoch in range(3)]
    assert not torch.isin(epochs[0], epochs[1]).any() and not torch.isin(epochs[1], epochs[2]).any()


@pytest.mark.parametrize("first", [1, 5, 6, 7, 12, 17, 18])
def test_steps_from_any_step_on_are_the_last_ones_of_all(head, first):
    rest, whole = drawn(head, first=first), drawn(head)[first:]
    assert len(rest) == len(whole) == 18 - first
    for ours, theirs in zip(rest, whole, strict=True):
        assert torch.equal(ours.batch.features, theirs.batch.features)
        assert torch.equal(ours.batch.labels, theirs.batch.labels)


def test_processes_share_each_batch_and_their_weighted_means_are_its_mean(head):
    """The last batch has one draw, so one process of three steps on it with weight 3, the others with none."""
    whole = drawn(head)
    shares = [drawn(head, share=Share(rank, 3)) for rank in range(3)]
    for step, *parts in zip(whole, *shares, strict=True):
        assert {part.images for part in parts} == {step.images}
        mean = sum(part.weight * part.batch.features.mean(0) for part in parts) / 3
        torch.testing.assert_close(mean, step.batch.features.mean(0))
    assert [part[5].weight for part in shares] == [3.0, 0.0, 0.0]


def test_some_images_of_a_split_are_spread_evenly_over_it():
    split = blobs(tasks=2, per_task=3).tasks[1].train
    few = split.some(5)
    assert few.indices.tolist() == split.indices[[0, 6, 13, 19, 26]].tolist()
    assert few.columns.tolist() == split.columns[[0, 6, 13, 19, 26]].tolist() and few.images is split.images
    for count in (27, 100):
        assert split.some(count).indices.tolist() == split.indices.tolist()
