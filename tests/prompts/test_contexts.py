"""Learned words in texts: where they stand, and that sharing what texts have in common changes nothing.

G contexts 3, C names 5 (of 1, 2, 1, 3 and 2 tokens), n words 4, W 40, L 2, F 24.
"""

import pytest
import torch

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.errors import DataError
from lamina.prompts import contexts as part
from lamina.prompts.contexts import encoded, len_of, worded
from tests.backbones.clips import clip, close, ids, tokenizer

NAMES = ["cat", "lawn mower", "x", "red panda bear", "aquarium fish"]


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 100.0)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).requires_grad_()


def test_a_context_of_the_words_of_a_prompt_says_what_the_prompt_says(side):
    wording = worded(side, NAMES, 4)
    words = side.tower.words(ids("a photo of a")[0, 1:5])
    close(encoded(side.tower, wording, words[None])[0], clip().encode_text(ids(*[f"a photo of a {n}." for n in NAMES])))


@pytest.mark.parametrize(
    ("position", "texts"),
    [
        ("end", ["a photo of a {}."] * 5),
        ("middle", ["a photo {} of a."] * 5),
        ("front", ["{} a photo of a."] * 5),
    ],
)
def test_words_stand_behind_amid_or_before_the_name_whatever_its_length(side, position, texts):
    wording = worded(side, NAMES, 4, position=position)
    words = side.tower.words(ids("a photo of a")[0, 1:5])
    prompts = [text.format(name) for text, name in zip(texts, NAMES, strict=True)]
    close(encoded(side.tower, wording, words[None])[0], clip().encode_text(ids(*prompts)))
    assert torch.equal(wording.ids.argmax(1), ids(*prompts).argmax(1)) and wording.rows.shape == (5, 4)


def test_fixed_words_may_follow_the_context(side):
    wording = worded(side, NAMES, 2, words="of a", tail="!")
    words = side.tower.words(ids("a photo")[0, 1:3])
    close(encoded(side.tower, wording, words[None])[0], clip().encode_text(ids(*[f"a photo of a {n}!" for n in NAMES])))


@pytest.mark.parametrize("words", ["", "of a"])
@pytest.mark.parametrize("deep", [0, 1])
def test_what_texts_share_is_computed_once_and_changes_neither_features_nor_gradients(side, words, deep):
    wording = worded(side, NAMES, 4, words=words)
    found = []
    for share in (True, False):
        contexts, prompts = drawn(3, 4, 40), [drawn(3, 4, 40) for _ in range(deep)]
        features = encoded(side.tower, wording, contexts, deep=prompts, share=share)
        (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        found.append([features.detach(), contexts.grad, *(prompt.grad for prompt in prompts)])
    assert found[0][0].shape == (3, 5, 24)
    for shared, whole in zip(*found, strict=True):
        close(shared, whole)


def test_sharing_computes_the_common_opening_once_and_only_the_rest_of_each_text(side, monkeypatch):
    rows, embed = [], TextTower.embed

    def counted(tower, inputs):
        x, mask = embed(tower, inputs)
        rows.append(tuple(x.shape[:2]))
        return x, mask

    monkeypatch.setattr(TextTower, "embed", counted)
    wording = worded(side, NAMES, 4)
    encoded(side.tower, wording, drawn(3, 4, 40))
    assert rows == [(3, 5), (15, 5)]  # start and context for 3 contexts; of 15 texts up to 3 words, stop and end


def test_each_context_is_that_of_its_own_texts(side):
    wording, contexts = worded(side, NAMES, 4), drawn(3, 4, 40)
    together = encoded(side.tower, wording, contexts)
    for one, features in zip(contexts, together, strict=True):
        close(features, encoded(side.tower, wording, one[None])[0])
    own = encoded(side.tower, wording, torch.stack([contexts[i % 3] for i in range(5)])[None])[0]
    close(own, torch.stack([together[i % 3, i] for i in range(5)]))


def test_the_order_of_classes_does_not_matter(side):
    order, contexts = [3, 0, 4, 2, 1], drawn(2, 4, 40)
    for position in ("end", "middle", "front"):
        wording = worded(side, NAMES, 4, position=position)
        close(encoded(side.tower, wording.of(order), contexts), encoded(side.tower, wording, contexts)[:, order])


def test_deep_prompts_take_the_place_of_the_context_in_later_blocks(side):
    wording, contexts = worded(side, NAMES, 4), drawn(1, 4, 40)
    plain, deep = (encoded(side.tower, wording, contexts, deep=d) for d in ([], [drawn(4, 40) + 1]))
    assert (plain - deep).abs().max() > 0.01
    close(encoded(side.tower, wording, contexts, deep=[(drawn(4, 40) + 1).expand(1, -1, -1)]), deep)


def test_one_class_alone_is_read_too(side):
    wording, contexts = worded(side, NAMES, 4), drawn(3, 4, 40)
    close(encoded(side.tower, wording.of([1]), contexts), encoded(side.tower, wording, contexts)[:, 1:2])


def test_many_texts_go_through_the_tower_in_parts_where_nothing_is_learned(side, monkeypatch):
    wording, contexts, deep = worded(side, NAMES, 4), drawn(3, 4, 40), [drawn(3, 4, 40)]
    whole = encoded(side.tower, wording, contexts, deep=deep)
    monkeypatch.setattr(part, "TOGETHER", 11)
    with torch.no_grad():
        close(encoded(side.tower, wording, contexts, deep=deep), whole)


def test_a_tokenizer_tells_how_many_tokens_a_name_has(side):
    assert [len_of(side, name) for name in NAMES] == [1, 2, 1, 3, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the tokenizer finds no word in the class name ''; rename it"),
        (
            "fish " * 80,
            "is too long: a text tower reads 77 tokens, the two that frame it included; shorten the name, or say what "
            "it is with names={...}",
        ),
    ],
)
def test_a_name_that_cannot_be_read_is_refused(side, name, message):
    with pytest.raises(DataError) as error:
        worded(side, ["cat", name], 4)
    assert str(error.value).endswith(message)
