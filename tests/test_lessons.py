"""`lamina learn`: killed, doubled, interrupted or fed nonsense, and MODEL is the old one or the new one, never less."""

import json
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamina.errors import StorageError
from lamina.lessons import learn_folder
from lamina.modelfile import ModelFile
from lamina.registry import method_names
from lamina.training.log import Log
from lamina.training.trainer import Stopped, Trainer
from tests.commands import BACKBONE, EPOCH, Forked, beside, called, pictures, rows, wait_for

#: steps of lesson b: 3 classes of 6 pictures, one of each held out, in batches of 4
STEPS = 4

#: a checkpoint after every second step, not after a hundred
OFTEN = """
import lamina.continual as continual
Trainer = continual.Trainer
continual.Trainer = lambda *parts, checkpoint_every=0, **more: Trainer(*parts, checkpoint_every=2, **more)
"""

#: one pass, with a rate and a bound at which the second lesson moves prompts, too
SETTINGS = {"length": 16, "epochs": 1, "batch_size": 4, "lr": 0.01, "max_drift": 0.5}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folders a (ant, bee), b (cat, dog, elk), c (fox, gnu); strata.lamina and mean.lamina have learned a."""
    root = tmp_path_factory.mktemp("shop")
    for name, classes in {"a": ("ant", "bee"), "b": ("cat", "dog", "elk"), "c": ("fox", "gnu")}.items():
        pictures(root / name, classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", EPOCH)
        learn_folder(root / "strata.lamina", root / "a", backbone=BACKBONE, settings=SETTINGS)
        learn_folder(root / "mean.lamina", root / "a", backbone=BACKBONE, method="nearest-mean")
    return root


@pytest.fixture
def command(monkeypatch, capfd):
    """Return a function from words to (exit code, stdout, lines of stderr)."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    number = signal.getsignal(signal.SIGTERM)
    yield lambda *words: called(monkeypatch, capfd, *words)
    signal.signal(signal.SIGTERM, number)


@pytest.fixture(params=["strata", "mean"])
def either(request, shop, tmp_path):
    """A copy of a model of each method."""
    return copied(shop, request.param, tmp_path)


@pytest.fixture
def strata(shop, tmp_path):
    return copied(shop, "strata", tmp_path)


@pytest.fixture
def mean(shop, tmp_path):
    return copied(shop, "mean", tmp_path)


def copied(shop, name, folder):
    (folder / "models").mkdir()
    return shutil.copy(shop / f"{name}.lamina", folder / "models" / "shop.lamina")


