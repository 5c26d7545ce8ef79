"""Model files: exact, the same bytes for the same content, whole after any crash, and safe to read from anyone."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load, save

import lamina
from lamina import modelfile
from lamina.errors import ConfigError, ModelFileError, StorageError
from lamina.modelfile import HEADER_LIMIT, Lesson, ModelFile

COPY = "; take it from a copy, or learn again"
BROKEN = "is damaged or no model file: "
NO_HEADER = "it has no header of safetensors of at most 16777216 bytes"


def make_lesson(**changes):
    values = {"name": "pets", "date": "2026-11-21T14:05:00Z", "method": "vpt-nsp2", "classes": ["ant", "bee", "cat"]}
    values |= {"columns": [0, 1, 2], "images": 31, "held_out": 7, "skipped": 1, "seconds": {"train": 1.5}}
    values |= {
        "accuracy": 0.75,
        "drift": {
            "new": 0.5,
            "old": 0.25,
            "bound": None,
            "blocks": [{"block": 3, "step": 1.5, "old": 0.25, "bound": 7.0}],
        },
        "data": "d1",
        "base": None,
    }
    return Lesson(**(values | changes))


SECOND = make_lesson(
    name=None, date=None, classes=["bee", "dog"], columns=[1, 3], seconds=None, accuracy=None, base="b"
)


def symmetric(*shape, seed=0):
    """Gram-like stacks (..., n, n), float64."""
    half = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return half + half.mT


def make_model(**changes):
    """M 3 prompt tokens, D 10 channels, H 2 heads of d 9, C 4 classes in two lessons."""
    numbers = torch.Generator().manual_seed(1)
    sums = torch.randn(4, 10, generator=numbers)
    values = {
        "method": "vpt-nsp2",
        "settings": {"lr": 0.1, "sizes": [5, None, True], "name": "Zoë"},
        "backbone": {"name": "timm:x", "fingerprint": "f1"},
        "precision": "bfloat16",
        "seed": 3,
        "run": {"augmentation": "crop-flip"},
        "confidence": {"temperature": 1.25, "thresholds": {"ant": 0.5}},
        "lessons": (make_lesson(), SECOND),
        "learned": {
            "prompts.values.0": torch.randn(3, 10, generator=numbers),
            "head.weight": sums,
            "head.half": sums.bfloat16(),
        },
        "memory": [
            {"queries": {10: symmetric(2, 9), 2: symmetric(2, 9, seed=2)}, "attention": {2: symmetric(3)}},
            {"sums": sums.double(), "counts": torch.tensor([5, 2**53 + 1, 0, -3]), "seen": torch.tensor([True, False])},
            {
                "blocks.0.weight": sums,
                "3": torch.tensor(1.0),
                3: torch.tensor(2.0),
                "plain": [1, -0.0, "x", None, True],
            },
            {"list": [torch.zeros(0, 7), {"deep": torch.tensor(0.5, dtype=torch.bfloat16), "none": {}}], "empty": []},
        ],
    }
    return ModelFile(**(values | changes))


MODEL = make_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shop.lamina"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of MODEL's file."""
    path = tmp_path_factory.mktemp("content") / "shop.lamina"
    MODEL.write(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def limited():
    """Whatever asks for half a gigabyte more than there is now gets a MemoryError or worse."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def same(one, other):
    """Whether two parts of a state are equal, to the bit and to the type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def same_model(one, other):
    return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(ModelFile))


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def said_of(content):
    return json.loads(header_of(content)[0]["__metadata__"]["lamina"])


def stated(said, tensors):
    """The checksum, written from its definition."""
    said = {name: value for name, value in said.items() if name != "checksum"}
    parts = [json.dumps(said, sort_keys=True, separators=(",", ":")).encode()]
    for name in sorted(tensors):
        value = tensors[name]
        parts.append(json.dumps([name, str(value.dtype), list(value.shape)], separators=(",", ":")).encode())
        parts.append(bytes(value.reshape(-1).view(torch.uint8).tolist()))
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def forged(said, tensors):
    """A file that says what it should not, under a checksum that fits."""
    said = said | {"checksum": stated(said, tensors)}
    return save(tensors, metadata={"lamina": json.dumps(said, sort_keys=True)})


def refusal(path, content=None):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFileError) as error:
        ModelFile.read(path)
    assert str(error.value).isprintable() and str(error.value).startswith(f"{path} ")
    return str(error.value).removeprefix(f"{path} ")


