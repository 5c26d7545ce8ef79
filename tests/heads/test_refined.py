"""A Gaussian per class to draw features from: F 5 features, 4 classes of 9, 2, 1 and 14 images."""

import numpy as np
import pytest
import torch

from lamina.heads.gaussians import RIDGE
from lamina.heads.linear import LinearHead
from lamina.heads.refined import RefinedHead
from lamina.seeds import generator_at

COUNTS = [9, 2, 1, 14]
LABELS = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
_GENERATOR = torch.Generator().manual_seed(7)
FEATURES = 3 * torch.randn(26, 5, generator=_GENERATOR) @ torch.randn(5, 5, generator=_GENERATOR) + 2.0
TASKS = [[0, 1], [2, 3]]


def grown(tasks=TASKS):
    head = RefinedHead(5)
    for index, columns in enumerate(tasks):
        head.begin_task(index, [f"class {column}" for column in columns], columns)
    return head


def look(head, chosen, batch=7, reduce=lambda total: total):
    head.begin_look()
    for rows in chosen.nonzero().flatten().split(batch):
        head.collect(FEATURES[rows], LABELS[rows])
    head.end_look(reduce)


def taught(batch=7):
    head = RefinedHead(5)
    for index, columns in enumerate(TASKS):
        head.begin_task(index, [f"class {column}" for column in columns], columns)
        look(head, torch.isin(LABELS, torch.tensor(columns)), batch)
    return head


def assert_gaussians(head):
    """Means and covariances are those of numpy, with a small ridge; one image has no covariance."""
    assert head.counts.tolist() == COUNTS and head.counts.dtype == torch.float64
    rows = FEATURES.double().numpy()
    for column, count in enumerate(COUNTS):
        own = rows[LABELS.eq(column)]
        covariance = np.cov(own.T, ddof=1) if count > 1 else np.zeros((5, 5))
        np.testing.assert_allclose(head.means[column].numpy(), own.mean(0), rtol=0, atol=1e-10)
        np.testing.assert_allclose(head.covariance(column).numpy(), covariance + 1e-4 * np.eye(5), rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 4, 26])
def test_means_and_covariances_are_those_of_numpy_for_any_batches(batch):
    assert RIDGE == 1e-4
    assert_gaussians(taught(batch))


def test_images_of_a_class_met_again_count_as_if_they_had_come_at_once():
    head, later = grown(), torch.arange(26) % 3 == 0
    look(head, ~later)
    for index, columns in enumerate([[3, 0], [2, 1]], start=2):
        head.begin_task(index, [f"class {column}" for column in columns], columns)
        look(head, later & torch.isin(LABELS, torch.tensor(columns)))
    assert_gaussians(head)


def test_two_processes_gather_what_one_does_even_if_one_of_them_never_saw_a_class():
    ours, theirs = grown(), grown()
    mine = (LABELS == 2) | (torch.arange(26) % 2 == 0) & (LABELS != 3)
    for head, share in ((ours, mine), (theirs, ~mine)):
        for rows in share.nonzero().flatten().split(7):
            head.collect(FEATURES[rows], LABELS[rows])
    said = []

    def other_process(part):
        said.append(part.clone())
        return torch.ones(4) if len(said) == 1 else part  # every class was met somewhere

    theirs.end_look(other_process)
    answers = iter(said)
    ours.end_look(lambda part: part + next(answers))
    assert said[0].tolist() == [1, 1, 0, 1] and len(said) == 1 + 3 * 4 and next(answers, None) is None
    assert_gaussians(ours)


def test_an_unfinished_look_leaves_no_trace():
    head = taught()
    head.collect(FEATURES.flip(0), LABELS)
    look(head, torch.zeros(26, dtype=torch.bool))
    assert_gaussians(head)


def test_a_new_class_leaves_old_gaussians_alone_and_has_none_yet():
    head = taught()
    head.begin_task(2, ["class 4"], [4])
    assert head.counts.tolist() == [*COUNTS, 0] and head.means.shape == (5, 5) and head.scatters.shape == (5, 15)
    head.counts = head.counts[:4]
    assert_gaussians(head)


