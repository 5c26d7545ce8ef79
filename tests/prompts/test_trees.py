"""Texts written as trees say what they say alone: P 6 prompts of n 3 words, 3 in a text; C 5 names, W 40, F 24."""

import pytest
import torch

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.prompts import trees
from lamina.prompts.contexts import encoded, worded
from lamina.prompts.trees import branched, grown
from tests.backbones.clips import clip, close, tokenizer

NAMES = ["cat", "lawn mower", "x", "red panda bear", "cat fish"]
#: choices that share no prompt, the first, the first two, the last alone, the same ones in another order, and all
CHOICES = {
    "none": [[0, 1, 2], [3, 4, 5]],
    "the first": [[0, 1, 2], [0, 3, 4], [1, 2, 3], [0, 5, 1]],
    "the first two": [[0, 1, 2], [0, 1, 3], [2, 4, 5], [0, 1, 4]],
    "the last": [[0, 1, 5], [2, 3, 5]],
    "others": [[0, 1, 2], [2, 1, 0], [1, 0, 2]],
    "all": [[4, 0, 3], [1, 2, 5], [4, 0, 3]],
    "one": [[5, 3, 1]],
}


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 100.0)


def both_ways(side, chosen, position="end", names=NAMES):
    """Features and gradients of prompts, as trees and with every text whole and alone."""
    wording, chosen, found = worded(side, names, chosen.shape[1] * 3, position=position), chosen, []
    for read in (
        lambda prompts: branched(side.tower, wording, prompts, chosen),
        lambda prompts: encoded(side.tower, wording, prompts[chosen].flatten(1, 2), share=False),
    ):
        prompts = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
        features = read(prompts)
        (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        found.append((features.detach(), prompts.grad))
    return found


def check(found):
    (ours, our_gradient), (theirs, their_gradient) = found
    close(ours, theirs, 1e-5)
    close(our_gradient, their_gradient, 1e-5)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("shared", CHOICES)
def test_neither_features_nor_gradients_change(side, shared, position):
    found = both_ways(side, torch.tensor(CHOICES[shared]), position)
    assert found[0][0].shape == (len(CHOICES[shared]), 5, 24)
    check(found)


@pytest.mark.parametrize("rows", [1, 17, 40, 100, 1000])
def test_it_does_not_matter_where_a_sequence_ends(side, monkeypatch, rows):
    monkeypatch.setattr(trees, "ROWS", rows)
    check(both_ways(side, torch.tensor(CHOICES["the first two"])))


@pytest.mark.parametrize("top", [1, 2, 4])
def test_it_does_not_matter_how_many_prompts_a_text_takes_or_how_many_names_there_are(side, top):
    chosen = torch.randint(6, (7, top), generator=torch.Generator().manual_seed(4))
    check(both_ways(side, chosen))
    check(both_ways(side, chosen, names=NAMES[1:2]))


def test_what_texts_share_is_written_once():
    texts = torch.tensor([[9, 1, 2, 5], [9, 1, 2, 6], [9, 1, 3, 5], [9, 4, 5, -1]])
    forest = grown(texts, 100)
    assert forest.symbols.tolist() == [[9, 1, 2, 5, 6, 3, 5, 4, 5]]
    assert forest.places.tolist() == [[0, 1, 2, 3, 3, 2, 3, 1, 2]]
    assert forest.ends.tolist() == [[3, 4, 6, 8]]
    seen = [row.nonzero().flatten().tolist() for row in forest.sees[0]]
    assert seen == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5], [0, 1, 5, 6], [0, 7], [0, 7, 8]
    ]  # fmt: skip


def test_a_full_sequence_is_followed_by_one_that_begins_anew():
    texts = torch.tensor([[9, 1, 2, 5], [9, 1, 2, 6], [9, 1, 3, 5], [9, 4, 5, -1]])
    forest = grown(texts, 6)
    assert forest.symbols.tolist() == [[9, 1, 2, 5, 6, 0], [9, 1, 3, 5, 4, 5]]
    assert forest.ends.tolist() == [[3, 4], [3, 5]]
    assert [part.tolist() for part in forest.texts] == [[0, 0, 1, 1], [0, 1, 0, 1]]


def test_where_nothing_is_learned_a_few_sequences_are_read_together(side, monkeypatch):
    chosen, wording = torch.tensor(CHOICES["the first"]), worded(side, NAMES, 9)
    prompts = torch.randn(6, 3, 40)
    whole = branched(side.tower, wording, prompts, chosen)
    sizes, tree = [], TextTower.tree
    monkeypatch.setattr(
        TextTower, "tree", lambda tower, sees, ends: sizes.append(ends.numel()) or tree(tower, sees, ends)
    )
    monkeypatch.setattr(trees, "TOGETHER", 7)
    monkeypatch.setattr(trees, "ROWS", 30)
    with torch.no_grad():
        close(branched(side.tower, wording, prompts, chosen), whole)
    assert len(sizes) > 1 and max(sizes) <= 7


def test_rows_of_other_texts_would_be_noticed(side, monkeypatch):
    """The comparison finds a mistake: rows that look at one row too many."""
    tree = TextTower.tree
    monkeypatch.setattr(TextTower, "tree", lambda tower, sees, ends: tree(tower, torch.ones_like(sees), ends))
    with pytest.raises(AssertionError):
        check(both_ways(side, torch.tensor(CHOICES["the first"])))
