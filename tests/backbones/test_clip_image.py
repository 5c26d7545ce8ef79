"""The image tower of CLIP: parity with open_clip, prompts against loops over open_clip's blocks, what is refused."""

import hashlib
import itertools

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamina.backbones.clip import ClipImageTower
from lamina.backbones.splice import Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.errors import ConfigError, ShapeError, UnsupportedBackbone
from lamina.methods.dualprompt import DualPrompt
from lamina.methods.l2p import L2P
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch
from lamina.prompts.base import Scripted
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.prefix import ExpertPrefixes
from lamina.protections.spectrum import Cut
from tests.backbones.clips import KINDS, clip, close, images
from tests.streams import blobs, trainer_of

VALUES = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
ATTENTIONS = ["plain", "own attention"]


def tower_and_model(kind="plain", dtype=torch.float32):
    return ClipImageTower(clip(kind), dtype=dtype), clip(kind).visual


def each(value):
    return value.expand(7, -1, -1)


def deep(values, **more):
    return Scripted(lambda layer, tokens, carried: Splice(context=values[layer], **more))


def entering(visual, pictures):
    """What open_clip's first block gets."""
    return visual._embeds(pictures)


def leaving(visual, x):
    """What open_clip makes of a sequence after its last block."""
    return visual.ln_post(x)[:, 0] @ visual.proj


# ── without prompts ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize(
    "kind", [kind for kind, changes in KINDS.items() if "words" not in changes or "vision" in changes]
)
def test_without_prompts_it_is_open_clip(kind, tapped):
    tower, tap = ClipImageTower(clip(kind)), (lambda probe: None) if tapped else None
    expected = clip(kind).encode_image(images())
    close(tower(images(), tap=tap).features, expected)
    close(tower(images(), tap=tap, all_rows=True).features, expected)
    assert (tower.width, tower.depth, tower.features) == (48, 3, 24) and expected.shape == (7, 24)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("plain", "clip_224"), ("quick", "clip_quickgelu_224")])
def test_a_tower_of_timm_with_the_converted_weights_says_the_same(kind, name, prompted, tmp_path):
    """timm reads open_clip's file; its tower has the features before their projection."""
    save_file(clip(kind).state_dict(), tmp_path / "weights.safetensors")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    file = {"file": str(tmp_path / "weights.safetensors")}
    timm_tower = TimmTower.create(f"vit_base_patch16_{name}", pretrained=True, pretrained_cfg_overlay=file, **sizes)
    tower, projection = ClipImageTower(clip(kind)).unprojected()
    said = [part(images(), deep(VALUES) if prompted else None).features for part in (timm_tower, tower)]
    close(*said)
    if not prompted:
        close(said[0] @ projection, clip(kind).encode_image(images()))


def test_the_models_differ_in_what_they_are_here_for():
    said = {kind: clip(kind).encode_image(images()) for kind in ("plain", "quick", "layer scale", "own epsilon")}
    for one, other in itertools.combinations(said.values(), 2):
        assert (one - other).abs().max() > 1e-2
    attention = clip("own attention").visual.transformer.resblocks[0].attn
    assert type(attention) is open_clip.transformer.Attention
    assert type(clip().visual.transformer.resblocks[0].attn) is nn.MultiheadAttention


def test_prompts_of_length_zero_change_nothing_at_all():
    tower, nothing = ClipImageTower(clip()), torch.zeros(3, 0, 48)
    plain = tower(images()).features
    assert torch.equal(tower(images(), deep(nothing)).features, plain)
    prefix = Scripted(lambda layer, *_: Splice(prefix=(nothing[0], nothing[0])))
    assert torch.equal(tower(images(), prefix).features, plain)
    assert torch.equal(tower(images(), Scripted(lambda *_: None)).features, plain)


def test_features_before_the_final_norm_are_the_class_row():
    tower, visual = tower_and_model()
    unnormed = tower.unnormed()
    x = entering(visual, images())
    for block in visual.transformer.resblocks:
        x = block(x)
    close(unnormed(images()).features, x[:, 0])
    assert (unnormed.features, tower.features) == (48, 24)
    assert unnormed.fingerprint == f"{tower.fingerprint}-unnormed"
    assert unnormed.patches is tower.patches and unnormed.stack is tower.stack
    close(tower(images()).features, clip().encode_image(images()))


