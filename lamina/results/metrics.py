"""What an accuracy matrix says: accuracy, forgetting and transfer, each with its formula.

a[t][i] is the accuracy on task i after learning task t, both from 0, over T tasks. A matrix is a list of
rows: row t holds a[t][0] .. a[t][t], and nothing about tasks not met yet. A method that learns all tasks at
once (`joint`) has a single row with T accuracies. Every accuracy is a fraction in [0, 1].

Published tables use the same words for different quantities; `compat` gives the definitions of three code
bases, so that a number can be compared with theirs. Without it, the definitions are those of the papers.

References:
    Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017.
    Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017.
    Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018, equation 3.
    Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models, ICCV 2023.
    Díaz-Rodríguez et al., Don't forget, there is more than forgetting, NeurIPS workshop 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.errors import ConfigError, DataError, unknown

Rows = Sequence[Sequence[float]]


def final_accuracy(rows: Rows) -> float:
    """Return the mean over tasks of the last row: 1/T · Σ_i a[T-1][i]. Every task weighs the same.

    >>> final_accuracy([[0.9], [0.5, 0.8]])
    0.65
    """
    return _mean(check(rows)[-1])


def weighted_accuracy(rows: Rows, sizes: Sequence[int]) -> float:
    """Return the share of test images that the last row gets right: Σ_i n_i · a[T-1][i] / Σ_i n_i.

    Args:
        rows: the accuracy matrix.
        sizes: test images per task (n). May name later tasks too; those are not counted.

    >>> weighted_accuracy([[0.9], [0.5, 0.8]], sizes=[10, 20])
    0.7
    """
    last = check(rows)[-1]
    if len(sizes) < len(last):
        raise DataError(f"sizes must give the test images of {len(last)} tasks; got {len(sizes)}")
    images = np.asarray(sizes[: len(last)], dtype=float)
    if not (images > 0).all():
        raise DataError(f"every task needs at least one test image; got sizes {list(sizes)}")
    return float(np.average(last, weights=images))


def part_accuracies(rows: Rows, sizes: Sequence[int], parts: Mapping[str, Sequence[int]]) -> dict[str, float | None]:
    """Return the share of the test images of each part of a stream that the last row gets right, by its name.

    Σ_i n_i · a[T-1][i] / Σ_i n_i over the part's own tasks i; the columns to choose from are those of all parts. None
    for a part that the last row does not reach.

    Args:
        rows: the accuracy matrix.
        sizes: test images per task (n).
        parts: the name of each part, and which tasks are its own.

    >>> part_accuracies([[0.9], [0.5, 0.8], [0.4, 0.7, 1.0]], [10, 20, 5], {"a": [0, 1], "b": [2]})
    {'a': 0.6, 'b': 1.0}
    """
    last = check(rows)[-1]
    met = {name: [task for task in tasks if task < len(last)] for name, tasks in parts.items()}
    return {
        name: weighted_accuracy([[last[task] for task in tasks]], [sizes[task] for task in tasks]) if tasks else None
        for name, tasks in met.items()
    }


def average_accuracy(rows: Rows, compat: str | None = None) -> float:
    """Return the average incremental accuracy: 1/T · Σ_t (mean of row t). Rebuffi et al. 2017.

    With a single row (`joint`) this is that row's mean, so it equals the final accuracy.

    Args:
        rows: the accuracy matrix.
        compat: "continuum" averages whole rows, with the tasks not met yet where a row names them, as that
            library does when it is fed the test images of all tasks from the start.

    >>> average_accuracy([[0.9], [0.5, 0.8]])
    0.775
    """
    _known(compat, "continuum")
    return _mean([_mean(row) for row in (rows if compat == "continuum" else check(rows))])


def triangle_accuracy(rows: Rows) -> float:
    """Return the mean of all entries of the matrix: 2 / (T·(T+1)) · Σ_{i ≤ t} a[t][i].

    Díaz-Rodríguez et al. 2018 call it A, Continuum `accuracy_A`. A late row weighs
    more here than in `average_accuracy`.

    >>> triangle_accuracy([[1.0], [0.25, 0.25]])
    0.5
    """
    return _mean([accuracy for row in check(rows) for accuracy in row])


def forgetting_per_task(rows: Rows) -> list[float]:
    """Return f_i = max over t in i..T-2 of a[t][i], minus a[T-1][i], for i in 0..T-2. Chaudhry et al. 2018.

    The maximum leaves the last row out, so a task that ends better than ever has a negative value. The list
    has T - 1 entries; the last task cannot be forgotten yet. A single row has none.

    >>> forgetting_per_task([[0.75], [0.5, 1.0], [0.5, 0.5, 1.0]])
    [0.25, 0.5]
    """
    rows = check(rows)
    return [_best(rows[:-1], task) - rows[-1][task] for task in range(len(rows) - 1)]


def forgetting(rows: Rows, compat: str | None = None) -> float | None:
    """Return 1/(T-1) · Σ_i f_i of `forgetting_per_task`, or None with a single row.

    Args:
        rows: the accuracy matrix.
        compat: "nsp2" lets the maximum include the last row, so nothing is below 0 (Mammoth, PILOT, PGP too);
            "coda" averages, over t ≥ 1, the mean over i < t of a[t-1][i] - a[t][i] (CODA-Prompt);
            "libcontinual" is 1/(T-1) · Σ_{i ≤ T-3} (a[i][i] - a[T-1][i]): it leaves out the task before the
            last, yet divides by T - 1; "continuum" is the default.

    >>> forgetting([[0.75], [1.0, 0.5]]), forgetting([[0.75], [1.0, 0.5]], compat="nsp2")
    (-0.25, 0.0)
    """
    _known(compat, "nsp2", "coda", "libcontinual", "continuum")
    rows = check(rows)
    last, tasks = rows[-1], len(rows)
    if tasks == 1:
        return None
    if compat == "nsp2":
        return _mean([_best(rows, task) - last[task] for task in range(tasks - 1)])
    if compat == "coda":
        steps = [[rows[t - 1][task] - rows[t][task] for task in range(t)] for t in range(1, tasks)]
        return _mean([_mean(step) for step in steps])
    if compat == "libcontinual":
        return sum((rows[task][task] - last[task] for task in range(tasks - 2)), 0.0) / (tasks - 1)
    return _mean(forgetting_per_task(rows))


def backward_transfer(rows: Rows, compat: str | None = None) -> float | None:
    """Return 1/(T-1) · Σ_{i ≤ T-2} (a[T-1][i] - a[i][i]), or None with a single row.

    Defined by Lopez-Paz and Ranzato 2017. Its negative is what Avalanche calls forgetting.

    Args:
        rows: the accuracy matrix.
        compat: "continuum" averages a[t][i] - a[i][i] over all T·(T-1)/2 pairs t > i (Díaz-Rodríguez et al.
            2018); "libcontinual" leaves out the pairs with t = i + 1, yet divides by T·(T-1)/2.

    >>> backward_transfer([[0.75], [0.5, 1.0]])
    -0.25
    """
    _known(compat, "continuum", "libcontinual")
    rows = check(rows)
    tasks = len(rows)
    if tasks == 1:
        return None
    if compat is None:
        return _mean([rows[-1][task] - rows[task][task] for task in range(tasks - 1)])
    gap = {"continuum": 1, "libcontinual": 2}[compat]
    gains = [rows[t][task] - rows[task][task] for t in range(tasks) for task in range(t - gap + 1)]
    return sum(gains, 0.0) / (tasks * (tasks - 1) / 2)


def forward_transfer(rows: Rows, untrained: Sequence[float]) -> float | None:
    """Return 1/(T-1) · Σ_{i ≥ 1} (a[i-1][i] - untrained[i]), or None with a single row. Definition of Renate.

    Args:
        rows: a square matrix: here row t must go on to task t + 1 at least, as it is before it is learned.
        untrained: accuracy on each task before anything is learned; zeros give Continuum's value for T = 2.

    >>> forward_transfer([[1.0, 0.5], [0.25, 0.75]], untrained=[0.25, 0.25])
    0.25
    """
    tasks = len(rows)
    for t, row in enumerate(rows[:-1]):
        if len(row) < t + 2:
            raise DataError(
                f"forward transfer needs row {t} to hold the accuracy on task {t + 1}, not learned yet; "
                f"the row has {len(row)} accuracies"
            )
    if len(untrained) != tasks:
        raise DataError(f"untrained must hold one accuracy for each of {tasks} tasks; got {len(untrained)}")
    if tasks < 2:
        return None
    return _mean([rows[task - 1][task] - untrained[task] for task in range(1, tasks)])


def transfer(future: Rows) -> float | None:
    """Return the mean over tasks i ≥ 1 of the mean over t < i of the accuracy on task i after task t.

    Zheng et al. 2023 call it transfer.

    Args:
        future: row t holds the accuracies on tasks t + 1, t + 2, ... T - 1; None without rows.

    >>> transfer([[0.5, 0.25], [0.75]])
    0.5
    """
    if not future:
        return None
    tasks = len(future) + 1
    return _mean([_mean([future[t][i - t - 1] for t in range(i)]) for i in range(1, tasks)])


def summary(
    rows: Rows,
    sizes: Sequence[int],
    task_aware: Rows | None = None,
    future: Rows = (),
    calibration: Sequence[float] = (),
    batch_calibration: float | None = None,
    detection: Sequence[Mapping[str, Mapping[str, float]]] = (),
) -> dict[str, float | None]:
    """Return what `results.json` holds under "metrics"; None where a quantity is not defined.

    Args:
        rows: the accuracy matrix, with all classes met so far to choose from.
        sizes: test images per task.
        task_aware: the matrix when the task of each image is given, of the same shape; None or empty when it
            was not measured.
        future: accuracies on tasks to come, as in `transfer`.
        calibration: the expected calibration error after each task.
        batch_calibration: after the last task, the mean of the errors of single batches.
        detection: for each task but the last, by score, how well images of tasks to come are told from known ones; the
            energy's figures are averaged over stages.

    A run that learns all tasks at once has one row; what compares rows is not defined for it.

    >>> summary([[0.5, 0.75]], sizes=[1, 3])["accuracy_weighted"]
    0.6875
    """
    at_once = len(rows) == 1 < len(sizes)
    return {
        "accuracy": final_accuracy(rows),
        "accuracy_weighted": weighted_accuracy(rows, sizes),
        "average_accuracy": None if at_once else average_accuracy(rows),
        "forgetting": forgetting(rows),
        "bwt": backward_transfer(rows),
        "accuracy_task_aware": final_accuracy(task_aware) if task_aware else None,
        "transfer": transfer(future),
        "ece": calibration[-1] if calibration else None,
        "ece_batch_mean": batch_calibration,
        **{
            f"novel_{name}": _mean([stage["energy"][name] for stage in detection]) if detection else None
            for name in ("auroc", "aupr", "fpr95")
        },
    }


def check(rows: Rows) -> list[list[float]]:
    """Return the rows as lists of floats.

    Raises:
        DataError: when there is no row, a row has the wrong length, or a value is not a fraction in [0, 1].
    """
    if not rows:
        raise DataError("an accuracy matrix has at least one row; got none")
    for t, row in enumerate(rows):
        wanted = f"{t + 1}: one for each task so far" if len(rows) > 1 else "at least 1"
        if len(row) != t + 1 and (len(rows) > 1 or not row):
            raise DataError(f"row {t} of an accuracy matrix has {wanted}; got {len(row)}")
        for value in row:
            if not 0 <= value <= 1:
                raise DataError(f"an accuracy is a fraction between 0 and 1; got {value} in row {t}")
    return [[float(value) for value in row] for row in rows]


def _best(rows: Rows, task: int) -> float:
    return max(row[task] for row in rows[task:])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _known(compat: str | None, *names: str) -> None:
    if compat is not None and compat not in names:
        raise ConfigError(unknown("definition", compat, names))