# ── what is written is read ────────────────────────────────────────────────────────────────────────


def test_everything_comes_back_to_the_bit_and_to_the_type(path):
    MODEL.write(path)
    assert same_model(ModelFile.read(path), MODEL)


def test_whole_numbers_as_keys_come_back_in_their_order(path):
    MODEL.write(path)
    assert list(ModelFile.read(path).memory[0]["queries"]) == [2, 10]


def test_the_checksum_is_the_one_of_the_definition_and_stands_in_the_file(content):
    assert said_of(content)["checksum"] == MODEL.checksum == stated(said_of(content), load(content))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelFile)])
def test_the_checksum_depends_on_every_field(field):
    other = {"method": "vpt-deep", "precision": "float32", "seed": 4, "lessons": MODEL.lessons[:1], "memory": []}
    other |= {
        "backbone": MODEL.backbone | {"name": "y"},
        "learned": MODEL.learned | {"head.weight": torch.zeros(4, 10)},
    }
    assert dataclasses.replace(MODEL, **{field: other.get(field, {})}).checksum != MODEL.checksum


def test_classes_stand_by_column_with_the_task_in_which_they_first_arrived():
    assert (MODEL.classes, MODEL.class_tasks) == (["ant", "bee", "cat", "dog"], [0, 0, 0, 1])


def test_tensors_have_readable_names(content):
    names = "learned.prompts.values.0 learned.head.weight learned.head.half memory.0.queries.10 memory.0.queries.2"
    names += " memory.0.attention.2 memory.1.sums memory.1.counts memory.1.seen memory.3.list.0 memory.3.list.1.deep"
    assert set(load(content)) == {*names.split(), 'memory.2."blocks.0.weight"', 'memory.2."3"', "memory.2.3"}


def test_equal_content_means_equal_bytes_in_any_process_and_reading_runs_nothing(path, content):
    """In a process with other hashes, from dicts in another order and tensors that are views of others."""
    path.write_bytes(content)
    code = """
import dataclasses, sys
from pathlib import Path
from lamina.modelfile import ModelFile
path, events = Path(sys.argv[1]), []
ModelFile.read(path)
sys.addaudithook(lambda event, values: events.append((event, str(values[0]))) if watched else None)
watched = True
model = ModelFile.read(path)
watched = False
print([event for event in events if event[0] not in ("builtins.id", "object.__getattr__", "object.__setattr__")])
turned = lambda part: dict(reversed([(k, turned(v)) for k, v in part.items()])) if isinstance(part, dict) else part
turned_view = model.memory[2]["blocks.0.weight"].T.contiguous().T.requires_grad_()
changes = dict(learned=turned(dict(model.learned, **{"head.weight": turned_view})), settings=turned(model.settings))
dataclasses.replace(model, memory=[*map(turned, model.memory)], **changes).write(path.with_name("again"))
"""
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lamina.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", f"[('open', '{path}')]\n")
    assert path.with_name("again").read_bytes() == content


def test_there_is_no_pickle_and_no_zip_in_a_file(path):
    MODEL.write(path)
    content = path.read_bytes()
    assert not zipfile.is_zipfile(path)
    assert content[8:10] == b'{"' and not any(content.startswith(bytes([128, protocol])) for protocol in range(6))
    with pytest.raises(Exception, match="Weights only load failed|Unsupported|invalid"):
        torch.load(path, weights_only=True)


def test_a_file_is_not_held_after_it_was_read(path, content):
    path.write_bytes(content)
    model = ModelFile.read(path)
    maps = Path("/proc/self/maps").read_text()
    assert str(path) not in maps + str([os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()])
    path.write_bytes(bytes(len(content)))
    assert same_model(model, MODEL)


# ── symmetric matrices ─────────────────────────────────────────────────────────────────────────────


def stored_shape(path, value):
    make_model(learned={"x": value}, memory=[]).write(path)
    assert same(ModelFile.read(path).learned["x"], value)
    return tuple(load(path.read_bytes())["learned.x"].shape)


def test_symmetric_matrices_are_stored_as_triangles_and_come_back_whole(path):
    assert stored_shape(path, symmetric(8)) == (36,)
    assert stored_shape(path, symmetric(2, 5, 9)) == (2, 5, 45)
    assert stored_shape(path, symmetric(9).bfloat16()) == (45,)
    assert stored_shape(path, torch.ones(11, 11, dtype=torch.bool)) == (66,)


