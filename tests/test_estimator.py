"""scikit-learn's manners: 3 classes a task, 5 images a class, 24 x 40 pixels; a tower of L 3, D 24, N 17 at 32 x 32."""

import copy
import importlib
import inspect
import pickle
import random
import tempfile
from functools import cache

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import lamina
from lamina import ContinualClassifier
from lamina.backbones.load import Backbone
from lamina.continual import ContinualModel
from lamina.data import given as reading
from lamina.data.folder import held_out
from lamina.errors import ConfigError, DataError, ModelFileError, TrainingError
from lamina.lessons import learn_folder
from lamina.modelfile import ModelFile
from lamina.predictions import predict
from lamina.registry import method_class
from tests.conftest import make_tiny_vit

PIXELS = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic", "crop_pct": 1.0}
TAKEN = (
    "take an array (n, h, w, 3) or (n, h, w), a tensor (n, 3, h, w) or (n, 1, h, w), a Dataset, or a list of paths or "
    "images"
)


@cache
def made_once(dtype):
    return make_tiny_vit(dtype)


def tiny(name, *, dtype):
    torch.rand(1)  # a real backbone draws its first weights
    return Backbone(name, made_once(dtype), PIXELS)


#: looks for plug-ins once, not once per model
found_once = cache(method_class)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("lamina.continual.load_backbone", tiny)
    monkeypatch.setattr("lamina.continual.method_class", found_once)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def classifier(method="nearest-mean", **parameters):
    return ContinualClassifier(method, precision="32", **parameters)


def prompted(**settings):
    return classifier("vpt-nsp2", settings={"epochs": 1, "batch_size": 7, "length": 3, **settings})


def pictures(first, classes=3, each=5, height=24, width=40):
    """Noisy copies of a random picture per class: (n, height, width, 3), uint8, and the numbers of their classes."""
    labels = np.arange(classes * each) % classes + first
    rng = np.random.default_rng(first)
    coarse = rng.integers(0, 256, (classes, 4, 4, 3))
    plain = np.stack([np.asarray(Image.fromarray(c.astype(np.uint8)).resize((width, height))) for c in coarse])
    return (plain[labels - first] + rng.normal(0, 20, (len(labels), height, width, 3))).clip(0, 255).astype(
        np.uint8
    ), labels


FIRST, SECOND = pictures(0), pictures(3)


@cache
def taught(method="nearest-mean"):
    """Return a classifier that has learned both tasks; nobody changes it."""
    model = classifier() if method == "nearest-mean" else prompted()
    return model.partial_fit(*FIRST).partial_fit(*SECOND)


def words(act, *arguments, error=DataError, **more):
    with pytest.raises(error) as caught:
        act(*arguments, **more)
    return str(caught.value)


def learned(model):
    return {name: value.clone() for name, value in model.model_.model.learned().items()}


def assert_learned_the_same(model, other):
    ours, theirs = learned(model), learned(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def files(tmp_path):
    """Paths of the images of the first task, as PNG."""
    paths = [tmp_path / f"{place}.png" for place in range(len(FIRST[0]))]
    for path, image in zip(paths, FIRST[0], strict=True):
        Image.fromarray(image).save(path)
    return paths


# ── scikit-learn ─────────────────────────────────────────────────────────────────────────────────────


class TableClassifier(ContinualClassifier):
    """Takes tables (n, f), as the checks have them: each row becomes a grey picture of stripes.

    What can be asked of a table alone (two axes, as many columns as before, not sparse) is asked by scikit-learn
    itself; numbers, labels, states and results are the business of the class that is tested.
    """

    def _learn(self, X, y, classes, *, anew):
        return super()._learn(self.stripes(X, reset=anew), y, classes, anew=anew)

    def predict(self, X):
        return super().predict(self.stripes(X))

    def predict_proba(self, X):
        return super().predict_proba(self.stripes(X))

    def score(self, X, y=None, sample_weight=None):
        return super().score(self.stripes(X), y, sample_weight)

    def stripes(self, X, reset=False):
        if not reset:
            check_is_fitted(self)
        table = validate_data(self, X, reset=reset, ensure_all_finite=False, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            light = np.where(np.isfinite(table), (np.sin(table / 4) + 1) / 2, table)
        return light[:, None, :, None].repeat(light.shape[1], axis=1)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array, tags.input_tags.string = True, False, False
        return tags


CANNOT = {
    "check_methods_subset_invariance": "a processor rounds float32 by the shape of a batch, and 1e-7 is asked; the "
    "test of batches below asks for 1e-5",
}


@parametrize_with_checks(
    [TableClassifier("nearest-mean", precision="32", existing="extend")],
    expected_failed_checks=lambda estimator: CANNOT,
    xfail_strict=True,
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_finds_nothing_else_to_complain_of(estimator, check):
    check(estimator)


def test_the_constructor_stores_and_partial_fit_checks():
    model = ContinualClassifier("vpt-nps2", holdout=7, settings={"a": 1})
    assert model.get_params() == {
        "method": "vpt-nps2",
        "backbone": None,
        "settings": {"a": 1},
        "seed": 0,
        "precision": "auto",
        "augmentation": "crop-flip",
        "holdout": 7,
        "existing": "refuse",
        "accelerator": "auto",
    }
    message = words(model.partial_fit, *FIRST, error=ConfigError)
    assert message.startswith("no method is called 'vpt-nps2'; did you mean 'vpt-nsp2'?")
    assert not hasattr(model, "classes_") and not model.__sklearn_is_fitted__()
    assert repr(classifier(holdout=0.5)) == "ContinualClassifier(holdout=0.5, method='nearest-mean', precision='32')"


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"holdout": 1}, "the share of images kept aside must be at least 0 and below 1; got 1"),
        ({"holdout": "some"}, "holdout must be a number; got 'some'"),
        ({"seed": None}, "seed must be a whole number; got None"),
        ({"seed": 0.5}, "seed must be a whole number; got 0.5"),
        ({"existing": "keep"}, "no way to treat existing classes is called 'keep'. Known: extend, refuse"),
        ({"precision": "16"}, "no precision is called '16'; did you mean 'bf16'? Known: 32, auto, bf16"),
    ],
)
def test_a_wrong_parameter_is_told_when_learning_begins(parameter, message):
    assert words(classifier().set_params(**parameter).fit, *FIRST, error=ConfigError) == message


