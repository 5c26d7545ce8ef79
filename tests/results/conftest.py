"""Records of runs that never happened: 4 tasks of 3, 2, 4 and 1 classes, so no two sizes agree by chance."""

import dataclasses

import pytest

from lamina.results.metrics import summary
from lamina.results.records import Record

MATRIX = [[0.95], [0.90, 0.92], [0.85, 0.93, 0.90], [0.80, 0.86, 0.88, 0.91]]
SIZES = [30, 20, 41, 9]


def make(matrix=MATRIX, aware=None, **changes):
    """Return a record with consistent metrics and durations; `changes` replace fields."""
    aware = [[min(1.0, value + 0.05) for value in row] for row in matrix] if aware is None else aware
    rows, sizes = len(matrix), changes.get("test_sizes", SIZES)
    values = dict(
        method="vpt-nsp2",
        settings={"length": 4, "lr": 0.01, "seed": 0, "stream": {"tasks": 4}},
        stream="tiny-odd-4",
        stream_fingerprint="a1b2c3d4e5f6",
        backbone={"name": "lamina:vit-nano", "fingerprint": "0f1e2d3c4b5a"},
        seed=0,
        order_seed=7,
        protocol={"kind": "class-incremental", "tasks": 4, "test_batch": "independent", "skipped_images": 0},
        classes=[["ant", "bee", "cat"], ["dog", "eel"], ["fox", "gnu", "hen", "ibis"], ["jay"]],
        matrix=matrix,
        matrix_task_aware=aware,
        test_sizes=SIZES,
        metrics=summary(matrix, sizes, aware),
        seconds={"train": [60.5] * rows, "look_back": [2.25] * rows, "evaluate": [4.0] * rows},
        peak_memory_mb=812.5,
        trainable_parameters=12_345,
        stored_numbers=67_890,
        versions={"lamina": "0.1.0", "torch": "2.15.0", "timm": "1.0.31", "python": "3.11.2"},
        hardware="2 cores of a test machine",
        commit="07b52d9",
        finished=True,
        command="lamina run recipes/vpt-nsp2/tiny.toml --seed 0",
    )
    return Record(**{**values, **changes})


def drift(scale=1.0):
    """Drift of 4 tasks in 5 blocks: after task t, 0.01 * (t - i) * (block + 1) times `scale` for task i."""
    return [[[scale * 0.01 * (t - i) * (b + 1) for b in range(5)] for i in range(t + 1)] for t in range(4)]


@pytest.fixture
def record():
    return make()


@pytest.fixture
def make_record():
    """The function that makes records."""
    return make


@pytest.fixture
def make_drift():
    """The function that makes drifts."""
    return drift


@pytest.fixture
def seeds():
    """Three runs that differ in their seeds; the last row is 0.01 lower from one to the next."""
    runs = []
    for seed in range(3):
        matrix = [*MATRIX[:-1], [value - 0.01 * seed for value in MATRIX[-1]]]
        runs.append(dataclasses.replace(make(matrix), seed=seed, settings={**make().settings, "seed": seed}))
    return runs
