"""AttriCLIP: a bank of N 5 prompts of n 3 words, of which an image takes 2; C 3 and 2 classes, B 7, W 40, F 24."""

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.errors import ConfigError
from lamina.heads import attributes
from lamina.heads.attributes import AttributeTexts
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts
from lamina.methods.attriclip import AttriCLIP
from tests.backbones.clips import clip, close, tiny_clip, tokenizer
from tests.methods.by_hand import text_by_hand
from tests.streams import blobs, trainer_of

FIRST, SECOND = ["cat", "lawn mower", "red panda"], ["aquarium fish", "x"]


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 100.0)


def bank(side, second=True, **settings):
    """A bank that has met both tasks, its prompts far from each other."""
    torch.manual_seed(3)
    texts = AttributeTexts(side, **{"size": 5, "top": 2, "length": 3, **settings})
    with torch.no_grad():
        texts.prompts.mul_(20)
    texts.begin_task(0, FIRST, [0, 1, 2])
    if second:
        texts.begin_task(1, SECOND, [3, 4])
    return texts


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(texts, images, classes, top=2):
    """Logits (B, C) at scale 100, each image's texts written and read for it alone."""
    out = []
    for image in images:
        near = torch.stack([torch.cosine_similarity(image, key, dim=0) for key in texts.keys])
        context = torch.cat([texts.prompts[i] for i in near.argsort(descending=True)[:top]])
        words = " ".join(["X"] * len(context))
        said = [text_by_hand(f"{words} {name}.", context) for name in classes]
        out.append(torch.stack([100 * F.normalize(image, dim=0) @ text for text in said]))
    return torch.stack(out)


# ── texts of images ──────────────────────────────────────────────────────────────────────────────────


def test_images_that_share_texts_get_the_logits_and_gradients_of_texts_of_their_own(side):
    texts, images, push = bank(side), drawn(7, 24), drawn(7, 5, seed=4)
    head = TextHead(texts).eval()
    assert len(texts.choose(images).unique(dim=0)) < 7, "no two images share their texts"
    found = []
    for logits in (head(images).logits, by_hand(texts, images, [*FIRST, *SECOND])):
        texts.zero_grad()
        (logits * push).sum().backward()
        found.append((logits.detach(), texts.prompts.grad.clone()))
    (ours, our_gradient), (theirs, their_gradient) = found
    close(ours, theirs, 1e-5)
    close(our_gradient, their_gradient, 1e-5)
    with torch.no_grad():
        close(head(images).logits, theirs, 1e-5)


def test_of_some_classes_as_of_all(side):
    texts, images = bank(side), drawn(7, 24)
    whole = texts.of_images(images)
    assert whole.shape == (7, 5, 24)
    close(texts.of_images(images, [4, 0]), whole[:, [4, 0]])
    with torch.no_grad():
        close(texts.of_images(images, [4, 0]), whole[:, [4, 0]])


def test_one_prompt_for_all_images_is_coop(side):
    texts, coop = bank(side, size=1, top=1, length=4), ContextTexts(side, 4)
    coop.begin_task(0, [*FIRST, *SECOND], range(5))
    with torch.no_grad():
        texts.prompts[0].copy_(coop.contexts[0])
    close(TextHead(texts)(drawn(7, 24)).logits, TextHead(coop)(drawn(7, 24)).logits)


def test_the_nearest_prompt_comes_first_unless_they_stand_as_in_the_bank(side):
    images = torch.stack([torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])])
    images = F.pad(images, (0, 22))
    found = {}
    for order in ("rank", "index"):
        texts = bank(side, size=2, order=order)
        with torch.no_grad():
            texts.keys.copy_(torch.eye(2, 24))
            assert texts.choose(images).tolist() == ([[0, 1], [1, 0]] if order == "rank" else [[0, 1], [0, 1]])
            found[order] = texts.of_images(images)
    assert (found["rank"][0] - found["rank"][1]).abs().max() > 1e-3
    assert torch.equal(found["index"][0], found["index"][1])