def test_draws_are_the_mean_and_the_root_of_the_covariance_times_normal_numbers():
    head = taught()
    features, columns = head.draws(3, 0, "train", 1, 2)
    generator = generator_at(0, "train", 1, 2)
    for column in range(4):
        normal = torch.randn(3, 5, generator=generator)
        root = torch.linalg.cholesky(head.covariance(column)).float()
        expected = head.means[column].float() + normal @ root.mT
        assert torch.equal(features[3 * column : 3 * column + 3], expected)
    assert columns.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert features.dtype == torch.float32 and columns.dtype == torch.int64 and not features.requires_grad


def test_draws_depend_on_their_address_alone():
    head = taught()
    first = head.draws(3, 0, "epoch", 4)[0]
    torch.manual_seed(99)
    assert torch.equal(head.draws(3, 0, "epoch", 4)[0], first)
    before = torch.get_rng_state()
    assert not torch.isclose(head.draws(3, 0, "epoch", 5)[0], first).any()
    assert torch.equal(torch.get_rng_state(), before)


def roots_made(monkeypatch):
    """Note every covariance that a root is taken of."""
    made, cholesky = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: made.append(matrix.clone()) or cholesky(matrix))
    return made


def test_roots_are_taken_once_and_anew_after_another_look_back(monkeypatch):
    head, made = taught(), roots_made(monkeypatch)
    first = head.draws(3, 0)[0]
    assert torch.equal(head.draws(3, 0)[0], first) and len(made) == 4
    look(head, (LABELS == 1) & (torch.arange(26) == 9))  # one more image moves its class's mean and covariance
    second = head.draws(3, 0)[0].view(4, 3, 5)
    assert len(made) == 8 and torch.equal(made[5], head.covariance(1)) and not torch.allclose(made[5], made[1])
    assert [torch.equal(was, now) for was, now in zip(first.view(4, 3, 5), second, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert_drawn(head, second.flatten(0, 1))


def assert_drawn(head, features):
    """Three features of each class are what the definition says, from covariances as they are now."""
    generator = generator_at(0)
    for column, own in enumerate(features.split(3)):
        root = torch.linalg.cholesky(head.covariance(column)).float()
        expected = head.means[column].float() + torch.randn(3, 5, generator=generator) @ root.mT
        assert torch.equal(own, expected)


def test_a_head_that_has_drawn_forgets_its_roots_when_it_takes_up_what_another_remembers():
    head, other = taught(), taught()
    look(head, LABELS == 3, batch=3)
    other.draws(3, 0)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.draws(3, 0)[0], head.draws(3, 0)[0])
    assert_drawn(other, other.draws(3, 0)[0])


def test_many_draws_have_the_mean_and_covariance_of_the_images():
    head = taught()
    features, columns = head.draws(20_000, 0)
    for column in range(4):
        own, covariance = features[columns == column].double(), head.covariance(column)
        size = float(covariance.diagonal().sum().sqrt())
        assert float((own.mean(0) - head.means[column]).norm()) < 0.03 * size
        assert float((own.mT.cov() - covariance).norm()) < 0.05 * float(covariance.norm())


def test_what_is_remembered_gives_the_same_draws_and_scores_and_grows_on():
    head, again = taught(), grown()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.draws(3, 0)[0], head.draws(3, 0)[0])
    assert torch.equal(again(FEATURES).logits, head(FEATURES).logits)
    look(again, LABELS == 1)
    assert again.counts.tolist() == [9, 4, 1, 14] and head.counts.tolist() == COUNTS


def test_scores_are_those_of_linear_layers():
    torch.manual_seed(3)
    refined = taught()
    torch.manual_seed(3)
    linear = LinearHead(5)
    for index, columns in enumerate(TASKS):
        linear.begin_task(index, [f"class {column}" for column in columns], columns)
    assert torch.equal(refined(FEATURES).logits, linear(FEATURES).logits)
    assert [p.requires_grad for p in refined.parameters()] == [False, False, True, True]


def test_other_heads_draw_nothing():
    with pytest.raises(NotImplementedError):
        LinearHead(5).draws(3, 0)
