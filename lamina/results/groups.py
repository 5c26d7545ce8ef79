"""Benchmarks whose average goes over data sets that come in groups: VTAB-1K with nineteen in three."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lamina.errors import DataError, unknown
from lamina.results.records import Record
from lamina.results.tables import percent

#: group -> how many data sets
VTAB_GROUPS: Mapping[str, int] = {"natural": 7, "specialized": 4, "structured": 8}
_PREFIX = "vtab-"


def group_average(means: Mapping[str, float], sizes: Mapping[str, int] = VTAB_GROUPS) -> float:
    """Return the mean over all data sets from the means of groups: Σ_g n_g · m_g / Σ_g n_g; each set weighs the same.

    >>> round(group_average({"natural": 52.36, "specialized": 80.75, "structured": 41.72}), 2)
    53.86

    Raises:
        DataError: when a group is missing, or nobody knows one.
    """
    for name in means:
        if name not in sizes:
            raise DataError(unknown("group", name, sizes))
    if lacking := [name for name in sizes if name not in means]:
        raise DataError(f"an average over groups needs all of {', '.join(sizes)}; it lacks {', '.join(lacking)}")
    return math.fsum(sizes[name] * means[name] for name in sizes) / sum(sizes.values())


def by_group(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return the rows of a table of runs on VTAB-1K: the mean accuracy in each group, and over all data sets.

    A data set counts with the mean over its runs on test images; where these have several settings, it does not count
    and a note says so. A group is shown with how many of its data sets count, and the average where all of all groups
    do. Empty where no run is on VTAB-1K.
    """
    found: dict[tuple[str, str], dict[str, dict[str, list[Record]]]] = {}
    for record in records:
        group = str(record.protocol.get("group", ""))
        tested = record.protocol.get("tested_on", "test images") == "test images"
        if record.stream.startswith(_PREFIX) and group in VTAB_GROUPS and tested and record.finished:
            own = found.setdefault((record.method, record.backbone["name"]), {})
            own.setdefault(group, {}).setdefault(record.stream, []).append(record)
    rows = []
    for (method, backbone), groups in found.items():
        several = [stream for own in groups.values() for stream, runs in own.items() if not _alike(runs)]
        values = {
            group: [_mean([run.metrics["accuracy"] or 0.0 for run in runs]) for runs in own.values() if _alike(runs)]
            for group, own in groups.items()
        }
        counts = {group: len(values.get(group, [])) for group in VTAB_GROUPS}
        means = {group: _mean(values[group]) for group, count in counts.items() if count}
        row = {"method": method, "backbone": backbone}
        for group, size in VTAB_GROUPS.items():
            row[f"{group} (%)"] = f"{percent(means[group])} ({counts[group]} of {size})" if counts[group] else "–"
        row["average of 19 (%)"] = percent(group_average(means)) if counts == VTAB_GROUPS else "–"
        rows.append(row | {"note": f"several settings: {', '.join(several)}" if several else ""})
    return rows


def _alike(runs: Sequence[Record]) -> bool:
    return len({str(sorted(run.settings.items())) for run in runs}) == 1


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
