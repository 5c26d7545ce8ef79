"""A model in memory: lessons add up, nothing half-done stays, and what comes back from a file is the same."""

import re

import numpy as np
import pytest
import torch

from lamina.backbones.load import Backbone
from lamina.config import Settings
from lamina.continual import ContinualModel
from lamina.data.material import Material
from lamina.data.pictures import ArrayPictures
from lamina.errors import ConfigError, DataError, LaminaError, ModelFileError, ResumeError, TrainingError
from lamina.learner import Learner, refinement
from lamina.methods.nearest_mean import NearestMean
from lamina.model import Batch
from lamina.modelfile import ModelFile
from lamina.protections.null_space import NullSpace
from lamina.registry import method_class, method_names
from lamina.training.progress import Progress
from lamina.training.trainer import Stopped
from tests.backbones.clips import tiny_clip
from tests.conftest import make_tiny_vit

FAST = {"epochs": 1, "batch_size": 8, "width": 40}  # applied where a method has such a setting
RNG = np.random.default_rng(0)
FACES = RNG.uniform(0, 255, (8, 3, 4, 4)).repeat(6, axis=2).repeat(6, axis=3)  # one picture a class, 24 x 24


def material(*classes, train=7, held=3, seed=0):
    """Noisy copies of the pictures of some classes, called "c0", "c1", ..."""
    random = np.random.default_rng([seed, *classes])
    labels = np.repeat(np.arange(len(classes)), train + held)
    pixels = FACES[np.array(classes)[labels]] + random.normal(0, 20, (len(labels), 3, 24, 24))
    images = ArrayPictures(pixels.clip(0, 255).astype(np.uint8), labels)
    aside = np.arange(len(labels)) % (train + held) >= train
    return Material(images, [f"c{c}" for c in classes], np.flatnonzero(~aside), np.flatnonzero(aside))


def pixels_of(model, material):
    return torch.stack([model.plain(material.images.image(int(i))) for i in material.held])


def model_of(method="nearest-mean", **settings):
    made = method_class(method)
    fast = {name: value for name, value in FAST.items() if name in made.model_fields and name not in made().idle()}
    return ContinualModel(method, settings={**fast, **settings}, precision="32")


