import numpy as np
import pytest
from PIL import Image

import lamina.data.sample
from lamina.data.folder import labelled_folder
from lamina.data.sample import write_sample
from lamina.data.sources import digits
from lamina.errors import ConfigError, StorageError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "new" / "digits"
    return out, write_sample("digits", out)


def test_three_parts_and_a_test_folder_share_the_ten_classes_in_order(written):
    out, folders = written
    assert folders == [out / "1", out / "2", out / "3", out / "test"]
    assert sorted(path.name for path in out.iterdir()) == ["1", "2", "3", "test"]
    held = [{path.name for path in folder.iterdir()} for folder in folders]
    assert held[:3] == [{"zero", "one", "two", "three"}, {"four", "five", "six"}, {"seven", "eight", "nine"}]
    assert held[3] == held[0] | held[1] | held[2]


def test_every_image_is_there_once_with_the_pixels_and_the_class_of_the_stream(written):
    out, folders = written
    source = digits()
    for pictures, places in ((source.train, folders[:3]), (source.test, folders[3:])):
        seen = []
        for folder in places:
            classes, images = labelled_folder(folder)
            pixels = images.opened(np.arange(len(images.labels)), skip_broken=False)
            for place, path in enumerate(images.paths):
                index = int(path.stem)
                assert path.name == f"{index:04d}.png"
                assert classes[images.labels[place]] == source.classes[pictures.labels[index]]
                np.testing.assert_array_equal(pixels.image(place).numpy(), pictures.pixels[index])
                seen.append(index)
        assert sorted(seen) == list(range(len(pictures.labels)))
    with Image.open(out / "1" / "zero" / "0000.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (8, 8))


@pytest.mark.parametrize(("parts", "sizes"), [(1, [10]), (4, [3, 3, 2, 2]), (10, [1] * 10)])
def test_parts_are_as_equal_as_can_be_and_larger_ones_come_first(tmp_path, monkeypatch, parts, sizes):
    few = digits()
    for pictures in (few.train, few.test):
        _, first = np.unique(pictures.labels, return_index=True)
        pictures.pixels, pictures.labels = pictures.pixels[first], pictures.labels[first]
    monkeypatch.setattr(lamina.data.sample, "_SAMPLES", {"digits": lambda: few})
    folders = write_sample("digits", tmp_path, parts)
    assert [len(list(folder.iterdir())) for folder in folders] == [*sizes, 10]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / ".hidden").touch()
    new = tmp_path / "new"
    rule = "is not an empty folder; a sample is written to a new or empty one"
    for name, out, parts, message in (
        ("digit", new, 3, "no sample is called 'digit'; did you mean 'digits'? Known: digits"),
        ("digits", new, 0, "parts of sample 'digits' must be from 1 to 10; got 0"),
        ("digits", new, 11, "parts of sample 'digits' must be from 1 to 10; got 11"),
        ("digits", full, 3, f"{full} {rule}"),
        ("digits", full / ".hidden", 3, f"{full}/.hidden {rule}"),
    ):
        with pytest.raises(ConfigError) as error:
            write_sample(name, out, parts)
        assert str(error.value) == message
    assert not new.exists() and [path.name for path in full.iterdir()] == [".hidden"]


def test_a_disk_that_refuses_is_one_sentence(tmp_path, monkeypatch):
    def refuse(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(StorageError) as error:
        write_sample("digits", tmp_path)
    assert str(error.value) == (
        f"a sample could not be written to {tmp_path}: No space left on device; empty it and try again"
    )
