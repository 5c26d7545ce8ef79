"""CoCoOp: learned words that follow the image. B 7, F 24, W 40, n 4 words, hidden 4, C 3 and 2 in two tasks."""

import pytest
import torch
from torch.nn import functional as F

from lamina.data.stream import Task
from lamina.heads import text as part
from lamina.heads.image_texts import ImageContextTexts
from lamina.heads.texts import ClassTexts
from lamina.methods.cocoop import CoCoOp
from lamina.methods.coop import CoOp
from tests.backbones.clips import clip, close, ids, images, tiny_clip

FIRST = Task(0, ["cat", "lawn_mower", "red panda"], [0, 1, 2], None, None)
SECOND = Task(1, ["aquarium fish", "x"], [3, 4], None, None)
NAMES = ["cat", "lawn mower", "red panda", "aquarium fish", "x"]


def met(settings):
    model = settings.build(tiny_clip()).model
    model.begin_task(FIRST)
    model.begin_task(SECOND)
    return model.eval()


@torch.no_grad()
def features_of(model):
    return model.tower(images()).features


def by_hand(texts, features, position="end"):
    """Texts (B, C, F) of each image and each class, one after the other, by open_clip's own modules."""
    theirs, (first, _, last) = clip(), texts.shift
    out = []
    for z in F.normalize(features, dim=-1):
        hidden = (first.weight @ z + first.bias).clamp(min=0)
        context = texts.contexts[0] + last.weight @ hidden + last.bias
        for name in NAMES:
            prompt = {"end": f"X X X X {name}.", "middle": f"X X {name} X X.", "front": f"{name} X X X X."}[position]
            row = ids(prompt)
            x = theirs.token_embedding(row)[0].clone()
            x[(row[0] == 343).nonzero().flatten()[:4] if name != "x" else places(position)] = context
            x = (x + theirs.positional_embedding)[None]
            for block in theirs.transformer.resblocks:
                x = block(x, attn_mask=theirs.attn_mask)
            out.append(F.normalize(theirs.ln_final(x)[0, row[0].argmax()] @ theirs.text_projection, dim=-1))
    return torch.stack(out).unflatten(0, (len(features), len(NAMES)))


def places(position):
    """Rows of the words around a name of one token, which is the placeholder itself here."""
    return torch.tensor({"end": [1, 2, 3, 4], "middle": [1, 2, 4, 5], "front": [2, 3, 4, 5]}[position])


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_each_image_has_texts_of_its_own_as_the_definition_says(position):
    model = met(CoCoOp(start="drawn", position=position))
    features, texts = features_of(model), model.head.texts
    expected = by_hand(texts, features, position)
    close(texts.of_images(features), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    seen = torch.einsum("bf,bcf->bc", F.normalize(features, dim=-1), expected)
    close(model.head(features).logits, 20 * seen)
    close(texts.of_images(features, [4, 0]), expected[:, [4, 0]])


def test_gradients_are_those_of_the_definition_and_reach_words_and_network_alone():
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = met(CoCoOp(start="drawn")).train()
        texts, features = model.head.texts, features_of(model)
        rows = texts.of_images(features) if ours else by_hand(texts, features)
        (rows * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append(trained)
    assert set(found[0]) == {
        "head.texts.contexts.0",
        *(f"head.texts.shift.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        close(gradient, found[1][name])


def test_it_starts_as_coop_with_the_same_words_and_the_released_start_does_not():
    coop = met(CoOp(length=4, words="a photo of a"))
    features = features_of(coop)
    close(met(CoCoOp()).head(features).logits, coop.head(features).logits)
    assert (met(CoCoOp(start="drawn")).head(features).logits - coop.head(features).logits).abs().max() > 0.1


def test_the_size_of_what_is_learned():
    model = met(CoCoOp())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 40 + (24 * 4 + 4) + (4 * 40 + 40)
    wide = ImageContextTexts(tiny_clip().text, 4, reduction=3)
    assert wide.shift[0].weight.shape == (8, 24)


def test_images_come_a_few_at_a_time_where_nothing_is_learned_and_all_at_once_where_something_is(monkeypatch):
    model = met(CoCoOp(start="drawn"))
    features, counts = features_of(model), []
    whole, of_images = model.head(features).logits, ImageContextTexts.of_images

    def counted(texts, seen, columns=None):
        counts.append(len(seen))
        return of_images(texts, seen, columns)

    monkeypatch.setattr(part, "TOGETHER", 16)  # texts of 5 classes for 3 images
    monkeypatch.setattr(ImageContextTexts, "of_images", counted)
    with torch.no_grad():
        close(model.head(features).logits, whole)
    model.head(features)
    assert counts == [3, 3, 1, 7]


def test_texts_that_depend_on_no_image_are_the_same_for_each():
    texts = met(CoOp(length=4)).head.texts
    found = ClassTexts.of_images(texts, torch.randn(7, 24), [4, 1])
    assert found.shape == (7, 2, 24) and torch.equal(found[6], texts([4, 1]))


def test_names_of_other_tasks_are_not_read_in_training_where_they_do_not_compete():
    model = met(CoCoOp(start="drawn"))
    features = features_of(model)
    inside, outside = model.head.train()(features).logits, model.head.eval()(features).logits
    assert torch.isinf(inside[:, :3]).all()
    close(inside[:, 3:], outside[:, 3:])


def test_a_preview_scores_further_classes():
    model = met(CoCoOp(start="drawn"))
    features = features_of(model)
    seen = model.head.preview(["dog", "cat"])(features).logits
    assert seen.shape == (7, 6)
    close(seen[:, :5], model.head(features).logits)


def test_the_defaults_are_those_of_the_paper_and_of_coop():
    settings = CoCoOp()
    assert (settings.words, settings.reduction, settings.start, settings.position) == (
        "a photo of a",
        16,
        "zero",
        "end",
    )
    assert (settings.lr, settings.momentum, settings.epochs, settings.batch_size) == (0.002, 0.9, 5, 32)


def test_words_say_how_many_are_learned_and_length_does_where_there_are_none():
    assert met(CoCoOp(words="a photo of", length=9)).head.texts.contexts[0].shape == (3, 40)
    assert met(CoCoOp(words="", length=9)).head.texts.contexts[0].shape == (9, 40)
    idle = dict.fromkeys(("balance", "choose"), "without a memory")
    assert CoCoOp().idle() == {**idle, "length": "where words are given, which have a length"}
    assert set(CoCoOp(words="", memory=2).idle()) == {"negatives"}
