"""Names that look at one another and at images: B 7, C 6 in tasks of 3, 1 and 2, F 24, 4 heads, 40 channels inside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.heads.guidance import Guidance, apart
from tests.backbones.clips import close

SIZES = [3, 1, 2]
CONTEXTS = ["image", "batch", "none"]

every_context = pytest.mark.parametrize("context", CONTEXTS)


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(context="image", dropout=0.1):
    """A layer whose biases and norms are not those it starts with, at rest."""
    torch.manual_seed(0)
    guidance = Guidance(24, 4, hidden=40, dropout=dropout, context=context)
    with torch.no_grad():
        for value in guidance.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
    return guidance.eval()


def block():
    return apart(SIZES, torch.device("cpu"))


def by_hand(guidance, names, images, context):
    """What each name becomes, (B, C, F): PyTorch's own layer, an image after another."""
    layer, rows = guidance.layer, []
    for place, image in enumerate(images):
        own = names[place] if names.ndim == 3 else names
        if context == "image":
            rows.append(layer(own[None], image[None, None], tgt_mask=block())[0])
        elif context == "batch":
            mean = names.mean(0) if names.ndim == 3 else names
            rows.append(layer(mean[None], images[None], tgt_mask=block())[0])
        else:
            seen = layer.self_attn(own, own, own, attn_mask=block())[0]
            x = layer.norm2(layer.norm1(own + seen))
            rows.append(layer.norm3(x + layer.linear2(F.gelu(layer.linear1(x)))))
    return torch.stack(rows)


# ── what names become ────────────────────────────────────────────────────────────────────────────────


@every_context
@pytest.mark.parametrize("each", [False, True])
def test_names_become_what_the_decoder_layer_of_torch_makes_of_them(context, each):
    """Gradients, too: names may be the same for all images, or differ."""
    guidance, images = made(context), drawn(7, 24)
    names = drawn(*([7, 6, 24] if each else [6, 24]), seed=3).requires_grad_()
    found, expected = guidance(names, images, block()), by_hand(guidance, names, images, context)
    assert found.shape == (7 if context == "image" or (each and context == "none") else 1, 6, 24)
    close(found.expand_as(expected), expected)
    weights, learned = drawn(7, 6, 24, seed=4), [names, *guidance.parameters()]
    ours, theirs = (torch.autograd.grad((said * weights).sum(), learned) for said in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


def test_the_layer_is_that_of_the_paper():
    layer = Guidance(24).layer
    assert type(layer) is nn.TransformerDecoderLayer and not layer.norm_first and layer.activation is F.gelu
    assert layer.self_attn.num_heads == layer.multihead_attn.num_heads == 1
    assert (layer.linear1.out_features, layer.dropout.p, layer.dropout1.p) == (2048, 0.1, 0.1)
    assert (layer.dropout2.p, layer.dropout3.p, layer.self_attn.dropout, layer.multihead_attn.dropout) == (0.1,) * 4


@pytest.mark.parametrize(
    ("width", "heads", "numbers"), [(512, 1, 4_204_032), (512, 8, 4_204_032), (768, 12, 7_877_888)]
)
def test_it_has_as_many_numbers_as_published_whatever_the_heads(width, heads, numbers):
    with torch.device("meta"):
        assert sum(p.numel() for p in Guidance(width, heads).parameters()) == numbers


def test_without_images_there_is_nothing_that_would_look_at_them():
    names = {name for name, _ in made("none").named_parameters()}
    assert {name for name, _ in made("image").named_parameters()} - names == {
        f"layer.multihead_attn.{part}"
        for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }


@every_context
def test_every_number_that_learns_gets_a_gradient(context):
    guidance = made(context).train()
    (guidance(drawn(6, 24), drawn(7, 24), block()) * drawn(6, 24, seed=4)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in guidance.parameters())


# ── who looks at whom ────────────────────────────────────────────────────────────────────────────────


def test_classes_are_apart_that_are_of_different_tasks():
    task = [0, 0, 0, 1, 2, 2]
    assert block().tolist() == [[one != other for other in task] for one in task]


@every_context
def test_names_of_one_task_do_not_move_those_of_another_by_a_bit(context):
    guidance, names, images = made(context), drawn(6, 24), drawn(7, 24, seed=3)
    before = guidance(names, images, block())
    changed = names.clone()
    changed[4:] += drawn(2, 24, seed=4)
    after = guidance(changed, images, block())
    assert torch.equal(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().amax((0, 2)).min() > 1e-3
    changed = names.clone()
    changed[5] += 1
    assert (guidance(changed, images, block())[:, 4] - before[:, 4]).abs().max() > 1e-3


def test_images_together_are_a_set_of_which_only_shares_count():
    guidance, names, images = made("batch"), drawn(6, 24), drawn(7, 24, seed=3)
    said = guidance(names, images, block())
    close(guidance(names, images[torch.tensor([3, 0, 6, 2, 1, 5, 4])], block()), said, 1e-6)
    close(guidance(names, torch.cat([images, images]), block()), said, 1e-6)
    assert (guidance(names, images[:5], block()) - said).abs().max() > 1e-3


def test_an_image_by_itself_does_not_feel_the_others():
    guidance, names, images = made("image"), drawn(6, 24), drawn(7, 24, seed=3)
    said = guidance(names, images, block())
    for place in range(7):
        close(guidance(names, images[[place]], block())[0], said[place], 1e-6)
    assert (said - said[0]).abs().amax((1, 2))[1:].min() > 1e-2


# ── what is dropped ──────────────────────────────────────────────────────────────────────────────────


@every_context
def test_it_drops_while_it_learns_and_at_no_other_time(context):
    guidance, names, images = made(context, dropout=0.5), drawn(6, 24), drawn(7, 24, seed=3)

    def differs():
        return not torch.equal(*(guidance(names, images, block()) for _ in range(2)))

    assert not differs()
    assert guidance.train() is guidance and differs()
    guidance.requires_grad_(False)
    assert not guidance.train().training and not differs()
    guidance.requires_grad_(True)
    guidance.train()
    assert differs()
    guidance.eval()
    assert not differs()
