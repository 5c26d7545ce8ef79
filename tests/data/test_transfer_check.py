"""A look at data sets of transfer learning: archives of arrays are held to the same as images in files."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lamina.data.pictures import ArrayPictures, Source
from lamina.data.transfer import check as checking
from lamina.data.transfer.arrays import Rows, StoredPictures
from lamina.data.transfer.check import check
from lamina.data.transfer.named import TRANSFER
from lamina.errors import DataError
from tests.data.archived import (
    NORB_TEST,
    NORB_TRAIN,
    SPRITES,
    h5py_of_npy,
    write_camelyon,
    write_cifar,
    write_norb,
    write_sprites,
    write_svhn,
)
from tests.data.test_vtab import lists

CAMELYON = [f"camelyonpatch_level_2_split_{split}_{half}.h5" for split in ("train", "valid", "test") for half in "xy"]
ARCHIVES = {
    "vtab-cifar100": write_cifar,
    "vtab-svhn": write_svhn,
    "vtab-camelyon": write_camelyon,
    "vtab-dsprites-location": write_sprites,
    "vtab-smallnorb-azimuth": write_norb,
}


@pytest.fixture(autouse=True)
def _npy_for_hdf5(monkeypatch, few):
    monkeypatch.setitem(sys.modules, "h5py", h5py_of_npy)


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_whole_archive_of_arrays_can_be_used_and_nothing_is_put_into_the_cache(tmp_path, name):
    ARCHIVES[name](tmp_path)
    found = check(name, tmp_path)
    assert (found.wrong, found.roles["training"], found.roles["validation"]) == ([], 4, 2)
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("name", CAMELYON)
def test_every_one_of_the_six_files_of_patch_camelyon_is_asked_for(tmp_path, name):
    write_camelyon(tmp_path)
    (tmp_path / "pcam" / name).unlink()
    assert check("vtab-camelyon", tmp_path).wrong == [
        f"{tmp_path}/pcam lacks {name}; Patch Camelyon is pcam with the six files camelyonpatch_level_2_split_*.h5, "
        "unpacked, so get what is missing"
    ]


@pytest.mark.parametrize("name", CAMELYON)
def test_an_empty_file_of_patch_camelyon_is_noticed(tmp_path, name):
    write_camelyon(tmp_path)
    (tmp_path / "pcam" / name).write_bytes(b"")
    (wrong,) = check("vtab-camelyon", tmp_path).wrong
    assert wrong.startswith(f"{tmp_path}/pcam is not a whole copy of Patch Camelyon (OSError: Unable to ")


@pytest.mark.parametrize(
    ("name", "write", "file"),
    [
        ("vtab-svhn", write_svhn, "svhn/test_32x32.mat"),
        ("vtab-smallnorb-elevation", write_norb, f"smallnorb/smallnorb-{NORB_TRAIN}-info.mat"),
        ("vtab-smallnorb-azimuth", write_norb, f"smallnorb/smallnorb-{NORB_TEST}-dat.mat"),
    ],
)
def test_a_file_that_an_archive_of_arrays_lacks_is_named(tmp_path, name, write, file):
    write(tmp_path)
    (tmp_path / file).unlink()
    (wrong,) = check(name, tmp_path).wrong
    folder, _, own = file.partition("/")
    assert wrong.startswith(f"{tmp_path}/{folder} lacks {own}; ")


@pytest.mark.parametrize(
    ("name", "labels", "told"),
    [
        ("vtab-cifar100", 1000, "cifar-100-python/train has 1100 images, and there are 1000 labels"),
        ("vtab-svhn", 19, "svhn/train_32x32.mat has 20 images, and there are 19 labels"),
        ("vtab-camelyon", 40, "pcam/camelyonpatch_level_2_split_train_x.h5 has 9 images, and there are 40 labels"),
        ("vtab-dsprites-location", 31, f"dsprites/{SPRITES} has 30 images, and there are 31 labels"),
        ("vtab-smallnorb-azimuth", 8, f"smallnorb/smallnorb-{NORB_TRAIN}-dat.mat has 9 images, and there are 8 labels"),
    ],
)
def test_an_archive_with_more_images_than_labels_or_fewer_is_refused(tmp_path, name, labels, told):
    ARCHIVES[name](tmp_path, labels=labels)
    assert check(name, tmp_path).wrong == [
        f"{tmp_path}/{told} for them; each image must have one, so get images and labels anew"
    ]


def test_a_sample_of_stored_pictures_is_read(tmp_path):
    """Files are there and have as many rows, but what is in them is no image of 96 x 96 pixels."""
    write_camelyon(tmp_path)
    bad = tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5"
    with bad.open("wb") as file:
        np.save(file, np.zeros((4, 95, 96, 3), np.uint8))
    (wrong,) = check("vtab-camelyon", tmp_path).wrong
    assert wrong.startswith(f"test images that were tried cannot be read: the images in {bad} cannot be read: ")
    assert wrong.endswith("; get it anew") and "\n" not in wrong


def test_pixels_that_were_damaged_inside_a_zip_file_are_noticed(tmp_path):
    write_sprites(tmp_path)
    path = tmp_path / "dsprites" / SPRITES
    contents = bytearray(path.read_bytes())
    # of 30 images in random bits, which hardly get smaller, the middle ones
    contents[8000:8100] = bytes(100)
    path.write_bytes(contents)
    (first, *_) = check("vtab-dsprites-orientation", tmp_path).wrong
    assert str(path) in first or str(path.parent) in first
    assert first.endswith("get it anew") and "\n" not in first


def test_a_file_that_ends_before_the_last_of_its_images_is_refused(tmp_path):
    ones = np.ones((3, 1, 2, 2), np.uint8)
    rows = Rows(range(4), np.arange(4), (2, 2), tmp_path / "images", 4, lambda wanted: iter([ones[wanted[wanted < 3]]]))
    pictures = StoredPictures("some", [(rows, np.array([2, 0])), (rows, np.array([3, 1]))])
    assert (pictures.tried(np.array([0, 1, 3])) == 1).all()
    for read in (lambda: pictures.tried(np.array([0, 2])), lambda: pictures.opened(np.arange(4), False)):
        with pytest.raises(DataError) as error:
            read()
        assert str(error.value) == f"{tmp_path}/images ends before all of its images came; get it anew"


def test_tried_pictures_are_those_that_are_opened(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 9, 3, 4, 4), dtype=np.uint8)
    parts = [
        (Rows(range(9), np.arange(9), (4, 4), tmp_path / "images", 9, lambda rows, own=own: iter([own[rows]])), chosen)
        for own, chosen in zip(pixels, (np.array([7, 2, 5]), np.array([8, 0])), strict=True)
    ]
    pictures = StoredPictures("some", parts)
    opened = pictures.opened(np.arange(5), False).pixels
    assert (opened == np.concatenate([pixels[0][[7, 2, 5]], pixels[1][[8, 0]]])).all()
    wanted = np.array([1, 2, 4])
    assert (pictures.tried(wanted) == opened[wanted]).all()


def test_a_source_of_any_other_kind_is_opened_too(tmp_path, monkeypatch):
    class Broken(ArrayPictures):
        def opened(self, wanted, skip_broken):
            raise DataError("somebody sat on it")

    arrays = [kind(np.zeros((4, 3, 2, 2), np.uint8), np.arange(4) % 2) for kind in (ArrayPictures, Broken)]
    source = Source(["a", "b"], *arrays, closed=True, details={"split": "half"})
    monkeypatch.setitem(TRANSFER, "vtab-dtd", replace(TRANSFER["vtab-dtd"], read=lambda *_: source))
    assert check("vtab-dtd", tmp_path).wrong == ["test images that were tried cannot be read: somebody sat on it"]


def test_what_whole_photographs_will_take_on_the_disk_is_said_where_it_is_much(tmp_path, monkeypatch):
    lists(tmp_path)
    assert not any("decoded" in remark for remark in check("vtab-kitti-distance", tmp_path).remarks)
    monkeypatch.setattr(checking, "decode_image", lambda contents, max_side: SimpleNamespace(size=2 * 10**9))
    assert check("vtab-kitti-distance", tmp_path).remarks[-1] == (
        f"decoded, its images will take about 32 GB in {tmp_path}/cache (LAMINA_CACHE)"
    )
