"""ProDA: K 5 contexts of n 4 words, 3 of them in a step; C 3 and 2 classes, B 7, W 40, F 24."""

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.errors import ConfigError
from lamina.heads.several import SeveralTexts, SurrogateHead, positions, surrogate
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts
from lamina.methods.proda import ProDA
from tests.backbones.clips import clip, close, tiny_clip, tokenizer
from tests.methods.by_hand import text_by_hand
from tests.streams import blobs, trainer_of

NAMES = ["cat", "lawn mower", "red panda", "aquarium fish", "x"]
LABELS = torch.tensor([0, 4, 2, 1, 3, 0, 2])


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def head(side, each_step=3, negatives="seen", **settings):
    """A head that has met all classes, its contexts far from each other."""
    torch.manual_seed(3)
    out = SurrogateHead(
        SeveralTexts(side, **{"number": 5, "length": 4, **settings}), each_step=each_step, negatives=negatives
    )
    with torch.no_grad():
        out.texts.contexts.mul_(20)
    out.begin_task(0, NAMES[:3], [0, 1, 2])
    out.begin_task(1, NAMES[3:], [3, 4])
    return out


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def said_by_hand(contexts):
    """Each class with each of 5 contexts, (5, 5, F): behind the first name, amid the second, before the others."""
    out = []
    for place, context in zip(["front", "middle", "end", "end", "end"], contexts, strict=True):
        for name in NAMES:
            own = clip().token_embedding(tokenizer()([name])[0, 1 : tokenizer()([name])[0].argmax()])
            if place == "front":
                out.append(text_by_hand(f"{name} X X X X.", context, first=1 + len(own)))
            elif place == "middle":
                out.append(text_by_hand(f"X X {name} X X.", torch.cat([context[:2], own, context[2:]])))
            else:
                out.append(text_by_hand(f"X X X X {name}.", context))
    return torch.stack(out).detach().unflatten(0, (5, 5))


# ── predictions ──────────────────────────────────────────────────────────────────────────────────────


def test_the_mean_of_what_all_contexts_say_classifies_however_long_it_is(side):
    ours, images = head(side).eval(), drawn(7, 24)
    mean = said_by_hand(ours.texts.contexts).mean(0)
    assert mean.norm(dim=-1).max() < 0.99
    with torch.no_grad():
        close(ours.texts(), mean)
        close(ours(images).logits, 20 * F.normalize(images, dim=-1) @ mean.mT)


def test_labels_do_not_enter_predictions(side):
    ours, images = head(side).eval(), drawn(7, 24)
    with torch.no_grad():
        assert torch.equal(ours(images, LABELS).logits, ours(images).logits)
        assert ours(images, LABELS).terms == {}
        assert (ours.train()(images, LABELS).logits - ours.eval()(images).logits).abs().max() > 0.1


def test_the_order_of_contexts_does_not_matter(side):
    ours, images, order = head(side, position="end"), drawn(7, 24), [3, 0, 4, 2, 1]
    with torch.no_grad():
        texts = ours.texts.encode_each(range(5), range(5))
        before, after = ours.eval()(images).logits, surrogate(images, texts, LABELS, ours.scale)
        ours.texts.contexts.copy_(ours.texts.contexts[order].clone())
        close(ours(images).logits, before)
        close(surrogate(images, texts[order], LABELS, ours.scale), after)


def test_some_contexts_and_classes_are_those_of_all(side):
    texts = head(side).texts
    whole = texts.encode_each(range(5), range(5))
    assert whole.shape == (5, 5, 24)
    close(texts.encode_each([4, 0], [2, 0, 3, 1]), whole[[2, 0, 3, 1]][:, [4, 0]])


def test_texts_are_computed_once_until_contexts_move(side):
    texts = head(side).texts
    with torch.no_grad():
        before = texts()
        assert torch.equal(texts(), before) and texts.encoded_classes == 5
        texts.contexts[4].mul_(2)
        assert (texts() - before).abs().max() > 1e-3 and texts.encoded_classes == 10


def test_a_preview_scores_further_classes(side):
    ours, images = head(side).eval(), drawn(7, 24)
    with torch.no_grad():
        before = ours(images).logits
        seen = ours.preview(["cat", "dog"])(images).logits
        assert seen.shape == (7, 6) and torch.equal(ours(images).logits, before)
        close(seen[:, :5], before)


@pytest.mark.parametrize(("number", "quarters"), [(1, (0, 0, 1)), (5, (1, 1, 3)), (32, (8, 8, 16))])
def test_the_name_stands_before_a_quarter_of_contexts_amid_a_quarter_and_behind_the_others(number, quarters):
    mixed = positions("mixed", number)
    assert tuple(mixed.count(place) for place in ("front", "middle", "end")) == quarters
    assert positions("middle", 3) == ["middle"] * 3


# ── the bound ────────────────────────────────────────────────────────────────────────────────────────


def toy():
    """Images (7, 24), texts of 3 contexts and 5 classes that are unlike, scale 9."""
    texts = F.normalize(drawn(1, 5, 24) + 0.7 * drawn(3, 5, 24, seed=8), dim=-1)
    return F.normalize(drawn(7, 24), dim=-1), texts, LABELS, torch.tensor(9.0)


def test_logits_are_those_of_the_means_and_half_the_variance_of_their_difference_to_the_labels():
    images, texts, labels, scale = toy()
    mean = texts.mean(0)
    off = texts - mean
    slow = torch.empty(7, 5)
    for b in range(7):
        for c in range(5):
            y = labels[b]
            covariance = [sum(off[k, i] * off[k, j] for k in range(3)) / 4 for i, j in ((c, c), (y, y), (c, y))]
            variance = (images[b] ** 2 * (covariance[0] + covariance[1] - 2 * covariance[2])).sum()
            slow[b, c] = 9 * images[b] @ mean[c] + 9**2 / 2 * variance
    logits = surrogate(images, texts, labels, scale)
    close(logits, slow, 1e-5)
    added = logits - 9 * images @ mean.mT
    assert added.min() > -1e-5 and added[torch.arange(7), labels].abs().max() < 1e-5 and added.max() > 0.5


