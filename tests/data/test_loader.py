import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lamina.data.loader import Share, global_batch, plain_batches, steps_per_epoch, training_steps
from lamina.data.pictures import ArrayPictures
from lamina.data.stream import Split
from lamina.data.transforms import InputSpec, transform
from lamina.errors import ConfigError, DataError
from lamina.seeds import seed_at

SPEC = InputSpec(10, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
PLAIN = transform("plain", SPEC)
FLIP = transform("crop-flip", SPEC)
ADDRESS = (3, "task", 1)


def numbered(count):
    """Return a split of `count` images of 10 x 10 pixels whose column is their position."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(10, 2).repeat(10, 3)
    labels = np.zeros(count, np.int64)
    return Split(ArrayPictures(pixels, labels), np.arange(count), np.arange(count))


def collected(split, how=FLIP, **options):
    options = {"address": ADDRESS, "epochs": 2, "batch_size": 3} | options
    return list(training_steps(split, how, **options))


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.columns, other.columns)
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.views, other.views)
        assert (one.size, one.weight) == (other.size, other.weight)


numbers = st.integers(1, 23)


@settings(max_examples=60, deadline=None)
@given(count=numbers, batch_size=st.integers(1, 9), world=st.integers(1, 7), epochs=st.integers(1, 3))
def test_every_epoch_shows_every_image_once_over_all_processes(count, batch_size, world, epochs):
    split = numbered(count)
    ranks = [
        collected(split, PLAIN, batch_size=batch_size, epochs=epochs, share=Share(rank, world)) for rank in range(world)
    ]
    per_epoch = steps_per_epoch(split, batch_size)
    assert {len(rank) for rank in ranks} == {per_epoch * epochs}
    for epoch in range(epochs):
        seen = []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            parts = [rank[step] for rank in ranks]
            for part in parts:
                assert len(part.columns) >= 1
                seen += part.columns.tolist() if part.weight else []
            assert len({part.size for part in parts}) == 1
            # weights over processes mean the same as counts over images
            for part in parts:
                held = len(part.columns) if part.weight else 0
                assert part.weight == pytest.approx(held / part.size * world)
            assert sum(part.weight for part in parts) == pytest.approx(world)
        assert sorted(seen) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 23), batch_size=st.integers(1, 9), world=st.integers(1, 7))
def test_plain_batches_show_every_image_once_over_all_processes(count, batch_size, world):
    split = numbered(count)
    shares = [
        list(plain_batches(split, PLAIN, batch_size=batch_size, share=Share(rank, world))) for rank in range(world)
    ]
    positions = [torch.cat([part.positions for part in share]).tolist() for share in shares if share]
    assert sorted(place for share in positions for place in share) == list(range(count))
    for share in positions:
        assert share == sorted(share)
    for share in shares:
        assert all(len(part.columns) == batch_size for part in share[:-1])
        assert all(torch.equal(part.positions, part.columns) for part in share)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_mean_over_processes_is_the_mean_over_the_global_batch(split, world):
    data = split()
    ranks = [collected(data, share=Share(rank, world)) for rank in range(world)]
    for step, whole in enumerate(collected(data)):
        mean = sum(rank[step].weight * rank[step].images.mean() for rank in ranks) / world
        torch.testing.assert_close(mean, whole.images.mean(), rtol=1e-4, atol=1e-5)


def test_a_process_gets_every_worldth_image_of_the_same_global_batch(split):
    data = split()
    whole, ranks = collected(data), [collected(data, share=Share(rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        for rank in range(2):
            mine = batch.images[rank::2]
            part = ranks[rank][step]
            assert torch.equal(part.images, mine if len(mine) else batch.images[:1])
            assert (part.weight == 0) == (len(mine) == 0)


def test_an_empty_share_gets_the_first_image_at_weight_nothing():
    split = numbered(7)
    last = collected(split, PLAIN, epochs=1, share=Share(1, 2))[-1]
    whole = collected(split, PLAIN, epochs=1)[-1]
    assert (last.size, last.weight) == (1, 0.0)
    assert torch.equal(last.images, whole.images)


def test_resuming_gives_the_steps_that_an_unbroken_run_has(split):
    data = split()
    whole = collected(data, epochs=3)
    for start in (0, 1, 3, 4, 8, 9):
        same(collected(data, epochs=3, start_step=start), whole[start:])


def test_the_steps_before_the_start_are_not_touched(split):
    data = split()
    touched = []

    class Watched(ArrayPictures):
        def batch(self, indices):
            touched.extend(indices.tolist())
            return super().batch(indices)

    images = Watched(data.images.pixels, data.images.labels)
    steps = collected(dataclasses.replace(data, images=images), epochs=2, start_step=5)
    assert len(steps) == 1 and len(touched) == len(steps[0].columns)


@pytest.mark.parametrize("how", [PLAIN, FLIP], ids=["plain", "random"])
def test_workers_change_nothing(split, how):
    data = split()
    same(collected(data, how, workers=2, start_step=1), collected(data, how, start_step=1))


def test_images_that_come_one_by_one_change_nothing(split, one_by_one):
    data = split()
    slow = dataclasses.replace(data, images=one_by_one(data.images))
    same(collected(slow), collected(data))
    same(collected(slow, PLAIN), collected(data, PLAIN))
    fast = list(plain_batches(data, PLAIN, batch_size=3))
    for one, other in zip(plain_batches(slow, PLAIN, batch_size=3), fast, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_as_they_were(split, workers):
    torch.manual_seed(8)
    np.random.seed(8)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    collected(split(), workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_what_was_drawn_before_changes_nothing(split):
    data = split()
    torch.manual_seed(1)
    first = collected(data)
    torch.manual_seed(2)
    steps = []
    for step in training_steps(data, FLIP, address=ADDRESS, epochs=2, batch_size=3):
        torch.rand(5)
        steps.append(step)
    same(steps, first)


def test_the_pixels_of_an_image_depend_on_address_epoch_and_image_alone(split):
    data = split()
    one, two = collected(data, batch_size=2), collected(data, batch_size=5)

    def by_position(steps, batch_size):
        per_epoch = steps_per_epoch(data, batch_size)
        found = {}
        for number, step in enumerate(steps):
            batch = global_batch(data, address=ADDRESS, batch_size=batch_size, step=number)
            found |= {(number // per_epoch, int(p)): image for p, image in zip(batch, step.images, strict=True)}
        return found

    first, second = by_position(one, 2), by_position(two, 5)
    assert len(first) == 2 * 7 and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[0, place], first[1, place]) for place in range(7))
    # and the same image in another split, at another position, too
    fewer = dataclasses.replace(data, indices=data.indices[2:], columns=data.columns[2:])
    third = collected(fewer, batch_size=5, epochs=1)[0]
    for place, image in zip(global_batch(fewer, address=ADDRESS, batch_size=5, step=0), third.images, strict=True):
        assert torch.equal(image, first[0, int(place) + 2])


def test_an_augmentation_is_drawn_under_the_seed_of_its_address(split):
    data = split()
    step = collected(data, epochs=3, start_step=7)[0]
    batch = global_batch(data, address=ADDRESS, batch_size=3, step=7)
    for position, seen in zip(batch, step.images, strict=True):
        index = int(data.indices[position])
        torch.manual_seed(seed_at(*ADDRESS, "augment", 2, index))
        assert torch.equal(seen, FLIP.normalised(FLIP(data.images.image(index))[None])[0])


def test_another_address_is_another_order():
    split = numbered(23)
    orders = [
        torch.cat([step.columns for step in collected(split, PLAIN, epochs=1, address=address)]).tolist()
        for address in (ADDRESS, (4, "task", 1))
    ]
    assert orders[0] != orders[1]
    two = torch.cat([step.columns for step in collected(split, PLAIN)]).tolist()
    assert two[:23] != two[23:]


def test_the_order_of_an_epoch_is_pinned():
    # a change here makes every resumed run see other batches than before
    order = torch.cat([step.columns for step in collected(numbered(7), PLAIN, epochs=1)]).tolist()
    assert order == [1, 6, 2, 4, 0, 5, 3]


# ── passes that are shuffled together ────────────────────────────────────────────────────────────────


@settings(max_examples=40, deadline=None)
@given(count=numbers, batch_size=st.integers(1, 9), repeat=st.integers(1, 4), world=st.integers(1, 3))
def test_an_epoch_shows_every_image_as_often_as_it_repeats(count, batch_size, repeat, world):
    split = numbered(count)
    ranks = [
        collected(split, PLAIN, batch_size=batch_size, repeat=repeat, share=Share(rank, world)) for rank in range(world)
    ]
    per_epoch = steps_per_epoch(split, batch_size, repeat)
    assert per_epoch == -(-count * repeat // batch_size)
    for epoch in range(2):
        steps = [step for rank in ranks for step in rank[epoch * per_epoch : (epoch + 1) * per_epoch]]
        seen = [column for step in steps if step.weight for column in step.columns.tolist()]
        assert sorted(seen) == sorted([*range(count)] * repeat)
        assert [step.size for step in steps[: per_epoch - 1]] == [batch_size] * (per_epoch - 1)
    assert {len(rank) for rank in ranks} == {2 * per_epoch}


def test_repetitions_are_shuffled_jointly_and_not_one_after_another():
    order = torch.cat([step.columns for step in collected(numbered(23), PLAIN, epochs=1, repeat=3)]).tolist()
    parts = [order[:23], order[23:46], order[46:]]
    assert all(len(set(part)) < 23 for part in parts) and sorted(order) == sorted([*range(23)] * 3)


@pytest.fixture
def distinct(split):
    """Seven images whose column is their position."""
    return dataclasses.replace(split(), columns=np.arange(7))


def test_one_repetition_is_what_no_repetition_is(split):
    data = split()
    same(collected(data, repeat=1), collected(data))


def test_an_image_looks_different_in_every_repetition_and_the_same_when_it_comes_by_again(distinct):
    data = distinct
    seen: dict[int, list] = {}
    for step in collected(data, epochs=1, repeat=5):
        for column, image in zip(step.columns.tolist(), step.images, strict=True):
            seen.setdefault(column, []).append(image)
    assert [len(found) for found in seen.values()] == [5] * 7
    for found in seen.values():
        assert not all(torch.equal(found[0], other) for other in found[1:])
    same(collected(data, epochs=1, repeat=5, start_step=4), collected(data, epochs=1, repeat=5)[4:])
    same(collected(data, epochs=1, repeat=5, workers=2), collected(data, epochs=1, repeat=5))


def test_the_seed_of_a_repeated_augmentation_is_its_address_and_the_number_of_the_repetition(distinct):
    data, found = distinct, set()
    for step in collected(data, epochs=2, repeat=3)[7:]:
        for column, image in zip(step.columns.tolist(), step.images, strict=True):
            index = int(data.indices[column])
            for again in range(3):
                torch.manual_seed(seed_at(*ADDRESS, "augment", 1, index, *([again] if again else [])))
                if torch.equal(image, FLIP.normalised(FLIP(data.images.image(index))[None])[0]):
                    found.add((column, again))
    assert found == {(column, again) for column in range(7) for again in range(3)}


def test_the_positions_of_a_repeated_batch_are_those_of_its_images(split):
    data = split()
    for number, step in enumerate(collected(data, PLAIN, epochs=1, repeat=3)):
        batch = global_batch(data, address=ADDRESS, batch_size=3, step=number, repeat=3)
        assert step.columns.tolist() == data.columns[batch].tolist()


def test_columns_belong_to_their_images(split):
    data = split()
    for step, number in zip(collected(data, PLAIN), range(6), strict=True):
        batch = global_batch(data, address=ADDRESS, batch_size=3, step=number)
        assert step.columns.tolist() == data.columns[batch].tolist()
        expected = PLAIN.normalised(PLAIN(torch.stack([data.images.image(int(data.indices[p])) for p in batch])))
        assert torch.equal(step.images, expected)
    for part in plain_batches(data, PLAIN, batch_size=3):
        assert part.columns.tolist() == data.columns[part.positions.numpy()].tolist()
        first = data.images.image(int(data.indices[part.positions[0]]))
        assert torch.equal(part.images[:1], PLAIN.normalised(PLAIN(first)[None]))
        assert part.images.dtype == torch.float32 and part.columns.dtype == torch.int64


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Share(2, 2), ConfigError, "a share needs 0 <= rank < world; got rank 2 of 2"),
        (lambda: collected(numbered(0)), DataError, "there is nothing to train on: the split has no images"),
        (lambda: collected(numbered(7), batch_size=0), ConfigError, "batch_size must be at least 1; got 0"),
        (lambda: collected(numbered(7), repeat=0), ConfigError, "repeat must be at least 1; got 0"),
        (
            lambda: collected(numbered(7), start_step=-1),
            ConfigError,
            "start_step, workers and epochs must be at least 0; got -1, 0 and 2",
        ),
        (
            lambda: plain_batches(numbered(7), FLIP, batch_size=3),
            ConfigError,
            "evaluation needs a transform without randomness: 'plain'; got 'crop-flip'",
        ),
    ],
)
def test_misuse_is_told_in_one_sentence_and_at_once(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
