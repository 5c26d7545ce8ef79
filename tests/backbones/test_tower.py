"""The one forward pass: what each kind of splice does, what a tap sees, and what never happens."""

import math

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.splice import Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.prompts.base import Scripted


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def context(values, **more):
    """One context (M, D) at each block."""
    return Scripted(lambda layer, tokens, carried: Splice(context=values[layer], **more))


def fresh_tokens(values):
    """New tokens at each block, so that what the last block made of them is cut off."""
    return Scripted(lambda layer, tokens, carried: Splice(tokens=values[layer].expand(len(tokens), -1, -1)))


def gradient(tower, images, make_pass, values, **how):
    values = values.clone().requires_grad_()
    weights = torch.randn(7, 24, generator=torch.Generator().manual_seed(3))
    (tower(images, make_pass(values), **how).features * weights).sum().backward()
    return values.grad


# ── no prompts ─────────────────────────────────────────────────────────────────────────────────────


def test_prompts_of_length_zero_change_nothing_at_all(tower, images):
    nothing = torch.zeros(3, 0, 24)
    plain = tower(images).features
    assert torch.equal(tower(images, context(nothing)).features, plain)
    prefix = Scripted(lambda layer, tokens, carried: Splice(prefix=(nothing[0], nothing[0])))
    assert torch.equal(tower(images, prefix).features, plain)
    hidden = Scripted(lambda layer, tokens, carried: Splice(context=nothing[0], frozen_only=True))
    assert torch.equal(tower(images, hidden).features, plain)


def test_an_empty_splice_and_no_splice_are_the_same(tower, images):
    assert torch.equal(tower(images, Scripted(lambda *_: None)).features, tower(images).features)
    assert torch.equal(tower(images, Scripted(lambda *_: Splice())).features, tower(images).features)


def test_training_mode_is_evaluation_mode(make, images, values):
    tower = TimmTower(make(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, pos_drop_rate=0.5))
    before = tower(images, context(values)).features
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert torch.equal(tower(images, context(values)).features, before)


def test_gradients_reach_prompts_and_never_the_tower(tower, images, values):
    grad = gradient(tower, images, context, values)
    assert grad.abs().amin(dim=(1, 2)).gt(0).all()
    assert not any(p.requires_grad for p in tower.parameters())
    assert all(p.grad is None for p in tower.parameters())


def test_gradients_are_those_of_finite_differences(vit, images, values):
    """Features of a tower in float64 come in float64, so a fine step tells."""
    tower = TimmTower(vit, dtype=torch.float64)
    values, way, step = values.double(), torch.randn(3, 5, 24, dtype=torch.float64), 1e-5
    slope = (gradient(tower, images, context, values) * way).sum()
    weights = torch.randn(7, 24, generator=torch.Generator().manual_seed(3))
    ahead, back = (tower(images, context(values + s * way)).features for s in (step, -step))
    torch.testing.assert_close(slope, ((ahead - back) * weights).sum() / (2 * step), rtol=1e-7, atol=1e-7)


# ── kinds of splices ───────────────────────────────────────────────────────────────────────────────


def test_a_shared_context_a_context_per_image_and_tokens_cut_off_are_one(tower, images, values, kernel):
    shared = tower(images, context(values)).features
    assert not torch.allclose(shared, tower(images).features, atol=1e-2)
    close(shared, tower(images, context(values[:, None].expand(-1, 7, -1, -1))).features)
    close(shared, tower(images, fresh_tokens(values)).features)


def test_the_same_holds_for_gradients(tower, images, values, kernel):
    shared = gradient(tower, images, context, values)
    close(shared, gradient(tower, images, lambda v: context(v[:, None].expand(-1, 7, -1, -1)), values), 1e-4)
    close(shared, gradient(tower, images, fresh_tokens, values), 1e-4)


def test_a_context_per_image_is_looked_at_by_its_image_alone(tower, images, values):
    each = torch.randn(3, 7, 5, 24)
    together = tower(images, context(each)).features
    alone = torch.cat([tower(images[i : i + 1], context(each[:, i])).features for i in range(7)])
    close(together, alone)


def test_tokens_that_are_not_renewed_travel_on(tower, images, values):
    met = []

    def script(layer, tokens, carried):
        met.append(carried)
        return Splice(tokens=values[0].expand(len(tokens), -1, -1)) if layer == 0 else None

    encoded = tower(images, Scripted(script))
    x = torch.cat([tower.embed(images)[0], values[0].expand(7, -1, -1)], dim=1)
    assert met[0] is None
    for layer, block in enumerate(tower.model.blocks):
        x = block(x)
        if layer + 1 < len(met):
            close(met[layer + 1], x[:, 17:])
    close(encoded.prompts, tower.model.norm(x[:, 17:]))
    close(encoded.features, tower.model.forward_head(tower.model.norm(x[:, :17]), pre_logits=True))


