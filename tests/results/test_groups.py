"""The average of VTAB-1K goes over nineteen data sets, not over three groups and not over runs."""

import pytest

from lamina.data.transfer.vtab import VTAB
from lamina.errors import DataError
from lamina.results.groups import VTAB_GROUPS, by_group, group_average
from tests.results.conftest import make

#: published rows: natural, specialized, structured, average
PUBLISHED = [
    (18.87, 53.72, 23.70, 28.24), (54.90, 75.19, 38.98, 52.47), (39.96, 69.65, 27.50, 40.96),
    (36.02, 60.61, 26.57, 37.22), (47.61, 76.86, 36.80, 49.22), (52.36, 80.75, 41.72, 53.86),
    (67.46, 81.08, 30.33, 54.69), (74.19, 82.66, 47.69, 64.82), (67.34, 82.26, 37.55, 57.94),
    (70.27, 83.04, 42.38, 61.22), (74.84, 83.38, 49.10, 65.80), (77.19, 85.69, 52.82, 68.72),
]  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_averages_come_out_of_the_means_of_groups(row):
    assert group_average(dict(zip(VTAB_GROUPS, row[:3], strict=True))) == pytest.approx(row[3], abs=0.02)


def test_groups_have_as_many_data_sets_as_there_are_streams():
    counts = {}
    for dataset in VTAB.values():
        counts[dataset.group] = counts.get(dataset.group, 0) + 1
    assert counts == VTAB_GROUPS


def run(stream, accuracy, **changes):
    protocol = {"group": VTAB[stream].group, "tested_on": "test images"} | changes.pop("protocol", {})
    values = {"method": "vpt-deep", "test_sizes": [30], "classes": [["ant", "bee"]]} | changes
    return make([[accuracy]], stream=stream, protocol=protocol, **values)


def test_a_data_set_weighs_the_same_however_many_runs_it_has():
    records = [run("vtab-dtd", 0.2, seed=seed) for seed in (42, 44, 82)] + [run("vtab-svhn", 0.6)]
    assert by_group(records) == [
        {
            "method": "vpt-deep",
            "backbone": "lamina:vit-nano",
            "natural (%)": "40.0 (2 of 7)",
            "specialized (%)": "–",
            "structured (%)": "–",
            "average of 19 (%)": "–",
            "note": "",
        }
    ]


def test_the_average_is_shown_once_all_nineteen_are_there():
    means = {"natural": 0.7, "specialized": 0.8, "structured": 0.4}
    records = [run(name, means[dataset.group]) for name, dataset in VTAB.items()]
    assert by_group(records[1:])[0]["average of 19 (%)"] == "–"
    row = by_group(records)[0]
    assert row["natural (%)"] == "70.0 (7 of 7)" and row["average of 19 (%)"] == "59.5"


def test_runs_on_validation_images_and_on_other_streams_do_not_count():
    chosen = run("vtab-dtd", 0.9, protocol={"tested_on": "validation images"})
    assert by_group([chosen]) == [] == by_group([make()])
    assert by_group([chosen, run("vtab-dtd", 0.5)])[0]["natural (%)"] == "50.0 (1 of 7)"


def test_runs_with_several_settings_are_not_averaged_and_this_is_said():
    mixed = [run("vtab-dtd", 0.9, settings={"lr": 1}), run("vtab-dtd", 0.5, settings={"lr": 2})]
    row = by_group([*mixed, run("vtab-svhn", 0.3)])[0]
    assert row["natural (%)"] == "30.0 (1 of 7)" and row["note"] == "several settings: vtab-dtd"
    assert by_group(mixed)[0]["natural (%)"] == "–"


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ({"natural": 1.0, "structured": 1.0},
         "an average over groups needs all of natural, specialized, structured; it lacks specialized"),
        ({"nature": 1.0},
         "no group is called 'nature'; did you mean 'natural'? Known: natural, specialized, structured"),
    ],
)  # fmt: skip
def test_a_group_that_is_missing_or_unknown_is_told(means, message):
    with pytest.raises(DataError) as error:
        group_average(means)
    assert str(error.value) == message
