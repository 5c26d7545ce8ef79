"""Domain-incremental, blurry, online, task-incremental: each is a property of stream or protocol, never of a method.

Digits in 3 domains of 10 classes, 3 training and 2 test images each; or blobs of 27 images in batches of 5.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from lamina.data.streams import StreamSettings, build_stream
from lamina.errors import ConfigError, DataError, ResumeError
from lamina.heads.linear import LinearHead
from lamina.heads.refined import RefinedHead
from lamina.learner import Learner, Phase
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import PromptedModel
from lamina.registry import method_class
from lamina.results.records import Record
from lamina.results.tables import headline
from lamina.runs import execute, plan
from lamina.training.feed import Feed
from lamina.training.trainer import Trainer
from tests.commands import called
from tests.streams import SPEC, blobs, trainer_of

PASS = 6  # steps of a pass through 27 images in batches of 5

METHODS = {
    "nearest-mean": {},
    "strata": {},
    "ranpac": {"width": 50},
    "linear-probe": {"epochs": 1, "batch_size": 16},
    "vpt-deep": {"epochs": 1, "batch_size": 16, "length": 3},
    "vpt-nsp2": {"epochs": 1, "batch_size": 16, "length": 3},
    "joint": {"epochs": 1, "batch_size": 16, "length": 3},
}


def small(name="digits-domains", **values):
    limits = {"per_class": 3, "test_per_class": 2}
    if name == "digits-domains":
        limits["domains"] = ["plain", "noisy", "rotated"]
    return build_stream(StreamSettings(**{"name": name, **limits, **values}))


def steps(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def learned(trainer):
    return {name: value.clone() for name, value in trainer.learner.model.learned().items()}


# ── classes that come again ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stream", [small, partial(small, "digits", tasks=3, blurry=0.5)], ids=["domains", "blurry"])
def test_a_method_learns_classes_that_come_again_in_the_columns_they_have(tiny_vit, name, stream):
    tasks = stream()
    trainer = trainer_of(method_class(name)(**METHODS[name]), tiny_vit)
    trainer.run(tasks)
    rows = [3] if name == "joint" else [1, 2, 3]
    assert [len(row) for row in trainer.matrix] == [len(row) for row in trainer.matrix_task_aware] == rows
    model = trainer.learner.model.eval()
    features = torch.randn(4, model.width)
    assert model.head(features).logits.shape == (4, 10)
    assert all(torch.isfinite(value).all() for value in model.learned().values())


@pytest.mark.parametrize("name", ["nearest-mean", "strata", "ranpac"])
@pytest.mark.parametrize("stream", [small, partial(small, "digits", tasks=3, blurry=0.5)], ids=["domains", "blurry"])
def test_class_statistics_of_tasks_with_the_same_classes_are_those_of_all_images_at_once(tiny_vit, name, stream):
    tasks = stream()
    one_by_one, at_once = (trainer_of(method_class(name)(**METHODS[name]), tiny_vit) for _ in range(2))
    one_by_one.run(tasks)
    at_once.learn(tasks.merged())
    for key, value in learned(at_once).items():
        assert torch.allclose(learned(one_by_one)[key], value, rtol=1e-9), key


def test_a_task_of_the_same_classes_begins_with_the_scores_of_the_last_and_trains_alone():
    head = LinearHead(7)
    features = torch.randn(5, 7)
    for index, columns in enumerate([[0, 1, 2], [0, 1, 2], [0, 2, 3]]):
        before = head(features).logits.detach().clone() if index else None
        head.begin_task(index, [f"class {column}" for column in columns], columns)
        if before is not None:
            assert torch.equal(head(features).logits[:, :3], before)
        trained = [part for part in head.parameters() if part.requires_grad]
        assert [part.shape[0] for part in trained] == [3, 3]
        fresh = head(features).logits.detach().clone()
        with torch.no_grad():
            trained[0].add_(torch.randn_like(trained[0]))
        moved = (head(features).logits != fresh).all(0)
        assert moved.nonzero().flatten().tolist() == columns  # what is trained is what is read
    assert head(features).logits.shape == (5, 4)


def test_forgetting_of_a_domain_is_what_its_own_test_images_lost(tiny_vit):
    """Entry [t][i] is the accuracy on the test images of domain i, counted here by hand after the last domain."""
    stream = small()
    trainer = trainer_of(method_class("nearest-mean")(), tiny_vit)
    trainer.run(stream)
    model = trainer.learner.model
    for place, task in enumerate(stream):
        right = [model(batch._replace(labels=None)).logits.argmax(-1) == batch.targets
                 for batch in trainer.feed.plain(task.test)]  # fmt: skip
        assert trainer.matrix[-1][place] == pytest.approx(torch.cat(right).double().mean().item())
    assert len(set(trainer.matrix[-1])) > 1


# ── the task is given ────────────────────────────────────────────────────────────────────────────────


def test_a_given_task_leaves_the_classes_at_home_in_it_to_choose_from(tiny_vit):
    """In a blurry stream a task trains on more classes than it is tested on."""
    stream = small("digits", tasks=5, blurry=0.5, test_per_class=9)
    trainer = trainer_of(method_class("nearest-mean")(), tiny_vit)
    trainer.run(stream)
    model = trainer.learner.model
    found = {"at home": [], "in the task": []}
    for task in stream:
        assert len(task.tested) == 2 < len(task.columns)
        for name, columns in (("at home", task.tested), ("in the task", task.columns)):
            right = []
            for batch in trainer.feed.plain(task.test):
                logits = model(batch._replace(labels=None)).logits[:, columns]
                right.append(torch.tensor(columns)[logits.argmax(-1)] == batch.targets)
            found[name].append(torch.cat(right).double().mean().item())
    assert trainer.matrix_task_aware[-1] == pytest.approx(found["at home"])
    assert trainer.matrix_task_aware[-1] != pytest.approx(found["in the task"])


def test_a_given_domain_leaves_all_classes_to_choose_from(tiny_vit):
    trainer = trainer_of(method_class("nearest-mean")(), tiny_vit)
    trainer.run(small())
    assert trainer.matrix_task_aware == trainer.matrix


@pytest.fixture
def finished(tmp_path):
    """A run over two domains."""
    overrides = {"stream": {"per_class": 2, "test_per_class": 1, "domains": ["coarse", "plain"]}}
    return execute(plan("nearest-mean", "digits-domains", overrides=overrides)[0], tmp_path / "run", command="words")


def test_a_table_has_the_columns_that_are_asked_for(finished):
    (row,) = headline([finished], ["accuracy_task_aware", "accuracy"])
    assert list(row) == ["method", "task-aware accuracy (%)", "accuracy (%)", "n"]
    assert row["task-aware accuracy (%)"] == f"{100 * finished.metrics['accuracy_task_aware']:.1f}"
    with pytest.raises(ConfigError, match="no metric is called 'acuracy'; did you mean 'accuracy'"):
        headline([finished], ["acuracy"])


def test_a_run_that_was_not_told_tasks_has_no_accuracy_with_them(finished):
    metrics = {**finished.metrics, "accuracy_task_aware": None}
    blind = replace(finished, matrix_task_aware=[], metrics=metrics)
    assert headline([blind])[0]["accuracy (%)"]
    with pytest.raises(DataError) as error:
        headline([finished, blind], ["accuracy", "accuracy_task_aware"])
    assert str(error.value) == (
        "nearest-mean on digits-domains with seed 0 was evaluated without the task of each image, so it has no "
        "accuracy_task_aware; run it anew, or leave that column out"
    )


def test_report_prints_the_columns_asked_for_or_one_line(finished, tmp_path, monkeypatch, capfd):
    lamina = partial(called, monkeypatch, capfd)
    page = tmp_path / "page.html"
    code, out, errors = lamina("report", tmp_path / "run", "--out", page, "--columns", "accuracy, acuracy")
    assert (code, out, len(errors)) == (2, "", 1) and "no metric is called 'acuracy'" in errors[0]
    assert not page.exists()
    code, out, errors = lamina("report", tmp_path / "run", "--out", page, "--columns", "accuracy,accuracy_task_aware")
    assert (code, errors) == (0, []) and page.exists()
    assert "task-aware accuracy (%)" in out and "forgetting" not in out
    assert "forgetting (%)" in lamina("report", tmp_path / "run", "--out", page)[1]


# ── records and resuming ─────────────────────────────────────────────────────────────────────────────


def test_a_record_says_the_kind_of_stream_and_counts_a_class_once(finished, tmp_path):
    protocol = finished.protocol
    assert (protocol["kind"], protocol["domains"]) == ("domain-incremental", "coarse, plain")
    assert (protocol["tasks"], protocol["classes"]) == (2, 10)
    assert (protocol["train_images"], protocol["test_images"]) == (40, 20)
    assert "online" not in protocol and "blurry" not in protocol
    assert finished.classes[0] == finished.classes[1]
    assert Record.read(tmp_path / "run" / "results.json") == finished


def test_a_record_says_how_blurry_and_that_it_was_online(tmp_path):
    overrides = {"stream": {"per_class": 3, "test_per_class": 1, "blurry": 0.4}, "online": True, "epochs": 9}
    run, _ = plan("linear-probe", "digits", recipe=False, overrides=overrides)
    record = execute(run, tmp_path / "run")
    protocol = record.protocol
    assert (protocol["kind"], protocol["blurry"], protocol["online"]) == ("blurry class-incremental", 0.4, "one pass")
    assert (protocol["classes"], protocol["train_images"], record.settings["epochs"]) == (10, 30, 9)
    assert len(steps(tmp_path / "run")) == 5
    again = execute(run, tmp_path / "run", resume=True)
    assert (again.matrix, again.protocol) == (record.matrix, record.protocol)
    with pytest.raises(ResumeError) as error:
        execute(run.model_copy(update={"online": False}), tmp_path / "run", resume=True)
    assert str(error.value) == f"{tmp_path / 'run' / 'state.pt'} was made with online = True; this run has None"
    other = run.model_copy(update={"stream": run.stream.model_copy(update={"blurry": 0.5})})
    with pytest.raises(ResumeError, match=r"was made with stream\.blurry = 0\.4; this run has 0\.5"):
        execute(other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["vpt-nsp2", "linear-probe"])
def test_a_run_over_domains_that_was_stopped_goes_on_exactly(tiny_vit, tmp_path, name):
    from lamina.training.trainer import Stopped

    stream, settings = small(), method_class(name)(**METHODS[name])
    whole = trainer_of(settings, tiny_vit)
    whole.run(stream)
    first = trainer_of(settings, tiny_vit, run_dir=tmp_path)
    first.should_stop = lambda: first.position.task == 1
    with pytest.raises(Stopped):
        first.run(stream)
    second = trainer_of(settings, tiny_vit, run_dir=tmp_path)
    assert second.restore(stream) and second.position.task == 1
    second.run(stream)
    assert second.matrix == whole.matrix
    assert all(torch.equal(value, learned(whole)[key]) for key, value in learned(second).items())


def test_the_command_takes_online_and_domains(tmp_path, monkeypatch, capfd):
    words = ["--set", "stream.per_class=2", "--set", "stream.test_per_class=1", "--set", "epochs=7"]
    words += ["--set", 'stream.domains=["noisy", "plain"]', "--online", "--out", tmp_path / "new", "--json"]
    code, out, _ = called(monkeypatch, capfd, "run", "linear-probe", "--stream", "digits-domains", *words)
    protocol = json.loads(out)["protocol"]
    assert (code, protocol["online"], protocol["domains"]) == (0, "one pass", "noisy, plain")
    assert len(steps(tmp_path / "new")) == 2


# ── online ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [VPTDeep, LinearProbe])
def test_online_takes_one_pass_with_the_schedule_of_one_pass(tiny_vit, tmp_path, kind):
    stream = blobs(tasks=2, per_task=3)
    for name in ("online", "short"):
        (tmp_path / name).mkdir()
    online = trainer_of(kind(epochs=4, batch_size=5), tiny_vit, run_dir=tmp_path / "online", online=True)
    short = trainer_of(kind(epochs=1, batch_size=5), tiny_vit, run_dir=tmp_path / "short")
    for trainer in (online, short):
        trainer.run(stream)
    assert len(steps(tmp_path / "online")) == 2 * PASS
    assert [line["lr"] for line in steps(tmp_path / "online")] == [line["lr"] for line in steps(tmp_path / "short")]
    assert len({line["lr"] for line in steps(tmp_path / "online")}) > 1
    assert all(torch.equal(value, learned(short)[name]) for name, value in learned(online).items())
    assert online.matrix == short.matrix


def planned(tower, head, before, after, **arguments):
    """A trainer of a head on cached features, with any plan."""
    torch.manual_seed(0)
    learner = Learner(
        PromptedModel(tower, None, head), lambda task: before, refine=lambda task: after, cache="features"
    )
    feed = Feed(Fabric(accelerator="cpu", devices=1), SPEC, eval_batch=6, features=tower)
    return Trainer(learner, feed, **arguments)


def phase(**values):
    return Phase(**{"epochs": 2, "batch_size": 5, "optimizer": partial(torch.optim.SGD, lr=0.1), **values})


def test_online_shows_no_image_twice_where_an_epoch_repeats_its_images(tiny_vit):
    seen = []
    trainer = planned(tiny_vit, LinearHead(24), [phase(repeat=3)], [], online=True)
    trainer.progress.advance = lambda images, loss=None: seen.append(images)
    trainer.learn(blobs(tasks=1).tasks[0])
    assert seen == [5, 5, 5, 5, 5, 2]


def test_online_leaves_phases_alone_that_read_no_image(tiny_vit, tmp_path):
    """Two epochs of four draws of each of three classes in batches of 5."""
    after = phase(draws=4, classes="seen", parameters=lambda model: list(model.head.parameters()))
    trainer = planned(tiny_vit, RefinedHead(24), [phase()], [after], run_dir=tmp_path, online=True)
    trainer.learn(blobs(tasks=1).tasks[0])
    counts = np.bincount([line["position"][1] for line in steps(tmp_path)])
    assert counts[counts > 0].tolist() == [PASS, 2 * 3]


def test_a_run_that_is_not_online_does_what_the_method_says(tiny_vit, tmp_path):
    trainer_of(VPTDeep(epochs=2, batch_size=5), tiny_vit, run_dir=tmp_path).run(blobs(tasks=1))
    assert len(steps(tmp_path)) == 2 * PASS
