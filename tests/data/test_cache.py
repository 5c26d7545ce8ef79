import errno
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from lamina.data import cache
from lamina.data.cache import cached_array
from lamina.errors import StorageError


def counted(calls):
    def fill(out):
        calls.append(1)
        out[:] = np.arange(out.size, dtype=out.dtype).reshape(out.shape)

    return fill


EXPECTED = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)


def test_an_array_is_filled_once_and_then_mapped_from_disk(tmp_path):
    calls = []
    first = cached_array("a", (7, 3), np.float32, counted(calls))
    second = cached_array("a", (7, 3), np.float32, counted(calls))
    np.testing.assert_array_equal(first, EXPECTED)
    np.testing.assert_array_equal(second, EXPECTED)
    assert len(calls) == 1
    assert isinstance(second, np.memmap)
    assert [path.name for path in (tmp_path / "cache" / "decoded").iterdir()] == ["a.npy"]


def test_numpy_alone_can_read_a_cache_file(tmp_path):
    cached_array("a", (7, 3), np.float32, counted([]), kind="features")
    np.testing.assert_array_equal(np.load(tmp_path / "cache" / "features" / "a.npy"), EXPECTED)


@pytest.mark.parametrize("again", [False, True])
def test_a_cached_array_cannot_be_written_to(again):
    array = cached_array("a", (7, 3), np.float32, counted([]))
    if again:
        array = cached_array("a", (7, 3), np.float32, counted([]))
    with pytest.raises(ValueError):
        array[0, 0] = 1


def _cut(contents):
    return contents[:-20]


def _flipped(contents):
    return contents[:-30] + bytes([contents[-30] ^ 1]) + contents[-29:]


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flipped,
        lambda contents: b"",
        lambda contents: b"\x93NUMPY{{{",
        lambda contents: contents + b"x",
    ],
    ids=["cut", "flipped bit", "empty", "header", "longer"],
)
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    calls = []
    cached_array("a", (7, 3), np.float32, counted(calls))
    path = tmp_path / "cache" / "decoded" / "a.npy"
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(cached_array("a", (7, 3), np.float32, counted(calls)), EXPECTED)
    np.testing.assert_array_equal(cached_array("a", (7, 3), np.float32, counted(calls)), EXPECTED)
    assert len(calls) == 2


@pytest.mark.parametrize("shape, dtype", [((3, 7), np.float32), ((7, 3), np.int32)])
def test_a_file_of_another_shape_or_type_is_made_anew(shape, dtype):
    calls = []
    cached_array("a", (7, 3), np.float32, counted(calls))
    array = cached_array("a", shape, dtype, counted(calls))
    assert (array.shape, array.dtype, len(calls)) == (shape, dtype, 2)


def test_a_folder_that_cannot_be_written_means_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "file"))
    array = cached_array("a", (7, 3), np.float32, counted([]))
    np.testing.assert_array_equal(array, EXPECTED)
    assert not isinstance(array, np.memmap)
    with pytest.raises(ValueError):
        array[0, 0] = 1


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_no_draft(tmp_path, monkeypatch, call):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError) as error:
        cached_array("a", (7, 3), np.float32, counted([]))
    folder = tmp_path / "cache" / "decoded"
    assert str(error.value) == (
        f"the disk is full: {folder / 'a.npy'} could not be written; make room, or name another folder in LAMINA_CACHE"
    )
    assert list(folder.iterdir()) == []


def test_blocks_are_on_disk_before_the_array_is_filled(tmp_path):
    size = 1 << 20

    def fill(out):
        (draft,) = (tmp_path / "cache" / "decoded").glob("*.draft")
        assert draft.stat().st_blocks * 512 >= size

    cached_array("a", (size,), np.uint8, fill)


def test_a_filling_that_fails_leaves_nothing_behind(tmp_path):
    def fill(out):
        raise KeyError("broken")

    with pytest.raises(KeyError):
        cached_array("a", (7, 3), np.float32, fill)
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


def test_old_drafts_are_removed_and_young_ones_kept(tmp_path):
    folder = tmp_path / "cache" / "decoded"
    folder.mkdir(parents=True)
    for name, age in (("old.draft", 2 * 24 * 3600), ("young.draft", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    cached_array("a", (7, 3), np.float32, counted([]))
    assert sorted(path.name for path in folder.iterdir()) == ["a.npy", "young.draft"]


def test_an_array_without_elements_works():
    assert cached_array("a", (0, 3), np.float32, lambda out: None).shape == (0, 3)


@pytest.mark.parametrize("key", ["../a", "a/b", "", ".a"])
def test_a_key_that_is_not_a_plain_name_is_refused(key):
    with pytest.raises(ValueError, match="a cache key is made of letters"):
        cached_array(key, (1,), np.uint8, lambda out: None)


def _slow(barrier, results, number):
    drafts = []

    def fill(out):
        # both are inside `fill` at the same time
        barrier.wait(timeout=30)
        drafts.append(len(list((cache.cache_root() / "decoded").glob("*.draft"))))
        barrier.wait(timeout=30)
        out[:] = EXPECTED

    array = np.array(cached_array("shared", (7, 3), np.float32, fill))
    results.put((number, (array, drafts)))


def test_two_processes_that_fill_the_same_array_at_once_both_get_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_slow, args=(barrier, results, number)) for number in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    for array, drafts in found.values():
        np.testing.assert_array_equal(array, EXPECTED)
        assert drafts == [2]
    calls = []
    np.testing.assert_array_equal(cached_array("shared", (7, 3), np.float32, counted(calls)), EXPECTED)
    assert not calls
    assert [path.name for path in (tmp_path / "cache" / "decoded").iterdir()] == ["shared.npy"]


def test_the_cache_lies_in_the_users_cache_folder_unless_told_otherwise(tmp_path, monkeypatch):
    assert cache.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("LAMINA_CACHE")
    assert cache.cache_root() == tmp_path / "home" / "lamina"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == Path.home() / ".cache" / "lamina"
