"""Images with label maps: pairs that stay together, scenes of digits, ADE20K as its archive lies on a disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from lamina.data import scenes
from lamina.data.dense_streams import DenseSource, dense_stream
from lamina.data.labelled import dense_transform, fitted, labelled, recoloured, resized
from lamina.data.loader import plain_batches, training_steps
from lamina.data.pictures import ArrayPictures, Source
from lamina.data.scenes import LabelledArrays, digit_scenes
from lamina.data.streams import StreamSettings, build_stream
from lamina.data.transforms import InputSpec
from lamina.errors import ConfigError, DataError, ShapeError

SPEC = InputSpec(size=32, mean=(0.5, 0.25, 0.75), std=(0.25, 0.5, 0.25))
FILL = [128, 64, 191]


def coded(height=50, width=70, seed=0):
    """An image whose red channel is 20 times its label, in blocks of ten pixels; and the label map."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 7, (height // 10, width // 10)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    return torch.from_numpy(np.stack([20 * mask, 255 - 20 * mask, np.full_like(mask, 9), mask]))


def inside(mask):
    """Where all neighbours are there and have the same label, so that no resize mixes colours."""
    padded = torch.nn.functional.pad(mask[None, None].float(), (2, 2, 2, 2), value=-1)
    most, least = (torch.nn.functional.max_pool2d(sign * padded, 5, 1)[0, 0] for sign in (1, -1))
    return most == -least


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["plain", "crop-flip"])
def test_labels_move_with_their_pixels(name):
    transform, compared = dense_transform(name, SPEC), 0
    for seed in range(12):
        torch.manual_seed(seed)
        pair = transform(coded(seed=seed))
        assert pair.shape == (4, 32, 32) and pair.dtype == torch.uint8
        sure = inside(pair[3]) & (pair[3] != 255)
        assert ((pair[0].int() - 20 * pair[3].int()).abs()[sure] <= 1).all()
        compared += int(sure.sum())
    assert compared > 500


def test_labels_are_taken_never_mixed():
    pair = torch.zeros(4, 8, 8, dtype=torch.uint8)
    pair[3, :, ::2] = 6
    for size in ((5, 11), (16, 16), (3, 3)):
        assert set(resized(pair, size)[3].unique().tolist()) <= {0, 6}


def test_images_are_resized_smoothly():
    pair = torch.zeros(4, 8, 8, dtype=torch.uint8)
    pair[:3, :, ::2] = 200
    inner = resized(pair, (8, 4))[:3, :, 1:-1]
    assert (inner.int() - 100).abs().max() <= 2


def test_plain_is_the_middle_and_random_ones_differ():
    pair = coded(40, 40)
    assert torch.equal(dense_transform("plain", InputSpec(40, SPEC.mean, SPEC.std))(pair), pair)
    transform, found = dense_transform("crop-flip", SPEC), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        found.append(transform(pair))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_mirroring_comes_half_of_the_time():
    ramp = torch.arange(32).expand(4, 32, 32).to(torch.uint8)
    transform, falling = dense_transform("crop-flip", SPEC), 0
    for seed in range(60):
        torch.manual_seed(seed)
        row = transform(ramp)[0, 0].int()
        falling += int(row[4] < row[2])
    assert 18 <= falling <= 42


