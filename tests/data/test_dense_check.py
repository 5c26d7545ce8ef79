"""A look at data sets with a label for each pixel: folders, pairs, sizes, labels; in words and with counts."""

import shutil

import numpy as np
from PIL import Image

from lamina.data.dense_check import DENSE


def looked(archive):
    return DENSE["ade20k"](archive.parent)


def test_a_whole_archive_can_be_used(ade20k_archive):
    found = looked(ade20k_archive)
    assert (found.wrong, found.classes, found.roles) == ([], 150, {"training": 3, "test": 2})
    assert found.remarks == [
        "differs from what we expected: 3 training images, not 20210",
        "differs from what we expected: 2 test images, not 2000",
    ]
    (ade20k_archive / "objectInfo150.txt").unlink()
    assert looked(ade20k_archive).remarks[0] == "there is no objectInfo150.txt, so classes are called by their numbers"


def test_its_own_folder_can_be_named_as_well(ade20k_archive):
    assert DENSE["ade20k"](ade20k_archive).roles == {"training": 3, "test": 2}


def test_an_archive_that_is_not_there_is_told_with_where_it_belongs(tmp_path):
    found = DENSE["ade20k"](tmp_path)
    assert found.roles == {} and len(found.wrong) == 1
    assert found.wrong[0].startswith(f"ade20k was not found; looked for {tmp_path}/ADEChallengeData2016, ")
    assert "annotations/training" in found.layout


def test_a_folder_that_is_not_there_and_one_that_is_empty_are_told_apart(ade20k_archive):
    shutil.rmtree(ade20k_archive / "annotations" / "training")
    for path in (ade20k_archive / "images" / "validation").iterdir():
        path.unlink()
    found = looked(ade20k_archive)
    assert found.roles == {"training": 3, "test": 0}
    assert found.wrong == [
        f"{ade20k_archive}/annotations/training is not there",
        f"{ade20k_archive}/images/validation holds no .jpg",
    ]


def test_images_without_a_map_and_maps_without_an_image_are_counted(ade20k_archive):
    (ade20k_archive / "annotations" / "training" / "ADE_training_0.png").unlink()
    (ade20k_archive / "images" / "validation" / "ADE_validation_1.jpg").unlink()
    assert looked(ade20k_archive).wrong == [
        "1 of 3 training images have no label map in annotations/training: 1 ('ADE_training_0')",
        "1 of 2 validation label maps have no image in images/validation: 1 ('ADE_validation_1')",
    ]


def test_sizes_that_differ_and_labels_outside_the_palette_are_counted_and_the_first_is_named(ade20k_archive):
    maps, images = (ade20k_archive / folder / "training" for folder in ("annotations", "images"))
    for number in (0, 2):
        Image.fromarray(np.zeros((9, 8), np.uint8)).save(maps / f"ADE_training_{number}.png")
    Image.fromarray(np.full((21, 29), 151, np.uint8)).save(maps / "ADE_training_1.png")
    assert looked(ade20k_archive).wrong == [
        "2 of 3 training images differ in size from their label maps or cannot be opened, the first: "
        f"{images}/ADE_training_0.jpg is 20 x 30 pixels and its label map 9 x 8; each image needs a map of its own "
        "size",
        "1 of 1 training images that were tried have labels outside the palette or cannot be read, the first: "
        f"{maps}/ADE_training_1.png has label 151; labels of such files go from 1 to 150, and 0 stands for none",
    ]


def test_an_image_that_is_cut_short_is_noticed(ade20k_archive):
    path = ade20k_archive / "images" / "validation" / "ADE_validation_0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    (wrong,) = looked(ade20k_archive).wrong
    assert wrong.startswith("1 of 2 validation images that were tried ") and f"{path} cannot be read (" in wrong


def test_scenes_of_digits_need_nothing_and_are_looked_at(tmp_path):
    found = DENSE["segment-digits"](tmp_path)
    assert (found.wrong, found.classes, found.roles) == ([], 11, {"training": 1000, "test": 200})
