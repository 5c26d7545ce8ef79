"""How far a run has come: what a checkpoint holds of it, and what another run may take over.

The loop in `trainer.py` takes steps and says when to save; here nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lamina.data.stream import Stream, Task
from lamina.errors import ResumeError
from lamina.learner import Learner
from lamina.lookback import Watcher
from lamina.seeds import seed_at
from lamina.training import checkpoint
from lamina.training.kind import Evaluated
from lamina.training.log import Log
from lamina.training.meter import DriftMeter

#: of the stretches of work whose seconds are kept apart
STRETCHES = ("train", "look_back", "evaluate")


class Position(NamedTuple):
    """The next step to take; all three count from 0."""

    task: int = 0
    phase: int = 0
    step: int = 0


class RunState:
    """A learner, the tasks it has met, and what came out so far; saved to a run's folder and restored from it.

    Args:
        device: what the learner computes on.
        writes: whether this process is the one that writes files.
        learner, seed, run_dir, identity, observers, meter: as of `lamina.training.trainer.Trainer`.

    Attributes:
        position, matrix, matrix_task_aware, future, calibration, batch_calibration, reliability, detection, usage,
            figures, by_class, seconds: as of `Trainer`.
        met: the tasks that the model has grown for, in order; the last one may not be finished.
    """

    def __init__(
        self,
        learner: Learner,
        device: torch.device,
        *,
        writes: bool,
        seed: int,
        run_dir: Path | None,
        identity: dict[str, Any],
        observers: Sequence[Watcher],
        meter: DriftMeter | None,
    ) -> None:
        self.learner, self.device, self.seed = learner, device, seed
        self.run_dir, self.identity = run_dir, identity
        self.observers, self.meter = observers, meter
        self._writes = writes
        self.log = Log(run_dir if writes else None)
        self.position = Position()
        self.matrix: list[list[float]] = []
        self.matrix_task_aware: list[list[float]] = []
        self.future: list[list[float]] = []
        self.calibration: list[float] = []
        self.batch_calibration: float | None = None
        self.reliability: list[list[float]] = []
        self.detection: list[dict[str, dict[str, float]]] = []
        self.usage: list[list[list[int]]] = []
        self.figures: dict[str, float] = {}
        self.by_class: dict[str, float | None] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in STRETCHES}
        self.met: list[Task] = []
        self._optimizer_state: dict[str, Any] | None = None
        learner.model.to(device)

    @property
    def classes(self) -> int:
        """How many classes were met so far."""
        return 1 + max((column for task in self.met for column in task.columns), default=-1)

    @property
    def _remembering(self) -> list[Watcher]:
        return [*self.learner.protections, *self.observers]

    def _stages(self, stream: Stream) -> list[Task]:
        return [stream.merged()] if self.learner.at_once else list(stream)

    def _begin(self, tasks: Sequence[Task]) -> None:
        """Let the model grow for tasks it has not met; seeded by address, so a resumed run grows alike."""
        for task in tasks:
            if not self.met or task.index > self.met[-1].index:
                torch.manual_seed(seed_at(self.seed, "begin", task.index))
                self.learner.model.begin_task(task)
                self.learner.model.to(self.device)
                self.met.append(task)

    def _keep(self, found: Evaluated) -> None:
        """Take over what an evaluation found."""
        self.matrix.append(found.row)
        if found.aware:
            self.matrix_task_aware.append(found.aware)
        if found.calibration is not None:
            self.calibration.append(found.calibration)
        self.batch_calibration, self.reliability = found.batch_calibration, found.reliability
        self.usage, self.figures, self.by_class = found.usage, dict(found.figures), dict(found.by_class)

    # ── checkpoints ────────────────────────────────────────────────────────────────────────────────

    def _save(self, optimizer: Optimizer | None = None) -> None:
        if self.run_dir is None or not self._writes:
            return
        old_images = self.learner.memory
        state = {
            "identity": self.identity,
            "position": tuple(self.position),
            "begun": self.met[-1].index + 1 if self.met else 0,
            "matrix": self.matrix,
            "matrix_task_aware": self.matrix_task_aware,
            "future": self.future,
            "calibration": self.calibration,
            "batch_calibration": self.batch_calibration,
            "reliability": self.reliability,
            "detection": self.detection,
            "usage": self.usage,
            "figures": self.figures,
            "by_class": self.by_class,
            "seconds": self.seconds,
            "learned": self.learner.model.learned(),
            "memory": self.memory(),
            "old_images": old_images.state_dict() if old_images is not None else None,
            "meter": self.meter.state_dict() if self.meter is not None else None,
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
        }
        checkpoint.save(self.run_dir, state)

    def restore(self, stream: Stream) -> bool:
        """Take up the run in `run_dir` where it stands; return whether there was one.

        Raises:
            ResumeError: when the checkpoint is broken or belongs to another run.
        """
        state = checkpoint.load(self.run_dir, self.identity) if self.run_dir is not None else None
        if state is None:
            self.log.cut(self.position)
            return False
        self.position = Position(*state["position"])
        self.matrix, self.matrix_task_aware = state["matrix"], state["matrix_task_aware"]
        self.future, self.calibration = state.get("future", []), state.get("calibration", [])
        self.batch_calibration, self.reliability = state.get("batch_calibration"), state.get("reliability", [])
        self.detection = state.get("detection", [])
        self.seconds, self.usage = state["seconds"], state.get("usage", [])
        self.figures, self.by_class = state.get("figures", {}), state.get("by_class", {})
        self._recall(self._stages(stream)[: state["begun"]], state["learned"], state["memory"])
        self._optimizer_state = state["optimizer"]
        if self.learner.memory is not None:
            if state.get("old_images") is None:
                raise ResumeError(f"{self.run_dir} was saved without a memory of old images; start this run anew")
            self.learner.memory.load_state_dict(state["old_images"])
        if self.meter is not None:
            self.meter.resume(state.get("meter"), self.position.task)
        self.log.cut(self.position)
        return True

    def adopt(self, tasks: Sequence[Task], learned: Mapping[str, Tensor], memory: Sequence[dict[str, Any]]) -> None:
        """Take over what an earlier run learned from `tasks`; the next task to learn is the one after them.

        Args:
            tasks: in order; their images are not needed.
            learned: as from `PromptedModel.learned`.
            memory: as from `memory`.

        Raises:
            ResumeError: when the tensors are others than this method has after these tasks.
        """
        self._recall(tasks, learned, memory)
        self.position = Position(len(tasks))

    def memory(self) -> list[dict[str, Any]]:
        """Return what protections and observers remember of the tasks so far."""
        return [watcher.state_dict() for watcher in self._remembering]

    def _recall(self, tasks: Sequence[Task], learned: Mapping[str, Tensor], memory: Sequence[dict[str, Any]]) -> None:
        self._begin(tasks)
        model = self.learner.model
        missing, surplus = model.load_state_dict(learned, strict=False)
        lost = model.not_frozen(missing) + surplus
        if lost:
            raise ResumeError(f"{self.run_dir} holds other tensors than this run needs; the first is {lost[0]!r}")
        for watcher, saved in zip(self._remembering, memory, strict=True):
            watcher.load_state_dict(saved)