def test_features_before_the_projection_are_the_class_row_after_the_final_norm():
    tower, visual = tower_and_model()
    bare, projection = tower.unprojected()
    x = entering(visual, images())
    for block in visual.transformer.resblocks:
        x = block(x)
    close(bare(images()).features, visual.ln_post(x[:, 0]))
    close(bare(images()).features @ projection, tower(images()).features)
    assert projection is tower.projection and (bare.features, tower.features) == (48, 24)
    assert bare.fingerprint == f"{tower.fingerprint}-unprojected" and bare.stack is tower.stack
    assert bare.unprojected() == (bare, None) and tower.unnormed().unprojected()[1] is None
    close(tower(images()).features, clip().encode_image(images()))


def test_the_weight_of_the_norm_before_the_first_block_is_the_models_if_it_has_one():
    tower, visual = tower_and_model()
    assert torch.equal(tower.pre_weight(), visual.ln_pre.weight)
    assert ClipImageTower(clip("no pre-norm")).pre_weight() is None


def test_a_class_position_is_there_where_no_norm_comes_between():
    assert ClipImageTower(clip()).class_position() is None
    bare = ClipImageTower(clip("no pre-norm"))
    assert torch.equal(bare.class_position(), clip("no pre-norm").visual.positional_embedding[0])


# ── prompts, against loops over open_clip's own blocks ─────────────────────────────────────────────


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_deep_prompts_are_those_of_hooks_that_put_tokens_into_open_clip(kind):
    tower, visual = tower_and_model(kind)

    def hook(layer):
        def replace(block, inputs):
            x = inputs[0] if layer == 0 else inputs[0][:, :17]
            return torch.cat([x, each(VALUES[layer])], dim=1)

        return replace

    for layer, block in enumerate(visual.transformer.resblocks):
        block.register_forward_pre_hook(hook(layer))
    expected = visual(images())
    close(tower(images(), deep(VALUES)).features, expected)
    tokens = Scripted(lambda layer, *_: Splice(tokens=each(VALUES[layer])))
    close(tower(images(), tokens).features, expected)
    assert (expected - clip(kind).encode_image(images())).abs().max() > 1e-2


def test_prompts_behind_the_class_token_and_at_the_end_are_the_same():
    tower, visual = tower_and_model()
    x = entering(visual, images())
    x = torch.cat([x[:, :1], each(VALUES[0]), x[:, 1:]], dim=1)
    for block in visual.transformer.resblocks:
        x = block(x)
    enter = Scripted(lambda layer, *_: Splice(tokens=each(VALUES[0])) if layer == 0 else None)
    encoded = tower(images(), enter)
    close(encoded.features, leaving(visual, x))
    close(encoded.prompts, visual.ln_post(x[:, 1:6]))  # what L2P pools


def test_prompts_that_enter_before_the_pre_norm_are_normed_by_it():
    """MaPLe on the image side: early prompts travel, and are replaced, raw, before later blocks."""
    tower, visual = tower_and_model()
    x = visual.conv1(images()).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(7, 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, each(VALUES[0])], dim=1))
    for layer, block in enumerate(visual.transformer.resblocks):
        x = block(torch.cat([x[:, :17], each(VALUES[1])], dim=1) if layer == 1 else x)

    def script(first):
        enter = {0: first, 1: VALUES[1]}
        return Scripted(lambda layer, *_: Splice(tokens=each(enter[layer])) if layer in enter else None)

    expected = leaving(visual, x)
    close(tower(images(), script(tower.pre_norm(VALUES[0]))).features, expected)
    assert (tower(images(), script(VALUES[0])).features - expected).abs().max() > 1e-2
    bare = ClipImageTower(clip("no pre-norm"))
    assert torch.equal(bare.pre_norm(VALUES[0]), VALUES[0])


