"""Inside `only`, some parameters and no others ask for a gradient; afterwards all is as before."""

import pytest
from torch import nn

from lamina.training.gradients import only


@pytest.fixture
def model():
    """Three layers: the first frozen, the others not."""
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    layers[0].requires_grad_(False)
    return layers


def asking(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_only_the_named_ones_ask_whether_they_did_before_or_not(model):
    with only([model[0].weight, model[2].bias], model):
        assert asking(model) == ["0.weight", "2.bias"]


@pytest.mark.parametrize("failing", [False, True])
def test_afterwards_those_ask_that_asked_before_even_when_it_went_wrong(model, failing):
    before = asking(model)
    try:
        with only([model[0].weight, model[2].bias], model):
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert asking(model) == before == ["1.weight", "1.bias", "2.weight", "2.bias"]