@pytest.fixture(scope="module")
def undisturbed(shop, tmp_path_factory):
    """The file after lesson b, as bytes, and how many seconds the process lived."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = copied(shop, "strata", folder)
    Forked("inspect", path, folder=folder).end()  # waits until the server is there
    begun = time.monotonic()
    code, _, errors = Forked("learn", path, shop / "b", folder=folder, first=OFTEN).end()
    assert code == 0, errors
    return path.read_bytes(), time.monotonic() - begun


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────


def killed_and_begun_again(shop, undisturbed, folder, moment):
    """Kill a lesson at a moment, 0 to 1 of its life; look at the file; learn again and look again."""
    path, (new, life) = copied(shop, "strata", folder), undisturbed
    words = ["learn", path, shop / "b"]
    process = Forked(*words, folder=folder, first=OFTEN)
    time.sleep(moment * life)
    assert process.kill() in (-signal.SIGKILL, 0)
    left = path.read_bytes()
    assert left in ((shop / "strata.lamina").read_bytes(), new)
    code, _, errors = Forked(*words, folder=folder, first=OFTEN).end()
    # When all was done but for the exit of the process, there is nothing to go on with.
    assert code == 0 or (left == new and "the model knows 'cat', 'dog', 'elk' already" in errors[-1]), errors
    assert path.read_bytes() == new
    assert beside(path) == [".shop.lamina.lock", "shop.lamina", "shop.lamina.bak"]
    assert ModelFile.read(path).classes == ["ant", "bee", "cat", "dog", "elk"]
    assert (path.parent / "shop.lamina.bak").read_bytes() == (shop / "strata.lamina").read_bytes()


@pytest.mark.parametrize("number", range(10))
def test_a_lesson_killed_at_any_moment_leaves_a_whole_file_and_ends_as_if_it_had_not_been(
    shop, undisturbed, tmp_path, number
):
    killed_and_begun_again(shop, undisturbed, tmp_path, (number + random.Random(number).random()) / 10)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_a_lesson_killed_at_fifty_moments_leaves_a_whole_file_and_ends_as_if_it_had_not_been(
    shop, undisturbed, tmp_path, number
):
    killed_and_begun_again(shop, undisturbed, tmp_path, random.Random(1000 + number).random())


class Snapshots:
    """What lies in a folder before each change of a file in it, and in training: what a kill there would leave."""

    def __init__(self, folder, patch):
        self.folder, self.kept, self.writing, self.steps = folder, {}, False, 0
        for name in ("replace", "fsync", "link", "unlink", "rmdir"):
            patch.setattr(os, name, self._before(name, getattr(os, name)))
        patch.setattr(ModelFile, "write", self._around("write", ModelFile.write))
        patch.setattr(Log, "step", self._around("step", Log.step))
        patch.setattr(Trainer, "_look_back", self._around("look back", Trainer._look_back))

    def take(self, label):
        tree = {path: path.read_bytes() if path.is_file() else None for path in sorted(self.folder.rglob("*"))}
        self.kept.setdefault(tuple(tree.items()), label)

    def _before(self, name, function):
        def call(*arguments, **named):
            if self.writing:
                self.take(f"before {name} {arguments[0]}")
            return function(*arguments, **named)

        return call

    def _around(self, name, function):
        def call(*arguments, **named):
            self.writing = self.writing or name == "write"
            result = function(*arguments, **named)
            self.steps += name == "step"
            if name != "step" or self.steps in (1, STEPS - 1):
                self.take(f"after {name} {self.steps}")
            return result

        return call


def test_a_kill_after_a_step_or_at_any_point_of_writing_and_cleaning_up_loses_nothing(shop, strata, tmp_path, command):
    old = strata.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lamina.continual.Trainer", lambda *a, **more: Trainer(*a, **more | {"checkpoint_every": 2}))
        snapshots = Snapshots(strata.parent, patch)
        assert command("learn", strata, shop / "b")[0] == 0
    new, seen = strata.read_bytes(), set()
    assert snapshots.steps == STEPS
    for number, (tree, label) in enumerate(snapshots.kept.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path, content in tree:
            place = folder / path.relative_to(strata.parent)
            place.mkdir(parents=True) if content is None else place.write_bytes(content)
        path = folder / "shop.lamina"
        left = path.read_bytes()
        assert left in (old, new), label
        code, out, errors = command("learn", path, shop / "b")
        cleaned = left == new and not any(".learning" in str(place) and place.suffix == ".json" for place, _ in tree)
        assert code == (2 if cleaned else 0), (label, errors)
        assert not cleaned or "the model knows 'cat', 'dog', 'elk' already" in errors[0]
        assert (left == new and not cleaned) == ("learned this already" in "".join(errors)), (label, errors)
        assert path.read_bytes() == new, label
        assert beside(path) == [".shop.lamina.lock", "shop.lamina", "shop.lamina.bak"], label
        seen.add((" ".join(label.split()[:2]), left == new, code))
    wanted = {("after step", False), ("after look", False), ("before fsync", False), ("before replace", False)}
    wanted |= {("before fsync", True), ("before unlink", True), ("before rmdir", True)}
    assert wanted <= {found[:2] for found in seen}


# ── interrupted ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_lesson_that_is_asked_to_stop_says_so_and_goes_on_to_the_same_bytes(
    shop, undisturbed, strata, command, monkeypatch, number
):
    step, taken = Log.step, []

    def signalled(*arguments):
        step(*arguments)
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), number)

    old = strata.read_bytes()
    monkeypatch.setattr(Log, "step", signalled)
    code, out, errors = command("learn", strata, shop / "b")
    assert (code, out, errors[-1]) == (75, "", f"stopped; go on with `lamina learn {strata} {shop / 'b'}`")
    assert strata.read_bytes() == old
    assert command("learn", strata, shop / "b")[0] == 0
    assert len(taken) == STEPS  # none was taken twice
    assert strata.read_bytes() == undisturbed[0]


def interrupted(path, folder, **given):
    """Begin a lesson and stop after its first step."""
    with pytest.raises(Stopped):
        learn_folder(path, folder, should_stop=lambda: True, **given)


def test_an_unfinished_lesson_is_in_the_way_of_another_until_it_is_dropped(shop, strata, command):
    interrupted(strata, shop / "b")
    old = strata.read_bytes()
    assert command("learn", strata, shop / "c") == (
        2, "",
        [
            f"lamina: a lesson from {shop / 'b'} is not finished: run `lamina learn` on that folder again, or give "
            "--discard to drop it"
        ],
    )  # fmt: skip
    assert strata.read_bytes() == old
    assert command("learn", strata, shop / "c", "--discard")[0] == 0
    assert ModelFile.read(strata).classes == ["ant", "bee", "fox", "gnu"]
    assert beside(strata) == [".shop.lamina.lock", "shop.lamina", "shop.lamina.bak"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--set", "lr=0.02"], "settings.lr = 0.01; this run has 0.02"),
        (["--precision", "32"], "precision = "),
        (["--holdout", "0.5"], "images = "),
    ],
)
def test_an_unfinished_lesson_does_not_go_on_under_other_settings(shop, strata, command, change, named):
    interrupted(strata, shop / "b", precision="bf16")
    old = strata.read_bytes()
    words = ["learn", strata, shop / "b", "--precision", "bf16", *change]
    code, out, errors = command(*words)
    assert (code, out, len(errors)) == (2, "", 1)
    assert f"was made with {named}" in errors[0]
    assert errors[0].endswith(". Give what was given before, or --discard to begin the lesson anew")
    assert strata.read_bytes() == old
    assert command(*words, "--discard")[0] == 0
    assert ModelFile.read(strata).classes == ["ant", "bee", "cat", "dog", "elk"]


def test_an_unfinished_lesson_does_not_go_on_upon_another_version_of_the_file(shop, strata, command):
    interrupted(strata, shop / "b")
    shutil.copy(shop / "mean.lamina", strata)
    code, _, errors = command("learn", strata, shop / "b")
    assert (code, errors) == (
        2,
        [
            f"lamina: a lesson from {shop / 'b'} is not finished, and {strata} is another than it was begun with: put "
            "that one back, or give --discard to begin the lesson anew"
        ],
    )


def test_a_first_lesson_that_was_interrupted_goes_on_to_the_same_bytes(shop, tmp_path, command):
    words = ["--backbone", BACKBONE, *(word for pair in SETTINGS.items() for word in ("--set", "{}={}".format(*pair)))]
    interrupted(tmp_path / "new.lamina", shop / "a", backbone=BACKBONE, settings=SETTINGS)
    assert not (tmp_path / "new.lamina").exists()
    assert command("learn", tmp_path / "new.lamina", shop / "a", *words)[0] == 0
    assert (tmp_path / "new.lamina").read_bytes() == (shop / "strata.lamina").read_bytes()
    assert beside(tmp_path / "new.lamina") == [".new.lamina.lock", "new.lamina"]


@pytest.fixture
def left_over(shop, mean, monkeypatch, tmp_path):
    """A model whose last lesson, of a copy of b, was killed before its work folder was gone; and that copy."""
    folder = shutil.copytree(shop / "b", tmp_path / "photos")
    monkeypatch.setattr("lamina.lessons._remove", lambda work: None)
    learn_folder(mean, folder)
    monkeypatch.undo()
    assert (mean.parent / ".shop.lamina.learning").is_dir()
    return mean, folder


def test_a_finished_lesson_whose_work_was_left_over_is_not_learned_twice(left_over, command):
    path, folder = left_over
    old = path.read_bytes()
    code, out, errors = command("learn", path, folder)
    assert code == 0 and errors == [f"{path} had learned this already, before it was interrupted"]
    assert out.splitlines()[0] == "lesson 2: cat, dog, elk"
    assert path.read_bytes() == old
    assert beside(path) == [".shop.lamina.lock", "shop.lamina", "shop.lamina.bak"]


@pytest.mark.parametrize("words", [[], ["--discard"]])
def test_a_finished_lesson_whose_work_was_left_over_is_not_in_the_way_of_another(left_over, shop, command, words):
    path, _ = left_over
    assert command("learn", path, shop / "c", *words)[0] == 0
    assert [lesson.classes for lesson in ModelFile.read(path).lessons][1:] == [["cat", "dog", "elk"], ["fox", "gnu"]]
    assert beside(path) == [".shop.lamina.lock", "shop.lamina", "shop.lamina.bak"]


def test_a_folder_that_was_filled_anew_is_another_lesson_than_the_left_over_one(left_over, command):
    path, folder = left_over
    for name in ("cat", "dog", "elk"):
        shutil.rmtree(folder / name)
    pictures(folder, ["hen", "ibis"])
    assert command("learn", path, folder)[0] == 0
    assert ModelFile.read(path).classes == ["ant", "bee", "cat", "dog", "elk", "hen", "ibis"]


# ── two at once ──────────────────────────────────────────────────────────────────────────────────────


def test_while_one_process_learns_another_is_refused_and_after_its_death_goes_on(shop, mean, tmp_path, command):
    old = mean.read_bytes()
    sleep = "import time, lamina.lessons as lessons; lessons._material = lambda *parts: time.sleep(600)"
    with Forked("learn", mean, shop / "b", folder=tmp_path, first=sleep) as first:
        wait_for((mean.parent / ".shop.lamina.learning" / "lesson.json").exists)
        assert command("learn", mean, shop / "b") == (
            2, "", [f"lamina: {mean} is being taught by another process; wait until it is done, then run this again"],
        )  # fmt: skip
        assert command("inspect", mean)[0] == 0  # a reader need not wait
        assert first.process.is_alive() and mean.read_bytes() == old
        assert first.kill() == -signal.SIGKILL
    assert command("learn", mean, shop / "b")[0] == 0
    assert ModelFile.read(mean).classes == ["ant", "bee", "cat", "dog", "elk"]


def test_two_lessons_begun_together_both_come_into_the_file_when_the_refused_one_is_repeated(shop, mean, tmp_path):
    def learn(*names):
        running = []
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            running.append(Forked("learn", mean, shop / name, folder=tmp_path / name))
        ended = {name: process.end() for name, process in zip(names, running, strict=True)}
        assert all(
            code == 0 or "is being taught by another process" in errors[-1] for code, _, errors in ended.values()
        )
        return [name for name, (code, _, _) in ended.items() if code]

    refused = learn("b", "c")
    assert len(refused) < 2
    assert not refused or learn(*refused) == []
    assert sorted(ModelFile.read(mean).classes) == ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


def test_an_error_of_the_system_inside_a_lesson_is_not_blamed_on_the_model_file(shop, mean, monkeypatch):
    def fail(*parts):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("lamina.lessons._material", fail)
    with pytest.raises(PermissionError):
        learn_folder(mean, shop / "b")


def test_a_place_that_cannot_be_written_to_is_refused(shop, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"new\.lamina could not be written: (File exists|Not a directory)$"):
        learn_folder(tmp_path / "file" / "new.lamina", shop / "a")


def test_a_link_to_a_model_stays_a_link_and_shares_its_lock(shop, mean, tmp_path):
    link = tmp_path / "current.lamina"
    link.symlink_to(mean)
    learn_folder(link, shop / "b")
    assert link.is_symlink() and beside(link) == ["current.lamina", "models"]
    assert ModelFile.read(mean).classes == ["ant", "bee", "cat", "dog", "elk"]


# ── what a user can mend ─────────────────────────────────────────────────────────────────────────────


def refused(command, path, *words):
    """Learn what cannot be learned; return the message, after a look at what is left."""
    old, there = path.read_bytes() if path.is_file() else None, beside(path)
    code, out, errors = command("learn", path, *words)
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert (path.read_bytes() if path.is_file() else None) == old
    assert set(beside(path)) <= {*there, f".{path.name}.lock"}
    return errors[0].removeprefix("lamina: ")


KNOWS = "rename what is new, or give known classes further examples with --existing extend"


def test_known_classes_are_refused_by_name(shop, either, tmp_path, command):
    same = f"the model knows 'ant', 'bee' already (from these very images); {KNOWS}"
    assert refused(command, either, shop / "a") == same
    mixed = pictures(tmp_path / "mixed", ["bee", "cow"])
    assert refused(command, either, mixed) == f"the model knows 'bee' already; {KNOWS}"


def test_known_classes_take_further_examples_into_the_same_columns(shop, either, tmp_path, command):
    before = ModelFile.read(either)
    again = pictures(tmp_path / "again", ["bee", "ant"], seed=7)
    assert command("learn", either, again, "--existing", "extend", "--name", "more")[0] == 0
    after = ModelFile.read(either)
    assert after.classes == ["ant", "bee"]
    assert (after.lessons[1].classes, after.lessons[1].columns, after.lessons[1].name) == (
        ["ant", "bee"],
        [0, 1],
        "more",
    )
    assert before.learned["head.seen.counts"].tolist() == [5, 5]
    assert after.learned["head.seen.counts"].tolist() == [10, 10]
    assert not torch.equal(after.learned["head.seen.sums"], 2 * before.learned["head.seen.sums"])
    if before.method == "nearest-mean":  # second moments for confidence are kept apart, since its head keeps none
        assert after.memory[-1]["counts"].tolist() == [10, 10]


def test_known_and_new_classes_come_in_one_lesson(shop, either, tmp_path, command):
    mixed = pictures(tmp_path / "mixed", ["aardvark", "bee"], seed=7)
    assert command("learn", either, mixed, "--existing", "extend")[0] == 0
    file = ModelFile.read(either)
    assert file.classes == ["ant", "bee", "aardvark"]
    assert (file.lessons[1].classes, file.lessons[1].columns) == (["bee", "aardvark"], [1, 2])
    assert command("predict", either, mixed, "--format", "csv")[0] == 0


@pytest.mark.parametrize("words", [[], ["--method", "nearest-mean"]])
def test_one_class_a_lesson_is_enough_for_the_default_method_and_for_class_means(tmp_path, command, words):
    path, files, words = tmp_path / "new.lamina", [], ["--backbone", BACKBONE, "--holdout", "0.5", *words]
    for name in ("cow", "asp"):
        code, out, _ = command("learn", path, pictures(tmp_path / name, [name], count=24), *words)
        assert code == 0
        files.append(ModelFile.read(path))
    assert "old classes have not moved: this lesson left all features as they were" in out.splitlines()
    first, second = ([known["temperature"] for known in file.confidence["tasks"]] for file in files)
    assert first == [None] and second[0] is None and second[1] > 0  # one class alone leaves no choice
    told = [set(known["quantiles"]) for known in files[1].confidence["tasks"]]
    assert told == [{"mahalanobis"}, {"mahalanobis", "energy"}]
    fresh = pictures(tmp_path / "fresh", ["cow", "asp", "owl", "pug"], count=6, seed=3)
    found = rows(command("predict", path, fresh, "--flag-novel", "--format", "jsonl")[1])
    known, new = found[:12], found[12:]
    assert [Path(row["path"]).parent.name for row in found[::6]] == ["asp", "cow", "owl", "pug"]
    assert sum(row["class"] == Path(row["path"]).parent.name for row in known) > 10
    assert min(row["probability"] for row in known) > 0.5
    assert sum(row["novel"] for row in known) < 3 and all(row["novel"] for row in new)


def test_one_class_alone_is_not_enough_for_a_method_that_tells_the_classes_of_a_lesson_apart(tmp_path, command):
    alone = pictures(tmp_path / "alone", ["cow"])
    words = ["--method", "vpt-nsp2", "--backbone", BACKBONE]
    assert refused(command, tmp_path / "new.lamina", alone, *words) == (
        "vpt-nsp2 tells the classes of one lesson apart and learns nothing from one alone; got 'cow'. Add another "
        "class, or keep a model whose classifier is made of statistics: strata, ranpac, nearest-mean, or another "
        "method with head=statistics"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "joint", "--backbone", BACKBONE],
            "joint learns all classes at once, so it cannot take lessons; choose another one",
        ),
        (
            ["--method", "vpt-nps2"],
            f"no method is called 'vpt-nps2'; did you mean 'vpt-nsp2'? Known: {', '.join(method_names())}",
        ),
        (
            ["--backbone", "lamina:vit-nona"],
            "no backbone is called 'lamina:vit-nona'; did you mean 'lamina:vit-nano'? Known: lamina:clip-nano, "
            "lamina:vit-nano, lamina:vit-nano-mae",
        ),
        (
            ["--set", "epoch=3"],
            "Strata: no setting is called 'epoch'; did you mean 'epochs'? Known: batch_size, epochs, head, kept, "
            "layers, length, lr, max_drift, temperature, weight_decay",
        ),
        (["--set", "epochs"], "--set takes name=value; got 'epochs'"),
        (
            ["--backbone", BACKBONE, "--holdout", "1.5"],
            "the share of images kept aside must be at least 0 and below 1; got 1.5",
        ),
    ],
)
def test_a_new_model_is_not_begun_with_a_wrong_word(shop, tmp_path, command, words, message):
    assert refused(command, tmp_path / "new.lamina", shop / "a", *words) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "nearest-mean"], "was begun with method 'strata' and keeps it; got 'nearest-mean'"),
        (
            ["--backbone", "lamina:vit-nano"],
            f"was begun with backbone '{BACKBONE}' and keeps it; got 'lamina:vit-nano'",
        ),
        (["--seed", "5"], "was begun with seed 0 and keeps it; got 5"),
    ],
)
def test_what_a_model_was_begun_with_cannot_change(shop, strata, command, words, message):
    assert refused(command, strata, shop / "b", *words) == f"{strata} {message}. Make another model for it"


def test_what_a_model_was_begun_with_can_be_said_again(shop, mean, command):
    words = ["--method", "nearest-mean", "--backbone", BACKBONE, "--seed", "0"]
    assert command("learn", mean, shop / "b", *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--set", "length=6"], ["length=16 shapes what was learned and has to stay: ", "(6, 64)", "(16, 64)"]),
        (["--set", "lenght=6"], ["no setting is called 'lenght'; did you mean 'length'?"]),
        (["--set", "lr=-1"], ["Strata.lr must be above 0.0; got -1"]),
        (["--holdout", "1.5"], ["must be at least 0 and below 1; got 1.5"]),
    ],
)
def test_a_known_model_does_not_take_a_wrong_setting(shop, strata, command, words, parts):
    message = refused(command, strata, shop / "b", *words)
    assert all(part in message for part in parts), message


def test_a_setting_that_shapes_nothing_may_change_and_is_kept(shop, strata, command):
    assert command("learn", strata, shop / "b", "--set", "epochs=2")[0] == 0
    assert ModelFile.read(strata).settings["epochs"] == 2


def test_a_broken_image_is_named_or_skipped_and_counted(shop, mean, tmp_path, command):
    folder = pictures(tmp_path / "photos", ["cow", "doe"])
    (folder / "cow" / "0-3.png").write_bytes(b"nothing")
    message = refused(command, mean, folder)
    assert message.startswith(f"{folder / 'cow' / '0-3.png'} cannot be read: ") and "--skip-broken" in message
    code, out, _ = command("learn", mean, folder, "--skip-broken")
    assert code == 0 and "learned from 9 images, 2 held out, 1 skipped; classes in all: 4" in out
    assert ModelFile.read(mean).lessons[1].skipped == 1


def test_a_class_of_broken_images_alone_is_refused_even_when_they_may_be_skipped(shop, mean, tmp_path, command):
    folder = pictures(tmp_path / "photos", ["cow", "doe"], count=1)
    (folder / "doe" / "0-0.png").write_bytes(b"nothing")
    assert refused(command, mean, folder, "--skip-broken") == (
        f"class 'doe' in {folder} has no image that can be read; mend or remove its folder"
    )


def test_a_model_is_a_file(shop, tmp_path, command):
    (tmp_path / "models").mkdir()
    folder = tmp_path / "models"
    assert refused(command, folder, shop / "a") == (
        f"{folder} is a folder; a model is kept in a file, for example {folder / 'shop.lamina'}"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "{} is not a folder; name a folder that holds CLASS/*"),
        (lambda folder: folder.mkdir(), "{} holds no folders; name a folder that holds CLASS/*"),
        (lambda folder: (folder / "cow").mkdir(parents=True), "class 'cow' in {} has no images"),
    ],
)
def test_a_folder_without_images_is_refused(mean, tmp_path, command, make, message):
    make(tmp_path / "photos")
    assert refused(command, mean, tmp_path / "photos").startswith(message.format(tmp_path / "photos"))


def test_a_damaged_model_is_refused_and_points_to_the_version_before(shop, mean, command):
    assert command("learn", mean, shop / "b")[0] == 0
    content = bytearray(mean.read_bytes())
    content[-9] ^= 4
    mean.write_bytes(content)
    for words in (["learn", mean, shop / "c"], ["predict", mean, shop / "c"], ["inspect", mean]):
        code, out, errors = command(*words)
        assert (code, out, len(errors)) == (2, "", 1)
        assert errors[0].endswith(f"the version before it is {mean}.bak")
    assert mean.read_bytes() == content
    shutil.copy(f"{mean}.bak", mean)
    assert command("learn", mean, shop / "c")[0] == 0
    assert ModelFile.read(mean).classes == ["ant", "bee", "fox", "gnu"]


@pytest.mark.parametrize("length", [10**6, 10**18])
@pytest.mark.parametrize("verb", ["learn", "predict"])
def test_a_file_that_asks_for_absurd_sizes_is_refused_without_making_room_for_them(shop, strata, command, verb, length):
    file = ModelFile.read(strata)
    replace(file, settings={**file.settings, "length": length}).write(strata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out, errors = command(verb, strata, shop / "b")
    assert (code, out, len(errors)) == (2, "", 1)
    assert "length" in errors[0] or str(length) in errors[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


# ── what is left ─────────────────────────────────────────────────────────────────────────────────────


def test_a_lesson_leaves_the_model_its_former_version_and_a_lock(shop, tmp_path, command):
    words = ["--method", "nearest-mean", "--backbone", BACKBONE]
    path = tmp_path / "models" / "new.lamina"
    assert command("learn", path, shop / "a", *words)[0] == 0
    assert beside(path) == [".new.lamina.lock", "new.lamina"]
    first = path.read_bytes()
    assert command("learn", path, shop / "b")[0] == 0
    assert beside(path) == [".new.lamina.lock", "new.lamina", "new.lamina.bak"]
    assert (path.parent / "new.lamina.bak").read_bytes() == first


def test_what_learn_prints_says_what_came_of_it(shop, mean, command):
    code, out, _ = command("learn", mean, shop / "b", "--name", "spring 2026")
    assert (code, out.splitlines()) == (
        0,
        [
            "lesson 2 (spring 2026): cat, dog, elk",
            "learned from 15 images, 3 held out; classes in all: 5",
            "accuracy on the images held out, choosing among all classes: 100.0 %",
            "with fewer than 20 images held out, probabilities and novelty are rough",
            "old classes have not moved: this lesson left all features as they were",
            f"written to {mean}",
        ],
    )


def test_learn_prints_json_alone_when_asked(shop, strata, command):
    code, out, errors = command("learn", strata, shop / "b", "--json")
    found, file = json.loads(out), ModelFile.read(strata)
    assert (code, errors) == (0, [])
    own = {"model": str(strata), "checksum": file.checksum, "texts": {}, "lessons_left": None}
    assert found == own | file.lessons[1].model_dump()
    assert 0 <= found["drift"]["old"] <= found["drift"]["bound"] and found["drift"]["new"] > 0


def test_no_pixel_and_no_feature_of_a_lesson_stays_in_the_cache(shop, either, tmp_path, command, monkeypatch):
    """Else the images that a model must do without would lie about all the same."""
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    assert command("learn", either, shop / "b")[0] == 0
    assert not (tmp_path / "cache").exists()
