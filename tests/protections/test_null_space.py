"""The null space of what old images look at: B 4 images, H 2 heads, N 7 tokens, M 5, D 6, d 3, two blocks."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lamina.backbones.splice import Probe
from lamina.errors import ConfigError, ShapeError, UnsupportedBackbone
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.pool import PromptPool
from lamina.protections.null_space import NullSpace
from lamina.protections.projector import Blend, Spectrum
from lamina.protections.spectrum import Cut, nullity

CODE = Cut(knee="code")
FULL = Blend()


class Block:
    heads = 2

    def __init__(self, generator):
        self.key_weight = torch.randn(6, 6, generator=generator)
        self.first_norm = torch.nn.LayerNorm(6, eps=1e-3)
        self.first_norm.weight.data = torch.rand(6, generator=generator) + 0.2


class FakeTower:
    """Two blocks with key weights; all that the protection asks of a tower."""

    width = 6

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self._blocks = [Block(generator), Block(generator)]

    def blocks(self):
        return self._blocks


def probe(tower, layer, images, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(images, 2, 7, 3, generator=generator).to(dtype)
    weights = torch.randn(images, 2, 7, 5, generator=generator).to(dtype).softmax(-1)
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


def protection(tower, layers=range(2), cut=CODE, channels=FULL, tokens=FULL, normed=False, **options):
    prompts = DeepPrompts(layers, 5, 6, normed=normed)
    return NullSpace(tower, prompts, cut=cut, channels=channels, tokens=tokens, **options)


def both(**values):
    """The same blend of channels and of tokens."""
    return {"channels": Blend(**values), "tokens": Blend(**values)}


def maps(null_space, layer=0):
    """Left and right factor of a block's projection."""
    projection = null_space.projections()[null_space.prompts.value(layer)]
    return projection.left, projection.right


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


