"""A head that learns from copies of images: F 6 features, tasks of 3, 2 and 4 classes, 5 images."""

import pytest
import torch
from torch.nn import functional as F

from lamina.heads.consistent import ConsistentHead, smoothing

COLUMNS = [[0, 1, 2], [3, 4], [8, 5, 7, 6]]
LABELS = torch.tensor([5, 6, 8, 8, 7])
PLACES = torch.tensor([1, 3, 0, 0, 2])
NOBODY, EVERYBODY = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)


def grown(columns=COLUMNS, **more):
    head = ConsistentHead(6, **more)
    for index, places in enumerate(columns):
        head.begin_task(index, [f"class {place}" for place in places], places)
        with torch.no_grad():
            for part in head.blocks[-1].parameters():  # as if it had been trained
                part.add_(torch.randn_like(part))
    return head


def copies():
    return torch.randn(10, 6, requires_grad=True)


def grads(head):
    return {name: part.grad for name, part in head.named_parameters() if part.grad is not None}


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


# ── the smoothing of one layer's answers ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flatness", [1.02, 1.2, 3.0])
def test_the_gradient_is_the_difference_between_an_answer_and_a_flatter_one(flatness):
    z = (3 * torch.randn(5, 4)).requires_grad_()
    smoothing(z, NOBODY, flatness).backward()
    expected = (z.softmax(-1) - (z / flatness).softmax(-1)) / 5
    torch.testing.assert_close(z.grad, expected, rtol=0, atol=1e-7)
    assert z.grad.abs().max() > 1e-4
    torch.testing.assert_close(z.grad.sum(-1), torch.zeros(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("content", "flatness"), [(EVERYBODY, 1.2), (NOBODY, 1.0)])
def test_answers_that_may_stay_get_no_gradient(content, flatness):
    z = (3 * torch.randn(5, 4)).requires_grad_()
    smoothing(z, content, flatness).backward()
    assert z.grad.abs().max() <= 1e-7


def test_a_step_down_the_loss_raises_the_entropy_of_every_answer():
    z = (3 * torch.randn(5, 4)).requires_grad_()
    smoothing(z, NOBODY, 1.2).backward()
    assert (entropy(z.detach() - 0.1 * z.grad) > entropy(z.detach())).all()


def test_the_loss_is_a_cross_entropy_and_of_a_single_class_it_is_zero():
    z = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 4.0]])
    content = torch.tensor([True, False])
    expected = [-(aim * z[b].log_softmax(-1)).sum() for b, aim in enumerate([z[0].softmax(-1), (z[1] / 2).softmax(-1)])]
    assert smoothing(z, content, 2.0).item() == pytest.approx(sum(expected).item() / 2, abs=1e-6)
    assert smoothing(z[:, :1], content, 2.0) == 0


# ── what a head says in training ─────────────────────────────────────────────────────────────────────


def test_logits_are_of_the_last_copy_and_extra_losses_of_the_first():
    head, features = grown(), copies()
    scores = head(features, LABELS)
    assert set(scores.terms) == {"auxiliary", "smoothing"}
    with torch.no_grad():
        assert torch.equal(scores.logits, head(features[5:]).logits)
    scores.logits.sum().backward(retain_graph=True)
    assert features.grad[:5].abs().max() == 0 < features.grad[5:].abs().min()
    for term in scores.terms.values():
        features.grad = None
        term.backward(retain_graph=True)
        assert features.grad[5:].abs().max() == 0 < features.grad[:5].abs().max()


def test_a_single_copy_stands_for_both():
    head, features = grown(), copies()
    one, two = head(features[:5], LABELS), head(features[:5].repeat(2, 1), LABELS)
    torch.testing.assert_close(one.logits, two.logits)
    torch.testing.assert_close(one.terms, two.terms)
    assert len(one.terms) == 2


def test_the_auxiliary_loss_is_that_of_a_layer_which_takes_no_part_in_predictions():
    head, features = grown(), copies()
    term = head(features, LABELS).terms["auxiliary"]
    logits = features[:5] @ head.auxiliary.weight.T + head.auxiliary.bias
    torch.testing.assert_close(term, F.cross_entropy(logits, PLACES))
    term.backward()
    assert set(grads(head)) == {"auxiliary.weight", "auxiliary.bias"}
    before = head(features).logits
    with torch.no_grad():
        head.auxiliary.weight.add_(1)
    assert torch.equal(head(features).logits, before) and head(features).terms == {}


