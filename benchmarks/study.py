"""Runs that belong together: variants of recipes, each over some seeds, and one file of results.

A program like `null_space.py` says which variants there are; here they are run. What is in the file of results is
not run again; what is half done is resumed; two copies of such a program beside each other share the work.
`python benchmarks/tables.py` then rewrites the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lamina.console import PlainProgress
from lamina.errors import ConfigError
from lamina.registry import method_class
from lamina.results.tables import flatten
from lamina.runs import complete, plan
from lamina.storage import write_whole

RESULTS = Path(__file__).parent / "results"


class Variant(NamedTuple):
    """A row of a table.

    Attributes:
        name: what the row is called.
        method: whose recipe it starts from.
        settings: what is changed in it.
        seeds: one run each.
        stream: what it learns.
        run: what is changed in the run, beside the method's settings.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = {}
    seeds: tuple[int, ...] = (0,)
    stream: str = "tiny-odd-10"
    run: Mapping[str, Any] = {}

    @property
    def whole(self) -> dict[str, Any]:
        """All settings of the method: the recipe's, the defaults, and what is changed in them."""
        run, _ = plan(self.method, self.stream, overrides={"settings": self.settings})
        return method_class(self.method)(**run.settings).model_dump()

    def key(self, seed: int) -> str:
        """Return what tells one of its runs from all others."""
        return json.dumps([self.method, self.whole, self.stream, _protocol(self.run), seed], sort_keys=True)

    def command(self, seed: int) -> str:
        """Return what a user would type for one of its runs."""
        words = [f"lamina run {self.method} --stream {self.stream} --seed {seed}"]
        words += [
            f"--{name.replace('_', '-')}" if value is True else f"--set {name}={json.dumps(value)}"
            for name, value in flatten({**self.run, **self.settings}).items()
        ]
        return " ".join(words)


def key(record: Mapping[str, Any]) -> str:
    """Return what tells a record from all others, as `Variant.key` does."""
    # A record from before a setting was there is one of a run with its default.
    settings = method_class(record["method"])(**record["settings"]).model_dump()
    run = _protocol(record["protocol"])
    return json.dumps([record["method"], settings, record["stream"], run, record["seed"]], sort_keys=True)


def _protocol(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run's protocol tells variants apart."""
    return {name: bool(values[name]) for name in ("online",) if values.get(name)}


class Study:
    """Experiments by name, and where their records are.

    Args:
        name: of the file of results.
        experiments: the rows of each.
        also: other files whose records count as run.
        run: what is changed in all runs.
    """

    def __init__(
        self,
        name: str,
        experiments: Mapping[str, list[Variant]],
        *,
        also: tuple[str, ...] = (),
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.experiments, self.also, self.run = name, experiments, also, dict(run or {})
        self.path = RESULTS / f"{name}.json"

    def wanted(self, names: list[str]) -> Iterator[tuple[Variant, int]]:
        """Yield every run that is needed, each once, first seeds first."""
        variants = [variant for name in names for variant in self.experiments[name]]
        seen = set()
        for seed in sorted({seed for variant in variants for seed in variant.seeds}):
            for variant in variants:
                run = variant.key(seed)
                if seed in variant.seeds and run not in seen:
                    seen.add(run)
                    yield variant, seed

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return what the tables are made of, for the file of results."""
        return {
            name: [
                {
                    "name": variant.name,
                    "method": variant.method,
                    "settings": variant.whole,
                    "stream": variant.stream,
                    "run": _protocol(variant.run),
                    "seeds": list(variant.seeds),
                }
                for variant in variants
            ]
            for name, variants in self.experiments.items()
        }

    def own(self) -> dict[str, dict[str, Any]]:
        """Return the records in the file of results, by `key`."""
        return _records(self.path)

    def known(self) -> dict[str, dict[str, Any]]:
        """Return all records that count as run, by `key`."""
        return {**{k: r for name in self.also for k, r in _records(RESULTS / f"{name}.json").items()}, **self.own()}

    def write(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the file of results."""
        values = {"also": list(self.also), "experiments": self.rows(), "records": list(records.values())}
        write_whole(self.path, json.dumps(values) + "\n")

    def main(self, about: str) -> None:
        """Run what is missing."""
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", nargs="+", choices=self.experiments, default=list(self.experiments))
        parser.add_argument("--data", type=Path)
        parser.add_argument("--out", type=Path, default=Path("runs") / self.name, help="folder of the runs")
        given = parser.parse_args()
        given.out.mkdir(parents=True, exist_ok=True)
        for variant, seed in self.wanted(given.only):
            run, command = variant.key(seed), variant._replace(run={**self.run, **variant.run}).command(seed)
            label = "-".join(command.replace("--", "").replace('"', "").split()[2:])
            label += f"-{hashlib.sha256(run.encode()).hexdigest()[:8]}"  # another one where a recipe has changed
            try:
                with FileLock(given.out / f"{label}.lock", blocking=False):
                    if run in self.known():
                        continue
                    overrides = {"seed": seed, **self.run, **variant.run, "settings": dict(variant.settings)}
                    planned, _ = plan(variant.method, variant.stream, overrides=overrides)
                    folder = given.out / label
                    record = complete(planned, folder, data=given.data, command=command, progress=PlainProgress)
            except Timeout:
                continue  # another copy of this program is at it
            with FileLock(given.out / "results.lock"):
                self.write({**self.own(), run: record.as_dict()})
            metrics = {name: round(value, 4) for name, value in record.metrics.items() if value is not None}
            print(label, metrics, flush=True)


def _records(path: Path) -> dict[str, dict[str, Any]]:
    records = json.loads(path.read_text())["records"] if path.exists() else []
    found = {}
    for record in records:
        with contextlib.suppress(ConfigError):  # of settings that are no more: a run of no variant
            found[key(record)] = record
    return found
