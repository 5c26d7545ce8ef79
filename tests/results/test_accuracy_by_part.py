"""Accuracy on each data set of several: what a record says of parts, and how tables and reports show it.

4 tasks with 30, 20, 41 and 9 test images; `birds` has the first three, `shop` the last.
"""

import dataclasses
import html
import re

import pytest

from lamina.errors import ConfigError, DataError
from lamina.results.metrics import part_accuracies
from lamina.results.records import Record
from lamina.results.report import report
from lamina.results.tables import aggregate, by_part, headline, to_csv, to_markdown

PARTS = {"birds": [0, 1, 2], "shop": [3]}
#: from the last row: 0.80, 0.86, 0.88 and 0.91
BIRDS = (30 * 0.80 + 20 * 0.86 + 41 * 0.88) / 91
ALL = (91 * BIRDS + 9 * 0.91) / 100


@pytest.fixture
def runs(seeds):
    """Three seeds on two data sets; the last row is 0.01 lower from one to the next."""
    return [dataclasses.replace(run, stream="birds+shop", parts=PARTS) for run in seeds]


def text_of(page):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.split("</style>")[1])).split())


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_accuracy_on_a_part_weighs_its_tasks_by_their_test_images(runs):
    assert runs[0].part_accuracies == pytest.approx({"birds": BIRDS, "shop": 0.91})
    unweighted = (0.80 + 0.86 + 0.88) / 3
    assert abs(BIRDS - unweighted) > 1e-3


def test_parts_weighted_by_their_images_make_the_weighted_accuracy(runs):
    parts = runs[0].part_accuracies
    assert (91 * parts["birds"] + 9 * parts["shop"]) / 100 == pytest.approx(runs[0].metrics["accuracy_weighted"])


def test_a_run_that_learned_all_at_once_has_an_accuracy_on_each_part(make_record):
    joint = make_record([[0.5, 0.25, 0.75, 1.0]], parts={"birds": [0], "shop": [1, 2, 3]})
    assert joint.part_accuracies == {"birds": 0.5, "shop": pytest.approx((20 * 0.25 + 41 * 0.75 + 9) / 70)}


def test_an_unfinished_run_says_what_it_has_of_a_part_and_nothing_of_one_not_met():
    rows, parts = [[0.9], [0.5, 0.8]], {"a": [0], "b": [1, 2], "c": [3]}
    assert part_accuracies(rows, [1, 2, 4, 8], parts) == {"a": 0.5, "b": 0.8, "c": None}


def test_a_run_on_one_data_set_has_no_parts(record):
    assert record.part_accuracies == {}


# ── records ──────────────────────────────────────────────────────────────────────────────────────────


def test_parts_are_read_back_in_their_order(make_record, tmp_path):
    record = make_record(parts={"z": [0], "a": [1, 2], "m": [3]})
    record.write(tmp_path / "results.json")
    found = Record.read(tmp_path / "results.json")
    assert found == record and list(found.parts) == ["z", "a", "m"]


def test_a_file_from_before_there_were_parts_is_a_record_without_any(record):
    values = {name: value for name, value in record.as_dict().items() if name != "parts"}
    assert Record.from_dict(values) == record and record.parts == {}


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"a": [0, 1], "b": [3]}, "must share tasks 0 to 3 out, in order"),
        ({"a": [0, 1], "b": [2, 3, 4]}, "must share tasks 0 to 3 out, in order"),
        ({"a": [0, 1, 2], "b": [2, 3]}, "must share tasks 0 to 3 out, in order"),
        ({"a": [2, 3], "b": [0, 1]}, "must share tasks 0 to 3 out, in order"),
        ({"a": [0, 1, 2, 3], "b": []}, "must share tasks 0 to 3 out, in order"),
        ({"a": 4}, "must map names to lists of whole numbers, at least 0"),
        ({"a": [0.0, 1, 2, 3]}, "must map names to lists of whole numbers, at least 0"),
        ([[0, 1, 2, 3]], "must map names to lists of whole numbers, at least 0"),
    ],
)
def test_parts_that_do_not_share_out_the_tasks_are_refused(make_record, parts, rule):
    with pytest.raises(DataError) as error:
        make_record(parts=parts)
    assert str(error.value) == f"Record.parts {rule}; got {parts!r}"


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_has_all_test_images_and_those_of_each_part(runs):
    assert by_part(runs) == [
        {
            "method": "vpt-nsp2",
            "weighted accuracy (%)": f"{100 * (ALL - 0.01):.1f} ± 1.0",
            "birds (%)": f"{100 * (BIRDS - 0.01):.1f} ± 1.0",
            "shop (%)": "90.0 ± 1.0",
            "n": "3",
        }
    ]


