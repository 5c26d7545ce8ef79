"""VTAB-1K from public archives: the order is a hash of keys, thresholds are strict, and pixels stay bytes."""

import json
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lamina.data.streams import StreamSettings, build_stream
from lamina.data.transfer import archives
from lamina.data.transfer.archives import ARCHIVES, nearest_vehicle
from lamina.data.transfer.arrays import sprite_labels
from lamina.data.transfer.order import (
    CLEVR_DISTANCES,
    KITTI_DISTANCES,
    SLICES,
    binned,
    in_order,
    taken,
)
from lamina.data.transfer.vtab import VTAB
from lamina.errors import DataError
from tests.data.archived import (
    NORB_TEST,
    h5py_of_npy,
    write_camelyon,
    write_cifar,
    write_norb,
    write_sprites,
    write_svhn,
)
from tests.data.conftest import pixels


def built(root, name, **values):
    return build_stream(StreamSettings(name=name, **values), root)


def sizes(root, name):
    select, final = built(root, name, test_on="validation").tasks[0], built(root, name).tasks[0]
    return [len(select.train), len(select.test), len(final.test)]


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)


# ── the order and the labels ─────────────────────────────────────────────────────────────────────────


def test_the_order_is_that_which_tensorflow_datasets_documents():
    """The first ids of CIFAR-10's training split, as its users print them."""
    assert in_order("train", range(50_000))[:6].tolist() == [16399, 1680, 47917, 17307, 27051, 48736]


@pytest.mark.parametrize("count", [3680, 27_000])
@pytest.mark.parametrize("name", SLICES)
def test_images_to_learn_from_to_choose_on_and_to_test_are_800_200_and_others(name, count):
    own = SLICES[name]
    parts = [
        {(part.split, int(place)) for place in taken(part, range(count))}
        for part in (own.train, own.validation, own.test)
    ]
    assert [len(part) for part in parts[:2]] == [800, 200]
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]


def test_the_slices_are_those_of_vtab():
    train = {name: (own.validation.split, own.validation.percent) for name, own in SLICES.items()}
    assert {name: where for name, where in train.items() if where[0] == "train"} == {
        "cifar100": ("train", 90), "pets": ("train", 80), "svhn": ("train", 90), "eurosat": ("train", 60),
        "resisc45": ("train", 60), "clevr-count": ("train", 90), "clevr-distance": ("train", 90),
        "dsprites-location": ("train", 80), "dsprites-orientation": ("train", 80),
    }  # fmt: skip
    tested = {name: own.test for name, own in SLICES.items() if own.test != ("test", 0, None)}
    assert tested == {
        "eurosat": ("train", 80, None), "resisc45": ("train", 80, None), "clevr-count": ("validation", 0, None),
        "clevr-distance": ("validation", 0, None), "dsprites-location": ("train", 90, None),
        "dsprites-orientation": ("train", 90, None), "smallnorb-azimuth": ("test", 50, None),
        "smallnorb-elevation": ("test", 50, None),
    }  # fmt: skip
    assert {f"vtab-{name}" for name in SLICES} == {f"vtab-{name}" for name in ARCHIVES} <= set(VTAB)


@pytest.mark.parametrize(
    ("thresholds", "values", "labels"),
    [
        (
            CLEVR_DISTANCES,
            [0.1, 8.0, 8.25, 8.5, 8.75, 9.0, 9.5, 9.75, 10.0, 10.5, 100.0],
            [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5],
        ),
        (KITTI_DISTANCES, [-3.0, 8.0, 8.1, 20.0, 20.1, 999.0, 1000.0], [0, 0, 1, 1, 2, 2, 3]),
    ],
)
def test_a_distance_at_a_threshold_belongs_to_the_lower_class(thresholds, values, labels):
    assert binned(np.array(values), thresholds).tolist() == labels


