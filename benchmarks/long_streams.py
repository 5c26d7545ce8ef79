"""What one more task costs after many: 50 tasks of two classes and 100 tasks of one.

    python benchmarks/long_streams.py --data DIR

Prints and keeps, for tasks 1, 10, 50 and 100, the seconds of training and looking back (evaluation, which looks
at all classes met, is left out), the most memory so far, and the size of a checkpoint of what was learned.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lamina.runs import execute, plan
from lamina.storage import write_whole
from lamina.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "long-streams.json"
SHOWN = (1, 10, 50, 100)


def measure(method: str, tasks: int, data: Path | None) -> dict[str, Any]:
    """Run a method over the odd classes in so many tasks; return a row for each task in SHOWN."""
    run, _ = plan(method, "tiny-odd-10", overrides={"stream": {"tasks": tasks, "per_class": 20, "test_per_class": 2}})
    run = run.model_copy(update={"settings": {**run.settings, **({"epochs": 2} if "epochs" in run.settings else {})}})
    seen: dict[int, dict[str, float]] = {}
    evaluate = Trainer.evaluate

    def watched(trainer: Trainer, stages: Any) -> None:
        from lamina.machine import peak_memory_mb
        from lamina.runs import _tensors

        evaluate(trainer, stages)
        number = trainer.position.task + 1
        if number in SHOWN:
            kept = _tensors([trainer.learner.model.learned(), trainer.memory()])
            seen[number] = {
                "peak memory (MB)": peak_memory_mb(trainer.fabric.device),
                "kept (MB)": round(sum(tensor.numel() * tensor.element_size() for tensor in kept) / 1e6, 2),
            }

    Trainer.evaluate = watched  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            record = execute(run, Path(folder) / "run", data=data)
    finally:
        Trainer.evaluate = evaluate  # type: ignore[method-assign]
    rows = []
    for number, facts in seen.items():
        # the mean of up to three neighbours: one task is too short to time
        near = range(max(0, number - 2), min(tasks, number + 1))
        seconds = sum(record.seconds[part][i] for part in ("train", "look_back") for i in near) / len(near)
        rows.append({"task": number, "seconds": round(seconds, 3), **facts})
    print(method, tasks, rows, flush=True)
    return {"method": method, "tasks": tasks, "rows": rows, "hardware": record.hardware, "commit": record.commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["vpt-nsp2", "strata"])
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")  # each run in a process of its own, since memory is the most ever held
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as one:
        runs = [one.submit(measure, method, tasks, given.data) for method in given.methods for tasks in (50, 100)]
        out = [run.result() for run in runs]
    write_whole(RESULTS, json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
