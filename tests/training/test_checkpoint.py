"""Checkpoints: whole or not at all, and only for the run they were made by."""

import errno
import re
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from lamina.errors import ResumeError, StorageError
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.training import checkpoint
from tests.streams import blobs, trainer_of

IDENTITY = {
    "seed": 3,
    "method": "vpt-nsp2",
    "settings": {"lr": 0.01, "knee": "paper"},
    "stream": {"name": "digits", "tasks": None},
    "stream fingerprint": "aaaa",
    "backbone fingerprint": "bbbb",
}


def state(value, size=3):
    return {"identity": IDENTITY, "position": (0, 0, value), "learned": {"x": torch.full((size,), float(value))}}


class Death(BaseException):
    """The process is gone."""


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, state(5))
    found = checkpoint.load(tmp_path, IDENTITY)
    assert (found["format"], tuple(found["position"])) == (checkpoint.FORMAT, (0, 0, 5))
    assert found["identity"] == IDENTITY
    assert torch.equal(found["learned"]["x"], torch.tensor([5.0, 5.0, 5.0]))


def test_a_folder_without_a_checkpoint_has_none(tmp_path):
    assert checkpoint.load(tmp_path, IDENTITY) is None


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "torch.save"])
def test_a_death_while_saving_leaves_the_older_checkpoint(tmp_path, monkeypatch, function):
    """`torch.save` dies with half of the file written."""
    checkpoint.save(tmp_path, state(5))
    before = (tmp_path / "state.pt").read_bytes()

    def die(*arguments):
        if function == "torch.save":
            arguments[1].write(before[: len(before) // 2])
            arguments[1].flush()
        raise Death

    with monkeypatch.context() as patched:
        patched.setattr(function, die)
        with pytest.raises(Death):
            checkpoint.save(tmp_path, state(6))
    assert (tmp_path / "state.pt").read_bytes() == before
    assert tuple(checkpoint.load(tmp_path, IDENTITY)["position"]) == (0, 0, 5)
    checkpoint.save(tmp_path, state(7))
    assert tuple(checkpoint.load(tmp_path, IDENTITY)["position"]) == (0, 0, 7)


def test_the_contents_are_on_the_disk_before_the_new_name_is(tmp_path, monkeypatch):
    """Else a power cut after the rename can leave an empty file under the final name."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(checkpoint.write_whole.__globals__["os"], name)
        monkeypatch.setattr(f"os.{name}", lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    checkpoint.save(tmp_path, state(5))
    assert order == ["fsync", "replace"]


@contextmanager
def no_room():
    """Let no file grow beyond 4096 bytes: writes fail as on a full disk, for real.

    A context and not a fixture: pytest writes its dots between a test and its fixtures' end, perhaps to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["state.pt", "learned.safetensors"])
def test_a_disk_without_room_is_said_and_the_older_file_stays_whole(tmp_path, what):
    def write(size):
        if what == "state.pt":
            checkpoint.save(tmp_path, state(size, size))
        else:
            checkpoint.save_learned(tmp_path, {"x": torch.ones(size)})

    write(10)
    before = (tmp_path / what).read_bytes()
    with pytest.raises(StorageError) as error, no_room():
        write(100_000)
    assert re.fullmatch(
        re.escape(f"{tmp_path / what} could not be written: ") + r"[^\n]+; what was saved before is still there",
        str(error.value),
    )
    assert (tmp_path / what).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [what]


def test_a_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError) as error:
        checkpoint.save(tmp_path, state(5))
    assert str(error.value) == f"{tmp_path / 'state.pt'} could not be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


# ── files that are not checkpoints ───────────────────────────────────────────────────────────────────


def unreadable(path):
    return re.escape(f"{path} cannot be read (") + r"[^\n]+" + re.escape("); delete it to start this run anew")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_checkpoint_cut_short_is_refused_in_one_line(tmp_path, share):
    checkpoint.save(tmp_path, state(5, 2000))
    path = tmp_path / "state.pt"
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    with pytest.raises(ResumeError) as error:
        checkpoint.load(tmp_path, IDENTITY)
    assert re.fullmatch(unreadable(path), str(error.value))


@pytest.mark.parametrize(
    "contents", [b"garbage", b"\x00" * 500, b"PK\x03\x04 not a zip", b"\x80\x02}q\x00.", b"i\n", b"\x80\x04K\x01K\x02."]
)
def test_garbage_is_refused_in_one_line(tmp_path, contents):
    path = tmp_path / "state.pt"
    path.write_bytes(contents)
    with pytest.raises(ResumeError) as error:
        checkpoint.load(tmp_path, IDENTITY)
    assert re.fullmatch(unreadable(path) + "|" + re.escape(f"{path} has checkpoint format ") + ".*", str(error.value))


def test_an_empty_checkpoint_is_refused_with_the_whole_sentence(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"")
    with pytest.raises(ResumeError) as error:
        checkpoint.load(tmp_path, IDENTITY)
    assert str(error.value) == f"{path} cannot be read (EOFError); delete it to start this run anew"


def test_damage_at_any_byte_gives_our_error_in_one_line_or_none(tmp_path):
    """Each 37th byte is turned around. torch does not check the bytes of tensors, so damage there is not seen."""
    checkpoint.save(tmp_path, state(5, 300))
    path = tmp_path / "state.pt"
    contents = path.read_bytes()
    refused = 0
    for place in range(0, len(contents), 37):
        path.write_bytes(contents[:place] + bytes([contents[place] ^ 0xFF]) + contents[place + 1 :])
        try:
            checkpoint.load(tmp_path, IDENTITY)
        except ResumeError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("contents", "got"), [({"format": 7}, "7"), ({"x": 1}, "None"), ([1, 2], "'list'"), (torch.ones(2), "'Tensor'")]
)
def test_another_format_is_refused(tmp_path, contents, got):
    torch.save(contents, tmp_path / "state.pt")
    with pytest.raises(ResumeError) as error:
        checkpoint.load(tmp_path, IDENTITY)
    assert str(error.value) == (
        f"{tmp_path / 'state.pt'} has checkpoint format {got}; this version of lamina reads format {checkpoint.FORMAT}"
    )