def test_a_clone_has_the_parameters_and_has_learned_nothing():
    copied = clone(taught())
    assert copied.get_params() == taught().get_params() and not copied.__sklearn_is_fitted__()


def test_it_says_that_it_takes_images():
    tags = get_tags(classifier())
    assert tags.estimator_type == "classifier" and tags.input_tags.three_d_array and tags.input_tags.string
    assert not tags.input_tags.two_d_array and not tags.input_tags.sparse and not tags.input_tags.allow_nan


@pytest.mark.parametrize("act", ["predict", "predict_proba", "novelty"])
def test_what_has_learned_nothing_says_so(act):
    message = words(getattr(classifier(), act), FIRST[0], error=NotFittedError)
    assert message == "this ContinualClassifier knows no class yet; call fit or partial_fit first"


def test_what_has_learned_nothing_cannot_be_kept_or_scored(tmp_path):
    words(classifier().save, tmp_path / "none", error=NotFittedError)
    words(classifier().score, *FIRST, error=NotFittedError)
    assert not hasattr(classifier(), "lessons_") and not list(tmp_path.iterdir())


def test_it_can_be_validated_and_searched(files):
    assert cross_val_score(classifier(), *FIRST, cv=2).tolist() == [1, 1]
    paths = [str(path) for path in files]
    search = GridSearchCV(classifier(), {"holdout": [0, 0.4]}, cv=2).fit(paths, FIRST[1])
    assert search.score(paths, FIRST[1]) == 1


def test_it_is_there_where_it_is_asked_for():
    assert lamina.ContinualClassifier is importlib.import_module("lamina.estimator").ContinualClassifier
    message = words(getattr, lamina, "Classifier", error=AttributeError)
    assert message == "module 'lamina' has no attribute 'Classifier'"


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────


def test_classes_stand_in_order_of_arrival_and_sorted_within_a_call():
    model = classifier()
    for labels in (np.array([10, 9, 30]), np.array([2, 1, 20])):
        images, columns = pictures(int(labels[0]))
        model.partial_fit(images, labels[columns - columns[0]])
    assert model.classes_.tolist() == [9, 10, 30, 1, 2, 20]
    images, columns = pictures(2)
    assert model.predict(images).tolist() == np.array([2, 1, 20])[columns - 2].tolist()
    assert model.classes_[model.predict_proba(images).argmax(1)].tolist() == model.predict(images).tolist()


