"""The null space of what old images look at: B 4 images, H 2 heads, N 7 tokens, M 5, D 6, d 3, two blocks."""

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.tower import Probe
from lamina.errors import ShapeError
from lamina.prompts.deep import DeepPrompts
from lamina.protections.null_space import NullSpace
from lamina.protections.spectrum import nullity


class Block:
    heads = 2

    def __init__(self, generator):
        self.key_weight = torch.randn(6, 6, generator=generator)


class FakeTower:
    """Two blocks with key weights; all that the protection asks of a tower."""

    width = 6

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self._blocks = [Block(generator), Block(generator)]

    def blocks(self):
        return self._blocks


def probe(tower, layer, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(images, 2, 7, 3, generator=generator)
    weights = torch.randn(images, 2, 7, 5, generator=generator).softmax(-1)
    return Probe(layer, torch.zeros(images, 7, 6), queries, weights, tower.blocks()[layer].key_weight)


def some(probe, start, stop):
    return Probe(probe.layer, probe.inputs, probe.queries[start:stop], probe.to_prompts[start:stop], probe.key_weight)


def looked(null_space, *probes):
    null_space.begin_look()
    for seen in probes:
        null_space.see(seen)
    null_space.end_look(lambda total: total)
    return null_space


@pytest.fixture
def tower():
    return FakeTower()


def protection(tower, layers=range(2), eta=1.0, knee="code"):
    return NullSpace(tower, DeepPrompts(layers, 5, 6), eta=eta, knee=knee)


def test_there_is_nothing_to_project_before_a_task_is_over(tower):
    assert protection(tower).projections() == {}


def test_the_grams_expand_to_the_second_moment_of_what_the_sheet_defines(tower):
    """Rows (image, head, token): q Wk of the head, without scaling; and attention to the prompts (A9)."""
    seen = probe(tower, 1, 4)
    null_space = looked(protection(tower), seen)
    channels, tokens = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    for image in range(4):
        for head in range(2):
            for token in range(7):
                row = seen.queries[image, head, token].double() @ seen.key_weight.double()[3 * head : 3 * head + 3]
                channels += torch.outer(row, row)
                column = seen.to_prompts[image, head, token].double()
                tokens += torch.outer(column, column)
    torch.testing.assert_close(null_space.channels(1), channels, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(null_space.attention[1], tokens, rtol=1e-5, atol=1e-5)


def test_the_split_into_batches_does_not_matter(tower):
    seen = probe(tower, 0, 4)
    whole = looked(protection(tower), seen)
    parts = looked(protection(tower), some(seen, 0, 1), some(seen, 1, 4))
    torch.testing.assert_close(whole.channels(0), parts.channels(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.attention[0], parts.attention[0], rtol=1e-5, atol=1e-5)


def test_tasks_add_up(tower):
    first, second = probe(tower, 0, 4, seed=1), probe(tower, 0, 3, seed=2)
    both = looked(looked(protection(tower), first), second)
    expected = looked(protection(tower), first).channels(0) + looked(protection(tower), second).channels(0)
    torch.testing.assert_close(both.channels(0), expected)


def test_a_look_that_was_broken_off_leaves_nothing(tower):
    seen = probe(tower, 0, 4)
    null_space = protection(tower)
    null_space.begin_look()
    null_space.see(seen)
    looked(null_space, seen)
    torch.testing.assert_close(null_space.attention[0], looked(protection(tower), seen).attention[0])


def test_processes_add_up(tower):
    null_space = protection(tower)
    null_space.begin_look()
    null_space.see(probe(tower, 0, 4))
    null_space.end_look(lambda total: 3 * total)
    alone = looked(protection(tower), probe(tower, 0, 4))
    torch.testing.assert_close(null_space.channels(0), 3 * alone.channels(0))
    torch.testing.assert_close(null_space.attention[0], 3 * alone.attention[0])


def test_blocks_without_prompts_are_not_kept(tower):
    null_space = looked(protection(tower, layers=[1]), probe(tower, 0, 4), probe(tower, 1, 4))
    assert list(null_space.queries) == [1]


def gains(matrix):
    return torch.linalg.eigvalsh(matrix.double())


@pytest.mark.parametrize("eta", [0.0, 0.6, 0.97, 1.0])
def test_a_blend_has_two_gains(tower, eta):
    """eta / sqrt(R) + 1 - eta on the R free directions, 1 - eta on the others (A8-6)."""
    null_space = looked(protection(tower, eta=eta), probe(tower, 0, 4))
    for blend in vars(null_space.projections()[null_space.prompts.value(0)]).values():
        found = gains(blend)
        free = int((found > 1 - eta + 1e-6).sum()) if eta else len(blend)
        expected = torch.full((len(blend),), 1 - eta, dtype=torch.float64)
        expected[len(blend) - free :] += eta / free**0.5
        torch.testing.assert_close(found, expected if eta else torch.ones_like(found), rtol=0, atol=1e-6)
        assert free > 0


def test_eta_zero_is_the_identity(tower):
    null_space = looked(protection(tower, eta=0.0), probe(tower, 0, 4))
    for blend in vars(null_space.projections()[null_space.prompts.value(0)]).values():
        torch.testing.assert_close(blend, torch.eye(len(blend)))


def test_used_directions_are_shut_and_free_ones_open(tower):
    """Old images whose queries fill two directions: steps along them are stopped, others pass."""
    seen = probe(tower, 0, 4)
    plane = torch.zeros_like(seen.queries)
    plane[..., 0] = seen.queries[..., 0] * 100
    null_space = looked(protection(tower), Probe(0, seen.inputs, plane, seen.to_prompts, seen.key_weight))
    right = null_space.projections()[null_space.prompts.value(0)].right
    used = seen.key_weight[[0, 3]]  # the first query channel of each head looks along these rows
    assert (used @ right).norm() < 1e-3 * used.norm()
    assert right.norm() == pytest.approx(1.0, abs=1e-5)


def test_what_is_remembered_is_exactly_symmetric(tower):
    null_space = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4))
    for sums in [*null_space.queries.values(), *null_space.attention.values()]:
        assert torch.equal(sums, sums.mT)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("queries", {0: torch.ones(2, 3, 3)}, "queries must be there for blocks [0, 1]; got [0]"),
        ("queries", {0: torch.ones(2, 3, 3), 1: torch.ones(2, 3, 4)}, "queries of block 1 must have shape (2, 3, 3)"),
        ("attention", {0: torch.ones(6, 6), 1: torch.ones(5, 5)}, "attention of block 0 must have shape (5, 5)"),
    ],
)
def test_sums_that_do_not_fit_are_refused(tower, name, value, message):
    state = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4)).state_dict()
    with pytest.raises(ShapeError) as error:
        protection(tower).load_state_dict({**state, name: value})
    assert str(error.value).startswith(message)