# ── checkpoints of other runs ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 4}, "seed = 3; this run has 4"),
        ({"method": "joint"}, "method = 'vpt-nsp2'; this run has 'joint'"),
        ({"settings": {"lr": 0.02, "knee": "paper"}}, "settings.lr = 0.01; this run has 0.02"),
        ({"settings": {"lr": 0.01, "knee": "code"}}, "settings.knee = 'paper'; this run has 'code'"),
        ({"settings": {"lr": 0.01}}, "settings.knee = 'paper'; this run has None"),
        ({"stream": {"name": "digits", "tasks": 2}}, "stream.tasks = None; this run has 2"),
        ({"stream fingerprint": "cccc"}, "stream fingerprint = 'aaaa'; this run has 'cccc'"),
        ({"backbone fingerprint": "dddd"}, "backbone fingerprint = 'bbbb'; this run has 'dddd'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs_and_both_values(tmp_path, change, sentence):
    checkpoint.save(tmp_path, state(5))
    with pytest.raises(ResumeError) as error:
        checkpoint.load(tmp_path, IDENTITY | change)
    assert str(error.value) == f"{tmp_path / 'state.pt'} was made with {sentence}"


def test_a_trainer_with_another_seed_refuses_the_checkpoint(tiny_vit, tmp_path):
    stream, settings = blobs(tasks=1), VPTNSP2(length=3, epochs=1, batch_size=14)
    trainer_of(settings, tiny_vit, run_dir=tmp_path, seed=1).run(stream)
    with pytest.raises(ResumeError) as error:
        trainer_of(settings, tiny_vit, run_dir=tmp_path, seed=2).restore(stream)
    assert str(error.value) == f"{tmp_path / 'state.pt'} was made with seed = 1; this run has 2"


def test_a_checkpoint_with_other_tensors_than_the_method_has_is_refused(tiny_vit, tmp_path):
    stream = blobs(tasks=1)
    trainer_of(VPTNSP2(length=3, epochs=1, batch_size=14), tiny_vit, run_dir=tmp_path).run(stream)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    del saved["learned"]["prompts.values.1"]
    torch.save(saved, tmp_path / "state.pt")
    with pytest.raises(ResumeError) as error:
        trainer_of(VPTNSP2(length=3, epochs=1, batch_size=14), tiny_vit, run_dir=tmp_path).restore(stream)
    assert str(error.value) == (f"{tmp_path} holds other tensors than this run needs; the first is 'prompts.values.1'")


# ── what was learned ─────────────────────────────────────────────────────────────────────────────────


def test_learned_tensors_round_trip_through_safetensors_without_the_tower(tiny_vit, tmp_path):
    trainer = trainer_of(VPTNSP2(length=3, epochs=1, batch_size=14), tiny_vit)
    trainer.run(blobs(tasks=2))
    learned = trainer.learner.model.learned()
    checkpoint.save_learned(tmp_path, learned)
    found = load_file(tmp_path / "learned.safetensors")
    assert sorted(found) == [
        *(f"head.blocks.{t}.{kind}" for t in range(2) for kind in ("bias", "weight")),
        *(f"prompts.values.{layer}" for layer in range(3)),
    ]
    assert all(torch.equal(value, found[name]) for name, value in learned.items())
    assert (tmp_path / "learned.safetensors").stat().st_size < 24 * (3 * 3 + 2 * 3 + 2) * 4 + 2000


def test_tensors_that_share_memory_are_learned_apart(tmp_path):
    """Views and rows of one storage are written as they look."""
    whole = torch.arange(12.0).view(3, 4)
    checkpoint.save_learned(tmp_path, {"a": whole[1], "b": whole.T, "c": whole})
    found = load_file(tmp_path / "learned.safetensors")
    assert found["a"].tolist() == [4, 5, 6, 7]
    assert torch.equal(found["b"], whole.T) and torch.equal(found["c"], whole)