LABELS = {
    "text": ["é", "cat", "Zoë x"],
    "numbers": [7, -3, 100],
    "unsigned": np.array([7, 3, 200], np.uint8),
    "booleans": [True, False],
    "floats": [2.0, -0.0, 1e9],
    "objects": np.array(["b", "a", "c"], dtype=object),
    "tensor": torch.tensor([3, 1, 2]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_type_come_back_also_from_a_file(kind, tmp_path):
    chosen = LABELS[kind]
    few = FIRST[1] < len(chosen)
    images, columns = FIRST[0][few], FIRST[1][few]
    y = chosen[torch.from_numpy(columns)] if kind == "tensor" else [chosen[column] for column in columns]
    plain = [value.item() if hasattr(value, "item") else value for value in y]
    model = classifier().fit(images, y)
    model.save(tmp_path / "kept.lamina")
    for one in (model, ContinualClassifier.load(tmp_path / "kept.lamina")):
        assert one.classes_.tolist() == sorted(set(plain))
        assert {type(value) for value in one.classes_.tolist()} == {type(value) for value in plain}
        assert one.predict(images).tolist() == plain
        assert one.score(images, y) == 1
        assert "-0.0" not in one.model_.classes


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (FIRST[1][:-1], "y must have a label for each image; got 14 for 15 images"),
        ([1] * 14 + ["1"], "labels must be {}; got int and text"),
        ([1] * 14 + [True], "labels must be {}; got bool and int"),
        ([b"a"] * 15, "labels must be {}; got bytes"),
        ([None] + [1] * 14, "y must have a label for each image; got NaN or None"),
        ([float("nan")] + [1.0] * 14, "y must have a label for each image; got NaN or None"),
        (
            [0.5] * 15,
            "Unknown label type: continuous. Floats must be classes, without a fraction and at most 2**53; got 0.5",
        ),
        (
            [float("inf")] * 15,
            "Unknown label type: continuous. Floats must be classes, without a fraction and at most 2**53; got inf",
        ),
        ([""] * 15, "labels must have 1 to 255 characters that can be printed; got 0, beginning ''"),
        (["a\n"] * 15, r"labels must have 1 to 255 characters that can be printed; got 2, beginning 'a\n'"),
        (
            ["x" * 256] * 15,
            f"labels must have 1 to 255 characters that can be printed; got 256, beginning '{'x' * 20}'",
        ),
        (np.zeros((15, 2), int), "y should be a 1d array, got an array of shape (15, 2) instead."),
        (None, "ContinualClassifier requires y to be passed, but the target y is None; only a Dataset brings labels"),
    ],
)
def test_labels_that_cannot_be_are_refused(y, message):
    rule = "all whole numbers, all text, all booleans or all floats without a fraction"
    assert words(classifier().fit, FIRST[0], y) == message.format(rule)


def test_a_column_of_labels_is_taken_with_a_warning():
    with pytest.warns(DataConversionWarning):
        assert classifier().fit(FIRST[0], FIRST[1][:, None]).classes_.tolist() == [0, 1, 2]


def test_labels_stay_of_one_type():
    model = classifier().fit(*FIRST)
    message = words(model.partial_fit, SECOND[0], SECOND[1].astype(float))
    assert message == "labels must be int, as those learned so far; got float"
    assert model.fit(SECOND[0], SECOND[1].astype(float)).classes_.tolist() == [3.0, 4.0, 5.0]


def test_known_classes_are_refused_unless_they_are_to_be_extended():
    model, y = classifier().fit(*FIRST), np.where(SECOND[1] == 3, 1, SECOND[1])
    assert words(model.partial_fit, SECOND[0], y, error=ConfigError) == (
        "the model knows 1 already; rename what is new, or give known classes further examples with existing='extend'"
    )
    assert model.classes_.tolist() == [0, 1, 2]
    model.set_params(existing="extend").partial_fit(SECOND[0], y)
    assert model.classes_.tolist() == [0, 1, 2, 4, 5] and model.lessons_[1]["columns"] == [1, 3, 4]


def test_announced_classes_are_a_check_and_make_no_column():
    model = classifier().partial_fit(*FIRST, classes=[0, 1, 2, 3])
    assert model.classes_.tolist() == [0, 1, 2]
    assert words(model.partial_fit, *SECOND, classes=[4, 5]) == "y must have labels of `classes` alone; got 3"
    message = words(model.partial_fit, *SECOND, classes=["3", "4", "5"])
    assert message == "y must have labels of `classes` alone; got 3, 4, 5"


# ── images ───────────────────────────────────────────────────────────────────────────────────────────


class Pairs(Dataset):
    """A Dataset that counts how often it is asked."""

    def __init__(self, *columns):
        self.columns, self.asked = columns, 0

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        self.asked += 1
        return tuple(column[index] for column in self.columns) if len(self.columns) > 1 else self.columns[0][index]