def apart(null_space, other):
    """How far two second moments of block 0 are apart, relative to their norms: the larger of both."""
    pairs = [(found.channels(0), found.attention[0]) for found in (null_space, other)]
    return max(float((one - two).norm() / one.norm()) for one, two in zip(*pairs, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("batches", [[100, 100, 50], [1] * 250], ids=["three", "one by one"])
def test_the_split_into_batches_does_not_matter(tower, dtype, bound, batches):
    seen, ends = probe(tower, 0, 250, dtype=dtype), torch.tensor(batches).cumsum(0).tolist()
    parts = [some(seen, end - count, end) for end, count in zip(ends, batches, strict=True)]
    assert apart(looked(protection(tower), seen), looked(protection(tower), *parts)) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_order_of_images_does_not_matter(tower, dtype, bound):
    seen = probe(tower, 0, 250, dtype=dtype)
    backwards = [some(seen, end - 50, end) for end in range(250, 0, -50)]
    shuffled = Probe(
        0, seen.inputs, *(rows[torch.randperm(250)] for rows in (seen.queries, seen.to_prompts)), seen.key_weight
    )
    whole = looked(protection(tower), seen)
    assert max(apart(whole, looked(protection(tower), *other)) for other in (backwards, [shuffled])) <= bound


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


# ── what becomes of the sums ─────────────────────────────────────────────────────────────────────────


def test_channels_are_projected_on_the_right_and_tokens_on_the_left_each_by_a_blend_of_its_own(tower):
    blends = {"channels": Blend(eta=0.9), "tokens": Blend(eta=0.5, normalize=False)}
    null_space = looked(protection(tower, **blends), probe(tower, 0, 4))
    left, right = maps(null_space)
    for found, blend, moment in (
        (left, blends["tokens"], null_space.attention[0]),
        (right, blends["channels"], null_space.channels(0)),
    ):
        torch.testing.assert_close(found, blend(Spectrum.of(moment).free(CODE)).float(), rtol=1e-6, atol=1e-6)


def test_the_cut_is_the_one_that_was_asked_for(tower):
    for cut, free in ((Cut(knee="energy", kept=0.0), 6), (Cut(knee="energy", kept=1.0), 0), (None, 0)):
        null_space = looked(protection(tower, cut=cut, **both(normalize=False)), probe(tower, 0, 4))
        assert float(maps(null_space)[1].trace()) == pytest.approx(free, abs=1e-5)


def test_a_side_without_a_blend_lets_everything_through(tower):
    for name, place in (("tokens", 0), ("channels", 1)):
        found = maps(looked(protection(tower, **{name: None}), probe(tower, 0, 4)))
        assert found[place] is None and found[1 - place] is not None


def test_eta_zero_is_the_identity(tower):
    null_space = looked(protection(tower, **both(eta=0.0)), probe(tower, 0, 4))
    assert [torch.equal(found, torch.eye(len(found))) for found in maps(null_space)] == [True, True]


def test_where_no_tokens_are_free_steps_stop_unless_channels_alone_may_protect(tower):
    """The attention to 5 tokens has full rank, that of queries confined to one direction a head has not."""
    seen = probe(tower, 0, 4, dtype=torch.float64)
    flat = seen.queries.clone()
    flat[..., 1:] = 0
    seen = Probe(0, seen.inputs, flat, seen.to_prompts, seen.key_weight)
    exact = {"cut": Cut(knee="energy", kept=1.0), **both(normalize=False)}
    left, right = maps(looked(protection(tower, **exact), seen))
    assert not left.any() and float(right.trace()) == pytest.approx(4)
    alone = looked(protection(tower, **exact, right_alone=True), seen)
    assert maps(alone)[0] is None and torch.equal(maps(alone)[1], right)
    alone.cut = None  # nothing may move at all
    assert not maps(alone)[0].any() and not maps(alone)[1].any()
    some_free = looked(protection(tower, right_alone=True), seen)
    assert maps(some_free)[0] is not None


# ── what a norm does to prompts ──────────────────────────────────────────────────────────────────────


def as_the_norm_has_it(null_space, tower, layer):
    """Second moments (6, 6) of `Q Wk diag(a)` and (5, 5) of `S diag(1 / s)`, from their definition."""
    norm, prompt = tower.blocks()[layer].first_norm, null_space.prompts.value(layer).detach().double()
    deviation = (prompt.var(-1, unbiased=False) + norm.eps).sqrt()
    weight, scale = torch.diag(norm.weight.detach().double()), torch.diag(1 / deviation)
    return weight @ null_space.channels(layer) @ weight, scale @ null_space.attention[layer] @ scale


def test_the_affine_correction_counts_in_the_weight_and_the_deviations_of_the_norm(tower):
    null_space = looked(protection(tower, ln_correction="affine"), probe(tower, 0, 4), probe(tower, 1, 4))
    for layer in range(2):
        channels, tokens = as_the_norm_has_it(null_space, tower, layer)
        found = null_space.spectra(layer)
        for side, moment in (("channels", channels), ("tokens", tokens)):
            values, basis = found[side]
            torch.testing.assert_close(basis * values @ basis.T, moment, rtol=1e-9, atol=1e-9)
        assert {room.layer for room in null_space.room()} == {0, 1}
    plain = looked(protection(tower), probe(tower, 0, 4))
    assert not torch.allclose(plain.spectra(0)["channels"].values, null_space.spectra(0)["channels"].values, rtol=0.1)


def test_a_norm_without_weight_is_corrected_for_its_deviations_alone(tower):
    tower.blocks()[0].first_norm.weight = None
    null_space = looked(protection(tower, ln_correction="affine"), probe(tower, 0, 4))
    expected = torch.linalg.eigvalsh(null_space.channels(0))
    torch.testing.assert_close(null_space.spectra(0)["channels"].values, expected, rtol=1e-9, atol=1e-9)


def test_the_norm_is_linearised_where_the_last_task_ended_whatever_the_prompts_do_afterwards(tower):
    """A run that resumes in the middle of a task makes the projections that an unbroken one has."""
    null_space = looked(protection(tower, ln_correction="affine"), probe(tower, 0, 4), probe(tower, 1, 4))
    before = maps(null_space, 1)
    null_space.prompts.value(1).data *= torch.tensor([[1.0], [5.0], [0.2], [3.0], [1.0]])
    again = protection(tower, ln_correction="affine")
    again.prompts.load_state_dict(null_space.prompts.state_dict())
    again.load_state_dict(null_space.state_dict())
    for same in (null_space, again):
        assert all(torch.equal(one, other) for one, other in zip(maps(same, 1), before, strict=True))
    looked(null_space, probe(tower, 0, 4), probe(tower, 1, 4))
    assert not torch.allclose(maps(null_space, 1)[0], before[0], atol=1e-3)


def test_a_memory_from_before_the_correction_was_asked_for_is_completed(tower):
    plain = looked(protection(tower), probe(tower, 0, 4), probe(tower, 1, 4))
    assert "deviations" not in plain.state_dict()
    later = protection(tower, ln_correction="affine")
    later.prompts.load_state_dict(plain.prompts.state_dict())
    later.load_state_dict(plain.state_dict())
    want = looked(protection(tower, ln_correction="affine"), probe(tower, 0, 4), probe(tower, 1, 4))
    want.prompts.load_state_dict(plain.prompts.state_dict())
    want._linearise()
    assert torch.equal(maps(later)[0], maps(want)[0])


@pytest.mark.parametrize("ln_correction", ["none", "affine"])
def test_centring_counts_in_that_the_norm_takes_the_mean_away(tower, ln_correction):
    null_space = looked(protection(tower, ln_correction=ln_correction, center=True), probe(tower, 0, 4))
    moment = null_space.channels(0) if ln_correction == "none" else as_the_norm_has_it(null_space, tower, 0)[0]
    centring = torch.eye(6, dtype=torch.float64) - 1 / 6
    values, basis = null_space.spectra(0)["channels"]
    torch.testing.assert_close(basis * values @ basis.T, centring @ moment @ centring, rtol=1e-9, atol=1e-9)
    assert basis[:, 0].std() < 1e-6 and values[0] == pytest.approx(0, abs=1e-9)  # a shift of all channels is free


@pytest.mark.parametrize("options", [{"ln_correction": "affine"}, {"center": True}])
def test_prompts_after_the_norm_need_no_correction_for_it(tower, options):
    with pytest.raises(ConfigError) as error:
        protection(tower, normed=True, **options)
    assert str(error.value) == (
        "ln_correction and center are for prompts that a norm changes; these enter after it, so leave both out"
    )


def test_another_kind_of_norm_cannot_be_corrected_for(tower):
    tower.blocks()[1].first_norm = None
    with pytest.raises(UnsupportedBackbone) as error:
        looked(protection(tower, ln_correction="affine"), probe(tower, 0, 4), probe(tower, 1, 4))
    assert str(error.value) == (
        'the first norm of block 1 is no layer norm, so lamina cannot correct for it; leave ln_correction at "none"'
    )


# ── what is gathered ─────────────────────────────────────────────────────────────────────────────────


def test_means_of_batches_weigh_a_small_batch_as_much_as_a_large_one(tower):
    seen = probe(tower, 0, 4)
    null_space = looked(protection(tower, batch_means=True), some(seen, 0, 1), some(seen, 1, 4))
    parts = [looked(protection(tower), some(seen, *ends)) for ends in ((0, 1), (1, 4))]
    rows = [1 * 2 * 7, 3 * 2 * 7]
    tokens, channels = (
        sum(sums(part) / count for part, count in zip(parts, rows, strict=True))
        for sums in (lambda part: part.attention[0], lambda part: part.channels(0))
    )
    torch.testing.assert_close(null_space.attention[0], tokens)
    torch.testing.assert_close(null_space.channels(0), channels)
    assert null_space.rows == 2


def test_a_memory_of_batch_means_is_felt_as_means_over_rows_are(tower):
    seen = [probe(tower, 0, 4), probe(tower, 1, 4, seed=3)]
    felt = []
    for batch_means in (False, True):
        torch.manual_seed(2)
        null_space = looked(protection(tower, batch_means=batch_means), *seen)
        before = moved_by(null_space, {0: torch.randn(5, 6), 1: torch.randn(5, 6)})
        felt.append([found.moved for found in null_space.felt(before, null_space.state_dict())])
    assert felt[0] == pytest.approx(felt[1], rel=1e-6)


def test_probes_in_double_precision_lose_nothing(tower):
    seen = probe(tower, 0, 4, dtype=torch.float64)
    null_space = looked(protection(tower), seen)
    rows, queries = seen.to_prompts.flatten(0, 2), seen.queries.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(null_space.attention[0], rows.T @ rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(null_space.queries[0], queries.mT @ queries, rtol=0, atol=1e-12)
    split = looked(protection(tower), some(seen, 0, 3), some(seen, 3, 4))
    torch.testing.assert_close(split.queries[0], null_space.queries[0], rtol=1e-12, atol=0)


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
        ("deviations", {0: torch.ones(5), 1: torch.ones(6)}, "deviations of block 1 must have shape (5,); got (6,)"),
        ("deviations", {0: torch.ones(5), 1: torch.zeros(5)}, "deviations must be above 0"),
        ("queries", {0: torch.ones(2, 3, 3)}, "queries must be there for blocks [0, 1]; got [0]"),
        ("queries", {0: torch.ones(2, 3, 3), 1: torch.ones(2, 3, 4)}, "queries of block 1 must have shape (2, 3, 3)"),
        ("attention", {0: torch.ones(6, 6), 1: torch.ones(5, 5)}, "attention of block 0 must have shape (5, 5)"),
    ],
)
def test_sums_that_do_not_fit_are_refused(tower, name, value, message):
    null_space = looked(protection(tower, ln_correction="affine"), probe(tower, 0, 4), probe(tower, 1, 4))
    with pytest.raises(ShapeError) as error:
        protection(tower, ln_correction="affine").load_state_dict({**null_space.state_dict(), name: value})
    assert str(error.value).startswith(message)


# ── what old images feel of a move ───────────────────────────────────────────────────────────────────


def normalised(prompt):
    return F.layer_norm(prompt.detach().double(), (6,))


def moved_by(null_space, moves):
    """Move the prompts; return them as they were."""
    before = DeepPrompts(null_space.prompts.layers, 5, 6, normed=null_space.prompts.normed)
    for layer, move in moves.items():
        before.value(layer).data.copy_(null_space.prompts.value(layer))
        null_space.prompts.value(layer).data += move
    return before


@pytest.mark.parametrize("normed", [False, True])
def test_what_images_feel_is_the_sum_over_rows_that_the_docstring_defines(tower, normed):
    """Prompts that enter after the norm are felt as they are."""
    seen = [probe(tower, 0, 4), probe(tower, 1, 4, seed=3)]
    null_space = looked(protection(tower, normed=normed), *seen)
    attended = (lambda prompt: prompt.detach().double()) if normed else normalised
    before = moved_by(null_space, {0: torch.randn(5, 6), 1: 0.1 * torch.randn(5, 6)})
    for felt, block in zip(null_space.felt(before, null_space.state_dict()), seen, strict=True):
        new = attended(null_space.prompts.value(felt.layer))
        move = new - attended(before.value(felt.layer))
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
    null_space = looked(protection(tower, cut=Cut(knee="paper")), probe(tower, 0, 4), probe(tower, 1, 4))
    rooms = null_space.room()
    assert [(room.layer, room.what, room.size) for room in rooms] == [
        (0, "channels", 6), (0, "tokens", 5), (1, "channels", 6), (1, "tokens", 5)
    ]  # fmt: skip
    for room in rooms:
        moment = null_space.channels(room.layer) if room.what == "channels" else null_space.attention[room.layer]
        values = torch.linalg.eigvalsh(moment).flip(0)
        assert room.size - room.used == nullity(values, Cut(knee="paper"))
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


# ── prompts of a pool ────────────────────────────────────────────────────────────────────────────────

#: 4 images take 2 prompts each, in an order of their own; nobody takes prompt 1
CHOSEN = torch.tensor([[3, 0], [0, 2], [2, 3], [3, 2]])


def pooled(tower, size=4, **options):
    """Prompts of 3 tokens that enter block 1; the class token has a place there."""
    pool = PromptPool(size, 2, 3, 6, 5, position=torch.linspace(-2, 3, 6), entry=1)
    return NullSpace(tower, pool, **{"cut": CODE, "channels": FULL, "tokens": FULL, **options})


def pool_probe(tower, images=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(images, 2, 7, 3, generator=generator).to(dtype)
    weights = torch.randn(images, 2, 7, 6, generator=generator).to(dtype).softmax(-1)
    return Probe(1, torch.zeros(images, 7, 6), queries, weights, tower.blocks()[1].key_weight, CHOSEN[:images])


def by_row(seen, size=4):
    """The attention (B, H, N, size * 3) to all rows of a pool: a slot's is that to the prompt which fills it."""
    out = torch.zeros(*seen.to_prompts.shape[:3], 3 * size, dtype=torch.float64)
    for image, taken in enumerate(seen.chosen.tolist()):
        for place, prompt in enumerate(taken):
            out[image, ..., 3 * prompt : 3 * prompt + 3] = seen.to_prompts[image, ..., 3 * place : 3 * place + 3]
    return out


def gram(rows):
    rows = rows.double().flatten(0, -2)
    return rows.T @ rows


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_attention_to_a_pool_is_that_to_the_prompts_which_stand_in_the_slots(tower, dtype, bound):
    seen = pool_probe(tower, dtype=dtype)
    found = looked(pooled(tower), seen, probe(tower, 0, 4))
    expected = gram(by_row(seen))
    assert expected[3:6].count_nonzero() == 0 and expected.diagonal().count_nonzero() == 9
    assert found.attention[1].shape == (12, 12) and list(found.attention) == [1]
    assert (found.attention[1] - expected).norm() <= bound * expected.norm()
    assert found.rows == 4 * 2 * 7


def test_the_split_into_batches_and_processes_does_not_matter_to_a_pool_and_nor_does_the_order_of_slots(tower):
    seen = pool_probe(tower, dtype=torch.float64)
    swapped = torch.cat([seen.to_prompts[..., 3:], seen.to_prompts[..., :3]], dim=-1)
    slots = Probe(1, seen.inputs, seen.queries, swapped, seen.key_weight, CHOSEN.flip(1))
    parts = [
        Probe(1, seen.inputs, seen.queries[i : i + 2], seen.to_prompts[i : i + 2], seen.key_weight, CHOSEN[i : i + 2])
        for i in (2, 0)
    ]
    whole = looked(pooled(tower), seen).attention[1]
    apart = [looked(pooled(tower), part) for part in parts]
    for other in (looked(pooled(tower), slots), looked(pooled(tower), *parts)):
        assert (other.attention[1] - whole).norm() <= 1e-12 * whole.norm()
    assert (sum(one.attention[1] for one in apart) - whole).norm() <= 1e-12 * whole.norm()


def test_prompts_that_no_image_took_move_as_they_like_and_lend_nothing_to_others(tower):
    exact = {"cut": Cut(knee="energy", kept=1.0), "tokens": Blend(normalize=False), "channels": None}
    null_space = looked(pooled(tower, **exact), pool_probe(tower, dtype=torch.float64))
    projection = null_space.projections()[null_space.prompts.values]
    step = torch.randn(4, 3, 6)
    moved = projection(step)
    torch.testing.assert_close(moved[1], step[1], rtol=0, atol=1e-6)
    assert moved[[0, 2, 3]].abs().max() < 1e-6  # 56 rows of attention have full rank in what they took


def test_a_step_of_a_pool_changes_no_sum_of_values_of_images_that_have_few_tokens(tower):
    """One image of 2 heads and 2 tokens looks at 6 rows: 4 conditions, so 2 directions of its own prompts are free."""
    seen = pool_probe(tower, dtype=torch.float64)
    one = Probe(1, seen.inputs, seen.queries[:1, :, :2], seen.to_prompts[:1, :, :2], seen.key_weight, CHOSEN[:1])
    exact = {"cut": Cut(knee="energy", kept=1.0), **both(normalize=False)}
    null_space = looked(pooled(tower, **exact), one)
    null_space.prompts.double()
    projection = null_space.projections()[null_space.prompts.values]
    assert float(projection.left.trace()) == pytest.approx(6 + 2)
    moved = projection(torch.randn(4, 3, 6, dtype=torch.float64))
    assert (by_row(one) @ moved.flatten(0, 1)).norm() <= 1e-10 < moved[CHOSEN[0]].norm()


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that anything makes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.count = max(self.count, out.numel())
        return out


def test_a_large_pool_is_looked_at_without_a_column_for_each_of_its_rows(tower):
    """By row, 4 images would be 4 * 2 * 7 rows of 33; the sum of their products is 33 * 33."""
    seen, null_space = pool_probe(tower), pooled(tower, size=11)
    null_space.begin_look()
    with Largest() as largest:
        null_space.see(seen)
    assert largest.count == 33 * 33 < by_row(seen, size=11).numel()


def test_the_deviations_of_a_pools_tokens_are_those_with_which_they_enter(tower):
    null_space = looked(pooled(tower, ln_correction="affine"), pool_probe(tower))
    entering = (null_space.prompts.values + torch.linspace(-2, 3, 6)).detach().double().flatten(0, 1)
    expected = (entering.var(-1, unbiased=False) + 1e-3).sqrt()
    torch.testing.assert_close(null_space.deviations[1], expected, rtol=1e-6, atol=0)
    scale = torch.diag(1 / expected)
    values, basis = null_space.spectra(1)["tokens"]
    attention = scale @ null_space.attention[1] @ scale
    torch.testing.assert_close(basis * values @ basis.T, attention, rtol=1e-6, atol=1e-9)


def test_what_images_feel_of_a_move_of_a_pool_is_not_said(tower):
    null_space = looked(pooled(tower), pool_probe(tower))
    assert null_space.felt(null_space.prompts, null_space.state_dict()) == []


def test_room_in_a_pool_counts_all_its_rows_at_the_block_that_prompts_enter(tower):
    rooms = looked(pooled(tower), pool_probe(tower)).room()
    assert [(room.layer, room.what, room.size) for room in rooms] == [(1, "channels", 6), (1, "tokens", 12)]


def test_a_pool_comes_back_from_a_checkpoint_and_another_one_does_not_fit(tower):
    null_space = looked(pooled(tower), pool_probe(tower))
    again = pooled(tower)
    again.load_state_dict(null_space.state_dict())
    assert torch.equal(again.attention[1], null_space.attention[1]) and again.rows == null_space.rows
    with pytest.raises(ShapeError) as error:
        pooled(tower, size=5).load_state_dict(null_space.state_dict())
    assert str(error.value) == "attention of block 1 must have shape (15, 15); got (12, 12)"
