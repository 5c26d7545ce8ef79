"""The one training loop.

A run is a sequence of tasks, a task a sequence of phases, a phase a sequence of steps. The position
(task, phase, step) names the next step to take; with the run's seed it is all that random draws depend
on, so a run goes on from a checkpoint exactly as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from lamina.data.stream import Stream, Task
from lamina.errors import ResumeError, TrainingError
from lamina.learner import Learner, Phase
from lamina.lookback import Watcher
from lamina.model import PromptedModel
from lamina.seeds import seed_at
from lamina.training import checkpoint
from lamina.training.evaluation import accuracies, summed
from lamina.training.feed import Feed
from lamina.training.gradients import only
from lamina.training.log import Log
from lamina.training.meter import DriftMeter
from lamina.training.objective import classify
from lamina.training.progress import Progress
from lamina.training.stopwatch import Stopwatch
from lamina.training.usage import Usage

#: of the stretches of work whose seconds are kept apart
STRETCHES = ("train", "look_back", "evaluate")


class Position(NamedTuple):
    """The next step to take; all three count from 0."""

    task: int = 0
    phase: int = 0
    step: int = 0


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class Trainer:
    """Runs a learner over a stream, one task at a time.

    Args:
        learner: the method, built.
        feed: brings batches of a task's images, or of their cached features.
        seed: of everything random in training.
        run_dir: where checkpoints and the log go; None keeps nothing.
        checkpoint_every: steps between checkpoints; 0 saves at the end of each phase and task alone.
        identity: what a checkpoint must share with this run: settings, stream, backbone.
        progress: told how far the run is.
        observers: who else learns from the look back, beside head and protections.
        meter: measures after each task how far old test images moved; of no use where all is learned at once.
        online: go through a phase's images once, whatever the method says; schedules see the shorter phase.

    Attributes:
        position: the next step to take.
        matrix, matrix_task_aware: a row of accuracies for each finished task; in the second one the
            columns of other tasks are masked.
        usage: how often test images chose each prompt of a pool in the last evaluation, entry [t][c][p] for class c
            of task t and prompt p; empty without a pool.
        seconds: of each stretch of work, per task; of "measure_drift", too, where there is a meter.
    """

    def __init__(
        self,
        learner: Learner,
        feed: Feed,
        fabric: Fabric | None = None,
        *,
        seed: int = 0,
        run_dir: Path | None = None,
        checkpoint_every: int = 0,
        identity: dict[str, Any] | None = None,
        progress: Progress | None = None,
        observers: Sequence[Watcher] = (),
        meter: DriftMeter | None = None,
        online: bool = False,
    ) -> None:
        self.learner, self.feed, self.seed = learner, feed, seed
        self.run_dir, self.every = run_dir, checkpoint_every
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        self.identity = {"seed": seed, **(identity or {})}
        self.progress = progress or Progress()
        self.observers = observers
        self.meter = None if learner.at_once else meter
        self.online = online
        self.log = Log(run_dir if self.fabric.is_global_zero else None)
        self.position = Position()
        self.matrix: list[list[float]] = []
        self.matrix_task_aware: list[list[float]] = []
        self.usage: list[list[list[int]]] = []
        self.seconds: dict[str, list[float]] = {name: [] for name in STRETCHES}
        self.should_stop: Callable[[], bool] = lambda: False
        self._begun = self._met = 0  # tasks and classes
        self._optimizer_state: dict[str, Any] | None = None
        learner.model.to(self.fabric.device)

    # ── whole runs ─────────────────────────────────────────────────────────────────────────────────

    def run(self, stream: Stream) -> None:
        """Learn and evaluate task after task, from where this run stands.

        Raises:
            ConfigError: when prompts or protections cannot take all tasks; nothing was learned.
            Stopped: when `should_stop` says so; the state is saved.
            TrainingError: when the loss is not finite.
            StorageError: when a checkpoint cannot be written.
        """
        self.check(stream)
        stages = self._stages(stream)
        self._begin(stages[: self.position.task])
        for task in stages[self.position.task :]:
            self.learn(task, tasks=len(stages))
            self.evaluate(list(stream) if self.learner.at_once else stages[: task.index + 1])
            if self.meter is not None:
                self._measure(self.meter, task.index, len(stages))
            self.position = Position(task.index + 1)
            self.progress.row(task.index, len(stages), self.matrix[-1])
            self._save()
            if task is not stages[-1] and self._any(self.should_stop()):
                raise Stopped

    def check(self, stream: Stream) -> None:
        """Make sure that prompts and protections can take all tasks of a stream; raise ConfigError if not."""
        stages, prompts = self._stages(stream), self.learner.model.prompts
        if prompts is not None:
            prompts.check(stages)
        for protection in self.learner.protections:
            protection.check(stages, self.fabric.world_size)

    def _stages(self, stream: Stream) -> list[Task]:
        return [stream.merged()] if self.learner.at_once else list(stream)

    def learn(self, task: Task, *, tasks: int = 1) -> None:
        """Learn one task: run its phases, look back on it, and refine what was learned.

        Args:
            tasks: how many tasks there are, for whoever watches.
        """
        self._begin([task])
        if self.position.task != task.index:
            self.position = Position(task.index)
        for name in STRETCHES:
            self.seconds[name] += [0.0] * (task.index + 1 - len(self.seconds[name]))
        before, after = self.learner.phases(task), self.learner.refine(task)
        looking = len(before)  # the look back takes a number among the phases
        for number, phase in enumerate(before):
            if number >= self.position.phase:
                self._run_phase(task, number, phase, tasks)
        if self.position.phase <= looking:
            self._look_back(task, tasks)
            self.position = Position(task.index, looking + 1)
            if after:
                self._save()
        for number, phase in enumerate(after, start=looking + 1):
            if number >= self.position.phase:
                self._run_phase(task, number, phase, tasks)

    def evaluate(self, tasks: Sequence[Task]) -> None:
        """Append a row of accuracies on `tasks` to the matrices, and count anew which prompts their images choose."""
        stage, prompts = len(self.matrix), self.learner.model.prompts
        usage = Usage(tasks, prompts.pool_size if prompts is not None else 0)
        with self._stretch("evaluate", stage, len(tasks), sum(len(task.test) for task in tasks)):
            row, aware = accuracies(
                self.learner.model,
                tasks,
                lambda task: self.feed.plain(task.test),
                seed=self.seed,
                reduce=summed(self.fabric),
                advance=self.progress.advance,
                see=usage.see,
            )
        self.usage = usage.counts(summed(self.fabric))
        self.matrix.append(row)
        self.matrix_task_aware.append(aware)

    def _measure(self, meter: DriftMeter, task: int, tasks: int) -> None:
        model, feed = self.learner.model, self.feed
        with self._stretch("measure_drift", task, tasks, meter.images(model, task)):
            meter.measure(model, task, feed.plain, feed.share, summed(self.fabric), self.seed, self.progress.advance)

    @property
    def _remembering(self) -> list[Watcher]:
        return [*self.learner.protections, *self.observers]

    # ── one task ───────────────────────────────────────────────────────────────────────────────────

    def _begin(self, tasks: Sequence[Task]) -> None:
        """Let the model grow for tasks it has not met; seeded by address, so a resumed run grows alike."""
        for task in tasks:
            if task.index >= self._begun:
                torch.manual_seed(seed_at(self.seed, "begin", task.index))
                self.learner.model.begin_task(task)
                self.learner.model.to(self.fabric.device)
                self._begun = task.index + 1
                self._met = max(self._met, max(task.columns) + 1)

    def _run_phase(self, task: Task, number: int, phase: Phase, tasks: int) -> None:
        model = self.learner.model
        if self.online and not phase.draws:
            phase = replace(phase, epochs=1, repeat=1)
        with only(phase.parameters(model), model) if phase.parameters is not None else nullcontext():
            self._take_steps(model, task, number, phase, tasks)
        self.position = Position(task.index, number + 1)
        self._save()

    def _take_steps(self, model: PromptedModel, task: Task, number: int, phase: Phase, tasks: int) -> None:
        module = self.fabric.setup_module(model)  # anew for each phase, since parameters come and go
        optimizer = phase.optimizer([p for p in model.parameters() if p.requires_grad])
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        wrapped = self.fabric.setup_optimizers(optimizer)
        first = self.position.step if self.position[:2] == (task.index, number) else 0
        if phase.draws:
            images = phase.draws * self._met
            total = phase.epochs * -(-images // phase.batch_size)
            source = self.feed.drawn(model.head, task, number, phase, first)
        else:
            images = len(task.train) * phase.repeat
            total = self.feed.steps(task.train, phase)
            source = self.feed.train(task, number, phase, first)
        images *= phase.epochs
        model.train()
        with ExitStack() as guards, self._stretch("train", task.index, tasks, images) as watch:
            self.progress.skip(min(first * phase.batch_size, images))
            for protection in self.learner.protections:
                guards.enter_context(protection.guard(optimizer))
            for step, fed in enumerate(source, start=first):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * phase.schedule(step / total)
                torch.manual_seed(seed_at(self.seed, "step", task.index, number, step, self.fabric.global_rank))
                output = module(fed.batch, task.index)
                terms = {"classify": classify(output.logits, fed.batch.targets, task, phase), **output.terms}
                terms = {name: fed.weight * term for name, term in terms.items()}
                for protection in self.learner.protections:
                    terms |= protection.terms(model)
                loss = torch.stack(list(terms.values())).sum()
                values = self._checked(loss, terms, task, step)
                optimizer.zero_grad()
                self.fabric.backward(loss)
                if phase.clip_norm is not None:  # after processes have shared gradients, so all clip alike
                    self.fabric.clip_gradients(module, optimizer, max_norm=phase.clip_norm, error_if_nonfinite=False)
                wrapped.step()  # type: ignore[union-attr]  # one optimizer in, one out
                self.position = Position(task.index, number, step + 1)
                self.progress.advance(fed.images, values["loss"])
                self.log.step(self.position, values, optimizer.param_groups[0]["lr"], fed.images)
                stop = self._any(self.should_stop())
                if stop or (self.every and (step + 1) % self.every == 0):
                    watch.lap()
                    self._save(optimizer)
                if stop:
                    raise Stopped

    def _any(self, mine: bool) -> bool:
        """Say whether it is so in any process; all must do the same, or one would wait for ever."""
        return bool(summed(self.fabric)(torch.tensor(float(mine))) > 0)

    def _checked(self, loss: Tensor, terms: dict[str, Tensor], task: Task, step: int) -> dict[str, float]:
        """Return the loss and its terms as numbers, after making sure that they are finite."""
        values = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
        if self._any(not math.isfinite(values["loss"])):
            parts = ", ".join(f"{name} = {value:.4g}" for name, value in values.items() if name != "loss")
            raise TrainingError(
                f"the loss is not finite in task {task.index + 1}, step {step + 1}: {parts}; lower the learning rate "
                "or raise the temperature. The last checkpoint is from before this step."
            )
        return values

    @torch.no_grad()
    def _look_back(self, task: Task, tasks: int) -> None:
        """Show the finished task once more, without augmentation, to everyone who learns from that."""
        model, watchers = self.learner.model, [self.learner.model.head, *self._remembering]
        model.eval()
        probing = [watcher for watcher in watchers if watcher.looks_at == "probes"]
        reading = [watcher for watcher in watchers if watcher.looks_at == "features"]
        asking = [watcher for watcher in watchers if watcher.looks_at == "queries"]
        looking = bool(probing or reading or asking)

        def tap(probe: Any) -> None:
            for watcher in probing:
                watcher.see(probe)

        with self._stretch("look_back", task.index, tasks, len(task.train) if looking else 0):
            for watcher in watchers:
                watcher.begin_look()
            if looking:
                for batch in self.feed.plain(task.train):
                    features, _ = model.features(batch, tap=tap if probing else None)
                    for watcher in reading:
                        watcher.collect(features, batch.targets)
                    for watcher in asking:
                        watcher.collect(model.query(batch), batch.targets)
                    self.progress.advance(len(batch.targets))
            for watcher in watchers:
                watcher.end_look(summed(self.fabric))
            measuring = [protection for protection in self.learner.protections if protection.measures]
            wanted = {protection.measures for protection in measuring}
            few = {count: list(self.feed.plain(task.train.some(count))) for count in wanted}
            for protection in measuring:
                protection.measure(model, few[protection.measures], summed(self.fabric))

    @contextmanager
    def _stretch(self, name: str, task: int, tasks: int, images: int) -> Iterator[Stopwatch]:
        """Time a stretch of work and show how far it is; one without images is not shown."""
        with Stopwatch(self.seconds.setdefault(name, []), task) as watch, ExitStack() as shown:
            if images:
                self.progress.begin(name.replace("_", " "), task, tasks, images)
                shown.callback(self.progress.end)
            yield watch

    # ── checkpoints ────────────────────────────────────────────────────────────────────────────────

    def _save(self, optimizer: Optimizer | None = None) -> None:
        if self.run_dir is None or not self.fabric.is_global_zero:
            return
        state = {
            "identity": self.identity,
            "position": tuple(self.position),
            "begun": self._begun,
            "matrix": self.matrix,
            "matrix_task_aware": self.matrix_task_aware,
            "usage": self.usage,
            "seconds": self.seconds,
            "learned": self.learner.model.learned(),
            "memory": self.memory(),
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
        self.seconds, self.usage = state["seconds"], state.get("usage", [])
        self._recall(self._stages(stream)[: state["begun"]], state["learned"], state["memory"])
        self._optimizer_state = state["optimizer"]
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
        lost = [name for name in missing if not name.startswith("tower.")] + surplus
        if lost:
            raise ResumeError(f"{self.run_dir} holds other tensors than this run needs; the first is {lost[0]!r}")
        for watcher, saved in zip(self._remembering, memory, strict=True):
            watcher.load_state_dict(saved)
