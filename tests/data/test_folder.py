import os
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lamina.data.decode import decode_image
from lamina.data.folder import folder_source, held_out, labelled_folder
from lamina.data.streams import StreamSettings, build_stream
from lamina.errors import ConfigError, DataError


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


# ---------------------------------------------------------------- images that are refused


def png(width, height, *chunks, bits=1):
    """Return a PNG of zeros, or of whatever else `chunks` hold, whose header says this size."""
    packed = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush() if not chunks else b""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), *(chunks or ((b"IDAT", data),)), (b"IEND", b""))
    whole = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + whole


def refused(contents):
    with pytest.raises((ValueError, OSError)) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(contents)
    return str(error.value)


def limits(width, height):
    return f"its header says {width} x {height} pixels; at most 30000 on a side and 100 million in all are read"


@pytest.mark.parametrize(
    ("width", "height"), [(60000, 60000), (50000, 40), (40, 50000), (30001, 400), (30000, 3334), (10001, 10000)]
)
def test_a_header_of_too_many_pixels_is_refused_before_anything_is_decoded(width, height):
    # there is nothing behind the header that could be decoded
    assert refused(png(width, height, (b"IDAT", zlib.compress(b"")))) == limits(width, height)


@pytest.mark.parametrize(("width", "height"), [(30000, 3333), (10000, 10000), (9500, 9500)])
def test_a_header_within_the_limits_is_believed(width, height):
    assert "its header says" not in refused(png(width, height, (b"IDAT", zlib.compress(b""))))


def test_real_images_that_are_too_large_are_refused():
    for format in ("PNG", "JPEG", "BMP"):
        assert refused(_contents(Image.new("L", (50000, 600)), format)) == limits(50000, 600)
    whole = png(20000, 6000)
    assert len(whole) < 20_000
    assert refused(whole) == limits(20000, 6000)


