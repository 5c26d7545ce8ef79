"""Backbones that take images of another size than in pre-training."""

import pytest
import timm
import torch

from lamina.backbones.load import load_backbone
from lamina.errors import ConfigError, UnsupportedBackbone

NANO = "lamina:vit-nano"


def test_a_tower_of_another_size_is_timms_own_model_of_that_size():
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the weights that `@random` stands for
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained=False).eval()
    images = torch.randn(2, 3, 96, 96)
    loaded = load_backbone("timm:vit_tiny_patch16_224@random#96px")
    model.set_input_size(img_size=(96, 96))
    with torch.no_grad():
        torch.testing.assert_close(loaded.tower(images).features, model(images), rtol=1e-4, atol=1e-4)
    grid = loaded.tower.grid(images)
    assert (loaded.name, loaded.pixels["size"]) == ("timm:vit_tiny_patch16_224@random#96px", 96)
    assert (grid.height, grid.width) == (6, 6)


def test_the_size_of_pre_training_changes_nothing():
    plain, same = load_backbone(NANO), load_backbone(f"{NANO}#64px")
    assert same.fingerprint == plain.fingerprint and same.pixels == plain.pixels


def test_another_size_has_a_fingerprint_of_its_own():
    assert load_backbone(f"{NANO}#32px").fingerprint != load_backbone(NANO).fingerprint


def test_size_and_read_out_go_together():
    images = torch.randn(3, 3, 32, 32)
    both, size = load_backbone(f"{NANO}#mean_patch,32px"), load_backbone(f"{NANO}#32px")
    assert both.pixels["size"] == 32
    with torch.no_grad():
        torch.testing.assert_close(both.tower(images).features, size.tower.reading("mean_patch")(images).features)


def test_texts_stay_with_another_size():
    assert load_backbone("lamina:clip-nano#32px").tower.text is not None


@pytest.mark.parametrize("side, near", [(20, "16px or 24px"), (3, "8px or 16px"), (0, "8px or 16px")])
def test_a_side_that_patches_do_not_fill_is_refused(side, near):
    with pytest.raises(ConfigError, match=f"8 x 8 pixels, .* multiple of 8; got {side}: take {near}"):
        load_backbone(f"{NANO}#{side}px")


def test_two_sizes_are_refused():
    with pytest.raises(ConfigError, match="got 32px,64px: name one pooling, one norm and one size at most"):
        load_backbone(f"{NANO}#32px,64px")


@pytest.mark.parametrize("word", ["px", "-8px", "32 px", "32PX", "123456px"])
def test_what_is_no_size_is_an_unknown_read_out(word):
    with pytest.raises(ConfigError, match="or a size, such as 512px"):
        load_backbone(f"{NANO}#{word}")


def test_open_clip_keeps_its_size():
    with pytest.raises(UnsupportedBackbone, match="keep their size; leave 96px out"):
        load_backbone("open_clip:ViT-B-32-quickgelu@random#96px")
