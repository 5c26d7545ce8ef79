"""What features are read from: the class token, patches, or patches and prompts; behind which last norm."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.load import load_backbone
from lamina.backbones.splice import Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.errors import ConfigError, UnsupportedBackbone
from lamina.heads.linear import LinearHead
from lamina.model import Batch, PromptedModel
from lamina.prompts.base import Scripted
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.gated import GatedPrompts
from lamina.prompts.long_term import LongTermPrompts
from lamina.prompts.shallow import ShallowPrompts
from tests.backbones.clips import tiny_clip

POOLINGS = ("cls", "mean_patch", "mean_all")
NORMS = ("pretrained", "fresh")
MEANS = ("mean_patch", "mean_all")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def blocks(model, images, values=None):
    """The sequence after the last block by timm's own blocks, prompts (L, M, D) behind it, new ones for each block."""
    x = model._pos_embed(model.patch_embed(images))
    rows = x.shape[1]
    for layer, block in enumerate(model.blocks):
        if values is not None:
            x = torch.cat([x[:, :rows], values[layer].expand(len(x), -1, -1)], 1)
        x = block(x)
    return x


def by_hand(model, x, pooling, norm, rows=17):
    """Features of a final sequence: what is pooled, and then its norm."""
    pooled = {"cls": x[:, 0], "mean_patch": x[:, 1:rows].mean(1), "mean_all": x[:, 1:].mean(1)}[pooling]
    return model.norm(pooled) if norm == "pretrained" else F.layer_norm(pooled, (24,), eps=model.norm.eps)


@pytest.mark.parametrize("pooling, norm", itertools.product(POOLINGS, NORMS))
def test_features_are_pooled_first_and_normed_then(vit, images, values, pooling, norm):
    tower = TimmTower(copy.deepcopy(vit)).reading(pooling, norm)
    close(tower(images).features, by_hand(vit, blocks(vit, images), pooling, norm))
    prompts = DeepPrompts(range(3), 5, 24)
    with torch.no_grad():
        for own, value in zip(prompts.values.values(), values, strict=True):
            own.copy_(value)
    close(tower(images, prompts.start()).features, by_hand(vit, blocks(vit, images, values), pooling, norm))
    assert tower.features == 24