@pytest.fixture(scope="module", autouse=True)
def small():
    """A backbone of three blocks, 32 x 32 pixels, under the name of the one that ships."""
    pixels = {"size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def load(name, dtype):
        with torch.random.fork_rng():
            return Backbone(name, tiny_clip(dtype) if "clip" in name else make_tiny_vit(dtype), pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.continual.load_backbone", load)
        yield


@pytest.fixture(scope="module")
def kept(small):
    """vpt-nsp2 after two lessons, as a file; reading it back is cheap."""
    model = model_of("vpt-nsp2")
    model.learn(material(0, 1, 2), name="first")
    model.learn(material(3, 4))
    return model.file()


def test_classes_come_in_order_of_arrival_and_are_told_apart():
    model = model_of()
    first, second = material(5, 1), material(0, 7, 2)
    assert model.learn(first).accuracy == 1.0
    lesson = model.learn(second, name="spring")
    assert model.classes == ["c5", "c1", "c0", "c7", "c2"]
    assert (lesson.columns, lesson.images, lesson.held_out, lesson.name) == ([2, 3, 4], 21, 9, "spring")
    for known, columns in ((first, [0] * 3 + [1] * 3), (second, [2] * 3 + [3] * 3 + [4] * 3)):
        assert model.judge(pixels_of(model, known)).probabilities.argmax(1).tolist() == columns


def test_what_a_file_brings_back_says_the_same_to_the_bit(kept):
    model = model_of("vpt-nsp2")
    model.learn(material(0, 1, 2), name="first")
    model.learn(material(3, 4))
    pixels = pixels_of(model, material(0, 3, 6))
    ours, theirs = model.judge(pixels), ContinualModel.load(kept).judge(pixels)
    assert torch.equal(ours.probabilities, theirs.probabilities)
    for name, values in ours.novelty.items():
        torch.testing.assert_close(values, theirs.novelty[name], rtol=0, atol=0)


def test_learning_on_from_a_file_is_learning_on_in_memory(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    through = model_of("vpt-nsp2")
    through.learn(material(0, 1, 2))
    file = through.file()
    file.write(tmp_path / "m.lamina")
    through.learn(material(3, 4), base=file.checksum)
    resumed = ContinualModel.load(tmp_path / "m.lamina")
    lesson = resumed.learn(material(3, 4), base=file.checksum)
    assert resumed.file().checksum == through.file().checksum
    assert lesson.date == "2001-09-09T01:46:40Z" and lesson.seconds is None


def test_a_lesson_that_fails_leaves_the_model_as_it_was(kept):
    model = ContinualModel.load(kept)
    with pytest.raises(TrainingError):
        broken = ContinualModel.load(kept, settings={"lr": 1e30, "epochs": 3})
        try:
            broken.learn(material(5, 6))
        finally:
            assert broken.classes == model.classes and len(broken.lessons) == 2
            for name, value in broken.model.learned().items():
                assert torch.equal(value, model.model.learned()[name])


class Halfway(Progress):
    def __init__(self):
        self.steps = 0

    def advance(self, images, loss=None):
        self.steps += 1


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_lesson_that_was_stopped_goes_on_to_the_same_end(kept, tmp_path, stop_after, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    undisturbed = ContinualModel.load(kept)
    undisturbed.learn(material(5, 6), base="x")
    model, watch = ContinualModel.load(kept), Halfway()
    with pytest.raises(Stopped):
        model.learn(
            material(5, 6), base="x", work=tmp_path, progress=watch, should_stop=lambda: watch.steps >= stop_after
        )
    assert model.classes == ["c0", "c1", "c2", "c3", "c4"]
    again, steps = ContinualModel.load(kept), Halfway()
    again.learn(material(5, 6), base="x", work=tmp_path, progress=steps)
    assert again.file().checksum == undisturbed.file().checksum
    assert steps.steps < 2 + 2  # 14 images are two steps, and two looks


def test_work_on_another_lesson_is_not_taken_up(kept, tmp_path):
    model, watch = ContinualModel.load(kept), Halfway()
    with pytest.raises(Stopped):
        model.learn(material(5, 6), work=tmp_path, progress=watch, should_stop=lambda: watch.steps >= 1)
    with pytest.raises(ResumeError, match="was made with images = "):
        ContinualModel.load(kept).learn(material(5, 7), work=tmp_path)


# ── classes that are known, tasks that are too small ─────────────────────────────────────────────────


def test_known_classes_are_refused_all_by_name(kept):
    with pytest.raises(ConfigError) as error:
        ContinualModel.load(kept).learn(material(4, 6, 1))
    assert str(error.value).startswith("the model knows 'c4', 'c1' already; ")


@pytest.mark.parametrize("method", ["nearest-mean", "ranpac", "vpt-nsp2", "vpt-deep", "linear-probe"])
def test_known_classes_can_get_more_examples_and_keep_their_columns(method):
    model = model_of(method)
    model.learn(material(0, 1))
    before = model.statistics.counts.clone()
    lesson = model.learn(material(1, 3, 0, seed=4), existing="extend")
    assert model.classes == ["c0", "c1", "c3"] and lesson.classes == ["c0", "c1", "c3"] and lesson.columns == [0, 1, 2]
    assert (model.statistics.counts[:2] - before).tolist() == [7, 7]
    again = ContinualModel.load(model.file())
    pixels = pixels_of(again, material(3, 0))
    assert torch.equal(again.judge(pixels).probabilities, model.judge(pixels).probabilities)
    model.learn(material(0, 1, seed=9), existing="extend")
    assert model.classes == ["c0", "c1", "c3"] and model.statistics.counts.tolist() == [21, 21, 7]
    assert model.judge(pixels).probabilities.shape == (6, 3)


def test_one_class_alone_is_refused_where_it_would_have_nothing_to_be_told_from():
    with pytest.raises(ConfigError, match="learns nothing from one alone; got 'c3'"):
        model_of("vpt-nsp2").learn(material(3))


def test_class_means_take_one_class_at_a_time():
    singly, at_once = model_of(), model_of()
    images = material(3, 0, 6)
    at_once.learn(images)
    for label in range(3):
        own = images.images.labels == label
        singles = ArrayPictures(images.images.pixels[own], np.zeros(own.sum(), np.int64))
        places = np.cumsum(own) - 1
        train, held = (places[part[own[part]]] for part in (images.train, images.held))
        singly.learn(Material(singles, [images.names[label]], train, held))
    pixels = pixels_of(singly, images)
    ours, theirs = (model.judge(pixels).probabilities.argmax(1) for model in (singly, at_once))
    assert torch.equal(ours, theirs) and ours.unique().tolist() == [0, 1, 2]


def test_prompts_with_class_statistics_take_one_class_at_a_time_and_move_when_there_are_two():
    model = model_of("vpt-deep", head="statistics")
    prompts = {name: value.clone() for name, value in model.model.prompts.state_dict().items()}

    def moved():
        now = model.model.prompts.state_dict()
        return [not torch.equal(value, now[name]) for name, value in prompts.items()]

    for label in (3, 0):
        lesson = model.learn(material(label))
    assert lesson.accuracy == 1.0 and lesson.drift.new == 0.0 and moved() == [False] * 3
    model.learn(material(6, 1))
    assert moved() == [True] * 3
    pixels = pixels_of(model, material(3, 0, 6, 1, held=5, seed=1))
    said = model.judge(pixels).probabilities
    assert said.shape == (20, 4)
    assert float((said.argmax(1) == torch.arange(4).repeat_interleave(5)).double().mean()) > 0.8
    assert torch.equal(ContinualModel.load(model.file()).judge(pixels).probabilities, said)


def test_class_statistics_that_a_head_keeps_are_not_gathered_twice():
    shared, apart = model_of("vpt-deep", head="statistics"), model_of("vpt-deep")
    for model in (shared, apart):
        model.learn(material(0, 1))
        model.learn(material(2, 3))
    for model in (shared, ContinualModel.load(shared.file())):
        assert model.statistics is model.model.head.statistics and model.file().memory == []
        assert model.statistics.counts.tolist() == [7.0] * 4
    assert apart.model.head.statistics is None and [*apart.file().memory[0]] == ["sums", "counts", "moment"]
    for name, value in apart.statistics.state_dict().items():
        torch.testing.assert_close(shared.statistics.state_dict()[name], value)  # prompts learn alike


def test_novelty_is_told_in_the_features_that_the_head_reads():
    model = model_of("vpt-deep", head="statistics", layers=2)
    model.learn(material(0, 1, 2, train=20, held=10))
    assert model.statistics.sums.shape == (3, 48)
    known, new = (model.judge(pixels_of(model, material(*c))).novelty["mahalanobis"] for c in ((0, 1, 2), (5, 6, 7)))
    assert new.median() > known.median()


@pytest.mark.parametrize("stop_after", [1, 2, 4, 6])
def test_a_lesson_stopped_while_its_head_is_balanced_goes_on_to_the_same_end(tmp_path, stop_after, monkeypatch):
    """14 images are two steps and a look; then two epochs of 20 draws of four classes make one step each."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    monkeypatch.setattr("lamina.methods.vpt_deep.refinement", lambda: refinement(epochs=4, draws=20))
    first = model_of("vpt-deep", head="refined")
    first.learn(material(0, 1))
    before, new = first.file(), material(2, 3)
    undisturbed = ContinualModel.load(before)
    undisturbed.learn(new, base="x")
    watch = Halfway()
    with pytest.raises(Stopped):
        ContinualModel.load(before).learn(
            new, base="x", work=tmp_path, progress=watch, should_stop=lambda: watch.steps >= stop_after
        )
    again, steps = ContinualModel.load(before), Halfway()
    again.learn(new, base="x", work=tmp_path, progress=steps)
    assert again.file().checksum == undisturbed.file().checksum
    assert steps.steps == 7 - stop_after


def test_the_upper_bound_takes_no_lessons():
    with pytest.raises(ConfigError, match="joint learns all classes at once, so it cannot take lessons"):
        ContinualModel("joint")


def test_a_model_that_knows_nothing_says_so():
    model = model_of()
    with pytest.raises(ConfigError, match="knows no class yet"):
        model.judge(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_lesson_without_images_is_refused():
    nothing = material(0, 1)
    with pytest.raises(DataError, match="no image is left for training"):
        model_of().learn(Material(nothing.images, nothing.names, nothing.train[:0], nothing.held))


def test_without_held_out_images_there_is_no_accuracy_but_a_drift():
    model = model_of("vpt-nsp2")
    for classes in ((0, 1), (2, 3)):
        lesson = model.learn(material(*classes, held=0))
    assert lesson.accuracy is None and lesson.drift.old > 0 and model.confidence.scale("energy") is None


# ── predictions ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", [name for name in method_names() if name != "joint"])
def test_what_is_said_of_an_image_does_not_depend_on_the_others(method):
    model = model_of(method)
    model.learn(material(0, 1, 2))
    pixels = pixels_of(model, material(2, 0, 5))
    together, alone = model.judge(pixels), [model.judge(pixels[i : i + 1]) for i in range(len(pixels))]
    apart = torch.cat([said.probabilities for said in alone])
    torch.testing.assert_close(together.probabilities, apart, rtol=1e-4, atol=1e-4)
    for name, values in together.novelty.items():
        torch.testing.assert_close(values, torch.cat([said.novelty[name] for said in alone]), rtol=1e-3, atol=1e-3)


def test_images_unlike_all_that_was_learned_look_newer():
    model = model_of()
    model.learn(material(0, 1, 2, train=20, held=10))
    known, new = (model.judge(pixels_of(model, material(*c))).novelty["mahalanobis"] for c in ((0, 1, 2), (5, 6, 7)))
    assert new.min() > known.max()


def test_drift_is_told_in_units_of_the_spread_of_old_features(kept):
    before, model = ContinualModel.load(kept), ContinualModel.load(kept)
    new = material(5, 6)
    drift = model.learn(new).drift
    pixels = Batch(model.plain.normalised(pixels_of(model, new)))
    with torch.no_grad():
        move = model.model.features(pixels)[0] - before.model.features(pixels)[0]
    expected = float(move.square().sum(1).mean().sqrt()) / before.statistics.spread()
    assert drift.new == pytest.approx(expected, rel=1e-4)


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = model_of("vpt-nsp2")
    model.learn(material(0, 1))
    assert torch.equal(torch.rand(3), expected)


# ── files that do not fit ────────────────────────────────────────────────────────────────────────────


def changed(file, **values):
    return ModelFile(**{**file.__dict__, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "vpt-nps2"}, "no method is called 'vpt-nps2'; did you mean 'vpt-nsp2'?"),
        ({"settings": {"epochs": 0}}, "VPTNSP2.epochs must be at least 1"),
        ({"confidence": {"tasks": [], "more": 1}}, "no setting is called 'more'"),
        (
            {"backbone": {"name": "lamina:vit-nano", "fingerprint": "0123"}},
            "learned on lamina:vit-nano with fingerprint",
        ),
        ({"learned": {}}, "has (4, 24) as 'prompts.values.0', the model file has nothing"),
        ({"memory": []}, "what the model file remembers does not fit vpt-nsp2"),
        ({"memory": [{}, {}, {}]}, "what the model file remembers does not fit vpt-nsp2"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(kept, values, message):
    if "settings" in values:
        values = {"settings": {**kept.settings, **values["settings"]}}
    with pytest.raises(ModelFileError) as error:
        ContinualModel.load(changed(kept, **values))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("length", "message"), [(10**9, "has (1000000000, 24) as"), (10**18, "cannot be made with")])
def test_a_file_that_asks_for_a_huge_model_is_refused_without_making_it(kept, length, message):
    with pytest.raises((ModelFileError, ConfigError), match=re.escape(message)):
        ContinualModel.load(changed(kept, settings={**kept.settings, "length": length}))


def test_a_setting_that_shapes_what_was_learned_cannot_be_changed(kept):
    with pytest.raises(ConfigError, match="^length=4 shapes what was learned and has to stay: "):
        ContinualModel.load(kept, settings={"length": 5})
    assert ContinualModel.load(kept, settings={"lr": 0.5}).settings.lr == 0.5


def test_protections_are_asked_about_a_lesson_before_it_is_learned(kept, monkeypatch):
    """About its own task alone: the images of the others are gone."""

    def check(self, tasks):
        asked.extend((task.index, len(task.train)) for task in tasks)
        raise ConfigError("not this one")

    asked, steps = [], Halfway()
    monkeypatch.setattr(NullSpace, "check", check)
    model = ContinualModel.load(kept)
    with pytest.raises(ConfigError, match="^not this one$"):
        model.learn(material(5, 6), progress=steps)
    assert asked == [(2, 14)] and not steps.steps
    assert model.file().checksum == kept.checksum


def test_a_method_of_ones_own_is_kept_like_any_other(monkeypatch):
    """Nothing but the registry knows names."""

    class Mine(Settings):
        def build(self, tower) -> Learner:
            return NearestMean().build(tower)

    monkeypatch.setattr("lamina.continual.method_class", lambda name: Mine)
    model = ContinualModel("mine")
    model.learn(material(0, 1))
    assert ContinualModel.load(model.file()).classes == ["c0", "c1"]


def test_errors_are_ours(kept):
    assert issubclass(ModelFileError, LaminaError)
