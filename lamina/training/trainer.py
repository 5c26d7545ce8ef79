"""The one training loop.

A run is a sequence of tasks, a task a sequence of phases, a phase a sequence of steps. The position
(task, phase, step) names the next step to take; with the run's seed it is all that random draws depend
on, so a run goes on from a checkpoint exactly as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from lamina.data.stream import Stream, Task
from lamina.errors import ConfigError, TrainingError
from lamina.learner import Learner, Phase
from lamina.lookback import Watcher
from lamina.model import PromptedModel
from lamina.prompts.reading import watched
from lamina.schedules import Moment
from lamina.seeds import seed_at
from lamina.training.evaluation import foreseen, shown, summed
from lamina.training.feed import Feed
from lamina.training.gradients import only
from lamina.training.kind import Kind, Question
from lamina.training.meter import DriftMeter
from lamina.training.novelty import Detection, detected
from lamina.training.progress import Progress
from lamina.training.replay import Choosing, taking
from lamina.training.state import STRETCHES, Position, RunState
from lamina.training.stopwatch import Stopwatch


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class Trainer(RunState):
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
        most_steps: a budget: the most steps that a phase takes; schedules see the shorter phase.
        novelty: measure after each task how well images of tasks to come are told from those of tasks met.
        kind: what is asked of images; None tells their classes.

    Attributes:
        position: the next step to take.
        matrix, matrix_task_aware: a row of accuracies for each finished task; in the second one the
            columns of other tasks are masked.
        future: for each finished task a list of accuracies on those after it, by the names of their classes alone;
            empty where the head needs images of a class. The last task has none.
        calibration: the expected calibration error after each task, over the test images of all tasks met.
        batch_calibration: after the last evaluation, the mean of the errors of single batches.
        reliability: after the last evaluation, for each bin of confidence its images, the sum of their confidences, and
            how many were right.
        detection: after each task but the last, by score, how well new images are told from known ones; empty unless
            `novelty`.
        usage: how often test images chose each prompt of a pool in the last evaluation, entry [t][c][p] for class c
            of task t and prompt p; empty without a pool.
        figures, by_class: what else the last evaluation measured, by name, and the measure of each class.
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
        most_steps: int | None = None,
        novelty: bool = False,
        kind: Kind | None = None,
    ) -> None:
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        super().__init__(
            learner,
            self.fabric.device,
            writes=self.fabric.is_global_zero,
            seed=seed,
            run_dir=run_dir,
            identity={"seed": seed, **(identity or {})},
            observers=observers,
            meter=None if learner.at_once else meter,
        )
        self.feed, self.every, self.novelty = feed, checkpoint_every, novelty
        self.online, self.most_steps = online, most_steps
        self.kind = kind or Kind()
        self.progress = progress or Progress()
        self.progress.measure = self.kind.measure
        self.should_stop: Callable[[], bool] = lambda: False

    # ── whole runs ─────────────────────────────────────────────────────────────────────────────────

    def run(self, stream: Stream) -> None:
        """Learn and evaluate task after task, from where this run stands.

        Raises:
            ConfigError: when prompts, protections or the memory cannot take all tasks; nothing was learned.
            Stopped: when `should_stop` says so; the state is saved.
            TrainingError: when the loss is not finite.
            StorageError: when a checkpoint cannot be written.
        """
        self.check(stream)
        stages = self._stages(stream)
        self._begin(stages[: self.position.task])
        for task in stages[self.position.task :]:
            self.learn(task, tasks=len(stages))
            met, ahead = stages[: task.index + 1], stages[task.index + 1 :]
            known = self.evaluate(list(stream) if self.learner.at_once else met)
            if not self.learner.at_once:
                self._foresee(task.index, ahead)
                if self.novelty and ahead and known is not None:
                    self._detect(known, task.index, ahead)
            if self.meter is not None:
                self._measure(self.meter, task.index, len(stages))
            self.position = Position(task.index + 1)
            self.progress.row(task.index, len(stages), self.matrix[-1])
            self._save()
            if task is not stages[-1] and self._any(self.should_stop()):
                raise Stopped

    def check(self, stream: Stream) -> None:
        """Make sure that prompts, protections and memory can take all tasks of a stream; raise ConfigError if not.

        Fixed views that no phase would show are refused, too, lest a record speak of them.
        """
        self.kind.check(self.learner, stream)
        stages, prompts, memory = self._stages(stream), self.learner.model.prompts, self.learner.memory
        phases = (phase for task in stages for phase in (*self.learner.phases(task), *self.learner.refine(task)))
        if self.feed.fixed and all(phase.draws for phase in phases):
            raise ConfigError(f"views={self.feed.views} changes nothing where no phase trains on images; leave it out")
        if prompts is not None:
            prompts.check(stages)
        if memory is not None:
            memory.check(stages)
        for protection in self.learner.protections:
            protection.check(stages, self.fabric.world_size)

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
        if self.position == (task.index, 0, 0):
            self._look_ahead(task, tasks)
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

    def evaluate(self, tasks: Sequence[Task]) -> Detection | None:
        """Append a row of results on `tasks`, keep what else was found, and return how known the images look."""
        asked = Question(
            tasks, self.feed, self.seed, summed(self.fabric), self.progress.advance, temperature=self._temperature
        )
        with self._stretch("evaluate", len(self.matrix), len(tasks), sum(len(task.test) for task in tasks)):
            found = self.kind.evaluate(self.learner.model, asked)
        self._keep(found)
        return found.known

    def _detect(self, known: Detection, stage: int, tasks: Sequence[Task]) -> None:
        """Append how well images of tasks to come are told from those that `known` has seen."""
        new, reduce = Detection(tasks, self._temperature, self.feed.share), summed(self.fabric)
        with self._stretch("evaluate", stage, stage + 1 + len(tasks), sum(len(task.test) for task in tasks)):
            test, advance = (lambda task: self.feed.plain(task.test)), self.progress.advance
            shown(self.learner.model, tasks, test, new.see, seed=self.seed, advance=advance)
        self.detection.append(detected(known.scores(reduce), new.scores(reduce)))

    @property
    def _temperature(self) -> float:
        """What scores are divided by to be those that the loss saw last; 1 where class statistics make them."""
        if self.learner.model.head.statistics is not None or not self.met:
            return 1.0
        task = self.met[-1]
        phases = [*self.learner.phases(task), *self.learner.refine(task)]
        return phases[-1].temperature if phases else 1.0

    def _foresee(self, stage: int, tasks: Sequence[Task]) -> None:
        """Append how well images of tasks to come are told apart by the names of their classes."""
        model, images = self.learner.model, sum(len(task.test) for task in tasks)
        if not tasks or model.head.preview([]) is None:
            return
        with self._stretch("evaluate", stage, stage + 1 + len(tasks), images):
            self.future.append(
                foreseen(
                    model,
                    tasks,
                    self.classes,
                    lambda task: self.feed.plain(task.test),
                    seed=self.seed,
                    reduce=summed(self.fabric),
                    advance=self.progress.advance,
                )
            )

    def _measure(self, meter: DriftMeter, task: int, tasks: int) -> None:
        model, feed = self.learner.model, self.feed
        with self._stretch("measure_drift", task, tasks, meter.images(model, task)):
            meter.measure(model, task, feed.plain, feed.share, summed(self.fabric), self.seed, self.progress.advance)

    # ── one task ───────────────────────────────────────────────────────────────────────────────────

    def _run_phase(self, task: Task, number: int, phase: Phase, tasks: int) -> None:
        model = self.learner.model
        if self.online and not phase.draws:
            phase = replace(phase, epochs=1, repeat=1)
        task = taking(phase, task, self.learner.memory, self.met)
        if len(task.train) or phase.data != "memory":  # nothing may be kept yet
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
            images = phase.draws * self.classes
            total = phase.epochs * -(-images // phase.batch_size)
            source = self.feed.drawn(model.head, task, number, phase, first)
        else:
            images = len(task.train) * phase.repeat
            total = self.feed.steps(task.train, phase)
            source = self.feed.train(task, number, phase, first)
        images *= phase.epochs
        if self.most_steps is not None and self.most_steps < total:
            images, total = self.most_steps * phase.batch_size, self.most_steps
        model.train()
        with ExitStack() as guards, self._stretch("train", task.index, tasks, images) as watch:
            self.progress.skip(min(first * phase.batch_size, images))
            for protection in self.learner.protections:
                guards.enter_context(protection.guard(optimizer))
            for step, fed in zip(range(first, total), source, strict=False):  # a budget may end before the images
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * phase.schedule(Moment(step, total))
                torch.manual_seed(seed_at(self.seed, "step", task.index, number, step, self.fabric.global_rank))
                output = module(fed.batch, task.index)
                terms = {"classify": self.kind.loss(output, fed.batch.targets, task, phase), **output.terms}
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

    def _look_ahead(self, task: Task, tasks: int) -> None:
        """Show a task that begins to those who must have seen it; what they saw is part of every checkpoint."""
        watchers = [watcher for watcher in (self.learner.model.head, *self._remembering) if watcher.looks_ahead]
        if watchers:
            self._look(task, tasks, watchers)

    def _look_back(self, task: Task, tasks: int) -> None:
        """Show the finished task once more to everyone who learns from that."""
        model = self.learner.model
        watchers = [model.head, *self._remembering, *self._choosing(task)]  # the memory chooses when the head is done
        self._look(task, tasks, [watcher for watcher in watchers if not watcher.looks_ahead])
        with torch.no_grad(), self._stretch("look_back", task.index, tasks, 0):
            measuring = [protection for protection in self.learner.protections if protection.measures]
            wanted = {protection.measures for protection in measuring}
            few = {count: list(self.feed.plain(task.train.some(count))) for count in wanted}
            for protection in measuring:
                protection.measure(model, few[protection.measures], summed(self.fabric))

    @torch.no_grad()
    def _look(self, task: Task, tasks: int, watchers: Sequence[Watcher]) -> None:
        """Show a task's training images, without augmentation, to watchers; seconds count as those of a look back."""
        model = self.learner.model
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

    def _choosing(self, task: Task) -> list[Watcher]:
        memory, model = self.learner.memory, self.learner.model
        if memory is None:
            return []
        return [Choosing(memory, task, model, classes=self.classes, share=self.feed.share, seed=self.seed)]

    @contextmanager
    def _stretch(self, name: str, task: int, tasks: int, images: int) -> Iterator[Stopwatch]:
        """Time a stretch of work and show how far it is; one without images is not shown."""
        with Stopwatch(self.seconds.setdefault(name, []), task) as watch, ExitStack() as shown:
            if images:
                self.progress.begin(name.replace("_", " "), task, tasks, images)
                shown.callback(self.progress.end)
            shown.enter_context(watched(self.progress.read))
            yield watch
