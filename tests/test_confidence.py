"""How sure and how new: F 5 features, 4 classes in two tasks, Gaussian clouds with a known covariance."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lamina.confidence import (
    Confidence,
    Gaussians,
    Known,
    fitted_temperature,
    gaussians,
    learn_confidence,
    raw_scores,
    sureness,
    uncertainty,
)
from lamina.errors import ConfigError, ShapeError
from lamina.heads.moments import ClassStatistics, shrunk

ROOT = torch.tensor(np.tril(np.random.default_rng(1).normal(size=(5, 5))) + 2 * np.eye(5))
MEANS = 6 * torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def cloud(count, seed=0, columns=range(4)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(list(columns)).repeat(count)
    noise = torch.randn(len(labels), 5, generator=generator, dtype=torch.float64)
    return (MEANS[labels] + noise @ ROOT.mT).float(), labels


def looked(*parts, classes=4):
    statistics = ClassStatistics(5)
    statistics.grow(classes)
    for features, labels in parts:
        statistics.collect(features, labels)
    statistics.end_look(lambda total: total)
    return statistics


# ── class statistics ─────────────────────────────────────────────────────────────────────────────────


def test_means_and_covariance_are_those_of_the_definition():
    features, labels = cloud(300)
    found = gaussians(looked((features, labels)))
    rows = features.double()
    means = torch.stack([rows[labels == c].mean(0) for c in range(4)])
    centred = rows - means[labels]
    covariance = centred.mT @ centred / (len(rows) - 4)
    torch.testing.assert_close(found.means.double(), means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.root @ found.root.mT, covariance, rtol=0.02, atol=0.02)


def test_neither_batches_nor_the_order_of_tasks_matter():
    features, labels = cloud(13)
    whole = looked((features, labels))
    parted = ClassStatistics(5)
    for columns in ([2, 3], [0, 1]):
        parted.grow(4)
        mine = torch.isin(labels, torch.tensor(columns))
        for rows in torch.arange(len(labels))[mine].split(7):
            parted.collect(features[rows], labels[rows])
        parted.end_look(lambda total: total)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], value, rtol=0, atol=1e-9)


def test_two_processes_gather_what_one_does():
    features, labels = cloud(9)
    one = looked((features, labels))
    halves = [ClassStatistics(5), ClassStatistics(5)]
    for rank, half in enumerate(halves):
        half.grow(4)
        half.collect(features[rank::2], labels[rank::2])
    other = iter(halves[1]._draft)
    halves[0].end_look(lambda mine: mine + next(other))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(halves[0].state_dict()[name], value, rtol=0, atol=1e-9)


def test_an_unfinished_look_leaves_no_trace():
    statistics = looked(cloud(5))
    before = {name: value.clone() for name, value in statistics.state_dict().items()}
    statistics.collect(*cloud(3, seed=9))
    statistics.begin_look()
    statistics.end_look(lambda total: total)
    assert all(torch.equal(value, before[name]) for name, value in statistics.state_dict().items())


def test_the_moment_is_exactly_symmetric():
    moment = looked(cloud(50)).moment
    assert torch.equal(moment, moment.mT)


def test_statistics_come_back_and_grow_on():
    statistics = looked(cloud(5))
    again = ClassStatistics(5)
    again.load_state_dict(statistics.state_dict())
    again.grow(6)
    assert again.sums.shape == (6, 5) and again.counts.tolist() == [5] * 4 + [0] * 2
    again.collect(torch.ones(2, 5), torch.tensor([5, 0]))
    again.end_look(lambda total: total)
    assert again.counts.tolist() == [6, 5, 5, 5, 0, 1]


def test_there_is_never_less_room_than_there_was():
    statistics = looked(cloud(5))
    statistics.grow(2)
    assert statistics.sums.shape == (4, 5) and statistics.counts.tolist() == [5] * 4


def test_a_class_without_images_changes_neither_the_covariance_nor_what_it_rests_on():
    features, labels = cloud(7)
    some, more = looked((features, labels)), looked((features, labels), classes=6)
    assert some.covariance()[1] == more.covariance()[1] == 28 - 4
    torch.testing.assert_close(some.covariance()[0], more.covariance()[0], rtol=0, atol=1e-12)
    assert not more.means()[4:].any()


def test_statistics_without_a_second_moment_keep_means_alone():
    features, labels = cloud(7)
    statistics = ClassStatistics(5, moment=False)
    statistics.grow(4)
    statistics.collect(features, labels)
    statistics.end_look(lambda total: total)
    assert statistics.moment.shape == (0, 0)
    torch.testing.assert_close(statistics.means(), looked((features, labels)).means(), rtol=0, atol=1e-12)
    again = ClassStatistics(5, moment=False)
    again.load_state_dict(statistics.state_dict())
    assert torch.equal(again.sums, statistics.sums)


@pytest.mark.parametrize("name", ["sums", "counts", "moment"])
def test_statistics_that_do_not_fit_are_refused(name):
    state = looked(cloud(5)).state_dict()
    with pytest.raises(ShapeError, match="of the classes must have shape"):
        ClassStatistics(5).load_state_dict({**state, name: torch.zeros(3, 7)})


def test_spread_is_the_distance_from_the_common_mean():
    features, labels = cloud(40)
    rows = features.double()
    expected = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
    assert looked((features, labels)).spread() == pytest.approx(float(expected), rel=1e-9)


# ── Gaussians ────────────────────────────────────────────────────────────────────────────────────────


def test_distance_is_that_of_mahalanobis_to_the_nearest_mean():
    features, _ = cloud(7, seed=4)
    known = Gaussians(MEANS.float(), ROOT)
    inverse = torch.linalg.inv(ROOT @ ROOT.mT)
    differences = features.double()[:, None] - MEANS
    expected = torch.einsum("bcf,fg,bcg->bc", differences, inverse, differences).min(1).values.sqrt()
    torch.testing.assert_close(known.distances(features).double(), expected, rtol=1e-3, atol=1e-3)


def test_a_mean_itself_is_at_no_distance():
    assert float(Gaussians(MEANS.float(), ROOT).distances(MEANS.float()).max()) < 1e-2


def test_few_images_still_give_a_covariance_that_can_be_inverted():
    features, labels = cloud(1)  # one image a class: nothing is left within classes
    distances = gaussians(looked((features, labels))).distances(cloud(3, seed=5)[0])
    assert distances.isfinite().all()


def test_images_that_are_all_alike_are_no_trouble():
    features, labels = 9 * torch.ones(80, 5), torch.arange(80) % 4
    distances = gaussians(looked((features, labels))).distances(torch.cat([features[:1], features[:1] + 1]))
    assert distances.isfinite().all() and distances[1] > distances[0]


def test_shrinkage_is_that_of_oas():
    from sklearn.covariance import OAS

    rows = np.random.default_rng(0).normal(size=(11, 5)) * np.array([1, 2, 3, 1, 5])
    found = OAS().fit(rows)
    ours = shrunk(torch.from_numpy(np.cov(rows.T, bias=True)), 11)
    level, plain = np.trace(np.cov(rows.T, bias=True)) / 5, np.cov(rows.T, bias=True)
    share = (plain[0, 1] - float(ours[0, 1])) / plain[0, 1]
    assert 0 < share < 1 and share == pytest.approx(found.shrinkage_, rel=0.25)  # sklearn's formula drops 2 / p
    torch.testing.assert_close(ours, torch.from_numpy((1 - share) * plain + share * level * np.eye(5)))


# ── temperature ──────────────────────────────────────────────────────────────────────────────────────


def drawn_labels(logits, temperature):
    generator = torch.Generator().manual_seed(3)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.02, 1.0, 40.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature):
    logits = 2 * temperature * torch.randn(20_000, 4)
    assert fitted_temperature(logits, drawn_labels(logits, temperature)) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_grows_with_the_logits():
    logits = torch.randn(500, 4)
    labels = drawn_labels(logits, 0.5)
    assert fitted_temperature(30 * logits, labels) == pytest.approx(30 * fitted_temperature(logits, labels), rel=1e-4)


def test_a_few_images_that_are_all_right_do_not_make_it_certain():
    logits = F.one_hot(torch.arange(4)).float()
    best = (logits / fitted_temperature(logits, torch.arange(4))).softmax(-1).max(-1).values
    assert ((best > 0.6) & (best < 0.95)).all()


@pytest.mark.parametrize("logits", [torch.zeros(3, 4), torch.zeros(1, 1)])
def test_scores_that_say_nothing_have_a_temperature_too(logits):
    found = fitted_temperature(logits, torch.zeros(len(logits), dtype=torch.int64))
    assert math.isfinite(found) and found > 0


# ── novelty ──────────────────────────────────────────────────────────────────────────────────────────


def head(features):
    """Scores of a linear classifier that knows the means."""
    return features @ MEANS.float().mT - MEANS.float().square().sum(1) / 2


def taught(held=50, seed=11):
    features, labels = cloud(held, seed=seed)
    known = gaussians(looked(cloud(100)))
    return learn_confidence(Confidence(), head(features), features, labels, known), known


def test_one_is_what_all_but_a_twentieth_of_known_images_stay_below():
    confidence, known = taught(held=500)
    features, _ = cloud(2000, seed=12)
    for values in sureness(head(features), features, known, confidence).novelty.values():
        assert float((values > 1).float().mean()) == pytest.approx(0.05, abs=0.015)
        assert float(values.median()) == pytest.approx(0.0, abs=0.1)


def test_what_lies_far_from_all_means_looks_new():
    confidence, known = taught()
    far = MEANS.float() * 0 + torch.tensor([40.0, -40, 40, -40, 40])
    assert (sureness(head(far), far, known, confidence).novelty["mahalanobis"] > 3).all()


def test_energy_is_that_of_its_paper():
    features, _ = cloud(2)
    found = raw_scores(head(features), features, Gaussians(MEANS.float(), ROOT), 3.0)["energy"]
    torch.testing.assert_close(found, -3.0 * (head(features) / 3).exp().double().sum(1).log().float())


def test_probabilities_are_those_of_the_temperature():
    confidence, known = taught()
    features, _ = cloud(3, seed=7)
    found = sureness(head(features), features, known, confidence).probabilities
    torch.testing.assert_close(found, (head(features) / confidence.temperature).softmax(-1))


def test_without_held_out_images_there_is_no_threshold_and_the_temperature_stays():
    nothing = torch.zeros(0, 4), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    confidence = learn_confidence(Confidence(), *nothing, gaussians(looked(cloud(9))))
    assert confidence.temperature == 1.0 and confidence.scale("energy") is None
    assert [known.images for known in confidence.tasks] == [0]


def test_one_class_alone_says_nothing_about_temperature_and_energy():
    features, labels = cloud(30, columns=[0])
    known = gaussians(looked((features, labels), classes=1))
    alone = learn_confidence(Confidence(), head(features)[:, :1], features, labels, known)
    assert (alone.temperature, alone.unit, alone.scale("energy")) == (1.0, 1.0, None) and alone.scale("mahalanobis")
    new, columns = cloud(10, columns=[0, 1])
    both = learn_confidence(alone, head(new)[:, :2], new, columns, gaussians(looked((new, columns), classes=2)))
    assert both.temperature == pytest.approx(both.unit) == pytest.approx(both.tasks[1].temperature)
    assert both.scale("energy")


@pytest.mark.parametrize("held", [1, 2])
def test_a_few_held_out_images_do_not_make_everything_else_endlessly_new(held):
    features, labels = cloud(held, columns=[0, 1])
    known = gaussians(looked(cloud(100)))
    confidence = learn_confidence(Confidence(), head(features)[:held], features[:held], labels[:held], known)
    said = sureness(head(cloud(20)[0]), cloud(20)[0], known, confidence)
    assert said.novelty["mahalanobis"].abs().max() < 20


def test_a_threshold_weighs_tasks_by_their_held_out_images():
    def known(images, low, high):
        return Known(images=images, quantiles={"energy": np.linspace(low, high, 101).tolist()})

    assert Confidence(tasks=[known(30, 0.0, 1.0)]).scale("energy") == pytest.approx((0.5, 0.95), abs=0.01)
    both = Confidence(tasks=[known(30, 0.0, 1.0), known(10, 2.0, 3.0), known(0, 90.0, 99.0)])
    middle, limit = both.scale("energy")
    assert middle == pytest.approx(2 / 3, abs=0.02) and limit == pytest.approx(2.8, abs=0.03)


def test_the_temperature_is_the_mean_of_the_tasks_in_proportion_to_their_held_out_images():
    tasks = [Known(images=10, temperature=2.0), Known(images=0, temperature=9.0), Known(images=30, temperature=4.0)]
    assert Confidence(tasks=tasks).temperature == pytest.approx(2 ** (10 / 40) * 4 ** (30 / 40))
    assert Confidence().temperature == 1.0


def test_energies_of_later_tasks_are_measured_as_those_of_the_first():
    confidence, known = taught()
    features, labels = cloud(9, seed=8)
    later = learn_confidence(confidence, 5 * head(features), features, labels, known)
    assert later.unit == confidence.unit != later.temperature
    energies = raw_scores(5 * head(features), features, known, confidence.unit)["energy"]
    assert later.tasks[1].quantiles["energy"][100] == pytest.approx(float(energies.max()))


def test_confidence_survives_json():
    confidence, _ = taught()
    assert Confidence.model_validate_json(confidence.model_dump_json()) == confidence


def test_confidence_without_sense_is_refused():
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        Known(images=1, temperature=0.0)


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────


def test_uncertainty_is_what_a_loop_over_draws_images_and_classes_finds():
    """S 6 draws, B 3 images, C 4 classes."""
    logits = 3 * torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))

    def entropy(parts):
        return -sum(part * math.log(part) for part in parts)

    found = uncertainty(logits)
    assert list(found) == ["entropy_of_draws", "expected_entropy", "mutual_information"]
    for image in range(3):
        draws = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits[:, image].tolist()]
        whole = entropy([sum(draw[c] for draw in draws) / 6 for c in range(4)])
        each = sum(map(entropy, draws)) / 6
        values = [float(value[image]) for value in found.values()]
        assert values == pytest.approx([whole, each, whole - each], rel=1e-6) and values[2] > 0.01
    assert {value.shape for value in found.values()} == {(3,)}


def test_draws_that_agree_have_no_mutual_information_and_classes_that_cannot_be_no_part():
    one = torch.randn(1, 3, 4)
    for said in (uncertainty(one), uncertainty(one.expand(6, -1, -1))):
        assert said["mutual_information"].tolist() == pytest.approx([0] * 3, abs=1e-12)
        assert said["mutual_information"].min() >= 0
    assert uncertainty(torch.zeros(6, 1, 4))["entropy_of_draws"].item() == pytest.approx(math.log(4))
    masked = torch.cat([torch.randn(6, 3, 4), torch.full((6, 3, 2), -torch.inf)], -1)
    for name, value in uncertainty(masked).items():
        torch.testing.assert_close(value, uncertainty(masked[..., :4])[name])
