import io
import os
import subprocess
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lamina.data.decode
import lamina.data.incoming
from lamina.data.decode import ImageFiles
from lamina.data.incoming import Incoming, batches, expand, incoming
from lamina.data.transforms import InputSpec, transform
from lamina.errors import ConfigError
from lamina.text import printable

HALF = (0.5, 0.5, 0.5)
SIZE = 9
EMPTY = "it is a folder without images (.bmp, .jpeg, .jpg, .png, .webp)"
MATCHLESS = "there is no file of this name, and no image matches it as a pattern"


def plain(size=SIZE, **values):
    return transform("plain", InputSpec(size, HALF, HALF, **values))


def saved(path, seed=0, height=11, width=13, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def many(tmp_path):
    """Return a maker of `count` images, each of one colour of its own."""

    def make(count):
        paths = [tmp_path / "many" / f"{number:04d}.bmp" for number in range(count)]
        paths[0].parent.mkdir()
        for number, path in enumerate(paths):
            Image.new("RGB", (13, 11), (number % 251, number // 251, 7)).save(path)
        return paths

    return make


def read(*paths, **values):
    return list(incoming(paths, plain(**values), max_side=256, workers=2))


def names(root, found):
    return [str(path.relative_to(root)) for path in found]


# ---------------------------------------------------------------- what is found


def test_files_are_taken_as_given_in_the_order_given(tmp_path):
    given = [tmp_path / "b.png", tmp_path / "a.dat", tmp_path / ".hidden.png", tmp_path / "missing.png"]
    for path in given[:3]:
        path.write_bytes(b"x")
    assert list(expand([str(path) for path in given], None)) == given


def test_a_folder_gives_its_images_sorted_by_path_without_hidden_and_other_files(tmp_path):
    for name in (
        "b/2.PNG",
        "b/10.jpg",
        "b/deep/er/1.webp",
        "a.bmp",
        "c.jpeg",
        ".x.png",
        ".git/1.png",
        "notes.txt",
        "z",
    ):
        saved(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    expected = ["a.bmp", "b/10.jpg", "b/2.PNG", "b/deep/er/1.webp", "c.jpeg"]
    assert names(tmp_path, expand([str(tmp_path)], None)) == expected
    assert expected == sorted(expected, key=lambda name: Path(name).parts)


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    saved(other / "1.png")
    saved(root / "in" / "2.png")
    (root / "link.png").symlink_to(other / "1.png")
    (root / "elsewhere").symlink_to(other)
    (root / "folder.png").symlink_to(other)
    assert names(root, expand([str(root)], None)) == ["in/2.png", "link.png"]
    # what is named itself is followed
    assert names(root, expand([str(root / "elsewhere")], None)) == ["elsewhere/1.png"]


@pytest.mark.parametrize("words", ["", "**", "**/*.png", "**/**/*"])
def test_links_that_lead_back_are_not_walked(tmp_path, words):
    saved(tmp_path / "a" / "1.png")
    for number in range(5):
        (tmp_path / "a" / f"loop{number}").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    assert names(tmp_path, expand([str(tmp_path / words)], None)) == ["a/1.png"]


def test_a_link_to_itself_or_to_nothing_is_an_error_of_its_own(tmp_path):
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    found = list(expand([str(tmp_path)], None))
    assert names(tmp_path, found) == ["lost.png", "self.png"]
    assert [item.error for item in read(*found)] == [
        "it is a link to nothing",
        "it cannot be opened: Too many levels of symbolic links",
    ]


def test_folders_can_be_nested_deeper_than_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("a")
        os.chdir("a")
    saved(Path("1.png"))
    monkeypatch.chdir(tmp_path)
    try:
        (found,) = expand(["a"], None)
        assert len(found.parts) == 1101
        assert list(expand(["**/*.png"], None)) == [found]
    finally:
        # what pytest clears up with is a function that calls itself
        subprocess.run(["rm", "-r", "a"], check=True)


def test_an_empty_folder_and_a_pattern_without_match_do_not_stop_the_rest(tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("x")
    image = saved(tmp_path / "1.png")
    arguments = [str(tmp_path / "empty"), str(tmp_path / "*.webp"), "", str(image)]
    assert list(expand(arguments, None)) == [
        Incoming(arguments[0], None, EMPTY),
        Incoming(arguments[1], None, MATCHLESS),
        Incoming("", None, "the name is empty"),
        image,
    ]


def test_a_folder_that_cannot_be_read_is_an_error_in_its_place(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/1.png", "c/1.png"):
        saved(tmp_path / name)
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = Incoming(str(tmp_path / "b"), None, "the folder cannot be read: Permission denied")
    assert list(expand([str(tmp_path)], None)) == [tmp_path / "a/1.png", refused, tmp_path / "c/1.png"]
    assert names(tmp_path, expand([str(tmp_path / "**" / "*.png")], None)) == ["a/1.png", "c/1.png"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["a.png", "b.png"]),
        ("?.png", ["a.png", "b.png"]),
        ("[b-z].png", ["b.png"]),
        ("*.txt", ["notes.txt"]),
        # no suffix: images only, and all that lies in the folders that match
        ("*", ["a.png", "b.png", "x/1.png", "x/y/2.jpg", "z/3.png"]),
        ("x*", ["x/1.png", "x/y/2.jpg"]),
        ("*/*.png", ["x/1.png", "z/3.png"]),
        ("**", ["a.png", "b.png", "x/1.png", "x/y/2.jpg", "z/3.png"]),
        ("**/*.png", ["a.png", "b.png", "x/1.png", "z/3.png"]),
        ("x/**/*", ["x/1.png", "x/y/2.jpg"]),
        ("**/y/**", ["x/y/2.jpg"]),
        ("**/x/**/2*", ["x/y/2.jpg"]),
        (".*.png", [".hidden.png"]),
    ],
)
def test_patterns_mean_what_they_mean_in_a_shell(tmp_path, monkeypatch, pattern, expected):
    for name in ("b.png", "a.png", ".hidden.png", "x/1.png", "x/y/2.jpg", "z/3.png", "z/.git/4.png", "notes.txt"):
        saved(tmp_path / name, format="PNG")
    assert names(tmp_path, expand([f"{tmp_path}/{pattern}"], None)) == expected
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in expand([pattern], None)] == expected


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    odd = saved(tmp_path / "[ab]*.png")
    saved(tmp_path / "a1.png")
    assert list(expand([str(odd)], None)) == [odd]


def test_standard_input_is_one_path_per_line_and_folders_in_it_are_walked(tmp_path):
    inside = saved(tmp_path / "folder" / "1.png")
    lines = [" a b.png \n", "\n", "*.png\r\n", f"{tmp_path}/folder\n", "-", "last"]
    expected = [Path("first"), Path(" a b.png "), Path("*.png"), inside, Path("-"), Path("last"), Path("end")]
    assert list(expand(["first", "-", "end"], lines)) == expected


def test_standard_input_that_is_missing_or_not_text_is_an_error_in_its_place(tmp_path):
    (row, end) = expand(["-", "end"], None)
    assert (row, end) == (Incoming("-", None, "there is no standard input to read paths from"), Path("end"))
    bytes_ = io.TextIOWrapper(io.BytesIO(b"\xff.png\n"), encoding="utf-8")
    message = "standard input is not UTF-8; not all of its paths were read"
    assert list(expand(["-", "end"], bytes_)) == [Incoming("-", None, message), Path("end")]


def test_standard_input_is_read_only_as_far_as_images_are_asked_for(many):
    paths = many(3)
    taken = 0

    def lines():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield f"{paths[taken % 3]}\n"

    images = incoming(expand(["-"], lines()), plain(), 256, workers=2)
    assert taken == 0
    assert next(images).path == str(paths[1])
    assert taken <= 32
    for _ in range(100):
        next(images)
    assert 100 <= taken <= 132
    images.close()


# ---------------------------------------------------------------- what is read


def test_pixels_are_those_that_a_model_learns_from_bit_for_bit(tmp_path):
    paths = [
        saved(tmp_path / "same.png", 1, 9, 9),
        saved(tmp_path / "small.png", 2, 5, 4),
        saved(tmp_path / "one.png", 3, 1, 1),
        saved(tmp_path / "wide.webp", 4, 23, 170),
        saved(tmp_path / "tall.bmp", 5, 211, 37),
        saved(tmp_path / "large.jpg", 6, 301, 413, quality=90),
        saved(tmp_path / "grey.png", 7, 51, 33),
        saved(tmp_path / "clear.png", 8, 29, 43),
        saved(tmp_path / "turned.jpg", 9, 120, 77),
    ]
    Image.open(paths[6]).convert("L").save(paths[6])
    Image.open(paths[7]).convert("RGB").quantize(5).save(paths[7], transparency=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(paths[8]).save(paths[8], exif=exif)
    learned = ImageFiles("folder", paths, np.arange(9), max_side=31).opened(np.arange(9), skip_broken=False)
    for way in (plain(9), plain(24, crop_pct=0.9), plain(40, interpolation="bilinear")):
        found = list(incoming(paths, way, max_side=31, workers=3))
        for index, item in enumerate(found):
            expected = way(learned.image(index))
            assert item.path == str(paths[index]) and item.error is None
            assert item.pixels.dtype == torch.uint8 and item.pixels.shape == (3, way.spec.size, way.spec.size)
            assert torch.equal(item.pixels, expected), item.path
        assert len(found) == 9


def test_a_crop_does_not_keep_what_it_was_cut_from(tmp_path):
    (item,) = read(saved(tmp_path / "wide.png", height=SIZE, width=500))
    assert item.pixels.untyped_storage().nbytes() == 3 * SIZE * SIZE


def test_order_is_kept_when_some_images_take_longer(many, monkeypatch):
    paths = many(60)
    random = np.random.default_rng(0)
    decode = lamina.data.incoming.decode_image

    def slow(contents, max_side):
        time.sleep(random.choice([0, 0, 0, 0.02]))
        return decode(contents, max_side)

    monkeypatch.setattr(lamina.data.incoming, "decode_image", slow)
    found = list(incoming(paths, plain(), 256, workers=7))
    assert [item.path for item in found] == list(map(str, paths))
    assert [int(item.pixels[0, 4, 5]) for item in found] == list(range(60))


def test_broken_images_keep_their_place_and_have_a_reason(tmp_path):
    whole = [saved(tmp_path / f"{number}.png", number) for number in range(3)]
    cut, gif, text, lfs, empty = (
        tmp_path / name for name in ("cut.png", "gif.png", "text.png", "lfs.png", "empty.png")
    )
    cut.write_bytes(whole[0].read_bytes()[:-60])
    Image.new("RGB", (13, 11)).save(gif, "GIF")
    text.write_bytes(b"\x1b[2Jplain\ntext")
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    empty.touch()
    passed = Incoming("folder", None, "handed on")
    found = read(whole[0], cut, gif, whole[1], text, lfs, passed, empty, whole[2], tmp_path / "missing", cut / "x.png")
    assert [item.error for item in found] == [
        None,
        "image file is truncated",
        "it is a GIF image; JPEG, PNG, WEBP and BMP are read",
        None,
        "cannot identify image file",
        "it is the stand-in of a file that Git LFS has not fetched; JPEG, PNG, WEBP and BMP are read",
        "handed on",
        "it is empty",
        None,
        "there is no such file",
        "there is no such file",
    ]
    assert [item.pixels is None for item in found] == [item.error is not None for item in found]
    assert found[6] is passed


def test_a_reason_is_one_line_that_is_safe_to_print(many, monkeypatch):
    raised = iter([ValueError("\n a\x1b[31m\u202eb.\nsecond"), KeyError(), MemoryError(), OSError("x" * 5000)])

    def fail(contents, max_side):
        raise next(raised)

    monkeypatch.setattr(lamina.data.incoming, "decode_image", fail)
    found = list(incoming(many(4), plain(), 256, workers=1))
    assert [item.error for item in found] == [
        "a\\x1b[31m\\u202eb",
        "KeyError",
        "there is not enough memory to decode it",
        "x" * 200,
    ]


def test_only_files_of_a_sane_size_are_opened(tmp_path):
    fifo, sparse = tmp_path / "fifo.png", tmp_path / "sparse.png"
    os.mkfifo(fifo)
    with sparse.open("wb") as file:
        file.truncate(300_000_000)
    found = read(tmp_path, fifo, Path("/dev/zero"), sparse, Path("a\0b.png"))
    assert [item.error for item in found] == [
        "it is a folder",
        "it is not a file but a device, pipe or socket",
        "it is not a file but a device, pipe or socket",
        "it has 300 MB; at most 200 MB are read",
        "embedded null byte",
    ]


def test_a_file_that_cannot_be_opened_says_why(tmp_path, monkeypatch):
    path = saved(tmp_path / "1.png")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert [item.error for item in read(path)] == ["it cannot be opened: Permission denied"]


@pytest.mark.parametrize(
    "name", ["line\nbreak.png", "😀👩‍💻.png", "-rf.png", "'quo\"tes'.png", "\x1b[31mred.png", "\udcff.png", "a\\b.png"]
)
def test_odd_names_are_found_and_read(tmp_path, name):
    path = saved(tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "sub").mkdir()
    given = [str(path), str(tmp_path), f"{tmp_path}/sub/../{name}", f"{tmp_path}/*.png"]
    found = read(*expand(given, None))
    assert [Path(item.path).name for item in found] == [name] * 4
    assert [item.error for item in found] == [None] * 4
    assert printable(found[0].path).isprintable() or "👩‍💻" in name


# ---------------------------------------------------------------- how much at once


def test_memory_stays_flat_however_many_images_and_however_slow_the_caller(many):
    paths = many(300)
    made, alive_most, taken, ahead_most = [], 0, 0, 0
    way = plain()

    def steps(image):
        # so that it is this very tensor that is handed over
        out = way.steps(image).contiguous()
        made.append(weakref.ref(out))
        return out

    def counted():
        nonlocal taken
        for path in paths:
            taken += 1
            yield path

    for place, item in enumerate(incoming(counted(), replace(way, steps=steps), 256, workers=2)):
        if place % 60 == 0:
            time.sleep(0.05)
        ahead_most = max(ahead_most, taken - place)
        alive_most = max(alive_most, sum(tensor() is not None for tensor in made))
        assert item.error is None
    assert (len(made), taken) == (300, 300)
    assert ahead_most == 32
    assert 2 < alive_most <= 34


@pytest.mark.parametrize("how", ["close", "drop", "batches", "error"])
def test_a_caller_that_stops_early_leaves_no_thread_at_work(many, monkeypatch, how):
    paths = many(200)
    before = threading.active_count()
    started = 0
    decode = lamina.data.incoming.decode_image

    def slow(contents, max_side):
        nonlocal started
        started += 1
        time.sleep(0.01)
        return decode(contents, max_side)

    monkeypatch.setattr(lamina.data.incoming, "decode_image", slow)
    images = incoming(paths, plain(), 256, workers=4)
    kept = None
    if how == "error":
        with pytest.raises(ZeroDivisionError):
            for _ in images:
                _ = 1 / 0
        images.close()
    elif how == "batches":
        kept = images
        groups = batches(images, 2)
        next(groups)
        groups.close()
    else:
        next(images)
        assert threading.active_count() == before + 4
        images.close() if how == "close" else None
    del images
    assert threading.active_count() == before
    assert started <= 4 * 16 / 2
    assert kept is None or list(kept) == []


@pytest.mark.parametrize(("large", "most"), [(142, 1), (143, 4)])
def test_large_images_are_decoded_one_at_a_time(many, monkeypatch, large, most):
    at_once, seen = 0, []
    lock = threading.Lock()
    rgb = lamina.data.decode.rgb

    def slow(image):
        nonlocal at_once
        with lock:
            at_once += 1
            seen.append(at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return rgb(image)

    monkeypatch.setattr(lamina.data.decode, "rgb", slow)
    monkeypatch.setattr(lamina.data.decode, "_LARGE", large)
    assert len(list(incoming(many(8), plain(), 256, workers=4))) == 8
    assert max(seen) == most


def test_batches_keep_order_and_broken_images(many):
    paths = many(7)
    paths[2].write_bytes(b"x")
    groups = list(batches(incoming(paths, plain(), 256), 3))
    assert [len(group) for group in groups] == [3, 3, 1]
    assert [item.path for group in groups for item in group] == list(map(str, paths))
    assert [item.error is None for item in groups[0]] == [True, True, False]
    assert list(batches(iter([]), 3)) == []


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError) as error:
        next(batches(iter([]), 0))
    assert str(error.value) == "a batch holds at least 1 image; got 0"


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    "text", ["", "plain.png", "café", "猫", "😀👩‍💻🏴", "שלום", "a\u00a0b", "a\\nb", "e\u0301", "‰"]
)
def test_accents_scripts_and_emoji_are_shown_as_they_are(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x00\x1f\x7f\x80\x9b\x9f\x85", "\\x00\\x1f\\x7f\\x80\\x9b\\x9f\\x85"),
        ("gpj\u202egnp.exe", "gpj\\u202egnp.exe"),
        ("\u061c\u200e\u200f\u202a\u2066\u2069", "\\u061c\\u200e\\u200f\\u202a\\u2066\\u2069"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\ud800\udc80\udfff", "\\ud800\\udc80\\udfff"),
    ],
)
def test_what_could_steer_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable() and len(printable(text).splitlines()) == 1