@pytest.mark.parametrize("kind", ["lossy", "lossless", "extended"])
def test_a_webp_is_refused_before_its_decoder_makes_room(monkeypatch, kind):
    def reached(*arguments):
        raise AssertionError("the decoder was reached")

    image = Image.new("RGB", (13, 11))
    options = {"lossy": {}, "lossless": {"lossless": True}, "extended": {"exif": b"Exif\0\0II*\0"}}[kind]
    contents = bytearray(_contents(image, "WEBP", **options))
    assert contents[12:16] == {"lossy": b"VP8 ", "lossless": b"VP8L", "extended": b"VP8X"}[kind]
    monkeypatch.setattr("lamina.data.decode.WebPImageFile", reached)
    with pytest.raises(AssertionError):
        decode_image(bytes(contents))
    width, height = {"lossy": (16383, 15001), "lossless": (16384, 15001), "extended": (60001, 50001)}[kind]
    if kind == "lossy":
        contents[26:30] = struct.pack("<HH", width, height)
    elif kind == "lossless":
        contents[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        contents[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    assert refused(bytes(contents)) == limits(width, height)


def test_a_strip_that_a_resize_would_blow_up_is_refused():
    assert decode_image(png(1300, 13)).shape == (3, 13, 1300)
    for size in ((1301, 13), (13, 1301)):
        message = (
            f"its header says {size[0]} x {size[1]} pixels; one side may be at most 100 times as long as the other"
        )
        assert refused(png(*size)) == message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
def test_the_limits_of_pil_neither_warn_nor_decide(monkeypatch, format):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    contents = _contents(Image.fromarray(pixels), format)
    expected = decode_image(contents)
    for limit in (None, 1, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(decode_image(contents), expected)
        assert refused(png(10001, 10000, (b"IDAT", b""))) == limits(10001, 10000)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limits_of_pil_do_not_decide_in_a_folder_either(image_folder, monkeypatch):
    root = image_folder()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert len(built(root).tasks[0].train) == 15


@pytest.mark.parametrize("size", [(0, 11), (13, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size):
    assert refused(png(*size, (b"IDAT", b""))) == "its header is damaged, or says that it has no pixels"


def test_a_webp_without_pixels_is_refused():
    contents = bytearray(_contents(Image.new("RGB", (13, 11)), "WEBP"))
    contents[26:28] = bytes(2)
    assert refused(bytes(contents)) == "its header says 0 x 11 pixels: there is nothing to see"


def test_text_that_unfolds_without_end_is_refused():
    text = (b"zTXt", b"note\0\0" + zlib.compress(bytes(5_000_000)))
    assert refused(png(13, 11, text, (b"IDAT", b""))) == (
        "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"
    )


def test_a_file_too_large_to_be_read_is_refused(monkeypatch):
    contents = png(13, 11)
    monkeypatch.setattr("lamina.data.decode.MOST_BYTES", len(contents))
    assert decode_image(contents).shape == (3, 11, 13)
    assert refused(contents + b"x") == "it has more than 0 MB; larger files are not read"


@pytest.mark.parametrize(
    ("format", "what"),
    [("GIF", "a GIF image"), ("TIFF", "a TIFF image"), ("AVIF", "an AVIF image"), ("PDF", "a PDF document")],
)
def test_other_formats_are_named_and_their_decoders_never_reached(format, what):
    image = Image.new("RGB", (13, 11))
    contents = b"\0\0\0\x20ftypavif" if format == "AVIF" else _contents(image, format)
    assert refused(contents) == f"it is {what}; JPEG, PNG, WEBP and BMP are read"
    assert refused(_contents(image, "ICO")) == "cannot identify image file"


def test_of_a_stereo_photo_the_first_picture_is_read():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 11, 13, 3), dtype=np.uint8)
    left, right = map(Image.fromarray, pixels)
    contents = _contents(left, "MPO", save_all=True, append_images=[right])
    np.testing.assert_array_equal(decode_image(contents), decode_image(_contents(left, "JPEG")))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_tag_does_not_cost_the_image(format):
    image = Image.new("RGB", (13, 11), (90, 90, 90))
    out = decode_image(_contents(image, format, exif=b"Exif\0\0garbage"))
    assert out.shape == (3, 11, 13) and np.abs(out.astype(int) - 90).max() <= 2


def test_a_refused_image_in_a_folder_is_named_or_left_out(image_folder):
    root = image_folder()
    (root / "train" / "c" / "1.png").write_bytes(png(50000, 40))
    odd = root / "test" / "b" / "\x1b[2J.png"
    Image.new("RGB", (13, 11)).save(odd.with_name("x.gif"))
    odd.with_name("x.gif").rename(odd)
    stream = built(root, skip_broken=True)
    assert stream.skipped == 2 and 7 not in stream.tasks[0].train.indices
    mend = "mend it, or leave broken images out by --skip-broken"
    with pytest.raises(DataError) as error:
        built(root)
    assert str(error.value) == f"{root}/train/c/1.png cannot be read: {limits(50000, 40)}; {mend}"
    (root / "train" / "c" / "1.png").unlink()
    with pytest.raises(DataError) as error:
        built(root)
    assert str(error.value) == (
        f"{root}/test/b/\\x1b[2J.png cannot be read: it is a GIF image; JPEG, PNG, WEBP and BMP are read; {mend}"
    )


def test_a_file_in_a_folder_is_read_only_up_to_the_limit(image_folder, monkeypatch):
    root = image_folder()
    path = root / "train" / "c" / "1.png"
    path.write_bytes(path.read_bytes() + bytes(5_000_000))
    monkeypatch.setattr("lamina.data.decode.MOST_BYTES", 4_000_000)
    with pytest.raises(DataError, match=r"c/1\.png cannot be read: it has more than 4 MB; larger files are not read"):
        built(root)


# ---------------------------------------------------------------- CLASS/* alone


def words(root):
    with pytest.raises(DataError) as error:
        labelled_folder(root)
    return str(error.value)


def test_class_folders_alone_are_a_data_set(image_folder):
    root = image_folder() / "train"
    for name in (".hidden.png", "notes.txt"):
        (root / "a" / name).write_bytes(b"no image")
    (root / ".git").mkdir()
    (root / "b" / "deeper").mkdir()
    shutil.copy(root / "a" / "0.png", root / "b" / "deeper" / "0.png")
    shutil.copy(root / "a" / "0.png", root / "loose.png")
    (root / "e" / "1.png").rename(root / "e" / "1.PNG")
    classes, images = labelled_folder(root, max_side=7)
    assert classes == ["a", "b", "c", "d", "e"]
    assert images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert images.paths[4] == root / "b" / "1.png" and images.paths[13] == root / "e" / "1.PNG"
    assert images.opened(np.arange(15), skip_broken=False).image(0).shape == (3, 7, 8)
    assert labelled_folder(root)[1].max_side == 256


def test_a_folder_may_have_any_name(image_folder):
    root = image_folder("my photos, ünd 猫") / "train"
    classes, images = labelled_folder(root)
    torch.testing.assert_close(images.opened(np.arange(15), False).image(3), stored(root, "b/0.png"))


def test_linked_class_folders_count_and_links_that_lead_back_do_no_harm(image_folder, tmp_path):
    root = image_folder() / "train"
    (root / "f").symlink_to(root.parent / "test" / "a")
    (root / "a" / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "a" / "self.png").symlink_to("self.png")
    classes, images = labelled_folder(root)
    assert classes == ["a", "b", "c", "d", "e", "f"]
    assert np.bincount(images.labels).tolist() == [3, 3, 3, 3, 3, 2]


def test_what_is_no_folder_of_classes_is_told_what_to_do(image_folder, tmp_path):
    missing, bare, loose = tmp_path / "no\nwhere", tmp_path / "bare", tmp_path / "loose"
    bare.mkdir()
    shutil.copytree(image_folder("other") / "train" / "a", loose)
    assert words(missing) == f"{tmp_path}/no\\nwhere is not a folder; name a folder that holds CLASS/*"
    assert words(loose / "0.png") == f"{loose}/0.png is not a folder; name a folder that holds CLASS/*"
    assert words(bare) == f"{bare} holds no folders; name a folder that holds CLASS/*"
    assert words(loose) == (f"{loose} holds 3 images and no folders; put them into a folder named after their class")


def test_a_folder_of_roles_is_sent_to_its_training_part(image_folder):
    for name, test in (("one", "test"), ("two", "val"), ("three", "test")):
        root = image_folder(name, test=test)
        if name == "three":
            (root / "val").mkdir()
        held = {"one": "test and train", "two": "train and val", "three": "test and train and val"}[name]
        assert words(root) == f"{root} holds {held}, not classes; name {root}/train instead"
    (root / "bus").mkdir()
    assert words(root).startswith(f"class 'bus' in {root} has no images")


def test_classes_may_be_called_train_and_test(image_folder):
    root = image_folder(classes=["train", "test"]) / "train"
    assert labelled_folder(root)[0] == ["test", "train"]


def test_a_class_without_images_is_named(image_folder):
    root = image_folder() / "train"
    (root / "bat").mkdir()
    (root / "bat" / "notes.txt").touch()
    message = f"class 'bat' in {root} has no images (.bmp, .jpeg, .jpg, .png, .webp)"
    assert words(root) == f"{message}; add some or remove it"
    (root / "cat").mkdir()
    assert words(root) == f"{message} (nor do 1 more); add some or remove it"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a\nb", "holds a control character"),
        ("\x1b[31mred", "holds a control character"),
        ("a\u202eb", "holds a control character"),
        ("caf\udce9", "is not UTF-8"),
        ("x" * 256, "too long"),
    ],
)
def test_a_class_that_has_no_printable_name_is_refused_and_shown_escaped(image_folder, monkeypatch, name, problem):
    root = image_folder() / "train"
    if len(name) > 255:
        monkeypatch.setattr("lamina.data.folder._folders", lambda root: ["a", name])
        expected = f"'xxxxxxxxxxxxxxxxxxxx'... in {root} has 256 characters, more than 255"
    else:
        (root / "a").rename(root / name)
        expected = f"{name!r} in {root} {problem}"
    assert words(root) == f"the name of class folder {expected}; rename it"
    assert words(root).isprintable()


@pytest.mark.parametrize("name", ["café", "猫 und 犬", "😀", "-rf", "a'b\"c", "a..", "x" * 255])
def test_any_other_name_of_a_class_is_kept(image_folder, name):
    root = image_folder() / "train"
    (root / "a").rename(root / name)
    assert name in labelled_folder(root)[0]


def test_a_folder_that_cannot_be_listed_is_one_sentence(image_folder, monkeypatch):
    root = image_folder() / "train"
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("c"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert words(root) == f"{root}/c cannot be read: Permission denied"


# ---------------------------------------------------------------- what is kept aside

#: images of the classes 0, 1, 2, 4 in turn: 1, 2, 8 and 25 of them
LABELS = np.repeat([0, 1, 2, 4], [1, 2, 8, 25])
NAMES = [f"IMG_{number:04d}.jpg" for number in range(36)]


@pytest.mark.parametrize(
    ("share", "counts"),
    [(0, [0, 0, 0, 0]), (0.01, [0, 1, 1, 1]), (0.2, [0, 1, 2, 5]), (0.5, [0, 1, 4, 12]), (0.99, [0, 1, 7, 24])],
)
def test_a_share_of_each_class_is_kept_aside_and_never_all(share, counts):
    aside = held_out(LABELS, share, 3, NAMES)
    assert aside.dtype == bool and aside.shape == (36,)
    assert [int(aside[label == LABELS].sum()) for label in (0, 1, 2, 4)] == counts


def test_which_are_kept_aside_follows_from_seed_and_name_alone():
    aside = held_out(LABELS, 0.2, 3, NAMES)
    order = np.random.default_rng(0).permutation(36)
    moved = held_out(LABELS[order], 0.2, 3, [NAMES[place] for place in order])
    np.testing.assert_array_equal(moved, aside[order])
    np.testing.assert_array_equal(held_out((LABELS * 7) % 5, 0.2, 3, NAMES), aside)
    assert (held_out(LABELS, 0.2, 4, NAMES) != aside).any()
    assert np.flatnonzero(aside).tolist() == [1, 6, 7, 12, 17, 19, 21, 25]


def test_files_that_are_added_hardly_move_others():
    labels = np.zeros(100, int)
    names = [f"{number}.png" for number in range(110)]
    before = held_out(labels, 0.2, 0, names[:100])
    after = held_out(np.zeros(110, int), 0.2, 0, names)
    assert (before.sum(), after.sum()) == (20, 22)
    assert (before & ~after[:100]).sum() <= 3
    assert 0 < before[:50].sum() < 20


def test_an_undecodable_name_can_be_kept_aside():
    assert held_out(np.zeros(2, int), 0.5, 0, ["\udcff", "\ud800"]).sum() == 1


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError) as error:
        held_out(LABELS, share, 0, NAMES)
    assert str(error.value) == f"the share of images kept aside must be at least 0 and below 1; got {share}"