def test_what_is_small_or_symmetric_in_part_or_in_value_alone_is_stored_whole(path):
    assert stored_shape(path, symmetric(7)) == (7, 7)
    assert stored_shape(path, torch.zeros(0, 9, 9)) == (0, 9, 9)
    stack, zeros = symmetric(2, 9), torch.zeros(9, 9)
    stack[1, 3, 4] += 1
    zeros[3, 4] = -0.0
    assert stored_shape(path, stack) == (2, 9, 9)
    assert stored_shape(path, zeros) == (9, 9)
    assert stored_shape(path, symmetric(9, 9, 3).mT[..., :2]) == (9, 9, 3, 2)


def test_a_hundred_classes_on_a_vit_b_take_eight_megabytes_at_most(path):
    names = [f"class {column}" for column in range(100)]
    learned = {f"prompts.values.{layer}": torch.randn(4, 768) for layer in range(12)}
    learned |= {"head.weight": torch.randn(100, 768), "head.bias": torch.randn(100)}
    grams = {"queries": {i: symmetric(12, 64) for i in range(12)}, "attention": {i: symmetric(4) for i in range(12)}}
    sums = {"sums": torch.randn(100, 768, dtype=torch.float64), "counts": torch.zeros(100), "scatter": symmetric(768)}
    lesson = make_lesson(classes=names, columns=list(range(100)))
    make_model(lessons=(lesson,), learned=learned, memory=[grams, sums]).write(path)
    assert path.stat().st_size <= 8_000_000
    assert same(ModelFile.read(path).memory, [grams, sums])


# ── what no file may say ───────────────────────────────────────────────────────────────────────────

