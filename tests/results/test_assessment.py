"""An assessment: numbers against their definitions, rows for a terminal, and a page that no name can break."""

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from lamina.errors import DataError, ShapeError, StorageError
from lamina.results.assessment import (
    Assessment,
    assess,
    reliability_lines,
    rows_classes,
    rows_confusions,
    rows_overview,
    rows_tasks,
)
from lamina.results.assessment_page import page, write_page

EVIL = "<script>alert('x')</script>\"&"
NAMES = ["ant", "bee", "cat", "dog"]
#: 6 images, 4 classes: what is right can be counted by hand
LABELS = np.array([0, 0, 1, 1, 1, 3])
PROBABILITIES = np.array(
    [
        [0.7, 0.1, 0.1, 0.1],  # ant: right
        [0.2, 0.5, 0.2, 0.1],  # ant: taken for a bee
        [0.1, 0.8, 0.05, 0.05],  # bee: right
        [0.3, 0.25, 0.4, 0.05],  # bee: taken for a cat
        [0.05, 0.1, 0.8, 0.05],  # bee: taken for a cat
        [0.05, 0.6, 0.05, 0.3],  # dog: taken for a bee
    ]
)


def made(**changes):
    """Return an assessment of the six images; `changes` replace arguments."""
    given = dict(
        model={"file": "garden.safetensors", "method": "vpt-nsp2", "lessons": [{"name": "first", "images": 1200}]},
        protocol={"images": 6, "skipped_images": 0, "precision": "bfloat16", "test_batch": "independent"},
        classes=NAMES,
        class_tasks=[0, 0, 2, 2],
        task_names=["insects", None, "mammals"],
        labels=LABELS,
        probabilities=PROBABILITIES,
    )
    return assess(**{**given, **changes})


def drawn(images, classes, seed=0, sharp=2.0):
    """Return random labels and probabilities, better than chance, in float32 as a model has them."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, images)
    scores = draw.normal(size=(images, classes))
    scores[np.arange(images), labels] += 1.0
    return labels, torch.from_numpy(sharp * scores).float().softmax(dim=1).numpy()


def many(images, classes, **changes):
    labels, probabilities = drawn(images, classes)
    names = [f"class {column}" for column in range(classes)]
    return made(
        classes=names,
        class_tasks=[0] * classes,
        task_names=[None],
        labels=labels,
        probabilities=probabilities,
        **changes,
    )


def text_of(written):
    """What a reader sees, in one line with plain spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", written.split("</style>")[1])).split())


class Nested(HTMLParser):
    """Collects the elements of a page and fails when they do not nest."""

    def __init__(self, written):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), []
        self.feed(written)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


# ── numbers ────────────────────────────────────────────────────────────────────────────────────────


def test_accuracies_over_images_and_over_classes_are_counted_apart():
    """Ants 1 of 2, bees 1 of 3, dogs 0 of 1; there is no cat, and it has no part in the mean."""
    assessment = made()
    assert assessment.accuracy == pytest.approx(2 / 6)
    assert assessment.accuracy_per_class_mean == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert assessment.images == 6


def test_a_class_says_what_it_is_taken_for_and_how_far_its_name_can_be_trusted():
    ant, bee, _, dog = made().classes
    assert ant == {
        "name": "ant",
        "task": 1,
        "images": 2,
        "accuracy": 0.5,
        "predicted": 1,
        "precision": 1.0,
        "mean_probability": pytest.approx(0.45),
        "most_confused_with": "bee",
        "confused_images": 1,
    }
    assert (bee["most_confused_with"], bee["confused_images"]) == ("cat", 2)
    assert (bee["predicted"], bee["precision"]) == (3, pytest.approx(1 / 3))
    assert (dog["accuracy"], dog["predicted"], dog["precision"]) == (0.0, 0, None)


def test_a_class_without_images_is_not_measured():
    cat = made().classes[2]
    unmeasured = [cat[name] for name in ("accuracy", "precision", "mean_probability", "most_confused_with")]
    assert (cat["images"], cat["predicted"], unmeasured) == (0, 2, [None] * 4)


