"""Tables: what may be averaged, what must not be, and how a number is written."""

import dataclasses

import pytest

from lamina.errors import ConfigError
from lamina.results.tables import (
    aggregate,
    headline,
    percent,
    protocol_line,
    to_csv,
    to_latex,
    to_markdown,
    usual_columns,
)


def changed(record, **changes):
    return dataclasses.replace(record, **changes)


def test_seeds_are_averaged_with_their_sample_deviation(seeds):
    """Last rows have the means 0.8625, 0.8525, 0.8425: 0.01 with n - 1, 0.0082 with n."""
    (row,) = aggregate(seeds)
    accuracy = row.spreads["accuracy"]
    assert (accuracy.mean, accuracy.deviation) == (pytest.approx(0.8525), pytest.approx(0.01))
    assert accuracy.runs == 3
    assert row.note == ""


def test_one_run_has_no_deviation(record):
    (row,) = aggregate([record])
    assert row.spreads["accuracy"].deviation is None
    assert str(row.spreads["accuracy"]) == "86.2"


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({"stream": "tiny-even-4"}, ["stream tiny-odd-4", "stream tiny-even-4"]),
        (
            {"stream_fingerprint": "ffff0000ffff"},
            ["stream fingerprint a1b2c3d4", "stream fingerprint ffff0000"],
        ),
        (
            {"backbone": {"name": "lamina:vit-nano", "fingerprint": "deadbeef0000"}},
            ["backbone fingerprint 0f1e2d3c", "backbone fingerprint deadbeef"],
        ),
        (
            {"settings": {"length": 5, "lr": 0.01, "seed": 1, "stream": {"tasks": 4}}},
            ["length 4", "length 5"],
        ),
        (
            {"settings": {"length": 4, "lr": 0.01, "stream": {"tasks": 8}}},
            ["stream.tasks 4", "stream.tasks 8"],
        ),
        ({"settings": {"length": 4, "stream": {"tasks": 4}}}, ["lr 0.01", "no lr"]),
        (
            {"protocol": {"kind": "class-incremental", "test_batch": "transductive", "skipped_images": 0}},
            ["tasks 4, test batch independent", "test batch transductive"],
        ),
        ({"test_sizes": [30, 20, 41, 10]}, ["", ""]),
    ],
)
def test_runs_that_differ_in_more_than_their_seed_stay_apart(seeds, change, notes):
    rows = aggregate([seeds[0], changed(seeds[1], **change)])
    assert [row.note for row in rows] == notes
    assert [len(row.records) for row in rows] == [1, 1]


def test_other_methods_stay_apart_without_a_note(seeds):
    rows = aggregate([*seeds, changed(seeds[0], method="l2p")])
    assert [(row.labels, row.note, len(row.records)) for row in rows] == [
        ({"method": "vpt-nsp2"}, "", 3),
        ({"method": "l2p"}, "", 1),
    ]


def test_an_unfinished_run_is_not_averaged_with_finished_ones(seeds, make_record):
    rows = aggregate([*seeds, make_record([[0.9], [0.8, 0.7]], finished=False, seed=3)])
    assert [(len(row.records), row.note) for row in rows] == [
        (3, ""),
        (1, "unfinished, 2 of 4 tasks"),
    ]
    assert rows[1].name == "vpt-nsp2 (unfinished, 2 of 4 tasks)"


def test_orders_of_the_same_classes_are_averaged(seeds):
    orders = [changed(r, order_seed=r.seed, stream_fingerprint=f"order-{r.seed}-") for r in seeds]
    (row,) = aggregate(orders)
    assert (len(row.records), row.note) == (3, "")


def test_one_order_with_two_fingerprints_means_other_images_and_is_split(seeds):
    """Two runs share order 7 but not their images; a third, with another order, cannot vouch for either."""
    orders = [
        changed(seeds[0], stream_fingerprint="aaaaaaaaaa"),
        changed(seeds[1], stream_fingerprint="bbbbbbbbbb"),
        changed(seeds[2], stream_fingerprint="cccccccccc", order_seed=8),
    ]
    assert [row.note for row in aggregate(orders)] == [f"stream fingerprint {8 * c}" for c in "abc"]


def test_other_classes_of_the_same_number_are_not_averaged(seeds):
    classes = [["ant", "bee", "cow"], *seeds[1].classes[1:]]
    assert len(aggregate([seeds[0], changed(seeds[1], classes=classes, order_seed=8)])) == 2


def test_a_metric_that_one_run_lacks_has_no_mean(seeds):
    lacking = changed(seeds[1], metrics={**seeds[1].metrics, "accuracy_task_aware": None})
    (row,) = aggregate([seeds[0], lacking])
    assert row.spreads["accuracy_task_aware"] is None
    assert row.spreads["accuracy"].runs == 2


