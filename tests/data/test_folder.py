import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lamina.data.decode import decode_image
from lamina.data.folder import folder_source
from lamina.data.streams import StreamSettings, build_stream
from lamina.errors import DataError


def built(root, **values):
    return build_stream(StreamSettings(name=f"folder:{root}", **values))


def stored(root, name):
    return torch.from_numpy(np.array(Image.open(root / name)).transpose(2, 0, 1).copy())


def test_classes_are_folders_sorted_by_name_and_images_files_sorted_by_name(image_folder):
    root = image_folder()
    source = folder_source(root)
    assert source.classes == ["a", "b", "c", "d", "e"]
    assert source.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert source.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert source.train.address(4) == str(root / "train" / "b" / "1.png")


def test_pixels_of_a_stream_are_those_of_the_files(image_folder):
    root = image_folder()
    stream = built(root)
    (task,) = stream
    for split, role in ((task.train, "train"), (task.test, "test")):
        together = split.images.batch(split.indices)
        count = 3 if role == "train" else 2
        for place, (index, column) in enumerate(zip(split.indices, split.columns, strict=True)):
            expected = stored(root, f"{role}/{task.classes[column]}/{index % count}.png")
            assert expected.shape == (3, 11, 13)
            torch.testing.assert_close(split.images.image(int(index)), expected, rtol=0, atol=0)
            torch.testing.assert_close(together[place], expected, rtol=0, atol=0)


def test_images_of_several_sizes_keep_their_own(image_folder):
    root = image_folder()
    wide = np.random.default_rng(1).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    Image.fromarray(wide).save(root / "train" / "b" / "1.png")
    images = built(root).tasks[0].train.images
    assert images.batch(np.array([0, 1])) is None
    np.testing.assert_array_equal(images.image(4).numpy(), wide.transpose(2, 0, 1))
    torch.testing.assert_close(images.image(5), stored(root, "train/b/2.png"), rtol=0, atol=0)


def test_val_stands_in_for_test(image_folder):
    assert len(built(image_folder(test="val")).tasks[0].test) == 10


def test_hidden_files_and_other_files_are_passed_over(image_folder):
    root = image_folder()
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (root / "train" / "a" / name).write_bytes(b"no image")
    (root / "train" / ".git").mkdir()
    (root / "train" / "a" / "folder.png").mkdir()
    assert len(built(root).tasks[0].train) == 15


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.Png", "x.webp", "x.BMP"])
def test_every_promised_format_is_read_in_any_case(image_folder, name):
    root = image_folder()
    Image.new("RGB", (13, 11), (200, 100, 50)).save(root / "train" / "a" / name)
    task = built(root).tasks[0]
    assert len(task.train) == 16
    (index,) = [i for i in range(16) if task.train.images.labels[i] == 0][-1:]
    mean = task.train.images.image(index).float().mean((1, 2))
    torch.testing.assert_close(mean, torch.tensor([200.0, 100.0, 50.0]), rtol=0, atol=3)


def _contents(image, format="PNG", **options):
    import io

    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_grey_becomes_three_equal_channels():
    grey = np.arange(11 * 13, dtype=np.uint8).reshape(11, 13)
    np.testing.assert_array_equal(decode_image(_contents(Image.fromarray(grey))), np.stack([grey] * 3))


