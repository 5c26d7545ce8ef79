"""Metrics of the accuracy matrix: published worked values, definitions, edges and messages.

The matrix of four tasks is specs/peers.md 4.2 (a) with 95 as its first entry. The sheet prints 85, but every
value below it there follows from 95 and none of those that use the entry follows from 85.
"""

import subprocess
import sys

import numpy as np
import pytest

from lamina.errors import ConfigError, DataError
from lamina.results import metrics

FOUR = [[0.95], [0.90, 0.92], [0.85, 0.93, 0.90], [0.80, 0.86, 0.88, 0.91]]
RENATE = [[0.9362, 0.6093, 0.3326], [0.8284, 0.9507, 0.3383], [0.4377, 0.4826, 0.9439]]
AVALANCHE = [[1, 0, 0], [0.5, 0.8, 1], [0.2, 1, 0.5]]
FORGETTING = [[0, 0, 0], [0.5, 0, 0], [0.8, -0.2, 0]]


def lower(square):
    return [row[: t + 1] for t, row in enumerate(square)]


def columns(*tasks):
    """Rows from Continuum's lists, which hold the accuracies on one task after each task."""
    return [list(row) for row in zip(*tasks, strict=True)]


# ── worked values ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "percent"),
    [
        (metrics.final_accuracy(FOUR), 86.25),
        (metrics.average_accuracy(FOUR), 90.396),
        (metrics.triangle_accuracy(FOUR), 89.00),
        (metrics.forgetting(FOUR), 8.0),
        (metrics.forgetting(FOUR, compat="continuum"), 8.0),
        (metrics.forgetting(FOUR, compat="nsp2"), 8.0),
        (metrics.forgetting(FOUR, compat="coda"), 3.8889),
        (metrics.forgetting(FOUR, compat="libcontinual"), 7.0),
        (metrics.backward_transfer(FOUR), -7.6667),
        (metrics.backward_transfer(FOUR, compat="continuum"), -6.1667),
        (metrics.backward_transfer(FOUR, compat="libcontinual"), -5.1667),
    ],
)
def test_the_matrix_of_four_tasks_gives_the_values_of_other_libraries(value, percent):
    assert 100 * value == pytest.approx(percent, abs=5e-4)


def test_the_matrix_of_three_tasks_gives_the_values_of_the_sheet_on_nsp2():
    rows = [[0.9], [0.8, 0.85], [0.7, 0.8, 0.9]]
    assert metrics.final_accuracy(rows) == pytest.approx(0.8)
    assert metrics.forgetting(rows) == pytest.approx(0.125)
    assert metrics.weighted_accuracy(rows, sizes=[100, 100, 200]) == pytest.approx(0.825)


@pytest.mark.parametrize(("metric", "overall"), [("forgetting", 6.0), ("backward_transfer", -4.25)])
def test_libcontinual_overall_is_its_mean_over_the_third_and_later_tasks(metric, overall):
    value = np.mean([getattr(metrics, metric)(FOUR[: t + 1], compat="libcontinual") for t in (2, 3)])
    assert 100 * value == pytest.approx(overall)


def test_a_task_that_ends_better_than_ever_is_negative_unless_the_last_row_counts():
    rows = [[0.90], [0.95, 0.70]]
    assert metrics.forgetting(rows) == pytest.approx(-0.05)
    assert metrics.forgetting(rows, compat="nsp2") == 0.0


def test_continuum_exact_results():
    assert metrics.final_accuracy(lower(columns([1, 1], [0, 0.5]))) == 0.75
    assert metrics.average_accuracy(columns([1, 0.5], [0.5, 0]), compat="continuum") == 0.5
    assert metrics.forgetting(lower(columns([1, 0.25], [0.25, 0.25]))) == 0.75
    assert metrics.backward_transfer(lower(columns([1, 0.5], [0.5, 0]))) == -0.5
    assert metrics.backward_transfer(lower(columns([1, 0.5], [0.5, 0])), compat="continuum") == -0.5
    assert metrics.forward_transfer(columns([1, 0.25], [0.125, 0.25]), untrained=[0, 0]) == 0.125
    assert metrics.triangle_accuracy(lower(columns([1, 0.25], [0.25, 0.25]))) == 0.5


def test_average_accuracy_leaves_out_the_tasks_not_met_yet():
    """Continuum counts them, so the same runs give 0.5 there."""
    assert metrics.average_accuracy([[1], [0.5, 0]]) == 0.625


def test_renate_values():
    rows = lower(RENATE)
    assert metrics.forgetting(rows) == pytest.approx(((0.9362 - 0.4377) + (0.9507 - 0.4826)) / 2)
    transfer = metrics.forward_transfer(RENATE, untrained=[0.2, 0.1, 0.09])
    assert transfer == pytest.approx(((0.6093 - 0.1) + (0.3383 - 0.09)) / 2)
    assert metrics.weighted_accuracy(rows, sizes=[10, 5, 10]) == pytest.approx(0.64916)


@pytest.mark.parametrize("t", [1, 2])
def test_avalanche_forgetting_matrix(t):
    assert metrics.forgetting_per_task(lower(AVALANCHE)[: t + 1]) == pytest.approx(FORGETTING[t][:t])


