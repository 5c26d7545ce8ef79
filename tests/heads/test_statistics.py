"""Heads in closed form: F 6 features, 47 images of 6 unbalanced classes in tasks of 2, 3 and 1; lifted to 11."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lamina.heads.linear import LinearHead
from lamina.heads.statistics import Discriminant, NearestMean, Ridge

TASKS = [[0, 1], [2, 3, 4], [5]]
COUNTS = torch.tensor([13, 4, 7, 9, 3, 11])
LABELS = torch.arange(6).repeat_interleave(COUNTS)
_GENERATOR = torch.Generator().manual_seed(3)
MEANS = torch.randn(6, 6, generator=_GENERATOR)
MIX = torch.randn(6, 6, generator=_GENERATOR)
FEATURES = MEANS[LABELS] + 0.4 * torch.randn(47, 6, generator=_GENERATOR) @ MIX
FRESH = 2 * torch.randn(8, 6, generator=_GENERATOR)

KINDS = {
    "discriminant": Discriminant,
    "ridge": Ridge,
    "given": lambda features: Ridge(features, ridge=0.3),
    "lifted": lambda features: Ridge(features, width=11),
    "means": NearestMean,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind):
    torch.manual_seed(5)
    return KINDS[kind](6)


def look(head, features, columns, batch=9):
    head.begin_look()
    for rows, places in zip(features.split(batch), columns.split(batch), strict=True):
        head.collect(rows, places)
    head.end_look(lambda total: total)


def taught(head, tasks=TASKS, *, features=FEATURES, labels=LABELS, batch=9):
    """Let a head learn tasks of labels; return it, and the label of each of its columns."""
    met = []
    for index, task in enumerate(tasks):
        met += [label for label in task if label not in met]
        columns = [met.index(label) for label in task]
        head.begin_task(index, [f"class {label}" for label in task], columns)
        mine = torch.isin(labels, torch.tensor(task))
        look(head, features[mine], torch.tensor([met.index(label) for label in labels[mine].tolist()]), batch)
    return head, met


def scores(head, features=FRESH):
    return head(features).logits


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_no_order_of_tasks_is_better_than_another(kind):
    first = scores(taught(made(kind))[0])
    for order in permutations(TASKS):
        head, met = taught(made(kind), order)
        torch.testing.assert_close(scores(head)[:, np.argsort(met)], first, rtol=1e-6, atol=1e-6)


@every_kind
@pytest.mark.parametrize("batch", [1, 4, 47])
def test_no_split_into_batches_matters(kind, batch):
    torch.testing.assert_close(
        scores(taught(made(kind), batch=batch)[0]), scores(taught(made(kind))[0]), rtol=1e-6, atol=1e-6
    )


@every_kind
def test_images_of_a_class_met_again_count_as_if_they_had_come_at_once(kind):
    head = made(kind)
    later = torch.arange(47) % 3 == 0
    taught(head, features=FEATURES[~later], labels=LABELS[~later])
    assert scores(head).shape == (8, 6)  # made once, so that it must be made anew
    for index, columns in enumerate([[5, 1], [0, 3, 2, 4]], start=3):
        head.begin_task(index, [f"class {column}" for column in columns], columns)
        mine = later & torch.isin(LABELS, torch.tensor(columns))
        look(head, FEATURES[mine], LABELS[mine])
    assert head.seen.counts.tolist() == COUNTS.tolist()
    torch.testing.assert_close(scores(head), scores(taught(made(kind))[0]), rtol=1e-6, atol=1e-6)


@every_kind
def test_scores_are_made_anew_after_a_look_even_if_they_were_made_just_before(kind):
    head, _ = taught(made(kind))
    before = scores(head)
    look(head, FEATURES[:13], LABELS[:13] + 4)
    assert not torch.allclose(scores(head), before, atol=1e-4)


@every_kind
def test_two_processes_gather_what_one_does(kind):
    alone, _ = taught(made(kind), [range(6)])
    both = [made(kind) for _ in range(2)]
    for rank, head in enumerate(both):
        head.begin_task(0, [f"class {label}" for label in range(6)], range(6))
        head.begin_look()
        head.collect(FEATURES[rank::2], LABELS[rank::2])
    others = iter(both[1].seen._draft)
    both[0].end_look(lambda mine: mine + next(others))
    torch.testing.assert_close(scores(both[0]), scores(alone), rtol=1e-6, atol=1e-6)


@every_kind
def test_what_is_remembered_gives_equal_scores_in_a_head_that_knew_something_else(kind):
    head, _ = taught(made(kind))
    other = KINDS[kind](6)  # another projection, where there is one
    taught(other, features=FEATURES.flip(1))
    assert not torch.allclose(scores(other), scores(head), atol=1e-2)
    other.load_state_dict(head.state_dict())
    assert torch.equal(scores(other), scores(head))


@pytest.mark.parametrize("kind", ["discriminant", "ridge"])
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_scores_in_float32_are_those_of_float64_for_features_far_from_zero(kind, spread):
    """At 0.01 the mean is 100,000 times the spread; float32 has seven digits."""
    head, _ = taught(made(kind), features=1000 + spread * FEATURES)
    far = 1000 + spread * FRESH
    centre, weight, bias = head.solve()
    exact = (far.double() - centre) @ weight + bias
    assert all(part.dtype == torch.float64 for part in (centre, weight, bias))
    assert (scores(head, far) - exact).abs().max() < 1e-5 * exact.abs().max()


@every_kind
def test_features_in_float64_are_summed_and_scored_in_float64(kind):
    features = FEATURES.double() + 1e-9 * torch.arange(6)  # float32 would round these away
    head, _ = taught(made(kind), features=features)
    rows, fresh = (lifted(head, x) for x in (features, FRESH.double()))
    sums = torch.stack([rows[LABELS.eq(label)].sum(0) for label in range(6)])
    torch.testing.assert_close(head.seen.sums, sums, rtol=1e-13, atol=1e-13)
    if head.needs_moment:
        torch.testing.assert_close(head.seen.moment, rows.mT @ rows, rtol=1e-13, atol=1e-13)
    centre, weight, bias = head.solve()
    expected = (fresh - centre) @ weight + bias
    said = scores(head, FRESH.double())
    assert said.dtype == torch.float64
    torch.testing.assert_close(said, expected, rtol=1e-12, atol=1e-12)


def lifted(head, features):
    """What a head makes of features in float64, by hand."""
    if head.projection is not None:
        return (features @ head.projection.double()).clamp_min(0)
    return features if head.needs_moment else features / features.norm(dim=1, keepdim=True)


@every_kind
def test_scores_have_the_type_of_their_features_whichever_came_before(kind):
    head, _ = taught(made(kind))
    short, long, again = scores(head), scores(head, FRESH.double()), scores(head)
    assert (short.dtype, long.dtype) == (torch.float32, torch.float64)
    assert torch.equal(again, short) and not torch.equal(long.float().double(), long)
    torch.testing.assert_close(short.double(), long, rtol=1e-4, atol=1e-4)


@every_kind
def test_a_gradient_can_be_had_after_scores_without_one(kind):
    """What is made once in an evaluation serves later, too."""
    head, _ = taught(made(kind))
    with torch.inference_mode():
        scores(head)
    features = FRESH.clone().requires_grad_()
    scores(head, features).square().sum().backward()
    assert features.grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("kind", [Discriminant, Ridge])
def test_training_has_the_scores_of_the_trained_head_and_evaluation_those_of_sums(kind):
    head, _ = taught(kind(6, trained=LinearHead(6)))
    alone, _ = taught(kind(6))
    said = head(FRESH, labels=torch.arange(8) % 6).logits
    assert torch.equal(said, head.trained(FRESH).logits)
    assert torch.equal(scores(head), scores(alone)) and not torch.allclose(said, scores(head), atol=1e-2)
    assert torch.equal(alone(FRESH, labels=torch.arange(8) % 6).logits, scores(alone))
    assert [p.requires_grad for p in head.parameters()] == [False] * 4 + [True] * 2
    said.sum().backward()
    assert head.trained.blocks[2].weight.grad.abs().sum() > 0


def test_a_class_with_ten_times_the_images_is_not_more_likely():
    """Between two means the scores of a discriminant are equal, whatever the counts."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 40 + [1] * 4)
    features = MEANS[labels] + 0.3 * torch.randn(44, 6, generator=generator)
    head, _ = taught(Discriminant(6), [[0, 1]], features=features, labels=labels)
    between = (features[:40].mean(0) + features[40:].mean(0)) / 2
    said = scores(head, between[None])[0]
    assert float(said[0] - said[1]) == pytest.approx(0, abs=1e-4)
    assert scores(head, features).argmax(1).tolist() == labels.tolist()


