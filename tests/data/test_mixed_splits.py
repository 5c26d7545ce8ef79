"""Splits that are made of others: what stands where, and where it is from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lamina.data.loader import plain_batches
from lamina.data.pictures import ArrayPictures
from lamina.data.stream import JoinedImages, Split, Stream, Task, mixed
from lamina.data.transforms import InputSpec, transform


def source(start, labels, size=6):
    """Images whose pixels are `start`, `start` + 1, ..."""
    pixels = (start + np.arange(len(labels), dtype=np.uint8))[:, None, None, None]
    return ArrayPictures(pixels * np.ones((1, 3, size, size), np.uint8), np.array(labels, np.int64))


def split_of(images, indices, column):
    return Split(images, np.array(indices, np.int64), np.full(len(indices), column))


class OneByOne:
    """A set that cannot give many images at once."""

    def __init__(self, images):
        self.images, self.labels, self.fingerprint = images, images.labels, images.fingerprint

    def __len__(self):
        return len(self.labels)

    def image(self, index):
        return self.images.image(index)


@pytest.fixture
def sources():
    return source(10, [0, 1, 2, 1]), source(50, []), source(60, [1, 0, 1]), source(90, [0, 0])


def value(image):
    return int(image.unique())


def test_images_of_joined_sources_stand_one_source_after_the_other(sources):
    joined = JoinedImages(sources)
    assert len(joined) == 9
    assert [value(joined.image(index)) for index in range(9)] == [10, 11, 12, 13, 60, 61, 62, 90, 91]
    assert joined.labels.tolist() == [0, 1, 2, 1, 4, 3, 4, 5, 5]


def test_many_images_of_several_sources_come_in_the_order_asked_for(sources):
    joined = JoinedImages(sources)
    batch = joined.batch(np.array([7, 0, 4, 8, 0, 5]))
    assert batch.shape == (6, 3, 6, 6) and batch.dtype == torch.uint8
    assert [value(image) for image in batch] == [90, 10, 60, 91, 10, 61]


def test_sources_of_other_sizes_or_that_give_single_images_come_one_by_one():
    small, large, single = source(10, [0, 1]), source(20, [0, 1, 1], size=8), OneByOne(source(30, [0]))
    assert JoinedImages([small, large]).batch(np.array([0, 2])) is None
    assert JoinedImages([small, large]).batch(np.array([3, 2])).shape == (2, 3, 8, 8)
    assert JoinedImages([small, single]).batch(np.array([0, 2])) is None
    joined = JoinedImages([small, large, single])
    split = Split(joined, np.array([5, 1, 2]), np.array([2, 0, 1]))
    plain = transform("plain", InputSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    (batch,) = plain_batches(split, plain, batch_size=4)
    assert (batch.images[:, 0, 4, 4] * 255).round().tolist() == [30, 11, 20]


def test_what_joined_images_are_depends_on_every_source_and_their_order(sources):
    first, _, third, last = sources
    prints = {
        JoinedImages(some).fingerprint for some in ([first, third], [third, first], [first, last], [first, third, last])
    }
    assert len(prints) == 4
    assert JoinedImages([first, third]).fingerprint == JoinedImages([first, third]).fingerprint


def test_splits_of_one_source_become_one_with_the_indices_they_had(sources):
    first = sources[0]
    a, b = split_of(first, [3, 0], 5), split_of(first, [2], 7)
    whole = mixed([a, b])
    assert whole.images is first
    assert (whole.indices.tolist(), whole.columns.tolist()) == ([3, 0, 2], [5, 5, 7])
    assert [(origin.split, origin.positions.tolist()) for origin in whole.origins] == [(a, [0, 1]), (b, [0])]


def test_splits_of_several_sources_show_the_images_they_had(sources):
    first, _, third, _ = sources
    parts = [split_of(third, [2, 1], 4), split_of(first, [3], 5), split_of(third, [0], 6)]
    whole = mixed(parts)
    assert whole.images.sources == [third, first]
    assert [value(whole.images.image(int(index))) for index in whole.indices] == [62, 61, 13, 60]
    assert whole.columns.tolist() == [4, 4, 5, 6]


def test_empty_splits_leave_no_trace_and_one_alone_is_itself(sources):
    first, _, third, _ = sources
    full, empty = split_of(first, [1, 2], 3), split_of(third, [], 4)
    assert mixed([empty, full, empty]) is full and mixed([empty]) is empty
    assert mixed([full, empty, split_of(first, [0], 9)]).images is first


def test_a_split_knows_which_images_of_which_split_it_has(sources):
    whole = split_of(sources[0], [3, 1, 0, 2], 5)
    few = whole.take(np.array([2, 0]))
    assert (few.indices.tolist(), few.columns.tolist()) == ([0, 3], [5, 5])
    assert [(origin.split, origin.positions.tolist()) for origin in few.origins] == [(whole, [2, 0])]
    assert mixed([few, whole]).origins[0].split is whole


def test_a_split_that_is_changed_forgets_where_it_is_from(sources):
    few = split_of(sources[0], [3, 1, 0, 2], 5).take(np.array([2, 0, 1]))
    assert few.origins and not few.some(2).origins and not replace(few, columns=few.columns + 1).origins


def test_tasks_of_several_sources_can_be_merged(sources):
    first, _, third, _ = sources
    tasks = [
        Task(0, ["a"], [0], split_of(first, [0, 2], 0), split_of(first, [1], 0)),
        Task(1, ["b"], [1], split_of(third, [1], 1), split_of(third, [2, 0], 1)),
    ]
    merged = Stream("s", tasks, 0, "s").merged()
    assert [value(merged.train.images.image(int(index))) for index in merged.train.indices] == [10, 12, 61]
    assert [value(merged.test.images.image(int(index))) for index in merged.test.indices] == [11, 62, 60]
    assert (merged.train.columns.tolist(), merged.test.columns.tolist()) == ([0, 0, 1], [0, 1, 1])
