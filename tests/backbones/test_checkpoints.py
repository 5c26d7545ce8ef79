"""Weights from the files that others published: tiny stand-ins with the same layout of names."""

import argparse
import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from lamina.backbones.checkpoints import encoder, load_weights, read
from lamina.backbones.load import load_backbone
from lamina.errors import ConfigError
from tests.backbones.conftest import TINY


@pytest.fixture
def blank():
    """A model of the same shape with other weights."""
    torch.manual_seed(5)
    return VisionTransformer(**TINY)


def saved(path, content):
    torch.save(content, path)
    return path


def extra(*names):
    return {name: torch.randn(3, 2) for name in names}


DECODER = ("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")


def mae_whole(state):
    return {"model": {**state, **extra("mask_token", *DECODER)}, "epoch": 799}


def moco(state):
    base = {f"module.base_encoder.{name}": value for name, value in state.items()}
    momentum = {f"module.momentum_encoder.{name}": value + 1 for name, value in state.items()}
    heads = extra(
        "module.base_encoder.head.0.weight", "module.momentum_encoder.head.0.weight", "module.predictor.0.weight"
    )
    return {"epoch": 300, "arch": "vit_base", "state_dict": {**momentum, **base, **heads}, "optimizer": {"state": {}}}


LAYOUTS = {
    "masked auto-encoder": lambda state: {"model": state},
    "masked auto-encoder with its decoder": mae_whole,
    "MoCo v3, pre-training": moco,
    "MoCo v3, linear probe": lambda state: {
        "state_dict": {f"module.{name}": value for name, value in state.items()} | extra("module.head.weight"),
        "best_acc1": torch.tensor(76.7),
    },
    "compiled": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "bare, with a classifier": lambda state: {**state, **extra("head.weight", "head.bias", "fc.weight")},
    "averaged beside not": lambda state: {
        "state_dict": {name: value + 1 for name, value in state.items()},
        "state_dict_ema": state,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_are_found_under_whatever_names_they_have(vit, blank, images, tmp_path, layout):
    load_weights(blank, "vit_base_patch16_224", saved(tmp_path / "weights.pth", layout(vit.state_dict())))
    assert torch.equal(blank.forward_features(images), vit.forward_features(images))


def test_safetensors_are_read_too(vit, blank, images, tmp_path):
    save_file({f"module.{name}": value for name, value in vit.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(blank, "vit_base_patch16_224", tmp_path / "w.safetensors")
    assert torch.equal(blank.forward_features(images), vit.forward_features(images))


def test_positions_are_those_of_the_file_though_they_are_fixed_in_training(vit, blank, tmp_path):
    state = vit.state_dict() | {"pos_embed": torch.full((1, 17, 24), 0.25)}
    load_weights(blank, "vit_base_patch16_224", saved(tmp_path / "w.pth", {"model": state}))
    assert (blank.pos_embed == 0.25).all()


@pytest.mark.parametrize("side", [3, 6])
def test_a_grid_of_another_size_is_interpolated_not_made_anew(vit, blank, tmp_path, side):
    positions = torch.randn(1, 1 + side * side, 24)
    state = vit.state_dict() | {"pos_embed": positions}
    load_weights(blank, "vit_base_patch16_224", saved(tmp_path / "w.pth", moco(state)))
    wanted = resample_abs_pos_embed(positions, [4, 4], [side, side], num_prefix_tokens=1)
    assert torch.equal(blank.pos_embed, wanted) and torch.equal(blank.pos_embed[:, 0], positions[:, 0])
    flat = positions.clone()
    flat[:, 1:] = torch.arange(24.0)
    state["pos_embed"] = flat
    load_weights(blank, "vit_base_patch16_224", saved(tmp_path / "w.pth", {"model": state}))
    torch.testing.assert_close(blank.pos_embed[:, 1:], torch.arange(24.0).expand(1, 16, -1))


def test_a_mask_token_without_a_decoder_is_that_of_a_dinov2_which_timm_converts(make, tmp_path):
    registers = make("vit_small_patch14_reg4_dinov2", img_size=16, patch_size=4)
    state = {("register_tokens" if name == "reg_token" else name): v for name, v in registers.state_dict().items()}
    positions = torch.cat([torch.randn(1, 1, 24), state["pos_embed"]], 1)
    state |= {"pos_embed": positions, "mask_token": torch.zeros(1, 24), "cls_token": state["cls_token"]}
    other = make("vit_small_patch14_reg4_dinov2", img_size=16, patch_size=4)
    torch.nn.init.zeros_(other.reg_token)
    load_weights(other, "vit_small_patch14_reg4_dinov2", saved(tmp_path / "w.pth", state))
    assert torch.equal(other.reg_token, registers.reg_token)


def test_jax_arrays_are_read_by_timm(blank, images, tmp_path):
    model = copy.deepcopy(blank)
    torch.nn.init.normal_(model.pos_embed)
    np.savez(tmp_path / "w.npz", **as_jax(model))
    load_weights(blank, "vit_base_patch16_224", tmp_path / "w.npz")
    torch.testing.assert_close(blank.forward_features(images), model.forward_features(images))


def as_jax(model):
    """The arrays of a model under the names and in the axes of the files in JAX."""

    def array(x, *shape):
        return x.detach().reshape(*shape).numpy() if shape else x.detach().numpy()

    found = {
        "cls": array(model.cls_token),
        "embedding/kernel": array(model.patch_embed.proj.weight.permute(2, 3, 1, 0)),
        "embedding/bias": array(model.patch_embed.proj.bias),
        "Transformer/posembed_input/pos_embedding": array(model.pos_embed),
        "Transformer/encoder_norm/scale": array(model.norm.weight),
        "Transformer/encoder_norm/bias": array(model.norm.bias),
    }
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}/"
        attention = f"{at}MultiHeadDotProductAttention_1/"
        for place, name in enumerate(("query", "key", "value")):
            found[f"{attention}{name}/kernel"] = array(block.attn.qkv.weight.chunk(3)[place].T, 24, 2, 12)
            found[f"{attention}{name}/bias"] = array(block.attn.qkv.bias.chunk(3)[place], 2, 12)
        found[f"{attention}out/kernel"] = array(block.attn.proj.weight.T, 2, 12, 24)
        found[f"{attention}out/bias"] = array(block.attn.proj.bias)
        for place, norm in ((0, block.norm1), (2, block.norm2)):
            found[f"{at}LayerNorm_{place}/scale"] = array(norm.weight)
            found[f"{at}LayerNorm_{place}/bias"] = array(norm.bias)
        for place, dense in enumerate((block.mlp.fc1, block.mlp.fc2)):
            found[f"{at}MlpBlock_3/Dense_{place}/kernel"] = array(dense.weight.T)
            found[f"{at}MlpBlock_3/Dense_{place}/bias"] = array(dense.bias)
    return found


def test_what_only_pre_training_needs_is_dropped_and_nothing_else():
    names = [
        *("module.base_encoder.norm.weight", "module.momentum_encoder.norm.weight", "module.predictor.1.bias"),
        *("decoder_norm.weight", "mask_token", "projector.0.weight", "fc_norm.bias", "header.weight"),
    ]
    assert sorted(encoder(extra(*names))) == ["fc_norm.bias", "header.weight", "norm.weight"]


# ── what does not fit ──────────────────────────────────────────────────────────────────────────────


def refused(model, path, content):
    with pytest.raises(ConfigError) as error:
        load_weights(model, "vit_base_patch16_224", saved(path, content))
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "PATH")


def test_foreign_and_missing_weights_are_listed_in_one_line(vit, blank, tmp_path):
    before = copy.deepcopy(blank.state_dict())
    state = vit.state_dict()
    del state["norm.bias"], state["blocks.1.norm1.weight"]
    state |= extra("fc_norm.weight", "fc_norm.bias", "blocks.9.norm1.weight", "gate.a", "gate.b", "gate.c", "gate.d")
    assert refused(blank, tmp_path / "w.pth", {"model": state}) == (
        "the weights in PATH are not those of vit_base_patch16_224: it knows no fc_norm.weight, fc_norm.bias, "
        "blocks.9.norm1.weight, gate.a, gate.b and 2 more, and finds no blocks.1.norm1.weight, norm.bias"
    )
    assert all(torch.equal(value, before[name]) for name, value in blank.state_dict().items())


def test_a_weight_of_another_shape_is_named(vit, blank, tmp_path):
    state = vit.state_dict() | {"norm.bias": torch.zeros(23)}
    assert refused(blank, tmp_path / "w.pth", state) == (
        "the weights in PATH are not those of vit_base_patch16_224: it wants another shape of norm.bias"
    )


def test_a_file_that_would_run_code_is_refused_and_the_way_out_works(vit, blank, images, tmp_path):
    content = {"model": vit.state_dict(), "args": argparse.Namespace(lr=1e-3)}
    message = refused(blank, tmp_path / "old.pth", content)
    assert message == (
        "PATH holds more than tensors, and to read the rest could run code; where you trust its origin, keep the "
        "tensors alone: python -c \"import torch; old = torch.load('OLD', weights_only=False); "
        "torch.save(old.get('state_dict', old.get('model')), 'NEW')\", and name NEW"
    )
    program = message.partition('"')[2].partition('"')[0]
    program = program.replace("OLD", str(tmp_path / "old.pth")).replace("NEW", str(tmp_path / "new.pth"))
    exec(program, {})
    load_weights(blank, "vit_base_patch16_224", tmp_path / "new.pth")
    assert torch.equal(blank.forward_features(images), vit.forward_features(images))


def test_no_code_of_a_file_is_run(blank, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    refused(blank, tmp_path / "w.pth", {"model": Trap()})
    assert not (tmp_path / "sprung").exists()


def test_a_file_without_weights_or_not_whole_is_refused(blank, tmp_path, vit):
    assert refused(blank, tmp_path / "w.pth", {"epoch": 3}) == (
        "PATH holds no weights by name; give a state dict, at the top or under state_dict or model"
    )
    assert refused(blank, tmp_path / "w.pth", [torch.ones(2)]).startswith("PATH holds no weights by name")
    assert refused(blank, tmp_path / "w.pth", extra("module.momentum_encoder.norm.bias")) == (
        "PATH holds no weights by name, but what pre-training alone needs; give another file"
    )
    whole = saved(tmp_path / "whole.pth", vit.state_dict()).read_bytes()
    for name, content in (("cut.pth", whole[: len(whole) // 2]), ("text.pth", b"no weights"), ("no.safetensors", b"{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as error:
            read(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name} cannot be read (")
        assert str(error.value).endswith("; get it anew") and "\n" not in str(error.value)


def test_jax_arrays_of_another_model_are_refused(blank, tmp_path):
    arrays = as_jax(blank)
    np.savez(tmp_path / "less.npz", **{name: value for name, value in arrays.items() if "encoderblock_2" not in name})
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for name in ("less.npz", "broken.npz"):
        with pytest.raises(ConfigError) as error:
            load_weights(blank, "vit_base_patch16_224", tmp_path / name)
        assert str(error.value).startswith(f"the weights in {tmp_path / name} are not those of vit_base_patch16_224 (")


# ── by name ────────────────────────────────────────────────────────────────────────────────────────


def test_a_backbone_from_a_published_file_is_found_by_name_with_or_without_a_read_out(tmp_path):
    like = load_backbone("timm:test_vit@random")
    torch.manual_seed(3)
    state = {name: value.clone() for name, value in like.tower.model.state_dict().items()}
    state = {name: value + torch.rand_like(value) * 1e-2 for name, value in state.items()}
    path = saved(tmp_path / "vit#300ep.pth.tar", moco(state))
    found = load_backbone(f"timm:test_vit@{path}")
    assert found.fingerprint != like.fingerprint and found.tower.pooling is None
    assert torch.equal(found.tower.model.norm.bias, state["norm.bias"])
    read_ = load_backbone(f"timm:test_vit@{path}#mean_patch")
    assert read_.fingerprint == f"{found.fingerprint}-mean_patch"


def test_loading_draws_no_random_numbers(tmp_path, vit):
    path = saved(tmp_path / "w.pth", load_backbone("timm:test_vit@random").tower.model.state_dict())
    torch.manual_seed(1)
    load_backbone(f"timm:test_vit@{path}")
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
