"""Two processes learn what one learns: batches of 13 of 27 images, so shares of 7 and 6, 7 and 6, 1 and none."""

from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from lamina.methods.coda_prompt import CODAPrompt
from lamina.methods.dualprompt import DualPrompt
from lamina.methods.dualprompt_pgp import DualPromptPGP
from lamina.methods.l2p import L2P
from lamina.methods.l2p_nsp2 import L2PNSP2
from lamina.methods.l2p_pgp import L2PPGP
from lamina.methods.l2p_pp import L2PPP
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.nearest_mean import NearestMean
from lamina.methods.vpt_deep import VPTDeep
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.methods.vpt_pgp import VPTPGP
from lamina.runs import execute, plan
from lamina.training.launch import launch
from lamina.training.meter import DriftMeter
from lamina.training.trainer import Stopped
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

#: all kinds but CPrompt, which draws tasks for images in each process for itself
METHODS = {
    "vpt-nsp2": VPTNSP2(length=4, epochs=2, batch_size=13, temperature=2.0),
    "vpt-deep": VPTDeep(length=4, epochs=2, batch_size=13, temperature=2.0),
    "l2p": L2P(size=5, top=2, length=1, epochs=2, batch_size=13),
    "l2p-pgp": L2PPGP(size=5, top=2, length=1, epochs=2, batch_size=13),
    "l2p-nsp2": L2PNSP2(size=5, top=2, length=1, epochs=2, batch_size=13),
    "l2p-pp": L2PPP(size=5, top=2, length=1, epochs=2, batch_size=13),
    "dualprompt": DualPrompt(length=2, epochs=2, batch_size=13),
    "dualprompt-pgp": DualPromptPGP(length=2, epochs=2, batch_size=13),
    "coda-prompt": CODAPrompt(length=1, components=3, epochs=2, batch_size=13),
    "vpt-pgp": VPTPGP(length=4, epochs=2, batch_size=13, temperature=2.0),
    "linear-probe": LinearProbe(epochs=2, batch_size=13, lr=0.02),
    "nearest-mean": NearestMean(),
}
#: prompts that an image takes
CHOSEN = {"l2p": 2, "l2p-pgp": 2, "l2p-nsp2": 2, "l2p-pp": 2, "dualprompt": 1, "dualprompt-pgp": 1}
#: where two processes stop and one goes on alone: task, phase and next step
HALFWAY = (1, 0, 2)


def learn(fabric, settings, run_dir=None, stop=None):
    trainer = trainer_of(settings, make_tiny_vit(), fabric=fabric, run_dir=run_dir, meter=DriftMeter(blobs()))
    if stop is not None:
        trainer.should_stop = lambda: trainer.position == stop
    trainer.restore(blobs())
    trainer.run(blobs())
    return trainer


def outcome(trainer):
    learner = trainer.learner
    return {
        "learned": learner.model.learned(),
        "kept": [protection.state_dict() for protection in learner.protections],
        "matrices": [trainer.matrix, trainer.matrix_task_aware],
        "drift": [torch.tensor(row) for row in trainer.meter.drift],
        "usage": trainer.usage,
    }


def learn_everything(fabric, folder):
    """What each of two processes does; it leaves its results in a file of its own."""
    torch.set_num_threads(1)
    results = {name: outcome(learn(fabric, settings)) for name, settings in METHODS.items()}
    torch.save(results, Path(folder) / f"{fabric.global_rank}.pt")
    try:
        learn(fabric, METHODS["vpt-nsp2"], Path(folder) / "stopped", HALFWAY)
    except Stopped:
        return fabric.world_size
    return "it did not stop"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Return the folder in which two processes left what they learned: one spawn for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "stopped").mkdir()
    assert launch(learn_everything, folder, accelerator="cpu", devices=2) == 2
    return folder


@pytest.fixture(scope="module")
def alone():
    fabric = Fabric(accelerator="cpu", devices=1)
    return {name: outcome(learn(fabric, settings)) for name, settings in METHODS.items()}


def assert_close(ours, theirs, tolerance, name=""):
    """Compare nested tensors, relative to the largest number of each."""
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape, name
        if ours.numel():
            assert (ours - theirs).abs().max() <= tolerance * max(1.0, ours.abs().max().item()), name
        return
    if not isinstance(ours, dict | list | tuple):
        assert ours == theirs, name
        return
    keys = ours.keys() if isinstance(ours, dict) else range(len(ours))
    assert keys == (theirs.keys() if isinstance(theirs, dict) else range(len(theirs))), name
    for key in keys:
        assert_close(ours[key], theirs[key], tolerance, f"{name}.{key}")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_learns(together, alone, name, rank):
    """To 1e-5: all that differs is the order in which a batch is summed; of tiny gradients Adam makes more."""
    theirs = torch.load(together / f"{rank}.pt", weights_only=True)[name]
    assert_close(alone[name]["learned"], theirs["learned"], 1e-5)
    assert_close(alone[name]["kept"], theirs["kept"], 1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_both_processes_know_the_accuracies_of_one(together, alone, name, rank):
    theirs = torch.load(together / f"{rank}.pt", weights_only=True)[name]
    assert theirs["matrices"] == alone[name]["matrices"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_both_processes_know_which_prompts_were_chosen_in_one(together, alone, name, rank):
    """So many prompts for each of 11 images a task, of which one process sees 6 and the other 5."""
    theirs = torch.load(together / f"{rank}.pt", weights_only=True)[name]
    assert theirs["usage"] == alone[name]["usage"]
    taken = 11 * CHOSEN.get(name, 0)
    assert [sum(map(sum, table)) for table in theirs["usage"]] == ([taken, taken] if taken else [])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_both_processes_know_the_drift_that_one_measures(together, alone, name, rank):
    """Of 11 images a task, 6 and 5."""
    theirs = torch.load(together / f"{rank}.pt", weights_only=True)[name]
    assert_close(alone[name]["drift"], theirs["drift"], 1e-5)


def test_one_process_goes_on_where_two_stopped(together, alone):
    """The number of processes is free to change from a run to its continuation."""
    assert torch.load(together / "stopped" / "state.pt", weights_only=True)["position"] == HALFWAY
    trainer = learn(Fabric(accelerator="cpu", devices=1), METHODS["vpt-nsp2"], together / "stopped")
    assert_close(alone["vpt-nsp2"]["learned"], outcome(trainer)["learned"], 1e-6)
    assert_close(alone["vpt-nsp2"]["drift"], outcome(trainer)["drift"], 1e-5)
    assert [trainer.matrix, trainer.matrix_task_aware] == alone["vpt-nsp2"]["matrices"]
    assert len((together / "stopped" / "log.jsonl").read_text().splitlines()) == 12


def test_a_whole_run_on_two_processes_returns_the_record_of_one(tmp_path):
    small = {"stream": {"per_class": 3, "test_per_class": 2, "tasks": 2}, "precision": "32"}
    records = []
    for devices in (1, 2):
        run, _ = plan("nearest-mean", "digits", overrides={**small, "devices": devices, "accelerator": "cpu"})
        records.append(execute(run, tmp_path / str(devices)))
    assert records[0].matrix == records[1].matrix and records[1].finished


def test_two_processes_start_only_where_two_are_asked_for():
    assert launch(lambda fabric, word: (word, fabric.world_size), "alone", accelerator="cpu") == ("alone", 1)
