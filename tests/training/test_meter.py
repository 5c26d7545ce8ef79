"""The drift meter: L 3 blocks, N 17 tokens, D 24 channels; 3 tasks of 2 classes and 11 test images."""

import copy
import itertools

import numpy as np
import pytest
import torch

from lamina.backbones.splice import PromptPass, Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.data.loader import Share
from lamina.data.stream import Split, Stream, Task
from lamina.errors import DataError, ResumeError
from lamina.heads.linear import LinearHead
from lamina.methods.joint import Joint
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.nearest_mean import NearestMean
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import PromptedModel
from lamina.prompts.base import PromptModule, Scripted
from lamina.seeds import seed_at
from lamina.training.meter import DriftMeter
from lamina.training.progress import Progress
from lamina.training.trainer import Stopped
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

DEEP = VPTDeep(length=4, epochs=2, batch_size=9, lr=0.1, temperature=1.0)


@pytest.fixture
def stream():
    return blobs(tasks=3, per_task=2, train=18, test=11)


def run(stream, tower, settings=DEEP, images=50, eval_batch=6, **arguments):
    trainer = trainer_of(settings, tower, meter=DriftMeter(stream, images), **arguments)
    trainer.feed.eval_batch = eval_batch
    trainer.run(stream)
    return trainer


def flat(drift):
    return [value for row in drift for blocks in row for value in blocks]


# ── which images ─────────────────────────────────────────────────────────────────────────────────────


def task_of(columns):
    indices = 1000 + np.arange(len(columns))
    return Task(0, ["a", "b", "c"], [4, 5, 6], None, Split(None, indices, np.array(columns)))


@pytest.mark.parametrize("mixed", [False, True])
def test_fifty_images_are_kept_of_each_class_in_proportion_and_in_order(mixed):
    columns = np.repeat([4, 5, 6], [100, 40, 61])
    if mixed:
        np.random.default_rng(0).shuffle(columns)
    (kept,) = DriftMeter(Stream("some", [task_of(columns)], 0, "")).splits
    assert len(kept) == 50 and np.all(np.diff(kept.indices) > 0)
    assert np.abs(np.bincount(kept.columns)[4:] - [25, 10, 15]).max() <= 1
    assert kept.columns.tolist() == columns[kept.indices - 1000].tolist()
    for column in (4, 5, 6):
        gaps = np.diff(np.searchsorted(1000 + np.flatnonzero(columns == column), kept.indices[kept.columns == column]))
        assert set(gaps) <= {4, 5}, "they are not spread over their class"


def test_of_a_small_task_every_image_is_kept(stream):
    for task, kept in zip(stream, DriftMeter(stream).splits, strict=True):
        assert kept.images is task.test.images and kept.indices.tolist() == task.test.indices.tolist()


def test_a_task_with_a_single_test_image_has_no_spread_and_is_refused():
    one = Task(1, ["d"], [7], None, Split(None, np.array([3]), np.array([7])))
    with pytest.raises(DataError) as error:
        DriftMeter(Stream("some", [task_of([4, 5]), one], 0, ""))
    assert str(error.value) == (
        "stream 'some': drift is told in units of the spread of test images, so each task needs at least 2; "
        "task 2 has 1; give it more, or measure no drift"
    )


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────


