"""Deep prompts and their options, against sequences computed slowly. B 5, N 17, M 4, D 24, L 3; stored width 6."""

import pytest
import torch

from lamina.backbones.splice import Splice
from lamina.errors import ConfigError, UnsupportedBackbone
from lamina.methods.joint import Joint
from lamina.methods.vpt_deep import VPTDeep
from lamina.prompts.base import Scripted
from lamina.prompts.deep import DeepPrompts, patch_bound
from tests.backbones.clips import tiny_clip
from tests.prompts.sequences import by_hand, drawn, entering_of, gradients, images, near, tower64


def prompts_of(layers=range(3), length=4, width=24, **options):
    prompts = DeepPrompts(layers, length, width, **options).double()
    with torch.no_grad():
        for number, value in enumerate(prompts.parameters()):
            value.copy_(drawn(*value.shape, seed=10 + number))
    return prompts


# ── what leaves no trace ─────────────────────────────────────────────────────────────────────────────


def test_a_context_gives_the_features_and_gradients_of_rows_that_run_through_the_block():
    tower, prompts = tower64(), prompts_of()
    want, _ = by_hand(tower, images(), lambda layer, out, patches: prompts.value(layer)[None])
    got = tower(images(), prompts.start()).features
    near(got, want)
    for ours, theirs in zip(*(gradients(f, prompts.parameters()) for f in (got, want)), strict=True):
        assert theirs.abs().max() > 1e-3
        near(ours, theirs, 1e-9)


def test_the_last_block_for_the_class_token_alone_is_the_whole_last_block_there():
    tower, prompts = tower64(), prompts_of()
    whole = tower(images(), prompts.start(), all_rows=True)
    near(tower(images(), prompts.start()).features, whole.features)


def test_behind_a_mask_prompts_do_nothing_and_zeros_without_one_do():
    tower = tower64()
    bare = tower(images()).features
    rows = drawn(1, 4, 24)
    near(by_hand(tower, images(), lambda *_: rows, masked=True)[0], bare)
    empty = DeepPrompts(range(3), 4, 24, bound=0.0).double()
    assert (tower(images(), empty.start()).features - bare).abs().max() > 1e-3


# ── partial depth ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_last_set_of_a_partial_depth_travels_on(depth):
    tower, prompts = tower64(), prompts_of(range(depth), onward=3)

    def entering(layer, out, patches):
        return prompts.value(layer)[None] if layer < depth else out

    want, seen = by_hand(tower, images(), entering)
    got = tower(images(), prompts.start()).features
    near(got, want)
    for ours, (theirs, _) in zip(entering_of(tower, prompts, images()), seen, strict=True):
        near(ours, theirs)
    for ours, theirs in zip(*(gradients(f, prompts.parameters()) for f in (got, want)), strict=True):
        near(ours, theirs, 1e-9)


def test_without_onward_the_last_set_is_thrown_away_too():
    tower, prompts = tower64(), prompts_of(range(1))
    assert [seen.shape for seen in entering_of(tower, prompts, images())] == [(5, 4, 24), (5, 0, 24), (5, 0, 24)]


def test_the_last_block_only_looks_at_what_travels():
    tower, prompts = tower64(), prompts_of(range(1), onward=3)
    kinds = []
    started = prompts.start()

    def note(layer, tokens, carried):
        splice = started.at(layer, tokens, carried)
        kinds.append(None if splice is None else [part is not None for part in (splice.tokens, splice.context)])
        return splice

    out = tower(images(), Scripted(note))
    assert kinds == [[True, False], None, [True, True]] and out.prompts.shape == (5, 0, 24)


# ── stored width ─────────────────────────────────────────────────────────────────────────────────────


def test_one_layer_widens_all_sets_and_learns_with_them():
    tower, prompts = tower64(), prompts_of(projection=6)
    wide = [prompts.value(i) @ prompts.widen.weight.T + prompts.widen.bias for i in range(3)]
    near(tower(images(), prompts.start()).features, by_hand(tower, images(), lambda layer, *_: wide[layer][None])[0])
    assert {name: tuple(value.shape) for name, value in prompts.named_parameters()} == {
        **{f"values.{i}": (4, 6) for i in range(3)},
        "widen.weight": (24, 6),
        "widen.bias": (24,),
    }
    assert all(g.abs().max() > 0 for g in gradients(tower(images(), prompts.start()).features, prompts.parameters()))