def test_sixteen_bits_become_eight_by_scale_not_by_clipping():
    grey = (np.arange(11 * 13).reshape(11, 13) * 257).astype(np.uint16)
    out = decode_image(_contents(Image.fromarray(grey)))
    np.testing.assert_array_equal(out, np.stack([np.arange(11 * 13).reshape(11, 13)] * 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    image = Image.new("RGBA", (13, 11), (40, 40, 40, 255))
    image.paste((0, 0, 0, 0), (0, 0, 5, 11))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        image.info["transparency"] = image.getpixel((0, 0))
    else:
        image = image.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = decode_image(_contents(image))
    assert out.shape == (3, 11, 13)
    assert (out[:, :, :5] == 255).all()
    assert (out[:, :, 5:] == 40).all()


def test_a_palette_is_resolved():
    image = Image.new("RGB", (13, 11), (10, 200, 30)).quantize(4)
    assert (decode_image(_contents(image)) == np.array([10, 200, 30]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (10, 12)), (6, (0, 10)), (8, (12, 0))])
def test_photos_are_turned_upright(image_folder, orientation, corner):
    image = Image.new("RGB", (13, 11))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = orientation
    root = image_folder()
    image.save(root / "train" / "a" / "0.png", exif=exif)
    out = built(root).tasks[0].train.images.image(0)
    assert out.shape == ((3, 13, 11) if orientation > 4 else (3, 11, 13))
    assert [tuple(place) for place in out[0].nonzero().tolist()] == [corner]


@pytest.mark.parametrize("orientation, shape", [(1, (3, 7, 14)), (6, (3, 14, 7))])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_long_short_side_is_shrunk_in_proportion(image_folder, orientation, shape, format):
    root = image_folder()
    image = Image.linear_gradient("L").resize((200, 100)).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    (root / "train" / "a" / "0.png").write_bytes(_contents(image, format, exif=exif))
    stream = build_stream(StreamSettings(name=f"folder:{root}"), max_side=7)
    out = stream.tasks[0].train.images.image(0).float()
    assert out.shape == shape
    # the gradient runs down the photo as stored, and still covers its range
    down = out.mean((0, 2)) if orientation == 1 else out.mean((0, 1)).flip(0)
    assert down.diff().min() > 20
    small = stream.tasks[0].train.images.image(1)
    assert small.shape == (3, 7, 8)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


def test_a_truncated_image_is_named_in_one_sentence(image_folder):
    root = image_folder()
    _truncate(root / "train" / "c" / "1.png")
    with pytest.raises(DataError) as error:
        built(root)
    assert str(error.value) == (
        f"{root}/train/c/1.png cannot be read: image file is truncated; "
        "mend it, or leave broken images out by --skip-broken"
    )


@pytest.mark.parametrize(
    "contents, reason",
    [(b"", "it is empty or cannot be opened"), (b"plain text", "cannot identify image file")],
)
def test_a_file_that_is_no_image_is_named_even_from_the_cache(image_folder, contents, reason):
    root = image_folder()
    (root / "test" / "c" / "1.png").write_bytes(contents)
    (root / "test" / "d" / "0.png").write_bytes(contents)
    assert built(root, skip_broken=True).skipped == 2
    for _ in range(2):
        with pytest.raises(DataError) as error:
            built(root)
        assert str(error.value) == (
            f"{root}/test/c/1.png cannot be read: {reason} (and 1 more); "
            "mend it, or leave broken images out by --skip-broken"
        )


def test_broken_images_are_left_out_and_counted_when_asked(image_folder):
    root = image_folder()
    _truncate(root / "train" / "c" / "1.png")
    (root / "test" / "a" / "0.png").write_bytes(b"no image")
    whole = built(image_folder("whole"))
    for _ in range(2):
        stream = built(root, skip_broken=True)
        task = stream.tasks[0]
        assert (stream.skipped, len(task.train), len(task.test)) == (2, 14, 9)
        assert 7 not in task.train.indices and 0 not in task.test.indices
        for index in task.train.indices.tolist():
            torch.testing.assert_close(task.train.images.image(index), whole.tasks[0].train.images.image(index))
        with pytest.raises(IndexError):
            task.train.images.image(7)


def test_a_broken_image_is_the_right_one_when_few_are_wanted(image_folder):
    root = image_folder()
    _truncate(root / "train" / "d" / "1.png")
    # classes b and d: images 3, 4, 5 and 9, 10, 11 of the source
    stream = built(root, classes="odd", skip_broken=True)
    assert sorted(stream.tasks[0].train.indices.tolist()) == [3, 4, 5, 9, 11]
    assert stream.skipped == 1
    with pytest.raises(DataError, match=r"train/d/1\.png cannot be read: image file is truncated; mend it"):
        built(root, classes="odd")
    assert built(root, classes="even").skipped == 0


def test_a_class_whose_images_are_all_broken_is_refused(image_folder):
    root = image_folder()
    for path in (root / "test" / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="class 'b' has no readable test image; every class"):
        built(root, skip_broken=True)


@pytest.mark.parametrize("role, words", [("train", "training"), ("test", "test")])
def test_a_class_on_one_side_only_is_refused(image_folder, role, words):
    root = image_folder()
    shutil.rmtree(root / role / "d")
    with pytest.raises(DataError) as error:
        built(root)
    assert str(error.value) == (
        f"stream 'folder:{root}': class 'd' has no {words} image; every class needs images to learn from and "
        "images to test on"
    )


def test_an_empty_class_is_refused(image_folder):
    root = image_folder()
    for name in ("empty", "void"):
        (root / "train" / name).mkdir()
    with pytest.raises(DataError, match=r"class 'empty' has no training image \(nor do 1 more\)"):
        built(root)


def test_a_folder_without_the_layout_is_told_the_layout(tmp_path, image_folder):
    layout = "a folder of images holds train/CLASS/* and test/CLASS/* or val/CLASS/*"
    root = image_folder()
    shutil.rmtree(root / "test")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "test").mkdir()
    for path, message in (
        (tmp_path / "nowhere", f"{tmp_path}/nowhere is not a folder; {layout}"),
        (root, f"{root} has no test/ or val/; {layout}"),
        (root / "train", f"{root}/train has no train/; {layout}"),
        (tmp_path / "bare", f"{tmp_path}/bare/train has no folders; {layout}"),
    ):
        with pytest.raises(DataError) as error:
            built(path)
        assert str(error.value) == message


def test_a_changed_file_is_decoded_anew(image_folder):
    root = image_folder()
    before = built(root)
    Image.new("RGB", (13, 11), "red").save(root / "train" / "a" / "0.png")
    after = built(root)
    assert after.tasks[0].train.images.image(0)[0].min() == 255
    assert after.fingerprint != before.fingerprint


def test_a_changed_file_of_the_same_size_is_decoded_anew(image_folder):
    root = image_folder()
    for color in ("red", "blue"):
        Image.new("RGB", (13, 11), color).save(root / "train" / "a" / "0.bmp")
        image = built(root).tasks[0].train.images.image(0)
        assert image[0].min() == (255 if color == "red" else 0)


def test_a_copy_elsewhere_has_the_same_fingerprint(image_folder, tmp_path):
    root = image_folder()
    shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert built(root).fingerprint == built(tmp_path / "elsewhere").fingerprint


def test_a_cache_that_cannot_be_written_gives_the_same_images(image_folder, tmp_path, monkeypatch):
    root = image_folder()
    expected = built(root)
    monkeypatch.setenv("LAMINA_CACHE", str(root / "train" / "a" / "0.png"))
    stream = built(root)
    assert stream.fingerprint == expected.fingerprint
    indices = stream.tasks[0].train.indices
    images, others = stream.tasks[0].train.images, expected.tasks[0].train.images
    torch.testing.assert_close(images.batch(indices), others.batch(indices))