class Listening(PromptPass):
    """Another pass, and the frozen sequence that it was shown at every block."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.heard = inner, []

    def at(self, layer, tokens, carried):
        self.heard.append(tokens)
        return self.inner.at(layer, tokens, carried)


class Keeping(Progress):
    """Copies the model after each task."""

    def __init__(self):
        self.models, self.stages = [], []

    def begin(self, stage, task, tasks, images):
        self.stages.append((stage, task, tasks, images))

    def row(self, task, tasks, accuracies):
        self.models.append(copy.deepcopy(self.trainer.learner.model))


def average_tower():
    """The same blocks, but its features are read from all tokens."""
    model = make_tiny_vit().model
    model.global_pool = "avg"
    tower = TimmTower(model)
    assert tower.readout is None
    return tower


def seen_one_by_one(model, split):
    """Rows (n, D) at the entry of blocks 1 and 2 and of the features: one image at a time, without a tap."""
    rows = []
    for index in split.indices:
        pixels = (split.images.image(int(index)) / 255 - 0.5) / 0.25
        listening = Listening(model.prompts.start())
        features = model.tower(pixels[None], listening).features[0]
        read = [heard[0, 0] if model.tower.readout is not None else heard[0].mean(0) for heard in listening.heard]
        rows.append([*read[1:], features])
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("tower", [make_tiny_vit, average_tower])
@torch.no_grad()
def test_drift_is_what_its_definition_says(stream, tower):
    """Image by image, from copies of the model after each task: distances and spreads in plain words."""
    progress = Keeping()
    trainer = trainer_of(DEEP, tower(), meter=DriftMeter(stream, images=7), progress=progress)
    progress.trainer = trainer
    with torch.enable_grad():
        trainer.run(stream)
    drift, kept = trainer.meter.drift, trainer.meter.splits
    assert [[len(blocks) for blocks in row] for row in drift] == [[3], [3, 3], [3, 3, 3]]
    for t, i in ((1, 0), (2, 0), (2, 1)):
        assert len(kept[i]) == 7
        then, now = (seen_one_by_one(progress.models[stage], kept[i]) for stage in (i, t))
        for block in range(3):
            moves = [torch.dist(a, b) ** 2 for a, b in zip(now[block], then[block], strict=True)]
            middle = sum(then[block]) / 7
            spread = [torch.dist(row, middle) ** 2 for row in then[block]]
            by_hand = float((sum(moves) / 7) ** 0.5 / (sum(spread) / 7) ** 0.5)
            assert drift[t][i][block] == pytest.approx(by_hand, rel=1e-3)
    assert min(value for t, row in enumerate(drift) for blocks in row[:t] for value in blocks) > 1e-3
    assert flat([[row[t]] for t, row in enumerate(drift)]) == [0.0] * 9


def test_drift_does_not_depend_on_batches(stream, tiny_vit):
    one, many = (run(stream, make_tiny_vit(), eval_batch=size).meter.drift for size in (1, 50))
    assert flat(one) == pytest.approx(flat(many), rel=1e-4, abs=1e-6) and max(flat(one)) > 0.01


def shared(meter, model, feed, task, world):
    """One `measure` in each of `world` processes, one after the other; rows that they lack come from the others."""
    alone = []
    for rank in range(world):
        feed.share, seen = Share(rank, world), []
        copy.deepcopy(meter).measure(
            model, task, feed.plain, feed.share, lambda table, to=seen: to.append(table) or table, 0
        )
        alone.append(seen)
    totals = iter([sum(tables) for tables in zip(*alone, strict=True)])
    meter.measure(model, task, feed.plain, feed.share, lambda table: next(totals), 0)


@pytest.mark.parametrize("world", [2, 5])
def test_shares_add_up_to_what_one_process_sees_though_some_get_no_image(stream, tiny_vit, world):
    trainer = trainer_of(DEEP, tiny_vit)
    model, feed = trainer.learner.model, trainer.feed
    whole, parts = DriftMeter(stream, images=4), DriftMeter(stream, images=4)
    for task in (0, 1):
        feed.share = Share()
        whole.measure(model, task, feed.plain, feed.share, lambda table: table, 0)
        shared(parts, model, feed, task, world)
        for layer in range(3):
            model.prompts.value(layer).data.add_(torch.randn(24))
    assert flat(parts.drift) == pytest.approx(flat(whole.drift), rel=1e-4) and whole.drift[1][0][2] > 0.01


class Drawing(PromptModule):
    """Draws its prompts anew for every pass, and notes how it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def start(self, query=None, task=None):
        self.asked.append((self.training, torch.is_inference_mode_enabled(), task))
        drawn = torch.randn(5, 24)
        return Scripted(lambda layer, tokens, carried: Splice(context=drawn))


