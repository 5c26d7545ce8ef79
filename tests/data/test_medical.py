"""Medical sets: a stratified split of our own that depends on names alone, and labels as each archive writes them."""

import numpy as np
import pytest
from PIL import Image

from lamina.data.streams import StreamSettings, build_stream
from lamina.data.transfer import medical
from lamina.data.transfer.medical import MEDICAL, stratified
from lamina.errors import DataError
from tests.data.conftest import pixels


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Eight and four images take the place of 800 and 200."""
    monkeypatch.setattr(medical, "TRAIN", 8)
    monkeypatch.setattr(medical, "VALIDATION", 4)


def photos(folder, count, name="{}.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(pixels(number)).save(folder / name.format(number))


def built(root, name, **values):
    return build_stream(StreamSettings(name=name, **values), root)


def sizes(root, name):
    select, final = built(root, name, test_on="validation").tasks[0], built(root, name).tasks[0]
    return [len(select.train), len(select.test), len(final.train), len(final.test)], sorted(final.classes)


def test_shares_are_proportional_disjoint_complete_and_exact_in_number():
    labels = np.repeat([0, 1, 2, 3], [7, 50, 29, 1])
    names = [f"{number}.png" for number in range(87)]
    train, validation, test = stratified(labels, names, (40, 10))
    assert sorted([*train, *validation, *test]) == list(range(87))
    assert (len(train), len(validation), len(test)) == (40, 10, 37)
    # 40 / 87 of each class, to less than one image
    assert np.abs(np.bincount(labels[train], minlength=4) - 40 / 87 * np.array([7, 50, 29, 1])).max() < 1
    assert np.abs(np.bincount(labels[validation], minlength=4) - 10 / 87 * np.array([7, 50, 29, 1])).max() < 1


def test_a_share_larger_than_what_is_left_of_rare_classes_is_filled_up_with_others():
    labels = np.repeat([0, 1, 2], [1, 1, 10])
    train, validation, test = stratified(labels, list("abcdefghijkl"), (9, 3))
    assert (len(train), len(validation), len(test)) == (9, 3, 0)


def test_who_is_in_which_role_is_decided_by_names_and_not_by_order():
    labels = np.repeat([0, 1], [30, 12])
    names = np.array([f"{label}/{number}" for number, label in enumerate(labels)])
    parts = stratified(labels, names, (8, 4))
    turned = stratified(labels[::-1], names[::-1], (8, 4))
    for part, other in zip(parts, turned, strict=True):
        assert set(names[part]) == set(names[::-1][other])
    assert set(names[parts[0]]) != set(names[:8]), "a stretch of names is no draw"


def test_folders_of_classes_are_read_whatever_lies_deeper_below_a_class(tmp_path):
    for number, name in enumerate(("ART", "BLA", "EBO")):
        photos(tmp_path / "BM_cytomorphology_data" / name / "0001-1000", 6 + number)
    photos(tmp_path / "BM_cytomorphology_data" / "EBO" / "1001-2000", 2)
    assert sizes(tmp_path, "medical-bone-marrow") == ([8, 4, 12, 11], ["ART", "BLA", "EBO"])


def test_where_folders_nest_findings_the_deepest_is_the_class(tmp_path):
    for organ, finding in (("lower", "polyps"), ("lower", "cecum"), ("upper", "pylorus")):
        photos(tmp_path / "labeled-images" / organ / "kinds" / finding, 6)
    assert sizes(tmp_path, "medical-hyperkvasir") == ([8, 4, 12, 6], ["cecum", "polyps", "pylorus"])


@pytest.mark.parametrize(
    ("name", "folder", "table", "head", "images", "suffix"),
    [
        ("medical-aptos", "aptos2019", "train.csv", "id_code,diagnosis", "train_images", "png"),
        ("medical-eyepacs", "eyepacs", "trainLabels.csv", "image,level", "train", "jpeg"),
    ],
)
def test_grades_in_a_table_are_classes(tmp_path, name, folder, table, head, images, suffix):
    photos(tmp_path / folder / images, 20, "{}_left." + suffix)
    rows = "".join(f"{number}_left,{number % 3}\n" for number in range(20))
    (tmp_path / folder / table).write_text(f"{head}\n{rows}")
    assert sizes(tmp_path, name) == ([8, 4, 12, 8], ["grade 0", "grade 1", "grade 2"])
    task = built(tmp_path, name).tasks[0]
    for index, column in zip(task.test.indices, task.test.columns, strict=True):
        number = int(task.test.images.image(index).sum())
        own = [n for n in range(20) if _sum(tmp_path / folder / images / f"{n}_left.{suffix}") == number]
        assert task.classes[column] == f"grade {own[0] % 3}"


def _sum(path):
    return int(np.asarray(Image.open(path).convert("RGB"), np.int64).sum())


def test_a_table_with_a_column_for_each_class_is_read_and_must_mark_one(tmp_path):
    place = tmp_path / "isic2019"
    photos(place / "ISIC_2019_Training_Input", 16, "ISIC_{}.jpg")
    table = place / "ISIC_2019_Training_GroundTruth.csv"
    rows = [f"ISIC_{n},{float(n % 2 == 0)},{float(n % 2)},0.0\n" for n in range(16)]
    table.write_text("image,NV,MEL,UNK\n" + "".join(rows))
    assert sizes(tmp_path, "medical-isic") == ([8, 4, 12, 4], ["MEL", "NV"])
    table.write_text("image,NV,MEL,UNK\n" + "".join(rows) + "ISIC_3,1.0,1.0,0.0\n")
    with pytest.raises(DataError) as error:
        built(tmp_path, "medical-isic")
    assert str(error.value) == f"{table}, line 18: must name an image and one class; got 2 classes"


def test_the_split_is_said_to_be_our_own(tmp_path):
    for name in ("Parasitized", "Uninfected"):
        photos(tmp_path / "cell_images" / name, 9)
    assert built(tmp_path, "medical-malaria").details["split"] == "our own, stratified: 8, 4 and the rest"


def test_too_few_images_for_the_split_are_refused(tmp_path):
    for name in ("Parasitized", "Uninfected"):
        photos(tmp_path / "cell_images" / name, 6)
    with pytest.raises(DataError) as error:
        built(tmp_path, "medical-malaria")
    assert str(error.value) == (
        f"medical-malaria: {tmp_path / 'cell_images'} has 12 images; the split is of 8 to learn from, 4 to choose on "
        "and the rest, so there must be more than 12"
    )


def test_a_root_with_other_data_sets_is_not_taken_for_one_of_them(tmp_path):
    for name in ("birds", "fish"):
        photos(tmp_path / name, 9)
    with pytest.raises(DataError, match="^medical-kvasir was not found; looked for "):
        built(tmp_path, "medical-kvasir")
    assert len(MEDICAL) == 9
