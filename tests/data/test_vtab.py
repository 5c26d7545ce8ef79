"""VTAB-1K as it is passed around: lists of paths and labels beside the images; rare classes keep their columns."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lamina.data.decode import ImageFiles
from lamina.data.streams import STREAMS, StreamSettings, build_stream
from lamina.data.transfer.vtab import VTAB
from lamina.data.transforms import InputSpec, transform
from lamina.errors import DataError
from lamina.runs import plan
from lamina.training.feed import Feed
from tests.data.conftest import pixels

#: 5 classes; class 3 has no training image and class 4 none to test, as happens in a small draw of a large set
LISTS = {
    "train800": [0, 1, 2, 4, 0, 1, 2],
    "val200": [0, 3, 2],
    "test": [2, 1, 0, 3, 3, 1],
}


def lists(root, folder="kitti", roles=LISTS, both=True):
    """Write a data set; return its folder."""
    place = root / "vtab-1k" / folder
    (place / "images" / "some folder").mkdir(parents=True)
    for number, (role, labels) in enumerate(roles.items()):
        lines = []
        for image, label in enumerate(labels):
            name = f"images/some folder/{role}-{image}.png"
            Image.fromarray(pixels(100 * number + image)).save(place / name)
            lines.append(f"{name} {label}\n")
        (place / f"{role}.txt").write_text("".join(lines))
    if both and "val200" in roles:
        names = ("train800", "val200")
        (place / "train800val200.txt").write_text("".join((place / f"{name}.txt").read_text() for name in names))
    return place


def built(root, name="vtab-kitti-distance", **values):
    return build_stream(StreamSettings(name=name, **values), root)


def first_pixels(split):
    return {
        tuple(split.images.image(index)[:, 0, 0].tolist()): label
        for index, label in zip(split.indices, split.columns, strict=True)
    }


def test_final_runs_learn_from_both_lists_and_selection_from_one_of_them(tmp_path):
    lists(tmp_path)
    final, select = built(tmp_path), built(tmp_path, test_on="validation")
    assert len(final) == len(select) == 1 and final.kind == "transfer"
    task, chosen = final.tasks[0], select.tasks[0]
    assert [len(task.train), len(task.test), final.tested_on] == [10, 6, "test images"]
    assert [len(chosen.train), len(chosen.test), select.tested_on] == [7, 3, "validation images"]
    learned, asked = (set(first_pixels(split)) for split in (chosen.train, chosen.test))
    assert not learned & asked and learned | asked == set(first_pixels(task.train))
    expected = {tuple(pixels(100 + image)[0, 0].tolist()) for image in range(3)}
    assert asked == expected


def test_labels_are_those_of_the_lists_in_every_role(tmp_path):
    lists(tmp_path)
    task = built(tmp_path).tasks[0]
    for split, roles in ((task.train, ("train800", "val200")), (task.test, ("test",))):
        said = {}
        for role in roles:
            number = list(LISTS).index(role)
            said |= {
                tuple(pixels(100 * number + i)[0, 0].tolist()): f"class {label}" for i, label in enumerate(LISTS[role])
            }
        assert {key: task.classes[column] for key, column in first_pixels(split).items()} == said


def test_a_class_without_training_or_test_images_has_a_column_all_the_same(tmp_path):
    lists(tmp_path)
    for test_on in (None, "validation"):
        task = built(tmp_path, test_on=test_on).tasks[0]
        assert sorted(task.classes) == [f"class {label}" for label in range(5)] and task.columns == list(range(5))
        assert task.train.columns.min() >= 0 and task.test.columns.min() >= 0


def test_how_it_was_split_and_what_differs_from_what_we_expected_is_said(tmp_path):
    lists(tmp_path)
    assert built(tmp_path).details == {
        "group": "structured",
        "split": "lists train800.txt, val200.txt, test.txt",
        "differs": "5 classes where we expected 4; 7 training images where we expected 800; "
        "3 validation images where we expected 200; 6 test images where we expected 711",
    }


def test_with_the_list_of_both_alone_a_fifth_is_held_out_and_this_is_said(tmp_path):
    place = lists(tmp_path)
    (place / "val200.txt").unlink()
    select = built(tmp_path, test_on="validation")
    assert select.tested_on == "held-out training images"
    assert select.details["split"] == "lists train800val200.txt, test.txt; none of validation images"
    assert len(select.tasks[0].train) + len(select.tasks[0].test) == len(built(tmp_path).tasks[0].train) == 10


def test_names_of_classes_are_taken_from_a_file_beside_the_lists(tmp_path):
    place = lists(tmp_path)
    (place / "classes.txt").write_text("near\nfar\nfarther\nnone\nsun\n")
    task = built(tmp_path).tasks[0]
    assert sorted(task.classes) == ["far", "farther", "near", "none", "sun"]
    (place / "classes.txt").write_text("near\nfar\n")
    with pytest.raises(DataError, match="^vtab-kitti-distance has label 4 and names for 2 classes, from 0$"):
        built(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda place: (place / "val200.txt").write_text((place / "test.txt").read_text()),
            "vtab-kitti-distance: {place}/images/some folder/test-0.png is a validation image and a test image; each "
            "image must have one role",
        ),
        (
            lambda place: (place / "val200.txt").write_text((place / "train800.txt").read_text()),
            "vtab-kitti-distance: {place}/images/some folder/train800-0.png is a training image and a validation "
            "image; each image must have one role",
        ),
        (
            lambda place: (place / "test.txt").write_text("images/1.png 3\n\nimages/2.png -1\n"),
            "{place}/test.txt, line 3: must be a path and a label from 0, as in images/1.jpg 7; got 'images/2.png -1'",
        ),
        (
            lambda place: (place / "test.txt").write_text("7\n"),
            "{place}/test.txt, line 1: must be a path and a label from 0, as in images/1.jpg 7; got '7'",
        ),
        (lambda place: (place / "test.txt").write_text("\n"), "vtab-kitti-distance has no test image"),
        (
            lambda place: [(place / name).unlink() for name in ("train800.txt", "train800val200.txt")],
            "vtab-kitti-distance: {place} has neither train800.txt with val200.txt nor train800val200.txt",
        ),
        (
            lambda place: (place / "images" / "some folder" / "val200-1.png").unlink(),
            "{place}/images/some folder/val200-1.png cannot be read: it is empty or cannot be opened; mend it, or "
            "leave broken images out by --skip-broken",
        ),
    ],
)
def test_a_spoiled_copy_is_told_in_one_sentence(tmp_path, spoil, message):
    place = lists(tmp_path)
    spoil(place)
    with pytest.raises(DataError) as error:
        built(tmp_path)
    assert str(error.value) == message.format(place=place)


def test_all_nineteen_are_there_in_three_groups_with_the_published_numbers_of_classes():
    groups = {}
    for dataset in VTAB.values():
        groups.setdefault(dataset.group, []).append(dataset.classes)
    assert {group: len(own) for group, own in groups.items()} == {"natural": 7, "specialized": 4, "structured": 8}
    assert sum(sum(own) for own in groups.values()) == 940
    assert len({dataset.folders[0] for dataset in VTAB.values()}) == 19
    assert all(name in STREAMS and dataset.sizes[:2] == (800, 200) for name, dataset in VTAB.items())


@pytest.mark.parametrize("name", VTAB)
def test_each_of_them_is_read_in_the_layout_in_which_it_is_passed_around(name, tmp_path):
    lists(tmp_path, VTAB[name].folders[0])
    stream = built(tmp_path, name)
    assert stream.columns == max(VTAB[name].classes, 5) and stream.details["group"] == VTAB[name].group


def test_runs_on_them_stretch_images_where_they_are_trained_on_and_where_they_are_not(tiny_vit):
    from lightning_fabric import Fabric

    run, _ = plan("vpt-deep", "vtab-dtd")
    assert (run.augmentation, run.normalization) == ("stretch", "imagenet")
    own, _ = plan("vpt-deep", "vtab-dtd", overrides={"augmentation": "flip"})
    assert (own.augmentation, own.normalization) == ("flip", "imagenet")
    assert plan("vpt-deep", "digits")[0].normalization == "backbone"
    feed = Feed(Fabric(accelerator="cpu", devices=1), _spec(), augmentation=run.augmentation)
    assert feed.plain_view.transform.name == "stretch" == feed.train_transform.name
    assert feed.plain_view.key == ("stretch",), "features of stretched images must not be taken for those of plain ones"


def _spec():
    from tests.streams import SPEC

    return SPEC


def test_decoded_images_are_bytes_on_disk_and_not_numbers_in_memory(tmp_path):
    lists(tmp_path)
    images = built(tmp_path).tasks[0].train.images
    assert images._pixels.dtype == np.uint8 and isinstance(images._pixels.base, np.memmap)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_photograph_is_stretched_from_its_full_size_and_not_turned(tmp_path, kind):
    """As TensorFlow has it: bilinear, no filter before it, and the EXIF tag (here a quarter turn) means nothing."""
    path = lists(tmp_path) / "images" / "some folder" / "test-2.png"
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(pixels(5, height=500, width=700)).save(
        path, kind, exif=tag, **({"quality": 95} if kind == "JPEG" else {})
    )
    images = built(tmp_path).tasks[0].test.images
    with Image.open(path) as file:
        stored = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    assert stored.shape == (3, 500, 700) and torch.equal(images.image(2), stored)
    seen = transform("stretch", InputSpec(64, (0.5,) * 3, (0.5,) * 3))(images.image(2))
    full = F.interpolate(stored[None].float(), (64, 64), mode="bilinear", align_corners=False, antialias=False)[0]
    assert (seen.float() - full).abs().max() <= 1


def test_photographs_of_other_streams_are_kept_shrunk_and_upright(tmp_path):
    path = tmp_path / "photo.jpg"
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(pixels(5, height=500, width=700)).save(path, exif=tag)
    images = ImageFiles("some", [path], np.zeros(1, np.int64)).opened(np.arange(1), False)
    assert images.image(0).shape == (3, 358, 256)
    whole = ImageFiles("some", [path], np.zeros(1, np.int64), None).opened(np.arange(1), False)
    assert whole.image(0).shape == (3, 500, 700), "the cache tells the two apart"