def ways(images, paths):
    """Give the same pictures (n, h, w, 3) in every way there is."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    return {
        "paths": paths,
        "array of paths": np.array([str(path) for path in paths]),
        "pictures": [Image.fromarray(image) for image in images],
        "opened files": [Image.open(path) for path in paths],
        "arrays": list(images),
        "tensors": tuple(tensor),
        "array": images,
        "another layout": np.asfortranarray(images),
        "int64": images.astype(np.int64),
        "float32": (images / 255).astype(np.float32),
        "float64": images / 255,
        "tensor": tensor,
        "float tensor": tensor / 255,
        "dataset": Pairs([Image.fromarray(image) for image in images]),
        "labelled dataset": TensorDataset(tensor, torch.arange(len(images))),
    }


@pytest.mark.parametrize(("height", "width"), [(24, 40), (300, 270)])
def test_a_picture_gets_the_same_answer_in_whatever_way_it_is_given(height, width, tmp_path):
    images, _ = pictures(0, each=1, height=height, width=width)
    for place, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    expected = taught().predict_proba(paths)
    for way, given in ways(images, paths).items():
        np.testing.assert_array_equal(taught().predict_proba(given), expected, err_msg=way)
    assert len(np.unique(expected)) == 18


def test_grey_pictures_get_the_same_answer_in_whatever_way_they_are_given():
    images = FIRST[0][..., 0]
    tensor = torch.from_numpy(images)
    expected = taught().predict_proba(np.stack([images] * 3, axis=-1))
    given = [
        images,
        images[..., None],
        list(images),
        tensor[:, None],
        list(tensor[:, None]),
        tensor[:, None].bfloat16() / 255,
    ]
    for way in (*given[:5], [Image.fromarray(image) for image in images]):
        np.testing.assert_array_equal(taught().predict_proba(way), expected)
    # bfloat16 is read, though it has fewer digits than a byte
    np.testing.assert_allclose(taught().predict_proba(given[5]), expected, atol=0.3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "I;16"])
def test_opened_and_turned_pictures_are_read_as_their_files_are(mode, tmp_path):
    image, path = Image.fromarray(pictures(0, height=330, width=270)[0][1]), tmp_path / "turned.png"
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
        if "A" in mode:
            image.putalpha(Image.fromarray(np.arange(330 * 270).reshape(330, 270).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    opened = Image.open(path)
    np.testing.assert_array_equal(taught().predict_proba([opened]), taught().predict_proba([path]))
    assert opened.mode == mode and opened.size == (270, 330) and opened.getexif()[0x0112] == 6
    assert (taught().predict_proba([image]) != taught().predict_proba([opened])).any()


def test_the_same_is_learned_in_whatever_way_pictures_are_given(files):
    model = prompted().fit(*FIRST)
    for way, given in ways(FIRST[0], files).items():
        if way in ("paths", "another layout", "float tensor", "dataset"):
            other = prompted().fit(given, FIRST[1])
            assert_learned_the_same(model, other)
            assert other.lessons_[0]["accuracy"] == model.lessons_[0]["accuracy"]


def test_large_pictures_teach_the_same_as_files(tmp_path):
    images, y = pictures(0, each=2, height=290, width=260)
    paths = [tmp_path / f"{place}.png" for place in range(6)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    model = classifier().fit(paths, y)
    assert_learned_the_same(model, classifier().fit(images, y))
    assert_learned_the_same(model, classifier().fit(torch.from_numpy(images).permute(0, 3, 1, 2), y))


@pytest.mark.parametrize(("height", "shrunk"), [(300, 3), (40, 0)])
def test_large_pictures_are_shrunk_once_and_small_ones_not_held(height, shrunk, monkeypatch):
    images, y = pictures(0, each=1, height=height, width=300)
    calls, upright = [], reading.upright
    monkeypatch.setattr(reading, "upright", lambda image, size: calls.append(1) or upright(image, size))
    for way in (images, images / 255, torch.from_numpy(images).permute(0, 3, 1, 2)):
        kept = reading.given(way).kept(256)
        assert kept.image(1).shape[1:] == (min(height, 256), 256 if shrunk else 300)
        # as decoded files lie in memory, so that they are resized by the same kernel
        assert kept.image(1).is_contiguous() and kept.image(1).dtype == torch.uint8
        assert (kept.image(1) is kept.image(1)) == bool(shrunk)
        assert len(calls) == shrunk and not calls.clear()


def test_floats_are_rounded_to_the_nearest_byte():
    light = np.array([0, 0.4, 0.6, 100.4, 254.6, 255]).reshape(1, 2, 3) / 255
    for grey in (light[..., None], torch.from_numpy(light[:, None])):
        image = reading.given(grey).kept(256).image(0)
        assert image.tolist() == [[[0, 0, 1], [100, 255, 255]]] * 3


def test_the_audit_trail_tells_images_apart():
    def data(images):
        return classifier().fit(images, FIRST[1]).lessons_[0]["data"]

    changed = FIRST[0].copy()
    changed[3, 4, 5, 1] ^= 1
    assert data(FIRST[0]) == data(list(FIRST[0])) != data(changed)


def test_a_dataset_brings_its_labels_and_is_read_once():
    names = ["bee", "ant", "cat"]
    data = Pairs(FIRST[0], [names[column] for column in FIRST[1]])
    model = prompted().fit(data)
    assert data.asked == len(data) and model.classes_.tolist() == ["ant", "bee", "cat"]
    known = classifier().fit(data)
    assert known.score(data) == 1 and known.score(data, ["ant"] * 15) == pytest.approx(1 / 3)
    assert (
        classifier()
        .fit(TensorDataset(torch.from_numpy(FIRST[0]).permute(0, 3, 1, 2), torch.arange(15) % 3))
        .predict(FIRST[0])
        .tolist()
        == [0, 1, 2] * 5
    )


def test_labels_that_are_given_come_before_those_of_a_dataset():
    data = Pairs(FIRST[0], [None] * 15)
    assert classifier().fit(data, FIRST[1]).classes_.tolist() == [0, 1, 2]
    assert words(classifier().fit, data) == "y must have a label for each image; got NaN or None"


def test_a_dataset_without_labels_or_length_is_refused():
    message = words(classifier().fit, Pairs(FIRST[0]))
    assert message == "only 0 of 15 images brought a label; give labels as y"

    class Endless(IterableDataset):
        def __iter__(self):
            yield FIRST[0][0]

    assert words(classifier().fit, Endless()) == "X must be a Dataset with a length; got Endless"


MANY = "X must be many images; got one"
ROW = torch.zeros(3, 24, 40, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.png", f"{MANY} path, 'a.png': put it into a list"),
        (Image.new("RGB", (4, 4)), f"{MANY}: put it into a list"),
        (FIRST[0][0], f"{MANY} of shape (24, 40, 3): give it an axis of images, X[None]"),
        (ROW, f"{MANY} of shape (3, 24, 40): give it an axis of images, X[None], or one channel each, X[:, None]"),
        (np.zeros((5, 784)), f"X must be images; got an array of shape (5, 784); {TAKEN}"),
        (np.zeros((5, 3, 24, 40)), f"X must be images; got an array of shape (5, 3, 24, 40); {TAKEN}"),
        (np.zeros(5), f"X must be images; got an array of shape (5,); {TAKEN}"),
        (torch.zeros(5, 24, 40, 3), f"X must be images; got a tensor of shape (5, 24, 40, 3); {TAKEN}"),
        ({"a": 1}, f"X must be images, and a dict is none; {TAKEN}"),
        (["a.png", FIRST[0][0]], "X must be all paths or all images; got 1 paths among 2"),
        ([3], f"X[0] must be an image; got int; {TAKEN}"),
        (
            [FIRST[0][0], ROW[None]],
            "X[1] must have shape (3, height, width) or (1, height, width) and pixels; got (1, 3, 24, 40)",
        ),
        ([np.zeros((2, 4))[:0]], "X[0] must have shape (height, width, 3) or (height, width) and pixels; got (0, 4)"),
        (np.full((1, 4, 4), 256), "X[0] must have whole numbers from 0 to 255; got 256 to 256: {}"),
        (np.full((1, 4, 4), -1), "X[0] must have whole numbers from 0 to 255; got -1 to -1: {}"),
        (np.full((1, 4, 4), 1.5), "X[0] must have floats from 0 to 1; got 1.5 to 1.5: {}"),
        (np.full((1, 4, 4), -0.5), "X[0] must have floats from 0 to 1; got -0.5 to -0.5: {}"),
        (np.full((1, 4, 4), np.nan), "X[0] must have floats from 0 to 1; got NaN or inf"),
        (np.zeros((1, 4, 4), bool), "X[0] must have whole numbers or floats; got bool"),
    ],
)
def test_what_is_no_row_of_images_is_refused(given, message):
    expected = message.format("scale them, and leave normalisation to the model")
    assert words(taught().predict, given) == expected


@pytest.mark.parametrize("act", ["predict", "fit", "partial_fit"])
def test_a_file_that_cannot_be_read_is_named(act, files):
    files[3].write_bytes(b"GIF89a")
    model = copy.copy(taught())
    arguments = [files] if act == "predict" else [files, FIRST[1] + 9]
    assert words(getattr(model, act), *arguments) == (
        f"X[3], {files[3]}, cannot be read: it is a GIF image; JPEG, PNG, WEBP and BMP are read; mend it or leave "
        "it out"
    )


def test_a_picture_that_cannot_be_read_is_named(files):
    files[2].write_bytes(files[2].read_bytes()[:600])
    message = words(taught().predict, [Image.open(path) for path in files])
    assert message.startswith("X[2] cannot be read: ") and message.endswith("; mend it or leave it out")


@pytest.mark.parametrize("none", [[], np.zeros((0, 24, 40, 3), np.uint8), torch.zeros(0, 3, 24, 40)])
def test_no_images_get_no_answers(none):
    assert taught().predict(none).shape == (0,) and taught().predict(none).dtype == taught().classes_.dtype
    assert taught().predict_proba(none).shape == (0, 6) and taught().novelty(none).shape == (0,)
    assert words(classifier().fit, none, []) == "there is nothing to learn from: X has no image"


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["nearest-mean", "vpt-nsp2"])
def test_answers_do_not_depend_on_the_other_images(method, monkeypatch):
    model, images = taught(method), np.concatenate([FIRST[0], SECOND[0]])
    together, new = model.predict_proba(images), model.novelty(images)
    order = np.random.default_rng(0).permutation(30)
    for size in (1, 7, 64):
        monkeypatch.setattr("lamina.estimator._BATCH", size)
        np.testing.assert_allclose(model.predict_proba(images[order]), together[order], atol=1e-5)
        np.testing.assert_allclose(model.novelty(images[order]), new[order], atol=1e-3)
    np.testing.assert_allclose(model.predict_proba(images[4:5]), together[4:5], atol=1e-5)


def test_probabilities_sum_to_one_and_belong_to_the_classes():
    images, y = np.concatenate([FIRST[0], SECOND[0]]), np.concatenate([FIRST[1], SECOND[1]])
    said = taught().predict_proba(images)
    assert said.shape == (30, 6) and said.dtype == np.float64 and (said >= 0).all()
    np.testing.assert_allclose(said.sum(1), 1, rtol=1e-12)
    assert (taught().predict(images) == taught().classes_[said.argmax(1)]).all()
    assert taught().score(images, y) == np.mean(taught().predict(images) == y) >= 0.9


def test_the_default_method_learns_one_class_at_a_time_and_says_how_sure_it_is_and_what_is_new():
    (images, y), model = pictures(0, each=20), ContinualClassifier(precision="32", holdout=0.25)
    for label in (2, 0, 1):
        model.partial_fit(images[y == label], y[y == label])
    assert model.model_.method == "strata" and model.classes_.tolist() == [2, 0, 1]
    assert [lesson["drift"] and lesson["drift"]["old"] for lesson in model.lessons_] == [None, 0, 0]
    fresh, strange = pictures(0, each=4)[0], pictures(7)[0]
    said = model.predict_proba(fresh)
    assert (model.classes_[said.argmax(1)] == np.arange(12) % 3).mean() > 0.9
    assert said.max(1).min() > 0.5 and said.max() < 0.999
    assert np.median(model.novelty(fresh)) < 1 < model.novelty(strange).min()


def test_the_score_weighs_images():
    y = np.where(np.arange(15) < 5, FIRST[1], 5)
    assert taught().score(FIRST[0], y) == pytest.approx(1 / 3)
    assert taught().score(FIRST[0], y, sample_weight=(np.arange(15) < 5) * 1.0) == 1


def test_strange_pictures_look_new_and_known_ones_do_not():
    strange = np.random.default_rng(0).integers(0, 256, (8, 24, 40, 3)).astype(np.uint8)
    for score in ("mahalanobis", "energy"):
        known, new = taught().novelty(FIRST[0], score), taught().novelty(strange, score)
        assert known.shape == (15,) and known.dtype == np.float64
        assert np.median(known) < np.median(new)
    assert np.median(taught().novelty(FIRST[0])) < 1 < np.median(taught().novelty(strange))
    message = words(taught().novelty, strange, "x", error=ConfigError)
    assert message == "no novelty score is called 'x'. Known: energy, mahalanobis"


def test_without_images_held_out_novelty_is_a_distance():
    model = classifier(holdout=0).fit(*FIRST)
    assert model.lessons_[0]["held_out"] == 0 and (model.novelty(FIRST[0]) > 1).all()


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────


def test_images_are_kept_aside_by_their_place_in_the_call(monkeypatch):
    seen, learn = [], ContinualModel.learn
    monkeypatch.setattr(ContinualModel, "learn", lambda self, m, **more: seen.append(m) or learn(self, m, **more))
    y = np.array(["b", "a", "c"])[FIRST[1]]
    model = classifier(holdout=0.4, seed=3).fit(FIRST[0], y)
    aside = held_out((FIRST[1] == 0) + 2 * (FIRST[1] == 2), 0.4, 3, [str(place) for place in range(15)])
    assert seen[0].held.tolist() == np.flatnonzero(aside).tolist()
    assert seen[0].train.tolist() == np.flatnonzero(~aside).tolist() and list(seen[0].names) == ["a", "b", "c"]
    assert (model.lessons_[0]["images"], model.lessons_[0]["held_out"]) == (9, 6)
    assert model.set_params(seed=4).fit(FIRST[0], y) and seen[1].held.tolist() != seen[0].held.tolist()


def test_the_audit_trail_has_a_line_per_call():
    trail = taught().lessons_
    assert [lesson["classes"] for lesson in trail] == [["0", "1", "2"], ["3", "4", "5"]]
    assert [lesson["method"] for lesson in trail] == ["nearest-mean"] * 2 and trail[0]["base"] is None
    assert trail[1]["drift"] is not None


def test_fit_forgets_what_was_learned():
    model = prompted().fit(*SECOND)
    assert_learned_the_same(model, prompted().partial_fit(*FIRST).fit(*SECOND))
    assert model.classes_.tolist() == [3, 4, 5] and len(model.lessons_) == 1


def test_a_call_that_fails_changes_nothing(files):
    model = prompted().fit(*FIRST)
    before, state = learned(model), model.predict_proba(FIRST[0])
    model.set_params(settings={**model.settings, "lr": 1e30})
    words(model.partial_fit, *SECOND, error=TrainingError)
    words(model.fit, *SECOND, error=TrainingError)
    files[1].unlink()
    words(model.partial_fit, files, SECOND[1])
    words(model.fit, files, SECOND[1])
    words(model.partial_fit, SECOND[0], [3] * 15, error=ConfigError)
    words(model.partial_fit, SECOND[0], SECOND[1] - 1, error=ConfigError)
    assert len(model.lessons_) == 1 and all(torch.equal(learned(model)[name], before[name]) for name in before)
    np.testing.assert_array_equal(model.predict_proba(FIRST[0]), state)
    model.set_params(settings={**model.settings, "lr": 0.01}).partial_fit(*SECOND)
    assert_learned_the_same(model, prompted(lr=0.01).fit(*FIRST).partial_fit(*SECOND))


def test_a_first_call_that_fails_leaves_nothing_learned():
    model = prompted(lr=1e30)
    words(model.partial_fit, *FIRST, error=TrainingError)
    assert not model.__sklearn_is_fitted__() and not hasattr(model, "model_")


@pytest.mark.parametrize(
    ("parameter", "had"),
    [({"method": "vpt-nsp2"}, "'nearest-mean'"), ({"seed": 1}, "0"), ({"augmentation": "flip"}, "'crop-flip'")],
)
def test_what_the_model_was_begun_with_stays(parameter, had):
    model = classifier().fit(*FIRST).set_params(**parameter)
    (name, value), *_ = parameter.items()
    assert words(model.partial_fit, *SECOND, error=ConfigError) == (
        f"the model was begun with {name} {had} and keeps it; got {value!r}. Use fit, or another model"
    )
    assert model.fit(*SECOND).classes_.tolist() == [3, 4, 5]


def test_settings_of_training_may_change_and_the_others_stay():
    model = prompted().fit(*FIRST).set_params(settings={"epochs": 2}).partial_fit(*SECOND)
    settings = model.model_.settings
    assert (settings.epochs, settings.batch_size, settings.length) == (2, 7, 3)
    message = words(model.set_params(settings={"length": 5}).partial_fit, *pictures(6), error=ConfigError)
    assert message.startswith("length=3 shapes what was learned and has to stay: ")


def test_generators_of_random_numbers_are_left_as_they_were(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    model = prompted().partial_fit(*FIRST).partial_fit(*SECOND)
    model.predict(FIRST[0])
    model.save(tmp_path / "kept")
    pickle.loads(pickle.dumps(ContinualClassifier.load(tmp_path / "kept")))
    assert states() == before
    torch.manual_seed(99)
    assert_learned_the_same(model, prompted().partial_fit(*FIRST).partial_fit(*SECOND))


def test_learning_changes_no_image_and_leaves_no_file(tmp_path, monkeypatch, files):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    images = FIRST[0].copy()
    classifier().fit(images, FIRST[1]).predict(images)
    words(classifier().fit, images, FIRST[1] / 2)
    classifier().fit(files, FIRST[1])
    assert (images == FIRST[0]).all() and not list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "cache").exists()


# ── keeping ──────────────────────────────────────────────────────────────────────────────────────────


def through_file(model, folder):
    model.save(folder / "kept.lamina")
    return ContinualClassifier.load(str(folder / "kept.lamina"))


def through_joblib(model, folder):
    joblib.dump(model, folder / "kept.joblib")
    return joblib.load(folder / "kept.joblib")


KEEPING = {
    "file": through_file,
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "copy": lambda model, folder: copy.deepcopy(model),
    "joblib": through_joblib,
}


@pytest.mark.parametrize("way", KEEPING)
def test_a_model_that_was_kept_answers_and_learns_on_as_if_nothing_had_happened(way, tmp_path):
    model = prompted().fit(*FIRST)
    kept = KEEPING[way](model, tmp_path)
    np.testing.assert_array_equal(kept.predict_proba(SECOND[0]), model.predict_proba(SECOND[0]))
    np.testing.assert_array_equal(kept.novelty(SECOND[0]), model.novelty(SECOND[0]))
    kept.partial_fit(*SECOND)
    assert len(model.lessons_) == 1 and model.classes_.tolist() == [0, 1, 2]
    model.partial_fit(*SECOND)
    model.save(tmp_path / "a")
    kept.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_pickle_holds_no_backbone_and_an_empty_one_works():
    assert len(pickle.dumps(taught())) < sum(4 * p.numel() for p in taught().model_.backbone.tower.parameters())
    assert pickle.loads(pickle.dumps(prompted())).get_params() == prompted().get_params()


def test_parameters_come_back_from_a_file(tmp_path):
    model = prompted().set_params(seed=5, augmentation="flip", backbone="tiny").fit(*FIRST)
    model.save(tmp_path / "kept")
    loaded = ContinualClassifier.load(tmp_path / "kept", existing="extend", holdout=0.3)
    expected = {**model.get_params(), "existing": "extend", "holdout": 0.3, "settings": loaded.settings}
    assert loaded.get_params() == expected and loaded.settings["epochs"] == 1
    assert clone(loaded).fit(*FIRST).model_.settings == model.model_.settings


def test_every_lesson_names_the_file_that_it_was_learned_upon(tmp_path):
    model = classifier().fit(*FIRST)
    model.save(tmp_path / "first")
    model.partial_fit(*SECOND)
    assert model.lessons_[1]["base"] == ModelFile.read(tmp_path / "first").checksum


def test_the_command_line_says_the_same_of_a_kept_model(tmp_path, files):
    model = classifier().fit(FIRST[0], np.array(["bee", "ant", "cat"])[FIRST[1]])
    model.save(tmp_path / "kept")
    said = list(predict(ContinualModel.load(tmp_path / "kept"), [str(path) for path in files], top=3))
    assert [one.top[0][0] for one in said] == model.predict(files).tolist()
    rows = [[dict(one.top)[name] for name in model.classes_] for one in said]
    np.testing.assert_allclose(rows, model.predict_proba(files), rtol=1e-6)
    for score in ("mahalanobis", "energy"):
        said = predict(ContinualModel.load(tmp_path / "kept"), [str(path) for path in files], score=score)
        np.testing.assert_allclose([one.novelty for one in said], model.novelty(files, score), rtol=1e-6)


def folder(root, names):
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(SECOND[0][3 * number + place]).save(root / name / f"{number}.png")
    return root


def test_a_file_of_the_command_line_has_labels_that_are_text(tmp_path):
    learn_folder(tmp_path / "kept", folder(tmp_path / "shop", ["1", "2", "cup"]), method="nearest-mean", precision="32")
    model = ContinualClassifier.load(tmp_path / "kept")
    assert model.classes_.tolist() == ["1", "2", "cup"]
    assert model.score(SECOND[0], np.array(["1", "2", "cup"])[SECOND[1] - 3]) == 1
    assert model.partial_fit(FIRST[0], list(np.array(["x", "y", "z"])[FIRST[1]])).classes_.tolist()[3:] == [
        "x",
        "y",
        "z",
    ]


@pytest.mark.parametrize("names", [["007", "12"], ["12", "cup"]])
def test_labels_are_text_where_the_names_of_classes_are_not_those_of_numbers(names, tmp_path):
    learn_folder(tmp_path / "kept", folder(tmp_path / "shop", names), method="nearest-mean", precision="32")
    file = ModelFile.read(tmp_path / "kept")
    file.run["labels"] = "int"
    file.write(tmp_path / "kept")
    assert ContinualClassifier.load(tmp_path / "kept").classes_.tolist() == names


def test_what_a_file_says_of_its_labels_is_not_believed_blindly(tmp_path):
    model = classifier().fit(*FIRST)
    for said in ("bool", "dict", 3, ["int"], {"a": 1}, None):
        file = model._file()
        file.run["labels"] = said
        file.write(tmp_path / "kept")
        assert ContinualClassifier.load(tmp_path / "kept").classes_.tolist() == ["0", "1", "2"]
    (tmp_path / "kept").write_bytes(b"?")
    (tmp_path / "kept.bak").unlink()
    words(ContinualClassifier.load, tmp_path / "kept", error=ModelFileError)


def test_the_defaults_are_those_that_are_written_down():
    parameters = inspect.signature(ContinualClassifier).parameters.values()
    assert {p.name: p.default for p in parameters if p.name in ("method", "holdout", "existing")} == {
        "method": "strata",
        "holdout": 0.1,
        "existing": "refuse",
    }