def test_rows_are_named_by_the_fields_asked_for(seeds):
    (row,) = aggregate(seeds, by=("method", "backbone", "protocol.tasks", "settings.stream.tasks"))
    assert list(row.labels.values()) == ["vpt-nsp2", "lamina:vit-nano", "4", "4"]
    assert row.name == "vpt-nsp2, lamina:vit-nano, 4, 4"


def test_an_unknown_field_or_metric_is_refused(seeds):
    with pytest.raises(ConfigError, match="^no field is called 'metod'; did you mean 'method'"):
        aggregate(seeds, by=("metod",))
    with pytest.raises(ConfigError, match="^no metric is called 'forgeting'; did you mean 'forgetting'"):
        to_markdown(aggregate(seeds), columns=("forgeting",))


# ── formats ────────────────────────────────────────────────────────────────────────────────────────


def test_markdown_in_percent_with_one_decimal(seeds, make_record):
    joint = make_record([[0.9, 0.8, 0.7, 0.6]], method="joint")
    assert to_markdown(aggregate([*seeds, joint]), columns=("accuracy", "bwt")) == (
        "| method | accuracy (%) | BWT (%) | n |\n"
        "|---|---:|---:|---:|\n"
        "| vpt-nsp2 | 85.2 ± 1.0 | -8.7 ± 1.0 | 3 |\n"
        "| joint | 75.0 | – | 1 |\n"
    )


def test_the_headline_has_a_row_of_text_per_configuration(seeds, make_record):
    joint = make_record([[0.9, 0.8, 0.7, 0.6]], method="joint")
    names = ["method", "accuracy (%)", "forgetting (%)", "average accuracy (%)", "BWT (%)", "n"]
    first, second = headline([*seeds, joint])
    assert first == dict(
        zip(names, ["vpt-nsp2", "85.2 ± 1.0", "9.0 ± 1.0", "90.1 ± 0.3", "-8.7 ± 1.0", "3"], strict=True)
    )
    assert second == dict(zip(names, ["joint", "75.0", "–", "–", "–", "1"], strict=True))


def test_the_protocol_line_names_stream_backbone_and_protocol(record):
    assert protocol_line(record) == (
        "tiny-odd-4 with lamina:vit-nano, kind class-incremental, tasks 4, test batch independent, skipped images 0"
    )


def test_latex_with_booktabs_and_escaped_names(seeds, make_record):
    joint = make_record([[0.9, 0.8, 0.7, 0.6]], method="all_at_once & 50%")
    assert to_latex(aggregate([*seeds, joint]), columns=("accuracy", "bwt")) == (
        "\\begin{tabular}{lrrr}\n\\toprule\n"
        "method & accuracy (\\%) & BWT (\\%) & n \\\\\n\\midrule\n"
        "vpt-nsp2 & $85.2 \\pm 1.0$ & $-8.7 \\pm 1.0$ & $3$ \\\\\n"
        "all\\_at\\_once \\& 50\\% & $75.0$ & -- & $1$ \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_csv_holds_fractions_in_full(seeds, make_record):
    joint = make_record([[0.9, 0.8, 0.7, 0.6]], method="joint, all")
    head, first, second = to_csv(aggregate([*seeds, joint]), columns=("accuracy", "bwt")).splitlines()
    assert head == "method,note,accuracy_mean,accuracy_deviation,bwt_mean,bwt_deviation,runs,seeds"
    name, note, mean, deviation, *_, runs, used = first.split(",")
    assert (name, note, runs, used) == ("vpt-nsp2", "", "3", "0 1 2")
    assert float(mean) == pytest.approx(0.8525, abs=1e-12)
    assert float(deviation) == pytest.approx(0.01, abs=1e-12)
    assert second.startswith('"joint, all",,0.75') and second.endswith(",,,,1,0")


def test_markdown_cannot_be_broken_by_a_name(record):
    text = to_markdown(aggregate([changed(record, method="a|b\n<script>")]), columns=("accuracy",))
    assert text.splitlines()[2] == "| a\\|b &lt;script> | 86.2 | 1 |"


@pytest.mark.parametrize(("fraction", "text"), [(-0.0004, "0.0"), (-0.0006, "-0.1"), (0.9996, "100.0")])
def test_percent_has_no_negative_zero(fraction, text):
    assert percent(fraction) == text


def test_columns_that_no_run_has_are_left_out(make_record):
    one = make_record([[0.9]], test_sizes=[9], classes=[["ant", "bee"]])
    assert usual_columns([one]) == ["accuracy", "average_accuracy"]
    assert usual_columns([one, make_record()]) == ["accuracy", "forgetting", "average_accuracy", "bwt"]
    assert usual_columns([make_record([[0.9]], finished=False)])[0] == "accuracy"
