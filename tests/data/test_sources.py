import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits

from lamina.data import sources
from lamina.data.streams import StreamSettings, build_stream
from lamina.errors import DataError

NAMES = ["crane (n01)", "bee", "crane (n03)", "tub", "oboe"]


def built(root, **values):
    return build_stream(StreamSettings(**({"name": "tiny-imagenet", "tasks": 2} | values)), root)


@pytest.fixture(params=["tiny_parquet", "tiny_unpacked", "tiny_zip"])
def tiny(request):
    return request.getfixturevalue(request.param)


def test_labels_follow_the_sorted_wordnet_ids_in_every_form(tiny):
    source = sources.tiny_imagenet(tiny)
    assert source.classes == NAMES
    assert source.train.labels.tolist() == [label for label in range(5) for _ in range(12)]
    # val_0 is of the first id in the unsorted wnids.txt: n03
    assert source.test.labels.tolist() == [2, 0, 4, 1, 3] * 2


def test_all_forms_give_the_same_stream(tiny_parquet, tiny_unpacked, tiny_zip):
    streams = [built(root, per_class=10) for root in (tiny_parquet, tiny_unpacked, tiny_zip)]
    assert len({stream.fingerprint for stream in streams}) == 1
    splits = [stream.merged().train for stream in streams]
    pixels = [split.images.batch(np.sort(split.indices)) for split in splits]
    assert pixels[0].shape == (50, 3, 11, 13)
    torch.testing.assert_close(pixels[0], pixels[1], rtol=0, atol=0)
    torch.testing.assert_close(pixels[0], pixels[2], rtol=0, atol=0)


def test_the_first_images_of_a_class_are_those_with_the_lowest_numbers(tiny_unpacked, tiny_parquet):
    root = tiny_unpacked / "tiny-imagenet-200"
    task = built(tiny_parquet, per_class=11, tasks=1, classes="even").tasks[0]
    index = int(task.train.indices[10])
    expected = np.asarray(Image.open(root / "train/n01/images/n01_10.JPEG")).transpose(2, 0, 1)
    np.testing.assert_array_equal(task.train.images.image(index).numpy(), expected)
    assert 11 not in task.train.indices


def test_a_zip_inside_the_folder_is_found(tiny_zip, tmp_path):
    (tmp_path / "tiny-imagenet").mkdir()
    shutil.move(tiny_zip / "tiny-imagenet-200.zip", tmp_path / "tiny-imagenet")
    assert len(built(tmp_path).merged().train) == 60


@pytest.mark.parametrize("form", ["tiny_parquet", "tiny_unpacked", "tiny_zip"])
def test_an_incomplete_copy_is_told_in_one_sentence(form, request):
    root = request.getfixturevalue(form)
    if form == "tiny_zip":
        path = root / "tiny-imagenet-200.zip"
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path = next(root.iterdir())
        for name in ("classes.tsv", "val/val_annotations.txt"):
            (path / name).unlink(missing_ok=True)
    with pytest.raises(DataError) as error:
        built(root)
    assert str(error.value).startswith(f"{path} is not a whole copy of Tiny-ImageNet (")
    assert str(error.value).endswith("); get it anew")
    assert "\n" not in str(error.value)


def test_missing_tiny_imagenet_names_the_places_and_the_next_move(tmp_path):
    with pytest.raises(DataError) as error:
        built(tmp_path)
    assert str(error.value) == (
        f"tiny-imagenet was not found; looked for {tmp_path}/tiny-imagenet, {tmp_path}/tiny-imagenet-200, "
        f"{tmp_path}/tiny-imagenet-200.zip; put its parquet files and classes.tsv, or the public "
        "tiny-imagenet-200.zip, unpacked or not, there, or name another folder: --data DIR (`lamina data` takes DIR "
        "alone) or LAMINA_DATA"
    )


def test_data_lie_where_the_argument_says_else_the_variable_else_the_cache_folder(tmp_path, monkeypatch):
    assert sources.data_root() == tmp_path / "home" / "lamina" / "data"
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "b"))
    assert sources.data_root() == tmp_path / "b"
    assert sources.data_root(tmp_path / "a") == tmp_path / "a"
    assert sources.data_root(Path("~/sets")) == Path.home() / "sets"


def test_the_doctor_is_told_what_is_there_and_what_is_not(tiny_parquet):
    found = {name: (path, words) for name, path, words in sources.find_sets(tiny_parquet)}
    folder = tiny_parquet / "tiny-imagenet"
    assert found["tiny-imagenet"] == (folder, f"found in {folder}")
    assert found["cifar10"][0] is None
    assert found["cifar100"][1].startswith(f"cifar100 was not found; looked for {tiny_parquet}/cifar-100-python")


def test_digits_are_scikit_learns_scaled_to_bytes():
    source = sources.digits()
    grey = load_digits().images
    both = np.concatenate([source.train.pixels, source.test.pixels])
    assert both.shape == (1797, 3, 8, 8) and both.dtype == np.uint8
    np.testing.assert_array_equal(both[:, 0], both[:, 2])
    expected = sorted(np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in grey)
    assert sorted(image[1].tobytes() for image in both) == expected


def test_the_split_of_the_digits_is_pinned():
    source = sources.digits()
    assert np.bincount(source.train.labels).tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert (len(source.train), len(source.test)) == (1437, 360)
    assert source.test.fingerprint == "acc3d4e15d7a11a5885547e98bc1e154"


class FakeCifar:
    """CIFAR as torchvision gives it, over four random images of 5 classes per half."""

    classes = ["apple_tree", "b", "c", "d", "e"]

    def __init__(self, root, train=True, download=False):
        folder = Path(root) / "cifar-100-python"
        if download:
            folder.mkdir(parents=True)
        if not folder.is_dir():
            raise RuntimeError("Dataset not found or corrupted.")
        self.data = np.random.default_rng(train).integers(0, 256, (15, 32, 31, 3), dtype=np.uint8)
        self.targets = [number % 5 for number in range(15)]


@pytest.mark.parametrize("place", ["cifar-100-python", "cifar100/cifar-100-python", None])
def test_cifar_is_read_where_it_lies_and_downloaded_otherwise(tmp_path, monkeypatch, place):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCifar)
    if place:
        (tmp_path / place).mkdir(parents=True)
    task = build_stream(StreamSettings(name="cifar100", tasks=1), tmp_path).tasks[0]
    assert sorted(task.classes)[0] == "apple tree"
    assert sources.cifar_path("cifar100", tmp_path) == tmp_path / (place or "cifar100/cifar-100-python")
    image = task.train.images.image(3)
    assert image.shape == (3, 32, 31)
    expected = FakeCifar(sources.cifar_path("cifar100", tmp_path).parent).data[3]
    np.testing.assert_array_equal(image.numpy(), expected.transpose(2, 0, 1))


def test_cifar_offline_says_what_is_missing_and_where_to_put_it(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(DataError) as error:
        build_stream(StreamSettings(name="cifar10"), tmp_path)
    assert str(error.value) == (
        f"cifar10 was not found; looked for {tmp_path}/cifar-10-batches-py, "
        f"{tmp_path}/cifar10/cifar-10-batches-py; put the folder cifar-10-batches-py of the public archive "
        "there, or name another folder: --data DIR (`lamina data` takes DIR alone) or LAMINA_DATA. Downloading it "
        "failed: Name or service not known"
    )


def test_a_damaged_cifar_is_told_in_one_sentence(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="cifar-10-batches-py is not a whole copy of cifar10"):
        build_stream(StreamSettings(name="cifar10"), tmp_path)
