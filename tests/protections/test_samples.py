"""Directions among images: 24 of them a task, N 17 tokens, D 24 channels, H 2, L 3 blocks, a pool of 5 x 3; float64.

`released` is the procedure written out from dense matrices.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.errors import ConfigError, ShapeError
from lamina.heads.linear import LinearHead
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import Batch, PromptedModel
from lamina.prompts.pool import PromptPool
from lamina.protections.base import Protection, Room
from lamina.protections.samples import SampleSubspace, extended, scores
from lamina.protections.subspace import Subspace, keys_alone
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

F64 = torch.float64


def alone(total):
    return total


@pytest.fixture
def model():
    torch.manual_seed(1)
    return PromptedModel(make_tiny_vit(F64), PromptPool(5, 2, 3, 24, 24), LinearHead(24)).eval()


def images(task, count=24):
    """Mixtures of six pictures, the later ones fainter, and noise."""
    generator = torch.Generator().manual_seed(task)
    pictures = torch.randn(6, 3, 32, 32, generator=generator, dtype=F64)
    shares = torch.randn(count, 6, generator=generator, dtype=F64) * torch.tensor([5.0, 4, 3, 2, 1.5, 1], dtype=F64)
    noise = torch.randn(count, 3, 32, 32, generator=generator, dtype=F64)
    return (shares @ pictures.flatten(1)).unflatten(1, (3, 32, 32)) + 0.1 * noise


def batches(pixels, size=10):
    return [Batch(part, torch.zeros(len(part), dtype=torch.long)) for part in pixels.split(size)]


def protection(model, *, features="tokens", share=0.9, components=9, layers=(0,), pool=True, **options):
    own = (lambda: model.prompts.values) if pool else None
    prompt = model.prompts.values
    hold = options.pop("hold", lambda maps: {prompt: maps[layers[0]]})
    return SampleSubspace(
        list(layers), hold, features=features, width=24, share=share, components=components, pool=own, **options
    )


def measured(subspace, model, *tasks):
    for task in tasks:
        subspace.measure(model, batches(images(task)), alone)
        with torch.no_grad():
            model.prompts.values.add_(0.3 * torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(task + 50)))
    return subspace


# ── the released procedure, from dense matrices ──────────────────────────────────────────────────────


def dense_scores(rows, components):
    centred = rows - rows.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    table = (left * values)[:, :components]
    for column in table.T:
        if column[column.abs().argmax()] < 0:
            column.neg_()
    return table


def released(used, table, share):
    """The first time, directions before the one that reaches the share; later, those up to and with it."""
    gram = table @ table.T
    energy = torch.linalg.svdvals(gram).square().sum()
    if used is None:
        left, values, _ = torch.linalg.svd(gram)
        return left[:, : int(((values**2 / energy).cumsum(0) < share).sum())]
    left, values, _ = torch.linalg.svd(gram - used @ used.T @ gram)
    captured, count = 1 - (values**2).sum() / energy, 0
    while captured < share:
        captured = captured + values[count] ** 2 / energy
        count += 1
    return torch.cat([used, left[:, :count]], dim=1)[:, : len(gram)]


def projector(basis):
    return torch.eye(len(basis), dtype=F64) - basis @ basis.T


def patches(model, task):
    """What the patch embedding says, without positions and class token: (24, 16 * 24)."""
    return model.tower.model.patch_embed(images(task)).flatten(1)


def queries(model, task, block):
    """Queries of a block, all heads side by side: (24, 17 * 24)."""
    vit = model.tower.model
    x = vit._pos_embed(vit.patch_embed(images(task)))
    for i in range(block):
        x = vit.blocks[i](x)
    weight, bias = (part.chunk(3)[0] for part in (vit.blocks[block].attn.qkv.weight, vit.blocks[block].attn.qkv.bias))
    return F.linear(vit.blocks[block].norm1(x), weight, bias).flatten(1)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
@torch.no_grad()
def test_patches_and_a_pool_as_it_was_before_the_task_give_the_bases_of_the_released_code(model, share):
    """In the first task the pool has no part; in the third, it is as it was after the second began to be over."""
    subspace, used, pools, ranks = protection(model, share=share), None, [None], []
    for task in range(3):
        table = dense_scores(patches(model, task), 9)
        if pools[-1] is not None:
            table = table + dense_scores(pools[-1].flatten(0, 1).T, 9)
        used = released(used, table, share)
        pools.append(model.prompts.values.detach().clone())
        measured(subspace, model, task)
        (basis,) = subspace.used[0]
        assert basis.shape == used.shape and (projector(basis) - projector(used)).abs().max() <= 1e-6
        ranks.append(basis.shape[1])
    assert ranks[0] < ranks[1] < ranks[2] < 24


@torch.no_grad()
def test_positions_and_the_class_token_have_no_part_whatever_they_are(model):
    """They are the same in all images, so the mean takes them out."""
    expected = measured(protection(model), model, 0).used[0][0]
    model.tower.model.pos_embed.normal_(0, 3)
    model.tower.model.cls_token.normal_(0, 3)
    found = measured(protection(model), model, 0).used[0][0]
    assert expected.shape[1] > 0 and (projector(found) - projector(expected)).abs().max() <= 1e-9


@torch.no_grad()
def test_queries_of_all_heads_give_one_basis_for_each_block(model):
    bare = PromptedModel(model.tower, None, LinearHead(24))
    subspace = protection(model, features="heads", layers=(0, 2), components=50, pool=False)
    used = {0: None, 2: None}
    for task in range(3):
        subspace.measure(bare, batches(images(task)), alone)
        for block in used:
            used[block] = released(used[block], dense_scores(queries(model, task, block), 50), 0.9)
            (basis,) = subspace.used[block]
            assert (projector(basis) - projector(used[block])).abs().max() <= 1e-6
    assert 0 < used[0].shape[1] < 24 and 0 < used[2].shape[1] < 24
    assert (projector(used[0]) - projector(used[2])).abs().max() > 0.1


@torch.no_grad()
def test_features_of_the_frozen_tower_give_the_basis_of_keys(model):
    subspace = protection(model, features="frozen", share=0.97, components=5, pool=False, what="keys")
    table = dense_scores(model.tower(images(0)).features, 5)
    measured(subspace, model, 0)
    expected = released(None, table, 0.97)
    assert 0 < expected.shape[1] < 5
    assert (projector(subspace.used[0][0]) - projector(expected)).abs().max() <= 1e-6


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("columns", "components"), [(40, 9), (40, 3), (9000, 5)])
def test_scores_are_those_of_a_dense_principal_component_analysis(columns, components):
    """9000 columns are more than are centred at once."""
    rows = torch.randn(12, columns, dtype=F64) + 5
    table = scores(rows, components)
    torch.testing.assert_close(table, dense_scores(rows, components), rtol=0, atol=1e-9 * float(table.abs().max()))
    assert all(column[column.abs().argmax()] > 0 for column in table.T)


@pytest.mark.parametrize(("columns", "filled"), [(4, 4), (0, 0)])
def test_components_beyond_the_rank_have_no_scores(columns, filled):
    table = scores(torch.randn(12, columns, dtype=F64), 7)
    assert table.shape == (12, 7) and (table[:, filled:] == 0).all() and (table[:, :filled].norm(dim=0) > 0.1).all()


def test_there_are_no_more_components_than_rows():
    assert scores(torch.randn(6, 40), 50).shape == (6, 6) and scores(torch.randn(6, 40), 50).dtype == F64


# ── bases ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_time_the_direction_that_reaches_the_share_stays_out_and_later_it_comes_in():
    """Energies 16, 9, 4 of 29."""
    gram, empty = torch.diag(torch.tensor([3.0, 4.0, 2.0], dtype=F64)), torch.zeros(3, 0, dtype=F64)
    shares = (0.0, 0.5, 0.56, 0.85, 0.87, 1.0)
    assert [extended(None, gram, share).shape[1] for share in shares] == [0, 0, 1, 1, 2, 2]
    assert [extended(empty, gram, share).shape[1] for share in shares] == [0, 1, 2, 2, 3, 3]
    assert extended(empty, gram, 0.5).abs().tolist() == [[0], [1], [0]]


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_bases_stay_orthonormal_over_twenty_tasks_grow_only_and_hold_the_share_of_each_later_one(share):
    used, grams = None, []
    for task in range(20):
        generator = torch.Generator().manual_seed(task)
        table = torch.randn(12, 3, generator=generator, dtype=F64) * torch.tensor([3.0, 1, task % 3 / 50], dtype=F64)
        grams.append(table @ table.T)
        before, used = used, extended(used, grams[-1], share)
        assert used.shape[1] <= 12 and (used.T @ used - torch.eye(used.shape[1], dtype=F64)).norm() <= 1e-8
        if before is not None:
            assert torch.equal(used[:, : before.shape[1]], before)
            for gram in grams[1:]:
                assert (used.T @ gram).square().sum() >= (share - 1e-9) * gram.square().sum()
            assert torch.equal(extended(used, grams[-1], share), used)
    assert used.shape[1] > 3


def test_what_a_basis_holds_but_for_rounding_adds_nothing_even_if_all_must_be_held():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        used = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=F64)).Q
        table = used @ torch.randn(4, 3, generator=generator, dtype=F64)
        assert torch.equal(extended(used, table @ table.T, 1.0), used)
        assert extended(None, table @ table.T, 1.0).shape[1] <= 3
        assert extended(used[:, :0], table @ table.T, 1.0).shape[1] <= 3


def test_images_that_are_all_alike_use_nothing():
    assert extended(None, torch.zeros(4, 4), 1.0).shape == (4, 0)
    used = torch.eye(4)[:, :1]
    assert torch.equal(extended(used, torch.zeros(4, 4), 1.0), used)


# ── what it is worth ─────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_another_order_of_the_images_gives_another_projector_which_directions_of_features_do_not(model):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    found = []
    for pixels in (images(0), images(0)[order]):
        ours = protection(model, pool=False)
        ours.measure(model, batches(pixels), alone)
        theirs = Subspace([0], lambda maps: {}, features="tokens", width=24, share=0.9)
        model.features(Batch(pixels), tap=theirs.see)
        theirs.end_look(alone)
        found.append((ours.used[0][0], theirs.used[0][0]))
    (ours, theirs), (ours_then, theirs_then) = found
    assert ours.shape == ours_then.shape and 0 < ours.shape[1] < 24
    difference = (ours @ ours.T - ours_then @ ours_then.T).norm() / (ours @ ours.T).norm()
    assert difference > 0.5
    assert (projector(theirs) - projector(theirs_then)).abs().max() <= 1e-10
    assert (projector(ours)[order][:, order] - projector(ours_then)).abs().max() <= 1e-10  # rows change places


@torch.no_grad()
def test_the_map_is_a_projector_out_of_its_directions_and_prefixes_have_it_for_keys_alone(model):
    prefix = nn.Parameter(torch.zeros(1, 2, 3, 24, dtype=F64))
    subspace = protection(model, pool=False, hold=lambda maps: {prefix: keys_alone([maps[0]])})
    assert subspace.projections() == {}
    measured(subspace, model, 0)
    (basis,), right = subspace.used[0], subspace.projections()[prefix].right
    assert right.shape == (1, 2, 24, 24) and torch.equal(right[0, 1], torch.eye(24, dtype=F64))
    torch.testing.assert_close(right[0, 0], projector(basis))
    assert (right[0, 0] @ basis).abs().max() <= 1e-10 and right[0, 0, :12, 12:].abs().max() > 1e-3


@torch.no_grad()
def test_the_batches_do_not_matter_and_no_random_number_is_drawn(model):
    one, two = protection(model), protection(model)
    one.measure(model, batches(images(0), 24), alone)
    state = torch.get_rng_state()
    two.measure(model, batches(images(0), 7), alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert (projector(one.used[0][0]) - projector(two.used[0][0])).abs().max() <= 1e-9


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "processes"), [(23, 1), (25, 1), (24, 2)])
def test_another_number_of_images_and_several_processes_are_refused(model, count, processes):
    subspace = protection(model)
    assert subspace.measures == 24
    with pytest.raises(ConfigError) as error:
        subspace.measure(model, batches(images(0, count)), lambda total: processes * total)
    assert str(error.value) == (
        f'space="sample" needs 24 images of each task, all in one process; got {count} in one of {processes}: '
        'take space="feature"'
    )
    assert subspace.used == {} and subspace.before is None


def test_tasks_with_fewer_images_than_channels_are_refused_before_they_are_learned(model):
    tasks = [SimpleNamespace(index=index, train=range(count)) for index, count in enumerate((24, 400, 23))]
    protection(model).check(tasks[:2])
    with pytest.raises(ConfigError) as error:
        protection(model).check(tasks)
    assert str(error.value) == (
        'space="sample", which parity="official" has, needs as many images of each task as the backbone has channels, '
        '24; task 3 has 23: take space="feature", or fewer and larger tasks'
    )


def test_several_processes_are_refused_before_anything_is_learned(model):
    with pytest.raises(ConfigError) as error:
        protection(model).check([SimpleNamespace(index=0, train=range(24))], 2)
    assert str(error.value) == (
        'space="sample" compares the images of a task with each other, so one process has to see them all; got 2: '
        'take devices=1 or space="feature"'
    )


# ── what is remembered ───────────────────────────────────────────────────────────────────────────────


def test_a_state_taken_back_goes_on_to_the_same_bits(model):
    ours = measured(protection(model), model, 0)
    again = protection(model)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.before, ours.before) and again.room() == ours.room()
    for subspace in (ours, again):
        subspace.measure(model, batches(images(1)), alone)
    one, two = ours.state_dict(), again.state_dict()
    assert one.keys() == two.keys() == {"moments", "used", "held", "before"} and one["held"] == two["held"]
    assert torch.equal(one["before"], two["before"]) and torch.equal(one["used"][0][0], two["used"][0][0])
    fresh = protection(model)
    fresh.load_state_dict(protection(model).state_dict())
    assert fresh.before is None and fresh.used == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"used": {0: [torch.zeros(25, 2)]}},
            "used must be {0: [(24, 2)]} in shape, by block; got {0: [(25, 2)]}",
        ),
        ({"used": {0: [torch.zeros(24, 25)]}}, "used must be {0: [(24, 24)]} in shape, by block; got {0: [(24, 25)]}"),
        ({"used": {1: [torch.zeros(24, 2)]}}, "used must be {0: [(24, 0)]} in shape, by block; got {1: [(24, 2)]}"),
        ({"held": None}, "what is remembered was found among channels; let `space` stay as it was"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(model, change, message):
    state = measured(protection(model), model, 0).state_dict() | change
    with pytest.raises(ShapeError) as error:
        protection(model).load_state_dict({name: value for name, value in state.items() if value is not None})
    assert str(error.value) == message


def test_what_was_found_among_images_is_no_memory_of_channels(model):
    state = measured(protection(model), model, 0).state_dict()
    with pytest.raises(ShapeError):
        Subspace([0], lambda maps: {}, features="tokens", width=24, share=0.9).load_state_dict(state)


@torch.no_grad()
def test_room_says_how_many_directions_are_used_and_what_they_hold_of_the_last_task(model):
    subspace = protection(model, features="frozen", components=5, pool=False, what="keys")
    assert subspace.room() == []
    for task in (0, 1):
        measured(subspace, model, task)
    (basis,), table = subspace.used[0], dense_scores(model.tower(images(1)).features, 5)
    gram = table @ table.T
    held = float((basis.T @ gram).square().sum() / gram.square().sum())
    assert subspace.room() == [Room(0, "keys", basis.shape[1], 24, pytest.approx(held))]
    assert 0.9 <= held < 1


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────


def test_each_protection_gets_as_many_images_as_it_asks_for_and_none_if_it_asks_for_none():
    """Of 27: spread over the task, or all of them."""
    seen = {}

    class Measuring(Protection):
        def __init__(self, measures):
            self.measures = measures

        def measure(self, model, batches, reduce):
            seen[self.measures] = torch.cat([batch.images for batch in batches])

    trainer = trainer_of(VPTDeep(epochs=1, batch_size=9, length=3), make_tiny_vit())
    trainer.learner.protections = [Measuring(count) for count in (5, 0, 7, 100, 5)]
    task = blobs().tasks[0]
    trainer.learn(task)
    everything = torch.cat([batch.images for batch in trainer.feed.plain(task.train)])
    assert {count: len(pixels) for count, pixels in seen.items()} == {5: 5, 7: 7, 100: 27}
    assert torch.equal(seen[100], everything) and torch.equal(seen[5], everything[[0, 6, 13, 19, 26]])
