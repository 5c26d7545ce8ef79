"""VPT-shallow against sequences computed slowly. B 5, N 17, M 4, D 24, L 3."""

import pytest
import torch

from lamina.methods.vpt_shallow import VPTShallow
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.shallow import ShallowPrompts
from tests.prompts.sequences import by_hand, drawn, gradients, images, near, tower64


def prompts_of():
    prompts = ShallowPrompts(3, 4, 24).double()
    with torch.no_grad():
        prompts.value(0).copy_(drawn(4, 24))
    return prompts


def test_every_block_gets_what_the_one_before_made_of_the_prompts():
    tower, prompts = tower64(), prompts_of()
    want, _ = by_hand(tower, images(), lambda layer, out, _: out if layer else prompts.value(0)[None])
    got = tower(images(), prompts.start()).features
    near(got, want)
    (ours,), (theirs,) = (gradients(features, prompts.parameters()) for features in (got, want))
    assert theirs.abs().max() > 1e-3
    near(ours, theirs, 1e-9)


def test_it_is_vpt_deep_of_depth_one_bit_for_bit():
    tower, shallow, deep = tower64(), prompts_of(), DeepPrompts(range(1), 4, 24, onward=3).double()
    deep.load_state_dict(shallow.state_dict())
    ours, theirs = (tower(images(), prompts.start()).features for prompts in (shallow, deep))
    assert torch.equal(ours, theirs)


def test_it_is_not_vpt_deep_of_the_first_block_alone():
    tower, shallow, deep = tower64(), prompts_of(), DeepPrompts(range(1), 4, 24).double()
    deep.load_state_dict(shallow.state_dict())
    ours, theirs = (tower(images(), prompts.start()).features for prompts in (shallow, deep))
    assert (ours - theirs).abs().max() > 1e-3


def test_a_tower_that_reads_the_mean_of_patches_reads_no_prompts():
    tower, prompts = tower64(), prompts_of()
    tower.readout = None
    tower.pool = lambda tokens: tower.final_norm(tokens)[:, 1:].mean(1)
    want, _ = by_hand(tower, images(), lambda layer, out, _: out if layer else prompts.value(0)[None])
    near(tower(images(), prompts.start()).features, want)


def test_prompts_without_tokens_leave_the_tower_as_it_is():
    near(tower64()(images(), ShallowPrompts(3, 0, 24).double().start()).features, tower64()(images()).features)


def test_what_is_dropped_is_dropped_once_where_prompts_enter(tiny_vit):
    prompts = ShallowPrompts(3, 4, 24, dropout=0.5)
    seen = []
    torch.manual_seed(0)
    tiny_vit(images().float(), prompts.start(), lambda probe: seen.append(probe.entering))
    assert (seen[0] == 0).float().mean() > 0.3 and not (seen[1] == 0).any() and not (seen[2] == 0).any()


def test_the_method_learns_one_set_and_its_head(tiny_vit):
    learner = VPTShallow(length=5, dropout=0.2).build(tiny_vit)
    prompts = learner.model.prompts
    assert {name: tuple(value.shape) for name, value in prompts.named_parameters()} == {"values.0": (5, 24)}
    bound = (6 / (192 + 24)) ** 0.5
    assert 0.8 * bound < prompts.value(0).abs().max() <= bound and prompts.dropout == 0.2


@pytest.mark.parametrize("training", [True, False])
def test_two_passes_without_dropout_are_equal_to_the_bit(tiny_vit, training):
    prompts, pixels = ShallowPrompts(3, 4, 24).train(training), images().float()
    assert torch.equal(tiny_vit(pixels, prompts.start()).features, tiny_vit(pixels, prompts.start()).features)