def test_only_cars_vans_and_trucks_are_near_and_none_is_far():
    row = "{} 0.0 0 0.1 1 2 3 4 1.5 1.6 3.9 -2.0 1.7 {} 0.2"
    rows = [row.format(*each) for each in (("Pedestrian", 3.0), ("Van", 21.5), ("Car", 30.0), ("DontCare", -1000))]
    assert nearest_vehicle("\n".join(rows)) == 21.5
    assert nearest_vehicle("\n".join([*rows, row.format("Truck", 7.25)])) == 7.25
    assert nearest_vehicle(rows[0]) == 1000.0 == nearest_vehicle("")


def test_places_and_turns_of_sprites_fall_into_sixteen_classes_each():
    latents = np.zeros((40, 6), np.int64)
    latents[:, 3], latents[:, 4] = np.arange(40), np.arange(40) % 32
    places, turns = (sprite_labels(latents, f"dsprites-{what}") for what in ("location", "orientation"))
    assert places[:32].tolist() == [place for place in range(16) for _ in range(2)]
    assert turns.tolist() == [turn // 5 * 2 + (turn % 5 >= 3) for turn in range(40)]
    assert set(turns.tolist()) == set(range(16))


# ── archives ─────────────────────────────────────────────────────────────────────────────────────────


def test_cifar_is_cut_in_the_order_of_its_hashed_rows(tmp_path):
    data = write_cifar(tmp_path)
    select, final = built(tmp_path, "vtab-cifar100", test_on="validation"), built(tmp_path, "vtab-cifar100")
    learned, asked = select.tasks[0].train, select.tasks[0].test
    order = in_order("train", range(1100))
    for split, rows in ((learned, order[:800]), (asked, order[990:])):
        wanted = {data["train"][row].tobytes(): f"kind {row % 7}" for row in rows}
        found = {
            learned.images.image(index).numpy().tobytes(): select.tasks[0].classes[column]
            for index, column in zip(split.indices, split.columns, strict=True)
        }
        assert found == wanted
    assert len(final.tasks[0].train) == 910 and len(final.tasks[0].test) == 13
    assert "recomputed from its keys" in final.details["split"] and final.details["group"] == "natural"
    assert isinstance(learned.images.pixels, np.memmap), "pixels lie in a file"


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(print))
    with pytest.raises(DataError) as error:
        built(tmp_path, "vtab-cifar100")
    assert str(error.value) == ("a file of CIFAR-100 wants to run builtins.print; get it anew from its public page")


def test_svhn_has_its_zeros_at_ten_and_its_rows_last(tmp_path, few):
    arrays = write_svhn(tmp_path)
    assert sizes(tmp_path, "vtab-svhn") == [4, 2, 5]
    task = built(tmp_path, "vtab-svhn").tasks[0]
    for index, column in zip(task.test.indices, task.test.columns, strict=True):
        image = task.test.images.image(index).numpy()
        row = next(row for row in range(5) if (arrays["test"][..., row].transpose(2, 0, 1) == image).all())
        assert task.classes[column] == f"digit {(row + 2) % 10}"


def test_textures_are_cut_by_the_first_fold_of_their_own_lists(tmp_path, few):
    said = {
        "train": ["b/b_1.jpg", "a/a_1.jpg", "c/c_1.jpg", "a/a_2.jpg", "b/b_2.jpg"],
        "val": ["a/a_3.jpg", "c/c_2.jpg", "b/b_3.jpg"],
        "test": ["c/c_3.jpg", "a/a_4.jpg"],
    }
    for number, (split, names) in enumerate(said.items()):
        (tmp_path / "dtd" / "labels").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
        for image, name in enumerate(names):
            save(tmp_path / "dtd" / "images" / name, 10 * number + image)
    assert sizes(tmp_path, "vtab-dtd") == [4, 2, 2]
    assert sorted(built(tmp_path, "vtab-dtd").tasks[0].classes) == ["a", "b", "c"]


def test_flowers_are_cut_by_setid(tmp_path, few):
    place = tmp_path / "flowers-102"
    for image in range(1, 13):
        save(place / "jpg" / f"image_{image:05d}.jpg", image)
    savemat(place / "imagelabels.mat", {"labels": np.array([[image % 3 + 1 for image in range(1, 13)]])})
    savemat(
        place / "setid.mat",
        {"trnid": np.array([[1, 5, 7, 9, 2]]), "valid": np.array([[3, 4, 6]]), "tstid": np.array([[8, 10, 11, 12]])},
    )
    assert sizes(tmp_path, "vtab-flowers102") == [4, 2, 4]
    test = built(tmp_path, "vtab-flowers102").tasks[0].test
    assert sorted(test.images.labels[test.indices].tolist()) == sorted(image % 3 for image in (8, 10, 11, 12))


