"""LSPT as a method: its variants learn, two rates, one or several tasks. 27 images and 3 classes a task, M 4, D 24."""

import pytest
import torch

from lamina.methods.lspt import LSPT
from lamina.prompts.long_term import LongTermPrompts
from lamina.prompts.recurrent import GRU, LSTM, TransformerLayer
from tests.methods.states import kept, moved
from tests.streams import blobs, trainer_of

SMALL = {"length": 4, "epochs": 2, "batch_size": 9}
VARIANTS = [
    {},
    {"carriers": 2},
    {"shared": False},
    {"carry": "gru"},
    {"carry": "transformer"},
    {"spatial": "kmeans"},
    {"spatial": "none"},
    {"carry": "none"},
    {"carry": "none", "spatial": "kmeans"},
    {"carry": "none", "spatial": "none"},
    {"hidden_norm": True, "tie_first": True, "learn_cell": True, "forget_bias": 1.0},
    {"optimizer": "adamw", "recurrent_rate": 1.0, "lr": 0.001},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_trains_all_that_it_has_and_stays_finite(options, tiny_vit):
    trainer = trainer_of(LSPT(**SMALL, **options), tiny_vit)
    trainer.learner.model.begin_task(blobs(tasks=1).tasks[0])
    before = kept(trainer)
    trainer = trainer_of(LSPT(**SMALL, **options), tiny_vit)
    trainer.learn(blobs(tasks=1).tasks[0])
    after = kept(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert {name for name in after if name.startswith("prompts")} <= moved(before, after)


def test_settings_reach_the_prompts(tiny_vit):
    def built(**options):
        return LSPT(**SMALL, **options).build(tiny_vit).model.prompts

    prompts = built(carriers=2, forget_bias=1.0, learn_cell=True, dropout=0.3, dropout_mode="shared")
    (lstm,) = prompts.carriers
    assert type(prompts) is LongTermPrompts and type(lstm) is LSTM and lstm.cells == 2
    assert prompts.first_cells.shape == (2, 4, 24) and (prompts.dropout, prompts.dropout_mode) == (0.3, "shared")
    assert torch.equal((lstm.steps[1].bias_ih + lstm.steps[1].bias_hh)[24:48], torch.ones(24))
    assert prompts.value(2).abs().max() <= (6 / (192 + 24)) ** 0.5
    assert [len(built(shared=False).carriers), len(built(carry="none").carriers)] == [2, 0]
    kinds = {"gru": GRU, "transformer": TransformerLayer}
    assert all(type(built(carry=name).carriers[0]) is kind for name, kind in kinds.items())
    assert list(built(tie_first=True).layers) == [1, 2] and built(hidden_norm=True).hidden_norm
    assert built(spatial="kmeans").spatial == "kmeans"


def test_defaults_follow_the_baselines_of_the_paper():
    settings = LSPT()
    assert (settings.length, settings.carry, settings.carriers, settings.shared) == (10, "lstm", 1, True)
    assert (settings.spatial, settings.dropout, settings.forget_bias) == ("mean", 0.1, None)
    assert (settings.epochs, settings.warm_up, settings.batch_size, settings.optimizer) == (100, 0.1, 64, "sgd")
    assert (settings.recurrent_rate, settings.clip_norm, settings.freeze_after_first) == (0.1, 1.0, False)


def test_what_carries_has_a_rate_of_its_own_and_gradients_are_clipped(tiny_vit):
    learner, task = LSPT(**SMALL, lr=0.5, learn_cell=True).build(tiny_vit), blobs(tasks=1).tasks[0]
    learner.model.begin_task(task)
    (phase,) = learner.phases(task)
    assert phase.clip_norm == 1.0
    names = {id(value): name for name, value in learner.model.named_parameters()}
    optimizer = phase.optimizer([value for value in learner.model.parameters() if value.requires_grad])
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.05} == {n for n in rates if "carriers" in n}
    assert {rate for name, rate in rates.items() if "carriers" not in name} == {0.5} and len(rates) == 4 + 4 + 2


def test_prompts_learn_on_every_task_unless_they_are_frozen_after_the_first(tiny_vit):
    for freeze in (False, True):
        trainer, stream = trainer_of(LSPT(**SMALL, freeze_after_first=freeze), tiny_vit), blobs()
        trainer.learn(stream.tasks[0])
        before = kept(trainer)
        trainer.learn(stream.tasks[1])
        names = {name for name in before if name.startswith("prompts")}
        assert moved(before, kept(trainer)) & names == (set() if freeze else names)
        assert len(trainer.learner.model.head.blocks) == 2


def test_frozen_prompts_are_not_dropped_in_training_either(tiny_vit):
    prompts = LSPT(**SMALL, dropout=0.5, freeze_after_first=True).build(tiny_vit).model.prompts.train()
    images = torch.randn(5, 3, 32, 32)
    twice = [tiny_vit(images, prompts.start()).features for _ in range(2)]
    assert not torch.equal(*twice)
    prompts.begin_task(1)
    twice = [tiny_vit(images, prompts.start()).features for _ in range(2)]
    assert torch.equal(*twice)


def test_settings_that_change_nothing_are_named():
    assert LSPT().idle() == {}
    assert set(LSPT(carry="gru").idle()) == {"carriers", "forget_bias", "learn_cell"}
    none = {"carriers", "forget_bias", "learn_cell", "shared", "recurrent_rate", "hidden_norm", "dropout_mode"}
    assert set(LSPT(carry="none", dropout=0.0).idle()) == none