JSON_LACKS = "it has a value that JSON lacks: "
JSON_CHANGES = "it has a value that JSON would change: a tuple, or a key that is not text"
DENSE = "must be a dense tensor of (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool); got "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"lr": math.nan}}, f"{JSON_LACKS}Out of range float values are not JSON compliant: nan"),
        ({"run": {"crop": (1, 2)}}, JSON_CHANGES),
        ({"confidence": {"a": {1: "one"}}}, JSON_CHANGES),
        ({"run": {"seed": torch.ones(1)}}, f"{JSON_LACKS}Object of type Tensor is not JSON serializable"),
        ({"memory": [{"rate": math.inf}]}, f"{JSON_LACKS}Out of range float values are not JSON compliant: inf"),
        ({"memory": [{1.5: 1}]}, "keys of memory must be text or ints"),
        ({"memory": [{True: 1}]}, "keys of memory must be text or ints"),
        ({"memory": [torch.ones(3)]}, "learned must have text as names, and memory must have dicts"),
        ({"learned": {3: torch.ones(3)}}, "learned must have text as names, and memory must have dicts"),
        ({"learned": {"x": torch.ones(3).half()}}, f"learned.x {DENSE}torch.float16"),
        ({"learned": {"x": 3.5}}, f"learned.x {DENSE}<class 'float'>"),
        ({"learned": {"x": torch.eye(3).to_sparse()}}, f"learned.x {DENSE}torch.float32"),
        ({"memory": [{"x": torch.tensor([1, math.nan])}]}, "memory.0.x has values that are not finite"),
        ({"run": {"x": "x" * 5000}}, "it has no header of safetensors of at most 5000 bytes"),
        ({"run": {"x": [0] * 500}}, "its header has more than 500 values"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(path, changes, message, monkeypatch):
    monkeypatch.setattr(modelfile, "HEADER_LIMIT", 5000)
    monkeypatch.setattr(modelfile, "VALUE_LIMIT", 500)
    with pytest.raises(ModelFileError) as error:
        make_model(**changes).write(path)
    message = message.split(": nan")[0].split(": inf")[0]  # Python 3.11 leaves the number out
    assert str(error.value).startswith(f"{path} was not written: {message}")
    assert os.listdir(path.parent) == []


def test_half_a_character_and_a_nest_without_end_are_not_written(path):
    endless = {}
    endless["again"] = endless
    for changes in ({"run": {"x": "\ud83d"}}, {"run": {"\ude00": 1}}, {"run": endless}, {"memory": [endless]}):
        with pytest.raises(ModelFileError, match="was not written: "):
            make_model(**changes).write(path)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["ant", "", "cat"]}, "Lesson.classes.1 string should have at least 1 character; got ''"),
        ({"classes": ["ant", "\ud800", "cat"]}, "Lesson.classes.1 input should be a valid string"),
        ({"classes": ["a" * 256, "b", "c"]}, "Lesson.classes.0 string should have at most 255 characters; got"),
        ({"classes": ["a", "b", "a"]}, "Lesson must name a class once; got ['a', 'b', 'a']"),
        ({"classes": [], "columns": []}, "Lesson.classes list should have at least 1 item after validation, not 0"),
        ({"columns": [0, 1]}, "Lesson must have a column for each of its 3 classes; got [0, 1]"),
        ({"columns": [0, 2, 1]}, "Lesson must have its classes in the order of their columns; got [0, 2, 1]"),
        ({"columns": [0, 1, 1]}, "Lesson must have its classes in the order of their columns; got [0, 1, 1]"),
        ({"columns": [-1, 0, 1]}, "Lesson.columns.0 must be at least 0; got -1"),
        ({"images": -1}, "Lesson.images must be at least 0; got -1"),
        ({"held_out": True}, "Lesson.held_out must be a whole number; got True (bool)"),
        ({"skipped": 0.5}, "Lesson.skipped must be a whole number; got 0.5 (float)"),
        ({"seconds": {"train": -0.5}}, "Lesson.seconds.train must be at least 0.0; got -0.5"),
        ({"accuracy": 86.2}, "Lesson.accuracy must be at most 1.0; got 86.2"),
        ({"accuracy": math.nan}, "Lesson.accuracy must be"),
        ({"date": "2026-02-30T14:05:00Z"}, "Lesson.date must be a time such as 2026-11-21T14:05:00Z; got '2026-02-30"),
        ({"date": "2026-2-3T14:05:00Z"}, "Lesson.date must be a time such as 2026-11-21T14:05:00Z; got '2026-2-3T"),
        ({"images_seen": 3}, "Lesson: no setting is called 'images_seen'; did you mean 'images'?"),
    ],
)
def test_a_lesson_that_cannot_be_true_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        make_lesson(**changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "3"}, "Said.seed must be a whole number; got '3' (str)"),
        ({"precision": "16"}, "Said.precision must be 'bfloat16' or 'float32'; got '16'"),
        ({"backbone": {"name": "x"}}, "backbone must have a name and a fingerprint"),
        ({"lessons": ()}, "lessons must have at least one"),
        ({"lessons": (SECOND,)}, "lessons.0: the column of class 'bee' must be 0; got 1"),
        (
            {"lessons": (make_lesson(), make_lesson(classes=["dog"], columns=[4]))},
            "lessons.1: the column of class 'dog' must be 3; got 4",
        ),
        (
            {"lessons": (make_lesson(), make_lesson(classes=["bee"], columns=[2]))},
            "lessons.1: the column of class 'bee' must be 1; got 2",
        ),
    ],
)
def test_facts_that_contradict_each_other_are_refused(content, path, changes, message):
    with pytest.raises((ConfigError, ModelFileError)) as error:
        make_model(**changes)
    assert str(error.value) == message
    changes = {
        name: [each.model_dump() for each in value] if name == "lessons" else value for name, value in changes.items()
    }
    assert refusal(path, forged(said_of(content) | changes, load(content))) == f"{BROKEN}{message}{COPY}"


# ── reading what others wrote ──────────────────────────────────────────────────────────────────────


def said_as(text):
    return save({"x": torch.ones(3)}, metadata={"lamina": text})


