"""Class statistics and names in one score: 41 images, 3 classes of unequal size, F 24 of names and 29 in all."""

import pytest
import torch
from torch.nn import functional as F

from lamina.heads.mixed import OF_NAMES, OF_STATISTICS, NamedDiscriminant
from lamina.heads.moments import shrinkage
from lamina.heads.statistics import Discriminant
from lamina.heads.texts import HandTexts
from tests.backbones.clips import tiny_clip

LABELS = torch.arange(41) % 7 % 3  # 3 : 2 : 2
NAMES = ["red fox", "emu", "lawn mower"]


def drawn(width=29, seed=3, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    places = spread * torch.randn(3, width, generator=generator)
    return (places[LABELS] + torch.randn(41, width, generator=generator)).double()


def texts(tower=None):
    return HandTexts((tower or tiny_clip()).text, ["a photo of a {}.", "the {}."])


def look(head, features, labels=LABELS, parts=(17,)):
    head.begin_look()
    for some, own in zip(features.tensor_split(parts), labels.tensor_split(parts), strict=True):
        head.collect(some, own)
    head.end_look(lambda value: value)


@pytest.fixture
def learned():
    head = NamedDiscriminant(29, texts()).eval()
    head.begin_task(0, NAMES, range(3))
    look(head, drawn())
    return head


def test_an_image_is_left_out_as_if_it_had_never_been_there(learned):
    """Against statistics of all other images, with the shrinkage of all of them."""
    features, (covariance, freedom) = drawn(), learned.seen.covariance()
    share, level = shrinkage(covariance, freedom), covariance.trace() / 29
    found = learned.left_out(features, LABELS)
    for image in (0, 5, 40):
        others = torch.arange(41) != image
        rows, own = features[others], LABELS[others]
        means = torch.stack([rows[own == c].mean(0) for c in range(3)])
        scatter = sum((row - means[c]).outer(row - means[c]) for row, c in zip(rows, own, strict=True))
        together = (1 - share) * scatter / freedom + share * level * torch.eye(29, dtype=torch.float64)
        away = features[image] - means
        expected = -0.5 * (away @ torch.linalg.inv(together) * away).sum(1)
        torch.testing.assert_close(found[image], expected, rtol=1e-9, atol=1e-9)


def test_leaving_out_matters_most_where_images_are_few(learned):
    """With nothing left out, every image looks more like its class than it is."""
    features = drawn()
    whole = Discriminant(29)
    whole.seen = learned.seen
    with_it = whole(features).logits.softmax(-1)[torch.arange(41), LABELS].log().mean()
    without = learned.left_out(features, LABELS).softmax(-1)[torch.arange(41), LABELS].log().mean()
    assert without < with_it < 0


def test_the_losses_are_those_of_images_left_out_under_each_pair_of_weights(learned):
    features = drawn()
    known, told = learned.left_out(features, LABELS), learned.cosines(features).double()
    for row, column in ((0, 0), (13, 41), (50, 7)):
        scores = OF_STATISTICS[row] * known + OF_NAMES[column] * told
        torch.testing.assert_close(learned.losses[row, column], F.cross_entropy(scores, LABELS, reduction="sum"))


def test_the_best_pair_of_weights_is_taken_and_scores_are_their_sum(learned):
    of_statistics, of_names = learned.weights
    best = (learned.losses == learned.losses.min()).nonzero()[0].tolist()
    assert (of_statistics, of_names) == (float(OF_STATISTICS[best[0]]), float(OF_NAMES[best[1]]))
    features, alone = drawn(seed=4), Discriminant(29)
    alone.seen = learned.seen
    expected = of_statistics * alone(features).logits + of_names * learned.cosines(features)
    torch.testing.assert_close(learned(features).logits, expected)


def test_cosines_are_those_of_the_last_features_and_names(learned):
    features = drawn(seed=4).float()
    said = F.normalize(learned.texts.encode_each(range(3)).mean(1), dim=-1)
    expected = F.cosine_similarity(features[:, None, 5:], said[None], dim=-1)
    torch.testing.assert_close(learned.cosines(features), expected)


def test_names_that_say_nothing_get_no_weight_and_names_that_say_all_get_most():
    for told, wanted in ((torch.zeros(41, 3), lambda weight: weight == 0), (F.one_hot(LABELS), lambda w: w > 5)):
        head = NamedDiscriminant(29, texts())
        head.begin_task(0, NAMES, range(3))
        rows = iter(told.float().tensor_split((17,)))
        head.cosines = lambda features, rows=rows: next(rows)
        look(head, drawn(spread=0.3))
        assert wanted(head.weights[1])


def test_losses_are_summed_over_tasks_batches_and_processes():
    whole, apart = (NamedDiscriminant(29, texts(tower)) for tower in [tiny_clip()] * 2)
    for head in (whole, apart):
        head.begin_task(0, NAMES, range(3))
    look(whole, drawn())
    look(apart, drawn(), parts=(3, 9, 30))
    torch.testing.assert_close(whole.losses, apart.losses)
    before = whole.losses.clone()
    whole.begin_task(1, ["yak", "bee"], [3, 4])
    look(whole, drawn(seed=8), LABELS + 2)
    assert (whole.losses >= before).all() and (whole.losses > before).any() and whole.typical[1] == 82
    twice = NamedDiscriminant(29, texts())
    twice.begin_task(0, NAMES, range(3))
    twice.collect(drawn(), LABELS)
    twice.end_look(lambda value: 2 * value)  # as of two processes that saw the same
    assert twice.typical[1] == 82


def test_before_anything_is_learned_names_decide_alone():
    tower = tiny_clip()
    head = NamedDiscriminant(29, texts(tower))
    head.begin_task(0, NAMES, range(3))
    features = drawn(seed=4).float()
    torch.testing.assert_close(head(features).logits, 20.0 * head.cosines(features))


def test_a_class_with_a_single_image_says_nothing_of_weights():
    head = NamedDiscriminant(29, texts())
    head.begin_task(0, NAMES, range(3))
    labels = torch.cat([torch.zeros(40, dtype=torch.int64), torch.tensor([2])])
    look(head, drawn(), labels)
    assert head.typical[1] == 40 and head.losses.isfinite().all()
    only = NamedDiscriminant(29, texts())
    only.begin_task(0, NAMES, range(3))
    look(only, drawn()[:2], torch.tensor([0, 2]), parts=())
    assert only(drawn()).logits.isfinite().all()


def test_a_class_to_come_is_scored_as_a_typical_one_with_its_name(learned):
    """Against distances written out: constants that known classes share are there for the new one, too."""
    wider, features = learned.preview(["bee"]), drawn(seed=4)
    covariance, freedom = learned.seen.covariance()
    share, level = shrinkage(covariance, freedom), covariance.trace() / 29
    inverse = torch.linalg.inv((1 - share) * covariance + share * level * torch.eye(29, dtype=torch.float64))
    away = features[:, None] - learned.seen.means()
    known = -0.5 * torch.einsum("bcf,fg,bcg->bc", away, inverse, away)
    usual = learned.left_out(drawn(), LABELS)[torch.arange(41), LABELS].mean()
    of_statistics, of_names = learned.weights
    scores = of_statistics * torch.cat([known, usual.expand(41, 1)], 1) + of_names * wider.cosines(features)
    torch.testing.assert_close(wider(features).logits.softmax(-1), scores.softmax(-1), rtol=1e-5, atol=1e-7)
    assert learned(features).logits.shape == (41, 3)  # the head itself knows no more than before