def test_a_class_that_is_always_right_is_taken_for_nothing():
    assessment = made(labels=np.array([0, 1]), probabilities=PROBABILITIES[[0, 2]])
    assert [each["most_confused_with"] for each in assessment.classes] == [None] * 4
    assert assessment.confusions == []


def test_tasks_hold_the_classes_that_first_came_with_them():
    assert made().tasks == [
        {"task": 1, "name": "insects", "classes": 2, "images": 5, "accuracy": pytest.approx(2 / 5)},
        {"task": 2, "name": None, "classes": 0, "images": 0, "accuracy": None},
        {"task": 3, "name": "mammals", "classes": 2, "images": 1, "accuracy": 0.0},
    ]


def test_confusions_are_sorted_by_images_then_by_share():
    pairs = [(each["true"], each["predicted"], each["count"], each["share"]) for each in made().confusions]
    assert pairs == [("bee", "cat", 2, pytest.approx(2 / 3)), ("dog", "bee", 1, 1.0), ("ant", "bee", 1, 0.5)]


def test_the_confusion_matrix_has_true_classes_in_rows():
    assert made().confusion_matrix == [[1, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_at_most_20_pairs_are_kept_and_no_matrix_above_40_classes():
    assert len(many(900, 40).confusion_matrix) == 40
    above = many(900, 41)
    assert above.confusion_matrix is None
    assert len(above.confusions) == 20


def test_top_k_counts_the_five_likeliest_or_all_of_fewer():
    assert made().top_k == {"k": 4, "accuracy": 1.0}
    labels, probabilities = drawn(300, 11)
    five = np.argsort(-probabilities, axis=1)[:, :5]
    top = many(300, 11).top_k
    assert top == {"k": 5, "accuracy": pytest.approx(np.mean([y in row for y, row in zip(labels, five, strict=True)]))}
    assert 0.5 < top["accuracy"] < 1


def test_equal_probabilities_name_the_first_class_only():
    """Two images, all classes alike: the one of the first class is right; the five likeliest are the first five."""
    flat = np.full((2, 8), 1 / 8)
    given = dict(classes=list("abcdefgh"), class_tasks=[0] * 8, task_names=[None], probabilities=flat)
    assessment = made(labels=np.array([0, 5]), **given)
    assert (assessment.accuracy, assessment.top_k["accuracy"]) == (0.5, 0.5)
    assert assessment.confusions[0]["predicted"] == "a"


@pytest.mark.parametrize("sharp", [0.5, 2.0, 6.0])
def test_calibration_errors_agree_with_torchmetrics_and_with_the_bins(sharp):
    labels, probabilities = drawn(700, 7, seed=3, sharp=sharp)
    probabilities = np.minimum(probabilities, np.float32(1 - 1e-6))  # what it does with exactly 1 is another test
    given = dict(classes=list("abcdefg"), class_tasks=[0] * 7, task_names=[None])
    calibration = made(labels=labels, probabilities=probabilities, **given).calibration
    bins = [each for each in calibration["bins"] if each["images"]]
    gaps = [abs(each["accuracy"] - each["confidence"]) for each in bins]
    weights = [each["images"] / 700 for each in bins]
    for name, norm, own in (("ece", "l1", np.dot(weights, gaps)), ("mce", "max", max(gaps))):
        theirs = multiclass_calibration_error(
            torch.from_numpy(probabilities), torch.from_numpy(labels), num_classes=7, n_bins=15, norm=norm
        )
        assert calibration[name] == pytest.approx(float(theirs), abs=1e-6)
        assert calibration[name] == pytest.approx(own, abs=1e-6)
    assert sum(each["images"] for each in bins) == 700


def test_there_are_15_equal_bins_and_each_holds_its_lower_edge():
    """0.2 is the third edge and 0.6 the ninth, although neither is a sum of floats."""
    probabilities = np.array([[0.6, 0.4, 0, 0, 0], [0.2] * 5, [0.0, 0.19, 0.0, 0.59, 0.22]])
    given = dict(classes=list("abcde"), class_tasks=[0] * 5, task_names=[None])
    bins = made(labels=np.array([0, 1, 3]), probabilities=probabilities, **given).calibration["bins"]
    assert [each["low"] for each in bins] == pytest.approx([place / 15 for place in range(15)])
    assert [each["high"] for each in bins] == pytest.approx([place / 15 for place in range(1, 16)])
    assert {place: each["images"] for place, each in enumerate(bins) if each["images"]} == {3: 1, 8: 1, 9: 1}
    assert (bins[3]["accuracy"], bins[9]["accuracy"], bins[0]["accuracy"]) == (0.0, 1.0, None)
    assert (bins[9]["confidence"], bins[0]["confidence"]) == (pytest.approx(0.6), None)


def test_a_confidence_of_one_belongs_to_the_last_bin():
    """Two images, sure to 100 % and wrong, to 95 % and right: one bin, and an error of |1/2 - 0.975|."""
    probabilities = np.array([[1.0, 0.0, 0.0, 0.0], [0.95, 0.05, 0.0, 0.0]], dtype=np.float32)
    calibration = made(labels=np.array([1, 0]), probabilities=probabilities).calibration
    assert calibration["bins"][-1]["images"] == 2
    assert calibration["ece"] == pytest.approx(0.475, abs=1e-6)
    assert calibration["mce"] == pytest.approx(0.475, abs=1e-6)


def test_brier_score_and_likelihood_follow_their_definitions():
    calibration = made().calibration
    squares = (PROBABILITIES - np.eye(4)[LABELS]) ** 2
    assert calibration["brier"] == pytest.approx(squares.sum(axis=1).mean())
    assert calibration["nll"] == pytest.approx(-np.mean(np.log([0.7, 0.2, 0.8, 0.25, 0.1, 0.3])))
    assert calibration["confidence"] == pytest.approx(np.mean([0.7, 0.5, 0.8, 0.4, 0.8, 0.6]))


def test_a_probability_of_zero_leaves_the_likelihood_finite():
    calibration = made(labels=np.array([1]), probabilities=np.array([[1.0, 0.0, 0.0, 0.0]])).calibration
    assert calibration["nll"] == pytest.approx(-math.log(np.finfo(np.float32).tiny))


def test_a_model_of_one_class_can_be_assessed():
    assessment = made(
        classes=["ant"], class_tasks=[0], task_names=[None], labels=np.zeros(3, int), probabilities=np.ones((3, 1))
    )
    assert (assessment.accuracy, assessment.calibration["ece"]) == (1.0, pytest.approx(0))
    Nested(page(assessment))


# ── novelty ────────────────────────────────────────────────────────────────────────────────────────

KNOWN = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 60.0])


