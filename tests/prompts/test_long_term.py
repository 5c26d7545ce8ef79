"""Prompts over depth, against sequences computed slowly and PyTorch's own recurrent modules.

B 5, N 17, M 4, D 24, H 2, L 3; float64.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.backbones import tower as engine
from lamina.backbones.timm_vit import TimmTower
from lamina.errors import ConfigError, UnsupportedBackbone
from lamina.methods.lspt import LSPT
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.long_term import LongTermPrompts
from lamina.prompts.recurrent import GRU, LSTM, Chain, TransformerLayer
from lamina.prompts.spatial import coded
from tests.backbones.clips import tiny_clip
from tests.prompts.sequences import by_hand, drawn, entering_of, gradients, images, near, tower64


def prompts_of(depth=3, length=4, width=24, **options):
    torch.manual_seed(1)
    prompts = LongTermPrompts(depth, length, width, **{"heads": 2, **options}).double()
    with torch.no_grad():
        for value in prompts.carriers.parameters():
            value.mul_(3)  # gates away from one half
    return prompts


def features_of(prompts, pixels=None):
    return tower64()(images() if pixels is None else pixels, prompts.start()).features


def over_time(module, given, states):
    """What a recurrent module of PyTorch makes of one step, prompts (M, D) and states (B, M, D) in one batch."""
    given = given.expand(states[0].shape).reshape(1, -1, 24)
    out, after = module(given, states)
    return out.view(5, 4, 24), after


def slowly(prompts, carry, told=True, norm=False, tied=False, hears=True):
    """Return features and what entered each block, by the definition; `carry` of (given, hidden) is one step."""

    def entering(layer, out, patches):
        given = prompts.value(max(layer, 1) if tied else layer)
        if not layer:
            return given[None]
        hidden = out if hears else torch.zeros_like(out)
        hidden = hidden + patches.mean(1, keepdim=True) if told else hidden
        return carry(layer, given, F.layer_norm(hidden, (24,), eps=1e-6) if norm else hidden)

    features, seen = by_hand(tower64(), images(), entering)
    return features, [entered for entered, _ in seen]


def torch_lstm(lstm, cell=None):
    """One step after another of `nn.LSTM` on sequences of one element."""
    layers = len(lstm.steps)
    module = nn.LSTM(24, 24, layers).double()
    for number, step in enumerate(lstm.steps):
        for name, value in step.named_parameters():
            getattr(module, f"{name}_l{number}").data.copy_(value)
    cells = [torch.zeros(layers, 20, 24).double() if cell is None else cell.repeat(1, 5, 1)]

    def step(layer, given, hidden):
        flat = hidden.reshape(1, 20, 24).repeat(layers, 1, 1)
        out, (_, cells[0]) = module(given.expand(5, -1, -1).reshape(1, 20, 24), (flat, cells[0]))
        return out.view(5, 4, 24)

    return step


# ── what carries ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options", [{}, {"spatial": "none"}, {"hidden_norm": True}, {"tie_first": True}, {"hears": False}]
)
@pytest.mark.parametrize("carriers", [1, 2])
def test_it_is_an_lstm_over_blocks_with_what_became_of_the_prompts_for_its_hidden_state(carriers, options):
    prompts = prompts_of(carriers=carriers, **options)
    told, norm, tied = options.get("spatial") != "none", "hidden_norm" in options, "tie_first" in options
    want, entered = slowly(prompts, torch_lstm(prompts.carriers[0]), told, norm, tied, "hears" not in options)
    got = features_of(prompts)
    near(got, want)
    for ours, theirs in zip(entering_of(tower64(), prompts, images()), entered, strict=True):
        near(ours, theirs)
    learned = [value for name, value in prompts.named_parameters() if "values" in name]
    for ours, theirs in zip(*(gradients(f, learned) for f in (got, want)), strict=True):
        near(ours, theirs, 1e-9)
    assert {tuple(value.shape) for value in learned} == {(4, 24)} and len(learned) == (2 if tied else 3)


def test_a_gru_and_a_transformer_carry_as_their_definitions_say():
    prompts = prompts_of(carry="gru")
    gru = nn.GRU(24, 24).double()
    for name, value in prompts.carriers[0].step.named_parameters():
        getattr(gru, f"{name}_l0").data.copy_(value)

    def step(layer, given, hidden):
        return gru(given.expand(5, -1, -1).reshape(1, 20, 24), hidden.reshape(1, 20, 24))[0].view(5, 4, 24)

    near(features_of(prompts), slowly(prompts, step)[0])
    prompts = prompts_of(carry="transformer")
    layer = prompts.carriers[0]
    official = nn.TransformerEncoderLayer(24, 2, 96, 0.0, F.gelu, 1e-5, True, True).double().eval()
    parts = {"self_attn.in_proj_": layer.qkv, "self_attn.out_proj.": layer.proj, "linear1.": layer.mlp[0]}
    parts |= {"linear2.": layer.mlp[2], "norm1.": layer.norm1, "norm2.": layer.norm2}
    official.load_state_dict({n + k: v for n, part in parts.items() for k, v in part.state_dict().items()})
    near(
        features_of(prompts),
        slowly(prompts, lambda _, g, h: official(torch.cat([h, g.expand_as(h)], dim=1))[:, 4:])[0],
    )


def test_a_carrier_of_its_own_behind_each_block_is_that_block_s():
    prompts = prompts_of(shared=False)
    steps = [torch_lstm(lstm) for lstm in prompts.carriers]
    assert len(steps) == 2
    cells = []

    def step(layer, given, hidden):  # the memory goes from one to the next
        lstm = prompts.carriers[layer - 1]
        before = cells[-1] if cells else (torch.zeros(4, 24).double(),)
        out, after = lstm(lstm.prepared(given, Chain(torch.float64)), hidden, before, Chain(torch.float64))
        cells.append(after)
        return out

    near(features_of(prompts), slowly(prompts, step)[0])
    near(steps[0](1, drawn(4, 24), drawn(5, 4, 24)), _step(prompts.carriers[0], drawn(4, 24), drawn(5, 4, 24)))


def _step(lstm, given, hidden):
    cells, chain = (torch.zeros(4, 24).double(),) * lstm.cells, Chain(torch.float64)
    return lstm(lstm.prepared(given, chain), hidden, cells, chain)[0]


def test_memory_may_start_at_learned_numbers_that_start_at_zero():
    prompts, plain = prompts_of(learn_cell=True, carriers=2), prompts_of(carriers=2)
    assert prompts.first_cells.shape == (2, 4, 24) and not prompts.first_cells.any()
    near(features_of(prompts), features_of(plain))
    prompts.first_cells.data.copy_(drawn(2, 4, 24))
    near(features_of(prompts), slowly(prompts, torch_lstm(prompts.carriers[0], prompts.first_cells.data))[0])
    (gradient,) = gradients(features_of(prompts), [prompts.first_cells])
    assert gradient.flatten(1).norm(dim=1).min() > 1e-6


def test_what_the_input_gives_the_gates_is_computed_once_for_a_batch_and_is_exact(monkeypatch):
    prompts, shapes = prompts_of(), []
    prepared = LSTM.prepared

    def count(self, given, chain):
        shapes.append(tuple(given.shape))
        return prepared(self, given, chain)

    monkeypatch.setattr(LSTM, "prepared", count)
    got = features_of(prompts)
    assert shapes == [(2, 4, 24)]  # one call, of the L - 1 sets of the whole batch
    monkeypatch.setattr(
        LSTM, "prepared", lambda self, given, chain: prepared(self, given[:, None].expand(-1, 5, -1, -1), chain)
    )
    near(features_of(prompts), got)


def test_masks_of_each_image_reach_what_carries_and_shared_ones_are_prepared_once(monkeypatch):
    shapes, prepared = [], LSTM.prepared
    monkeypatch.setattr(
        LSTM, "prepared", lambda self, x, chain: shapes.append(tuple(x.shape)) or prepared(self, x, chain)
    )
    for mode, shape in (("per_sample", (2, 5, 4, 24)), ("shared", (2, 4, 24))):
        features_of(prompts_of(dropout=0.3, dropout_mode=mode))
        assert shapes.pop() == shape and not shapes


def chained(product, weight):
    """Three steps, each of what the one before gave: the last, and gradients to the start and the weights, twice."""
    start, weight = (x.detach().clone().requires_grad_() for x in (drawn(5, 4, 6).to(weight.dtype), weight))
    out = start
    for _ in range(3):
        out = product(out, weight).tanh()
    ends = [(out * drawn(5, 4, 6, seed=seed).to(out.dtype)).sum() for seed in (3, 4)]
    return out.detach(), *(g for end in ends for g in torch.autograd.grad(end, [start, weight], retain_graph=True))


def test_products_of_a_chain_are_products_and_their_gradients_are_summed():
    weight = drawn(6, 6, seed=1)
    for ours, theirs in zip(chained(Chain(torch.float64).product, weight), chained(F.linear, weight), strict=True):
        near(ours, theirs)


def test_a_chain_multiplies_in_the_precision_of_the_tower_and_what_is_learned_keeps_its_own():
    weight = drawn(6, 6, seed=1).float() / 3
    for ours, theirs in zip(chained(Chain(torch.bfloat16).product, weight), chained(F.linear, weight), strict=True):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_weights_of_a_chain_that_are_not_learned_get_no_gradient_and_let_it_through():
    start, weight = drawn(5, 4, 6).requires_grad_(), drawn(6, 6, seed=1)
    ours, theirs = (
        torch.autograd.grad(f(f(start, weight), weight).sum(), start)[0]
        for f in (Chain(torch.float64).product, F.linear)
    )
    near(ours, theirs)


def test_the_input_and_the_hidden_state_are_not_mistaken_for_each_other():
    blind = prompts_of()
    nn.init.zeros_(blind.carriers[0].steps[0].weight_ih)
    before = features_of(blind)
    blind.value(1).data.add_(1.0)
    blind.value(2).data.mul_(-2.0)
    assert torch.equal(features_of(blind), before)
    deaf = prompts_of()
    nn.init.zeros_(deaf.carriers[0].steps[0].weight_hh)
    for entered in entering_of(tower64(), deaf, images())[1:]:
        near(entered, entered[:1].expand(5, -1, -1))
    told = prompts_of(spatial="none")
    told.load_state_dict(deaf.state_dict())
    near(features_of(told), features_of(deaf))


@pytest.mark.parametrize("full", [False, True])
def test_with_the_forget_gate_open_and_the_input_gate_shut_memory_stays_what_it_was(full):
    """Empty memory lets nothing enter; other memory enters, through gates that images still move."""
    prompts = prompts_of(learn_cell=full)
    with torch.no_grad():
        prompts.carriers[0].steps[0].bias_ih[:24], prompts.carriers[0].steps[0].bias_ih[24:48] = -2000.0, 2000.0
        if full:
            prompts.first_cells.copy_(drawn(1, 4, 24))
    entered, states = remembered(prompts)
    start = prompts.first_cells[0] if full else torch.zeros(4, 24).double()
    assert states[0] is None and all(torch.equal(*torch.broadcast_tensors(cells[0], start)) for cells in states[1:])
    assert entered[0].abs().max() > 0
    assert all(bool(part.any()) == full for part in entered[1:])
    assert not full or (entered[1][0] - entered[1][1]).abs().max() > 1e-6


def remembered(prompts):
    """Return what enters each block, and the cell states once it has."""
    started, states, entered = prompts.start(), [], []
    at = started.at

    def note(layer, tokens, carried):
        splice = at(layer, tokens, carried)
        states.append(started.cells)
        return splice

    started.at = note
    tower64()(images(), started, lambda probe: entered.append(probe.entering))
    return entered, states


def test_what_enters_is_bounded_however_large_the_images_states_are():
    prompts = prompts_of()
    prompts.carriers[0].steps[0].weight_hh.data.mul_(100)
    entered, states = remembered(prompts)
    assert entered[1].abs().max() <= torch.tensor(1.0).tanh() + 1e-7 and entered[2].abs().max() < 1
    assert states[0] is None
    assert states[1][0].abs().max() <= 1 and 1 < states[2][0].abs().max() <= 2


def test_the_forget_bias_is_what_was_asked_for_and_else_as_pytorch_draws_it():
    plain, biased = LSTM(24, 2), LSTM(24, 2, 1.5)
    for step in biased.steps:
        assert torch.equal((step.bias_ih + step.bias_hh)[24:48], torch.full((24,), 1.5))
        assert (step.bias_ih + step.bias_hh)[:24].abs().min() > 0
    assert all(0.9 * 24**-0.5 < value.abs().max() <= 24**-0.5 for value in plain.parameters() if value.ndim > 1)


def test_as_many_numbers_are_learned_as_counted():
    def count(module):
        return sum(value.numel() for value in module.parameters())

    assert count(LSTM(768)) == 4_724_736 and count(LSTM(768, 2)) == 9_449_472
    assert count(GRU(768)) == 3_543_552 and count(TransformerLayer(768, 12)) == 7_087_872
    assert count(LongTermPrompts(12, 10, 768)) == 92_160 + 4_724_736


# ── the control that hears nothing of prompts ────────────────────────────────────────────────────────


@pytest.mark.parametrize("carry", ["lstm", "gru", "transformer"])
def test_a_control_that_does_not_hear_learns_as_many_numbers_and_nothing_of_its_prompts_travels(carry):
    heard, control = prompts_of(carry=carry), prompts_of(carry=carry, hears=False)
    control.load_state_dict(heard.state_dict())
    assert (features_of(control) - features_of(heard)).abs().max() > 1e-6
    assert tower64()(images(), heard.start(), all_rows=True).prompts is not None
    assert tower64()(images(), control.start(), all_rows=True).prompts is None
    assert all(gradient.norm() > 1e-8 for gradient in gradients(features_of(control), control.parameters()))


def test_the_control_is_a_setting_of_lspt_that_needs_something_that_carries(tiny_vit):
    assert LSPT().build(tiny_vit).model.prompts.hears and not LSPT(hears=False).build(tiny_vit).model.prompts.hears
    assert LSPT(hears=False).idle() == {} and "hears" in LSPT(hears=False, carry="none").idle()


def test_a_control_knows_images_by_their_patches_alone():
    for spatial in ("mean", "none"):
        for entered in entering_of(tower64(), prompts_of(hears=False, spatial=spatial), images())[1:]:
            assert torch.equal(entered, entered[:1].expand(5, -1, -1)) == (spatial == "none")


def test_clusters_of_a_control_come_in_the_order_of_the_prompts_that_come_next():
    control = prompts_of(hears=False, spatial="kmeans")
    carry = torch_lstm(control.carriers[0])

    def entering(layer, out, patches):
        given = control.value(layer)
        return carry(layer, given, coded(patches, given.expand(5, -1, -1), "kmeans")) if layer else given[None]

    near(features_of(control), by_hand(tower64(), images(), entering)[0])


# ── what patches say ─────────────────────────────────────────────────────────────────────────────────


def test_a_shift_of_all_patches_shifts_what_is_told_and_the_class_token_is_not_told_of():
    prompts = prompts_of()
    tokens, carried, shift = drawn(5, 17, 24), drawn(5, 4, 24, seed=8), drawn(24, seed=9)
    hidden, given = prompts.start()._hidden, prompts.value(1)
    near(
        hidden(tokens + torch.cat([torch.zeros(1, 24), torch.ones(16, 24)]) * shift, carried, given),
        hidden(tokens, carried, given) + shift,
    )
    moved = tokens.clone()
    moved[:, 0] += 100
    assert torch.equal(hidden(moved, carried, given), hidden(tokens, carried, given))


def test_without_a_carrier_the_next_set_enters_with_what_patches_say_and_nothing_travels():
    prompts = prompts_of(carry="none")
    want, _ = by_hand(
        tower64(),
        images(),
        lambda layer, _, patches: prompts.value(layer)[None] + (patches.mean(1, keepdim=True) if layer else 0),
    )
    near(features_of(prompts), want)
    assert tower64()(images(), prompts.start()).prompts is None


def test_clusters_are_brought_into_the_order_of_what_became_of_the_prompts():
    prompts = prompts_of(spatial="kmeans")
    carry = torch_lstm(prompts.carriers[0])

    def entering(layer, out, patches):
        given = prompts.value(layer)
        return carry(layer, given, out + coded(patches, out, "kmeans")) if layer else given[None]

    near(features_of(prompts), by_hand(tower64(), images(), entering)[0])
    assert (features_of(prompts) - features_of(prompts_of())).abs().max() > 1e-4


# ── what it is without its parts, and what stays ─────────────────────────────────────────────────────


def test_with_both_parts_off_it_is_vpt_deep_bit_for_bit_and_shares_its_file():
    prompts, deep = prompts_of(carry="none", spatial="none"), DeepPrompts(range(3), 4, 24).double()
    deep.load_state_dict(prompts.state_dict())
    ours, theirs = features_of(prompts), features_of(deep)
    assert torch.equal(ours, theirs)
    pairs = zip(gradients(ours, prompts.parameters()), gradients(theirs, deep.parameters()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("carry", ["lstm", "gru", "transformer", "none"])
def test_a_state_dict_makes_the_same_prompts(carry):
    options = {"carry": carry, "learn_cell": True, "shared": False}
    one, other = prompts_of(**options), LongTermPrompts(3, 4, 24, heads=2, **options).double()
    other.load_state_dict(one.state_dict())
    assert torch.equal(features_of(one), features_of(other))


def test_the_order_of_prompts_does_not_matter():
    prompts, other = prompts_of(), prompts_of()
    order = [2, 0, 3, 1]
    for layer in range(3):
        other.value(layer).data.copy_(prompts.value(layer)[order])
    near(features_of(other), features_of(prompts))
    for moved, entered in zip(*(entering_of(tower64(), p, images()) for p in (other, prompts)), strict=True):
        near(moved, entered[:, order])


def test_a_module_keeps_nothing_of_a_batch():
    prompts = prompts_of()
    first = features_of(prompts)
    features_of(prompts, drawn(7, 3, 32, 32, seed=11))
    assert torch.equal(features_of(prompts), first)


@pytest.mark.parametrize("carry", ["lstm", "none"])
def test_only_what_carries_brings_a_gradient_to_early_prompts_where_images_bring_none(monkeypatch, carry):
    run = engine.run_block

    def cut(block, x, splice, mask, tap, layer, length, *rest):
        out = run(block, torch.cat([x[:, :length].detach(), x[:, length:]], 1), splice, mask, tap, layer, length, *rest)
        return out if layer == 2 else torch.cat([out[:, :length].detach(), out[:, length:]], 1)

    prompts = prompts_of(carry=carry)
    values = [prompts.value(i) for i in range(3)]
    whole = gradients(features_of(prompts), values)
    assert all(gradient.norm() > 1e-8 for gradient in whole)
    monkeypatch.setattr(engine, "run_block", cut)
    *early, last = gradients(features_of(prompts), values)
    assert last.norm() > 1e-8
    assert all(part.norm() > 1e-8 if carry == "lstm" else not part.any() for part in early)


def test_a_tower_without_patches_is_refused_unless_nothing_is_told_of_them(tiny_vit):
    text = tiny_clip().text.tower
    with pytest.raises(UnsupportedBackbone) as error:
        LongTermPrompts.behind(text, 4)
    assert str(error.value) == (
        "prompts are told of patches, and a TextTower has none: take an image tower, or spatial='none'"
    )
    assert LongTermPrompts.behind(text, 4, spatial="none").depth == text.depth
    prompts = LongTermPrompts.behind(tiny_vit, 4, carry="transformer")
    assert (prompts.first_patch, prompts.carriers[0].heads, prompts.depth) == (1, 2, 3)


def test_patches_begin_behind_class_token_and_registers():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    tower = TimmTower.create("vit_tiny_patch16_224", reg_tokens=4, **sizes)
    assert LongTermPrompts.behind(tower, 3).first_patch == 5
    assert LongTermPrompts.behind(tiny_clip(), 3).first_patch == 1


def test_more_prompts_than_patches_are_refused_before_anything_is_learned():
    sizes = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for tower in (TimmTower.create("vit_tiny_patch16_224", reg_tokens=4, **sizes), tiny_clip()):
        there = tower.embed(torch.zeros(1, 3, *getattr(tower, "size", (24, 32))))[0].shape[1] - tower.first_patch
        assert len(LongTermPrompts.behind(tower, there, spatial="kmeans").value(0)) == there
        with pytest.raises(ConfigError, match=f"images here have {there} patches for {there + 1} prompts; "):
            LongTermPrompts.behind(tower, there + 1, spatial="kmeans")
        assert len(LongTermPrompts.behind(tower, there + 1).value(0)) == there + 1
