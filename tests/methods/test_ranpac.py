"""RanPAC: F 24 features, lifted to 40; 27 training and 11 test images a task, 3 classes a task."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from lamina.data.stream import Stream, Task
from lamina.errors import ConfigError
from lamina.methods.ranpac import RanPAC
from tests.streams import blobs, trainer_of

SMALL = RanPAC(width=40)


@pytest.fixture
def stream():
    return blobs(tasks=3, per_task=3)


def run(settings, tower, stream, **arguments):
    trainer = trainer_of(settings, tower, **arguments)
    trainer.run(stream)
    return trainer


def frozen(tower, split):
    """Frozen features (n, F) of a split, computed by hand."""
    pixels = torch.stack([split.images.image(int(index)) for index in split.indices]) / 255
    with torch.no_grad():
        return tower((pixels - 0.5) / 0.25).features


def test_nothing_is_trained(tiny_vit, stream):
    trainer = run(SMALL, tiny_vit, stream)
    assert not any(parameter.requires_grad for parameter in trainer.learner.model.parameters())
    assert trainer.seconds["train"] == [0.0, 0.0, 0.0]
    assert trainer.learner.cache == "features" and trainer.learner.model.prompts is None


def test_predictions_are_those_of_a_ridge_regression_on_lifted_features(tiny_vit, stream):
    """Equation 6, by scikit-learn, on all images at once."""
    trainer = run(RanPAC(width=40, ridge=0.5), tiny_vit, stream)
    projection = trainer.learner.model.head.projection
    assert projection.shape == (24, 40)
    lifted = np.concatenate([(frozen(tiny_vit, t.train) @ projection).relu().numpy() for t in stream]).astype(float)
    columns = np.concatenate([task.train.columns for task in stream])
    theirs = Ridge(alpha=0.5, fit_intercept=False).fit(lifted, np.eye(9)[columns])
    for index, task in enumerate(stream):
        features = frozen(tiny_vit, task.test)
        expected = theirs.predict((features @ projection).relu().double().numpy())
        with torch.no_grad():
            logits = trainer.learner.model.head(features).logits
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-3, atol=1e-3)
        right = (expected.argmax(1) == task.test.columns).mean()
        assert trainer.matrix[-1][index] == pytest.approx(right)


def test_no_order_of_tasks_is_better_than_another(tiny_vit, stream):
    """Tasks come in another order, so their columns do, too."""
    probe = frozen(tiny_vit, stream.tasks[1].test)
    expected = None
    for order in permutations(range(3)):
        tasks, met = [], []
        for place, old in enumerate(order):
            task = stream.tasks[old]
            met += list(task.columns)
            moved = {column: met.index(column) for column in task.columns}
            parts = [
                type(split)(split.images, split.indices, np.array([moved[c] for c in split.columns.tolist()]))
                for split in (task.train, task.test)
            ]
            tasks.append(Task(place, task.classes, sorted(moved.values()), *parts))
        trainer = run(SMALL, tiny_vit, Stream("other", tasks, 0, f"other {order}"))
        with torch.no_grad():
            logits = trainer.learner.model.head(probe).logits[:, np.argsort(met)]
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_projection_is_that_of_the_seed_and_stays_the_same_for_all_tasks(tiny_vit, stream):
    heads = [trainer_of(SMALL, tiny_vit, seed=seed) for seed in (0, 0, 1)]
    ours, same, other = (trainer.learner.model.head.projection.clone() for trainer in heads)
    assert torch.equal(ours, same) and not torch.isclose(ours, other).any()
    heads[0].run(stream)
    assert torch.equal(heads[0].learner.model.head.projection, ours)


def test_without_a_projection_it_is_a_ridge_regression_on_the_features_themselves(tiny_vit, stream):
    trainer = run(RanPAC(width=0), tiny_vit, stream)
    rows = torch.cat([frozen(tiny_vit, task.train) for task in stream]).double()
    head = trainer.learner.model.head
    assert head.projection is None
    torch.testing.assert_close(head.seen.moment, rows.mT @ rows, rtol=1e-5, atol=1e-5)


def test_defaults_and_limits():
    assert RanPAC().ridge is None and RanPAC().width == 2000
    with pytest.raises(ConfigError) as error:
        RanPAC(ridge=0.0)
    assert str(error.value) == "RanPAC.ridge must be above 0.0; got 0.0"
    with pytest.raises(ConfigError) as error:
        RanPAC(width=-1)
    assert str(error.value) == "RanPAC.width must be at least 0; got -1"
