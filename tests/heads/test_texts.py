"""Class names to features: C 3 and 2 classes in two tasks, 2 templates, n 4 words, B 7, W 40, F 24."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.clip import ClipImageTower, TextSide
from lamina.backbones.clip_text import TextTower
from lamina.errors import ConfigError, DataError
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts, HandTexts, text_side
from tests.backbones.clips import clip, close, ids, tokenizer

FIRST, SECOND = ["cat", "lawn_mower", "red panda"], ["aquarium fish", "x"]
SPOKEN = ["cat", "lawn mower", "red panda", "aquarium fish", "x"]
TEMPLATES = ["a photo of a {}.", "the {}, small"]


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def met(texts, second=True):
    """Let it take up both tasks."""
    texts.begin_task(0, FIRST, [0, 1, 2])
    if second:
        texts.begin_task(1, SECOND, [3, 4])
    return texts


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# ── templates ────────────────────────────────────────────────────────────────────────────────────────


def test_a_class_is_the_mean_over_templates_of_length_one(side):
    each = [F.normalize(clip().encode_text(ids(*[t.format(n) for n in SPOKEN])), dim=-1) for t in TEMPLATES]
    features = met(HandTexts(side, TEMPLATES))()
    close(features, F.normalize(torch.stack(each).mean(0), dim=-1))
    close(features.norm(dim=-1), torch.ones(5))


def test_one_template_is_the_plain_classifier_and_the_order_of_templates_does_not_matter(side):
    plain = F.normalize(clip().encode_text(ids(*[TEMPLATES[0].format(n) for n in SPOKEN])), dim=-1)
    close(met(HandTexts(side, TEMPLATES[:1]))(), plain, 1e-6)
    close(met(HandTexts(side, TEMPLATES[::-1]))(), met(HandTexts(side, TEMPLATES))(), 1e-6)


def test_a_new_task_leaves_the_features_of_old_classes_to_the_bit_and_encodes_the_new_alone(side):
    texts = met(HandTexts(side, TEMPLATES), second=False)
    before, count = texts(), texts.encoded_classes
    texts.begin_task(1, SECOND, [3, 4])
    assert torch.equal(texts()[:3], before) and (count, texts.encoded_classes) == (3, 5)
    texts(), texts([4, 0])
    assert texts.encoded_classes == 5


def test_what_is_kept_goes_when_the_tower_moves_and_stays_when_it_was_there_already():
    texts = met(HandTexts(TextSide(TextTower(clip()), tokenizer(), 20.0), TEMPLATES))
    texts()
    texts.to("cpu")()
    assert texts.encoded_classes == 5
    assert texts.double()().dtype == torch.float64 and texts.encoded_classes == 10


def test_some_columns_are_those_of_all(side):
    texts = met(HandTexts(side, TEMPLATES))
    assert torch.equal(texts([4, 0, 3]), texts()[[4, 0, 3]])


def test_a_class_met_again_stays_where_it_is(side):
    texts = met(HandTexts(side, TEMPLATES))
    before = texts()
    texts.begin_task(2, ["x", "dog"], [4, 5])
    assert texts.classes == [*FIRST, *SECOND, "dog"] and torch.equal(texts()[:5], before)


def test_two_classes_that_are_called_the_same_are_refused(side):
    texts = met(HandTexts(side, TEMPLATES))
    with pytest.raises(DataError) as error:
        texts.begin_task(2, ["dog", "lawn mower"], [5, 6])
    assert str(error.value) == (
        "classes 'lawn_mower' and 'lawn mower' are both called 'lawn mower', so a text tower cannot tell them apart; "
        "rename one, or say what it is with names={...}"
    )
    assert texts.classes == [*FIRST, *SECOND]
    met(HandTexts(side, TEMPLATES, {"lawn mower": "grass cutter"})).begin_task(2, ["lawn mower"], [5])


def test_what_can_be_computed_again_is_not_part_of_what_was_learned(side):
    assert not [name for name in met(HandTexts(side, TEMPLATES)).state_dict() if not name.startswith("tower.")]


def test_features_that_were_kept_under_inference_can_be_learned_with(side):
    texts = met(HandTexts(side, TEMPLATES))
    with torch.inference_mode():
        texts()
    images = drawn(7, 24).requires_grad_()
    (images @ texts().mT).sum().backward()
    assert images.grad is not None


# ── learned words ────────────────────────────────────────────────────────────────────────────────────


def test_words_to_start_from_say_what_the_prompt_says(side):
    texts = met(ContextTexts(side, 4, words="a photo of a"))
    close(texts(), met(HandTexts(side, ["a photo of a {}."]))())


def test_words_of_another_number_than_the_learned_ones_are_refused(side):
    with pytest.raises(ConfigError) as error:
        ContextTexts(side, 16, words="a photo of a")
    assert str(error.value) == (
        "'a photo of a' has 4 tokens, and there are 16 learned ones to start from them: change one or the other"
    )


def test_learned_words_alone_get_a_gradient(side):
    texts = met(ContextTexts(side, 4))
    texts().square()[:, 0].sum().backward()
    (context,) = texts.contexts
    assert context.grad.abs().max() > 0 and all(p.grad is None for p in texts.tower.parameters())


@pytest.mark.parametrize(
    ("scope", "shapes"), [("shared", [(4, 40)]), ("task", [(4, 40)] * 2), ("class", [(3, 4, 40), (2, 4, 40)])]
)
def test_a_context_serves_all_classes_a_task_or_a_class(side, scope, shapes):
    texts = met(ContextTexts(side, 4, scope=scope))
    assert [tuple(part.shape) for part in texts.contexts] == shapes
    assert [part.requires_grad for part in texts.contexts] == ([True] if scope == "shared" else [False, True])
    before = texts()
    with torch.no_grad():
        texts.contexts[-1].add_(drawn(4, 40))
    moved = (texts() - before).abs().amax(1) > 1e-3
    assert moved.tolist() == ([True] * 5 if scope == "shared" else [False] * 3 + [True] * 2)


@pytest.mark.parametrize("scope", ["task", "class"])
def test_a_task_without_a_new_class_learns_on_with_what_its_classes_have(side, scope):
    texts = met(ContextTexts(side, 4, scope=scope))
    for index, (classes, columns, learns) in enumerate(
        [(FIRST[1:], [1, 2], [True, False]), (SECOND, [3, 4], [False, True]), ([*FIRST, *SECOND], range(5), [True] * 2)]
    ):
        texts.begin_task(2 + index, classes, columns)
        assert [part.requires_grad for part in texts.contexts] == learns


@pytest.mark.parametrize("scope", ["shared", "task", "class"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_features_with_a_gradient_are_those_without_in_any_order_of_columns(side, scope, position):
    texts = met(ContextTexts(side, 4, scope=scope, position=position))
    with torch.no_grad():
        kept = texts()
    close(texts().detach(), kept)
    close(texts([4, 0, 3]).detach(), kept[[4, 0, 3]])


def test_what_has_changed_is_encoded_anew_and_nothing_else(side):
    texts = met(ContextTexts(side, 4, scope="task"))
    with torch.no_grad():
        texts(), texts()
        assert texts.encoded_classes == 5
        texts.contexts[1].add_(1.0)
        texts()
        assert texts.encoded_classes == 7
        texts.load_state_dict(copy.deepcopy(texts.state_dict()))
        texts()
    assert texts.encoded_classes == 12


def test_a_state_taken_back_says_the_same(side):
    ours, theirs = (met(ContextTexts(side, 4, scope="class")) for _ in range(2))
    assert (ours() - theirs()).abs().max() > 1e-3
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs(), ours())


# ── previews ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "make", [lambda side: HandTexts(side, TEMPLATES), lambda side: ContextTexts(side, 4, scope="task")]
)
def test_a_preview_knows_further_classes_and_leaves_the_texts_as_they_are(side, make):
    texts = met(make(side), second=False)
    with torch.no_grad():
        before = texts()
        seen = texts.preview(["dog", "cat", "x"])
        assert seen.classes == [*FIRST, "dog", "x"] and texts.classes == FIRST
        assert torch.equal(seen()[:3], before) and torch.equal(texts(), before)
        assert seen().shape == (5, 24)


# ── the head ─────────────────────────────────────────────────────────────────────────────────────────


def test_logits_are_scaled_cosines(side):
    head, images = TextHead(met(HandTexts(side, TEMPLATES))), drawn(7, 24)
    close(head(images).logits, 20 * F.normalize(images, dim=-1) @ head.texts().mT)
    close(TextHead(met(HandTexts(side, TEMPLATES)), scale=3.0)(images).logits, head(images).logits * 3 / 20)


def test_names_of_other_tasks_are_not_read_in_training_where_they_do_not_compete(side):
    head = TextHead(ContextTexts(side, 4), negatives="task")
    head.begin_task(0, FIRST, [0, 1, 2])
    head.begin_task(1, SECOND, [3, 4])
    images = drawn(7, 24)
    inside = head.train()(images).logits
    assert torch.isinf(inside[:, :3]).all() and torch.isfinite(inside[:, 3:]).all()
    outside = head.eval()(images).logits
    close(inside[:, 3:], outside[:, 3:])
    assert torch.isfinite(outside).all()


def test_the_scale_is_learned_only_where_asked_and_stays_at_most_a_hundred(side):
    learned = TextHead(met(HandTexts(side, TEMPLATES)), learn_scale=True)
    assert [name for name, p in learned.named_parameters() if p.requires_grad] == ["log_scale"]
    with torch.no_grad():
        learned.log_scale.fill_(9.0)
    assert learned.scale == 100
    for _ in range(2):  # where it is at its limit, it still learns
        learned.log_scale.grad = None
        scores = learned(drawn(7, 24)).logits
        scores.square().sum().backward()
        assert learned.log_scale.grad > 1 and 99.999 < learned.scale <= 100
    assert learned.eval()(drawn(7, 24)).logits.equal(scores)
    assert not [p for p in TextHead(met(HandTexts(side, TEMPLATES))).parameters() if p.requires_grad]


def test_a_preview_of_a_head_scores_further_classes(side):
    head, images = TextHead(met(HandTexts(side, TEMPLATES), second=False)), drawn(7, 24)
    seen = head.preview(["dog"])
    assert seen(images).logits.shape == (7, 4) and head(images).logits.shape == (7, 3)
    close(seen(images).logits[:, :3], head(images).logits)


def test_a_tower_without_a_text_side_is_refused(side):
    tower = ClipImageTower(clip())
    with pytest.raises(ConfigError) as error:
        text_side(tower, "coop")
    assert str(error.value) == (
        "coop reads the names of classes, and this backbone has no text tower; take one of CLIP: lamina:clip-nano, or "
        "open_clip:MODEL:TAG"
    )
    tower.text = side
    assert text_side(tower, "coop") is side
