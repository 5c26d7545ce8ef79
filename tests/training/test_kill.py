"""Real processes, killed: `lamina run` on scikit-learn's digits with the bundled backbone.

Ten classes in two tasks, five training images each, one epoch in batches of four: 14 steps, a checkpoint each.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lamina

RUN = ["run", "vpt-nsp2", "--no-recipe", "--stream", "digits", "--tasks", "2", "--precision", "32"]
RUN += [f"--set={pair}" for pair in ("epochs=1", "batch_size=4", "stream.per_class=5", "stream.test_per_class=3")]
RUN += ["--set=checkpoint_every=1", "--set=lr=0.05"]
STEPS = [(task, 0, step + 1) for task in range(2) for step in range(7)]
SECONDS = 120


def start(*words, folder):
    """Start `lamina` in a process of its own, on one thread, with a cache that this file's processes share."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "LAMINA_CACHE": str(folder.parent / "cache"),
        "PYTHONPATH": str(Path(lamina.__file__).parents[1]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", "from lamina.cli import main; main()", *words],
        env=environment,
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*words, folder):
    process = start(*words, folder=folder)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return errors


def steps_logged(folder):
    path = folder / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, process):
    """Wait until something holds; return whether the process was still alive then."""
    end = time.monotonic() + SECONDS
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the process does not get on"
        time.sleep(0.002)
    return process.poll() is None


def gone(process, number):
    """Send a signal and return what became of the process, and what it said."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    return process.returncode, errors


def left_behind(folder):
    """Return what must be equal between two runs: the learned bytes, the accuracies, the steps in the log."""
    results = json.loads((folder / "results.json").read_text())
    values = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "learned": (folder / "learned.safetensors").read_bytes(),
        "matrices": [results["matrix"], results["matrix_task_aware"]],
        "metrics": results["metrics"],
        "identity": [results["settings"], results["stream_fingerprint"], results["backbone"], results["finished"]],
        "steps": [(tuple(line["position"]), line["loss"], line["lr"]) for line in values],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(*RUN, "--out", str(folder), folder=folder)
    found = left_behind(folder)
    assert [position for position, *_ in found["steps"]] == STEPS
    return found


def test_a_run_killed_three_times_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    """At random moments in both tasks, each in a process of its own."""
    folder, moments = tmp_path / "run", random.Random(os.getpid())
    words = [*RUN, "--out", str(folder)]
    targets = [moments.randint(1, 4), moments.randint(5, 8), moments.randint(9, 12)]
    for target in targets:
        process = start(*words, folder=folder)
        assert wait_for(lambda target=target: steps_logged(folder) >= target, process), process.communicate()
        time.sleep(moments.uniform(0, 0.05))
        assert gone(process, signal.SIGKILL)[0] == -signal.SIGKILL
        assert not (folder / "results.json").exists()
        words = ["resume", str(folder)]
    finish(*words, folder=folder)
    assert left_behind(folder) == undisturbed, f"killed after {targets} steps"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_says_so_and_can_be_resumed(undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    process = start(*RUN, "--set=checkpoint_every=0", "--out", str(folder), folder=folder)
    target = 3 if number == signal.SIGTERM else 9
    assert wait_for(lambda: steps_logged(folder) >= target, process), process.communicate()
    code, errors = gone(process, number)
    assert code == 75
    assert errors.splitlines()[-1] == f"stopped; go on with `lamina resume {folder}`"
    taken = steps_logged(folder)
    finish("resume", str(folder), folder=folder)
    assert target <= taken < len(STEPS)
    assert left_behind(folder) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_any_moment_of_its_life_ends_as_if_it_had_not_been(undisturbed, tmp_path, seed):
    """From the start of the interpreter to the last byte of the results."""
    folder = tmp_path / "run"
    begun = time.monotonic()
    finish(*RUN, "--out", str(tmp_path / "measured"), folder=folder)
    life = time.monotonic() - begun
    process = start(*RUN, "--out", str(folder), folder=folder)
    time.sleep(random.Random(seed).uniform(0.3, 1.0) * life)
    gone(process, signal.SIGKILL)
    words = ["resume", str(folder)] if (folder / "settings.toml").exists() else [*RUN, "--out", str(folder)]
    finish(*words, folder=folder)
    assert left_behind(folder) == undisturbed