# ── definitions ────────────────────────────────────────────────────────────────────────────────────


def test_forgetting_looks_at_every_earlier_row_not_at_the_diagonal_alone():
    assert metrics.forgetting_per_task([[0.5], [0.8, 0.6], [0.7, 0.3, 0.9]]) == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
def test_metrics_agree_with_a_slow_version_of_their_formulas(tasks):
    square = np.random.default_rng(tasks).random((tasks, tasks))
    rows, last = lower(square.tolist()), square[-1]
    means = [square[t, : t + 1].mean() for t in range(tasks)]
    assert metrics.average_accuracy(rows) == pytest.approx(np.mean(means))
    if tasks > 1:
        lost = [square[i : tasks - 1, i].max() - last[i] for i in range(tasks - 1)]
        assert metrics.forgetting(rows) == pytest.approx(np.mean(lost))
        assert metrics.backward_transfer(rows) == pytest.approx((last - square.diagonal())[:-1].mean())


def test_weighted_accuracy_counts_images_and_ignores_sizes_of_later_tasks():
    assert metrics.weighted_accuracy([[1.0], [0.5, 1.0]], sizes=[30, 10, 999]) == pytest.approx(25 / 40)


def test_one_row_has_no_forgetting_and_no_transfer():
    for rows in ([[0.5, 0.75, 1.0]], [[0.75]]):
        assert metrics.forgetting(rows) is None
        assert metrics.forgetting_per_task(rows) == []
        assert metrics.backward_transfer(rows) is None


def test_the_summary_of_a_run_that_learns_all_at_once():
    assert metrics.summary([[0.5, 0.75, 1.0]], sizes=[1, 2, 5]) == {
        "accuracy": 0.75,
        "accuracy_weighted": 0.875,
        "average_accuracy": None,
        "forgetting": None,
        "bwt": None,
        "accuracy_task_aware": None,
        "transfer": None,
        "ece": None,
        "ece_batch_mean": None,
        "novel_auroc": None,
        "novel_aupr": None,
        "novel_fpr95": None,
    }


def test_transfer_is_the_mean_over_tasks_to_come_of_the_mean_over_the_stages_before_them():
    """After task 1, tasks 2, 3 and 4; after task 2, tasks 3 and 4; after task 3, task 4."""
    future = [[0.1, 0.2, 0.3], [0.4, 0.7], [0.9]]
    assert metrics.transfer(future) == pytest.approx((0.1 + (0.2 + 0.4) / 2 + (0.3 + 0.7 + 0.9) / 3) / 3)
    assert metrics.transfer([]) is None
    rows = [[1.0], [0.5, 1.0], [0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 1.0]]
    said = metrics.summary(rows, [1, 1, 1, 1], future=future, calibration=[0.5, 0.4, 0.3, 0.2])
    assert (said["transfer"], said["ece"]) == (metrics.transfer(future), 0.2)


def test_the_summary_reads_the_task_aware_rows():
    assert metrics.summary([[0.5]], sizes=[3], task_aware=[[0.875]])["accuracy_task_aware"] == 0.875
    assert metrics.summary([[0.5]], sizes=[3], task_aware=[])["accuracy_task_aware"] is None


# ── messages ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "an accuracy matrix has at least one row; got none"),
        ([[]], "row 0 of an accuracy matrix has at least 1; got 0"),
        ([[0.5], [0.5]], "row 1 of an accuracy matrix has 2: one for each task so far; got 1"),
        ([[0.5, 0.5], [0.5, 0.5]], "row 0 of an accuracy matrix has 1: one for each task so far; got 2"),
        ([[0.5], [0.5, 86.25]], "an accuracy is a fraction between 0 and 1; got 86.25 in row 1"),
        ([[float("nan")]], "an accuracy is a fraction between 0 and 1; got nan in row 0"),
    ],
)
def test_a_matrix_that_is_none_is_refused(rows, message):
    with pytest.raises(DataError) as error:
        metrics.final_accuracy(rows)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: metrics.forgetting(FOUR, compat="cuda"),
            ConfigError,
            "no definition is called 'cuda'; did you mean 'coda'? Known: coda, continuum, libcontinual, nsp2",
        ),
        (
            lambda: metrics.weighted_accuracy(FOUR, sizes=[1, 2, 3]),
            DataError,
            "sizes must give the test images of 4 tasks; got 3",
        ),
        (
            lambda: metrics.weighted_accuracy([[0.5]], sizes=[0]),
            DataError,
            "every task needs at least one test image; got sizes [0]",
        ),
        (
            lambda: metrics.forward_transfer(FOUR, untrained=[0, 0, 0, 0]),
            DataError,
            "forward transfer needs row 0 to hold the accuracy on task 1, not learned yet; the row has 1 accuracies",
        ),
        (
            lambda: metrics.forward_transfer(RENATE, untrained=[0.2]),
            DataError,
            "untrained must hold one accuracy for each of 3 tasks; got 1",
        ),
    ],
)
def test_a_wrong_call_says_what_would_be_right(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_results_import_neither_torch_nor_matplotlib():
    names = "metrics, records, tables, figures, report"
    found = "{'torch', 'matplotlib'} & set(sys.modules)"
    code = f"import sys\nfrom lamina.results import {names}\nprint({found})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