def test_a_normed_context_skips_the_norm(tower, images, values):
    normed = torch.stack([b.norm1(v) for b, v in zip(tower.model.blocks, values, strict=True)])
    close(tower(images, context(normed, context_normed=True)).features, tower(images, context(values)).features)
    assert not torch.allclose(
        tower(images, context(values, context_normed=True)).features,
        tower(images, context(values)).features,
        atol=1e-2,
    )


def test_a_prefix_is_a_context_projected_by_hand(tower, images, values, kernel):
    def script(layer, tokens, carried):
        block = tower.model.blocks[layer]
        _, k, v = block.attn.qkv(block.norm1(values[layer])).chunk(3, dim=-1)
        return Splice(prefix=(k, v))

    close(tower(images, Scripted(script)).features, tower(images, context(values)).features)

    def per_image(layer, tokens, carried):
        k, v = script(layer, tokens, carried).prefix
        return Splice(prefix=(k.expand(7, -1, -1), v.expand(7, -1, -1)))

    close(tower(images, Scripted(per_image)).features, tower(images, context(values)).features)


def test_context_and_prefix_add_up(tower, images, values):
    def script(layer, tokens, carried):
        block = tower.model.blocks[layer]
        _, k, v = block.attn.qkv(block.norm1(values[layer][2:])).chunk(3, dim=-1)
        return Splice(context=values[layer][:2], prefix=(k, v))

    close(tower(images, Scripted(script)).features, tower(images, context(values)).features)


def test_temperature_divides_the_logits(tower, images, values, kernel):
    per_head = torch.tensor([0.5, 3.0]).view(2, 1, 1)
    got = tower(images, context(values, temperature=per_head), all_rows=True).tokens
    x = tower.embed(images)[0]
    for block, value in zip(tower.model.blocks, values, strict=True):
        x = by_hand(block, x, value, temperature=per_head)[0]
    close(got, x)
    one = tower(images, context(values, temperature=torch.tensor(2.0))).features
    close(one, tower(images, context(values, temperature=torch.full((2, 1, 1), 2.0))).features)


def test_frozen_only_hides_context_from_the_slots(tower, images, values, kernel):
    slots = torch.randn(5, 24)

    def run(extra, hide):
        met = []

        def script(layer, tokens, carried):
            met.append(carried)
            first = Splice(tokens=slots.expand(7, -1, -1), context=extra, frozen_only=hide)
            return None if layer else first

        return tower(images, Scripted(script)).features, met[1]

    features, carried = run(values[0][:4], hide=True)
    other_features, other_carried = run(values[1][:4], hide=True)
    _, seen = run(values[1][:4], hide=False)
    _, without = run(None, hide=False)
    close(carried, without)
    close(other_carried, without)
    assert not torch.allclose(other_carried, seen, atol=1e-2)
    assert not torch.allclose(features, other_features, atol=1e-2)


def test_a_branch_says_what_is_added_in_place_of_what_the_mlp_says(tower, images, values):
    def passed(branch, **how):
        return tower(images, Scripted(lambda *_: Splice(context=values[0], branch=branch)), **how)

    assert torch.equal(
        passed(lambda x, y: y).features, tower(images, Scripted(lambda *_: Splice(context=values[0]))).features
    )
    seen = []
    whole = passed(lambda x, y: (seen.append((x, y)), 2 * x)[1], all_rows=True)
    for (x, y), block in zip(seen, tower.model.blocks, strict=True):
        close(y, block.mlp(block.norm2(x)))
    close(whole.tokens, 3 * seen[-1][0])


# ── the last block ─────────────────────────────────────────────────────────────────────────────────


def test_a_last_block_of_the_class_row_alone_gives_the_same(tower, images, values, kernel):
    whole = tower(images, context(values), all_rows=True)
    close(tower(images, context(values)).features, whole.features, 1e-6)
    one = gradient(tower, images, context, values)
    close(one, gradient(tower, images, context, values, all_rows=True), 1e-5)


def travelling(values, **more):
    """Tokens that enter block 0 and travel; at block 1 they stay as they are, and the last one shows a context, too."""

    def at(layer, tokens, carried):
        if layer == 2:
            return Splice(context=values[2], **more)
        return Splice(tokens=values[0].expand(len(tokens), -1, -1)) if layer == 0 else None

    return Scripted(at)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_last_block_of_the_class_row_and_travelling_prompts_alone_gives_the_same(
    tower, images, values, kernel, hidden
):
    weights = torch.randn(7, values.shape[1], 24, generator=torch.Generator().manual_seed(5))

    def both(**how):
        given = values.clone().requires_grad_()
        encoded = tower(images, travelling(given, frozen_only=hidden), **how)
        (encoded.prompts * weights).sum().backward()
        return encoded.features, encoded.prompts, given.grad

    whole = both(all_rows=True)
    for got, expected in zip(both(), whole, strict=True):
        close(got, expected, 1e-5)
    for got, expected in zip(both(tap=lambda probe: None), whole, strict=True):
        close(got, expected, 1e-5)


