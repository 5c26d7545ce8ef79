"""`lamina data check` and `get`: what is missing or wrong, in words, and 2 where a data set cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.commands import called
from tests.data.test_vtab import lists


@pytest.fixture
def command(monkeypatch, capfd):
    return lambda *words: called(monkeypatch, capfd, *words)


def test_a_whole_copy_is_described_and_what_is_unexpected_is_a_note(command, tmp_path):
    lists(tmp_path)
    assert command("data", "check", "vtab-kitti-distance", tmp_path) == (
        0,
        "vtab-kitti-distance: 5 classes; images: 7 training, 3 validation, 6 test; "
        "split by lists train800.txt, val200.txt, test.txt\n"
        "note: differs from what we expected: 5 classes where we expected 4\n"
        "note: differs from what we expected: 7 training images where we expected 800\n"
        "note: differs from what we expected: 3 validation images where we expected 200\n"
        "note: differs from what we expected: 6 test images where we expected 711\n"
        "note: 1 ('class 3') of 5 classes have no training image\n"
        "note: 2 ('class 1', 'class 4') of 5 classes have no validation image\n"
        "note: 1 ('class 4') of 5 classes have no test image\n"
        "what was found can be used\n",
        [],
    )


def test_its_own_folder_can_be_named_as_well(command, tmp_path):
    place = lists(tmp_path)
    assert command("data", "check", "vtab-kitti-distance", place)[0] == 0
    assert command("data", "check", "vtab-kitti-distance", place.parent)[0] == 0


def test_missing_and_broken_images_are_counted_and_the_first_is_named(command, tmp_path):
    place = lists(tmp_path)
    folder = place / "images" / "some folder"
    for name in ("train800-2.png", "val200-0.png"):
        (folder / name).unlink()
    (folder / "test-4.png").write_bytes(b"GIF89a")
    code, out, errors = command("data", "check", "vtab-kitti-distance", tmp_path)
    assert (code, errors) == (2, [])
    assert out.splitlines()[-3:] == [
        f"wrong: 2 of 10 training or validation images are missing, the first: {folder}/train800-2.png",
        f"wrong: 1 of 6 test images that were tried cannot be read, the first: {folder}/test-4.png: it is a GIF image; "
        "JPEG, PNG, WEBP and BMP are read",
        "it cannot be used as it is",
    ]


def test_a_data_set_that_is_not_there_is_told_with_where_it_belongs(command, tmp_path):
    code, out, errors = command("data", "check", "fgvc-dogs", tmp_path)
    assert (code, errors) == (2, [])
    first = out.splitlines()[0]
    assert first.startswith(f"wrong: fgvc-dogs was not found; looked for {tmp_path}/fgvc/Stanford-dogs, ")
    assert (
        "lamina does not download it. What belongs there: Stanford-dogs with train.json, val.json and test.json"
        in first
    )


def test_json_says_the_same(command, tmp_path):
    lists(tmp_path)
    code, out, _ = command("data", "check", "vtab-kitti-distance", tmp_path, "--json")
    values = json.loads(out)
    assert code == 0 and values["roles"] == {"training": 7, "validation": 3, "test": 6}
    assert values["wrong"] == [] and len(values["remarks"]) == 7
    code, out, _ = command("data", "check", "vtab-dtd", tmp_path, "--json")
    assert code == 2 and json.loads(out)["classes"] == 0


def test_a_name_nobody_knows_is_one_line(command, tmp_path):
    code, out, errors = command("data", "check", "vtab-cifar10", tmp_path)
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("lamina: no stream is called 'vtab-cifar10'; did you mean 'vtab-cifar100'? Known: ")


def test_a_folder_that_is_not_there_is_one_line(command, tmp_path):
    assert command("data", "check", "vtab-dtd", tmp_path / "gone") == (
        2,
        "",
        [f"lamina: {tmp_path}/gone does not exist; name the folder that data sets lie in"],
    )


def test_streams_of_tasks_are_looked_at_too_and_nothing_is_downloaded_for_a_look(command, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise AssertionError("a look must not download")

    monkeypatch.setattr("torchvision.datasets.CIFAR100.download", offline)
    code, out, errors = command("data", "check", "cifar100", tmp_path)
    assert (code, errors, list(tmp_path.iterdir())) == (2, [], [])
    assert out.startswith(f"wrong: cifar100 was not found; looked for {tmp_path}/cifar-100-python, ")
    assert command("data", "check", "tiny-odd-1x10", tmp_path)[1].startswith("wrong: tiny-imagenet was not found; ")
    assert command("data", "check", "digits", tmp_path) == (
        0,
        "digits: 10 classes; images: 1437 training, 360 test; split by the data set itself\n"
        "note: the stream is scikit-learn's handwritten digits, 8 x 8 pixels: five tasks of two classes; needs no "
        "files\nwhat was found can be used\n",
        [],
    )


def test_lines_of_a_list_that_say_something_else_are_counted(command, tmp_path):
    place = lists(tmp_path)
    with (place / "test.txt").open("a") as file:
        file.write("nolabel\nimages/x.png one\n")
    code, out, _ = command("data", "check", "vtab-kitti-distance", tmp_path)
    assert code == 2 and out.splitlines()[0] == (
        f"wrong: {place}/test.txt, line 7: must be a path and a label from 0, as in images/1.jpg 7; got 'nolabel'; 2 "
        "lines are like that"
    )


def test_a_family_says_who_is_in_it(command, tmp_path):
    code, out, errors = command("data", "check", "fgvc-NAME", tmp_path)
    assert (code, out) == (2, "")
    assert errors == ["lamina: fgvc-NAME stands for one of fgvc-cub, fgvc-nabirds, fgvc-flowers, fgvc-dogs, fgvc-cars"]


def test_scenes_of_digits_need_nothing(command, tmp_path):
    assert command("data", "check", "segment-digits", tmp_path) == (
        0,
        "segment-digits: 11 classes; images: 1000 training, 200 test; split by digits that only the test scenes show\n"
        "what was found can be used\n",
        [],
    )


def test_ade20k_is_looked_at(command, tmp_path):
    code, out, errors = command("data", "check", "ade20k", tmp_path)
    assert (code, errors) == (2, []) and out.startswith(f"wrong: ade20k was not found; looked for {tmp_path}/ADE")
    for folder, suffix in (("images", "jpg"), ("annotations", "png")):
        for half in ("training", "validation"):
            place = tmp_path / "ADEChallengeData2016" / folder / half
            place.mkdir(parents=True)
            for name in range(2 if (folder, half) == ("images", "training") else 1):
                Image.fromarray(np.ones((8, 9) if suffix == "png" else (8, 9, 3), np.uint8)).save(
                    place / f"{name}.{suffix}"
                )
    code, out, errors = command("data", "check", "ade20k", tmp_path)
    assert (code, errors) == (2, [])
    assert out.splitlines()[0] == (
        "ade20k: 150 classes; images: 2 training, 1 test; split by the archive's folders training and validation"
    )
    assert "wrong: 1 of 2 training images have no label map in annotations/training: 1 ('1')" in out.splitlines()


def test_what_is_downloaded_is_told_and_looked_at(command, tmp_path, monkeypatch):
    """The download is replaced by one that leaves a data set in another of its layouts."""
    monkeypatch.setattr("lamina.data.transfer.check.download", lambda name, root: lists(root, "dtd"))
    code, out, errors = command("data", "get", "vtab-dtd", tmp_path)
    assert (code, errors) == (0, [f"downloading vtab-dtd to {tmp_path}"])
    assert out.endswith("what was found can be used\n") and "7 training, 3 validation, 6 test" in out
    assert command("data", "get", "vtab-dtd", tmp_path) == (0, out, []), "once is enough"
    code, out, errors = command("data", "get", "fgvc-dogs", tmp_path)
    assert (code, errors) == (2, []) and out.count("lamina does not download") == 1
    code, out, errors = command("data", "get", "ade20k", tmp_path)
    assert (code, errors) == (2, []) and out.startswith("note: lamina does not download ade20k\n")