def test_small_images_are_filled_up_with_the_mean_colour_and_no_label():
    transform = dense_transform("crop-flip", SPEC)
    filled = 0
    for seed in range(12):
        torch.manual_seed(seed)
        pair = transform(coded(40, 40))
        empty = pair[3] == 255
        filled += bool(empty.any())
        assert (pair[:3, empty] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
        assert (pair[3, : (~empty).any(1).sum(), : (~empty).any(0).sum()] != 255).all()
    assert filled >= 2


def test_without_padding_a_crop_larger_than_the_image_is_refused():
    transform = dense_transform("crop-flip", SPEC, padding=False)
    with pytest.raises(DataError) as raised:
        for seed in range(20):
            torch.manual_seed(seed)
            transform(coded(40, 80))
    size = str(raised.value).split(" which is ")[1].split(" where")[0]
    height, width = map(int, size.split(" x "))
    assert min(height, width) < 32
    assert str(raised.value) == (
        f"a crop of 32 x 32 pixels is larger than the image, which is {size} where it is cropped; with "
        "dense.padding=true it is filled up"
    )


def test_a_crop_is_drawn_again_while_one_class_has_more_than_three_quarters_of_it():
    pair = torch.zeros(4, 64, 64, dtype=torch.uint8)
    pair[3, :, 32:] = 2  # any crop in the middle third is mixed well enough
    pair[3, :5] = 255  # what has no label counts for nobody
    transform = dense_transform("crop-flip", SPEC)
    for seed in range(40):
        torch.manual_seed(seed)
        labels, counts = transform(pair)[3].unique(return_counts=True)
        counts = counts[labels != 255]
        assert len(counts) == 2 and counts.max() / counts.sum() < 0.75


def test_colours_change_and_labels_do_not():
    image, changed = coded()[:3], 0
    for seed in range(10):
        torch.manual_seed(seed)
        other = recoloured(image)
        assert other.dtype == torch.uint8 and other.shape == image.shape
        changed += not torch.equal(other, image)
    assert changed >= 7
    named = {}
    for name in ("crop-flip", "crop-flip-color"):
        torch.manual_seed(3)
        named[name] = dense_transform(name, SPEC)(coded())
    assert torch.equal(named["crop-flip"][3], named["crop-flip-color"][3])
    assert not torch.equal(named["crop-flip"][:3], named["crop-flip-color"][:3])


def test_sizes_keep_the_shape_of_an_image():
    assert fitted(480, 640, 512) == (512, 683)
    assert fitted(480, 640, 512, 2.0) == (1024, 1365)
    assert fitted(100, 1000, 512) == (205, 2048)


def test_an_image_and_a_map_of_another_size_are_refused():
    images = LabelledArrays(np.zeros((2, 3, 8, 6), np.uint8), np.zeros((2, 8, 5), np.uint8), ["a", "b"])
    with pytest.raises(DataError) as raised:
        labelled(images, 1)
    assert str(raised.value) == (
        "image 1 is 8 x 6 pixels and its label map 8 x 5; each image needs a map of its own size"
    )


def test_a_label_outside_the_palette_is_refused_and_none_is_not():
    masks = np.zeros((2, 8, 6), np.uint8)
    masks[0, 0], masks[1, 0] = 255, 2
    images = LabelledArrays(np.zeros((2, 3, 8, 6), np.uint8), masks, ["a", "b"])
    assert labelled(images, 0).shape == (4, 8, 6)
    with pytest.raises(DataError) as raised:
        labelled(images, 1)
    assert str(raised.value) == ("the label map of image 1 has label 2; labels go from 0 to 1, and 255 stands for none")


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────


def source_of(train=9, test=4):
    def make(count, seed):
        pairs = np.stack([coded(seed=seed + i).numpy() for i in range(count)])
        return LabelledArrays(pairs[:, :3], pairs[:, 3], list("abcdefg"))

    return DenseSource(list("abcdefg"), make(train, 0), make(test, 50))


def test_the_loader_gives_labels_of_pixels_by_address():
    split = dense_stream(StreamSettings(name="coded"), source_of()).tasks[0].train
    arguments = {"address": (3, "train", 0, 0), "epochs": 2, "batch_size": 4}
    steps = list(training_steps(split, dense_transform("crop-flip", SPEC), **arguments))
    assert [len(step.columns) for step in steps] == [4, 4, 1, 4, 4, 1]
    compared = 0
    for step in steps:
        assert step.images.shape[1:] == (3, 32, 32) and step.images.dtype == torch.float32
        assert step.columns.shape == (len(step.images), 32, 32) and step.columns.dtype == torch.int64
        red = (step.images[:, 0] * 0.25 + 0.5) * 255
        for image, labels in zip(red, step.columns, strict=True):
            sure = inside(labels) & (labels != 255)
            assert ((image - 20 * labels).abs()[sure] <= 1.01).all()
            compared += int(sure.sum())
    assert compared > 500
    later = list(training_steps(split, dense_transform("crop-flip", SPEC), **arguments, start_step=4))
    assert torch.equal(later[0].images, steps[4].images) and torch.equal(later[0].columns, steps[4].columns)
    (plain,) = plain_batches(split, dense_transform("plain", SPEC), batch_size=20)
    assert plain.columns.shape == (9, 32, 32)


def test_an_image_without_a_map_does_not_pass_for_one_with():
    with pytest.raises(
        ShapeError, match=r"^transform 'plain' takes uint8 \(4, height, width\); got torch.uint8 \(3, 8"
    ):
        dense_transform("plain", SPEC)(torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_a_dense_stream_is_one_task_with_a_column_for_each_class_of_the_palette():
    stream = dense_stream(StreamSettings(name="coded"), source_of())
    assert stream.dense and stream.kind == "segmentation" and stream.columns == 7 and len(stream) == 1
    assert stream.tasks[0].classes == list("abcdefg") and len(stream.tasks[0].test) == 4
    assert stream.fingerprint == dense_stream(StreamSettings(name="coded"), source_of()).fingerprint
    assert stream.fingerprint != dense_stream(StreamSettings(name="coded"), source_of(train=8)).fingerprint


def test_a_share_of_the_training_images_can_be_tested_on():
    stream = dense_stream(StreamSettings(name="coded", holdout=0.34), source_of())
    task = stream.tasks[0]
    assert (task.train.indices.tolist(), task.test.indices.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    assert task.test.images is task.train.images and stream.tested_on == "held-out training images"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_class": 3}, "stream.per_class chooses images by their class; those of segment-digits have many each"),
        (
            {"tasks": 5},
            "segment-digits is one task with all of its 11 classes, since an image shows many; got tasks=5 and "
            "classes=all",
        ),
        (
            {"name": "digits+segment-digits"},
            "segment-digits has a label for each pixel, so it is no part of another stream",
        ),
    ],
)
def test_settings_that_choose_by_class_are_refused(monkeypatch, settings, message):
    monkeypatch.setattr(scenes, "_TRAIN", 3)
    monkeypatch.setattr(scenes, "_TEST", 2)
    digit_scenes.cache_clear()
    with pytest.raises(ConfigError) as raised:
        build_stream(StreamSettings(**{"name": "segment-digits", **settings}))
    digit_scenes.cache_clear()
    assert str(raised.value).startswith(message)


# ── scenes of digits ─────────────────────────────────────────────────────────────────────────────────


def test_scenes_show_all_digits_and_are_the_same_every_time():
    digit_scenes.cache_clear()
    first = digit_scenes()
    assert list(first.classes) == ["background", "zero", "one", "two", "three", "four", "five", "six", "seven",
                                   "eight", "nine"]  # fmt: skip
    assert (len(first.train), len(first.test)) == (1000, 200)
    assert first.train.pixels.shape == (1000, 3, 64, 64)
    for half in (first.train, first.test):
        shown = np.bincount(half.masks.ravel(), minlength=11) / half.masks.size
        assert len(shown) == 11 and shown.min() > 0.005 and 0.6 < shown[0] < 0.9
    assert len({scene.tobytes() for scene in first.train.pixels} | {s.tobytes() for s in first.test.pixels}) == 1200
    digit_scenes.cache_clear()
    assert digit_scenes().train.fingerprint == first.train.fingerprint != first.test.fingerprint


def test_test_scenes_show_digits_that_no_training_scene_shows(monkeypatch):
    def halves():
        stroke = np.zeros((1, 3, 8, 8), np.uint8)
        stroke[..., 1:7, 3:6] = 255
        return Source(
            ["zero", "one", "two"], ArrayPictures(stroke, np.array([0])), ArrayPictures(stroke, np.array([2]))
        )

    monkeypatch.setattr(scenes, "digits", halves)
    digit_scenes.cache_clear()
    source = digit_scenes()
    digit_scenes.cache_clear()
    assert set(np.unique(source.train.masks)) == {0, 1} and set(np.unique(source.test.masks)) == {0, 3}


def test_a_digit_stands_out_where_its_label_is():
    source = digit_scenes()
    for pixels, mask in zip(source.train.pixels[:40], source.train.masks[:40], strict=True):
        ground = np.median(pixels[:, mask == 0], axis=1)
        far = np.abs(pixels - ground[:, None, None]).mean(0)
        assert np.median(far[mask > 0]) > np.median(far[mask == 0]) + 15


# ── ADE20K ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def archive(ade20k_archive):
    return ade20k_archive


def ade(archive, **settings):
    return build_stream(StreamSettings(name="ade20k", **settings), archive.parent)


def test_ade20k_is_read_as_its_archive_has_it(archive):
    task = ade(archive).tasks[0]
    assert (len(task.train), len(task.test), len(task.classes)) == (3, 2, 150)
    assert task.classes[:4] == ["wall", "door (2)", "door (3)", "thing 0"] and len({*task.classes}) == 150
    mask = task.train.images.mask(1)
    assert mask[0, :3].tolist() == [255, 0, 149] and mask.shape == (21, 29)
    raw = np.asarray(Image.open(archive / "annotations" / "training" / "ADE_training_1.png"))
    assert np.array_equal(mask[raw > 0], raw[raw > 0] - 1) and (mask[raw == 0] == 255).all()
    image = task.train.images.image(1)
    assert image.shape == (3, 21, 29) and image.dtype == torch.uint8
    assert labelled(task.test.images, 0).shape == (4, 20, 30)


def test_classes_without_a_list_of_names_have_numbers(archive):
    (archive / "objectInfo150.txt").unlink()
    assert ade(archive).tasks[0].classes[148:] == ["class 149", "class 150"]


def test_a_moved_archive_is_the_same_stream(archive, tmp_path):
    before = ade(archive).fingerprint
    (tmp_path / "elsewhere").mkdir()
    assert ade(archive.rename(tmp_path / "elsewhere" / archive.name)).fingerprint == before


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_is_wrong_with_the_archive_is_said_in_one_line(archive, tmp_path):
    place = archive / "annotations" / "training" / "ADE_training_2.png"
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(place)
    with pytest.raises(DataError) as raised:
        ade(archive)
    assert one_line(raised) == (
        f"{archive}/images/training/ADE_training_2.jpg is 22 x 28 pixels and its label map 9 x 8; each image needs a "
        "map of its own size"
    )
    assert ade(archive, skip_broken=True).skipped == 1
    place.write_bytes(b"not an image")
    with pytest.raises(DataError) as raised:
        ade(archive)
    assert one_line(raised).startswith(f"{place} cannot be read (") and "get it anew" in str(raised.value)
    place.unlink()
    with pytest.raises(DataError) as raised:
        ade(archive)
    assert one_line(raised) == (
        f"{archive}: each image in images/training needs a label map of its name in annotations/training, and the "
        "other way round; ADE_training_2 is in one of them alone (1 such); see `lamina data check "
        "ade20k`"
    )
    with pytest.raises(DataError) as raised:
        build_stream(StreamSettings(name="ade20k"), tmp_path / "nowhere")
    assert one_line(raised).startswith(f"ade20k was not found; looked for {tmp_path}/nowhere/ADEChallengeData2016, ")


def test_a_map_with_colours_is_refused_and_one_with_a_palette_is_read_by_its_indices(archive):
    place = archive / "annotations" / "training" / "ADE_training_0.png"
    indices = np.arange(600, dtype=np.uint8).reshape(20, 30) % 150 + 1
    grey = Image.fromarray(indices)
    painted = Image.fromarray(indices)
    painted.putpalette(range(256))
    for image in (grey, painted):
        image.save(place)
        assert labelled(ade(archive).tasks[0].train.images, 0)[3].tolist() == (indices - 1).tolist()
    grey.convert("RGB").save(place)
    with pytest.raises(DataError) as raised:
        labelled(ade(archive).tasks[0].train.images, 0)
    assert one_line(raised) == (
        f"{place} is an image of mode RGB; a label map has one byte for each pixel (mode L or P)"
    )


def test_a_label_beyond_150_is_refused_when_it_is_read(archive):
    place = archive / "annotations" / "training" / "ADE_training_0.png"
    Image.fromarray(np.full((20, 30), 151, np.uint8)).save(place)
    with pytest.raises(DataError) as raised:
        labelled(ade(archive).tasks[0].train.images, 0)
    assert one_line(raised) == (f"{place} has label 151; labels of such files go from 1 to 150, and 0 stands for none")