@pytest.mark.parametrize(("weight", "flatness", "margin"), [(1.0, 1.2, 0.0), (0.5, 1.5, 0.8), (2.0, 1.5, -0.8)])
def test_old_answers_are_smoothed_on_average_but_those_that_the_new_layer_exceeds_by_the_margin(
    weight, flatness, margin
):
    head, features = grown(weight=weight, flatness=flatness, margin=margin), copies()
    terms, satisfied = [], 0
    for layer in (0, 1):
        for image in features[:5]:
            z, c = head.blocks[layer](image), head.blocks[2](image)
            satisfied += bool(c.max() > z.max() + margin)
            aim = (z / (1 if c.max() > z.max() + margin else flatness)).softmax(-1)
            terms.append(-(aim * z.log_softmax(-1)).sum())
    assert 0 < satisfied < 10
    term = head(features, LABELS).terms["smoothing"]
    assert term.item() == pytest.approx(weight * torch.stack(terms).mean().item(), abs=1e-5)


@pytest.mark.parametrize(("margin", "stays"), [(0.4, True), (0.6, False), (-0.4, True)])
def test_an_old_answer_stays_only_where_new_logits_win_by_more_than_the_margin(margin, stays):
    """The highest logits are 1 and 1.5 for all images."""
    head, features = grown(COLUMNS[:2], margin=margin, flatness=2.0), copies()
    for layer, biases in zip(head.blocks, [[1.0, -2.0, 0.0], [1.5, 0.0]], strict=True):
        layer.weight.data.mul_(1e-9)
        layer.bias.data = torch.tensor(biases)
    term = head(features, torch.tensor([3, 4, 4, 3, 3])).terms["smoothing"]
    old = torch.tensor([1.0, -2.0, 0.0])
    expected = -((old / (1 if stays else 2)).softmax(-1) * old.log_softmax(-1)).sum()
    assert term.item() == pytest.approx(expected.item(), abs=1e-5)


def test_smoothing_reaches_features_and_no_layer():
    head, features = grown(), copies()
    head(features, LABELS).terms["smoothing"].backward()
    assert grads(head) == {} and features.grad[:5].abs().max() > 0


def test_the_first_task_has_nothing_to_smooth():
    assert set(grown(COLUMNS[:1])(copies(), torch.tensor([0, 2, 1, 1, 0])).terms) == {"auxiliary"}


def test_tasks_of_a_single_class_have_losses_of_zero():
    head, features = grown([[0], [1]]), copies()
    scores = head(features, torch.ones(5, dtype=torch.long))
    assert scores.terms["auxiliary"] == 0 and scores.terms["smoothing"] == 0


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_brings_two_layers_and_freezes_all_but_these():
    head = grown(COLUMNS[:2])
    before = {name: value.clone() for name, value in head.state_dict().items()}
    old = head.auxiliary
    head.begin_task(2, ["i", "f", "h", "g"], COLUMNS[2])
    assert head.auxiliary is not old and head.auxiliary.weight.shape == (4, 6)
    learning = {name for name, part in head.named_parameters() if part.requires_grad}
    assert learning == {"blocks.2.weight", "blocks.2.bias", "auxiliary.weight", "auxiliary.bias"}
    kept = {name: value for name, value in before.items() if name.startswith("blocks")}
    assert len(kept) == 4 and all(torch.equal(value, head.state_dict()[name]) for name, value in kept.items())


@pytest.mark.parametrize("layer", ["auxiliary", "main"])
def test_layers_start_uniform_within_the_root_of_three_over_features(layer):
    head = ConsistentHead(48)
    head.begin_task(0, [str(i) for i in range(40)], list(range(40)))
    part = head.auxiliary if layer == "auxiliary" else head.blocks[0]
    weight = part.weight.detach()
    assert -0.25 <= weight.min() < -0.24 and 0.24 < weight.max() <= 0.25
    assert weight.std().item() == pytest.approx(48**-0.5, rel=0.05) and part.bias.abs().max() == 0


def test_a_class_met_again_goes_on_from_its_row():
    head = grown([[0, 1, 2]])
    before = head.blocks[0].weight.detach().clone()
    head.begin_task(1, ["d", "b"], [3, 1])
    assert torch.equal(head.blocks[1].weight[1], before[1])
    assert head.blocks[1].weight[0].abs().max() <= 0.5**0.5
    assert set(head(copies(), torch.tensor([3, 1, 1, 3, 3])).terms) == {"auxiliary", "smoothing"}
