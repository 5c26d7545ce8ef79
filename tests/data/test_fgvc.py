"""FGVC: split files that map paths to ids of classes; one map of ids for all roles."""

import json

import pytest
from PIL import Image

from lamina.data.streams import StreamSettings, build_stream
from lamina.data.transfer.fgvc import FGVC
from lamina.errors import DataError
from lamina.runs import plan
from tests.data.conftest import pixels

#: ids have gaps, and validation images lack class 9
SPLITS = {"train": [9, 4, 4, 200, 9, 200, 4], "val": [200, 4, 4], "test": [4, 9, 200, 200]}


def write(folder, images, splits=SPLITS, named=True):
    for number, (role, ids) in enumerate(splits.items()):
        entries = {}
        for image, each in enumerate(ids):
            name = f"{each:03d}.Bird_{each}/{role}_{image}.jpg" if named else f"{role}_{image}.jpg"
            (folder / images / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(100 * number + image, 40, 44)).save(folder / images / name)
            entries[name] = each
        (folder / f"{role}.json").write_text(json.dumps(entries))
    return folder


def built(root, name="fgvc-cub", **values):
    return build_stream(StreamSettings(name=name, **values), root)


def labels(split):
    return [int(label) for label in split.images.labels[split.indices]]


@pytest.mark.parametrize(("name", "folder", "images"), [
    ("fgvc-cub", "CUB_200_2011", "images"), ("fgvc-nabirds", "nabirds", "images"),
    ("fgvc-flowers", "OxfordFlower", "."), ("fgvc-dogs", "Stanford-dogs", "Images"),
    ("fgvc-cars", "Stanford-cars", "."),
])  # fmt: skip
@pytest.mark.parametrize("below", ["", "fgvc"])
def test_each_of_the_five_is_read_by_its_split_files(tmp_path, name, folder, images, below):
    write(tmp_path / below / folder, images)
    stream = built(tmp_path, name)
    assert [len(stream.tasks[0].train), len(stream.tasks[0].test), stream.columns] == [10, 4, 3]
    assert stream.details["split"] == "train.json, test.json, val.json"
    assert name in FGVC and len(FGVC) == 5


def test_a_role_that_lacks_a_class_does_not_shift_the_labels_of_others(tmp_path):
    write(tmp_path / "cub", "images")
    select, final = built(tmp_path, test_on="validation").tasks[0], built(tmp_path).tasks[0]
    assert sorted(labels(select.train)) == [0, 0, 0, 1, 1, 2, 2] and sorted(labels(select.test)) == [0, 0, 2]
    assert sorted(labels(final.test)) == [0, 1, 2, 2]
    assert select.classes == final.classes and sorted(final.classes) == ["Bird 200", "Bird 4", "Bird 9"]
    for task in (select, final):
        for split in (task.train, task.test):
            names = [["Bird 4", "Bird 9", "Bird 200"][label] for label in labels(split)]
            assert [task.classes[column] for column in split.columns] == names


def test_a_class_that_is_tested_but_never_trained_on_is_refused(tmp_path):
    write(tmp_path / "cub", "images", {**SPLITS, "test": [4, 7, 8]})
    with pytest.raises(DataError) as error:
        built(tmp_path)
    assert str(error.value) == "fgvc-cub: test images have class ids that no training image has: 7, 8"


def test_without_validation_images_a_tenth_of_each_class_is_our_own_draw_and_the_same_everywhere(tmp_path):
    many = {"train": [3] * 20 + [5] * 30 + [6] * 11, "test": [3, 5, 6]}
    streams = []
    for place in ("one", "two"):
        write(tmp_path / place / "cub", "images", many)
        streams.append(built(tmp_path / place, test_on="validation"))
    assert labels(streams[0].tasks[0].test) == [0] * 2 + [1] * 3 + [2] * 1
    assert "our own draw, a tenth of each class" in streams[0].details["split"]
    assert streams[0].fingerprint == streams[1].fingerprint


def test_the_lists_of_the_archive_serve_where_there_are_no_split_files(tmp_path):
    place = write(tmp_path / "CUB_200_2011", "images", {"train": [2, 2, 5], "test": [5, 2]})
    files = [path for role in ("train", "test") for path in json.loads((place / f"{role}.json").read_text()).items()]
    (place / "images.txt").write_text("".join(f"{n} {path}\n" for n, (path, _) in enumerate(files)))
    (place / "image_class_labels.txt").write_text("".join(f"{n} {label}\n" for n, (_, label) in enumerate(files)))
    (place / "train_test_split.txt").write_text(
        "".join(f"{n} {int('train_' in path)}\n" for n, (path, _) in enumerate(files))
    )
    for role in ("train", "test"):
        (place / f"{role}.json").unlink()
    task = built(tmp_path).tasks[0]
    assert sorted(labels(task.train)) == [0, 0, 1] and sorted(labels(task.test)) == [0, 1]
    assert (
        built(tmp_path).details["split"].startswith("the archive's train_test_split.txt; validation images are our own")
    )


def test_classes_that_share_a_folder_are_named_by_their_ids(tmp_path):
    write(tmp_path / "cars", ".", named=False)
    with pytest.raises(DataError):
        built(tmp_path, "fgvc-cars")
    write(tmp_path / "Stanford-cars", ".", named=False)
    assert sorted(built(tmp_path, "fgvc-cars").tasks[0].classes) == ["class 200", "class 4", "class 9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "{path} must map the path of an image to the id of its class, a whole number"),
        ('{"a.jpg": 1.5}',
         "{path} must map the path of an image to the id of its class, a whole number"),
        ("[7", "{path} cannot be read as JSON: Expecting ',' delimiter: line 1 column 3 (char 2)"),
    ],
)  # fmt: skip
def test_a_spoiled_split_file_is_told_in_one_sentence(tmp_path, text, message):
    place = write(tmp_path / "cub", "images")
    (place / "test.json").write_text(text)
    with pytest.raises(DataError) as error:
        built(tmp_path)
    assert str(error.value) == message.format(path=place / "test.json")


def test_runs_on_them_crop_at_random_and_look_at_the_centre():
    run, _ = plan("linear-probe", "fgvc-cub")
    assert (run.augmentation, run.normalization) == ("resize-crop-flip", "imagenet")
