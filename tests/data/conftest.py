"""Small data sets on disk; no axis has the size of another: 5 classes, images of 11 x 13 pixels."""

from __future__ import annotations

import csv
import io
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lamina.data.pictures import ArrayPictures
from lamina.data.sources import data_root
from lamina.data.stream import Split
from lamina.data.transfer import archives
from lamina.data.transfer.order import SLICES, Published

#: read before any test changes the environment
REAL_ROOT = data_root()

WNIDS = ["n03", "n01", "n05", "n02", "n04"]
WORDS = {
    "n01": "crane, bird",
    "n02": "bee",
    "n03": "crane",
    "n04": "tub, vat",
    "n05": "oboe",
    "n99": "unused",
}


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LAMINA_DATA", raising=False)


@pytest.fixture
def real_root():
    return REAL_ROOT


def pixels(seed, height=11, width=13):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(seed, **size):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, **size)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def image_folder(tmp_path):
    """Return a maker of train/ and test/ with 5 classes, 3 training and 2 test images of each."""

    def make(name="birds", test="test", classes="edcab", train_count=3, test_count=2):
        root = tmp_path / name
        for role, count in (("train", train_count), (test, test_count)):
            for place, label in enumerate(classes):
                folder = root / role / label
                folder.mkdir(parents=True)
                for number in range(count):
                    seed = 1000 * (role == "train") + 100 * place + number
                    Image.fromarray(pixels(seed)).save(folder / f"{number}.png")
        return root

    return make


def _tiny_files():
    """Return {member of the public zip: contents}: 5 classes, 12 training and 2 validation images of each."""
    files = {"wnids.txt": "\n".join(WNIDS).encode()}
    files["words.txt"] = "".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()).encode()
    for place, wnid in enumerate(sorted(WNIDS)):
        for number in range(12):
            files[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = jpeg(100 * place + number)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
    rows = []
    for number in range(10):
        wnid = WNIDS[number % 5]
        files[f"val/images/val_{number}.JPEG"] = jpeg(9000 + number)
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    files["val/val_annotations.txt"] = "".join(reversed(rows)).encode()
    return files


@pytest.fixture
def tiny_unpacked(tmp_path):
    root = tmp_path / "unpacked"
    for name, contents in _tiny_files().items():
        path = root / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return root


@pytest.fixture
def tiny_zip(tmp_path):
    root = tmp_path / "zipped"
    root.mkdir()
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as file:
        for name, contents in _tiny_files().items():
            file.writestr(f"tiny-imagenet-200/{name}", contents)
    return root


@pytest.fixture
def tiny_parquet(tmp_path):
    """The same images, in an order of its own: spread over two files by number, classes in turn."""
    root = tmp_path / "parquet"
    folder = root / "tiny-imagenet"
    folder.mkdir(parents=True)
    label = {wnid: place for place, wnid in enumerate(sorted(WNIDS))}
    files = _tiny_files()
    annotated = files["val/val_annotations.txt"].decode()
    val = {row.split("\t")[0]: label[row.split("\t")[1]] for row in annotated.splitlines()}
    train = [name for name in files if name.startswith("train/") and name.endswith(".JPEG")]
    train.sort(key=lambda name: (int(name.split("_")[1].split(".")[0]), name))

    def write(path, names, labels):
        images = [{"bytes": files[name], "path": name.rsplit("/", 1)[1]} for name in names]
        table = pa.table({"image": images, "label": pa.array(labels, pa.int32())})
        pq.write_table(table, folder / path, row_group_size=7)

    for part in range(2):
        names = [name for name in train if int(name.split("_")[1].split(".")[0]) % 2 == part]
        write(f"train-{part:05d}-of-00002.parquet", names, [label[name.split("/")[1]] for name in names])
    write(
        "val-00000-of-00001.parquet",
        [f"val/images/{name}" for name in reversed(val)],
        list(reversed(val.values())),
    )
    with (folder / "classes.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["label", "wnid", "names"])
        writer.writerows([place, wnid, WORDS[wnid]] for wnid, place in label.items())
    return root


@pytest.fixture
def split():
    """Return a maker of a split of random images over 5 columns, whose indices are not its positions."""

    def make(count=7, height=11, width=13):
        random = np.random.default_rng(3)
        images = random.integers(0, 256, (count + 4, 3, height, width), dtype=np.uint8)
        return Split(
            images=ArrayPictures(images, np.arange(count + 4) % 5),
            indices=np.arange(count + 4)[::-1][:count].copy(),
            columns=random.integers(0, 5, count),
        )

    return make


@pytest.fixture
def few(monkeypatch):
    """Let archives of VTAB be cut into four images to learn from and two to choose on, not 800 and 200."""

    def less(own):
        return Published(own.train._replace(length=4), own.validation._replace(length=2), own.test)

    monkeypatch.setattr(archives, "SLICES", {name: less(own) for name, own in SLICES.items()})


@pytest.fixture
def ade20k_archive(tmp_path):
    """ADE20K: three photographs to learn from and two to test on, each of a size of its own."""
    place = tmp_path / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for half, count in (("training", 3), ("validation", 2)):
        for folder in ("images", "annotations"):
            (place / folder / half).mkdir(parents=True)
        for number in range(count):
            size, name = (20 + number, 30 - number), f"ADE_{half}_{number}"
            photograph = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(photograph).save(place / "images" / half / f"{name}.jpg", quality=95)
            mask = rng.integers(0, 151, size, dtype=np.uint8)
            mask[0, :3] = (0, 1, 150)
            Image.fromarray(mask).save(place / "annotations" / half / f"{name}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    names = ["wall, surface"] + ["door"] * 2 + [f"thing {n}, other" for n in range(147)]
    lines += [f"{n}\t0.1\t1\t1\t0\t{name}" for n, name in enumerate(names, start=1)]
    (place / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return place


class OneByOne:
    """The same images without a way to get many at once."""

    def __init__(self, images):
        self.labels, self.fingerprint, self.image = images.labels, images.fingerprint, images.image
        self.__len__ = images.__len__


@pytest.fixture
def one_by_one():
    return OneByOne