def bare(header, length=None):
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"", NO_HEADER),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", NO_HEADER),
        (bare(b"{}", HEADER_LIMIT + 1), NO_HEADER),
        (bare(b"{}", 3), "it is cut short: its header has 3 bytes, and 2 are there"),
        (bare(b"[1]"), "its header is not an object of JSON"),
        (bare(b"{nan}"), "its header is not JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        (bare(b'{"a":1,"a":1}'), "its header is not JSON: a key stands twice in one object"),
        (bare(b"[" * 100_000), "its header is not JSON: maximum recursion depth exceeded"),
        (save({"x": torch.ones(3)}), "it is safetensors, but its metadata is not one text, 'lamina'"),
        (save({}, {"lamina": "{}", "x": ""}), "it is safetensors, but its metadata is not one text, 'lamina'"),
        (bare(b'{"__metadata__":{"lamina":1}}'), "it is safetensors, but its metadata is not one text, 'lamina'"),
        (said_as("{"), "its metadata is not JSON: Expecting property name"),
        (said_as("[]"), "its metadata is not an object of JSON"),
        (said_as('{"a":{"b":1,"b":2}}'), "its metadata is not JSON: a key stands twice in one object"),
        (said_as('{"a":' + "[" * 100_000), "its metadata is not JSON: maximum recursion depth exceeded"),
        (said_as("{}"), "its format must be 1; got None"),
        (said_as('{"format":0}'), "its format must be 1; got 0"),
        (said_as('{"format":true}'), "its format must be 1; got True"),
        (said_as('{"format":1}'), "its content does not fit its checksum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # safetensors orders metadata anew in each process
)
def test_a_file_that_is_not_whole_says_what_is_wrong(path, broken, reason):
    said = refusal(path, broken)
    assert said.startswith(BROKEN + reason) and said.endswith(COPY)
    path.with_name("shop.lamina.bak").touch()
    assert refusal(path) == said.removesuffix(COPY) + f"; the version before it is {path}.bak"


def test_a_file_of_a_newer_lamina_is_not_called_broken(path):
    path.with_name("shop.lamina.bak").touch()
    reason = "has format 2, of a newer lamina; this one reads 1; update lamina to read it"
    assert refusal(path, said_as('{"format":2,"whatever":NaN}')) == reason


def test_what_is_no_file_is_said_so(path, tmp_path):
    assert refusal(path) == "does not exist; name a model file"
    assert refusal(tmp_path) == "is not a regular file; name a model file"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is not a regular file; name a model file"


def test_a_file_that_cannot_be_opened_is_said_so(path, content, monkeypatch):
    path.write_bytes(content)
    monkeypatch.setattr(
        io, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    assert refusal(path) == "cannot be read: Permission denied; see to that and try again"


def test_a_file_cut_anywhere_is_refused(path, content):
    for length in [*range(0, len(content), 97), *range(len(content) - 9, len(content))]:
        assert refusal(path, content[:length]).startswith(BROKEN)
    assert refusal(path, content + b"\0").startswith(f"{BROKEN}its tensors are cut short or misplaced: ")


def test_a_changed_tensor_and_a_changed_fact_do_not_fit_the_checksum(path, content):
    for said in ({"seed": 4}, {"learned": []}, {"checksum": "0" * 32}, {"checksum": None}, {"surplus": 1}):
        text = json.dumps(said_of(content) | said)
        reason = f"{BROKEN}its content does not fit its checksum{COPY}"
        assert refusal(path, save(load(content), metadata={"lamina": text})) == reason
    for place in range(len(content) - len(header_of(content)[1]), len(content), 61):
        assert refusal(path, content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]) == reason


def edited(content, **changes):
    """The file with other memory, learned or triangles and the same tensors, or with other tensors."""
    tensors = load(content) | changes.pop("tensors", {})
    for name in changes.pop("without", ()):
        del tensors[name]
    return forged(said_of(content) | changes, tensors)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"without": ["learned.head.half"]}, "its tensor 'learned.head.half' is missing"),
        ({"without": ["memory.0.queries.2"]}, "its tensor 'memory.0.queries.2' is missing"),
        ({"without": ["memory.1.sums"]}, "its tensor 'memory.1.sums' is missing"),
        ({"tensors": {"x": torch.ones(3)}}, "nothing refers to its tensors x"),
        ({"memory": []}, "nothing refers to its tensors memory."),
        ({"learned": ["head.half", "head.half"]}, "its tensor 'learned.head.half' is missing"),
        ({"learned": [3]}, "Said.learned.0 must be text; got 3 (int)"),
        (
            {"learned": ["prompts.values.0", "head.weight", "head.half"]},
            "lamina would write its content in another way",
        ),
        ({"triangles": ["learned.head.weight"]}, "lamina would write its content in another way"),
        ({"triangles": ["memory.1.counts"]}, "'memory.1.counts' is the upper triangle of nothing"),
        ({"triangles": ["memory.3.list.0"]}, "'memory.3.list.0' is the upper triangle of nothing"),
        ({"memory": [{"tensor": "memory.1.sums"}]}, "the tensor 'memory.1.sums' does not stand in its place"),
        ({"memory": [{"dict": [["a"]]}]}, "its memory has misshapen keys"),
        ({"memory": [{"dict": [[[], 1]]}]}, "its memory has misshapen keys"),
        ({"memory": [{"dict": [[1.5, 1]]}]}, "its memory has misshapen keys"),
        ({"memory": [[]]}, "Said.memory.0 input should be a valid dictionary"),
        ({"lessons": [{"self": 1}]}, ""),
        ({"self": 1}, ""),
        ({"surplus": 1}, "Said: no setting is called 'surplus'"),
        ({"settings": {"lr": math.inf}}, "it has a value that JSON lacks: "),
        ({"settings": {"name": "\ud83d"}}, "it has a value that JSON lacks: "),
        ({"tensors": {"learned.head.half": torch.ones(3).half()}}, "learned.head.half must be a dense tensor of "),
        (
            {"tensors": {"learned.head.half": torch.tensor(math.inf)}},
            "learned.head.half has values that are not finite",
        ),
    ],
)
def test_a_checksum_that_fits_does_not_make_a_file_right(path, content, changes, reason):
    assert refusal(path, edited(content, **changes)).startswith(BROKEN + reason)