def test_long_keys_win_by_dot_products_alone(side):
    image = F.pad(torch.tensor([[1.0, 1.0, 1.0]]), (0, 21))
    for retrieval, nearest in (("cosine", 1), ("dot", 2)):
        texts = bank(side, size=3, top=1, retrieval=retrieval)
        with torch.no_grad():
            texts.keys.zero_()[:, :3] = torch.tensor([[1.0, -1.0, 0.0], [0.1, 0.1, 0.1], [9.0, 0.0, 0.0]])
        assert texts.choose(image).tolist() == [[nearest]]


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────


def test_a_choice_is_encoded_once_until_prompts_move_or_a_class_comes(side):
    texts, images = bank(side, second=False), drawn(7, 24)
    choices = len(texts.choose(images).unique(dim=0))
    with torch.no_grad():
        before = texts.of_images(images)
        texts.of_images(images[:3])
        assert texts.encoded_classes == 3 * choices
        texts.prompts.add_(drawn(5, 3, 40))
        assert (texts.of_images(images) - before).abs().max() > 1e-3
        assert texts.encoded_classes == 2 * 3 * choices and len(texts._kept) == choices
        texts.begin_task(1, SECOND, [3, 4])
        texts.of_images(images)
    assert texts.encoded_classes == 2 * 3 * choices + 5 * choices


def test_what_is_kept_is_bounded_and_the_oldest_goes(side, monkeypatch):
    texts, images = bank(side), drawn(7, 24)
    choices = list(dict.fromkeys(map(tuple, texts.choose(images).tolist())))
    with torch.no_grad():
        whole = texts.of_images(images)
        monkeypatch.setattr(attributes, "KEPT", 5 * 2)
        texts._kept = {}
        for image, features in zip(images, whole, strict=True):
            close(texts.of_images(image[None])[0], features)
            assert len(texts._kept) <= 2
        assert len(choices) > 2 and len(texts._kept) == 2
        close(texts.of_images(images), whole)


def test_nothing_grows_with_tasks_and_what_can_be_computed_again_is_not_kept(side):
    texts = bank(side, second=False)
    with torch.no_grad():
        texts.of_images(drawn(7, 24))
    before = {name: value.shape for name, value in texts.state_dict().items() if not name.startswith("tower.")}
    assert before == {"keys": (5, 24), "prompts": (5, 3, 40)}
    texts.begin_task(1, SECOND, [3, 4])
    assert {n: v.shape for n, v in texts.state_dict().items() if not n.startswith("tower.")} == before


def test_a_preview_scores_further_classes_and_leaves_the_rest_as_it_is(side):
    head, images = TextHead(bank(side, second=False)).eval(), drawn(7, 24)
    with torch.no_grad():
        before = head(images).logits
        seen = head.preview(["dog", "cat"])(images).logits
        assert seen.shape == (7, 4) and torch.equal(head(images).logits, before)
    close(seen[:, :3], before)
    close(seen, by_hand(head.texts, images, [*FIRST, "dog"]).detach())


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────


