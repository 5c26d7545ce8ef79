"""What a memory keeps: images of 3 x 2 x 4 pixels, F 5 features, classes of 9 images and fewer."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from lamina.data.memory import Memory, disagreement, entropies, herded
from lamina.data.pictures import ArrayPictures
from lamina.data.stream import Split, Task
from lamina.errors import ConfigError, ShapeError

CHOICES = ["random", "first", "herding", "entropy", "energy", "variance"]
RNG = np.random.default_rng(0)
EMPTY = np.zeros(0, np.int64)


def pictures(count):
    """Images whose pixels all have the value of their index."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 4), np.uint8)
    return ArrayPictures(pixels, np.zeros(count, np.int64))


def task_of(index, counts, start=0, source=None):
    """A task with so many images of each column, in a mixed order; its images begin at `start` of the source."""
    columns = RNG.permutation(np.repeat(list(counts), list(counts.values())))
    images = source or pictures(start + len(columns))
    train = Split(images, start + np.arange(len(columns)), columns)
    return Task(index, [f"c{column}" for column in counts], list(counts), train, Split(images, EMPTY, EMPTY))


def seen(task, seed=0):
    """Features and scores of a task's images, and how far their draws differ."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(len(task.train), 5, generator=generator),
        "scores": 3 * torch.randn(len(task.train), 7, generator=generator),
        "draws": torch.rand(len(task.train), 1, generator=generator),
    }


def kept(memory, column, task=None):
    """Positions of a column, in order of preference; of one task, or of all."""
    rows = memory.state_dict()["kept"]
    return [position for t, position, c in rows if c == column and task in (None, t)]


def counts_of(memory):
    return dict(Counter(column for _, _, column in memory.state_dict()["kept"]))


# ── budgets ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a memory has one budget, per_class or total; got per_class=None, total=None: give one of them"),
        (
            {"per_class": 2, "total": 9},
            "a memory has one budget, per_class or total; got per_class=2, total=9: give one of them",
        ),
        ({"per_class": 0}, "per_class must be at least 1; got 0; a learner that keeps nothing has no memory"),
        ({"total": -1}, "total must be at least 1; got -1; a learner that keeps nothing has no memory"),
        (
            {"total": 5, "choose": "herd"},
            "choose must be one of random, first, herding, entropy, energy, variance; got 'herd'",
        ),
    ],
)
def test_a_memory_has_one_budget_and_a_known_choice(arguments, message):
    with pytest.raises(ConfigError) as error:
        Memory(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("choose", CHOICES)
def test_a_budget_per_class_holds_for_every_class_that_has_so_many(choose):
    memory = Memory(per_class=4, choose=choose)
    for task in (task_of(0, {0: 9, 1: 6}), task_of(1, {2: 3, 4: 5, 3: 4})):
        memory.keep(task, 0, **seen(task))
    assert counts_of(memory) == {0: 4, 1: 4, 2: 3, 4: 4, 3: 4}
    assert memory.images == 19


@pytest.mark.parametrize("choose", CHOICES)
def test_a_total_is_shared_evenly_by_the_classes_met_and_never_exceeded(choose):
    memory = Memory(total=11, choose=choose)
    expected = [{0: 5, 1: 5}, {0: 2, 1: 2, 2: 2, 3: 1, 4: 2}, dict.fromkeys(range(8), 1)]
    for task, counts in zip(
        (task_of(0, {0: 9, 1: 7}), task_of(1, {2: 8, 3: 1, 4: 6}), task_of(2, {5: 9, 6: 3, 7: 5})),
        expected,
        strict=True,
    ):
        memory.keep(task, 0, **seen(task))
        assert counts_of(memory) == counts
        assert memory.images == sum(counts.values()) <= 11


@pytest.mark.parametrize("choose", CHOICES)
def test_what_is_kept_of_a_class_is_the_beginning_of_its_order_of_preference(choose):
    first, second = task_of(0, {0: 9, 1: 8}), task_of(1, {2: 9, 3: 9, 4: 9})
    whole, shrinking = Memory(per_class=9, choose=choose), Memory(total=10, choose=choose)
    for task in (first, second):
        whole.keep(task, 0, **seen(task))
    shrinking.keep(first, 0, **seen(first))
    assert [kept(shrinking, column) for column in (0, 1)] == [kept(whole, column)[:5] for column in (0, 1)]
    shrinking.keep(second, 0, **seen(second))
    assert [kept(shrinking, column) for column in range(5)] == [kept(whole, column)[:2] for column in range(5)]
    assert sorted(kept(whole, 0)) == np.flatnonzero(first.train.columns == 0).tolist()
    assert (kept(whole, 0) == sorted(kept(whole, 0))) == (choose == "first")


def test_a_total_below_the_number_of_classes_is_refused_beforehand():
    tasks = [task_of(0, {0: 3, 1: 2}), task_of(1, {1: 2, 2: 4})]
    for enough in (Memory(total=3), Memory(per_class=1)):
        enough.check(tasks)
    with pytest.raises(ConfigError) as error:
        Memory(total=2).check(tasks)
    message = (
        "a memory needs an image of each class; got 2 in all for 3 classes: give it at least 3, or a number per class"
    )
    assert str(error.value) == message


def test_a_memory_says_in_words_what_it_keeps():
    assert str(Memory(per_class=10)) == "10 per class, random"
    assert str(Memory(total=2000, choose="herding")) == "2000 in all, herding"


# ── a class that is met again ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("choose", CHOICES)
def test_a_class_met_again_shares_its_room_evenly_by_tasks(choose):
    """Of room for 5: all, then 3 and 2, then 2, 2 and 1; each time the beginning of what was there."""
    memory, before = Memory(per_class=5, choose=choose), {}
    for index, shares in enumerate(([5], [3, 2], [2, 2, 1])):
        task = task_of(index, {3: 9, 7: 6})
        memory.keep(task, 0, **seen(task, index))
        for column in (3, 7):
            assert [len(kept(memory, column, t)) for t in range(index + 1)] == shares
            for t in range(index):
                assert kept(memory, column, t) == before[column, t][: shares[t]]
        before = {(column, t): kept(memory, column, t) for column in (3, 7) for t in range(index + 1)}


def test_a_task_with_few_images_of_a_class_leaves_its_room_to_others():
    memory = Memory(per_class=6)
    for index, count in enumerate((9, 1, 9)):
        memory.keep(task_of(index, {2: count}), 0)
    assert [len(kept(memory, 2, task)) for task in range(3)] == [3, 1, 2]


def test_room_is_shared_by_classes_not_by_meetings():
    memory = Memory(total=8)
    for index in range(3):
        memory.keep(task_of(index, {0: 9, 1: 9}), 0)
    assert counts_of(memory) == {0: 4, 1: 4}


# ── random ───────────────────────────────────────────────────────────────────────────────────────────


def drawn(seed=0, index=0, column=0, per_class=9):
    """The order of nine images of one class, beside another one."""
    columns = np.array([column] * 9 + [column + 1] * 2)
    split = Split(pictures(11), np.arange(11), columns)
    memory = Memory(per_class=per_class)
    memory.keep(Task(index, ["a", "b"], [column, column + 1], split, split), seed)
    return kept(memory, column)


def test_random_depends_on_seed_task_and_class_and_on_nothing_else():
    orders = [drawn(), drawn(seed=1), drawn(index=1), drawn(column=5)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len(set(map(tuple, [*orders, range(9)]))) == 5
    torch.manual_seed(4711)
    assert drawn() == orders[0]
    assert drawn(per_class=4) == orders[0][:4]


def test_random_takes_every_image_as_often_as_any_other():
    """Three of nine, 300 times: 100 times each, give or take four standard deviations."""
    taken = Counter(position for seed in range(300) for position in drawn(seed, per_class=3))
    assert set(taken) == set(range(9))
    assert all(abs(count - 100) < 4 * math.sqrt(300 * (1 / 3) * (2 / 3)) for count in taken.values())


# ── herding ──────────────────────────────────────────────────────────────────────────────────────────


def herded_slowly(features, count):
    """Algorithm 4 of iCaRL, as it stands there, on features of unit length."""
    units = [row / math.sqrt(sum(value**2 for value in row)) for row in features]
    mean = sum(units) / len(units)
    chosen = []
    for k in range(1, count + 1):
        best, least = None, math.inf
        for place, unit in enumerate(units):
            distance = float(np.linalg.norm(mean - (unit + sum(units[other] for other in chosen)) / k))
            if place not in chosen and distance < least:
                best, least = place, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_herding_takes_what_a_slow_loop_takes(seed):
    features = np.random.default_rng(seed).normal(1, 2, (13, 5))
    assert herded(torch.from_numpy(features), 7).tolist() == herded_slowly(features, 7)


def test_herding_looks_at_the_directions_of_features_and_not_at_their_lengths():
    features = torch.randn(9, 5, dtype=torch.float64) + 1
    lengths = 2.0 ** torch.arange(9)[:, None]  # by powers of two, so that no digit is lost
    assert herded(features * lengths, 9).tolist() == herded(features, 9).tolist()


def test_herding_takes_equals_in_their_order_and_each_once():
    assert herded(torch.ones(4, 3, dtype=torch.float64), 9).tolist() == [0, 1, 2, 3]
    assert herded(torch.zeros(0, 3, dtype=torch.float64), 2).tolist() == []


def test_a_memory_herds_each_class_for_itself():
    task = task_of(0, {0: 9, 1: 6})
    features = seen(task)["features"]
    memory = Memory(per_class=4, choose="herding")
    memory.keep(task, 0, features=features)
    for column in (0, 1):
        own = np.flatnonzero(task.train.columns == column)
        assert kept(memory, column) == own[herded_slowly(features[own].double().numpy(), 4)].tolist()


# ── entropy ──────────────────────────────────────────────────────────────────────────────────────────


def test_entropy_is_that_of_the_distribution_over_classes():
    scores = 2 * torch.randn(6, 5, dtype=torch.float64)
    for row, entropy in zip(scores.tolist(), entropies(scores).tolist(), strict=True):
        parts = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        assert entropy == pytest.approx(-sum(part * math.log(part) for part in parts), rel=1e-10)
    assert entropies(torch.tensor([[0.0, -math.inf, 0.0]])).item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_images_of_which_the_model_is_least_sure_come_first_equals_in_their_order():
    """Two classes, taking turns; the second score says how sure the model is."""
    sure = torch.tensor([5.0, 1.0, 2.0, 3.0, 2.0, 3.0, 0.0, 9.0])
    split = Split(pictures(8), np.arange(8), np.array([0, 1] * 4))
    memory = Memory(per_class=3, choose="entropy")
    memory.keep(Task(0, ["a", "b"], [0, 1], split, split), 0, scores=torch.stack([torch.zeros(8), sure], 1))
    assert kept(memory, 0) == [6, 2, 4]
    assert kept(memory, 1) == [1, 3, 5]


# ── first, energy and variance ───────────────────────────────────────────────────────────────────────


def alternating(choose, **given):
    """What is kept of two classes that take turns in eight images, at most three of each."""
    split = Split(pictures(8), np.arange(8), np.array([0, 1] * 4))
    memory = Memory(per_class=3, choose=choose)
    memory.keep(Task(0, ["a", "b"], [0, 1], split, split), 0, **given)
    return kept(memory, 0), kept(memory, 1)


def test_the_first_images_are_the_first_of_the_split_whatever_the_seed():
    assert alternating("first") == ([0, 2, 4], [1, 3, 5])


def test_images_that_look_least_known_come_first_equals_in_their_order():
    """One score that is large makes the sum of exponentials large, two that are equal add the logarithm of 2."""
    high = torch.tensor([5.0, 1.0, 2.0, 3.0, 2.0, 3.0, 9.0, 0.0])
    low = torch.tensor([-9.0, 1.0, -9.0, -9.0, 2.0, -9.0, -9.0, 0.0])
    scores = torch.stack([high, low], 1)
    energies = [math.log(math.exp(a) + math.exp(b)) for a, b in scores.tolist()]
    slow = [sorted(range(start, 8, 2), key=energies.__getitem__)[:3] for start in (0, 1)]
    assert alternating("energy", scores=scores) == tuple(slow) == ([2, 4, 0], [7, 1, 3])


def test_images_on_which_draws_agree_most_come_first_equals_in_their_order():
    differ = torch.tensor([[0.5], [0.1], [0.2], [0.3], [0.2], [0.3], [0.0], [0.9]])
    assert alternating("variance", draws=differ) == ([6, 2, 4], [1, 3, 5])


def test_disagreement_is_the_variance_of_probabilities_over_draws_summed_over_classes():
    scores, slow = 2 * torch.randn(4, 6, 5), []
    for image in range(6):
        draws = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in scores[:, image].tolist()]
        means = [sum(draw[c] for draw in draws) / 4 for c in range(5)]
        slow.append(sum((draw[c] - means[c]) ** 2 / 4 for draw in draws for c in range(5)))
    assert disagreement(scores).tolist() == pytest.approx(slow, rel=1e-5)
    assert disagreement(scores[:1]).tolist() == [0] * 6


# ── what it is given ─────────────────────────────────────────────────────────────────────────────────


def test_each_choice_says_what_it_looks_at():
    wanted = ["nothing", "nothing", "features", "scores", "scores", "draws"]
    assert [Memory(total=9, choose=choose).wants for choose in CHOICES] == wanted


@pytest.mark.parametrize(
    ("choose", "given", "got"),
    [
        ("herding", {"scores": torch.zeros(15, 7)}, "features for each of 15 images; got none"),
        ("entropy", {"scores": torch.zeros(14, 7)}, "scores for each of 15 images; got shape (14, 7)"),
        ("herding", {"features": torch.zeros(15)}, "features for each of 15 images; got shape (15,)"),
        ("energy", {"draws": torch.zeros(15, 1)}, "scores for each of 15 images; got none"),
        ("variance", {"scores": torch.zeros(15, 7)}, "draws for each of 15 images; got none"),
    ],
)
def test_what_is_looked_at_must_be_there_for_every_image(choose, given, got):
    memory = Memory(per_class=4, choose=choose)
    with pytest.raises(ShapeError) as error:
        memory.keep(task_of(0, {0: 9, 1: 6}), 0, **given)
    assert str(error.value) == f"choose={choose!r} takes a row of {got}"
    assert not memory.images and memory.state_dict()["columns"] == []


# ── what it gives ────────────────────────────────────────────────────────────────────────────────────


def test_old_images_come_task_by_task_in_the_order_in_which_they_came():
    source = pictures(40)
    tasks = [task_of(0, {0: 9, 1: 8}, 0, source), task_of(1, {2: 9, 0: 7}, 17, source)]
    memory = Memory(per_class=4, choose="herding")
    for task in tasks:
        memory.keep(task, 0, **seen(task))
    split, positions = memory.split_of(tasks), []
    for task in tasks:
        positions.append(sorted(position for t, position, _ in memory.state_dict()["kept"] if t == task.index))
        assert memory.of(task).indices.tolist() == task.train.indices[positions[-1]].tolist()
    assert [len(own) for own in positions] == [6, 6] and split.images is source
    parts = [task.train.take(np.array(own)) for task, own in zip(tasks, positions, strict=True)]
    assert split.indices.tolist() == [index for part in parts for index in part.indices.tolist()]
    assert split.columns.tolist() == [column for part in parts for column in part.columns.tolist()]
    assert [origin.split for origin in split.origins] == [task.train for task in tasks]
    assert [origin.positions.tolist() for origin in split.origins] == positions


def test_a_memory_that_has_kept_nothing_gives_no_image():
    task = task_of(0, {0: 9, 1: 8})
    assert len(Memory(per_class=4).of(task)) == len(Memory(per_class=4).split_of([task])) == 0


# ── what it remembers ────────────────────────────────────────────────────────────────────────────────


def whole_numbers(value):
    if isinstance(value, dict):
        return all(isinstance(name, str) and whole_numbers(part) for name, part in value.items())
    return all(map(whole_numbers, value)) if isinstance(value, list) else type(value) is int


@pytest.mark.parametrize("choose", CHOICES)
def test_its_state_is_whole_numbers_and_a_memory_goes_on_from_it(choose):
    tasks = [task_of(0, {0: 9, 1: 8}), task_of(1, {2: 9, 0: 7}), task_of(2, {3: 5, 2: 9})]
    whole, before = Memory(total=16, choose=choose), Memory(total=16, choose=choose)
    for task in tasks:
        whole.keep(task, 5, **seen(task))
    for task in tasks[:2]:
        before.keep(task, 5, **seen(task))
    state = before.state_dict()
    assert whole_numbers(state) and len(state["kept"]) == before.images > 0
    after = Memory(total=16, choose=choose)
    after.load_state_dict(json.loads(json.dumps(state)))
    assert after.state_dict() == state
    after.keep(tasks[2], 5, **seen(tasks[2]))
    assert after.state_dict() == whole.state_dict()