def novel(known=KNOWN, unknown=(4.5, 50.0, 70.0), **changes):
    unknown = {"distance": np.array(unknown)}
    return made(novelty={"distance": np.asarray(known)}, unknown_novelty=unknown, **changes).novelty


def test_auroc_is_the_share_of_pairs_in_which_the_unknown_image_scores_higher():
    """Of 18 pairs, 4.5 beats 4, 50 beats 5 and 70 all 6. Large scores are told apart like small ones."""
    for scale in (1.0, 0.001, 1000.0):
        scores = novel(KNOWN * scale, np.array([4.5, 50.0, 70.0]) * scale)
        assert scores["distance"]["auroc"] == pytest.approx(15 / 18)
    assert novel([1.0] * 6, [1.0])["distance"]["auroc"] == pytest.approx(0.5)


def test_false_alarms_are_counted_where_95_percent_of_the_unknown_are_found():
    """Of 20 unknown images, 19 must be found: the one at 0 may be missed, the one at 3 may not."""
    unknown = np.array([0.0, 3.0, *range(10, 28)])
    scores = novel(unknown=unknown)["distance"]
    assert scores["fpr95"] == pytest.approx(4 / 6)
    assert (scores["known"], scores["unknown"]) == (6, 20)


def test_an_image_is_flagged_above_the_threshold():
    scores = novel(thresholds={"distance": 50.0})["distance"]
    assert scores["threshold"] == 50.0
    assert (scores["flagged_known"], scores["flagged_unknown"]) == (pytest.approx(1 / 6), pytest.approx(1 / 3))
    at = novel(thresholds={"distance": 60.0})["distance"]
    assert (at["flagged_known"], at["flagged_unknown"]) == (0.0, pytest.approx(1 / 3))


