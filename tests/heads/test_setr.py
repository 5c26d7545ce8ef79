"""SETR-PUP: K taps, B 2 images, grids of 3 x 5 patches, D 24 or 6 channels, 7 inside, C 5 classes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.backbones import timm_vit
from lamina.backbones.splice import PromptPass, Splice
from lamina.errors import ConfigError, ShapeError
from lamina.heads.batch_norm import SharedBatchNorm
from lamina.heads.setr import Decoder, SetrHead, pixel_loss
from lamina.model import Batch, PromptedModel
from lamina.prompts.base import PromptModule

GRID, SIZE = (3, 5), (24, 40)


def head_of(width=6, depth=12, **values):
    head = SetrHead(width, depth, GRID, SIZE, **{"channels": 7, **values})
    head.begin_task(0, ["a", "b", "c", "d", "e"], range(5))
    return head


def decoder_of(grid=GRID, size=SIZE, stages=4, factor=2):
    decoder = Decoder(6, 7, grid, size, stages=stages, factor=factor)
    decoder.classes(5)
    return decoder


class Travelling(PromptModule):
    """Prompts that enter before block 0 and travel."""

    def __init__(self, length, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width))

    def start(self, query=None, task=None):
        outer = self

        class Pass(PromptPass):
            def at(self, layer, tokens, carried):
                return Splice(tokens=outer.tokens.expand(len(tokens), -1, -1)) if layer == 0 else None

        return Pass()


@pytest.mark.parametrize(("width", "depth", "count"), [(768, 12, 10_782_296), (1024, 24, 13_143_640)])
def test_the_size_is_that_of_the_published_head(width, depth, count):
    head = SetrHead(width, depth, (2, 2), (32, 32))
    head.begin_task(0, ["x"] * 150, range(150))
    assert sum(parameter.numel() for parameter in head.parameters()) == count
    assert len(head.auxiliary) == 3


@pytest.mark.parametrize(("depth", "after"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (3, (0, 1, 2)), (1, (0,))])
def test_it_reads_after_each_quarter_of_the_blocks(depth, after):
    assert head_of(depth=depth).after == after


@pytest.mark.parametrize(("stages", "factor"), [(4, 2), (2, 4)])
def test_classifying_before_the_last_growth_is_classifying_after_it(stages, factor):
    decoder = decoder_of(size=(48, 80), stages=stages, factor=factor).double().eval()
    nn.init.normal_(decoder.classifier.weight)
    nn.init.normal_(decoder.classifier.bias)
    tokens = torch.randn(2, 15, 6, dtype=torch.float64)
    x = F.layer_norm(tokens, (6,), eps=1e-6).reshape(2, 3, 5, 6).permute(0, 3, 1, 2)
    for stage in decoder.stages:
        x = F.interpolate(stage(x), scale_factor=factor, mode="bilinear", align_corners=False)
    naive = decoder.classifier(x)
    assert naive.shape == (2, 5, 48, 80)
    assert (decoder(tokens) - naive).abs().max() < 1e-10 and naive.std() > 1e-3


def test_tokens_become_a_map_line_by_line():
    decoder, seen = decoder_of(), []
    decoder.stages[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    tokens = torch.randn(2, 15, 6)
    decoder(tokens)
    normed = F.layer_norm(tokens, (6,), eps=1e-6)
    assert torch.equal(seen[0][1, :, 2, 4], normed[1, 14]) and torch.equal(seen[0][0, :, 1, 0], normed[0, 5])
    assert torch.equal(seen[0].flatten(2).transpose(1, 2), normed)


@pytest.mark.parametrize(
    ("grid", "size", "between"),
    [
        ((2, 2), (32, 32), [(4, 4), (8, 8), (16, 16)]),  # patches of 16
        ((4, 4), (32, 32), [(8, 8), (16, 16), (32, 32)]),  # of 8
        ((2, 3), (28, 42), [(4, 6), (8, 12), (16, 24)]),  # of 14
        ((1, 2), (32, 64), [(2, 4), (4, 8), (8, 16)]),  # of 32
    ],
)
def test_the_last_growth_ends_at_the_size_of_the_image_whatever_the_patch(grid, size, between):
    decoder = decoder_of(grid, size)
    assert decoder.sizes == [*between, size]
    assert decoder(torch.randn(2, grid[0] * grid[1], 6)).shape == (2, 5, *size)


@pytest.mark.parametrize("length", [0, 50])
def test_the_head_reads_patches_alone_as_blocks_leave_them_whatever_the_number_of_prompts(tiny_vit, length):
    head = SetrHead(24, 3, (4, 4), (32, 32), channels=7)
    head.begin_task(0, ["x"] * 5, range(5))
    prompts = Travelling(length, 24) if length else None
    model, images = PromptedModel(tiny_vit, prompts, head).eval(), torch.randn(2, 3, 32, 32)
    entering = []
    read, _ = model.features(Batch(images), tap=lambda probe: entering.append(probe.inputs[:, 1:]))
    last = tiny_vit(images, prompts.start() if length else None, all_rows=True).tokens[:, 1:]
    assert read.shape == (3, 2, 16, 24)
    for found, wanted in zip(read, [entering[1], entering[2], last], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert model(Batch(images)).logits.shape == (2, 5, 32, 32)


@pytest.mark.parametrize("length", [0, 50])
def test_images_of_512_pixels_and_150_classes_get_a_score_for_every_pixel_and_class(length, monkeypatch):
    """On a ViT-B/16 and the published head, by shapes alone: nothing here has numbers."""
    monkeypatch.setattr(timm_vit, "fingerprint", lambda model: "")  # it reads weights
    with torch.device("meta"):
        tower = timm_vit.TimmTower.create("vit_base_patch16_224", img_size=512)
        head = SetrHead(768, 12, (32, 32), (512, 512))
        head.begin_task(0, ["x"] * 150, range(150))
        model = PromptedModel(tower, Travelling(length, 768) if length else None, head)
        read, _ = model.features(Batch(torch.empty(2, 3, 512, 512)))
        assert read.shape == (4, 2, 1024, 768)
        scores = head(read, torch.zeros(2, 512, 512, dtype=torch.long))
    assert scores.logits.shape == (2, 150, 512, 512) and scores.terms["auxiliary"].shape == ()


def test_a_tower_gives_the_blocks_that_are_asked_for_in_the_order_asked(tiny_vit):
    images = torch.randn(2, 3, 32, 32)
    first, last = (tiny_vit(images, after=(block,)).after[0] for block in (0, 2))
    both = tiny_vit(images, after=(2, 0))
    assert torch.equal(both.after[0], last) and torch.equal(both.after[1], first)
    assert not torch.allclose(first, last)
    plain = tiny_vit(images)
    assert plain.after == ()
    torch.testing.assert_close(both.features, plain.features, atol=1e-5, rtol=1e-4)


def test_auxiliary_losses_come_in_training_alone_and_with_their_weight():
    head, tokens = head_of(weight=0.4), torch.randn(4, 2, 15, 6)
    labels = torch.randint(5, (2, *SIZE))
    head.eval()  # so that decoders called twice say the same
    assert head(tokens).terms == {}
    scores = head(tokens, labels)
    losses = [F.cross_entropy(each(x), labels) for each, x in zip(head.auxiliary, tokens[:3], strict=True)]
    assert scores.terms["auxiliary"].item() == pytest.approx(0.4 * sum(losses).item(), rel=1e-5)
    assert torch.equal(scores.logits, head.main(tokens[3]))


def test_without_a_weight_there_is_one_decoder_and_one_tap():
    head = head_of(weight=0)
    assert head.after == (11,) and len(head.auxiliary) == 0
    assert head(torch.randn(1, 2, 15, 6), torch.zeros(2, *SIZE, dtype=torch.long)).terms == {}


def test_pixels_without_a_label_have_no_effect_on_the_loss():
    logits, labels = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randint(5, (2, 4, 6))
    labels[0, 1] = 255
    loss = pixel_loss(logits, labels)
    loss.backward()
    by_hand = -logits.log_softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0][labels != 255].sum() / 48
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert logits.grad[0, :, 1].abs().max() == 0 and (logits.grad[0, :, 0] != 0).all()
    assert pixel_loss(logits, torch.full_like(labels, 255)).item() == 0


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_shares():
    logits, labels = torch.randn(3, 5, 4, 6), torch.randint(5, (3, 4, 6))
    labels[0, :3] = 255
    shares = pixel_loss(logits[:2], labels[:2]) * 2 / 3 + pixel_loss(logits[2:], labels[2:]) / 3
    assert pixel_loss(logits, labels).item() == pytest.approx(shares.item(), rel=1e-5)


def test_the_norm_over_processes_is_the_usual_one_in_a_group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mine, usual = SharedBatchNorm(6).double(), nn.BatchNorm2d(6).double()
        inputs = [(100 + torch.randn(2, 6, 3, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]
        inputs[1].data.copy_(inputs[0].data)
        outputs = [norm(x) for norm, x in zip((mine, usual), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        weights = torch.randn(2, 6, 3, 5, dtype=torch.float64)
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(mine.weight.grad, usual.weight.grad)
        torch.testing.assert_close(dict(mine.named_buffers()), dict(usual.named_buffers()))
    finally:
        torch.distributed.destroy_process_group()


def test_a_second_task_and_features_of_whole_images_are_refused():
    head = head_of()
    with pytest.raises(ConfigError, match=r"^a head for pixels learns one task; task 2 has come, too$"):
        head.begin_task(1, ["f"], [5])
    with pytest.raises(ShapeError, match=r"^a head for pixels reads \(K, B, h \* w, D\) with K 4; got \(2, 6\)$"):
        head(torch.randn(2, 6))