def test_the_last_block_computes_no_more_than_what_is_read_and_what_travels(tower, images, values):
    rows, travels = [], values.shape[1]
    for view in tower.blocks():
        view.attended = lambda x, mixed, attended=view.attended: (rows.append(x.shape[1]), attended(x, mixed))[1]
    tower(images, travelling(values))
    assert rows == [17 + travels, 17 + travels, 1 + travels]


def test_the_final_tokens_come_only_when_asked_for(tower, images, values):
    assert tower(images, context(values)).tokens is None
    assert tower(images, context(values), all_rows=True).tokens.shape == (7, 17, 24)
    assert tower(images, context(values)).prompts is None


# ── features of several blocks ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_of_several_blocks_stand_side_by_side_the_last_at_the_end(make, images, values, pool, layers):
    tower, seen = TimmTower(make(global_pool=pool)), []
    whole = tower(images, context(values), tap=seen.append, all_rows=True)
    after = [probe.inputs for probe in seen[1:]] + [whole.tokens]
    expected = [tower.model.forward_head(tower.model.norm(x), pre_logits=True) for x in after[-layers:]]
    got = tower(images, context(values), layers=layers).features
    assert got.shape == (7, 24 * layers)
    close(got, torch.cat(expected, dim=1))
    close(tower(images, context(values), layers=layers, all_rows=True).features, got)
    close(tower(images, context(values), tap=lambda probe: None, layers=layers).features, got)


def test_features_of_several_blocks_are_those_that_timm_finds_after_them(tower, images):
    theirs = tower.model.get_intermediate_layers(images, n=2, return_prefix_tokens=True, norm=True)
    close(tower(images, layers=2).features, torch.cat([prefix[:, 0] for _, prefix in theirs], dim=1))


def test_the_last_block_says_the_same_whether_others_are_read_or_not(tower, images, values):
    assert torch.equal(
        tower(images, context(values), layers=3).features[:, 48:], tower(images, context(values)).features
    )


def test_only_the_last_block_computes_the_rows_that_are_read_alone(tower, images):
    rows = []
    for view in tower.blocks():
        view.attended = lambda x, mixed, attended=view.attended: (rows.append(x.shape[1]), attended(x, mixed))[1]
    tower(images, layers=2)
    tower(images, layers=2, all_rows=True)
    assert rows == [17, 17, 1, 17, 17, 17]


def test_rows_that_are_read_may_stand_anywhere(tower, images, values):
    tower.readout, tower.pool = slice(2, 5), lambda tokens: tower.model.norm(tokens).mean(1)
    seen = []
    whole = tower(images, context(values), tap=seen.append, all_rows=True)
    expected = torch.cat([tower.model.norm(x[:, 2:5]).mean(1) for x in (seen[2].inputs, whole.tokens)], dim=1)
    close(tower(images, context(values), layers=2).features, expected)
    close(whole.features, expected[:, 24:])


def test_prompts_that_travel_are_not_among_the_rows_that_are_pooled(make, images, values):
    tower = TimmTower(make(global_pool="avg"))
    close(tower(images, fresh_tokens(values), layers=3).features, tower(images, context(values), layers=3).features)


def test_every_block_that_is_read_sends_a_gradient_to_the_prompts_before_it(tower, images, values):
    values = values.clone().requires_grad_()
    tower(images, context(values), layers=2).features[:, :24].square().sum().backward()
    assert values.grad.abs().amin(dim=(1, 2)).gt(0).tolist() == [True, True, False]


def test_features_of_several_blocks_in_bfloat16_come_in_float32(half, tower, images):
    got, want = half(images, layers=2).features, tower(images, layers=2).features
    assert got.dtype == torch.float32 and (got - want).norm() / want.norm() < 5e-2


# ── taps ───────────────────────────────────────────────────────────────────────────────────────────


def by_hand(block, x, prompt, temperature=1.0):
    """One block from its definition: tokens after it, queries and weights to the prompts."""
    size, n, m = len(x), x.shape[1], len(prompt)
    seen = torch.cat([x, prompt.expand(size, -1, -1)], dim=1)
    q, k, v = (block.attn.qkv(block.norm1(seen)).view(size, n + m, 3, 2, 12)[:, :, i] for i in range(3))
    logits = torch.einsum("bnhd,bkhd->bhnk", q[:, :n], k) / math.sqrt(12) / temperature
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    mixed = torch.einsum("bhnk,bkhd->bnhd", weights, v).flatten(2)
    x = x + block.ls1(F.linear(mixed, block.attn.proj.weight, block.attn.proj.bias))
    return x + block.ls2(block.mlp(block.norm2(x))), q[:, :n].transpose(1, 2), weights[..., n:]