def test_a_fresh_norm_multiplies_by_one_and_adds_nothing(vit, images):
    features = TimmTower(vit).reading("mean_patch", "fresh")(images).features
    close(features.mean(1), torch.zeros(7))
    close(features.var(1, correction=0), torch.ones(7), 1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_mean_of_all_hears_what_becomes_of_the_prompts(vit, images, values, pooling):
    tower = TimmTower(vit).reading(pooling)

    def moved(last):
        """Features with prompts in the first block, of which the last block adds something to what it made of them."""

        def add(x, y):
            return torch.cat([y[:, :-5], y[:, -5:] + last * values[1]], 1)

        def at(layer, tokens, carried):
            if layer == 0:
                return Splice(tokens=values[0].expand(len(tokens), -1, -1))
            return Splice(branch=add) if layer == 2 else None

        return tower(images, Scripted(at)).features

    heard = not torch.allclose(moved(0.0), moved(0.5), atol=1e-3)
    assert heard == (pooling == "mean_all")


def kinds():
    torch.manual_seed(3)
    return {
        "deep": DeepPrompts(range(3), 5, 24),
        "in the last block alone": DeepPrompts([2], 5, 24),
        "partial, which travel on": DeepPrompts([0, 1], 5, 24, onward=3),
        "shallow": ShallowPrompts(3, 5, 24),
        "gated": GatedPrompts(3, 5, 24, gate_init=0.3),
        "long-term": LongTermPrompts(3, 5, 24),
    }


@pytest.mark.parametrize("kind", kinds())
def test_prompts_that_leave_no_trace_elsewhere_can_be_read_with_the_mean_of_all(vit, images, kind):
    prompts = kinds()[kind].eval()
    entered = {}

    def note(probe):
        if probe.layer == 2:
            entered["rows"] = torch.cat([probe.inputs, probe.entering], 1)

    tower = TimmTower(copy.deepcopy(vit))
    plain = tower(images, prompts.start(), all_rows=True)
    pooled = tower.reading("mean_all")(images, prompts.start(), note, all_rows=True)
    assert entered["rows"].shape == (7, 17 + 5, 24)
    close(pooled.tokens, plain.tokens)  # the frozen sequence sees no difference
    if kind != "gated":  # whose last block divides its logits
        close(pooled.features, by_hand(vit, vit.blocks[2](entered["rows"]), "mean_all", "pretrained"))
    assert not torch.allclose(pooled.features, tower.reading("mean_patch")(images, prompts.start()).features, atol=1e-3)


def test_prompts_of_blocks_before_the_last_that_do_not_travel_cannot_be_read(vit, images):
    prompts = DeepPrompts([0, 1], 5, 24)
    tower = TimmTower(vit)
    all_, patches = (tower.reading(pooling)(images, prompts.start()).features for pooling in ("mean_all", "mean_patch"))
    assert torch.equal(all_, patches)


def test_contexts_that_cannot_travel_stay_contexts(vit, images, values):
    tower = TimmTower(vit)
    for more in ({"context_normed": True}, {"frozen_only": True}):
        passed = Scripted(lambda layer, tokens, carried, more=more: Splice(context=values[layer], **more))
        read = [tower.reading(pooling)(images, passed).features for pooling in ("mean_all", "mean_patch")]
        assert torch.equal(*read)


def test_a_context_travels_behind_tokens_and_only_they_come_back(vit, images, values):
    tower = TimmTower(copy.deepcopy(vit)).reading("mean_all")
    seen = []

    def at(layer, tokens, carried):
        seen.append(None if carried is None else carried.shape[1])
        tokens = values[0, :3].expand(len(tokens), -1, -1) if layer == 0 else None
        return Splice(tokens=tokens, context=values[layer])

    encoded = tower(images, Scripted(at), layers=3)
    assert seen == [None, 3, 3] and encoded.prompts.shape == (7, 3, 24)
    x = vit._pos_embed(vit.patch_embed(images))
    x, read = torch.cat([x, values[0, :3].expand(7, -1, -1)], 1), []
    for layer, block in enumerate(vit.blocks):
        whole = block(torch.cat([x, values[layer].expand(7, -1, -1)], 1))
        read.append(by_hand(vit, whole, "mean_all", "pretrained"))
        x = whole[:, :20]
    close(encoded.features, torch.cat(read, 1))
    close(encoded.prompts, vit.norm(x[:, 17:]))


@pytest.mark.parametrize("pooling", MEANS)
def test_every_prompt_of_the_last_block_gets_a_gradient(vit, images, pooling):
    prompts = DeepPrompts(range(3), 5, 24)
    weights = torch.randn(7, 24)
    (TimmTower(vit).reading(pooling)(images, prompts.start()).features * weights).sum().backward()
    assert all(value.grad.norm(dim=1).min() > 1e-8 for value in prompts.values.values())


def test_prefixed_rows_are_no_patches(make, images):
    vit = make("vit_small_patch14_reg4_dinov2", img_size=16, patch_size=4)
    tower = TimmTower(copy.deepcopy(vit)).reading("mean_patch")
    patches = vit.forward_intermediates(images, indices=1, norm=False, output_fmt="NLC", intermediates_only=True)[-1]
    close(tower(images).features, vit.norm(patches.mean(1)))


def test_a_mean_of_a_tower_in_bf16_is_taken_in_float32(half, images):
    tower = half.reading("mean_patch")
    tokens = half(images, all_rows=True).tokens
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tower(images).features, tower.final_norm(tokens[:, 1:].float().mean(1)))


def test_the_query_of_a_pool_is_read_like_the_features(vit, images):
    tower = TimmTower(vit).reading("mean_all", "fresh")
    model = PromptedModel(tower, None, LinearHead(24))
    assert torch.equal(model.query(Batch(images)), tower(images).features)
    assert torch.equal(tower.read(tower(images, all_rows=True).tokens), tower(images).features)


# ── what stays ─────────────────────────────────────────────────────────────────────────────────────


def test_a_backbones_own_way_keeps_its_fingerprint(make):
    token, average = TimmTower(make()), TimmTower(make(global_pool="avg"))
    assert token.reading("cls") is token and token.reading() is token
    assert average.reading("mean_patch") is average