def test_draws_inside_the_prompts_are_the_same_at_each_look(stream, tiny_vit):
    model, feed = PromptedModel(tiny_vit, Drawing(), LinearHead(24)), trainer_of(DEEP, tiny_vit).feed
    meter = DriftMeter(stream)
    for task in range(2):
        model.train()
        meter.measure(model, task, feed.plain, feed.share, lambda table: table, 0)
    assert flat(meter.drift) == [0.0] * 9
    assert set(model.prompts.asked) == {(False, True, None)}


class Travelling(PromptModule):
    """Two tokens that travel with the sequence; the head reads what became of them."""

    readout = "prompts"

    def __init__(self):
        super().__init__()
        self.tokens = torch.randn(2, 24)

    def start(self, query=None, task=None):
        return Scripted(
            lambda layer, tokens, carried: (
                Splice(tokens=self.tokens.expand(len(tokens), -1, -1)) if layer == 0 else None
            )
        )


class Narrow(TimmTower):
    """Pools to 10 features."""

    def __init__(self, model):
        super().__init__(model)
        self.features = 10

    def pool(self, tokens):
        return super().pool(tokens)[:, :10]


@pytest.mark.parametrize(("prompts", "width"), [(Drawing, 10), (Travelling, 24)])
def test_the_last_rows_are_those_that_the_head_reads_whatever_their_width(stream, tiny_vit, prompts, width):
    model = PromptedModel(Narrow(tiny_vit.model), prompts(), LinearHead(width))
    feed, meter = trainer_of(DEEP, make_tiny_vit()).feed, DriftMeter(stream)
    feed.eval_batch = 11
    meter.measure(model, 0, feed.plain, feed.share, lambda table: table, 3)
    ((first, second, last),) = meter.state_dict()["references"]
    assert first.shape == second.shape == (11, 24) and last.shape == (11, width)
    torch.manual_seed(seed_at(3, "drift", 0))
    (batch,) = feed.plain(meter.splits[0])
    torch.testing.assert_close(last, model.features(batch)[0])


# ── within a run ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [NearestMean(), LinearProbe(epochs=1, batch_size=9)])
def test_features_of_a_frozen_model_have_not_moved_and_are_not_looked_at(stream, tiny_vit, settings):
    progress = Keeping()
    progress.trainer = trainer = trainer_of(settings, tiny_vit, meter=DriftMeter(stream), progress=progress)
    trainer.run(stream)
    assert trainer.meter.drift == [[[0.0] * 3] * (t + 1) for t in range(3)]
    assert "measure drift" not in {stage for stage, *_ in progress.stages}
    looked = DriftMeter(stream)
    model = PromptedModel(tiny_vit, None, LinearHead(24))
    looked.measure(model, 0, lambda split: pytest.fail("it looks"), Share(), lambda table: table, 0)


def test_where_all_is_learned_at_once_there_is_nothing_to_measure(stream, tiny_vit):
    trainer = trainer_of(Joint(length=2, epochs=1, batch_size=9), tiny_vit, meter=DriftMeter(stream))
    trainer.run(stream)
    assert trainer.meter is None and "measure_drift" not in trainer.seconds


def test_measuring_changes_nothing_that_is_learned_or_evaluated(stream):
    measured, plain = run(stream, make_tiny_vit(), seed=4), trainer_of(DEEP, make_tiny_vit(), seed=4)
    plain.run(stream)
    assert measured.matrix == plain.matrix and measured.matrix_task_aware == plain.matrix_task_aware
    for name, value in plain.learner.model.learned().items():
        assert torch.equal(value, measured.learner.model.learned()[name])
    assert [*measured.seconds] == [*plain.seconds, "measure_drift"]


def test_the_time_of_measuring_is_kept_apart(stream, tiny_vit, monkeypatch):
    """On a clock that stands still but while the meter works."""
    clock = [0.0]

    class Slow(DriftMeter):
        def measure(self, *arguments, **named):
            clock[0] += 100.0

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    trainer = trainer_of(VPTDeep(length=2, epochs=1, batch_size=9), tiny_vit, meter=Slow(stream))
    trainer.run(stream)
    assert trainer.seconds == {
        "train": [0.0] * 3, "look_back": [0.0] * 3, "evaluate": [0.0] * 3, "measure_drift": [100.0] * 3,
    }  # fmt: skip