def test_a_tap_sees_what_the_definition_says(tower, images, values, kernel):
    seen = []
    tower(images, context(values), tap=seen.append)
    x = tower.embed(images)[0]
    for layer, (block, probe) in enumerate(zip(tower.model.blocks, seen, strict=True)):
        after, queries, to_prompts = by_hand(block, x, values[layer])
        assert probe.layer == layer
        close(probe.inputs, x)
        assert probe.queries.shape == (7, 2, 17, 12)
        close(probe.queries, queries)
        assert probe.to_prompts.shape == (7, 2, 17, 5)
        close(probe.to_prompts, to_prompts)
        assert torch.equal(probe.key_weight, block.attn.qkv.weight[24:48])
        x = after
    assert len(seen) == 3


@pytest.mark.parametrize("how", ["tokens", "prefix"])
def test_a_tap_sees_prompts_however_they_come(tower, images, values, how):
    def script(layer, tokens, carried):
        if how == "tokens":
            return Splice(tokens=values[layer].expand(7, -1, -1))
        block = tower.model.blocks[layer]
        return Splice(prefix=block.attn.qkv(block.norm1(values[layer])).chunk(3, dim=-1)[1:])

    seen, want = [], []
    tower(images, Scripted(script), tap=seen.append)
    tower(images, context(values), tap=want.append)
    for a, b in zip(seen, want, strict=True):
        close(a.inputs, b.inputs)
        close(a.queries, b.queries)
        close(a.to_prompts, b.to_prompts)


def test_a_tap_sees_the_prompts_that_enter_slots_first_and_all_weights(tower, images, values):
    seen = []
    both = Scripted(
        lambda layer, tokens, carried: Splice(
            tokens=values[layer].expand(len(tokens), -1, -1), context=values[layer] + 1, prefix=(values[0], values[1])
        )
    )
    tower(images, both, tap=seen.append)
    for layer, probe in enumerate(seen):
        expected = torch.cat([values[layer], values[layer] + 1]).expand(7, -1, -1)
        assert torch.equal(probe.entering, expected)
        assert probe.attention.shape == (7, 2, 17, 17 + 3 * 5)
        assert torch.equal(probe.attention[..., 17:], probe.to_prompts)
        close(probe.attention.sum(-1), torch.ones(7, 2, 17))


def test_a_tap_changes_no_features(tower, images, values, kernel):
    plain = tower(images, context(values)).features
    close(tower(images, context(values), tap=lambda probe: None).features, plain)
    close(tower(images, tap=lambda probe: None).features, tower(images).features)
    masked = context(values, frozen_only=True, temperature=torch.tensor(2.0))
    close(tower(images, masked, tap=lambda probe: None).features, tower(images, masked).features)


def test_a_tap_without_prompts_sees_none(tower, images):
    seen = []
    tower(images, tap=seen.append)
    assert [tuple(p.to_prompts.shape) for p in seen] == [(7, 2, 17, 0)] * 3


# ── precision and batches ──────────────────────────────────────────────────────────────────────────


def test_features_of_an_image_do_not_depend_on_its_batch(tower, images, values, kernel):
    together = tower(images, context(values)).features
    alone = torch.cat([tower(images[i : i + 1], context(values)).features for i in range(7)])
    close(together, alone)


def test_the_same_holds_in_bfloat16_up_to_its_rounding(half, images, values, kernel):
    """A product's rounding may depend on its shape: one unit in the last place of bfloat16 is 8e-3."""
    together = half(images, context(values)).features
    alone = torch.cat([half(images[i : i + 1], context(values)).features for i in range(7)])
    assert (together - alone).norm() / together.norm() < 1e-2


def test_a_tower_in_bfloat16_is_close_to_the_one_in_float32(tower, half, images, values, kernel):
    want, got = (t(images, context(values)).features for t in (tower, half))
    assert got.dtype == want.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 5e-2
    want, got = (gradient(t, images, context, values) for t in (tower, half))
    assert got.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 5e-2


def test_a_tap_in_bfloat16_is_close_to_the_one_in_float32(tower, half, images, values):
    want, got = [], []
    tower(images, context(values), tap=want.append)
    half(images, context(values), tap=got.append)
    for a, b in zip(want, got, strict=True):
        assert (a.to_prompts - b.to_prompts.float()).norm() / a.to_prompts.norm() < 5e-2
        assert (a.queries - b.queries.float()).norm() / a.queries.norm() < 5e-2