def test_class_statistics_are_told_where_they_are_those_of_the_features_themselves():
    head = Discriminant(6)
    assert head.statistics is head.seen
    assert Ridge(6).statistics is not None and Ridge(6, width=11).statistics is None
    assert NearestMean(6).statistics is LinearHead(6).statistics is None


@every_kind
def test_an_unfinished_look_leaves_no_trace(kind):
    head, _ = taught(made(kind))
    before = scores(head)
    head.begin_look()
    head.collect(FEATURES.flip(0), LABELS)
    head.begin_look()
    head.end_look(lambda total: total)
    assert torch.equal(scores(head), before)


@every_kind
def test_images_that_are_all_alike_give_finite_scores(kind):
    head, _ = taught(made(kind), features=torch.full((47, 6), 0.25))
    assert scores(head).isfinite().all()


# ── definitions ──────────────────────────────────────────────────────────────────────────────────────


def test_a_discriminant_is_that_of_scikit_learn_with_the_same_shrinkage():
    """scikit-learn divides by n, not n - C, which scales all scores, and adds the log of how common classes are."""
    head, _ = taught(Discriminant(6))
    rows, n, p = FEATURES.double().numpy(), 47, 6
    centred = rows - np.stack([rows[LABELS.eq(c)].mean(0) for c in range(6)])[LABELS]
    free = n - 6
    covariance = centred.T @ centred / free
    squares, square = np.trace(covariance @ covariance), np.trace(covariance) ** 2
    share = ((1 - 2 / p) * squares + square) / ((free + 1 - 2 / p) * (squares - square / p))
    assert 0.01 < share < 0.5
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share).fit(rows, LABELS.numpy())
    expected = (theirs.decision_function(FRESH.double().numpy()) - np.log(COUNTS.numpy() / n)) * free / n
    ours = scores(head).double().numpy()
    apart = [said - said.mean(1, keepdims=True) for said in (ours, expected)]
    np.testing.assert_allclose(apart[0], apart[1], rtol=1e-4, atol=1e-4)