def test_the_loss_is_no_less_than_that_of_gaussian_features_on_average():
    images, texts, labels, scale = toy()
    bound = F.cross_entropy(surrogate(images, texts, labels, scale), labels, reduction="none")
    mean = texts.mean(0)
    off = (texts - mean) / 2  # three texts count for four
    draws, gained = torch.Generator().manual_seed(7), []
    for image, label, most in zip(images, labels, bound, strict=True):
        noise = torch.randn(200_000, 3 * 24, generator=draws)
        directions = (off * image).transpose(0, 1).flatten(1)  # what noise of each text and channel does to a class
        logits = scale * (image @ mean.mT + noise @ directions.mT)
        average = (logits.logsumexp(-1) - logits[:, label]).mean()
        assert average <= most + 1e-3
        gained.append(average - F.cross_entropy(scale * image @ mean.mT, label))
    assert sum(gained) / 7 > 0.01, "features without spread would have done as well"


def test_equal_contexts_are_coop(side):
    ours, coop, images = head(side, position="end").train(), ContextTexts(side, 4), drawn(7, 24)
    coop.begin_task(0, NAMES, range(5))
    with torch.no_grad():
        ours.texts.contexts.copy_(coop.contexts[0].expand(5, -1, -1))
        expected = TextHead(coop)(images).logits
        close(ours(images, LABELS).logits, expected)
        close(ours.eval()(images).logits, expected)


@pytest.mark.parametrize("negatives", ["seen", "task"])
def test_labels_are_found_among_the_classes_that_compete(side, negatives):
    ours, images = head(side, negatives=negatives, each_step=5).train(), drawn(7, 24)
    labels = torch.tensor([3, 4, 4, 3, 4, 3, 3])
    with torch.no_grad():
        logits = ours(images, labels).logits
        texts = ours.texts.encode_each(range(5), range(5))
    expected = surrogate(F.normalize(images, dim=-1), texts, labels, torch.tensor(20.0))
    close(logits[:, 3:], expected[:, 3:])
    assert torch.isinf(logits[:, :3]).all() == (negatives == "task")


# ── a step ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_moves_the_contexts_that_it_draws(side):
    ours, seen = head(side, apart=0.0).train(), []
    for seed in range(4):
        ours.zero_grad()
        torch.manual_seed(seed)
        said = ours(drawn(7, 24), LABELS)
        F.cross_entropy(said.logits, LABELS).backward()
        seen.append((ours.texts.contexts.grad.abs().amax((1, 2)) > 0).tolist())
        assert said.terms == {} and all(p.grad is None for p in ours.texts.tower.parameters())
    assert all(sum(moved) == 3 for moved in seen) and len(set(map(tuple, seen))) > 1


def test_contexts_are_kept_from_saying_the_same_without_a_name(side):
    ours = head(side, apart=0.2).train()
    said = torch.stack([text_by_hand("X X X X.", context) for context in ours.texts.contexts])
    pairs = [(said[i] @ said[j]).abs() for i in range(5) for j in range(5) if i != j]
    term = ours(drawn(7, 24), LABELS).terms["contexts"]
    close(term, 0.2 * sum(pairs) / 20)
    term.backward()
    assert (ours.texts.contexts.grad.abs().amax((1, 2)) > 0).all()
    assert head(side, number=1, each_step=1).texts.terms(drawn(7, 24)) == {}


# ── the method ───────────────────────────────────────────────────────────────────────────────────────


def test_contexts_alone_move_and_do_not_grow():
    trainer = trainer_of(ProDA(contexts=5, length=4, epochs=1, batch_size=9), tiny_clip())
    model, stream = trainer.learner.model, blobs(tasks=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for task in stream:
        trainer.learn(task)
    after = model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == {"head.texts.contexts"}
    assert after.keys() == before.keys() and after["head.texts.contexts"].shape == (5, 4, 40)


def test_defaults_are_the_released_codes_but_for_the_plan():
    assert ProDA().model_dump() == {
        "negatives": "task",
        "memory": 0,
        "memory_total": 0,
        "choose": "random",
        "balance": 0,
        "epochs": 5,
        "batch_size": 20,
        "lr": 0.002,
        "momentum": 0.0,
        "names": {},
        "contexts": 32,
        "length": 16,
        "position": "mixed",
        "each_step": 4,
        "apart": 0.1,
    }


def test_settings_reach_the_texts_and_the_head():
    head = ProDA(contexts=6, length=3, position="front", each_step=2, apart=0.3, negatives="seen").build(tiny_clip())
    head = head.model.head
    assert tuple(head.texts.contexts.shape) == (6, 3, 40) and abs(head.texts.contexts.detach().std() - 0.02) < 0.005
    assert (head.texts.positions, head.texts.apart) == (["front"] * 6, 0.3)
    assert (head.each_step, head.negatives) == (2, "seen")


def test_a_step_cannot_draw_more_contexts_than_there_are():
    with pytest.raises(ConfigError) as error:
        ProDA(contexts=3)
    assert str(error.value) == "each_step must be at most the number of contexts, 3; got 4"


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"balance", "choose"}),
        ({"contexts": 1, "each_step": 1}, {"balance", "choose", "apart"}),
        ({"memory": 2}, {"negatives"}),
    ],
)
def test_settings_that_change_nothing_are_named(settings, idle):
    assert ProDA(**settings).idle().keys() == idle
