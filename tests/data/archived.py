"""Tiny stand-ins for the archives of VTAB whose images are rows of arrays; each returns what it wrote."""

import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
from scipy.io import savemat

SPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
NORB_TRAIN, NORB_TEST = "5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing"


def write_cifar(root, rows=1100, classes=7, labels=None):
    place = root / "cifar-100-python"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    data = {}
    for split, count in (("train", rows), ("test", 13)):
        data[split] = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        values = {"data": data[split], "fine_labels": [row % classes for row in range(labels or count)]}
        (place / split).write_bytes(pickle.dumps(values))
    (place / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"kind_{label}" for label in range(classes)]}))
    return data


def write_svhn(root, labels=None):
    """Labels are 2 to 10 and 1, in turn."""
    place = root / "svhn"
    place.mkdir()
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 20), ("test", 5)):
        arrays[split] = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        marks = np.arange(1, (labels or count) + 1).reshape(-1, 1) % 10 + 1
        savemat(place / f"{split}_32x32.mat", {"X": arrays[split], "y": marks})
    return arrays


def write_sprites(root, labels=30):
    place = root / "dsprites"
    place.mkdir()
    images = np.random.default_rng(0).integers(0, 2, (30, 64, 64), dtype=np.uint8)
    latents = np.zeros((labels, 6), np.int64)
    latents[:, 3] = latents[:, 4] = np.arange(labels)
    np.savez_compressed(place / SPRITES, imgs=images, latents_classes=latents)
    return images


def norb_matrix(path, array, magic):
    sizes = [*array.shape, *[1] * (3 - array.ndim)]
    path.write_bytes(np.array([magic, array.ndim, *sizes], "<i4").tobytes() + array.tobytes())


def write_norb(root, labels=None):
    place = root / "smallnorb"
    place.mkdir()
    random, arrays = np.random.default_rng(0), {}
    for stem, count in ((NORB_TRAIN, 9), (NORB_TEST, 12)):
        arrays[stem] = random.integers(0, 256, (count, 2, 96, 96), dtype=np.uint8)
        rows = np.arange(labels or count)
        info = np.stack([rows, rows % 9, 2 * rows, np.zeros_like(rows)], 1).astype("<i4")
        norb_matrix(place / f"smallnorb-{stem}-dat.mat", arrays[stem], 507333717)
        norb_matrix(place / f"smallnorb-{stem}-info.mat", info, 507333716)
    return arrays


def write_camelyon(root, labels=None):
    """The HDF5 files are .npy files; `h5py_of_npy` reads them."""
    place = root / "pcam"
    place.mkdir()
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 9), ("valid", 5), ("test", 4)):
        for half, shape in (("x", (count, 96, 96, 3)), ("y", (labels or count, 1, 1, 1))):
            name = f"camelyonpatch_level_2_split_{split}_{half}.h5"
            arrays[name] = random.integers(0, 256 if half == "x" else 2, shape, dtype=np.uint8)
            with (place / name).open("wb") as file:
                np.save(file, arrays[name])
    return arrays


@contextmanager
def _opened(path, mode="r"):
    try:
        array = np.load(path)
    except (EOFError, ValueError):
        raise OSError("Unable to synchronously open file (file signature not found)") from None
    yield {str(path)[-4]: array}


h5py_of_npy = SimpleNamespace(File=_opened)