def by_normal_equations(rows, ridge, fresh, labels=LABELS):
    """Scores (n, 6) of a ridge regression of one-hot labels, in float64."""
    targets = np.eye(6)[labels.numpy()]
    weight = np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T @ targets)
    return fresh @ weight


def cross_validated(rows, labels=LABELS):
    """The ridge with the least generalised cross-validation error, by the hat matrix of each."""
    targets = np.eye(6)[labels.numpy()]
    tried = np.linalg.eigvalsh(rows.T @ rows)[-1] * np.logspace(-12, 3, 31)
    errors = []
    for ridge in tried:
        rest = np.eye(len(rows)) - rows @ np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T)
        usable = np.trace(rest) >= 1e-3 * len(rows)
        errors.append(np.square(rest @ targets).sum() / np.trace(rest) ** 2 if usable else np.inf)
    assert errors.index(min(errors)) not in (0, 30)  # a choice, not an end of the list
    return tried[np.argmin(errors)]


def test_a_given_ridge_solves_the_normal_equations():
    head, _ = taught(made("given"))
    expected = by_normal_equations(FEATURES.double().numpy(), 0.3, FRESH.double().numpy())
    np.testing.assert_allclose(scores(head).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_ridge_is_the_one_that_cross_validation_by_the_hat_matrix_chooses():
    head, _ = taught(made("ridge"))
    rows = FEATURES.double().numpy()
    expected = by_normal_equations(rows, cross_validated(rows), FRESH.double().numpy())
    np.testing.assert_allclose(scores(head).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [11, 45, 90])
def test_lifted_features_are_a_fixed_random_projection_with_a_relu(width):
    """At 90 there are fewer images than features, so that little ridge would interpolate."""
    torch.manual_seed(5)
    head, _ = taught(Ridge(6, width=width))
    torch.manual_seed(5)
    projection = torch.randn(6, width)
    assert torch.equal(head.projection, projection)
    assert "projection" in head.state_dict() and not list(head.parameters())
    rows, fresh = ((x @ projection).clamp_min(0).double() for x in (FEATURES, FRESH))
    torch.testing.assert_close(head.seen.moment, rows.mT @ rows, rtol=1e-5, atol=1e-5)  # lifted in float32
    assert torch.equal(head.seen.moment, head.seen.moment.mT)
    expected = by_normal_equations(rows.numpy(), cross_validated(rows.numpy()), fresh.numpy())
    np.testing.assert_allclose(scores(head).numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_fewer_images_than_features_do_not_blow_up(seed):
    """With next to no ridge they are interpolated: errors are rounding then, and may be negative."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(6).repeat(2)
    means = torch.randn(6, 60, generator=generator)
    features = means[labels] + 0.5 * torch.randn(12, 60, generator=generator)
    fresh = means + 0.5 * torch.randn(6, 60, generator=generator)
    said = scores(taught(Ridge(60), features=features, labels=labels)[0], fresh)
    rows = features.double().numpy()
    expected = by_normal_equations(rows, cross_validated(rows, labels), fresh.double().numpy(), labels)
    np.testing.assert_allclose(said.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert said.argmax(1).tolist() == list(range(6)) and said.abs().max() < 1.5


def test_one_class_after_another_is_learned_as_all_at_once():
    singly, _ = taught(Discriminant(6), [[label] for label in range(6)])
    torch.testing.assert_close(scores(singly), scores(taught(Discriminant(6), [range(6)])[0]), rtol=1e-6, atol=1e-6)