def test_without_a_threshold_nothing_is_flagged():
    scores = novel()["distance"]
    assert [scores[name] for name in ("threshold", "flagged_known", "flagged_unknown")] == [None] * 3


def test_histograms_share_20_bins_over_all_scores():
    histogram = novel()["distance"]["histogram"]
    assert (histogram["low"], histogram["high"]) == (1.0, 70.0)
    assert (len(histogram["known"]), sum(histogram["known"])) == (20, 6)
    assert (len(histogram["unknown"]), sum(histogram["unknown"]), histogram["unknown"][-1]) == (20, 3, 1)
    assert histogram["known"][:2] == [4, 1]


@pytest.mark.parametrize("unknown", [None, {}, {"distance": np.zeros(0)}])
def test_novelty_is_left_out_without_images_of_unknown_classes(unknown):
    assert made(novelty={"distance": KNOWN}, thresholds={"distance": 2.0}, unknown_novelty=unknown).novelty is None


# ── uncertainty ────────────────────────────────────────────────────────────────────────────────────


def test_uncertainty_is_averaged_over_right_wrong_and_unknown_images_apart():
    values, strange = np.array([0.1, 1.0, 0.3, 2.0, 3.0, 4.0]), np.array([5.0, 6.0, 9.0])
    found = made(uncertainty={"entropy": values}, unknown_uncertainty={"entropy": strange}).uncertainty
    assert found["entropy"] == pytest.approx({"right": 0.2, "wrong": 2.5, "unknown": 20 / 3})
    alone = made(uncertainty={"entropy": values}).uncertainty
    assert alone["entropy"]["unknown"] is None and made().uncertainty is None


def test_uncertainty_is_told_in_rows_and_on_the_page():
    told = made(uncertainty={"mutual_information": np.arange(6) / 10})
    row = {row["measure"]: row["value"].strip() for row in rows_overview(told)}
    assert row["mutual information: right / wrong / unknown (nats)"] == "0.10 / 0.33 / –"
    assert "Is it unsure where it is wrong?" in page(told) and "<td>0.325</td>" in page(told)
    assert "Is it unsure where it is wrong?" not in page(made())


def test_an_assessment_from_before_uncertainty_was_measured_is_read():
    values = made().as_dict()
    del values["uncertainty"]
    assert Assessment.from_dict(values).uncertainty is None


def test_uncertainty_of_another_number_of_images_is_refused():
    with pytest.raises(ShapeError, match=r"uncertainty 'entropy' must be flat, with 6 images; got \(5,\)"):
        made(uncertainty={"entropy": np.ones(5)})


# ── what is refused ────────────────────────────────────────────────────────────────────────────────


def broken(place, value):
    probabilities = PROBABILITIES.copy()
    probabilities[place] = value
    return probabilities


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"labels": np.zeros(0, int), "probabilities": np.zeros((0, 4))},
            DataError,
            "an assessment needs at least one image of a class that the model knows; got none",
        ),
        (
            {"probabilities": PROBABILITIES[:, :3]},
            ShapeError,
            "probabilities must be (B, C) = (6, 4) for 6 labels and 4 classes; got (6, 3)",
        ),
        ({"class_tasks": [0, 0, 1]}, ShapeError, "class_tasks must have a task for each of 4 classes; got 3"),
        ({"class_tasks": [0, 0, 1, 3]}, ValueError, "class_tasks must be from 0 to 2; got 3"),
        ({"labels": np.array([0, 0, 1, 1, 1, 4])}, ValueError, "labels must be from 0 to 3; got 4"),
        ({"labels": np.array([0, 0, -1, 1, 1, 3])}, ValueError, "labels must be from 0 to 3; got -1"),
        ({"probabilities": broken((2, 1), np.nan)}, ValueError, "probabilities must be finite; got nan or infinity"),
        (
            {"probabilities": broken((2, 1), 0.7)},
            ValueError,
            "probabilities must be at least 0 and sum to 1; got 0.05 and a sum of 0.9",
        ),
        (
            {"probabilities": broken(2, [1.2, -0.2, 0, 0])},
            ValueError,
            "probabilities must be at least 0 and sum to 1; got -0.2 and a sum of 1",
        ),
        (
            {"novelty": {"a": KNOWN}, "unknown_novelty": {"b": KNOWN}},
            ValueError,
            "novelty 'a' was not measured on images of unknown classes",
        ),
        (
            {"novelty": {"a": KNOWN}, "unknown_novelty": {"a": KNOWN}, "thresholds": {"b": 1.0}},
            ValueError,
            "there is a threshold for 'b', which was not measured",
        ),
        (
            {"novelty": {"a": KNOWN[:5]}, "unknown_novelty": {"a": KNOWN}},
            ShapeError,
            "novelty 'a' must be flat, with 6 known; got (5,) and (6,)",
        ),
        (
            {"novelty": {"a": KNOWN}, "unknown_novelty": {"a": np.array([np.inf])}},
            ValueError,
            "novelty 'a' must be finite; got nan or infinity",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, kind, message):
    with pytest.raises(kind) as error:
        made(**changes)
    assert str(error.value) == message


