"""Prompts, adapters and all weights on one task, on a supervised and on a self-supervised backbone: docs/transfer.md.

    python benchmarks/transfer.py --data DIR [--only tiny-odd-1x10] [--rows linear LSPT]

Every row is one search by `lamina.selection`: rates are tried on a fifth of the training images that is held out, the
best one learns from all of them and is tested over seeds. All rows of a stream have the same passes and as many tries.
What is half done is resumed; two copies of this program beside each other share the work. Writes
benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lamina.registry import method_class
from lamina.results.records import Record
from lamina.runs import RESULTS as RECORD
from lamina.selection import transfer, transfer_plan
from lamina.storage import write_whole

OUT = Path(__file__).parent / "results" / "transfer.json"
#: read as VPT and GaPT read them: the class token, and the mean of patches and prompts
BACKBONES = ("lamina:vit-nano", "lamina:vit-nano-mae#mean_all")
STREAMS = ("tiny-odd-1x10", "tiny-odd-1x50", "digits")
SEEDS = 3
#: passes and images a step of all rows
SHARED = {"epochs": 10, "batch_size": 32}
#: tries of SGD, and of AdamW for what is there already and for what is new
SGD, ADAMW, NEW = [0.03, 0.1, 0.3], [0.0003, 0.001, 0.003], [0.001, 0.003, 0.01]


class Row(NamedTuple):
    """A row of the table: a method, what is changed in it, and the rates that are tried."""

    name: str
    method: str
    settings: Mapping[str, Any] = {}
    rates: list[float] = SGD


#: an adapter of as many numbers as the LSTM of LSPT has, on a backbone of width 192 and 12 blocks
EQUAL = {"hidden": 64}
ROWS = [
    Row("linear", "linear-probe", {"temperature": 1.0}, NEW),
    Row("BitFit", "bitfit", rates=ADAMW),
    Row("adapter, 1/8", "adapter", {"reduction": 8}, NEW),
    Row("adapter, as many numbers as LSPT", "adapter", EQUAL, NEW),
    Row("Bi-AdaptFormer", "bi-adaptformer", rates=NEW),
    Row("VPT-shallow", "vpt-shallow"),
    Row("VPT-deep", "lspt", {"carry": "none", "spatial": "none", "clip_norm": 0.0}),
    Row("GaPT", "gapt", {"length": 10}),
    Row("LSPT", "lspt"),
    Row("LSPT without patches", "lspt", {"spatial": "none"}),
    Row("LSPT without LSTM", "lspt", {"carry": "none"}),
    Row("LSPT that hears nothing of prompts", "lspt", {"hears": False}),
    Row("LSPT, GRU", "lspt", {"carry": "gru"}),
    Row("LSPT, transformer", "lspt", {"carry": "transformer"}),
    Row("LSPT, two LSTMs", "lspt", {"carriers": 2}),
    Row("LSPT, k-means", "lspt", {"spatial": "kmeans"}),
    Row("full", "full", rates=ADAMW),
]


NAMES = [row.name for row in ROWS]


def known() -> dict[str, Any]:
    """Return what was found so far, by stream, backbone and row."""
    return json.loads(OUT.read_text())["rows"] if OUT.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs") / "transfer", help="folder of the runs")
    given = parser.parse_args()
    wanted = [(s, b, r) for s in given.only for r in ROWS if r.name in given.rows for b in given.backbones]
    for stream, backbone, row in wanted:
        key = f"{stream} {backbone} {row.name}"
        folder = given.out / key.replace(" ", "_").replace("/", "-").replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        fields = method_class(row.method).model_fields
        settings = {name: value for name, value in {**SHARED, **row.settings}.items() if name in fields}
        overrides = {"backbone": backbone, "settings": settings}
        run, _ = transfer_plan(row.method, stream, recipe=False, overrides=overrides)
        try:
            with FileLock(folder / ".lock", blocking=False):
                if key in known():
                    continue
                summary = transfer(run, folder, grid={"lr": row.rates}, seeds=SEEDS, tell=print, data=given.data)
        except Timeout:
            continue  # another copy of this program is at it
        records = [Record.read(folder / final["folder"] / RECORD).as_dict() for final in summary["finals"]]
        found = {
            "stream": stream,
            "backbone": backbone,
            "name": row.name,
            "rate": summary["chosen"]["lr"],
            "records": [record for record in records if record["settings"]["lr"] == summary["chosen"]["lr"]],
        }
        with FileLock(given.out / "results.lock"):
            write_whole(OUT, json.dumps({"shared": SHARED, "names": NAMES, "rows": {**known(), key: found}}) + "\n")
        print(key, summary["accuracy"], flush=True)


if __name__ == "__main__":
    main()
