"""timm towers: parity with timm's own forward pass, and what is refused."""

import copy

import pytest
import timm
import torch

from lamina.backbones.timm_vit import TimmTower, fingerprint
from lamina.errors import UnsupportedBackbone

MODELS = {
    "plain": {},
    "average-pooled": {"global_pool": "avg"},
    "no class token": {"global_pool": "avg", "class_token": False},
    "max-pooled": {"global_pool": "max"},
    "odd image": {"img_size": (20, 12)},
    "odd patches": {"img_size": 15, "patch_size": 5},
    "query and key norm": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
    "deit": {"name": "deit3_small_patch16_224"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "registers": {"name": "vit_small_patch14_reg4_dinov2"},
    "clip": {"name": "vit_base_patch16_clip_224"},
    "siglip": {"name": "vit_base_patch16_siglip_224"},
    "any size": {"dynamic_img_size": True, "fed": (24, 16)},
}


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tapped", [False, True])
def test_without_prompts_it_is_timm(make, arguments, tapped, kernel):
    arguments = dict(arguments)
    size = arguments.pop("fed", arguments.get("img_size", 16))
    model = make(**arguments)
    images = torch.randn(7, 3, *(size if isinstance(size, tuple) else (size, size)))
    tokens = model.forward_features(images)
    features = model.forward_head(tokens, pre_logits=True)

    tower = TimmTower(copy.deepcopy(model))
    tap = (lambda probe: None) if tapped else None
    whole = tower(images, tap=tap, all_rows=True)
    torch.testing.assert_close(tower.final_norm(whole.tokens), tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.features, features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower(images, tap=tap).features, features, rtol=1e-5, atol=1e-5)
    assert tower.features == features.shape[1]
    assert (tower.width, tower.depth) == (24, 3)


def test_the_models_above_differ_in_what_they_are_here_for(make):
    assert make("vit_small_patch14_reg4_dinov2").num_prefix_tokens == 5
    assert make("deit3_small_patch16_224").blocks[0].ls1.gamma.std() > 0.1
    assert not isinstance(make("vit_base_patch16_clip_224").norm_pre, torch.nn.Identity)
    assert make("deit_tiny_distilled_patch16_224").num_prefix_tokens == 2


def test_prompts_that_enter_before_the_pre_norm_are_normed_by_it(make):
    tower = TimmTower(make("vit_base_patch16_clip_224"))
    prompts = torch.randn(5, 24)
    torch.testing.assert_close(tower.pre_norm(prompts), tower.model.norm_pre(prompts))
    plain = TimmTower(make())
    assert torch.equal(plain.pre_norm(prompts), prompts)


def test_a_beit_is_refused_and_the_message_says_what_to_write():
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, num_classes=0)
    with pytest.raises(UnsupportedBackbone) as error:
        TimmTower(model)
    assert str(error.value) == (
        "block 0 of Beit is a timm.models.beit.Block with timm.models.beit.Attention; lamina can prompt "
        "timm.models.vision_transformer.Block with timm.layers.attention.Attention. To add a block type, write a "
        "BlockView for it in lamina/backbones/timm_vit.py."
    )


@pytest.mark.parametrize(
    "name, small",
    [
        ("eva02_tiny_patch14_224", {"depth": 1}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("resnet10t", {}),
        ("vit_relpos_small_patch16_224", {"depth": 1}),
        ("naflexvit_base_patch16_gap", {"depth": 1}),
    ],
)
def test_other_models_are_refused(name, small):
    with pytest.raises(UnsupportedBackbone, match="lamina can prompt"):
        TimmTower(timm.create_model(name, num_classes=0, **small))


def test_a_gate_is_refused(make):
    model = make()
    model.blocks[1].attn.gate = torch.nn.Linear(24, 24)
    with pytest.raises(UnsupportedBackbone, match="block 1"):
        TimmTower(model)


def test_a_tower_can_be_made_from_a_name(images):
    tower = TimmTower.create("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, dtype=torch.bfloat16)
    assert tower(images).features.shape == (7, 192)
    assert tower.dtype == torch.bfloat16


def test_a_fingerprint_is_of_weights_before_the_cast(make):
    full, half = TimmTower(make()), TimmTower(make(), dtype=torch.bfloat16)
    assert full.fingerprint == half.fingerprint == fingerprint(make())
    assert len(full.fingerprint) == 16
    other = make()
    with torch.no_grad():
        other.blocks[2].mlp.fc2.bias[3] += 1e-3
    assert TimmTower(other).fingerprint != full.fingerprint
