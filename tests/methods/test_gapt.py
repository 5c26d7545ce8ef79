"""How many numbers GaPT and those that it is compared with learn, with a classifier. L 12, D 768, C 100."""

import pytest
import torch

from lamina.backbones import timm_vit
from lamina.backbones.timm_vit import TimmTower
from lamina.data.stream import Task
from lamina.registry import method_class

HEAD = 768 * 100 + 100
LSTM = 8 * 768**2 + 8 * 768


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        ("linear-probe", {}, HEAD),
        ("vpt-shallow", {"length": 10}, 10 * 768 + HEAD),
        ("vpt-shallow", {"length": 100}, 100 * 768 + HEAD),
        ("vpt-deep", {"length": 10}, 12 * 10 * 768 + HEAD),
        ("vpt-deep", {"length": 50}, 12 * 50 * 768 + HEAD),
        ("gapt", {"length": 100}, 100 * 768 + 2 * 12 - 1 + HEAD),
        ("lspt", {"length": 10}, 12 * 10 * 768 + LSTM + HEAD),
        ("lspt", {"length": 10, "hears": False}, 12 * 10 * 768 + LSTM + HEAD),
        ("lspt", {"length": 10, "carry": "gru"}, 12 * 10 * 768 + 6 * 768**2 + 6 * 768 + HEAD),
        ("lspt", {"length": 10, "carriers": 2}, 12 * 10 * 768 + 2 * LSTM + HEAD),
        ("lspt", {"length": 10, "carry": "none"}, 12 * 10 * 768 + HEAD),
        ("adapter", {"reduction": 8}, 12 * 148_320 + HEAD),
        ("adapter", {"hidden": 256}, 4_730_880 + HEAD),
    ],
    ids=str,
)
def test_on_a_vit_b_a_method_learns_as_many_numbers_as_its_paper_counts(method, settings, count, monkeypatch):
    monkeypatch.setattr(timm_vit, "fingerprint", lambda model: "")  # it reads weights, and these have no numbers
    with torch.device("meta"):
        tower = TimmTower.create("vit_base_patch16_224")
        model = method_class(method)(**settings).build(tower).model
        model.begin_task(Task(0, ["a class"] * 100, range(100), None, None))
    assert sum(value.numel() for value in tower.parameters()) == 85_798_656
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == count
    assert model.trainable_parameters == count