def test_there_is_no_such_table_where_all_runs_are_on_one_data_set(seeds):
    assert by_part(seeds) == []


def test_a_run_on_one_data_set_beside_others_has_a_dash(runs, make_record):
    other = make_record([[0.9, 0.8, 0.7, 0.6]], method="joint")
    first, second = by_part([runs[0], other])
    assert (first["shop (%)"], second["birds (%)"], second["shop (%)"]) == ("91.0", "–", "–")
    assert second["weighted accuracy (%)"] == "77.1"


def test_parts_are_columns_of_every_kind_of_table(runs, make_record):
    rows, columns = aggregate([*runs, make_record(method="other")]), ("accuracy", "accuracy.shop")
    assert to_markdown(rows, columns).splitlines()[0] == "| method | accuracy (%) | shop (%) | n |"
    assert to_markdown(rows, columns).splitlines()[2:] == [
        "| vpt-nsp2 | 85.2 ± 1.0 | 90.0 ± 1.0 | 3 |",
        "| other | 86.2 | – | 1 |",
    ]
    head, first, second = to_csv(rows, columns).splitlines()
    assert head == "method,note,accuracy_mean,accuracy_deviation,accuracy.shop_mean,accuracy.shop_deviation,runs,seeds"
    assert float(first.split(",")[4]) == pytest.approx(0.9) and float(first.split(",")[5]) == pytest.approx(0.01)
    assert second.split(",")[4:6] == ["", ""]


def test_a_part_that_no_run_has_is_no_column(runs, seeds):
    with pytest.raises(ConfigError, match="^no metric is called 'accuracy.shpo'; did you mean 'accuracy.shop'"):
        to_markdown(aggregate(runs), ("accuracy.shpo",))
    for records in (runs, seeds):  # what people ask for by `--columns` is one list for all streams
        with pytest.raises(ConfigError, match="^no metric is called 'accuracy.shop'"):
            headline(records, ("accuracy.shop",))


# ── report ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_shows_all_test_images_and_those_of_each_part(runs):
    text = text_of(report(runs))
    means = [f"{100 * (value - 0.01):.1f} ± 1.0" for value in (ALL, BIRDS, 0.91)]
    assert f"in percent. Method Runs All test images birds shop vpt-nsp2 3 {' '.join(means)}" in text
    assert text.index("Accuracy on each data set") < text.index("Accuracy as tasks arrive")


def test_the_page_names_the_part_of_each_task(runs):
    text = text_of(report(runs))
    assert "ant, bee, cat birds, 30 test images" in text and "jay shop, 9 test images" in text


def test_the_page_of_runs_on_one_data_set_says_nothing_of_parts(seeds):
    page = report(seeds)
    assert "Accuracy on each data set" not in page and "ant, bee, cat 30 test images" in text_of(page)


def test_the_name_of_a_part_is_escaped(make_record):
    evil = "<script>alert('x')</script>\"&"
    page = report([make_record(parts={evil: [0, 1], "b": [2, 3]})])
    assert "<script" not in page and html.unescape(page).count(evil) == 3