def test_what_widens_starts_with_the_deviation_of_its_outputs():
    weight = DeepPrompts(range(1), 2, 300, projection=200).widen.weight
    assert weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────


def test_each_image_or_each_batch_has_a_mask_of_its_own_for_each_block():
    prompts = DeepPrompts(range(3), 40, 24, dropout=0.25)
    own = [prompts.shown(i, 5) for i in range(3)]
    assert [part.shape for part in own] == [(5, 40, 24)] * 3
    masks = torch.stack([part == 0 for part in own])
    assert 0.22 < masks.float().mean() < 0.28
    assert all(not torch.equal(masks[0, 0], other) for other in (masks[0, 1], masks[1, 0]))
    kept = ~masks[0]
    torch.testing.assert_close(own[0][kept], (prompts.value(0) / 0.75).expand(5, -1, -1)[kept])
    prompts.dropout_mode = "shared"
    shared = [prompts.shown(i, 5) for i in range(2)]
    assert shared[0].shape == (40, 24) and not torch.equal(shared[0] == 0, shared[1] == 0)


def test_what_is_dropped_is_dropped_after_it_was_widened():
    prompts = DeepPrompts(range(1), 40, 24, projection=6, dropout=0.25)
    assert 0.2 < (prompts.shown(0, 5) == 0).float().mean() < 0.3


def test_nothing_is_dropped_in_evaluation_nor_from_what_is_not_learned():
    prompts = DeepPrompts(range(3), 4, 24, dropout=0.25)
    assert prompts.eval().shown(1, 5) is prompts.value(1)
    prompts.train().requires_grad_(False)
    assert prompts.shown(1, 5) is prompts.value(1)


def test_without_options_the_parameter_itself_is_shown_so_nothing_can_differ():
    prompts = DeepPrompts(range(3), 4, 24)
    assert prompts.start().at(2, torch.zeros(5, 17, 24), None) == Splice(context=prompts.value(2))


# ── the method ───────────────────────────────────────────────────────────────────────────────────────


def test_the_start_of_a_vit_b_16_is_that_of_vpt_and_needs_patches(tiny_vit):
    class Base:
        patch_size = 3 * 16 * 16

    assert patch_bound(Base, 768) == 0.0625
    assert patch_bound(tiny_vit, 24) == (6 / (192 + 24)) ** 0.5
    with pytest.raises(UnsupportedBackbone) as error:
        patch_bound(tiny_clip().text.tower, 40)
    message = "prompts start by the size of a patch, and a TextTower has no patches; take an image tower"
    assert str(error.value) == message


def test_options_reach_the_prompts_and_are_off_by_default(tiny_vit):
    plain = VPTDeep(length=5).build(tiny_vit).model.prompts
    assert (list(plain.layers), plain.onward, plain.widen, plain.dropout) == ([0, 1, 2], None, None, 0.0)
    assert plain.value(0).abs().max() > 0.9
    options = {"depth": 2, "projection": 6, "dropout": 0.3, "dropout_mode": "shared", "start": "patch"}
    for kind in (VPTDeep, Joint):
        prompts = kind(length=5, **options).build(tiny_vit).model.prompts
        assert (list(prompts.layers), prompts.onward, prompts.dropout) == ([0, 1], 3, 0.3)
        assert prompts.dropout_mode == "shared" and prompts.widen.in_features == 6
        bound = (6 / (192 + 6)) ** 0.5
        assert 0.8 * bound < prompts.value(1).abs().max() <= bound


def test_as_many_numbers_are_learned_as_counted():
    assert sum(value.numel() for value in DeepPrompts(range(12), 10, 768).parameters()) == 92_160


def test_an_option_that_is_impossible_or_idle_says_so(tiny_vit):
    with pytest.raises(ConfigError) as error:
        VPTDeep(depth=4).build(tiny_vit)
    assert str(error.value) == "VPTDeep.depth must be at most 3, the blocks there are; got 4"
    assert VPTDeep().idle() == {"dropout_mode": "where dropout is 0"} and VPTDeep(dropout=0.1).idle() == {}
