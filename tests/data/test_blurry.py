"""Blurry streams: a share of each class's training images comes with other tasks than its own."""

import numpy as np
import pytest

from lamina.data.choosing import dealt
from lamina.data.streams import StreamSettings, build_stream
from lamina.errors import ConfigError

LABELS = np.repeat([0, 1, 2, 3, 4], [23, 17, 11, 5, 2])
HOMES = [np.array([3, 0]), np.array([4]), np.array([1]), np.array([2])]


def built(**values):
    return build_stream(StreamSettings(**{"name": "digits", **values}))


def counts(parts):
    """Images of each label in each task, (tasks, labels)."""
    return np.array([np.bincount(LABELS[part], minlength=5) for part in parts])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_every_image_arrives_once(share):
    wanted = np.flatnonzero(np.arange(len(LABELS)) % 3)
    parts = dealt(LABELS, wanted, HOMES, share, 1993)
    assert sorted(np.concatenate(parts).tolist()) == wanted.tolist()
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_the_share_leaves_home_and_is_dealt_evenly_to_the_other_tasks(share):
    found = counts(dealt(LABELS, np.arange(len(LABELS)), HOMES, share, 7))
    for task, home in enumerate(HOMES):
        for label in home:
            total = int((label == LABELS).sum())
            leaving = min(round(share * total), total - 1)
            assert found[task, label] == total - leaving
            others = np.delete(found[:, label], task)
            assert others.sum() == leaving and others.max() - others.min() <= 1


def test_which_images_leave_and_where_the_dealing_begins_depends_on_the_seed_and_the_class():
    once, again, other = (dealt(LABELS, np.arange(len(LABELS)), HOMES, 0.3, seed) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))
    first = [set(np.flatnonzero(counts(dealt(LABELS, np.arange(len(LABELS)), HOMES, 0.05, s))[:, 0])) for s in range(9)]
    assert len(set(map(frozenset, first))) > 1


def test_images_of_one_class_do_not_depend_on_those_of_another():
    whole = dealt(LABELS, np.arange(len(LABELS)), HOMES, 0.5, 7)
    fewer = dealt(LABELS, np.flatnonzero(LABELS != 0), HOMES, 0.5, 7)
    assert all(np.array_equal(a[LABELS[a] != 0], b) for a, b in zip(whole, fewer, strict=True))


def test_a_blurry_stream_moves_training_images_and_leaves_test_images_at_home():
    plain, blurry = built(), built(blurry=0.3)
    assert (blurry.kind, blurry.details) == ("blurry class-incremental", {"blurry": 0.3})
    for mine, task in zip(blurry, plain, strict=True):
        assert np.array_equal(mine.test.indices, task.test.indices)
        assert [mine.classes[mine.columns.index(column)] for column in mine.tested] == task.classes
        assert mine.tested == np.unique(mine.test.columns).tolist() != mine.columns
        home = np.isin(mine.train.images.labels[mine.train.indices], task.train.images.labels[task.train.indices])
        assert 0.5 < home.mean() < 0.8
    every = np.concatenate([task.train.indices for task in blurry])
    assert sorted(every.tolist()) == list(range(1437))


def test_a_class_has_one_column_however_often_it_comes():
    stream = built(blurry=0.4, per_class=3, order_seed=5)
    names = {}
    for task in stream:
        assert task.columns == sorted(task.columns) and len(task.classes) == len(task.columns)
        for name, column in zip(task.classes, task.columns, strict=True):
            assert names.setdefault(column, name) == name
        labels = task.train.images.labels[task.train.indices]
        assert set(task.train.columns.tolist()) == set(task.columns)
        pairs = set(zip(labels.tolist(), task.train.columns.tolist(), strict=True))
        assert len(pairs) == len(task.columns)
        assert set(task.tested) == set(task.test.columns.tolist()) <= set(task.columns)
    assert sorted(names) == list(range(10)) and len(set(names.values())) == 10 and stream.columns == 10


def test_columns_are_given_on_first_arrival():
    stream = built(blurry=0.4, per_class=3, order_seed=5)
    met = 0
    for task in stream:
        assert [column for column in task.columns if column >= met] == list(range(met, max(met - 1, *task.columns) + 1))
        met = max(met, max(task.columns) + 1)
    assert len(stream.tasks[0].columns) < 10  # else nothing arrived later
    order = [name for task in built(order_seed=5) for name in task.classes]
    first = stream.tasks[0].classes
    assert first == sorted(first, key=order.index)


def test_a_class_stays_at_home_with_one_image_at_least():
    for task in built(blurry=0.9, per_class=2):
        assert set(task.tested) <= set(task.train.columns.tolist())


def test_no_blur_is_the_stream_that_it_always_was():
    assert built(blurry=0.0).fingerprint == built().fingerprint and built(blurry=0.0).kind == "class-incremental"


def test_the_fingerprint_depends_on_the_share_and_the_order_seed():
    streams = [built(blurry=0.1), built(blurry=0.2), built(blurry=0.1, order_seed=3)]
    assert len({stream.fingerprint for stream in streams}) == 3
    assert built(blurry=0.1).fingerprint == streams[0].fingerprint


def test_blur_goes_with_a_holdout():
    stream = built(blurry=0.2, holdout=0.25, per_class=20)
    trained = np.concatenate([task.train.indices for task in stream])
    held = np.concatenate([task.test.indices for task in stream])
    assert (len(trained), len(held), len(set(trained) & set(held))) == (150, 50, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blurry": 1}, "StreamSettings.blurry must be below 1.0; got 1"),
        ({"blurry": -0.1}, "StreamSettings.blurry must be at least 0.0; got -0.1"),
        ({"blurry": 0.1, "tasks": 1}, "stream.blurry shares classes out between tasks, so there must be two or more; "
         "digits with tasks=1 has one"),
    ],
)  # fmt: skip
def test_a_wrong_share_is_told_in_one_sentence(values, message):
    with pytest.raises(ConfigError) as error:
        built(**values)
    assert str(error.value) == message