def test_chosen_keys_are_drawn_to_their_images_and_others_are_let_be(side):
    texts, images = bank(side, pull=0.7), drawn(2, 24)
    chosen = texts.choose(images)
    loss = texts.terms(images)["keys"]
    slow = [torch.cosine_similarity(images[b], texts.keys[k], dim=0) for b in range(2) for k in chosen[b]]
    close(loss, 0.7 * (1 - sum(slow) / 4))
    loss.backward()
    moved = texts.keys.grad.abs().amax(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(chosen.flatten().tolist()) and not moved.all()
    assert texts.prompts.grad is None


@pytest.mark.parametrize("fillers", [False, True])
def test_prompts_are_kept_from_saying_the_same_without_a_name(side, fillers):
    texts = bank(side, apart=0.3, fillers=fillers)
    text = "X X X X X X." if fillers else "X X X."
    said = torch.stack([text_by_hand(text, prompt) for prompt in texts.prompts])
    pairs = [(said[i] @ said[j]).abs() for i in range(5) for j in range(5) if i != j]
    close(texts.terms(drawn(7, 24))["prompts"], 0.3 * sum(pairs) / 20)


def test_losses_are_asked_for_in_training_alone(side):
    head, images = TextHead(bank(side)), drawn(7, 24)
    assert head.train()(images).terms.keys() == {"keys", "prompts"} and head.eval()(images).terms == {}
    assert bank(side, apart=0).terms(images).keys() == bank(side, size=2, top=1, apart=0.0).terms(images).keys()
    assert bank(side, size=1, top=1).terms(images).keys() == {"keys"}


# ── the method ───────────────────────────────────────────────────────────────────────────────────────


def test_a_step_moves_keys_and_prompts_and_nothing_else():
    trainer = trainer_of(AttriCLIP(size=5, top=2, length=3, epochs=1, batch_size=9), tiny_clip())
    model = trainer.learner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.learn(blobs(tasks=1).tasks[0])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.texts.keys", "head.texts.prompts"}
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(model.towers))


def test_defaults_are_the_papers():
    assert AttriCLIP().model_dump() == {
        "negatives": "task",
        "memory": 0,
        "memory_total": 0,
        "choose": "random",
        "balance": 0,
        "epochs": 10,
        "batch_size": 32,
        "lr": 0.0016,
        "momentum": 0.0,
        "names": {},
        "size": 10,
        "top": 3,
        "length": 12,
        "pull": 0.7,
        "apart": 0.3,
        "retrieval": "cosine",
        "order": "rank",
        "fillers": False,
    }
    model = AttriCLIP().build(tiny_clip()).model
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 10 * 24 + 10 * 12 * 40
    assert all(abs(part.detach().std() - 0.02) < 0.005 for part in (model.head.texts.keys, model.head.texts.prompts))


def test_settings_reach_the_bank():
    texts = AttriCLIP(size=6, top=2, length=3, pull=0.2, apart=0.9, retrieval="dot", order="index", fillers=True)
    texts = texts.build(tiny_clip()).model.head.texts
    assert (tuple(texts.prompts.shape), texts.top) == ((6, 3, 40), 2)
    assert (texts.pull, texts.apart, texts.retrieval, texts.order) == (0.2, 0.9, "dot", "index")
    assert texts._alone.ids.argmax() == 1 + 6 + 1


def test_the_rate_falls_to_a_thousandth():
    (phase,) = AttriCLIP().phases(blobs(tasks=1).tasks[0])
    assert phase.schedule(0.0) == 1 and phase.schedule(1.0) == pytest.approx(1e-3)


def test_more_prompts_than_there_are_cannot_be_taken():
    with pytest.raises(ConfigError) as error:
        AttriCLIP(size=2)
    assert str(error.value) == "top must be at most size, the prompts that there are; got top=3 with size=2"


def test_more_learned_words_than_a_text_has_room_for_are_refused_when_it_is_built():
    with pytest.raises(ConfigError) as error:
        AttriCLIP(top=5, length=15).build(tiny_clip())
    assert str(error.value) == (
        "a text has 77 tokens, so that 73 of them can be learned words; got top=5 prompts of length=15: take fewer"
    )


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"balance", "choose"}),
        ({"top": 1}, {"balance", "choose", "order", "fillers"}),
        ({"apart": 0.0}, {"balance", "choose", "fillers"}),
        ({"size": 1, "top": 1}, {"balance", "choose", "order", "fillers", "apart"}),
        ({"memory": 3}, {"negatives"}),
    ],
)
def test_settings_that_change_nothing_are_named(settings, idle):
    assert AttriCLIP(**settings).idle().keys() == idle