def test_each_way_of_reading_has_a_fingerprint_of_its_own(make):
    for tower in (TimmTower(make()), TimmTower(make(global_pool="avg"))):
        ways = itertools.product(POOLINGS, NORMS)
        assert len({tower.reading(pooling, norm).fingerprint for pooling, norm in ways}) == 6


def test_a_model_that_averages_has_its_norm_behind_the_mean(make, images):
    vit = make(global_pool="avg")
    tower = TimmTower(copy.deepcopy(vit))
    x = blocks(vit, images)
    close(tower.reading("cls")(images).features, vit.fc_norm(x[:, 0]))
    close(tower.reading("mean_patch", "fresh")(images).features, F.layer_norm(x[:, 1:].mean(1), (24,), eps=1e-6))


def test_weights_are_shared_not_copied_and_stay_frozen(vit):
    tower = TimmTower(vit)
    read = tower.reading("mean_all", "fresh")
    assert read.model is tower.model and tower.pooling is None and tower.readout == slice(0, 1)
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_before_the_norm_the_same_is_pooled(vit, images):
    tower = TimmTower(vit)
    tokens = tower(images, all_rows=True).tokens
    for pooling, rows in {"cls": tokens[:, 0], "mean_patch": tokens[:, 1:].mean(1)}.items():
        close(tower.reading(pooling, "fresh").unnormed()(images).features, rows)


def test_five_steps_of_training_leave_a_tower_as_it_was_and_two_looks_the_same(make, images):
    tower = TimmTower(make(drop_path_rate=0.5, drop_rate=0.5, pos_drop_rate=0.5)).reading("mean_all")
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    model = PromptedModel(tower, DeepPrompts(range(3), 5, 24), LinearHead(24))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(5):
        model.features(Batch(images))[0][:, :11].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in tower.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert torch.equal(model.features(Batch(images))[0], model.features(Batch(images))[0])


# ── by name ────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_may_say_what_is_read():
    plain, read = (load_backbone(f"timm:test_vit@random{said}") for said in ("", "#mean_all,fresh"))
    assert read.name == "timm:test_vit@random#mean_all,fresh"
    assert read.fingerprint == f"{plain.fingerprint}-mean_all-fresh"
    assert (read.tower.pooling, read.tower.fresh, read.pixels) == ("mean_all", True, plain.pixels)
    assert load_backbone("timm:test_vit@random#fresh").tower.pooling == "cls"
    assert load_backbone("timm:test_vit@random#cls").fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    "name, message",
    {
        "timm:test_vit@random#mean_pach": "no read-out is called 'mean_pach'; did you mean 'mean_patch'? Known: cls, "
        "fresh, mean_all, mean_patch, pretrained; or a size, such as 512px",
        "timm:test_vit@random#cls,mean_all": "features are read in one way; got cls,mean_all: name one pooling, one "
        "norm and one size at most",
        "timm:vit_base_patch16_siglip_224@random#cls": "there is no class token to read; take mean_patch or mean_all",
        "timm:vit_base_patch16_siglip_224@random#fresh": "it pools by 'map', which is none of cls, mean_patch, "
        "mean_all; name one of these beside fresh",
    }.items(),
)
def test_what_cannot_be_read_is_said_in_one_line(name, message, monkeypatch):
    monkeypatch.setattr("lamina.backbones.load.timm.create_model", small(__import__("timm").create_model))
    with pytest.raises(ConfigError) as error:
        load_backbone(name)
    assert str(error.value) == f"{name}: {message}"


def small(create):
    def made(name, **arguments):
        tiny = {} if name == "test_vit" else {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}
        return create(name, **arguments, **tiny)

    return made


def test_a_tower_beside_texts_is_read_in_its_own_way_alone():
    with pytest.raises(UnsupportedBackbone) as error:
        tiny_clip().reading("mean_patch")
    assert str(error.value) == "the features of a ClipImageTower can be read in one way only, its own"
    with pytest.raises(UnsupportedBackbone) as error:
        load_backbone("lamina:clip-nano#mean_patch")
    assert str(error.value) == (
        "lamina:clip-nano#mean_patch: the text side lives beside the features of the image tower, so these stay"
    )
