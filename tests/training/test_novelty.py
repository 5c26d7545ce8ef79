"""New images against known ones: 3 tasks of 2 classes, with 11, 7 and 5 test images told apart by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from lamina.data.loader import Share
from lamina.errors import ConfigError
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.nearest_mean import NearestMean
from lamina.model import Output
from lamina.results.records import Record
from lamina.results.report import report
from lamina.runs import execute, plan
from lamina.training.calibration import Calibration, calibration_error
from lamina.training.novelty import SCORES, Detection, detected
from tests.commands import BACKBONE
from tests.streams import blobs, trainer_of


def tasks():
    return [replace(t, test=t.test.take(np.arange(n))) for t, n in zip(blobs(3, 2).tasks, (11, 7, 5), strict=True)]


def logits(count, seed=0, classes=6):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_their_definitions():
    rows = logits(9).double()
    shares = rows.softmax(1)
    wanted = {
        "energy": rows.exp().sum(1).log(),
        "confidence": shares.max(1).values,
        "entropy": (shares * shares.log()).sum(1),
    }
    assert list(SCORES) == list(wanted)
    for name, score in SCORES.items():
        torch.testing.assert_close(score(rows), wanted[name])


def test_areas_and_rates_are_those_that_others_measure():
    known, new = torch.randn(83, 3).double() + 1, torch.randn(47, 3).double()
    new[::4] = known[:12]  # ties
    truth = np.r_[np.ones(83), np.zeros(47)]
    for place, said in enumerate(detected(known, new).values()):
        both = torch.cat([known, new])[:, place].numpy()
        assert said["auroc"] == pytest.approx(roc_auc_score(truth, both), abs=1e-6)
        assert said["aupr"] == pytest.approx(average_precision_score(truth, both), abs=1e-6)
        limit = sorted(known[:, place].tolist())[83 - 79]  # 79 of 83 are the first 95 %
        assert said["fpr95"] == pytest.approx((new[:, place] >= limit).double().mean().item())


def test_scores_that_part_all_images_are_perfect_and_equal_ones_a_guess():
    high, low, same = torch.full((40, 3), 9.0), torch.zeros(25, 3), torch.full((25, 3), 9.0)
    assert detected(high.double(), low.double())["energy"] == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    said = detected(high.double(), same.double())["energy"]
    assert said == {"auroc": 0.5, "aupr": pytest.approx(40 / 65), "fpr95": 1.0}


def test_large_energies_are_not_squeezed_together():
    known, new = torch.arange(500.0, 560)[:, None].expand(-1, 3), torch.arange(440.0, 500)[:, None].expand(-1, 3)
    assert detected(known.double(), new.double())["energy"]["auroc"] == 1.0


def test_processes_together_have_the_scores_of_one():
    found, whole = [], Detection(tasks(), 2.0, Share())
    parts = [Detection(tasks(), 2.0, Share(rank, 3)) for rank in range(3)]
    for place, count in enumerate((11, 7, 5)):
        rows = logits(count, place)
        for detection in (whole, *parts):
            mine = rows[detection.share.rank :: detection.share.world]
            for batch in mine.split(2):
                detection.see(place, None, Output(batch, {}))
    for part in parts:
        found.append(part.scores(lambda value: value))
    torch.testing.assert_close(sum(found), whole.scores(lambda value: value))
    energies = torch.cat([(logits(n, i).double() / 2).logsumexp(1) for i, n in enumerate((11, 7, 5))])
    torch.testing.assert_close(sum(found)[:, 0], energies)


def test_a_run_measures_after_each_task_but_the_last_what_its_head_says_of_tasks_to_come(tiny_vit):
    stream = blobs(tasks=3, per_task=2)
    trainer = trainer_of(NearestMean(), tiny_vit, novelty=True)
    trainer.run(stream)
    assert len(trainer.detection) == 2 and list(trainer.detection[0]) == list(SCORES)
    plain = trainer_of(NearestMean(), tiny_vit)
    plain.run(stream)
    assert plain.detection == [] and plain.matrix == trainer.matrix
    again = trainer_of(NearestMean(), tiny_vit)
    for stage, task in enumerate(stream.tasks[:2]):
        again.learn(task)
        model, seen = again.learner.model.eval(), []
        for other in stream.tasks:
            with torch.no_grad():
                said = [model(b._replace(labels=None)).logits.double() for b in again.feed.plain(other.test)]
            seen.append(torch.cat([torch.stack([s(rows) for s in SCORES.values()], 1) for rows in said]))
        expected = detected(torch.cat(seen[: stage + 1]), torch.cat(seen[stage + 1 :]))
        assert trainer.detection[stage] == expected
        again.matrix.append([0.0] * (stage + 1))


def test_a_run_that_was_stopped_keeps_what_it_measured(tiny_vit, tmp_path):
    stream, settings = blobs(tasks=3, per_task=2), LinearProbe(epochs=1, batch_size=7)
    whole = trainer_of(settings, tiny_vit, novelty=True)
    whole.run(stream)
    first = trainer_of(settings, tiny_vit, novelty=True, run_dir=tmp_path)
    first.should_stop = lambda: first.position.task == 1
    with pytest.raises(Exception, match="^$"):
        first.run(stream)
    second = trainer_of(settings, tiny_vit, novelty=True, run_dir=tmp_path)
    assert second.restore(stream) and len(second.detection) == 1
    second.run(stream)
    assert (second.detection, second.reliability) == (whole.detection, whole.reliability)
    assert second.batch_calibration == whole.batch_calibration


# ── calibration by bins and by batches ─────────────────────────────────────────────────────────────────


def test_the_mean_over_batches_of_a_perfect_predictor_is_not_zero_where_that_over_all_images_is():
    """For single batches of 32, confidence and accuracy of a bin differ by chance (specs, P13)."""
    generator = torch.Generator().manual_seed(0)
    whole = Calibration()
    for _ in range(400):
        rows = 1.5 * torch.randn(32, 4, generator=generator)
        labels = torch.multinomial(rows.softmax(1), 1, generator=generator)[:, 0]
        whole.see(0, type("B", (), {"targets": labels}), Output(rows, {}))
    assert whole.error(lambda value: value) < 0.02 < 0.1 < whole.batch_mean(lambda value: value)


def test_bins_hold_images_confidences_and_right_answers_of_all_batches():
    calibration, errors = Calibration(), []
    for seed, count in enumerate((8, 5)):
        rows, labels = logits(count, seed).double(), torch.arange(count) % 6
        alone = Calibration()
        for each in (calibration, alone):
            each.see(0, type("B", (), {"targets": labels}), Output(rows, {}))
        errors.append(calibration_error(alone.bins(lambda value: value)))
    images, confidence, right = calibration.bins(lambda value: value).sum(0).tolist()
    both = [(logits(n, s).double().softmax(1), torch.arange(n) % 6) for s, n in enumerate((8, 5))]
    assert images == 13 and right == sum(int((p.argmax(1) == y).sum()) for p, y in both)
    assert confidence == pytest.approx(sum(float(p.max(1).values.sum()) for p, _ in both))
    assert calibration.batch_mean(lambda value: value) == pytest.approx(sum(errors) / 2)


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────


def test_a_record_has_the_means_over_stages_and_its_page_shows_them(tmp_path):
    small = {"stream": {"per_class": 3, "test_per_class": 2}, "backbone": BACKBONE, "precision": "32"}
    run, _ = plan("nearest-mean", "digits", recipe=False, overrides={**small, "measure_novelty": True})
    record = execute(run, tmp_path / "a")
    assert record == Record.from_dict(json.loads((tmp_path / "a" / "results.json").read_text()))
    for name in ("auroc", "aupr", "fpr95"):
        values = [stage["energy"][name] for stage in record.detection]
        assert len(values) == 4 and record.metrics[f"novel_{name}"] == pytest.approx(np.mean(values))
    assert sum(row[0] for row in record.reliability) == 20
    page = report([record])
    assert "Images of classes to come" in page and "Is it as sure as it is right?" in page
    plain, _ = plan("nearest-mean", "digits", recipe=False, overrides=small)
    assert "Images of classes to come" not in report([execute(plain, tmp_path / "b")])


def test_a_budget_ends_a_phase_and_its_schedule_and_the_record_says_so(tmp_path):
    small = {"stream": {"per_class": 4, "test_per_class": 1, "tasks": 2}, "backbone": BACKBONE, "precision": "32"}
    asked = {**small, "epochs": 3, "batch_size": 7, "most_steps": 5}
    run, _ = plan("linear-probe", "digits", recipe=False, overrides=asked)
    assert execute(run, tmp_path / "a").protocol["most_steps"] == 5
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "position" in line]
    assert [line["position"] for line in steps] == [[t, 0, s] for t in range(2) for s in range(1, 6)]
    with pytest.raises(ConfigError, match="most_steps must be at least 1; got 0"):
        plan("linear-probe", "digits", recipe=False, overrides={**asked, "most_steps": 0})
    free, _ = plan("linear-probe", "digits", recipe=False, overrides={**asked, "most_steps": 99})
    assert execute(free, tmp_path / "b").protocol["most_steps"] == 99
    assert len((tmp_path / "b" / "log.jsonl").read_text().splitlines()) > len(lines)