def test_pets_are_named_by_their_breeds(tmp_path, few):
    place = tmp_path / "oxford-iiit-pet"
    (place / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate((("trainval", 20), ("test", 6))):
        names = [
            (f"{'great_dane' if image % 2 else 'Bengal'}_{100 * number + image}", image % 2 + 1)
            for image in range(count)
        ]
        (place / "annotations" / f"{split}.txt").write_text("".join(f"{name} {label} 1 1\n" for name, label in names))
        for image, (name, _) in enumerate(names):
            save(place / "images" / f"{name}.jpg", 100 * number + image)
    assert sizes(tmp_path, "vtab-pets") == [4, 2, 6]
    assert sorted(built(tmp_path, "vtab-pets").tasks[0].classes) == ["Bengal", "great dane"]


@pytest.mark.parametrize(("name", "folder", "first"), [
    ("vtab-eurosat", "2750", "AnnualCrop"), ("vtab-resisc45", "NWPU-RESISC45", "airplane"),
])  # fmt: skip
def test_folders_of_classes_are_one_split_that_is_cut_in_three(tmp_path, few, name, folder, first):
    for number, label in enumerate((first, "forest", "river")):
        for image in range(10):
            save(tmp_path / folder / label / f"{label}_{image}.jpg", 10 * number + image)
    assert sizes(tmp_path, name) == [4, 2, 6]


def test_clevr_counts_objects_and_measures_the_nearest(tmp_path, few):
    place = tmp_path / "CLEVR_v1.0"
    (place / "scenes").mkdir(parents=True)
    depths = [8.0, 8.4, 9.2, 11.0, 9.9, 8.6, 8.0, 9.4, 8.1, 12.0, 9.1, 8.9, 9.3, 8.2, 10.0, 9.6, 8.3, 9.7, 9.8, 11.5]
    for split, count in (("train", 20), ("val", 3)):
        scenes = []
        for image in range(count):
            name = f"CLEVR_{split}_{image:06d}.png"
            save(place / "images" / split / name, image)
            objects = [{"pixel_coords": [0, 0, depths[image] + extra]} for extra in range(3 + image % 4)]
            scenes.append({"image_filename": name, "objects": objects[::-1]})
        (place / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    for name, labels in (("vtab-clevr-count", [0, 1, 2]), ("vtab-clevr-distance", [0, 1, 3])):
        assert sizes(tmp_path, name) == [4, 2, 3]
        test = built(tmp_path, name).tasks[0].test
        assert sorted(test.images.labels[test.indices].tolist()) == labels
    assert "6 objects" in built(tmp_path, "vtab-clevr-count").tasks[0].classes


def test_kitti_keeps_the_images_of_a_video_in_one_split(tmp_path, few):
    place = tmp_path / "kitti"
    (place / "mapping").mkdir(parents=True)
    (place / "training" / "label_2").mkdir(parents=True)
    videos = [f"2011_09_{image // 3:02d}" for image in range(60)]  # 20 videos of three images
    (place / "mapping" / "train_mapping.txt").write_text(
        "".join(f"day {video} {i:010d}\n" for i, video in enumerate(videos))
    )
    (place / "mapping" / "train_rand.txt").write_text(",".join(str(image + 1) for image in range(60)))
    for image in range(60):
        save(place / "training" / "image_2" / f"{image:06d}.png", image)
        text = (
            f"Car 0 0 0 1 2 3 4 1 1 1 0 0 {3.0 + image} 0\n"
            if image % 4
            else "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10\n"
        )
        (place / "training" / "label_2" / f"{image:06d}.txt").write_text(text)
    assert sizes(tmp_path, "vtab-kitti-distance") == [4, 2, 6]
    splits, _ = archives._kitti(place, "kitti-distance")
    numbers = {split: {int(key[:6]) // 3 for key, _, _ in own} for split, own in splits.items()}
    assert (
        not numbers["train"] & numbers["test"]
        and not numbers["train"] & numbers["validation"]
        and len(numbers["test"]) == 2
    )


def test_sprites_are_read_from_front_to_back_and_are_white_on_black(tmp_path, few, monkeypatch):
    from lamina.data.transfer import arrays

    monkeypatch.setattr(arrays, "_AT_ONCE", 7)  # so that rows come from several blocks
    images = write_sprites(tmp_path)
    for name, label in (
        ("vtab-dsprites-location", lambda row: row // 2),
        ("vtab-dsprites-orientation", lambda row: int(row / 2.5)),
    ):
        assert sizes(tmp_path, name) == [4, 2, 3]
        task = built(tmp_path, name).tasks[0]
        for split in (task.train, task.test):
            for index in split.indices:
                image = split.images.image(index).numpy()
                row = next(row for row in range(30) if (images[row] * 255 == image[0]).all())
                assert (image == image[:1]).all() and split.images.labels[index] == label(row)


def test_smallnorb_has_matrices_of_its_own_and_halves_its_test_images(tmp_path, few):
    arrays = write_norb(tmp_path)
    for name, label in (("vtab-smallnorb-azimuth", lambda row: row), ("vtab-smallnorb-elevation", lambda row: row % 9)):
        assert sizes(tmp_path, name) == [4, 2, 6]
        test = built(tmp_path, name).tasks[0].test
        rows = in_order("test", range(12))[6:]
        assert sorted(test.images.labels[test.indices].tolist()) == sorted(label(int(row)) for row in rows)
        first = arrays[NORB_TEST][rows, 0]
        shown = np.stack([test.images.image(index).numpy()[1] for index in test.indices])
        assert {each.tobytes() for each in first} == {each.tobytes() for each in shown}


def test_patch_camelyon_says_what_to_install(tmp_path, monkeypatch):
    write_camelyon(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError) as error:
        built(tmp_path, "vtab-camelyon")
    assert str(error.value) == (
        f"{tmp_path}/pcam holds HDF5 files, which need h5py: pip install h5py; or take lists of images"
    )


def test_patch_camelyon_is_read_by_its_own_keys(tmp_path, few, monkeypatch):
    """With a stand-in for h5py."""
    files = write_camelyon(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", h5py_of_npy)
    assert sizes(tmp_path, "vtab-camelyon") == [4, 2, 4]
    select = built(tmp_path, "vtab-camelyon", test_on="validation").tasks[0]
    rows = in_order("validation", [f"valid_{row}" for row in range(5)])[:2]
    wanted = {files["camelyonpatch_level_2_split_valid_x.h5"][row].transpose(2, 0, 1).tobytes() for row in rows}
    assert {select.test.images.image(index).numpy().tobytes() for index in select.test.indices} == wanted


def test_lists_come_before_archives(tmp_path):
    from tests.data.test_vtab import lists

    write_cifar(tmp_path)
    lists(tmp_path, "cifar")
    assert built(tmp_path, "vtab-cifar100").details["split"] == "lists train800.txt, val200.txt, test.txt"


def test_a_broken_archive_is_told_in_one_sentence(tmp_path):
    place = tmp_path / "svhn"
    place.mkdir()
    for split in ("train", "test"):
        (place / f"{split}_32x32.mat").write_bytes(b"none")
    with pytest.raises(DataError, match=r"^.*svhn is not a whole copy of SVHN, cropped \(.*\); get it anew$"):
        built(tmp_path, "vtab-svhn")


def test_two_roles_of_one_image_are_noticed(tmp_path, monkeypatch):
    """Few images let the slices overlap."""
    monkeypatch.setattr(archives, "SLICES", {"eurosat": replace(SLICES["eurosat"])})
    for number, label in enumerate(("AnnualCrop", "Forest")):
        for image in range(5):
            save(tmp_path / "2750" / label / f"{label}_{image}.jpg", 10 * number + image)
    with pytest.raises(DataError, match=r"each image must have one role$"):
        built(tmp_path, "vtab-eurosat")