def test_a_boolean_that_is_neither_is_refused(path, content):
    tensors = load(content) | {"memory.1.seen": torch.tensor([1, 2], dtype=torch.uint8).view(torch.bool)}
    said = forged(said_of(content), tensors)
    assert refusal(path, said) == f"{BROKEN}memory.1.seen has booleans that are not 0 or 1{COPY}"


def test_a_small_file_cannot_ask_for_much_memory(path, content, limited):
    header, data = header_of(content)
    huge = {"dtype": "F32", "shape": [0, 2**31, 2**40], "data_offsets": [0, 0]}
    for entry in (huge, huge | {"shape": [2**40]}, huge | {"shape": [0] * 70}, huge | {"shape": [0, 2**63]}):
        named = json.dumps(header | {"x": entry}).encode()
        assert refusal(path, bare(named) + data).startswith(BROKEN)
    for shape in ((0, 2**28 * (2**29 + 1)), (3, 0), (0,), ()):
        said = said_of(content) | {"triangles": ["learned.head.half"]}
        tensors = load(content) | {"learned.head.half": torch.zeros(shape)}
        assert refusal(path, forged(said, tensors)).startswith(BROKEN)
    with path.open("wb") as file:
        file.write(bare(b"", 2**62) + content)
        file.truncate(2**36)  # a hole of 64 GiB that takes no room on the disk
    assert refusal(path).startswith(BROKEN + NO_HEADER)
    lists = b'{"__metadata__":{"lamina":"' + b"[]," * (HEADER_LIMIT // 3 - 99) + b'"}}'
    assert refusal(path, bare(lists)) == f"{BROKEN}its header has more than 1048576 values{COPY}"


def test_long_names_of_a_file_do_not_make_long_messages_or_long_work(path, content, limited):
    many = {"dict": [[number, number] for number in range(50_000)]}
    said = said_of(content) | {"memory": [{"dict": [["x" * 10**6, many]]}]}
    begun = time.process_time()
    assert refusal(path, forged(said, load(content))).startswith(f"{BROKEN}nothing refers to its tensors ")
    assert len(refusal(path, forged(said_of(content) | {"\x1b\n" * 10**5: 1}, load(content)))) < 600
    assert time.process_time() - begun < 4


# ── fuzz ───────────────────────────────────────────────────────────────────────────────────────────

quiet = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
fuzzed = settings(max_examples=70, **quiet)


def survives(path, content):
    """Read it: either it is refused in one line, or it is a model that is written and read as it is."""
    path.write_bytes(content)
    try:
        model = ModelFile.read(path)
    except ModelFileError as error:
        assert str(error).isprintable()
        return
    assert model.checksum == said_of(content)["checksum"]
    model.write(path)
    assert same_model(ModelFile.read(path), model)


@fuzzed
@given(data=st.data())
def test_a_cut_or_flipped_file_is_refused_or_the_same(path, content, limited, data):
    broken = bytearray(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    header = min(len(broken), len(content) - len(header_of(content)[1]))
    for _ in range(data.draw(st.integers(0, 3))):
        most = data.draw(st.sampled_from([8, header, len(broken)]))
        if broken:
            broken[data.draw(st.integers(0, min(len(broken), most) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    survives(path, bytes(broken))


wild = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**64), 10**400, "self", "tensor", "memory.1.sums", "\ud800", "x" * 300])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["tensor", "dict", "self", "name", "é\n"]), inner, max_size=3)
        | st.lists(inner, min_size=1, max_size=2).map(lambda pairs: {"dict": [[each, each] for each in pairs]})
    ),
    max_leaves=5,
)