def test_probabilities_of_half_precision_are_taken():
    labels, probabilities = drawn(50, 4)
    assert made(labels=labels, probabilities=probabilities.astype(np.float16)).images == 50


# ── files ──────────────────────────────────────────────────────────────────────────────────────────


def full():
    given = {"distance": np.array([4.5, 50.0, 70.0])}
    return made(novelty={"distance": KNOWN}, thresholds={"distance": 50.0}, unknown_novelty=given)


def test_what_is_written_is_read_back(tmp_path):
    assessment = full()
    assessment.write(tmp_path / "assessment.json")
    assert Assessment.read(tmp_path / "assessment.json") == assessment
    assert json.loads((tmp_path / "assessment.json").read_text(encoding="utf-8")) == assessment.as_dict()


def test_names_that_are_not_utf_8_are_written_with_escapes(tmp_path):
    assessment = made(classes=["Äpfel", "b\udcffd", "c", "d"], model={"file": "m\udcff"})
    assessment.write(tmp_path / "assessment.json")
    again = Assessment.read(tmp_path / "assessment.json")
    assert [each["name"] for each in again.classes] == ["Äpfel", "b\\udcffd", "c", "d"]
    assert "Äpfel" in (tmp_path / "assessment.json").read_text(encoding="utf-8")
    write_page(again, tmp_path / "page.html")


