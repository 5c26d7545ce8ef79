"""Towers of which training moves something: B 7, N 17, M 5, D 24, H 2, L 3; of CLIP D 48, F 24."""

import copy

import pytest
import torch
from torch import nn

from lamina.backbones.clip import ClipImageTower
from lamina.backbones.packed import FrozenLinear
from lamina.backbones.splice import Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.errors import ConfigError
from lamina.prompts.base import Scripted
from tests.backbones.clips import clip, images as clip_images, tiny_clip
from tests.backbones.conftest import tiny

KINDS = {
    "plain": {},
    "average-pooled": {"global_pool": "avg"},
    "query and key norm": {"qk_norm": True},
    "layer scale": {"name": "deit3_small_patch16_224"},
    "pre-norm": {"name": "vit_base_patch16_clip_224"},
}


def everything(name):
    return True


def biases(name):
    return name.endswith("bias")


def values_of(tower):
    return {name: value.clone() for name, value in tower.state_dict().items()}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("select", [everything, biases])
def test_before_it_is_trained_its_features_are_those_of_the_frozen_tower(arguments, select, images, values):
    frozen = TimmTower(tiny(**arguments))
    tuned = frozen.tuned(select)
    for prompts in (None, Scripted(lambda layer, *_: Splice(context=values[layer]))):
        for options in ({}, {"all_rows": True}, {"tap": lambda probe: None}):
            expected = frozen(images, prompts, **options).features
            torch.testing.assert_close(tuned(images, prompts, **options).features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unlike", ["unnormed", "unprojected"])
def test_towers_made_of_a_tuned_one_share_its_weights_and_know_what_is_learned(unlike):
    tuned = ClipImageTower(clip()).tuned(biases)
    other = getattr(tuned, unlike)()
    other = other[0] if isinstance(other, tuple) else other
    assert other is not tuned and other.learned == tuned.learned
    assert all(a is b for a, b in zip(other.parameters(), tuned.parameters(), strict=True))


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("all_rows", [False, True])
def test_all_gradients_are_those_of_timm_itself(arguments, all_rows, images):
    model = tiny(**arguments).double()
    tuned = TimmTower(copy.deepcopy(model), dtype=torch.float64).tuned(everything)
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64)
    (model.forward_head(model.forward_features(images.double()), pre_logits=True) @ direction).sum().backward()
    (tuned(images.double(), all_rows=all_rows).features @ direction).sum().backward()
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in tuned.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["plain", "own attention", "quick"])
def test_in_float32_no_weight_of_clip_goes_without_its_gradient(kind):
    model = clip(kind)
    tuned = ClipImageTower(copy.deepcopy(model)).tuned(everything)
    direction = torch.linspace(-1, 1, 24)
    (model.encode_image(clip_images()) @ direction).sum().backward()
    (tuned(clip_images()).features @ direction).sum().backward()
    expected = sorted(p.grad.norm().item() for p in model.visual.parameters())
    found = sorted(p.grad.norm().item() for p in tuned.parameters())
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5) and len(found) > 30


def test_biases_get_the_gradients_that_they_have_among_all(images):
    tower, direction, seen = TimmTower(tiny()), torch.linspace(-1, 1, 24), []
    for select in (everything, biases):
        tuned = tower.tuned(select)
        (tuned(images).features @ direction).sum().backward()
        seen.append({name: p.grad for name, p in tuned.named_parameters() if p.grad is not None})
    whole, some = seen
    assert some.keys() == {name for name in whole if name.endswith("bias")} and len(some) == 1 + 3 * 6 + 1
    for name, grad in some.items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-5)


def test_what_is_picked_asks_for_a_gradient_and_nothing_else_does(tower):
    tuned = tower.tuned(lambda name: "blocks.1.mlp" in name)
    expected = {f"model.blocks.1.mlp.{layer}.{what}" for layer in ("fc1", "fc2") for what in ("weight", "bias")}
    assert tuned.learned == expected == {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert tower.learned == frozenset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_copy_and_leaves_the_frozen_tower_as_it_was(dtype, images):
    frozen = TimmTower(tiny(), dtype=dtype)
    expected = frozen(images).features  # a bf16 tower packs its weights in this call
    tuned = frozen.tuned(everything)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1.0)
    assert torch.equal(frozen(images).features, expected)
    assert any(isinstance(part, FrozenLinear) for part in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_tower_in_bf16_is_tuned_in_float32_from_its_rounded_weights(half, images):
    tuned, before = half.tuned(everything), values_of(half)
    assert tuned.dtype == torch.float32 == tuned(images).features.dtype
    for name, value in tuned.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name].float()), name
    assert half.dtype == torch.bfloat16
    near = half(images).features
    assert (tuned(images).features - near).abs().max() < 0.05 * near.abs().max()


def test_its_layers_are_plain_ones(tower):
    tuned = tower.tuned(biases)
    assert not any(isinstance(part, FrozenLinear) for part in tuned.modules())
    assert sum(type(part) is nn.Linear for part in tuned.modules()) == 3 * 4
    assert tuned.state_dict().keys() == tower.state_dict().keys()


def test_it_has_no_training_behaviour_whatever_it_is_told(images):
    tower = TimmTower(tiny(drop_rate=0.3, proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.5))
    tuned = tower.tuned(everything)
    nn.ModuleList([tuned]).train()
    assert not any(part.training for part in tuned.modules())
    assert torch.equal(tuned(images).features, tuned(images).features)


def test_a_text_side_is_shared_and_not_tuned():
    tower = tiny_clip()
    tuned = tower.tuned(everything)
    assert tuned.text is tower.text and not any(p.requires_grad for p in tuned.text.tower.parameters())
    assert not any("text" in name for name in tuned.learned)


def test_where_nothing_is_picked_there_is_nothing_to_tune():
    tower = TimmTower(tiny(qkv_bias=False))
    with pytest.raises(ConfigError) as error:
        tower.tuned(lambda name: name.endswith("qkv.bias"))
    assert str(error.value) == "there is nothing to tune: no parameter of this TimmTower was picked"


def test_caches_cannot_take_it_for_the_frozen_tower(tower):
    assert tower.tuned(biases).fingerprint != tower.fingerprint