def places(value):
    """Every list or dict in a value, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutate(value, news, chance):
    """Put news into a value at random places, or copy, or drop what is there."""
    for new in news:
        found = list(places(value))
        if found:
            (holder, key), (other, place) = chance.choice(found), chance.choice(found)
            new = json.loads(json.dumps(other[place])) if chance.random() < 0.3 else new
            if chance.random() < 0.2:
                del holder[key]
            elif isinstance(holder, list) and chance.random() < 0.3:
                holder.insert(key, new)
            else:
                holder[key if chance.random() < 0.7 or isinstance(holder, list) else "self"] = new


changed = {"news": st.lists(wild, min_size=1, max_size=3), "seed": st.integers(0, 2**32)}


@fuzzed
@given(**changed)
def test_facts_changed_under_a_checksum_that_fits_are_refused_or_kept(path, content, limited, news, seed):
    said, tensors = said_of(content), load(content)
    mutate(said, news, random.Random(seed))
    survives(path, forged(said, tensors))


@fuzzed
@given(**changed)
def test_a_changed_header_of_safetensors_is_refused_or_kept(path, content, limited, news, seed):
    header, tensors = header_of(content)
    mutate(header, news, random.Random(seed))
    survives(path, bare(json.dumps(header).encode()) + tensors)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@settings(max_examples=30, **quiet)
@given(
    memory=st.lists(st.dictionaries(words | st.integers(), plain | st.lists(plain, max_size=2), max_size=3), max_size=3)
)
def test_any_plain_memory_comes_back(path, memory):
    holding = make_model(
        memory=[*memory, {place: {"3": torch.ones(1), 3: state} for place, state in enumerate(memory)}]
    )
    holding.write(path)
    assert same(ModelFile.read(path).memory, holding.memory)


# ── crashes and full disks ─────────────────────────────────────────────────────────────────────────

CALLS = ("mkdir", "link", "replace", "unlink", "fsync", "listdir", "open")
VERSIONS = [make_model(seed=seed) for seed in range(4)]
SUMS = [version.checksum for version in VERSIONS]


class Killed(BaseException):
    """No handler of errors may see it, and nothing works after it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each moment: version 1 is in place, version 0 is its .bak."""
    source = tmp_path_factory.mktemp("versions") / "shop.lamina"
    for version in VERSIONS[:2]:
        version.write(source)
    before = source.with_name("shop.lamina.bak").read_bytes(), source.read_bytes()

    def make(previous=True):
        path = tmp_path_factory.mktemp("moment") / "shop.lamina"
        path.write_bytes(before[1])
        if previous:
            path.with_name("shop.lamina.bak").write_bytes(before[0])
        return path

    return make


def interrupted(monkeypatch, path, stop, links=True):
    """Write version 2; at each call to the system `stop(number, name)` may raise. Return the calls made."""
    calls = []

    def guarded(name, function):
        def call(*values, **options):
            calls.append(name)
            stop(len(calls), name)
            return function(*values, **options)

        return call

    class Draft(io.FileIO):
        def write(self, content):
            calls.append("write")
            try:
                stop(len(calls), "write")
            except BaseException:
                super().write(content[: len(content) // 2])
                raise
            return super().write(content)

    def opened(name, mode="r", *values, **options):
        return guarded("open", Draft)(name, "w") if mode == "wb" else real(name, mode, *values, **options)

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    real = io.open
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        for name in CALLS:
            patch.setattr(os, name, guarded(name, no_links if name == "link" and not links else getattr(os, name)))
        with contextlib.suppress(Killed):
            VERSIONS[2].write(path)
    return calls


def state(path):
    """Which versions are at the path and at its .bak; both must be whole."""
    previous = path.with_name(f"{path.name}.bak")
    return tuple(SUMS.index(ModelFile.read(each).checksum) if each.exists() else None for each in (path, previous))


@pytest.mark.parametrize(("links", "previous"), [(True, True), (True, False), (False, True)])
def test_a_process_killed_before_any_call_leaves_whole_files_that_the_next_one_builds_on(
    folders, monkeypatch, links, previous
):
    seen, moment, over = [], 0, False
    while not over:
        moment += 1
        path = folders(previous)

        def dead(number, name, moment=moment):
            if number >= moment:
                raise Killed

        over = len(interrupted(monkeypatch, path, dead, links)) < moment
        seen.append(state(path))
        VERSIONS[3].write(path)
        assert state(path) == (3, seen[-1][0])
        assert sorted(os.listdir(path.parent)) == ["shop.lamina", "shop.lamina.bak"]
    # In this order and no other: the version before is kept, then the new one comes.
    assert list(dict.fromkeys(seen)) == [(1, 0 if previous else None), (1, 1), (2, 1)]
    assert len(seen) > 10


def test_the_new_version_is_on_the_disk_before_the_old_ones_are_touched(folders, monkeypatch):
    calls = interrupted(monkeypatch, folders(), lambda *_: None)
    assert calls[:7] == ["listdir", "mkdir", "open", "write", "fsync", "link", "replace"]
    assert calls[-4:] == ["fsync", "replace", "open", "fsync"]


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_both_versions_and_no_draft(folders, monkeypatch, name):
    path = folders()

    def full(number, called):
        if called == name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError) as error:
        interrupted(monkeypatch, path, full)
    where = f"{path}.bak could not be written: " if name == "replace" else ""
    reason = f"{where}No space left on device; what was saved before is still there"
    assert str(error.value) == f"{path} could not be written: {reason}"
    assert state(path) == (1, 0)
    assert sorted(os.listdir(path.parent)) == ["shop.lamina", "shop.lamina.bak"]


def test_a_disk_that_is_full_from_any_call_on_leaves_whole_files_and_no_draft(folders, monkeypatch):
    for moment in range(1, 15):
        path = folders()

        def full(number, name, moment=moment):
            if number >= moment and name in ("write", "fsync", "link", "replace"):
                raise OSError(errno.ENOSPC, "No space left on device")

        try:
            interrupted(monkeypatch, path, full)
        except StorageError:
            assert state(path) in [(1, 0), (1, 1)]
        else:
            assert state(path) == (2, 1)
        assert sorted(os.listdir(path.parent)) == ["shop.lamina", "shop.lamina.bak"]


def test_a_folder_that_cannot_be_synced_is_no_error(folders, monkeypatch):
    path = folders()
    for name in ("open", "fsync"):

        def refuse(number, called, name=name):
            if called == name and number > 9:
                raise OSError(errno.EINVAL, "Invalid argument")

        before = len(os.listdir("/proc/self/fd"))
        interrupted(monkeypatch, path, refuse)
        assert state(path)[0] == 2 and len(os.listdir("/proc/self/fd")) == before


def test_a_new_file_has_no_version_before_it_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "shop.lamina"
    MODEL.write(path)
    assert os.listdir(path.parent) == ["shop.lamina"]


def test_only_the_drafts_of_this_file_are_swept_away(tmp_path):
    own = [".s[1].lamina.77.draft", ".s[1].lamina.bak.77.draft", ".s[1].lamina.77.link.draft"]
    others = [".s[1].lamina.x.77.draft", ".s1.lamina.77.draft", "s[1].lamina.77.draft", ".s[1].lamina.77.draft.x"]
    for name in own + others:
        (tmp_path / name).touch()
    MODEL.write(tmp_path / "s[1].lamina")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "s[1].lamina"])


def test_a_folder_with_the_name_of_the_backup_is_named_in_the_error(path):
    MODEL.write(path)
    path.with_name("shop.lamina.bak").mkdir()
    with pytest.raises(StorageError, match=r"shop\.lamina\.bak could not be written: Is a directory"):
        VERSIONS[1].write(path)
    assert ModelFile.read(path).checksum == MODEL.checksum


def write_forever(path):
    while True:
        for version in VERSIONS:
            version.write(path)


def test_a_process_that_is_killed_while_it_writes_leaves_whole_files(folders):
    path, chance, seen = folders(), random.Random(0), set()
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=write_forever, args=(path,))
        process.start()
        time.sleep(chance.uniform(0.01, 0.1))
        process.kill()
        process.join()
        seen.add(state(path))
        assert process.exitcode == -9
    assert len(seen) > 1
    VERSIONS[3].write(path)
    assert sorted(os.listdir(path.parent)) == ["shop.lamina", "shop.lamina.bak"]
