"""Transfer to one task: settings are chosen on validation images, then learned anew and tested, over several seeds.

The protocol of VTAB-1K. Every combination of a grid learns from the training images and is measured once, after its
last epoch, on the validation images. The best one learns from both and is tested once for each seed. Test images are
not even decoded before the choice is made.

transfer.json          what was tried, what was chosen, what came out; written anew after every run
select/NAME=VALUE,...  a run of each combination
final/NAME=VALUE,.../seed-N   the runs that count

References:
    Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019: a
        thousand images for training and validation.
    Jia et al., Visual Prompt Tuning, ECCV 2022: the search over rates and decays, the last epoch, the seeds of its
        released code.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.config import assignments
from lamina.errors import ConfigError, ResumeError, TrainingError, unknown
from lamina.registry import method_class
from lamina.results.records import Record
from lamina.results.tables import show, spread
from lamina.results.written import read_json
from lamina.runs import SETTINGS, RunSettings, complete, plan, resumable
from lamina.storage import write_whole

SUMMARY = "transfer.json"

#: of the released code of VPT; its tables are means over the first three or over all
SEEDS = (42, 44, 82, 100, 800)

#: what is tried where no grid is given: a method's own rate times these, with and without decay of weights
_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_DECAY = 1e-4

#: what may differ between a run and its continuation
_FREE = ("devices", "nodes", "checkpoint_every", "workers")

Grid = Mapping[str, Sequence[Any]]


def transfer_plan(
    method: str, stream: str, *, recipe: bool = True, overrides: Mapping[str, Any] | None = None
) -> tuple[RunSettings, Path | None]:
    """Return the settings of a method on all classes of a stream at once, and the recipe used; see `lamina.runs.plan`.

    Raises:
        ConfigError: when a name or value is wrong, or what the protocol decides is asked for otherwise.
    """
    given = dict(overrides or {})
    asked = given.get("stream")
    of_stream = dict(asked) if isinstance(asked, Mapping) else {}
    for name, value in {"seed": given.get("seed"), "stream.test_on": of_stream.get("test_on")}.items():
        if value is not None:
            raise ConfigError(f"{name} is decided by the protocol of transfer; leave it out, got {value!r}")
    if of_stream.get("tasks") not in (None, 1):
        raise ConfigError(
            f"transfer learns all classes as one task; got stream.tasks={of_stream['tasks']!r}: leave it out, or use "
            "`lamina run`"
        )
    return plan(method, stream, recipe=recipe, overrides={**given, "stream": {**of_stream, "tasks": 1}})


def usual_grid(run: RunSettings) -> dict[str, list[Any]]:
    """Return the grid of a method for which none was asked: around its own learning rate, with and without decay.

    A method may bring its own as the class attribute `grid`; one without a learning rate has none.
    """
    kind = method_class(run.method)
    if (own := getattr(kind, "grid", None)) is not None:
        return {name: list(values) for name, values in own.items()}
    built = kind(**run.settings)
    settings = {name: value for name, value in built.model_dump().items() if name not in built.idle()}
    grid: dict[str, list[Any]] = {}
    if settings.get("lr"):
        grid["lr"] = [float(f"{settings['lr'] * factor:.6g}") for factor in _FACTORS]
    if grid and "weight_decay" in settings:
        grid["weight_decay"] = [0.0, settings["weight_decay"] or _DECAY]
    return grid


def grid_of(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """Turn `--grid` options into a grid; values are listed with commas, or as TOML has lists.

    >>> grid_of(["lr=0.1,1", "weight_decay=0.0", "layers=[1, 2]"])
    {'lr': [0.1, 1], 'weight_decay': [0.0], 'layers': [1, 2]}

    Raises:
        ConfigError: when an option has no `=`, no name or no value, or gives a name twice.
    """
    grid: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        words = text.removeprefix("[").removesuffix("]").split(",")
        values = [assignments([f"value={word.strip()}"])["value"] for word in words]
        if not equals or not name or not all(word.strip() for word in words):
            raise ConfigError(f"--grid takes name=value,value; got {pair!r}")
        if name in grid:
            raise ConfigError(f"--grid gives {name} twice; list its values in one option, as in {name}=0.1,1")
        grid[name] = list(dict.fromkeys(values))
    return grid


def combinations(run: RunSettings, grid: Grid) -> list[dict[str, Any]]:
    """Return every combination of a grid, smaller learning rates first, each checked against the method's limits.

    Raises:
        ConfigError: when a name is not a setting of the method, or a value is out of range.
    """
    kind = method_class(run.method)
    for name in grid:
        if name not in kind.model_fields:
            raise ConfigError(f"--grid {name}: " + unknown("setting", name, kind.model_fields))
    cells = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for cell in cells:
        kind(**{**run.settings, **cell}).heed(cell, {})
    return sorted(cells, key=lambda cell: cell.get("lr", 0))


def transfer(
    run: RunSettings,
    folder: Path,
    *,
    grid: Grid | None = None,
    seeds: int = 3,
    tell: Callable[[str], None] = lambda text: None,
    **arguments: Any,
) -> dict[str, Any]:
    """Choose settings on validation images, learn anew with them, test; go on where a run before this one stopped.

    A rate with which a loss stopped being finite takes all larger rates of the grid with it; settings that diverge in a
    final run make room for the next best ones, for all seeds.

    Args:
        run: as `transfer_plan` makes it.
        folder: of the runs and of the summary.
        grid: values to try, by setting; None takes `usual_grid`.
        seeds: how many of SEEDS the chosen settings are tested with; the first one serves the choice.
        tell: is given a sentence after every run.
        arguments: as in `lamina.runs.execute`.

    Returns:
        What `transfer.json` holds.

    Raises:
        LaminaError: for everything that a user can mend.
        TrainingError: when every combination diverges.
        Stopped: when the process was asked to stop.
    """
    if not 1 <= seeds <= len(SEEDS):
        raise ConfigError(f"seeds must be between 1 and {len(SEEDS)}, the first of {list(SEEDS)}; got {seeds}")
    grid = usual_grid(run) if grid is None else grid
    return _Search(run, folder, grid, SEEDS[:seeds], tell, arguments).result()


class _Search:
    """One search: what was tried so far, and how to try more."""

    def __init__(
        self,
        run: RunSettings,
        folder: Path,
        grid: Grid,
        seeds: Sequence[int],
        tell: Callable[[str], None],
        arguments: dict[str, Any],
    ) -> None:
        self.run, self.folder, self.grid, self.seeds = run, folder, grid, seeds
        self.tell, self.arguments = tell, arguments
        self.cells = combinations(run, grid)
        self.trials: list[dict[str, Any]] = []
        self.finals: list[dict[str, Any]] = []
        self.measure = "accuracy"
        #: folders of runs that diverged, with what was said then
        self.diverged = self._known()

    def result(self) -> dict[str, Any]:
        """Select, learn anew, test; return the summary."""
        ranked = self._select() if len(self.cells) > 1 else list(self.cells)
        for cell in ranked:
            records = self._final(cell)
            if records is not None:
                return self._write(cell, records)
        raise TrainingError(
            f"{self.run.method} diverged with all {len(self.cells)} settings that were tried; try smaller ones, as in "
            "--grid lr=0.001"
        )

    def _select(self) -> list[dict[str, Any]]:
        """Return the combinations that can be compared, best first; of equals, that with the smaller rate."""
        stream = self.run.stream.model_copy(update={"test_on": "validation"})
        least: float | None = None
        for cell in self.cells:
            trial: dict[str, Any] = {"settings": cell, "folder": f"select/{_named(cell)}", "accuracy": None}
            if least is not None and cell["lr"] > least:
                trial["left_out"] = f"a run with lr={show(least)} diverged"
            else:
                found = self._done(trial["folder"], cell, stream, self.seeds[0])
                if isinstance(found, Record):
                    trial["accuracy"] = found.metrics["accuracy"]
                    trial["tested_on"] = found.protocol["tested_on"]
                else:
                    trial["diverged"] = found
                    least = cell.get("lr", least) if least is None else least
            self.trials.append(trial)
            self._write()
            said = trial.get("left_out") or ("diverged" if "diverged" in trial else None)
            said = said or f"{100 * trial['accuracy']:.1f} % of {trial['tested_on']}"
            self.tell(f"{_named(cell)}: {said}")
        compared = [trial for trial in self.trials if trial["accuracy"] is not None]
        return [trial["settings"] for trial in sorted(compared, key=lambda trial: -trial["accuracy"])]

    def _final(self, cell: dict[str, Any]) -> list[Record] | None:
        """Return a record for each seed; None when one of them diverged."""
        stream, records = self.run.stream.model_copy(update={"holdout": None}), []
        for seed in self.seeds:
            final: dict[str, Any] = {"settings": cell, "seed": seed, "folder": f"final/{_named(cell)}/seed-{seed}"}
            found = self._done(final["folder"], cell, stream, seed)
            self.finals.append(final)
            if not isinstance(found, Record):
                final["diverged"] = found
                self._write()
                self.tell(f"{_named(cell)}, seed {seed}: diverged; the next best settings take their place")
                return None
            final["accuracy"] = found.metrics["accuracy"]
            records.append(found)
            self._write()
            self.tell(f"{_named(cell)}, seed {seed}: {100 * final['accuracy']:.1f} % of {found.protocol['tested_on']}")
        return records

    def _done(self, place: str, cell: dict[str, Any], stream: Any, seed: int) -> Record | str:
        """Return the record of a run, after running what is missing of it; a sentence where it diverged."""
        folder = self.folder / place
        run = self.run.model_copy(update={"settings": {**self.run.settings, **cell}, "stream": stream, "seed": seed})
        if (folder / SETTINGS).exists():
            self._refuse_other(folder, run)
            if place in self.diverged:
                return self.diverged[place]
        try:
            record = complete(run, folder, **self.arguments)
            self.measure = record.measure
            return record
        except TrainingError as error:
            self.diverged[place] = str(error)
            return str(error)

    def _refuse_other(self, folder: Path, run: RunSettings) -> None:
        from lamina.training.checkpoint import differences

        then, now = (each.model_dump(exclude=set(_FREE)) for each in (resumable(folder), run))
        for name, (old, new) in differences(then, now).items():
            raise ResumeError(f"{folder} holds a run with {name} = {old!r}, this one has {new!r}; give another --out")

    def _known(self) -> dict[str, str]:
        """Return which runs of this folder diverged before."""
        if not (self.folder / SUMMARY).exists():
            return {}
        values = read_json(self.folder / SUMMARY)
        if not isinstance(values, dict) or not isinstance(values.get("diverged"), dict):
            raise ResumeError(f"{self.folder / SUMMARY} is no summary of a transfer; give another --out")
        return values["diverged"]

    def _write(self, chosen: dict[str, Any] | None = None, records: Sequence[Record] = ()) -> dict[str, Any]:
        """Write the summary as it stands, and return it."""
        accuracy = spread([record.metrics["accuracy"] or 0.0 for record in records]) if records else None
        summary = {
            "version": 1,
            "method": self.run.method,
            "stream": self.run.stream.name,
            "backbone": self.run.backbone,
            "grid": {name: list(values) for name, values in self.grid.items()},
            "seeds": list(self.seeds),
            "measure": self.measure,
            "rule": f"{self.measure} after the last epoch; of equals, the smaller learning rate",
            "trials": self.trials,
            "finals": self.finals,
            "diverged": self.diverged,
            "chosen": chosen,
            # what the measure says, whatever it is, as in records
            "accuracy": accuracy and {"mean": accuracy.mean, "deviation": accuracy.deviation, "runs": accuracy.runs},
            "protocol": dict(records[0].protocol) if records else {},
            "command": self.arguments.get("command", ""),
            "finished": bool(records),
        }
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return summary


def _named(cell: Mapping[str, Any]) -> str:
    """Return a combination as the name of a folder.

    >>> _named({"lr": 0.1, "head": "linear"}), _named({})
    ('lr=0.1,head=linear', 'as-given')
    """
    return ",".join(f"{name}={show(value)}".replace("/", "_") for name, value in cell.items()) or "as-given"