def test_what_json_cannot_hold_is_refused(tmp_path):
    for value in (math.nan, {1, 2}):
        with pytest.raises(DataError, match=r"^Assessment\.model cannot be written as JSON: "):
            made(model={"rate": value}).write(tmp_path / "assessment.json")
    assert not (tmp_path / "assessment.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=2), "version must be 1, the one this lamina reads; got 2"),
        (lambda v: v.pop("version"), "version must be 1, the one this lamina reads; got none"),
        (lambda v: v.pop("accuracy"), "a field is missing: accuracy"),
        (lambda v: v.update(zeal=3), "a field is unknown: zeal"),
        (lambda v: v["classes"][1].pop("name"), "a field is missing: classes.1.name"),
        (lambda v: v["calibration"].update(extra=3), "a field is unknown: calibration.extra"),
        (lambda v: v["tasks"][0].update(accuracy=1.5), "tasks.0.accuracy must be less than or equal to 1; got 1.5"),
        (lambda v: v["classes"][0].update(images=2.5), "classes.0.images must be a valid integer; got 2.5"),
        (
            lambda v: v["novelty"]["distance"].update(auroc="high"),
            "novelty.distance.auroc must be a valid number; got 'high'",
        ),
        (
            lambda v: v["confusion_matrix"][2].pop(),
            "confusion_matrix must have a row and a column for each of 4 classes",
        ),
    ],
)
def test_a_file_that_is_no_assessment_says_where(tmp_path, change, message):
    values = full().as_dict()
    values = json.loads(json.dumps(values))
    change(values)
    path = tmp_path / "assessment.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DataError) as error:
        Assessment.read(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_list_is_no_assessment():
    with pytest.raises(DataError) as error:
        Assessment.from_dict([1])
    assert str(error.value) == "an assessment is an object with named fields; got list"


# ── terminal ───────────────────────────────────────────────────────────────────────────────────────


def test_the_overview_leaves_out_what_could_not_be_otherwise():
    rows = {row["measure"]: row["value"].strip() for row in rows_overview(full())}
    assert rows == {
        "images": "6",
        "accuracy (%)": "33.3",
        "mean accuracy of classes (%)": "27.8",
        "mean confidence (%)": "63.3",
        "ECE (%)": "40.0",
        "MCE (%)": "60.0",
        "Brier score": "0.707",
        "negative log-likelihood": "1.180",
        "distance: AUROC (%)": "83.3",
        "distance: FPR at 95 % found (%)": "33.3",
        "distance: known flagged (%)": "16.7",
        "distance: unknown flagged (%)": "33.3",
    }
    assert "accuracy of the 5 likeliest (%)" in [row["measure"] for row in rows_overview(many(30, 6))]


def test_rows_have_equal_keys_and_a_dash_for_what_was_not_measured():
    assert [list(row.values()) for row in rows_tasks(made())] == [
        [1, "insects", 2, 5, "40.0"],
        [2, "–", 0, 0, "   –"],
        [3, "mammals", 2, 1, " 0.0"],
    ]
    assert [list(row.values()) for row in rows_classes(made())] == [
        ["ant", 1, 2, "50.0", "100.0", "45.0", "bee"],
        ["bee", 1, 3, "33.3", " 33.3", "38.3", "cat"],
        ["cat", 3, 0, "   –", "    –", "   –", "–"],
        ["dog", 3, 1, " 0.0", "    –", "30.0", "bee"],
    ]
    assert [list(row.values()) for row in rows_confusions(made())] == [
        ["bee", "cat", 2, " 66.7"],
        ["dog", "bee", 1, "100.0"],
        ["ant", "bee", 1, " 50.0"],
    ]
    for rows in (rows_tasks(made()), rows_classes(made()), rows_confusions(made()), rows_overview(made())):
        assert len({tuple(row) for row in rows}) == 1


def test_no_row_and_no_page_holds_a_control_character():
    names = ["a\x1b[2Jnt", "b\nee", "c\x9bat", "d\u202eog"]
    scores = {"s\x07": KNOWN}
    given = dict(model={"file": "m\x1b[31m", "k\x07ey": ["x\x1b"]}, protocol={"p\x1b": "q\x1b"})
    assessment = made(
        classes=names, task_names=["t\x1b]0;", None, "u\r"], novelty=scores, unknown_novelty=scores, **given
    )
    tables = rows_overview(assessment), rows_tasks(assessment), rows_classes(assessment), rows_confusions(assessment)
    said = [str(value) for rows in tables for row in rows for value in row.values()] + reliability_lines(assessment)
    assert all(line.isprintable() for line in said)
    assert "a\\x1b[2Jnt" in said and "b\\nee" in said and "c\\x9bat" in said and "d\\u202eog" in said
    written = page(assessment)
    assert not set("\x1b\x07\r\x9b\u202e") & set(written)
    assert "a\\x1b[2Jnt" in written


def test_the_diagram_of_text_has_a_bar_and_a_dash_for_each_bin():
    """One image, sure to 55 % and right: the bar is full, the dash in the middle of the sixth tenth."""
    probabilities = np.array([[0.55, 0.45, 0.0, 0.0]])
    lines = reliability_lines(made(labels=np.array([0]), probabilities=probabilities))
    assert len(lines) == 12
    assert lines[0] == "accuracy (bar) and confidence (dash) by confidence, in percent; images: 1"
    bars = [line[5 + 4 * 8 : 5 + 4 * 8 + 3] for line in lines[1:11]]
    assert [bar[:2] for bar in bars] == ["██"] * 10
    assert [bar[2:] for bar in bars] == ["", "", "", "", "─", "", "", "", "", ""]
    assert lines[11] == "  0 └──────────20──────────40──────────60──────────80─────────100"
    wrong = reliability_lines(made(labels=np.array([1]), probabilities=probabilities))
    assert "█" not in "".join(wrong) and "─" in wrong[5]


def test_a_bar_of_text_is_as_high_as_the_accuracy():
    """Bin 13 holds four images, three of them right: seven rows and a half."""
    probabilities = np.array([[0.9, 0.1, 0.0, 0.0]] * 4)
    lines = reliability_lines(made(labels=np.array([0, 0, 0, 1]), probabilities=probabilities))
    column = "".join(line[5 + 4 * 13 :][:1] or " " for line in lines[1:11])
    assert column == "  ▄███████"


# ── page ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    write_page(full(), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(full())
    (tmp_path / "taken").write_text("a file, so no folder can have its name")
    with pytest.raises(StorageError):
        write_page(full(), tmp_path / "taken" / "page.html")


@pytest.mark.parametrize("assessment", [full(), many(60, 17), many(500, 45)], ids=["small", "dense", "many classes"])
def test_elements_nest_and_nothing_is_fetched_or_run(assessment):
    written = page(assessment)
    parsed = Nested(written)
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & parsed.seen
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")]
    assert "://" not in written and "url(" not in written and "@import" not in written


def test_every_foreign_text_is_escaped():
    names = [f"{name}{EVIL}" for name in NAMES]
    scores = {f"score{EVIL}": KNOWN}
    model = {
        "file": f"file{EVIL}",
        f"key{EVIL}": f"value{EVIL}",
        "backbone": {"name": f"backbone{EVIL}"},
        "settings": {f"setting{EVIL}": [f"many{EVIL}"]},
        "lessons": [{"name": f"lesson{EVIL}", "classes": [f"learned{EVIL}"]}],
    }
    protocol = {f"word{EVIL}": f"said{EVIL}", "test_batch": f"batch{EVIL}", "skipped_images": f"skipped{EVIL}"}
    assessment = made(
        classes=names,
        task_names=[f"task{EVIL}", None, None],
        novelty=scores,
        unknown_novelty=scores,
        model=model,
        protocol=protocol,
    )
    written = page(assessment)
    assert "script" not in Nested(written).seen
    assert "<script" not in written and EVIL not in written
    words = "key value backbone setting many lesson learned word said batch skipped task score ant bee cat dog"
    for word in words.split():
        assert f"{word}{EVIL}" in html.unescape(written), word


def test_the_page_opens_with_model_protocol_and_verdict():
    text = text_of(page(made()))
    assert "garden.safetensors on 6 images file garden.safetensors method vpt-nsp2 Measured so: images 6" in text
    assert "Accuracy 33.3 % Mean over classes 27.8 % Calibration error (ECE) 40.0 %" in text
    assert "2 of 6 images named right. Its mean confidence is 63.3 %: on the whole it is too sure of itself." in text
    assert "Weakest class: dog , 0.0 %. Most frequent mistake: bee taken for cat , 2 images." in text
    assert "1 class of the model has no test image and no part in the means." in text
    assert "could not be read" not in text and "depends on the other images" not in text


def test_a_modest_model_and_a_fair_one_are_called_so():
    sure = np.array([[0.5, 0.3, 0.1, 0.1]])
    assert "it is too modest." in text_of(page(made(labels=np.array([0]), probabilities=sure)))
    fair = made(labels=np.array([0, 1]), probabilities=np.repeat(sure, 2, axis=0))
    assert "it is about as sure as it is right." in text_of(page(fair))


def test_skipped_images_and_a_transductive_protocol_are_warned_about():
    text = text_of(page(made(protocol={"test_batch": "transductive", "skipped_images": 1234})))
    assert "Protocol transductive. A prediction depends on the other images of its test batch." in text
    assert "Images that could not be read and were left out: 1 234." in text


def test_tasks_and_classes_have_bars_as_long_as_their_accuracy():
    written = page(made())
    assert re.findall(r'class="fill" width="([0-9.]+)"', written) == ["40.0", "0.0", "50.0", "33.3", "0.0"]
    text = text_of(written)
    assert "1 insects 2 5 40.0 2 0 0 – 3 mammals 2 1 0.0" in text
    assert "bee 1 3 33.3 33.3 38.3 cat 2 × cat 3 0 – – – – dog" in text


def test_the_diagram_has_a_bar_per_bin_that_holds_images():
    """Confidences 0.4, 0.5, 0.6, 0.7 and twice 0.8 fall into bins 6, 7, 9, 10 and 12."""
    wide = page(made()).split('class="wide"')[1].split('class="narrow"')[0]
    titles = re.findall("<title>(.*?)</title>", wide)
    assert titles[0] == "1 image, accuracy 0.0 %, mean confidence 40.0 %"
    assert titles[4] == "2 images, accuracy 50.0 %, mean confidence 80.0 %"
    assert len(titles) == 5
    bars = re.findall(r'class="bar" x="([0-9.]+)" y="[0-9.]+" width="[0-9.]+" height="([0-9.]+)"', wide)
    assert [float(height) for _, height in bars] == [0.0, 0.0, 0.0, 332.0, 166.0]
    step = (700 - 44 - 12) / 15
    assert [float(x) for x, _ in bars] == pytest.approx([45 + step * place for place in (6, 7, 9, 10, 12)], abs=0.05)
    gaps = re.findall(r'class="gap" [^>]*height="([0-9.]+)"', wide)
    assert [float(gap) for gap in gaps] == pytest.approx([332 * g for g in (0.4, 0.5, 0.6, 0.3, 0.3)], abs=0.06)


def test_the_confusion_map_is_in_percent_of_the_row_with_errors_in_another_colour():
    table = page(made()).split('class="heat map"')[1].split("</table>")[0]
    cells = re.findall(r'<td class="(accuracy|lost|none)[^>]*>([^<]*)<', table)
    assert [kind for kind, _ in cells if kind != "none"] == ["accuracy", "lost", "accuracy", "lost", "lost"]
    assert [text for _, text in cells if text] == ["50", "50", "33", "67", "100"]
    assert len(cells) == 16


def test_a_share_below_half_a_percent_is_not_shown_as_zero():
    probabilities = np.repeat(PROBABILITIES[[2]], 300, axis=0)
    probabilities[0] = PROBABILITIES[0]
    written = page(made(labels=np.ones(300, int), probabilities=probabilities))
    assert "&lt;1" in written.split('class="heat map"')[1].split("</table>")[0]


def test_many_classes_are_folded_away_below_the_weakest():
    assessment = many(900, 45)
    written = page(assessment)
    assert 'class="heat' not in written.split("</style>")[1]
    assert "<h4>The 12 weakest</h4>" in written and "<summary>All 45 classes</summary>" in written
    weakest = min(each["accuracy"] for each in assessment.classes)
    first = written.split("The 12 weakest")[1].split("<b>")[1].split("</b>")[0]
    assert first == f"{100 * weakest:.1f}"
    assert "The 12 weakest" not in page(many(900, 40))


def test_a_model_without_mistakes_has_no_map():
    text = text_of(page(made(labels=np.array([0, 1]), probabilities=PROBABILITIES[[0, 2]])))
    assert "No image was named wrong." in text and "Most frequent mistake" not in text


def test_novelty_is_drawn_with_its_threshold():
    written = page(full())
    text = text_of(written)
    facts = "AUROC 83.3 % false alarms (FPR95) 33.3 % threshold 50 known flagged 16.7 % unknown flagged 33.3 %"
    assert facts in text
    section = written.split("Does it notice")[1].split('class="wide"')[1].split('class="narrow"')[0]
    assert section.count("<polyline") == 2
    x = 12 + 676 * (50 - 1) / 69
    assert f'class="ideal" x1="{x:.1f}"' in section
    assert "Does it notice" not in page(made())


def test_settings_and_lessons_close_the_page():
    lessons = [{"name": "first", "classes": [f"c{n}" for n in range(13)], "images": 1200, "drift": {"far": 1}}, {}]
    text = text_of(page(made(model={"settings": {"length": 4}, "classes": NAMES, "lessons": lessons})))
    assert "Of the model: settings.length 4 What it learned, in order: Lesson name classes images" in text
    assert "1 first c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 3 more 1 200 2 – – – Made with lamina" in text
