"""Draw docs/images/clap-reliability.svg: is CLAP as sure as it is right, beside names alone and class statistics?

python benchmarks/reliability.py
"""

from __future__ import annotations

import json
from pathlib import Path

from tables import is_run_of

from lamina.results.records import Record
from lamina.results.reliability import bins_of, diagram
from lamina.storage import write_whole

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images" / "clap-reliability.svg"
STREAM = "digits"
#: names of rows of clip.json
ROWS = ("zero-shot", "clap, by the paper's plan", "clap, as its recipe has it", "strata-clip")
WIDTH, HEIGHT, GAP, HEAD = 380, 400, 24, 34
STYLE = """
text{font:12px system-ui,sans-serif;fill:#1b1f24} .small{font-size:10px} .head{font-size:14px;font-weight:600}
.grid{stroke:#e2e6ea} .axis{stroke:#5c6570} .ideal{stroke:#5c6570;stroke-dasharray:5 4}
.bar{fill:#1f6fb4;fill-opacity:.8} .count{fill:#5c6570;fill-opacity:.45}
.gap{fill:#c8500a;fill-opacity:.16;stroke:#c8500a;stroke-width:1.2;stroke-dasharray:3 2}
"""


def main() -> None:
    values = json.loads((ROOT / "benchmarks" / "results" / "clip.json").read_text())
    rows = {row["name"]: row for row in values["experiments"][STREAM]}
    records = [Record.from_dict(record) for record in values["records"]]
    parts = []
    for place, name in enumerate(ROWS):
        run = next(r for r in records if r.seed == 0 and is_run_of(r, rows[name]))
        x, y = place % 2 * (WIDTH + GAP), place // 2 * (HEIGHT + HEAD + GAP)
        said = f"{name}: {100 * run.metrics['accuracy']:.1f} % right, ECE {100 * run.metrics['ece']:.1f} %"
        parts.append(f'<text class="head" x="{x + 44}" y="{y + 20}">{said}</text>')
        drawing = diagram(bins_of(run.reliability), WIDTH, HEIGHT)
        parts.append(drawing.replace("<svg", f'<svg x="{x}" y="{y + HEAD}" width="{WIDTH}" height="{HEIGHT}"', 1))
    wide, high = 2 * WIDTH + GAP, 2 * (HEIGHT + HEAD) + GAP
    write_whole(
        OUT,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}"><style>{STYLE}</style>'
        f'<rect width="{wide}" height="{high}" fill="#fff"/>{"".join(parts)}</svg>\n',
    )


if __name__ == "__main__":
    main()