def by_hand(block, x, keys=None, values=None, context=None):
    """One open_clip block from its definition, with rows more for keys and values; queries and attention, too."""
    h, attention = block.ln_1(x), block.attn
    seen = h if context is None else torch.cat([h, block.ln_1(each(context))], dim=1)
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    q, k, v = h @ wq.T + bq, seen @ wk.T + bk, seen @ wv.T + bv
    if keys is not None:
        k, v = torch.cat([each(keys), k], dim=1), torch.cat([each(values), v], dim=1)
    q, k, v = (rows.unflatten(-1, (3, 16)).transpose(1, 2) for rows in (q, k, v))
    weights = (q @ k.mT / 4.0).softmax(-1)
    x = x + block.ls_1(attention.out_proj((weights @ v).transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x))), q, weights, (k, v)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_prefix_joins_keys_and_values_after_their_projection(kind):
    tower, visual = tower_and_model(kind)
    x = entering(visual, images())
    for block, value in zip(visual.transformer.resblocks, VALUES, strict=True):
        x = by_hand(block, x, keys=value[:2], values=value[2:4])[0]
    got = tower(images(), Scripted(lambda layer, *_: Splice(prefix=(VALUES[layer][:2], VALUES[layer][2:4]))))
    close(got.features, leaving(visual, x))


@pytest.mark.parametrize("kind", ["quick", "own attention"])
def test_a_tap_sees_what_the_definition_says(kind):
    tower, visual = tower_and_model(kind)
    seen = []
    tower(images(), deep(VALUES), tap=seen.append)
    x = entering(visual, images())
    for probe, block, value in zip(seen, visual.transformer.resblocks, VALUES, strict=True):
        close(probe.inputs, x)
        x, queries, weights, (keys, values) = by_hand(block, x, context=value)
        close(probe.queries, queries)
        close(probe.to_prompts, weights[..., 17:])
        close(probe.keys, keys[:, :, :17])
        close(probe.values, values[:, :, :17])
        assert torch.equal(probe.key_weight, block.attn.in_proj_weight[48:96])
    assert [probe.layer for probe in seen] == [0, 1, 2]


# ── gradients, precision, batches ──────────────────────────────────────────────────────────────────


def test_gradients_are_those_of_finite_differences():
    tower = ClipImageTower(clip(), dtype=torch.float64)
    start, way = VALUES.double(), torch.randn(3, 5, 48, dtype=torch.float64)
    weights = torch.randn(7, 24, dtype=torch.float64)

    def script(values):
        def at(layer, tokens, carried):
            enter = {"tokens": each(values[0])} if layer == 0 else {}
            return Splice(context=values[1][:3], prefix=(values[2][:2], values[2][2:4]), **enter)

        return Scripted(at)

    values = start.clone().requires_grad_()
    (tower(images(), script(values)).features * weights).sum().backward()
    ahead, back = (tower(images(), script(start + step * way)).features for step in (1e-5, -1e-5))
    slope = ((ahead - back) * weights).sum() / 2e-5
    torch.testing.assert_close((values.grad * way).sum(), slope, rtol=1e-7, atol=1e-7)


def content(tower):
    digest = hashlib.sha256()
    for value in tower.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def test_training_prompts_leaves_the_tower_untouched():
    tower, prompts = ClipImageTower(clip()), DeepPrompts([0, 1, 2], 5, 48)
    before, start = content(tower), prompts.value(1).detach().clone()
    optimizer = torch.optim.AdamW(prompts.parameters(), lr=0.1)
    for _ in range(3):
        tower(images(), prompts.start()).features.square().sum().backward()
        optimizer.step()
    assert content(tower) == before and not torch.equal(prompts.value(1), start)
    assert all(p.grad is None and not p.requires_grad for p in tower.parameters())


def test_features_of_an_image_do_not_depend_on_its_batch():
    tower = ClipImageTower(clip())
    together = tower(images(), deep(VALUES)).features
    close(together, torch.cat([tower(image[None], deep(VALUES)).features for image in images()]), 2e-6)


