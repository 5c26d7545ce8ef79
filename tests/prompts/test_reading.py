"""Whoever watches is told how far the reading of many texts is: 3 names under 2 templates, 4 contexts of 2 words."""

import gc
import io

import pytest
import torch
from rich.console import Console

from lamina import console
from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.heads import texts as heads
from lamina.heads.texts import HandTexts
from lamina.methods.zero_shot import ZeroShot
from lamina.prompts import contexts as part
from lamina.prompts.contexts import encoded, worded
from lamina.prompts.reading import along, watched
from lamina.training.progress import Progress
from tests.backbones.clips import clip, close, tiny_clip, tokenizer
from tests.streams import blobs, trainer_of

NAMES, TEMPLATES = ["cat", "lawn mower", "red panda"], ["a photo of a {}.", "the {}, small"]


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def hand(side):
    texts = HandTexts(side, TEMPLATES)
    texts.begin_task(0, NAMES, range(3))
    return texts


class Recording(Progress):
    def __init__(self):
        self.stage, self.told = None, []

    def begin(self, stage, task, tasks, images):
        self.stage = stage

    def end(self):
        self.stage = None

    def read(self, done, texts):
        self.told.append((self.stage, done, texts))


# ── who is told ──────────────────────────────────────────────────────────────────────────────────────


def test_templates_are_told_part_by_part_and_say_the_same(side, monkeypatch):
    whole, told = hand(side)(), []
    monkeypatch.setattr(heads, "TOGETHER", 4)
    with watched(lambda *numbers: told.append(numbers)):
        close(hand(side)(), whole)
    assert told == [(0, 6), (4, 6), (6, 6)]


def test_contexts_are_told_part_by_part(side, monkeypatch):
    wording, contexts, told = worded(side, NAMES, 2), torch.randn(4, 2, 40), []
    monkeypatch.setattr(part, "TOGETHER", 9)
    with torch.no_grad(), watched(lambda *numbers: told.append(numbers)):
        encoded(side.tower, wording, contexts)
    assert told == [(0, 12), (9, 12), (12, 12)]


def test_few_texts_and_texts_that_are_kept_are_not_worth_telling(side, monkeypatch):
    texts, told = hand(side), []
    with watched(lambda *numbers: told.append(numbers)):
        hand(side)()
        assert told == []
        monkeypatch.setattr(heads, "TOGETHER", 4)
        texts()
        del told[:]
        texts()
    assert told == []


def test_nobody_is_told_any_more_when_watching_is_over_even_by_an_error():
    told, outer = [], []
    with watched(lambda *numbers: outer.append(numbers)):
        with pytest.raises(RuntimeError), watched(lambda *numbers: told.append(numbers)):
            raise RuntimeError
        assert list(along("ab", [3, 4])) == ["a", "b"]
    list(along("ab", [3, 4]))
    assert told == [] and outer == [(0, 7), (3, 7), (7, 7)]


def test_whoever_watches_a_run_is_told_within_its_stretches(monkeypatch):
    monkeypatch.setattr(heads, "TOGETHER", 2)
    progress, stream = Recording(), blobs(tasks=2)
    trainer_of(ZeroShot(templates=TEMPLATES), tiny_clip(), progress=progress).run(stream)
    assert {stage for stage, _, _ in progress.told} == {"evaluate"}
    assert [told[1:] for told in progress.told if told[1] == 0] == [(0, 6)] * 3  # two tasks, and the one to come before


def test_only_features_are_held_between_parts(side, monkeypatch):
    monkeypatch.setattr(heads, "TOGETHER", 2)
    held = []

    def tell(done, texts):
        gc.collect()
        sizes = [x.shape for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 3 and x.shape[-1] == 40]
        held.append(len(sizes))

    with watched(tell):
        hand(side)()
    assert len(held) == 4 and len(set(held)) == 1


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def drawn():
    return console.DrawnProgress(Console(file=io.StringIO(), force_terminal=True, width=120))


def bars(progress):
    return [(task.description, task.completed, task.total) for task in progress.bars.tasks] if progress.bars else []


def test_a_bar_is_drawn_when_reading_takes_a_while_and_goes_when_it_is_over(clock):
    progress = drawn()
    progress.read(0, 1000)
    clock[0] += 1
    progress.read(200, 1000)
    assert bars(progress) == []
    clock[0] += 1
    progress.read(400, 1000)
    assert bars(progress) == [("reading names of classes", 400, 1000)]
    progress.read(1000, 1000)
    assert bars(progress) == []
    progress.end()
    assert progress.bars is None


def test_within_a_stretch_the_bar_stands_below_that_of_the_stretch(clock):
    progress = drawn()
    progress.begin("train", 0, 2, 50)
    progress.read(0, 1000)
    clock[0] += 2
    progress.read(400, 1000)
    progress.advance(5)
    assert bars(progress) == [("task 1/2, train", 5, 50), ("reading names of classes", 400, 1000)]
    progress.read(1000, 1000)
    assert bars(progress) == [("task 1/2, train", 5, 50)]
    progress.end()


def test_elsewhere_a_line_is_written_every_ten_seconds(clock, capsys):
    progress = console.PlainProgress()
    progress.read(0, 1000)
    clock[0] += 9
    progress.read(100, 1000)
    assert capsys.readouterr().err == ""
    clock[0] += 1
    progress.read(200, 1000)
    progress.read(300, 1000)
    progress.read(1000, 1000)
    assert capsys.readouterr().err == "reading names of classes: 200/1000 texts, 20 texts/s, 40 s left\n"


def test_where_nothing_else_is_shown_a_pipe_stays_empty(clock, capsys):
    with console.reading_shown():
        for _ in along([1, 2, 3], [512, 512, 512]):
            clock[0] += 20
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_its_own_goes_when_reading_breaks_off(clock, monkeypatch):
    progress = drawn()
    monkeypatch.setattr(console, "progress", lambda: progress)
    with pytest.raises(RuntimeError), console.reading_shown():
        for number in along([1, 2, 3], [512, 512, 512]):
            clock[0] += 20
            if number == 2:
                assert bars(progress) == [("reading names of classes", 512, 1536)]
                raise RuntimeError
    assert progress.bars is None
