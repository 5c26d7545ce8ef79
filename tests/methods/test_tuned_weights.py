"""The shared plan of training as the methods have it that tune weights: rates, optimizers, decay, published numbers."""

import json

import pytest
import torch

from lamina.methods.adapter import Adapter
from lamina.methods.bi_adaptformer import BiAdaptFormer
from lamina.methods.bitfit import BitFit
from lamina.methods.full import Full
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.tuned import Tuned
from lamina.training.trainer import Stopped
from tests.streams import blobs, trainer_of

LEGACY = {0: 0.0, 1: 0.1, 9: 0.9, 10: 1.0, 55: 0.5, 99: 0.0003046}
STEPS = 7  # of one of 100 passes


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_every_step_of_a_pass_has_the_released_rate_of_that_pass(step):
    schedule = BiAdaptFormer(legacy_warmup=True).schedule()
    found = {epoch: schedule((epoch * STEPS + step) / (100 * STEPS)) for epoch in LEGACY}
    assert found == pytest.approx(LEGACY, abs=1e-7)


@pytest.mark.parametrize(
    "kind, base", [(Tuned, 1.0), (Adapter, 0.001), (BitFit, 0.001), (Full, 0.0001), (BiAdaptFormer, 0.004)]
)
def test_a_rate_is_the_one_that_is_used_and_the_default_is_a_published_one_for_256_images(kind, base):
    """VPT multiplies its base rates by batch_size / 256; Bi-AdaptFormer states the rate for its 64 images."""
    settings = kind()
    assert settings.lr == pytest.approx(base * settings.batch_size / 256)
    for size in (8, 256):
        (group,) = kind(batch_size=size, lr=0.3).phase().optimizer([torch.nn.Parameter(torch.zeros(2, 3))]).param_groups
        assert group["lr"] == 0.3


@pytest.mark.parametrize(
    "kind, pinned",
    [
        (Adapter, ("adamw", 100, 0.05, 384, 0.01)),
        (BitFit, ("adamw", 100, 0.05, 384, 0.01)),
        (Full, ("adamw", 100, 0.05, 384, 0.01)),
        (BiAdaptFormer, ("adamw", 100, 0.1, 64, 0.0001)),
        (LinearProbe, ("adam", 50, 0.0, 256, 0.0)),
    ],
)
def test_published_settings_are_pinned(kind, pinned):
    made = kind()
    assert (made.optimizer, made.epochs, made.warm_up, made.batch_size, made.weight_decay) == pinned


def test_the_settings_of_the_adapters_are_pinned():
    assert (Adapter().reduction, Adapter().hidden) == (8, None)
    assert (BiAdaptFormer().hidden, BiAdaptFormer().bits, BiAdaptFormer().dropout) == (32, 1, 0.1)


# ── optimizers ─────────────────────────────────────────────────────────────────────────────────────


def built(settings, tower):
    """Return a model that has met a task, and the optimizer of its first phase."""
    trainer = trainer_of(settings, tower)
    trainer._begin([blobs().tasks[0]])
    model = trainer.learner.model
    return model, settings.phase().optimizer([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("method", [Adapter, BitFit, Full, BiAdaptFormer, LinearProbe])
def test_the_optimizer_asked_for_is_built_whatever_the_decay_and_wears_down_matrices_alone(
    method, name, kind, decay, tiny_vit
):
    model, optimizer = built(method(optimizer=name, weight_decay=decay), tiny_vit)
    assert type(optimizer) is kind
    rates = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    asked = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(asked) == len(rates)
    block = model.head.blocks[0]
    assert (rates[id(block.weight)], rates[id(block.bias)]) == (decay, 0.0)
    assert all(rates[id(p)] == (decay if p.ndim > 1 else 0.0) for p in asked)


def test_sgd_adds_decay_to_the_gradient_and_adamw_does_not():
    for name, expected in (("sgd", 1.0 - 0.1 * (0.5 + 0.2)), ("adamw", 1.0 * (1 - 0.1 * 0.2) - 0.1)):
        weight = torch.nn.Parameter(torch.ones(2, 3))
        optimizer = Tuned(optimizer=name, lr=0.1, weight_decay=0.2).phase().optimizer([weight])
        weight.grad = torch.full((2, 3), 0.5)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 3), expected), rtol=0, atol=1e-6)
    (group,) = Tuned(optimizer="adamw").phase().optimizer([weight]).param_groups
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-6)


def test_the_linear_probe_has_adam_for_all_unless_it_is_told_otherwise(tiny_vit):
    _, optimizer = built(LinearProbe(weight_decay=0.01), tiny_vit)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam and len(group["params"]) == 2 and group["weight_decay"] == 0.01


# ── runs ───────────────────────────────────────────────────────────────────────────────────────────


def rates_of(folder):
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_first_pass_of_the_released_schedule_changes_nothing_and_ours_does(tiny_vit, tmp_path):
    task = blobs(train=27).tasks[0]
    for legacy in (True, False):
        folder = tmp_path / str(legacy)
        folder.mkdir()
        settings = Adapter(epochs=10, warm_up=0.2, batch_size=9, lr=0.5, optimizer="sgd", legacy_warmup=legacy)
        trainer = trainer_of(settings, tiny_vit, run_dir=folder)
        trainer._begin([task])
        start = {name: value.clone() for name, value in trainer.learner.model.learned().items()}
        trainer.should_stop = lambda trainer=trainer: trainer.position.step == 3
        with pytest.raises(Stopped):
            trainer.learn(task)
        same = [torch.equal(value, trainer.learner.model.learned()[name]) for name, value in start.items()]
        assert all(same) if legacy else not any(same)
        assert rates_of(folder) == pytest.approx([0.0] * 3 if legacy else [0.05, 0.125, 0.2])