def test_a_tower_in_bfloat16_stays_in_it_and_is_close_to_the_one_in_float32():
    tower, half, dtypes = ClipImageTower(clip()), ClipImageTower(clip(), dtype=torch.bfloat16), []
    values = VALUES.clone().requires_grad_()

    def at(layer, tokens, carried):
        dtypes.append((tokens.dtype, None if carried is None else carried.dtype))
        return Splice(tokens=each(values[0]), context=values[1]) if layer == 0 else Splice(context=values[layer])

    got, want = half(images(), Scripted(at)).features, tower(images(), Scripted(at)).features
    low, full = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    assert dtypes == [(torch.bfloat16, None), low, low, (torch.float32, None), full, full]
    assert got.dtype == torch.float32 and 0 < (got - want).norm() / want.norm() < 5e-2
    got.sum().backward()
    assert values.grad.dtype == torch.float32 and values.grad.abs().amin(dim=(1, 2)).gt(0).all()


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ShapeError) as error:
        ClipImageTower(clip())(torch.zeros(7, 3, 32, 40))
    assert str(error.value) == "images must be (B, 3, 32, 32); got (7, 3, 32, 40)"


# ── fingerprints ───────────────────────────────────────────────────────────────────────────────────


def test_a_fingerprint_is_of_all_weights_of_the_tower_and_of_what_they_do_not_tell():
    def of(change=None, **how):
        model = clip(how.pop("kind", "plain"))
        with torch.no_grad():
            if change is not None:
                change(model)
        return ClipImageTower(model, **how).fingerprint

    plain = of()
    changes = [
        lambda m: m.visual.proj[3, 5].add_(1e-3),
        lambda m: m.visual.class_embedding[3].add_(1e-3),
        lambda m: m.visual.transformer.resblocks[2].attn.in_proj_bias[7].add_(1e-3),
        lambda m: setattr(m.visual.transformer.resblocks[1].mlp, "gelu", open_clip.transformer.QuickGELU()),
        lambda m: setattr(m.visual.transformer.resblocks[1].attn, "num_heads", 6),
        lambda m: setattr(m.visual.transformer.resblocks[1].ln_2, "eps", 1e-6),
    ]
    assert len({plain, *map(of, changes)}) == 7
    assert of(lambda m: m.token_embedding.weight.zero_()) == of(dtype=torch.bfloat16) == plain and len(plain) == 16


# ── what is refused ────────────────────────────────────────────────────────────────────────────────


def made(**vision):
    text = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 9}
    return open_clip.CLIP(
        24, {"layers": 1, "width": 48, "head_width": 16, "image_size": 16, "patch_size": 8, **vision}, text
    )


def test_a_block_that_is_not_plain_is_refused_and_the_message_says_what_to_write():
    with pytest.raises(UnsupportedBackbone) as error:
        ClipImageTower(made(scaled_cosine_attn=True))
    assert str(error.value) == (
        "block 0 of the image tower is a open_clip.transformer.CustomResidualAttentionBlock with "
        "open_clip.transformer.Attention and attn.logit_scale; lamina can prompt open_clip's ResidualAttentionBlock "
        "and CustomResidualAttentionBlock where they are plain. To add a block type, write a BlockView for it in "
        "lamina/backbones/clip_blocks.py."
    )


@pytest.mark.parametrize(
    "vision, said",
    [
        ({"qk_norm": True}, "and attn.ln_q;"),
        ({"scale_heads": True}, "and attn.head_scale;"),
        ({"scale_attn_inner": True}, "and attn.ln_inner;"),
        ({"scale_attn": True}, "and ln_attn;"),
        ({"scale_fc": True}, "and mlp.ln;"),
        ({"pool_type": "avg"}, "the image tower pools by 'avg'; lamina reads the class token"),
        ({"attentional_pool": True}, "the image tower pools by 'attention'; lamina reads the class token"),
        ({"layers": [1, 1, 1, 1], "image_size": 32}, "the image tower is a open_clip.modified_resnet.ModifiedResNet;"),
    ],
)
def test_other_image_towers_are_refused(vision, said):
    with pytest.raises(UnsupportedBackbone) as error:
        ClipImageTower(made(**vision))
    assert said in str(error.value)