def test_whoever_watches_is_told_of_every_image_that_is_looked_at(stream, tiny_vit):
    class Counting(Progress):
        told, done = [], []

        def begin(self, stage, task, tasks, images):
            self.told.append((stage, task, tasks, images))
            self.done.append(0)

        def advance(self, images, loss=None):
            self.done[-1] += images

    run(stream, tiny_vit, images=7, progress=(progress := Counting()))
    pairs = zip(progress.told, progress.done, strict=True)
    assert [(*told, done) for told, done in pairs if told[0] == "measure drift"] == [
        ("measure drift", t, 3, 7 * (t + 1), 7 * (t + 1)) for t in range(3)
    ]


# ── stopped and resumed ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop", [(0, 0, 1), (1, 0, 2), (2, 0, 0), (2, 0, 3)])
def test_a_resumed_run_measures_what_an_unbroken_one_does(stream, tmp_path, stop):
    whole = run(stream, make_tiny_vit()).meter.drift
    broken = trainer_of(DEEP, make_tiny_vit(), meter=DriftMeter(stream), run_dir=tmp_path)
    broken.should_stop = lambda: broken.position == stop
    with pytest.raises(Stopped):
        broken.run(stream)
    trainer = trainer_of(DEEP, make_tiny_vit(), meter=DriftMeter(stream), run_dir=tmp_path)
    assert trainer.restore(stream) and len(trainer.meter.drift) == stop[0]
    trainer.run(stream)
    assert trainer.meter.drift == whole
    assert len(trainer.seconds["measure_drift"]) == 3


def stopped(stream, folder, tasks):
    trainer = trainer_of(DEEP, make_tiny_vit(), run_dir=folder)
    trainer.should_stop = lambda: trainer.position == (tasks, 0, 1)
    with pytest.raises(Stopped):
        trainer.run(stream)
    saved = torch.load(folder / "state.pt", weights_only=True)
    del saved["meter"]  # as if there had been no meters yet
    torch.save(saved, folder / "state.pt")


def test_a_checkpoint_from_before_there_were_meters_is_resumed_without_one(stream, tmp_path):
    stopped(stream, tmp_path, 1)
    trainer = trainer_of(DEEP, make_tiny_vit(), run_dir=tmp_path)
    assert trainer.restore(stream) and trainer.position == (1, 0, 1)


def test_old_tasks_that_nobody_measured_are_not_made_up(stream, tmp_path):
    stopped(stream, tmp_path, 1)
    with pytest.raises(ResumeError) as error:
        trainer_of(DEEP, make_tiny_vit(), run_dir=tmp_path, meter=DriftMeter(stream)).restore(stream)
    assert str(error.value) == (
        "drift must be measured from the first task on: of the 1 learned so far, 0 were measured; resume without "
        "measuring, or start the run anew"
    )


def test_measuring_may_begin_within_the_first_task(stream, tmp_path):
    stopped(stream, tmp_path, 0)
    trainer = trainer_of(DEEP, make_tiny_vit(), run_dir=tmp_path, meter=DriftMeter(stream))
    assert trainer.restore(stream)
    trainer.run(stream)
    assert trainer.meter.drift == run(stream, make_tiny_vit()).meter.drift


def test_memory_is_lists_of_float32_tensors_that_a_checkpoint_can_hold(stream, tiny_vit, tmp_path):
    state = run(stream, tiny_vit).meter.state_dict()
    torch.save(state, tmp_path / "state.pt")
    again = DriftMeter(stream)
    again.resume(torch.load(tmp_path / "state.pt", weights_only=True), 3)
    assert again.drift == state["drift"]
    pairs = zip(itertools.chain(*again.state_dict()["references"]), itertools.chain(*state["references"]), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs) and ours.shape == (11, 24) and ours.dtype == torch.float32
