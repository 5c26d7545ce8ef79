"""What contexts say when no class is named: K 3 contexts of n 4 words, W 40, F 24."""

import pytest
import torch

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.errors import ConfigError
from lamina.prompts.alone import alone, overlap
from lamina.prompts.contexts import check_room, encoded
from tests.backbones.clips import clip, close, ids, tokenizer


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def test_a_context_alone_is_a_text_that_ends_behind_it(side):
    words = side.tower.words(ids("a photo of a")[0, 1:5])
    close(encoded(side.tower, alone(side, 4), words[None])[0], clip().encode_text(ids("a photo of a.")))


def test_placeholder_words_may_stay_behind_it(side):
    words = side.tower.words(ids("a photo of a")[0, 1:5])
    said = encoded(side.tower, alone(side, 4, fillers=2), words[None])[0]
    close(said, clip().encode_text(ids("a photo of a X X.")))


def test_features_at_right_angles_do_not_overlap():
    assert overlap(torch.linalg.qr(torch.randn(24, 5)).Q.mT) < 1e-6
    assert overlap(torch.eye(24)[:5] * 3) == 0


def test_the_overlap_is_the_mean_absolute_cosine_of_pairs():
    rows = torch.randn(4, 24)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    slow = sum(torch.cosine_similarity(rows[i], rows[j], dim=0).abs() for i, j in pairs) / 6
    torch.testing.assert_close(overlap(rows), slow)
    torch.testing.assert_close(overlap(-7 * rows), slow)


def test_a_row_alone_overlaps_with_nothing_and_has_a_gradient():
    row = torch.randn(1, 24, requires_grad=True)
    overlap(row).backward()
    assert overlap(row) == 0 and not row.grad.any()


def test_a_context_that_leaves_no_room_for_a_name_is_refused(side):
    check_room(side, 73, "length=73")
    with pytest.raises(ConfigError) as error:
        check_room(side, 74, "length=74")
    assert str(error.value) == (
        "a text has 77 tokens, so that 73 of them can be learned words; got length=74: take fewer"
    )
