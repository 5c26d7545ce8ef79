"""Draw docs/null-space-curves.svg: accuracy on new tasks against forgetting, for every sweep of a threshold.

python benchmarks/curves.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamina.results.records import Record
from lamina.storage import write_whole

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {"eta": "#b3402f", "drift": "#2a8a57"}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 420, 60, 60, 20


def points(values: dict[str, Any], sweep: str) -> list[tuple[str, float, float]]:
    """Return name, forgetting and accuracy on new tasks of each run of a sweep, both in percent."""
    records = [Record.from_dict(record) for record in values["records"]]
    found = []
    for row in values["experiments"][sweep]:
        for run in records:
            if (run.method, run.settings, run.seed) == (row["method"], row["settings"], 0):
                learned = sum(line[-1] for line in run.matrix) / len(run.matrix)
                found.append((row["name"], 100 * (run.metrics["forgetting"] or 0.0), 100 * learned))
    return found


def drawing(values: dict[str, Any]) -> str:
    """Return the picture."""
    sweeps = {name: points(values, name) for name in SWEEPS}
    everything = [point for found in sweeps.values() for point in found]
    across = [min(x for _, x, _ in everything) - 1, max(x for _, x, _ in everything) + 4]
    upward = [min(y for _, _, y in everything) - 1, max(y for _, _, y in everything) + 1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - 20)
        down = HEIGHT - BOTTOM - (y - upward[0]) / (upward[1] - upward[0]) * (HEIGHT - BOTTOM - TOP)
        return round(right, 1), round(down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="12" role="img" aria-label="Accuracy on new tasks against forgetting">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 20}" stroke="#c9ced6" fill="none"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#1f2733">forgetting (%)</text>',
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle" fill="#1f2733">'
        "accuracy on new tasks (%)</text>",
    ]
    for x in range(int(across[0]) // 5 * 5 + 5, int(across[1]) + 1, 5):
        parts.append(f'<text x="{place(x, 0)[0]}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x}</text>')
    for y in range(int(upward[0]) // 5 * 5 + 5, int(upward[1]) + 1, 5):
        parts.append(f'<text x="{LEFT - 8}" y="{place(0, y)[1] + 4}" text-anchor="end">{y}</text>')
    for sweep, found in sweeps.items():
        for name, x, y in found:
            right, down = place(x, y)
            parts.append(f'<circle cx="{right}" cy="{down}" r="4" fill="{SWEEPS[sweep]}"/>')
            parts.append(f'<text x="{right + 7}" y="{down + 4}" fill="{SWEEPS[sweep]}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    values = json.loads((ROOT / "benchmarks" / "results" / "null-space.json").read_text())
    write_whole(ROOT / "docs" / "null-space-curves.svg", drawing(values))


if __name__ == "__main__":
    main()