# ── what old images feel of a move ───────────────────────────────────────────────────────────────────


def normalised(prompt):
    return F.layer_norm(prompt.detach().double(), (6,))


def moved_by(null_space, moves):
    """Move the prompts; return them as they were."""
    before = DeepPrompts(null_space.prompts.layers, 5, 6)
    for layer, move in moves.items():
        before.value(layer).data.copy_(null_space.prompts.value(layer))
        null_space.prompts.value(layer).data += move
    return before


def test_what_images_feel_is_the_sum_over_rows_that_the_docstring_defines(tower):
    seen = [probe(tower, 0, 4), probe(tower, 1, 4, seed=3)]
    null_space = looked(protection(tower), *seen)
    before = moved_by(null_space, {0: torch.randn(5, 6), 1: 0.1 * torch.randn(5, 6)})
    for felt, block in zip(null_space.felt(before, null_space.state_dict()), seen, strict=True):
        new = normalised(null_space.prompts.value(felt.layer))
        move = new - normalised(before.value(felt.layer))
        weights = block.to_prompts.double().flatten(0, 2)  # rows: image, head, token
        keys = (move @ block.key_weight.double().T).unflatten(-1, (2, 3))  # (M, H, d)
        logits = torch.einsum("bhnd,mhd->bhnm", block.queries.double(), keys).flatten(0, 2) / 3**0.5
        values = (weights @ move).square().sum(-1).mean()
        swings = (weights.square().mean(0) * logits.square().mean(0) * new.square().sum(-1)).sum()
        assert felt.moved == pytest.approx(float(values + swings), rel=1e-5)
        assert felt.step == pytest.approx(float(move.norm()), rel=1e-9)


def test_images_feel_nothing_where_nothing_moved(tower):
    null_space = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4))
    before = moved_by(null_space, {0: torch.zeros(5, 6), 1: torch.ones(5, 6)})  # the norm takes a shift away
    for felt in null_space.felt(before, null_space.state_dict()):
        assert felt.moved < 1e-9 and felt.step < 1e-5


def test_no_move_of_that_length_is_felt_more_than_the_worst(tower):
    null_space = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4))
    for scale in (0.01, 0.3, 2.0):
        before = moved_by(null_space, {0: scale * torch.randn(5, 6), 1: scale * torch.randn(5, 6)})
        assert all(0 < felt.moved <= felt.worst for felt in null_space.felt(before, null_space.state_dict()))


def test_what_came_since_is_what_the_newer_images_alone_would_leave(tower):
    null_space = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4))
    before = null_space.state_dict()
    newer = [probe(tower, 0, 3, seed=8), probe(tower, 1, 3, seed=9)]
    looked(null_space, *newer)
    alone = looked(protection(tower), *newer).state_dict()
    since = null_space.since(before)
    assert since["rows"] == alone["rows"] == 3 * 2 * 7
    for name in ("queries", "attention"):
        for layer in range(2):
            torch.testing.assert_close(since[name][layer], alone[name][layer], rtol=0, atol=1e-9)


def test_room_counts_the_directions_that_old_images_use(tower):
    null_space = looked(protection(tower, knee="paper"), probe(tower, 0, 4), probe(tower, 1, 4))
    rooms = null_space.room()
    assert [(room.layer, room.what, room.size) for room in rooms] == [
        (0, "channels", 6), (0, "tokens", 5), (1, "channels", 6), (1, "tokens", 5)
    ]  # fmt: skip
    for room in rooms:
        moment = null_space.channels(room.layer) if room.what == "channels" else null_space.attention[room.layer]
        values = torch.linalg.eigvalsh(moment).flip(0)
        assert room.size - room.used == nullity(values, "paper")
        assert room.kept == pytest.approx(float(values[: room.used].sum() / values.sum()), rel=1e-9)


def test_there_is_no_room_to_speak_of_before_a_task_is_over(tower):
    assert protection(tower).room() == []


def test_it_comes_back_from_a_checkpoint(tower):
    null_space = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4))
    again = protection(tower)
    again.load_state_dict(null_space.state_dict())
    assert again.rows == null_space.rows == 4 * 2 * 7
    for layer in range(2):
        assert torch.equal(again.channels(layer), null_space.channels(layer))
        ours, theirs = (p.projections()[p.prompts.value(layer)] for p in (again, null_space))
        assert torch.equal(ours.left, theirs.left) and torch.equal(ours.right, theirs.right)
