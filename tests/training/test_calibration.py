"""Confidence against accuracy while a run is evaluated, and accuracy on tasks to come by the names of their classes."""

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from lamina.methods.coop import CoOp
from lamina.methods.nearest_mean import NearestMean
from lamina.methods.vpt_deep import VPTDeep
from lamina.methods.zero_shot import ZeroShot
from lamina.model import Batch, Output
from lamina.training.calibration import Calibration, calibration_error
from tests.backbones.clips import tiny_clip
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of


def alone(table):
    """The sum over one process."""
    return table


def drawn(count=53, classes=7):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_error_is_that_of_torchmetrics_however_images_are_batched(temperature):
    logits, labels = drawn()
    wanted = multiclass_calibration_error((logits / temperature).softmax(-1), labels, 7, n_bins=15)
    for size in (53, 9):
        found = Calibration(temperature)
        for part in torch.arange(53).split(size):
            found.see(0, Batch(None, labels[part]), Output(logits[part], {}))
        assert found.error(alone) == pytest.approx(float(wanted), abs=1e-6)


def test_draws_of_a_head_are_averaged_first():
    logits, labels = drawn()
    one, draws = Calibration(), Calibration()
    one.see(0, Batch(None, labels), Output(logits, {}))
    noise = torch.randn(2, 53, 7)
    draws.see(0, Batch(None, labels), Output(torch.stack([logits + noise[0], logits - noise[0]]), {}))
    assert draws.error(alone) == pytest.approx(one.error(alone), abs=1e-6)


def test_bins_of_all_processes_are_summed_before_distances_are_taken():
    """In one bin: 2 sure and wrong here, 2 as sure and right there."""
    here, there = Calibration(), Calibration()
    logits = torch.tensor([[3.0, 0.0]] * 2)
    here.see(0, Batch(None, torch.tensor([1, 1])), Output(logits, {}))
    there.see(0, Batch(None, torch.tensor([0, 0])), Output(logits, {}))
    sure = float(torch.tensor([3.0, 0.0]).softmax(-1)[0])
    assert here.error(lambda table: table + there._bins) == pytest.approx(abs(sure - 0.5), abs=1e-6)


def test_a_perfectly_calibrated_bin_has_no_error_and_an_empty_table_has_none():
    assert calibration_error(torch.tensor([[10.0, 7.0, 7.0]])) == 0 and calibration_error(torch.zeros(15, 3)) == 0


def test_every_row_of_the_matrix_has_an_error_over_all_tasks_met():
    trainer = trainer_of(VPTDeep(length=2, epochs=1, batch_size=9, temperature=3.0), make_tiny_vit())
    stream = blobs(2)
    trainer.run(stream)
    assert len(trainer.calibration) == 2
    batches = [batch for task in stream for batch in trainer.feed.plain(task.test)]
    with torch.no_grad():
        logits = torch.cat([trainer.learner.model.eval()(batch._replace(labels=None)).logits for batch in batches])
    labels = torch.cat([batch.targets for batch in batches])
    wanted = multiclass_calibration_error((logits / 3).softmax(-1), labels, 6, n_bins=15)
    assert trainer.calibration[1] == pytest.approx(float(wanted), abs=1e-6)


# ── tasks to come ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [ZeroShot(), CoOp(length=3, epochs=1, batch_size=9)])
def test_tasks_to_come_are_told_apart_by_the_names_of_their_classes(settings):
    trainer, stream = trainer_of(settings, tiny_clip()), blobs(3, per_task=2)
    trainer.run(stream)
    assert [len(row) for row in trainer.future] == [2, 1]
    assert trainer.learner.model.head.texts.classes == [f"class {i}" for i in range(6)]


def test_for_a_model_that_learns_nothing_they_are_what_the_task_aware_matrix_says_later():
    trainer = trainer_of(ZeroShot(), tiny_clip())
    trainer.run(blobs(3, per_task=2))
    final = trainer.matrix_task_aware[-1]
    assert trainer.future == [final[1:], final[2:]]


def test_a_head_that_needs_images_foresees_nothing():
    trainer = trainer_of(NearestMean(), make_tiny_vit())
    trainer.run(blobs(2))
    assert trainer.future == [] and len(trainer.calibration) == 2


def test_what_was_foreseen_survives_a_restart(tmp_path):
    stream = blobs(3, per_task=2)
    trainer = trainer_of(ZeroShot(), tiny_clip(), run_dir=tmp_path)
    trainer.run(stream)
    again = trainer_of(ZeroShot(), tiny_clip(), run_dir=tmp_path)
    assert again.restore(stream)
    assert (again.future, again.calibration) == (trainer.future, trainer.calibration)