def test_a_foreign_block_or_attention_and_a_foreign_model_are_refused():
    class Block(open_clip.transformer.ResidualAttentionBlock):
        pass

    model = made()
    model.visual.transformer.resblocks[0] = Block(48, 3)
    with pytest.raises(UnsupportedBackbone, match=r"block 0 of the image tower is a .*\.Block with"):
        ClipImageTower(model)
    model = made()
    model.visual.transformer.resblocks[0].attn = nn.MultiheadAttention(48, 3, batch_first=False)
    with pytest.raises(UnsupportedBackbone, match="block 0 of the image tower"):
        ClipImageTower(model)
    with pytest.raises(UnsupportedBackbone) as error:
        ClipImageTower(nn.Linear(1, 1))
    assert str(error.value) == (
        "the model is a torch.nn.modules.linear.Linear; of open_clip's models, lamina can prompt CLIP and "
        "CustomTextCLIP"
    )


# ── methods that were written for other towers ─────────────────────────────────────────────────────

PARTS = {"epochs": 1, "batch_size": 8}


@pytest.mark.parametrize(
    "settings",
    [
        L2P(**PARTS, size=4, top=2, length=3, position="none"),
        L2P(**PARTS, size=4, top=2, length=3, position="none", query="early", entry=1, readout="backbone"),
        DualPrompt(**PARTS, general_blocks=[0], expert_blocks=[1, 2], general_length=2, length=3),
    ],
    ids=["pool", "early pool", "experts"],
)
def test_a_method_learns_two_tasks_on_it_and_says_the_same_of_single_images(settings):
    trainer = trainer_of(settings, ClipImageTower(clip()))
    for task in blobs(tasks=2, per_task=3).tasks:
        trainer.learn(task)
    model = trainer.learner.model.eval()
    with torch.no_grad():
        together = model(Batch(images())).logits
        alone = torch.cat([model(Batch(image[None])).logits for image in images()])
    close(together, alone)


def test_expert_prefixes_are_the_rows_that_the_definition_has():
    tower, visual = tower_and_model()
    prompts = ExpertPrefixes(general=[0], expert=[2], general_length=2, length=3, width=48, features=24)
    prompts.begin_task(0, [0, 1])
    query = tower(images()).features
    begun = prompts.start(query, 0)
    rows = {layer: begun.at(layer, tower.embed(images())[0], None).prefix for layer in (0, 2)}
    x = entering(visual, images())
    for layer, block in enumerate(visual.transformer.resblocks):
        keys, values = rows.get(layer, (None, None))
        x = by_hand(block, x, keys=keys, values=values)[0]
    close(tower(images(), prompts.start(query, 0)).features, leaving(visual, x))


def test_a_null_space_is_that_of_what_old_images_look_for():
    trainer = trainer_of(
        VPTNSP2(length=5, epochs=1, batch_size=8, eta1=1.0, eta2=1.0, knee="code"), ClipImageTower(clip())
    )
    first = blobs(tasks=2, per_task=3).tasks[0]
    trainer.learn(first)
    model, null_space, seen = trainer.learner.model, trainer.learner.protections[0], []
    old = torch.cat([batch.images for batch in trainer.feed.plain(first.train)])
    model.tower(old, model.prompts.start(), tap=seen.append)
    queries = seen[1].queries.double().transpose(1, 2).flatten(0, 1)  # (B * N, H, d)
    keys = clip().visual.transformer.resblocks[1].attn.in_proj_weight[48:96].double().unflatten(0, (3, 16))
    looked_for = torch.einsum("nhd,hdc->nhc", queries, keys).flatten(0, 1)
    torch.testing.assert_close(null_space.channels(1), looked_for.mT @ looked_for, rtol=1e-4, atol=1e-4)

    prompts, channels = model.prompts.value(1), null_space.spectra(1)["channels"].free(Cut(knee="code"))
    before = prompts.detach().clone()
    optimizer = torch.optim.Adam(model.prompts.parameters(), lr=0.01)
    with null_space.guard(optimizer):
        sum(p.square().sum() for p in model.prompts.parameters()).backward()
        optimizer.step()
    step = (prompts.detach() - before).double()
    assert step.norm() > 1e-4 and (step - step @ channels @ channels.T).norm() < 1e-4 * step.norm()


def test_a_pool_that_needs_a_class_position_is_refused_where_a_norm_comes_between():
    with pytest.raises(ConfigError, match="this ClipImageTower has none"):
        L2P(**PARTS).build(ClipImageTower(clip()))
