"""PROOF's head: sums of layers, the fusion and three scores; B 7, C 3 and 2 classes, 2 templates, W 40, F 24, K 3."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.heads.proof import Fusion, ProofHead, SummedLinear, contrast
from lamina.heads.text import TextHead
from lamina.heads.texts import HandTexts
from tests.backbones.clips import clip, close, tokenizer

FIRST, SECOND = ["cat", "lawn_mower", "red panda"], ["aquarium fish", "x"]
TEMPLATES = ["a photo of a {}.", "the {}, small"]


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def met(side, tasks=2, **options):
    """A head that has seen nine images of each class of its tasks."""
    head = ProofHead(side, TEMPLATES, **options)
    for index, (names, columns) in enumerate([(FIRST, [0, 1, 2]), (SECOND, [3, 4])][:tasks]):
        head.begin_task(index, names, columns)
        show(head, 5 * drawn(9 * len(names), 24, seed=index), columns * 9)
    return head.eval()


def show(head, features, columns):
    head.begin_look()
    for rows, labels in zip(features.split(4), torch.tensor(columns).split(4), strict=True):
        head.collect(rows, labels)
    head.end_look(lambda total: total)


# ── sums of layers ───────────────────────────────────────────────────────────────────────────────────


def test_a_sum_of_layers_is_the_sum_of_what_each_says_and_without_any_the_identity():
    layers, features = SummedLinear(24), drawn(7, 24)
    assert layers(features) is features
    for _ in range(3):
        layers.grow(freeze=True)
    close(layers(features), sum(layer(features) for layer in layers.layers), 1e-6)
    assert [layer.weight.requires_grad for layer in layers.layers] == [False, False, True]
    layers.grow(freeze=False)
    assert [layer.bias.requires_grad for layer in layers.layers] == [False, False, True, True]


# ── the fusion ───────────────────────────────────────────────────────────────────────────────────────


def plain(fusion, images, shared, rows, dropped=None):
    """One sequence per image, whole: what attends is the image and the first rows; all are looked at."""
    out = []
    for image in images:
        sequence = torch.cat([image[None], shared])
        asking = sequence[: 1 + rows]
        weights = (fusion.query(asking) @ fusion.key(sequence).T / 24**0.5).softmax(-1)
        out.append(fusion.norm(asking + fusion.out(weights @ fusion.value(sequence))))
    out = torch.stack(out)
    return out[:, 0], out[:, 1:]


@pytest.mark.parametrize("extra", [0, 4])
def test_what_is_shared_is_computed_once_and_changes_nothing(extra):
    fusion, images, shared = Fusion(24).eval(), drawn(7, 24), drawn(10 + extra, 24, seed=3).requires_grad_()
    nn.init.normal_(fusion.out.bias)
    found, expected = (each(images, shared, 10) for each in (fusion, lambda *a: plain(fusion, *a)))
    assert (found[0].shape, found[1].shape) == ((7, 24), (7, 10, 24))
    parameters = [*fusion.parameters(), shared]
    gradients = []
    for image, fused in (found, expected):
        close(image, expected[0])
        close(fused, expected[1])
        total = (image * drawn(7, 24, seed=4)).sum() + (fused * drawn(7, 10, 24, seed=5)).sum()
        gradients.append(torch.autograd.grad(total, parameters))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_a_fusion_starts_as_published_and_drops_in_training_alone():
    fusion = Fusion(512)
    for layer in (fusion.query, fusion.key, fusion.value):
        assert layer.bias is None and layer.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert fusion.out.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert sum(p.numel() for p in fusion.parameters()) == 1_050_112 and fusion.dropout.p == 0.1
    images, shared = drawn(2, 512), drawn(3, 512)
    once, twice = fusion(images, shared, 3)[1], fusion(images, shared, 3)[1]
    assert (once - twice).abs().max() > 1e-3
    fusion.eval()
    assert torch.equal(fusion(images, shared, 3)[1], fusion(images, shared, 3)[1])


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────


def layered(layers, features):
    return sum(layer(features) for layer in layers.layers)


def unit(x):
    return F.normalize(x, dim=-1)


@torch.no_grad()
def by_hand(head, features, reduce="image", length=True):
    """Scores of a head over five classes, image by image, from its parameters alone."""
    each = head.texts()  # (5, 2, 24)
    names = unit(torch.stack([unit(layered(head.of_texts, each[:, t])) for t in (0, 1)]).mean(0))
    means = unit(layered(head.of_images, head.seen.means().float()))
    images = layered(head.of_images, unit(features) if length else features)
    images = unit(images) if length else images
    image, fused = plain(head.fusion, images, torch.cat([names, means, *head.contexts]), 10)
    if reduce == "batch_mean":
        fused = fused.mean(0).expand_as(fused)
    rows = []
    for b in range(len(features)):
        rows.append(names @ images[b] + fused[b, :5] @ image[b] + fused[b, 5:] @ image[b])
    return torch.stack(rows)


def test_a_score_is_the_sum_of_three_products(side):
    head, features = met(side), 3 * drawn(7, 24)
    close(head(features).logits, by_hand(head, features))
    assert not head.transductive


def test_one_image_scores_alone_as_among_eight_unless_batches_decide(side):
    features = drawn(8, 24)
    for reduce, alike in (("image", True), ("batch_mean", False)):
        head = met(side, reduce=reduce)
        with torch.no_grad():
            apart = torch.cat([head(row[None]).logits for row in features]) - head(features).logits
        assert (apart.abs().max() <= 1e-5) == alike and head.transductive != alike
    close(head(features).logits, by_hand(head, features, "batch_mean"))


def test_plain_scores_are_those_of_images_as_long_as_they_are_projected(side):
    head, features = met(side, plain=True), 3 * drawn(7, 24)
    close(head(features).logits, by_hand(head, features, length=False))
    assert (by_hand(head, features) - by_hand(head, features, length=False)).abs().max() > 0.1


@torch.no_grad()
def test_with_identities_and_without_fusion_it_is_zero_shot(side):
    head, features = met(side, tasks=1), 3 * drawn(7, 24)
    for layers in (head.of_images, head.of_texts):
        layers.layers[0].weight.copy_(torch.eye(24))
        layers.layers[0].bias.zero_()
    head.fusion.forward = lambda images, shared, rows: (torch.zeros(7, 24), torch.zeros(7, rows, 24))
    zero_shot = TextHead(HandTexts(side, TEMPLATES))
    zero_shot.begin_task(0, FIRST, [0, 1, 2])
    close(20 * head(features).logits, zero_shot(features).logits)


def test_means_are_those_of_features_of_length_one_before_training_and_add_up(side):
    head = met(side)
    assert (head.looks_at, head.looks_ahead) == ("features", True)
    first, second = 5 * drawn(27, 24, seed=0), 5 * drawn(18, 24, seed=1)
    close(head.seen.means()[1].float(), unit(first[1::3]).mean(0))
    close(head.seen.means()[4].float(), unit(second[1::2]).mean(0))
    more = drawn(6, 24, seed=9)
    head.begin_task(2, ["cat", "dog"], [0, 5])
    show(head, more, [0, 5] * 3)
    close(head.seen.means()[0].float(), unit(torch.cat([first[::3], more[::2]])).mean(0))


def test_a_class_without_images_has_its_name_for_a_mean(side):
    head = met(side, tasks=1)
    head.begin_task(1, SECOND, [3, 4])
    texts = head.texts()
    found = head.means(texts, None)
    close(found[3:], unit(texts.mean(1))[3:])
    close(found[:3], head.seen.means()[:3].float())


@torch.no_grad()
def test_a_preview_scores_further_classes_by_their_names(side):
    head, features = met(side), drawn(7, 24)
    seen = head.preview(["dog", "cat"])
    logits = seen(features).logits
    assert logits.shape == (7, 6) and head(features).logits.shape == (7, 5) and torch.isfinite(logits).all()
    other = copy.deepcopy(head)
    other.begin_task(2, ["dog"], [5])
    for part in (other.of_images, other.of_texts):
        del part.layers[-1]
    del other.contexts
    other.contexts = head.contexts
    close(logits, other(features).logits)


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_has_three_parts_and_reads_the_first_template_alone(side):
    head, features, labels = met(side).train(), 3 * drawn(7, 24), torch.tensor([4, 0, 2, 2, 1, 3, 0])
    head.fusion.eval()
    scores = head(features, labels)
    names = unit(layered(head.of_texts, head.texts()[:, 0]))
    means = unit(layered(head.of_images, head.seen.means().float()))
    images = unit(layered(head.of_images, unit(features)))
    image, fused = plain(head.fusion, images, torch.cat([names, means, *head.contexts]), 10)
    close(scores.logits, torch.einsum("bf,bcf->bc", image, fused[:, :5]))
    close(scores.terms["means"], F.cross_entropy(torch.einsum("bf,bcf->bc", image, fused[:, 5:]), labels))
    pairs = 20 * images @ names[labels].T
    both = F.cross_entropy(pairs, torch.arange(7)) + F.cross_entropy(pairs.T, torch.arange(7))
    close(scores.terms["contrast"], both / 2)
    learning = [head.of_texts.layers[1].weight, head.of_images.layers[1].weight, head.log_scale]
    ours = torch.autograd.grad(scores.terms["contrast"], learning)
    theirs = torch.autograd.grad(both / 2, learning[:2])
    for one, other in zip(ours[:2], theirs, strict=True):
        close(one / other.abs().max(), other / other.abs().max())
    assert ours[2] != 0
    assert contrast(torch.eye(3)) == pytest.approx(torch.tensor(1 + 2 / torch.e).log().item())


def test_where_the_task_competes_alone_other_classes_are_not_in_the_sequence(side):
    head, features, labels = met(side, negatives="task").train(), drawn(7, 24), torch.tensor([4, 3, 3, 4, 4, 3, 4])
    head.fusion.eval()
    scores = head(features, labels)
    assert torch.isinf(scores.logits[:, :3]).all() and torch.isfinite(scores.logits[:, 3:]).all()
    names = unit(layered(head.of_texts, head.texts()[3:, 0]))
    means = unit(layered(head.of_images, head.seen.means()[3:].float()))
    images = unit(layered(head.of_images, unit(features)))
    image, fused = plain(head.fusion, images, torch.cat([names, means, *head.contexts]), 4)
    close(scores.logits[:, 3:], torch.einsum("bf,bcf->bc", image, fused[:, :2]))
    own = torch.einsum("bf,bcf->bc", image, fused[:, 2:])
    close(scores.terms["means"], F.cross_entropy(own, labels - 3))


@pytest.mark.parametrize("freeze_texts", [True, False])
def test_a_task_adds_two_layers_and_three_contexts_and_old_ones_get_no_gradient(side, freeze_texts):
    head = met(side, freeze_texts=freeze_texts)
    one = sum(p.numel() for p in met(side, tasks=1).parameters())
    assert sum(p.numel() for p in head.parameters()) - one == 2 * (24 * 24 + 24) + 3 * 24
    head.train()
    scores = head(drawn(7, 24), torch.arange(7) % 5)
    (scores.logits.sum() + sum(scores.terms.values())).backward()
    touched = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    fusion = {name for name in touched if name.startswith("fusion.")}
    assert len(fusion) == 7 and touched - fusion == {
        "log_scale", "contexts.1", "of_images.layers.1.weight", "of_images.layers.1.bias",
        "of_texts.layers.1.weight", "of_texts.layers.1.bias",
    } | (set() if freeze_texts else {"of_texts.layers.0.weight", "of_texts.layers.0.bias"})  # fmt: skip


@pytest.mark.parametrize(("negatives", "layers"), [("seen", [0, 1, 2]), ("task", [0, 0, 0])])
def test_a_task_that_cannot_be_learned_adds_nothing(side, negatives, layers):
    head, found = ProofHead(side, TEMPLATES, negatives=negatives), []
    for index, name in enumerate(FIRST):
        head.begin_task(index, [name], [index])
        found.append(len(head.of_images.layers))
    assert found == layers and len(head.contexts) == layers[-1]
    assert head.eval()(drawn(7, 24)).logits.shape == (7, 3)
