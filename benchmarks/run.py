"""Run methods over a stream, several seeds each, and keep their records in benchmarks/results.

    python benchmarks/run.py tiny-odd-10 --data DIR
    python benchmarks/run.py digits --methods vpt-deep vpt-nsp2 joint --seeds 0 --name demo

Each run starts from its recipe, like `lamina run METHOD --stream STREAM`. What is finished is not run
again, what is half done is resumed, and records of other methods stay in the file;
`python benchmarks/tables.py` then rewrites the tables of README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from lamina.console import PlainProgress
from lamina.registry import method_names
from lamina.results.records import Record, read_records
from lamina.runs import complete, plan
from lamina.storage import write_whole

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream")
    parser.add_argument("--methods", nargs="+", default=method_names())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the runs")
    parser.add_argument("--name", help="of the file of results; the stream's, if not given")
    given = parser.parse_args()
    records = []
    for seed in given.seeds:
        for method in given.methods:
            settings, _ = plan(method, given.stream, overrides={"seed": seed})
            command = f"lamina run {method} --stream {given.stream} --seed {seed}"
            folder = given.out / given.stream / f"{method}-{seed}"
            record = complete(settings, folder, data=given.data, command=command, progress=PlainProgress)
            records.append(record)
            print(method, seed, record.metrics, flush=True)
    path = ROOT / "benchmarks" / "results" / f"{given.name or given.stream}.json"
    kept = [record for record in read_records(path) if record.method not in given.methods] if path.exists() else []
    records = sorted([*kept, *records], key=lambda record: (-mean_accuracy(records + kept, record.method), record.seed))
    text = json.dumps({"records": [record.as_dict() for record in records]}, indent=1)
    write_whole(path, text + "\n")


def mean_accuracy(records: list[Record], method: str) -> float:
    """Return what the rows of a table are sorted by."""
    return fmean(record.metrics["accuracy"] or 0.0 for record in records if record.method == method)


if __name__ == "__main__":
    main()
