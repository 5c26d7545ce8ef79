"""What torchvision downloads is read where torchvision unpacks it; its downloads are replaced by tiny archives."""

import io
import json
import pickle
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from lamina.data.streams import StreamSettings, build_stream
from lamina.data.transfer.archives import ARCHIVES
from lamina.data.transfer.check import check, got
from lamina.data.transfer.download import DOWNLOADS
from lamina.errors import DataError
from tests.data.archived import h5py_of_npy, write_camelyon, write_cifar, write_svhn
from tests.data.conftest import pixels

VTAB = [name for name in DOWNLOADS if name.startswith("vtab-")]


def unpack_cifar(root, url):
    if "cifar-100" in url:
        write_cifar(root)
        return
    place = root / "cifar-10-batches-py"
    place.mkdir()
    for number, (name, count) in enumerate([*((f"data_batch_{n}", 4) for n in range(1, 6)), ("test_batch", 13)]):
        rows = np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": rows, "labels": [row % 3 for row in range(count)]}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car", "bird"]}))


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)


def unpack_dtd(root):
    for number, (split, names) in enumerate(
        {"train": ["b/b_1.jpg", "a/a_1.jpg", "a/a_2.jpg", "b/b_2.jpg"], "val": ["a/a_3.jpg", "b/b_3.jpg"],
         "test": ["a/a_4.jpg"]}.items()
    ):  # fmt: skip
        for image, name in enumerate(names):
            save(root / "dtd" / "images" / name, 10 * number + image)
        (root / "dtd" / "labels").mkdir(exist_ok=True)
        (root / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")


def unpack_flowers(root):
    for image in range(1, 13):
        save(root / "jpg" / f"image_{image:05d}.jpg", image)


def flowers_table(name):
    out = io.BytesIO()
    splits = {"trnid": np.array([[1, 5, 7, 9, 2]]), "valid": np.array([[3, 4, 6]]), "tstid": np.array([[8, 10, 11]])}
    labels = {"labels": np.array([[image % 3 + 1 for image in range(1, 13)]])}
    savemat(out, splits if name == "setid.mat" else labels)
    return out.getvalue()


def unpack_pets(root, url):
    for number, (split, count) in enumerate((("trainval", 20), ("test", 6))):
        names = [f"{'great_dane' if image % 2 else 'Bengal'}_{100 * number + image}" for image in range(count)]
        if "annotations" in url:
            (root / "annotations").mkdir(exist_ok=True)
            lines = [f"{name} {image % 2 + 1} 1 1\n" for image, name in enumerate(names)]
            (root / "annotations" / f"{split}.txt").write_text("".join(lines))
        else:
            for image, name in enumerate(names):
                save(root / "images" / f"{name}.jpg", 100 * number + image)


def unpack_eurosat(root):
    for number, label in enumerate(("AnnualCrop", "Forest", "River")):
        for image in range(10):
            save(root / "2750" / label / f"{label}_{image}.jpg", 10 * number + image)


def unpack_clevr(root):
    place = root / "CLEVR_v1.0"
    (place / "scenes").mkdir(parents=True)
    for split, count in (("train", 20), ("val", 3)):
        scenes = []
        for image in range(count):
            name = f"CLEVR_{split}_{image:06d}.png"
            save(place / "images" / split / name, image)
            objects = [{"pixel_coords": [0, 0, 8.0 + image / 9]}] * (3 + image % 4)
            scenes.append({"image_filename": name, "objects": objects})
        (place / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def unpacked_elsewhere(tmp_path_factory, write, folder):
    root = tmp_path_factory.mktemp("public")
    write(root)
    return root / folder


@pytest.fixture
def online(monkeypatch, tmp_path_factory):
    """Put tiny archives in the place of the internet; return the list of what is asked for."""
    asked = []
    datasets = torchvision.datasets
    svhn = unpacked_elsewhere(tmp_path_factory, write_svhn, "svhn")
    camelyon = unpacked_elsewhere(tmp_path_factory, write_camelyon, "pcam")

    def archive(unpack):
        def get(url, download_root, *_, **__):
            asked.append(url)
            place = Path(download_root)
            place.mkdir(parents=True, exist_ok=True)
            unpack(place, url) if unpack in (unpack_pets, unpack_cifar) else unpack(place)

        return get

    def one_file(contents):
        def get(url, root, filename=None, md5=None):
            asked.append(url)
            name = filename or url.rpartition("/")[2]
            Path(root, name).write_bytes(contents(name))

        return get

    def from_drive(file_id, root, filename, md5):
        asked.append(file_id)
        Path(root).mkdir(parents=True, exist_ok=True)
        Path(root, filename).write_bytes((camelyon / filename.removesuffix(".gz")).read_bytes())

    def decompress(path):
        Path(path.removesuffix(".gz")).write_bytes(Path(path).read_bytes())

    for module, unpack in {
        datasets.cifar: unpack_cifar, datasets.dtd: unpack_dtd, datasets.flowers102: unpack_flowers,
        datasets.oxford_iiit_pet: unpack_pets, datasets.eurosat: unpack_eurosat, datasets.clevr: unpack_clevr,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, "download_and_extract_archive", archive(unpack))
    monkeypatch.setattr(datasets.flowers102, "download_url", one_file(flowers_table))
    monkeypatch.setattr(datasets.svhn, "download_url", one_file(lambda name: (svhn / name).read_bytes()))
    monkeypatch.setattr(datasets.pcam, "download_file_from_google_drive", from_drive)
    monkeypatch.setattr(datasets.pcam, "_decompress", decompress)
    # tiny files have other check sums
    for module in (datasets.cifar, datasets.flowers102, datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    monkeypatch.setitem(sys.modules, "h5py", h5py_of_npy)
    return asked


@pytest.mark.parametrize("name", VTAB)
def test_what_is_downloaded_is_found_and_is_downloaded_once(tmp_path, few, online, name):
    begun = []
    found = got(name, tmp_path / "data", lambda: begun.append(name))
    assert found.wrong == [] and found.roles["training"] == 4 and begun == [name]
    first = len(online)
    assert first >= 1
    assert got(name, tmp_path / "data", lambda: begun.append(name)) == found == check(name, tmp_path / "data")
    assert len(online) == first and begun == [name]


@pytest.mark.parametrize(("name", "images"), {"cifar10": 20, "cifar100": 1100}.items())
def test_data_sets_of_streams_of_tasks_are_downloaded_to_where_their_streams_look(tmp_path, online, name, images):
    found = got(name, tmp_path / "data")
    assert (found.wrong, found.roles) == ([], {"training": images, "test": 13}) and len(online) == 1
    stream = build_stream(StreamSettings(name=name, tasks=1), tmp_path / "data")
    assert len(stream.tasks[0].train) == images and len(online) == 1


def test_every_archive_that_is_downloaded_is_one_that_is_read():
    assert {name.removeprefix("vtab-") for name in VTAB} <= ARCHIVES.keys()
    assert all(hasattr(torchvision.datasets, own.kind) for own in DOWNLOADS.values())


def test_an_archive_that_was_unpacked_elsewhere_is_not_downloaded_again(tmp_path, few, online):
    unpack_dtd(tmp_path)
    assert got("vtab-dtd", tmp_path).wrong == [] and online == []


def test_what_nobody_downloads_is_told_with_where_it_belongs(tmp_path, online):
    (wrong,) = got("vtab-sun397", tmp_path).wrong
    assert "lamina does not download it. What belongs there: vtab-1k/sun397" in wrong and online == []
    (wrong,) = check("vtab-pets", tmp_path).wrong
    assert f"`lamina data get vtab-pets {tmp_path}` downloads it. What belongs there: vtab-1k/oxford_iiit_pet" in wrong


def test_a_folder_that_was_unpacked_in_part_is_left_and_this_is_said(tmp_path, few, online):
    got("vtab-dtd", tmp_path)
    (tmp_path / "dtd" / "dtd" / "images" / "a" / "a_4.jpg").unlink()
    found = got("vtab-dtd", tmp_path)
    assert len(found.wrong) == 1 and found.wrong[0].startswith("1 of 1 test images are missing")
    assert found.remarks[-1] == "a folder that was unpacked once is left as it is: remove it, and it is downloaded anew"
    assert len(online) == 1


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.eurosat, "download_and_extract_archive", offline)
    with pytest.raises(DataError) as error:
        got("vtab-eurosat", tmp_path / "data")
    assert str(error.value) == (
        f"vtab-eurosat could not be downloaded to {tmp_path}/data: Name or service not known; try again, or put the "
        "public archive there yourself, as `lamina data check` says"
    )


def test_without_h5py_patch_camelyon_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="h5py is not found"):
        got("vtab-camelyon", tmp_path)
